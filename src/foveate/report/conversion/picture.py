"""Small pictures of a conversion: a bar a stage or a layer, and the curve of a healing."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from foveate.report.axis import Axis, decimals, linear_ticks, padded

_WIDTH, _HEIGHT = 380, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 28


def bars(values: Sequence[float], what: str, names: Sequence[str] | None = None) -> Markup:
    """One bar a layer, from zero, or a bar for each name."""
    names = names or [f"layer {layer}" for layer in range(len(values))]
    top = max(*values, 0.0) or 1.0
    low = min(*values, 0.0)
    y = Axis(low, top if top > low else low + 1, _HEIGHT - _BOTTOM, _TOP)
    step = (_WIDTH - _LEFT - _RIGHT) / len(values)
    parts = [_frame(y)]
    for layer, value in enumerate(values):
        x, ends = _LEFT + layer * step, sorted((y(value), y(0.0)))
        parts.append(
            f'<rect class="bar-of" x="{x + 0.1 * step:.1f}" y="{ends[0]:.1f}" width="{0.8 * step:.1f}" '
            f'height="{max(ends[1] - ends[0], 0.5):.1f}"><title>{escape(names[layer])}: {value:.4g}</title></rect>'
        )
    return _svg([*parts, *_places(len(values))], what)


def stacks(shares: Sequence[Sequence[float]], what: str) -> Markup:
    """One bar a layer, parted into shares of one."""
    y = Axis(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP)
    step = (_WIDTH - _LEFT - _RIGHT) / len(shares)
    parts = [_frame(y)]
    for layer, row in enumerate(shares):
        base = 0.0
        for index, share in enumerate(row):
            top = min(base + max(share, 0.0), 1.0)
            x, opacity = _LEFT + (layer + 0.1) * step, 1 - 0.75 * index / len(row)
            parts.append(
                f'<rect class="bar-of" opacity="{opacity:.2f}" x="{x:.1f}" y="{y(top):.1f}" '
                f'width="{0.8 * step:.1f}" height="{y(base) - y(top):.1f}">'
                f"<title>layer {layer}, part {index}: {share:.4g}</title></rect>"
            )
            base = top
    return _svg([*parts, *_places(len(shares))], f"{what}, layer by layer")


def _places(count: int) -> list[str]:
    """Numbers under the bars."""
    step = (_WIDTH - _LEFT - _RIGHT) / count
    return [
        _text(_LEFT + (place + 0.5) * step, _HEIGHT - 10, str(place), "middle")
        for place in range(0, count, max(1, round(count / 10)))
    ]


def curve(points: Sequence[tuple[float, float]], what: str) -> Markup:
    """A line through points of (tokens, value)."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x = Axis(0.0, max(xs) or 1.0, _LEFT, _WIDTH - _RIGHT)
    low, high = padded(ys, 0.06, floor=min(0.0, *ys))
    y = Axis(low, high, _HEIGHT - _BOTTOM, _TOP)
    line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    parts = [_frame(y), f'<polyline class="line-of" points="{line}"/>']
    for tick in linear_ticks(0.0, x.high, 5):
        parts.append(_text(x(tick), _HEIGHT - 10, f"{tick:,.0f}", "end" if tick > 0.9 * x.high else "middle"))
    return _svg(parts, what)


def _frame(y: Axis) -> str:
    ticks = linear_ticks(y.low, y.high, 4)
    digits = decimals(ticks)
    return "".join(
        f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>'
        + _text(_LEFT - 7, y(tick) + 4, f"{tick:.{digits}f}", "end")
        for tick in ticks
    )


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12">{escape(words)}</text>'


def _svg(parts: Sequence[str], what: str) -> Markup:
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(what)}">'
    return Markup(head + "".join(parts) + "</svg>")
