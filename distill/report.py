"""What a filtered dataset says of itself: filter.json for programs, filter.md for people, README.md for the Hub."""

import collections
import html
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from distill.selection import KEPT, NOT_RIGHT, Decision, question_of

BAR, NAMED = 30, 20  # characters of the longest bar; unsolved problems that are named
STEPS = 10  # of a pass rate
LENGTHS = 12  # bars of the histogram of lengths, at most
UNKNOWN = "unknown"
ANY_ANSWER = ("Right and wrong answers alike: for a phase that learns a teacher's probabilities (distill.score, "
              "phases.*.distill with alpha 0), never to be learned as they are.")  # fmt: skip
# Licences by the beginning of a Hub name, lower case, as their cards state them.
LICENSES = {"qwen/qwen3": "apache-2.0", "huggingfacetb/smollm2": "apache-2.0", "openai/gsm8k": "mit"}


def license_of(name: str) -> str:
    """The licence of a model or data set of the Hub, as far as it is known here."""
    known = name.removeprefix("hub:").lower()
    return next((license_ for prefix, license_ in LICENSES.items() if known.startswith(prefix)), UNKNOWN)


def counted(
    rows: Iterable[Mapping[str, Any]], decisions: list[Decision], order: list[str], judged: bool
) -> dict[str, Any]:
    """All figures of the report; `judged`: the decisions tell which are right.

    `pass_rate` counts problems by the share of their samples that is right: none, up to 10%, ..., up to 100%.
    """
    reasons = collections.Counter(decision.reason for decision in decisions)
    samples: collections.Counter[str] = collections.Counter()
    right: collections.Counter[str] = collections.Counter()
    kept: collections.Counter[str] = collections.Counter()
    lengths: list[int] = []
    named: list[dict[str, str]] = []
    first: dict[str, str] = {}
    for row, decision in zip(rows, decisions, strict=True):
        question = question_of(row)
        first.setdefault(question, row["id"])
        samples[question] += 1
        right[question] += decision.reason not in NOT_RIGHT
        if decision.reason == KEPT:
            kept[question] += 1
            lengths.append(row["tokens"])
    unsolved = [question for question in samples if not right[question]] if judged else []
    named = [{"id": first[question], "question": question} for question in unsolved[:NAMED]]
    rates = collections.Counter(-(-right[question] * STEPS // count) for question, count in samples.items())
    return {
        "rows": len(decisions),
        "reasons": {reason: reasons[reason] for reason in order},
        "right": sum(right.values()) if judged else None,
        "problems": {"all": len(samples), "kept": len(kept), "unsolved": len(unsolved), "unsolved_first": named},
        "pass_rate": [rates[step] for step in range(STEPS + 1)] if judged else None,
        "tokens": _lengths(lengths),
    }


def _lengths(lengths: list[int]) -> dict[str, Any]:
    """Of what is kept: sum, quantiles, and a histogram of bars of one width."""
    if not lengths:
        return {"sum": 0, "median": None, "longest": None, "width": None, "histogram": []}
    width = max(1, -(-max(lengths) // LENGTHS))
    width = width if width < 10 else -(-width // 10) * 10
    bars = collections.Counter((length - 1) // width for length in lengths)
    return {"sum": sum(lengths), "median": statistics.median_low(lengths), "longest": max(lengths), "width": width,
            "histogram": [bars[bar] for bar in range(max(bars) + 1)]}  # fmt: skip


def markdown(about: Mapping[str, Any]) -> str:
    """filter.md"""
    rows, kept = about["rows"], about["reasons"][KEPT]
    what = "solutions" if about["task"] == "solve" else "questions"
    lines = [f"# {about['name']}: {kept:,} {what} of {rows:,} traces", ""]
    if about["evaluation_only"]:
        lines += ["**For evaluation only: these are test problems. Never train on them.**", ""]
    problems = about["problems"]
    if about["options"].get("any_answer"):
        lines += [f"{ANY_ANSWER} They are of {problems['kept']:,} of {problems['all']:,} problems."]
    elif about["task"] == "solve":
        lines += [f"The teacher was right in {_share(about['right'], rows)} of its answers. Of "
                  f"{problems['all']:,} problems {problems['kept']:,} have a solution here and "
                  f"{problems['unsolved']:,} were never solved."]  # fmt: skip
    else:
        lines += [f"{_share(kept, rows)} of what the teacher wrote are new questions; it was shown "
                  f"{problems['all']:,} problems."]  # fmt: skip
    lines += ["", "## What became of each trace", "", "The first reason that holds.", "",
              *_table(("reason", "traces", "share", ""),
                      [(reason, f"{count:,}", _share(count, rows), _bar(count, max(about["reasons"].values())))
                       for reason, count in about["reasons"].items() if count],
                      "sum", f"{rows:,}")]  # fmt: skip
    if about["pass_rate"]:
        lines += ["", "## How hard the problems are", "", "Problems by the share of their samples that is right.", "",
                  *_table(("right", "problems", ""), _histogram(_rate, about["pass_rate"]))]  # fmt: skip
    lines += _unsolved(problems)
    tokens = about["tokens"]
    lines += ["", "## How long they are", "", f"{tokens['sum']:,} tokens of the teacher's are kept; half of the texts "
              f"have at most {_number(tokens['median'])}, the longest {_number(tokens['longest'])}.", ""]  # fmt: skip
    if tokens["width"]:
        label = lambda bar: f"{bar * tokens['width'] + 1:,} to {(bar + 1) * tokens['width']:,}"  # noqa: E731
        lines += _table(("tokens", "texts", ""), _histogram(label, tokens["histogram"]))
    lines += ["", "## What it cost", "", cost(about), "", "## Where it is from", "", *_origin(about), ""]
    return "\n".join(lines)


def cost(about: Mapping[str, Any]) -> str:
    """Hours and dollars, and what one kept text came to."""
    seconds, usd = about["cost"]["seconds"], about["cost"]["usd"]
    kept = about["reasons"][KEPT]
    if seconds is None:
        return "The traces do not tell."
    told = f"{seconds / 3600:,.2f} hours of the teacher's processes"
    if usd is None:
        return f"{told}; the price of an hour was not given."
    return f"{told}, ${usd:,.2f}" + (f": ${1000 * usd / kept:,.2f} for a thousand kept." if kept else ".")


def _unsolved(problems: Mapping[str, Any]) -> list[str]:
    if not problems["unsolved"]:
        return []
    more = problems["unsolved"] - len(problems["unsolved_first"])
    listed = [f"- `{one['id'][:12]}` {_line(one['question'])}" for one in problems["unsolved_first"]]
    return ["", "## Never solved", "", *listed, *([f"- and {more:,} more"] if more else [])]


def _origin(about: Mapping[str, Any]) -> list[str]:
    lines = [f"- `{one['job']}`: {one['rows']:,} traces of {one['teacher']} (licence {one['teacher_license']}) on "
             f"problems of {one['source']} (licence {one['source_license']})"
             + ("" if one["chunks"] == one["planned"] else f"; {one['chunks']} of {one['planned']} chunks")
             for one in about["traces"]]  # fmt: skip
    exams = [f"{name} ({exam['questions']:,} questions)" for name, exam in about["evaluation_sets"].items()]
    lines.append(f"- looked for in questions and traces: {', '.join(exams) or 'no evaluation set'}")
    options = about["options"]
    is_limited = about["task"] == "solve" and not options.get("any_answer")
    most = f"at most {options['per_problem']} a problem, " if is_limited else ""
    lines.append(f"- {most}of any length" if options["max_tokens"] is None else
                 f"- {most}of at most {options['max_tokens']:,} tokens")  # fmt: skip
    return lines


def card(about: Mapping[str, Any], with_all: bool) -> str:
    """README.md of the dataset; `with_all`: the traces that were not kept are beside those that were."""
    split, kept = about["split"], about["reasons"][KEPT]
    licenses = sorted({one[key] for one in about["traces"] for key in ("teacher_license", "source_license")})
    known = licenses if UNKNOWN not in licenses else ["other"]
    configs = ["- config_name: default", "  data_files:", f"  - split: {split}", f"    path: data/{split}-*"]
    if with_all:
        configs += ["- config_name: all", "  data_files:", f"  - split: {split}", f"    path: all/{split}-*"]
    what, columns = _content(about, kept)
    warning = ["**For evaluation only: the problems are of a test set. Never train on this.**", ""]
    other = [f"Config `all`: every one of the {about['rows']:,} traces, wrong ones too, with its `reason`.", ""]
    return "\n".join([
        "---", "license:", *[f"- {license_}" for license_ in known],
        "tags:", "- synthetic", "- distillation", *(["- evaluation-only"] if about["evaluation_only"] else []),
        "configs:", *configs, "---",
        f"# {about['name']}", "", *(warning if about["evaluation_only"] else []), what, "", f"Columns: {columns}.", "",
        *(other if with_all else []),
        *_table(("reason", "traces"), [(reason, f"{count:,}") for reason, count in about["reasons"].items() if count],
                "sum", f"{about['rows']:,}"),
        "", *_origin(about), f"- cost: {cost(about)}", "", f"Fingerprint `{about['fingerprint']}`; filter.md tells "
        "more, and manifest.json has every file's size and sha256.", "",
    ])  # fmt: skip


def _content(about: Mapping[str, Any], kept: int) -> tuple[str, str]:
    """What the rows are, and their columns."""
    if about["task"] != "solve":
        what = f"{kept:,} word problems, written by a larger model in the style of others. Their answers are not known."
        return what, "`id`, `question`, `answer` (null), `source`, `teacher`, `tokens` (the teacher's)"
    columns = ("`prompt` and `completion` (lists of `{role, content}`), `id` of the problem, `answer`, `source`, "
               "`teacher`, `tokens` (the teacher's)")  # fmt: skip
    if about["options"].get("any_answer"):
        return f"{kept:,} answers to word problems, written by a model. {ANY_ANSWER}", columns
    return (f"{kept:,} solutions of word problems, written by a larger model. Their last lines give the right answer, "
            "or the majority's where no right one was known; the steps were not checked."), columns  # fmt: skip


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], *sum_row: str) -> list[str]:
    lines = [head, tuple("---:" if number else ":---" for number in range(len(head))), *rows]
    if "" in head:  # bars
        lines[1] = (*lines[1][:-1], ":---")
    if sum_row:
        lines.append((*(f"**{cell}**" for cell in sum_row), *[""] * (len(head) - len(sum_row))))
    return [f"| {' | '.join(row)} |" for row in lines]


def _histogram(label: Any, counts: list[int]) -> list[tuple[str, str, str]]:
    return [(label(number), f"{count:,}", _bar(count, max(counts))) for number, count in enumerate(counts)]


def _rate(step: int) -> str:
    return "none" if step == 0 else f"up to {step * 100 // STEPS}%"


def _bar(count: int, most: int) -> str:
    return "█" * -(-count * BAR // most) if most else ""


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "-"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _line(text: str) -> str:
    """A question as one line of Markdown, cut to what a person reads."""
    text = " ".join(text.split())
    return html.escape(text if len(text) <= 160 else text[:157] + "...", quote=False).replace("`", "'")
