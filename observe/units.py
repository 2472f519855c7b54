"""Numbers as people read them: 1.2M tokens, 3.4 GiB, 1h 02m. Shared by the progress line and the report."""

import math

UNKNOWN = "–"


def compact(number: float | None) -> str:
    """`number` in three significant digits and a suffix: 950, 41.2k, 1.2M, 3.05G; "–" when there is none."""
    if number is None or not math.isfinite(number):
        return UNKNOWN if number is None else str(number)
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor * 0.9995:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}" if number != int(number) else str(int(number))


def bytes_(number: float | None) -> str:
    """A size in binary units: 512 MiB, 3.4 GiB."""
    if number is None:
        return UNKNOWN
    for factor, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.3g} {suffix}" if number < 1000 * factor else f"{number / factor:.0f} {suffix}"
    return f"{number:.0f} B"


def duration(seconds: float | None) -> str:
    """A time in its two largest units: 45s, 3m 05s, 1h 02m, 2d 03h."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"


def decimal(number: float | None, digits: int = 3) -> str:
    """`number` with `digits` decimals; "–" when there is none."""
    return UNKNOWN if number is None else f"{number:.{digits}f}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction of one as a percentage; "–" when there is none."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.{digits}f}%"
