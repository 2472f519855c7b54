"""The report: self-contained, safe with any text, right in its tables, and there for a run that is not done."""

import html.parser
import json
import math
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree

import pytest

from observe.curves import thin
from observe.history import History
from observe.metrics import MetricsLog
from observe.report import main, summary, write_report
from storage import folder

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> & \"'\x00\x1b[31m ]]> \ud800"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, text by the tag around it, and whether tags nest."""

    VOID = {"meta", "br", "img", "link", "path", "use", "rect"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def report(run_folder) -> str:
    return write_report(run_folder).read_text(encoding="utf-8")


def check_self_contained(text: str) -> Page:
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value.startswith("#"), (tag, name, value)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://|url\((?!#)|@import", without_namespaces)
    return page


def rows(text: str) -> list[list[str]]:
    """The rows of a text table's columns, which two or more spaces separate."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_a_finished_run(make_run):
    run_folder = make_run()
    text = report(run_folder)
    page = check_self_contained(text)
    assert "finished at step 300, 307k tokens, 2m 00s of training" in page.text
    for section in ("Curves", "Phases", "Held-out probes", "Samples", "Checkpoints", "Environment", "Config"):
        assert section in page.text
    assert page.text.count("Once upon a time there was a small dog. It ran to the river.") == 12
    assert page.text.index("step 25 · stories") < page.text.index("step 300 · long")
    assert "step-00000100" in page.text and page.text.count("verified") == 2
    assert "2.13.0" in page.text and "tokens: 102400" in page.text


def test_each_curve_is_one_svg_that_is_well_formed_and_follows_the_page(make_run):
    text = report(make_run())
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles == ["Loss (nats a token)", "Learning rate", "Gradient norm", "Tokens a second", "Memory (GiB)"]
    assert len(figures) == len(titles)  # no MFU: it is not known in this run
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert "width" not in root.attrib and root.attrib["viewBox"]
        assert "currentColor" in figure and "#010203" not in figure
    loss = "".join(ElementTree.fromstring(figures[0]).itertext())
    for words in ("training", "validation", "bigram model, stories", "stories", "reasoning", "long", "tokens"):
        assert words in loss


def test_the_phase_table_has_the_numbers_of_the_records(make_run):
    history = History(make_run())
    assert [phase.name for phase in history.phases] == ["stories", "reasoning", "long"]
    for place, phase in enumerate(history.phases):
        last = (place + 1) * 100
        assert (phase.context, phase.tokens, phase.steps) == ((256, 1024, 2048)[place], 102400, 100)
        losses = [record["loss"] for record in history.of("train") if last - 10 < record["step"] <= last]
        assert phase.train_loss == pytest.approx(sum(losses) / 10)
        assert phase.val_loss == pytest.approx(2.1 + 5 * math.exp(-last / 60))
        assert phase.perplexity == pytest.approx(math.exp(phase.val_loss))
        assert phase.ended


def test_the_summary_has_the_same_tables_for_the_terminal(make_run):
    run_folder = make_run()
    head, phases, probes, sources = summary(run_folder).split("\n\n")
    assert head == "synthetic: finished at step 300, 307k tokens, 2m 00s of training"
    assert rows(phases)[1] == ["stories", "256", "102k", "100", "3.014", "3.044", "21.00", "1.171", "ended"]
    table = rows(probes)[2:]
    assert [row[:2] for row in table] == [
        [phase, probe] for phase in ("stories", "reasoning", "long") for probe in ("word problems", "long-range recall")
    ]
    assert table[2][2:] == ["1.0% [0.0%, 2.4%] (2/200)", "60.0% [53.2%, 66.8%] (120/200)", "▲ up"]
    assert [row[4] for row in table] == ["intervals overlap", "intervals overlap", "▲ up", "intervals overlap",
                                         "intervals overlap", "▲ up"]  # fmt: skip
    assert rows(sources)[-2] == ["long", "stories", "1.934", "6.91", "0.900", "3.400", "1.466"]
    assert rows(sources)[-1][1:3] == ["textbooks", "2.534"] and rows(sources)[-1][5:] == ["–", "–"]
    page = Page(report(run_folder))
    for row in rows(phases) + table + rows(sources)[1:]:
        assert all(cell in page.text for cell in row)


def test_a_probe_that_fell_is_shown_as_such(make_run):
    run_folder = make_run(phases=1)
    log = MetricsLog(run_folder / "metrics.jsonl")
    at = {"kind": "probe", "phase": "reasoning", "step": 100, "tokens": 102400, "probe": "recall"}
    log.append({**at, "when": "start", "correct": 9, "total": 10, "accuracy": 0.9, "low": 0.6, "high": 0.98})
    log.append({**at, "when": "end", "correct": 1, "total": 10, "accuracy": 0.1, "low": 0.02, "high": 0.4})
    assert "▼ down" in summary(run_folder) and "▼ down" in Page(report(run_folder)).text


@pytest.mark.parametrize(("phases", "unfinished"), [(0, 0), (0, 7), (0, 30), (1, 0), (2, 60)])
def test_an_unfinished_run(make_run, phases, unfinished):
    run_folder = make_run(phases=phases, unfinished=unfinished)
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"kind":"train","step":9999,"lo')  # being written right now
    text = report(run_folder)
    page = check_self_contained(text)
    assert "9999" not in page.text and "finished at" not in page.text
    assert ("nothing recorded yet" in page.text) == (phases + unfinished == 0)
    assert ("stopped, or still running" in summary(run_folder)) == (phases + unfinished > 0)
    assert ("not ended" in page.text) == (unfinished > 0)
    assert ("<svg" in text) == (phases + unfinished > 0)


def test_a_run_that_diverged_is_still_shown(make_run):
    run_folder = make_run(phases=1)
    log = MetricsLog(run_folder / "metrics.jsonl")
    for step in range(101, 121):
        log.append({"kind": "train", "step": step, "phase": "reasoning", "tokens": step * 1024, "loss": math.nan,
                    "lr": 0.1, "grad_norm": math.inf, "tokens_per_second": 1.0, "seconds": 50.0})  # fmt: skip
    log.append({"kind": "validation", "step": 120, "phase": "reasoning", "tokens": 120 * 1024, "val_loss": math.nan,
                "bits_per_byte": math.nan, "sources": {"stories": {"val_loss": math.nan}}})  # fmt: skip
    check_self_contained(report(run_folder))
    assert rows(summary(run_folder).split("\n\n")[1])[2] == [
        "reasoning", "1024", "20.5k", "20", "–", "–", "–", "–", "not ended"]  # fmt: skip


def test_nothing_that_a_model_or_a_config_says_becomes_part_of_the_page(make_run):
    run_folder = make_run(phases=1)
    (run_folder / "config.yaml").write_text("# " + EVIL.replace("\ud800", ""))
    with open(run_folder / "metrics.jsonl", "a") as file:
        at = {"step": 101, "phase": EVIL, "tokens": 200_000}
        for record in (
            {"kind": "train", "loss": 2.0, "lr": 1.0, **at},
            {"kind": "validation", "val_loss": 2.0, "sources": {EVIL: {"val_loss": 1.0}, "b": {}}, **at},
            {"kind": "sample", "prompt": EVIL, "text": EVIL, **at},
            {"kind": "probe", "probe": EVIL, "when": "end", "correct": 1, "total": 2, "accuracy": 0.5, "low": 0.1,
             "high": 0.9, **at},
            {"kind": "event", "event": EVIL, "why": EVIL, **at},
            {"kind": "event", "event": "bigram_floor", "source": EVIL + "$x", "loss": 3.0},
            {"kind": "event", "event": "started", "environment": {EVIL: EVIL}},
        ):  # fmt: skip
            file.write(json.dumps(record) + "\n")
    text = report(run_folder)
    page = check_self_contained(text)
    assert page.text.count("<script>alert(1)</script>") >= 10  # shown as text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    assert "alert(2)" in summary(run_folder)


def test_checkpoints_that_do_not_verify_say_why(make_run):
    run_folder = make_run(phases=2)
    (run_folder / "checkpoints" / "step-00000200" / "model.safetensors").write_bytes(b"x" * 3000)
    text = Page(report(run_folder)).text
    assert "broken: model.safetensors has changed" in text and text.count("verified") == 1


def test_events_and_restarts_are_told(make_run):
    run_folder = make_run(phases=1)
    log = MetricsLog(run_folder / "metrics.jsonl")
    at = {"kind": "event", "step": 100, "phase": "stories", "tokens": 102400}
    log.append({**at, "event": "resumed", "processes": 2, "skipped": ["step-00000200"]})
    log.append({**at, "event": "early_stop", "patience": 3})
    text = Page(report(run_folder)).text
    assert "resumed 1 time" in text and "early stop" in text and "processes: 2" in text and "patience: 3" in text


def test_a_long_run_stays_a_small_page(make_run):
    run_folder = make_run()
    records = [{"kind": "train", "step": step, "phase": "long", "tokens": step * 1024, "loss": 3 + math.sin(step),
                "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 1e4} for step in range(301, 20_000)]  # fmt: skip
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that does not fit
        assert len(report(run_folder)) < 400_000


def test_thinning_keeps_means_and_gaps():
    assert thin([1, 2, 3], [1.0, None, 3.0]) == ([1, 2, 3], pytest.approx([1.0, math.nan, 3.0], nan_ok=True))
    xs, ys = thin(range(1000), [float(x) for x in range(1000)], most=100)
    assert len(xs) == 100 and ys == pytest.approx(xs)
    _, ys = thin(range(4), [None, math.nan, 5.0, None], most=2)
    assert math.isnan(ys[0]) and ys[1] == 5.0
    assert thin([], []) == ([], [])


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="runs/NAME"):
        write_report(tmp_path)
    assert main([str(tmp_path / "missing")]) == 2
    assert "is no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_page_and_prints_the_tables(run, make_run):
    run_folder = make_run()
    done = run(sys.executable, "-m", "observe.report", run_folder)
    assert done.returncode == 0 and done.stderr == ""
    assert "word problems" in done.stdout and done.stdout.strip().endswith(str(run_folder / "report.html"))
    assert (run_folder / "report.html").stat().st_size > 10_000


def test_reading_a_run_loads_neither_torch_nor_matplotlib(run, make_run):
    code = ("import sys; from observe.report import summary; summary(sys.argv[1]);"
            "print([name for name in sys.modules if name in ('torch', 'matplotlib', 'wandb')])")  # fmt: skip
    assert run(sys.executable, "-c", code, make_run()).stdout.strip() == "[]"


def test_the_report_is_written_atomically(make_run, monkeypatch):
    run_folder = make_run(phases=1)
    first = report(run_folder)
    monkeypatch.setattr(folder.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(run_folder)
    assert (run_folder / "report.html").read_text(encoding="utf-8") == first
