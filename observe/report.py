"""`report.html`: one page with everything about a run, that opens anywhere and loads nothing from anywhere.

`write_report(run_folder)` writes it, for a run that is done as well as for one that goes on; `summary(run_folder)` is
the same tables for the terminal. `python -m observe.report runs/NAME` does both. What a model or a config says is
data here: all of it is escaped, and the page forbids itself scripts and network.
"""

import argparse
import html
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from observe.curves import curves
from observe.history import History, Probe, perplexity
from observe.units import UNKNOWN, bytes_, compact, decimal, duration, percent
from storage import folder

REPORT = "report.html"
OPEN_SAMPLES = 4  # the last ones are shown open, the earlier ones unfold
CHANGES = {"up": "▲ up", "down": "▼ down", "unclear": "intervals overlap", "": UNKNOWN}
BROKEN = "broken: "
PROBES = {"word_problems": "word problems", "recall": "long-range recall"}
HIDDEN_EVENTS = {"started", "phase_start", "phase_end", "checkpoint", "environment", "bigram_floor"}

Table = tuple[list[str], list[list[str]]]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6675; --line: #dfe3ea; --page: #fff; --card: #f6f8fb;
  --good: #0a7d4f; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #98a3b3; --line: #2c3542; --page: #12161d;
  --card: #1a202a; --good: #4ade9a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 .2rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .8rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; }
.curves > :first-child { grid-column: 1 / -1; overflow-x: auto; }
.curves > :first-child svg { min-width: 28rem; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-size: .8rem; font-weight: 600; color: var(--soft); }
td.wrap { white-space: normal; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0; padding: .5rem .8rem; }
summary { cursor: pointer; color: var(--soft); }
pre { margin: .6rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
pre.story { font: 15px/1.6 Georgia, serif; } pre b { font-weight: 600; }
"""


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises:
        FileNotFoundError, ValueError: the folder is no run, or its metrics.jsonl is damaged (`observe.history`).
    """
    history = History(run_folder)
    path = history.folder / REPORT
    folder.write_file(path, page(history).encode("utf-8", "replace"))  # a sample can hold half a surrogate pair
    return path


def summary(run_folder: str | Path) -> str:
    """State, phases and probes of a run as plain text, at most 120 columns where names are short."""
    history = History(run_folder)
    parts = [f"{history.name}: {_state(history)}", "", text_table(*_phase_table(history))]
    if history.probes:
        parts += ["", "held-out probes, with 95% intervals", text_table(*_probe_table(history))]
    if sources := _source_table(history)[1]:
        parts += ["", "validation by source at the end of each phase", text_table(_source_table(history)[0], sources)]
    return "\n".join(parts)


def page(history: History) -> str:
    """The whole page as HTML."""
    sections = [
        ("Curves", _curves(history)),
        ("Phases", html_table(*_phase_table(history))),
        ("Held-out probes, with 95% intervals", html_table(*_probe_table(history)) if history.probes else ""),
        ("Validation by source", html_table(*_source_table(history)) if _source_table(history)[1] else ""),
        ("Samples", _samples(history)),
        ("Events", html_table(*_event_table(history)) if _event_table(history)[1] else ""),
        ("Checkpoints", _checkpoints(history)),
        ("Environment", _environment(history)),
        (
            "Config",
            f"<details><summary>config.yaml</summary><pre>{_text(history.config_text)}</pre></details>"
            if history.config_text
            else "",
        ),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections if content)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(history.name)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{_text(history.name)}</h1><p class="soft">{_text(_state(history))}</p></header>
{_cards(history)}
{body}
</body>
</html>
"""


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in columns of equal width, two spaces apart."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """The same table for the page; every cell is escaped."""
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    kinds = {CHANGES["up"]: "good", CHANGES["down"]: "bad", "verified": "good"}

    def shown(cell: str) -> str:
        kind = "bad" if cell.startswith(BROKEN) else kinds.get(cell, "")
        return f'<td class="{kind}{" wrap" if len(cell) > 60 else ""}">{_text(cell)}</td>'

    body = "".join(f"<tr>{''.join(shown(cell) for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _state(history: History) -> str:
    last = history.last
    if not last:
        return "nothing recorded yet"
    stopped = "stopped" if history.records[-1].get("event") == "stopped" else "stopped, or still running,"
    state = "finished" if history.finished else stopped
    resumed = len(history.events("resumed"))
    again = f", resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed else ""
    return (
        f"{state} at step {last['step']}, {compact(last.get('tokens'))} tokens, "
        f"{duration(history.seconds)} of training{again}"
    )


def _cards(history: History) -> str:
    newest = next(reversed(history.of("validation")), {})
    train = next(reversed(history.of("train")), {})
    shown = {
        "tokens": compact(history.last.get("tokens")),
        "training time": duration(history.seconds),
        "validation loss (nats)": decimal(newest.get("val_loss")),
        "perplexity": decimal(perplexity(newest.get("val_loss")), 2),
        "bits per byte": decimal(newest.get("bits_per_byte")),
        "tokens a second": compact(train.get("tokens_per_second")),
        "memory": bytes_(train.get("memory_bytes")),
    }
    cards = [f'<div class="card"><b>{_text(value)}</b><span>{name}</span></div>' for name, value in shown.items()]
    return f'<div class="cards">{"".join(cards)}</div>'


def _curves(history: History) -> str:
    figures = "".join(f"<figure><h3>{title}</h3>{svg}</figure>\n" for title, svg in curves(history))
    return f'<div class="curves">{figures}</div>' if figures else '<p class="soft">No step was logged yet.</p>'


def _phase_table(history: History) -> Table:
    head = ["phase", "context", "tokens", "steps", "train loss", "val loss", "perplexity", "bits per byte", "state"]
    return head, [
        [
            phase.name,
            UNKNOWN if phase.context is None else str(phase.context),
            compact(phase.tokens),
            str(phase.steps),
            decimal(phase.train_loss),
            decimal(phase.val_loss),
            decimal(phase.perplexity, 2),
            decimal((phase.validation or {}).get("bits_per_byte")),
            "ended" if phase.ended else "not ended",
        ]
        for phase in history.phases
    ]


def _probe_table(history: History) -> Table:
    def measured(record: dict[str, Any] | None) -> str:
        if record is None:
            return UNKNOWN
        return (
            f"{percent(record['accuracy'])} [{percent(record['low'])}, {percent(record['high'])}]"
            f" ({record['correct']}/{record['total']})"
        )

    def row(probe: Probe) -> list[str]:
        name = PROBES.get(probe.name, probe.name.replace("_", " "))
        return [probe.phase, name, measured(probe.before), measured(probe.after), CHANGES[probe.change]]

    return ["phase", "probe", "before", "after", "change"], [row(probe) for probe in history.probes]


def _source_table(history: History) -> Table:
    """Validation by source: worth a table when there are several, or a bigram model to compare with."""
    rows = []
    several = any(len((phase.validation or {}).get("sources") or {}) > 1 for phase in history.phases)
    for phase in history.phases:
        for source, values in ((phase.validation or {}).get("sources") or {}).items():
            loss, floor = values.get("val_loss"), history.floor(phase.name, source)
            below = None if loss is None or floor is None else floor - loss
            rows.append(
                [
                    phase.name,
                    source,
                    decimal(loss),
                    decimal(perplexity(loss), 2),
                    decimal(values.get("bits_per_byte")),
                    decimal(floor),
                    decimal(below),
                ]
            )
    head = ["phase", "source", "val loss", "perplexity", "bits per byte", "bigram model", "loss below it by"]
    return head, rows if several or history.floor_sources else []


def _samples(history: History) -> str:
    samples = history.of("sample")
    shown = []
    for place, sample in enumerate(samples):
        prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
        place_in_run = [sample.get(key, UNKNOWN) for key in ("step", "phase")]
        title = "step {} · {} · {} tokens".format(*place_in_run, compact(sample.get("tokens")))
        state = " open" if place >= len(samples) - OPEN_SAMPLES else ""
        shown.append(
            f"<details{state}><summary>{_text(title)}</summary>"
            f'<pre class="story"><b>{_text(prompt)}</b>{_text(text)}</pre></details>\n'
        )
    return "".join(shown)


def _event_table(history: History) -> Table:
    told = {"kind", "event", "step", "phase", "tokens", "seconds", "environment"}
    events = [record for record in history.of("event") if record.get("event") not in HIDDEN_EVENTS]
    return ["step", "phase", "event", "details"], [
        [
            str(record.get("step", UNKNOWN)),
            str(record.get("phase", UNKNOWN)),
            str(record.get("event", UNKNOWN)).replace("_", " "),
            ", ".join(f"{key}: {value}" for key, value in record.items() if key not in told),
        ]
        for record in events
    ]


def _checkpoints(history: History) -> str:
    rows = [
        [entry.name, bytes_(entry.bytes), f"{BROKEN}{'; '.join(entry.problems)}" if entry.problems else "verified"]
        for entry in history.checkpoints()
    ]
    return html_table(["checkpoint", "size", "state"], rows) if rows else ""


def _environment(history: History) -> str:
    def value(name: str, content: Any) -> str:
        return bytes_(content) if name.endswith("_bytes") and isinstance(content, int | float) else str(content)

    return "".join(
        html_table(
            ["what", "value"],
            [
                [name.removesuffix("_bytes").replace("_", " "), value(name, content)]
                for name, content in entry.items()
                if content is not None
            ],
        )
        for entry in history.environments
    )


def _text(text: str) -> str:
    """Text safe inside the page, attributes included; control characters, which HTML cannot hold, become visible."""
    seen = "".join(char if char in "\n\t" or ord(char) >= 32 and not 0x7F <= ord(char) < 0xA0 else "�" for char in text)
    return html.escape(seen, quote=True)


def main(arguments: Iterable[str] | None = None) -> int:
    """`python -m observe.report runs/NAME`: write the page, print the tables."""
    parser = argparse.ArgumentParser(description="Write report.html of a run and print its tables.")
    parser.add_argument("run", type=Path, help="the run folder, for example runs/default")
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.run)
        print(summary(options.run))
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever closes the pipe has seen enough
    sys.exit(main())
