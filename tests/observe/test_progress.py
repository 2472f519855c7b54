"""The progress line: what it says, and when it is shown."""

import io

import pytest

from observe import units
from observe.progress import Progress, format_line

RECORD = {"kind": "train", "step": 120, "phase": "stories", "tokens": 9000, "loss": 3.41159, "lr": 0.0021,
          "grad_norm": 0.9131, "tokens_per_second": 41234.0, "mfu": 0.3812, "memory_bytes": 3.4 * 2**30,
          "seconds": 60.0}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_has_everything_there_is_to_watch():
    line = format_line(RECORD, total_steps=5000, eta_seconds=3725)
    assert line == ("stories  step 120/5000  loss 3.4116  lr 2.10e-03  41.2k tok/s  mfu 38.1%  norm 0.91"
                    "  mem 3.4 GiB  eta 1h 02m")  # fmt: skip


def test_in_fewer_columns_it_leaves_out_what_is_missed_least():
    whole = format_line(RECORD, 5000, 3725)
    assert format_line(RECORD, 5000, 3725, width=len(whole)) == whole
    beginning, end = "stories  step 120/5000  loss 3.4116  41.2k tok/s  ", "eta 1h 02m"
    assert format_line(RECORD, 5000, 3725, width=79) == f"{beginning}mfu 38.1%  {end}"
    assert format_line({**RECORD, "mfu": None}, 5000, 3725, width=79) == f"{beginning}mem 3.4 GiB  {end}"
    assert format_line(RECORD, 5000, 3725, width=60) == beginning + end
    assert format_line(RECORD, 5000, 3725, width=20) == whole[:20]


def test_mfu_is_left_out_where_the_card_is_unknown_and_gaps_are_dashes():
    line = format_line({**RECORD, "mfu": None, "grad_norm": None, "loss": float("nan")}, 5000, None)
    assert "mfu" not in line
    assert "norm –" in line and "loss nan" in line and line.endswith("eta –")


def test_a_log_file_gets_a_line_now_and_then_and_the_last_one_at_the_end():
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(100, stream, every=10, clock=lambda: now[0])
    for step in range(1, 26):
        now[0] = step * 1.0
        progress.update({**RECORD, "step": step})
    progress.close()
    shown = [line.split()[2] for line in stream.getvalue().splitlines()]
    assert shown == ["1/100", "11/100", "21/100", "25/100"]


def test_a_terminal_gets_one_line_that_is_rewritten_and_cut_to_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = Progress(100, stream)
    for step in (1, 2):
        progress.update({**RECORD, "step": step})
    progress.note("checkpoint saved")
    progress.update({**RECORD, "step": 3})
    progress.close()
    lines = stream.getvalue().split("\n")
    assert len(lines) == 3 and lines[2] == ""
    assert lines[0].endswith("\r\x1b[Kcheckpoint saved")
    assert "step 3/100" in lines[1]
    assert all(len(part) <= 39 for line in lines for part in line.split("\r\x1b[K"))


def test_the_time_left_follows_the_latest_pace_pauses_included():
    now = [0.0]
    progress = Progress(1000, io.StringIO(), clock=lambda: now[0])
    assert progress.eta_seconds() is None
    for step in range(1, 101):  # a second a step, and a pause of 10 s each 10 steps: 2 s a step
        now[0] += 11.0 if step % 10 == 0 else 1.0
        progress.update({**RECORD, "step": step})
    assert progress.eta_seconds() == pytest.approx(900 * 2.0, rel=0.1)
    for step in range(101, 301):  # a longer context: four seconds a step
        now[0] += 4.0
        progress.update({**RECORD, "step": step})
    assert progress.eta_seconds() == pytest.approx(700 * 4.0)


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "–"), (0, "0"), (7, "7"), (0.1234, "0.123"), (999, "999"), (1000, "1k"), (41234, "41.2k"),
     (1_250_000, "1.25M"), (999_900, "1M"), (3.05e9, "3.05G"), (float("inf"), "inf")],
)  # fmt: skip
def test_compact_numbers(number, text):
    assert units.compact(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0, "0s"), (59.4, "59s"), (185, "3m 05s"), (3725, "1h 02m"), (183600, "2d 03h")],
)
def test_durations(seconds, text):
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "–"), (12, "12 B"), (2048, "2 KiB"), (1023 * 2**20, "1023 MiB"), (3.4 * 2**30, "3.4 GiB")],
)
def test_sizes(number, text):
    assert units.bytes_(number) == text
