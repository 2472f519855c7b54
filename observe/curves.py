"""The curves of a run as SVG to put inside a page: text and axes take the page's own colour, light or dark.

matplotlib is imported when a curve is drawn, with the Agg backend's figure and no window system. Long runs are thinned
to a few hundred points a curve, each the mean of its neighbours.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from observe.history import History
from observe.units import compact

MOST_POINTS = 500
MOST_LABEL = 40  # characters of a name beside a curve
LETTER_INCHES = 0.075  # about, of a phase's name
LEFT, RIGHT, BOTTOM, TOP = 0.62, 0.12, 0.52, 0.28  # inches beside the axes; to have them found takes as long as drawing
INK = "#010203"  # drawn in this colour, then replaced by the page's text colour
BLUE, ORANGE, GREEN, PURPLE, PINK = "#3b82f6", "#f97316", "#10b981", "#a855f7", "#ec4899"
FONT = "system-ui, sans-serif"

Points = tuple[list[float], list[float]]


def curves(history: History) -> list[tuple[str, str]]:
    """(title, SVG) of each curve that the run has points for; none before the first logged step."""
    drawn = []
    train = history.of("train")
    loss = _series(train, "loss")
    validation = _series(history.of("validation"), "val_loss", thin_it=False)
    if loss[0] or validation[0]:
        drawn.append(("Loss (nats a token)", _loss_curve(history, loss, validation)))
    for key, title, colour, unit in (
        ("lr", "Learning rate", PURPLE, 1),
        ("grad_norm", "Gradient norm", PINK, 1),
        ("tokens_per_second", "Tokens a second", GREEN, 1),
        ("mfu", "MFU (%)", GREEN, 0.01),
        ("memory_bytes", "Memory (GiB)", ORANGE, 2**30),
    ):
        tokens, values = _series(train, key)
        if tokens:
            points = (tokens, [value / unit for value in values])
            drawn.append((title, _single_curve(history, title, points, colour)))
    return drawn


def thin(xs: Sequence[float], ys: Sequence[float | None], most: int = MOST_POINTS) -> Points:
    """At most `most` points, each the mean of a stretch; a stretch without a number becomes nan, which is a gap."""
    size = math.ceil(len(xs) / most) or 1
    thinned_x, thinned_y = [], []
    for start in range(0, len(xs), size):
        numbers = [y for y in ys[start : start + size] if y is not None and math.isfinite(y)]
        thinned_x.append(sum(xs[start : start + size]) / len(xs[start : start + size]))
        thinned_y.append(sum(numbers) / len(numbers) if numbers else math.nan)
    return thinned_x, thinned_y


def _series(records: list[dict[str, Any]], key: str, thin_it: bool = True) -> Points:
    """`key` over tokens; empty when it never has a number."""
    mine = [record for record in records if record.get("tokens") is not None and key in record]
    if all(record[key] is None for record in mine):
        return [], []
    return thin([r["tokens"] for r in mine], [r[key] for r in mine], MOST_POINTS if thin_it else max(1, len(mine)))


def _loss_curve(history: History, loss: Points, validation: Points) -> str:
    figure, axes = _axes(history, width=8.4, height=3.8)
    if loss[0]:
        axes.plot(*loss, color=BLUE, linewidth=1.1, label="training", marker="." if len(loss[0]) == 1 else "")
    if validation[0]:
        axes.plot(*validation, color=ORANGE, linewidth=1.6, marker="o", markersize=3.5, label="validation")
    for place, source in enumerate(history.floor_sources):
        label = f"bigram model, {source}" if source else "bigram model"
        for phase in history.phases:
            if (floor := history.floor(phase.name, source)) is not None:
                axes.hlines(
                    floor,
                    phase.first_tokens,
                    phase.last_tokens,
                    color=(GREEN, PURPLE, PINK)[place % 3],
                    linewidth=1.2,
                    linestyle=(0, (5, 3)),
                    label=_plain(label),
                )
                label = "_"  # named once
    axes.legend(frameon=False, loc="upper right", labelcolor=INK)
    return _svg(figure, "training and validation loss over tokens")


def _single_curve(history: History, title: str, points: Points, colour: str) -> str:
    figure, axes = _axes(history, width=4.6, height=2.5)
    axes.plot(*points, color=colour, linewidth=1.2, marker="." if len(points[0]) == 1 else "")
    numbers = [y for y in points[1] if math.isfinite(y) and y > 0]
    if title == "Gradient norm" and numbers and max(numbers) > 30 * min(numbers):
        axes.set_yscale("log")  # one spike would flatten all the rest
    elif numbers:
        axes.set_ylim(0, max(numbers) * 1.08)
        axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    return _svg(figure, f"{title} over tokens")


def _axes(history: History, width: float, height: float) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches with the phases shaded and named. No pyplot: it would keep the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    inside = (LEFT / width, BOTTOM / height, 1 - (LEFT + RIGHT) / width, 1 - (BOTTOM + TOP) / height)
    axes = figure.add_axes(inside)
    axes.set_xlabel("tokens", color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    end = max([1, *(phase.last_tokens for phase in history.phases)])
    axes.set_xlim(-0.01 * end, 1.01 * end)  # the whole run in each figure, also where a curve covers less of it
    for place, phase in enumerate(history.phases):
        if place % 2:
            axes.axvspan(phase.first_tokens, phase.last_tokens, color=INK, alpha=0.06, linewidth=0)
        name = _plain(phase.name)
        if phase.tokens / end * (width - LEFT - RIGHT) > len(name) * LETTER_INCHES:  # else names lie on each other
            axes.text(
                (phase.first_tokens + phase.last_tokens) / 2,
                1.01,
                name,
                color=INK,
                fontsize=8.5,
                ha="center",
                va="bottom",
                transform=axes.get_xaxis_transform(),
            )
    return figure, axes


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: short, printable, and no dollar sign that would start a formula."""
    short = text if len(text) <= MOST_LABEL else text[: MOST_LABEL - 1] + "…"
    return "".join(char if char.isprintable() else "�" for char in short).replace("$", r"\$")


def _svg(figure: Any, description: str) -> str:
    """The figure as an inline <svg>: no XML head, no metadata, as wide as its place, text as text."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{description}"', svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", FONT, svg)
    return svg.replace(INK, "currentColor")
