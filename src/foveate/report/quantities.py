"""How numbers are written in tables, plots and sentences: one spelling everywhere."""

from __future__ import annotations

from foveate.evaluate.statistics import Interval

MISSING = "–"
MINUS = "\N{MINUS SIGN}"


def bytes_text(value: float | None) -> str:
    """`15728640` -> `15.0 MiB`."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1023.95 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 99.95 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def percent(share: float | None) -> str:
    """`0.25` -> `25%`, with a decimal below ten percent."""
    if share is None:
        return MISSING
    digits = 1 if 0 < share < 0.0995 else 0
    return f"{share:.{digits}%}"


def times(ratio: float | None) -> str:
    """A cost relative to dense: `0.61×`."""
    return MISSING if ratio is None else f"{ratio:.2f}×" if ratio < 9.995 else f"{ratio:.0f}×"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def tokens(value: int) -> str:
    return f"{value:,} tokens"


def signed(value: float, digits: int = 2) -> str:
    """`-0.05` -> `−0.05`; a small number gets one more decimal, as its sign may matter, and nothing has no sign."""
    if 0 < abs(value) < 0.95 * 10**-digits:
        digits += 1
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", MINUS)


def quality(value: Interval | None, digits: int = 2) -> str:
    if value is None:
        return MISSING
    return f"{value.estimate:.{digits}f}" if abs(value.estimate) < 100 else f"{value.estimate:.4g}"


def spread(value: Interval | None) -> str:
    """The interval of an estimate: `0.71–0.89`."""
    return "" if value is None else f"{value.low:.2f}–{value.high:.2f}"
