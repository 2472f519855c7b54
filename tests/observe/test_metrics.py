"""metrics.jsonl: strict JSON whatever the numbers are, torn files, and resuming without gap or repeat."""

import json
import math

import numpy
import pytest
import torch

from observe.metrics import MetricsLog


def train(step: int, phase: str = "a", **values) -> dict:
    return {"kind": "train", "step": step, "phase": phase, "tokens": step * 10, **values}


def at(kind: str, step: int, phase: str = "a", **values) -> dict:
    return {"kind": kind, "step": step, "phase": phase, "tokens": step * 10, **values}


def write(path, records) -> MetricsLog:
    log = MetricsLog(path)
    for record in records:
        log.append(record)
    return log


def test_records_come_back_as_written_and_are_on_disk_at_once(tmp_path):
    path = tmp_path / "runs" / "x" / "metrics.jsonl"
    records = [train(1, loss=3.5), at("sample", 1, prompt="Ein\nMärchen \u2028 🙂", text="\ud800 half")]
    log = write(path, records)
    assert MetricsLog.read(path) == records  # before close: each append is flushed
    assert path.read_bytes().count(b"\n") == 2
    log.close()
    log.append(train(2))
    assert MetricsLog.read(path) == [*records, train(2)]


def test_reading_a_file_that_is_not_there_gives_nothing(tmp_path):
    assert MetricsLog.read(tmp_path / "metrics.jsonl") == []


def test_numbers_that_json_cannot_hold_become_null_and_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sources = {"s": {"val_loss": -math.inf, "bits_per_byte": 1.0}}
    write(path, [train(1, loss=math.nan, grad_norm=math.inf, mfu=None, sources=sources)])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record["loss"] is None and record["grad_norm"] is None and record["sources"]["s"]["val_loss"] is None
    assert record["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "sources.s.val_loss": "-inf"}
    assert record["sources"]["s"]["bits_per_byte"] == 1.0


def test_scalars_of_numpy_and_torch_are_plain_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [train(1, loss=torch.tensor(2.5), lr=numpy.float32(0.5), n=numpy.int64(3), bad=torch.tensor(math.nan))])
    assert MetricsLog.read(path) == [train(1, loss=2.5, lr=0.5, n=3, bad=None, nonfinite={"bad": "nan"})]


def test_a_torn_last_line_is_ignored_and_does_not_spoil_the_next_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [train(1), train(2)]).close()
    whole = path.read_bytes()
    for length in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:length])
        assert MetricsLog.read(path) == [train(1)]
        write(path, [train(7)]).close()
        assert MetricsLog.read(path) == [train(1), train(7)]


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [train(1), train(2), train(3)]).close()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "\0\0\0", lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        MetricsLog.read(path)


def test_rewind_drops_what_came_after_the_save_and_only_that(tmp_path):
    """At step 20 a phase ends: its validation, probes and sample come before the save, the next opening after."""
    path = tmp_path / "metrics.jsonl"
    log = write(path, [train(10), train(20), at("validation", 20), at("probe", 20, when="end"), at("sample", 20)])
    log.mark_checkpoint(step=20, phase="a", tokens=200)
    before = MetricsLog.read(path)
    after = [at("event", 20, "b", event="phase_start"), at("probe", 20, "b", when="start"), train(30, "b")]
    for record in after:
        log.append(record)

    assert log.rewind(20) == 3
    assert MetricsLog.read(path) == before

    for record in after:  # the resumed run makes them again: no gap, no repeat
        log.append(record)
    assert MetricsLog.read(path) == before + after


def test_a_run_broken_anywhere_ends_with_the_same_file_as_an_unbroken_one(tmp_path):
    """A stand-in trainer: two phases of four steps, validation every two, a save every three and at phase ends."""

    def go(log: MetricsLog, start: int, stop_after: int | None = None) -> None:
        """Steps start+1..8; `stop_after` records after that many appends, as a kill would."""
        left = [stop_after if stop_after is not None else 10**6]

        def append(record):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            log.append(record)

        for step in range(start, 9):
            phase = "a" if step <= 4 else "b"
            if step > start:
                append(train(step, phase, loss=1 / step))
                if step % 2 == 0:
                    append(at("validation", step, phase, val_loss=1 / step))
                if step % 4 == 0:
                    append(at("probe", step, phase, probe="recall", when="end"))
                if step % 4 == 0 or step % 3 == 0:
                    if left[0] == 0:
                        raise KeyboardInterrupt
                    left[0] -= 1
                    log.mark_checkpoint(step=step, phase=phase, tokens=step * 10)
                    saved.append(step)
            if step in (0, 4):
                following = "a" if step == 0 else "b"
                append(at("event", step, following, event="phase_start"))
                append(at("probe", step, following, probe="recall", when="start"))

    saved: list[int] = []
    whole = MetricsLog(tmp_path / "whole.jsonl")
    go(whole, 0)
    expected = MetricsLog.read(whole.path)
    assert len(expected) == 22
    for kill in range(len(expected)):
        saved = []
        log = MetricsLog(tmp_path / f"broken-{kill}.jsonl")
        with pytest.raises(KeyboardInterrupt):
            go(log, 0, stop_after=kill)
        log.close()
        again = MetricsLog(log.path)
        start = saved[-1] if saved else 0
        again.rewind(start)
        go(again, start)
        assert MetricsLog.read(log.path) == expected, kill


def test_a_step_that_was_saved_twice_is_cut_where_its_state_was_first_saved(tmp_path):
    """The end of phase a is saved as the beginning of b; then b opens, and the run is stopped before a step of b."""
    path = tmp_path / "metrics.jsonl"
    log = write(path, [train(20), at("probe", 20, when="end")])
    log.mark_checkpoint(step=20, phase="b", tokens=200)
    before = MetricsLog.read(path)
    log.append(at("event", 20, "b", event="phase_start"))
    log.append(at("probe", 20, "b", when="start"))
    log.mark_checkpoint(step=20, phase="b", tokens=200)
    assert log.rewind(20) == 3
    assert MetricsLog.read(path) == before


def test_a_step_saved_before_and_after_a_phase_ended_is_cut_after_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = write(path, [train(20)])
    log.mark_checkpoint(step=20, phase="a", tokens=200)
    log.append(at("validation", 20, phase_end=True))
    log.mark_checkpoint(step=20, phase="b", tokens=200)
    before = MetricsLog.read(path)
    log.append(train(30, "b"))
    log.rewind(20)
    assert MetricsLog.read(path) == before


def test_rewind_past_a_checkpoint_that_did_not_verify(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 31):
        log.append(train(step))
        if step % 10 == 0:
            log.mark_checkpoint(step=step, phase="a", tokens=step * 10)
    assert log.rewind(10) == 22
    assert [record["step"] for record in MetricsLog.read(path)] == [*range(1, 11), 10]


def test_rewind_survives_what_a_crash_does_to_the_end_of_a_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = write(path, [train(1)])
    log.mark_checkpoint(step=1, phase="a", tokens=10)
    before = MetricsLog.read(path)
    log.append(train(2))
    log.close()
    with open(path, "ab") as file:
        file.write(b"\0\0\0\n" + b'{"kind": "train", "st')
    log.rewind(1)
    assert MetricsLog.read(path) == before


def test_rewind_without_a_mark_keeps_the_steps_but_not_the_next_opening(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [train(10), train(20), at("validation", 20)]
    log = write(path, [*kept, at("event", 20, "b", event="phase_start"), at("probe", 20, "b", when="start"), train(30)])
    log.rewind(20)
    assert MetricsLog.read(path) == kept


def test_records_without_a_step_stay_or_go_by_where_they_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    floor = {"kind": "event", "event": "bigram_floor", "source": "s", "loss": 3.0}
    log = write(path, [train(10), floor])
    log.mark_checkpoint(step=10, phase="a", tokens=100)
    before = MetricsLog.read(path)
    log.append(floor)
    assert log.rewind(10) == 1
    assert MetricsLog.read(path) == before


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = write(path, [at("event", 0, event="phase_start"), at("probe", 0, when="start")])
    log.mark_checkpoint(step=0, phase="a", tokens=0)  # stopped before the first step
    log.append(train(1))
    assert log.rewind(0) == 4
    assert MetricsLog.read(path) == []


def test_rewinding_a_file_that_is_not_there_is_no_error(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.rewind(5) == 0
    assert not log.path.exists()
