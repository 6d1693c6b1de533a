"""Small SVG charts: enough for a latency report, with no plotting package on the robot.

A chart is a string. Every function takes data in the axes' own units; `Axes` alone knows pixels.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34  # margins in px: room for the axis figures and the two labels


@dataclass(frozen=True, slots=True)
class Axes:
    """A rectangle of `width` x `height` px that shows x_range by y_range."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (self.width - LEFT - RIGHT) * _share(value, self.x_range)

    def y(self, value: float) -> float:
        """Pixels from the top: greater values are higher."""
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * _share(value, self.y_range)


def _share(value: float, limits: tuple[float, float]) -> float:
    return (value - limits[0]) / ((limits[1] - limits[0]) or 1.0)


def svg(axes: Axes, *marks: str, title: str) -> str:
    """A figure that scales with the page. title: read out by screen readers and shown on hover."""
    box = f'viewBox="0 0 {axes.width} {axes.height}" role="img"'
    return f"<svg {box}><title>{escape(title)}</title>{''.join(marks)}</svg>"


Ticks = int | Sequence[tuple[float, str]]  # about how many, or which and how each is written


def grid(axes: Axes, *, x_label: str, y_label: str, x_ticks: Ticks = 6, y_ticks: Ticks = 4) -> str:
    """Ruled lines, figures and labels; labels carry the unit."""
    bottom, left = axes.height - BOTTOM, LEFT
    columns = (_column(axes.x(v), bottom, t) for v, t in _ticks(axes.x_range, x_ticks))
    rows = (_row(axes.y(v), axes.width, t) for v, t in _ticks(axes.y_range, y_ticks))
    middle = (left + axes.width - RIGHT) / 2
    labels = (
        f'<text class="label" x="{middle:.0f}" y="{axes.height - 4}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(11 {(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(columns) + "".join(rows) + labels


def _column(x: float, bottom: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{bottom + 14:.0f}" text-anchor="middle">{text}</text>'


def _row(y: float, width: int, text: str) -> str:
    line = f'<line class="gridline" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'


def _ticks(limits: tuple[float, float], ticks: Ticks) -> Sequence[tuple[float, str]]:
    return labelled_ticks(limits, ticks) if isinstance(ticks, int) else ticks


def decades(limits: tuple[float, float]) -> list[tuple[float, str]]:
    """Ticks of an axis that shows logarithms to base 10: the whole powers within it."""
    return [(k, f"{10.0**k:g}") for k in range(math.ceil(limits[0] - 1e-9), math.floor(limits[1] + 1e-9) + 1)]


def labelled_ticks(limits: tuple[float, float], count: int) -> list[tuple[float, str]]:
    """About `count` round values within limits (steps of 1, 2 or 5 x 10^n), and how each is written."""
    low, high = limits
    if count == 0:
        return []
    if not high > low:
        return [(low, f"{low:g}")]
    step = round_step((high - low) / count)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(k * step, f"{k * step:.{digits}f}") for k in range(first, last + 1)]


def round_step(step: float) -> float:
    """The least of 1, 2, 5 x 10^n that is not below `step`."""
    decade = 10.0 ** math.floor(math.log10(step))
    return next(m * decade for m in (1.0, 2.0, 5.0, 10.0) if m * decade >= step * (1 - 1e-9))


def line(axes: Axes, xs: Sequence[float], ys: Sequence[float], css: str) -> str:
    """A poly-line; it breaks where y is not finite."""
    pieces, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            pieces.append(f"{pen}{axes.x(x):.1f} {axes.y(y):.1f}")
        pen = "L" if math.isfinite(y) else "M"
    return f'<path class="{css}" d="{"".join(pieces)}"/>'


def bars(axes: Axes, edges: Sequence[float], heights: Sequence[float], css: str) -> str:
    """A histogram's bars, hairline gaps between them."""
    base = axes.y(axes.y_range[0])
    spans = zip(edges[:-1], edges[1:], heights, strict=True)
    return "".join(_bar(axes.x(a), axes.x(b), axes.y(h), base, css) for a, b, h in spans if h > axes.y_range[0])


def _bar(left: float, right: float, top: float, base: float, css: str) -> str:
    width = max(right - left - 0.6, 0.5)
    return f'<rect class="{css}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{base - top:.1f}"/>'


def block(axes: Axes, x_span: tuple[float, float], y_span: tuple[float, float], css: str, hint: str = "") -> str:
    """A filled rectangle with a hover text, cut to the axes' x range."""
    low, high = (min(max(v, axes.x_range[0]), axes.x_range[1]) for v in x_span)
    if high <= low:
        return ""
    left, top = axes.x(low), axes.y(y_span[1])
    size = f'width="{max(axes.x(high) - left, 0.8):.1f}" height="{axes.y(y_span[0]) - top:.1f}"'
    tip = f"<title>{escape(hint)}</title>" if hint else ""
    return f'<rect class="{css}" x="{left:.1f}" y="{top:.1f}" {size}>{tip}</rect>'


def marker(axes: Axes, x: float, css: str, text: str = "", depth: int = 0, *, before: bool | None = None) -> str:
    """A vertical line; `text` at its head, `depth` lines down so that neighbours do not collide.

    before: words stand left of the line; None: on the side that has room.
    """
    at, middle = axes.x(x), (LEFT + axes.width - RIGHT) / 2
    stroke = f'<line class="{css}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{axes.height - BOTTOM}"/>'
    is_before = at >= middle if before is None else before
    side, anchor = (-3, "end") if is_before else (3, "start")
    place = f'x="{at + side:.1f}" y="{TOP + 9 + 13 * depth}" text-anchor="{anchor}"'
    return f'{stroke}<text class="note" {place}>{escape(text)}</text>' if text else stroke


def strip(size: tuple[int, int], *marks: str, title: str) -> str:
    """A drawing of a fixed size (width, height) px without axes, for a cell of a table."""
    box = f'class="strip" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" height="{size[1]}" role="img"'
    return f"<svg {box}><title>{escape(title)}</title>{''.join(marks)}</svg>"


STRIP_MARGIN = 18  # px left and right, for the outer figures


def _strip_x(size: tuple[int, int], limits: tuple[float, float], x: float) -> float:
    return STRIP_MARGIN + (size[0] - 2 * STRIP_MARGIN) * _share(x, limits)


def strip_block(size: tuple[int, int], limits: tuple[float, float], span: tuple[float, float], css: str) -> str:
    """A bar over a span of the strip's one axis."""
    left, right = (_strip_x(size, limits, x) for x in span)
    middle = size[1] / 2
    return f'<rect class="{css}" x="{left:.1f}" y="{middle - 4:.1f}" width="{max(right - left, 0.8):.1f}" height="8"/>'


def strip_dot(size: tuple[int, int], limits: tuple[float, float], x: float, css: str) -> str:
    """A point on the strip's axis."""
    return f'<circle class="{css}" cx="{_strip_x(size, limits, x):.1f}" cy="{size[1] / 2:.1f}" r="3.2"/>'


def strip_text(size: tuple[int, int], limits: tuple[float, float], x: float, text: str) -> str:
    """A figure of the strip's axis."""
    at = f'x="{_strip_x(size, limits, x):.1f}" y="{size[1] / 2 + 4:.1f}"'
    return f'<text {at} text-anchor="middle">{escape(text)}</text>'


def dot(axes: Axes, x: float, y: float, css: str, hint: str = "") -> str:
    """A point, with a hover text."""
    tip = f"<title>{escape(hint)}</title>" if hint else ""
    return f'<circle class="{css}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3.2">{tip}</circle>'


def note(axes: Axes, x: float, y: float, text: str, anchor: str = "start") -> str:
    """Words at a point."""
    return f'<text class="note" x="{axes.x(x):.1f}" y="{axes.y(y):.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """(css class, words) pairs as one line of HTML."""
    swatches = (
        f'<span><svg class="swatch" viewBox="0 0 18 10"><rect class="{css}" width="18" height="10"/></svg>'
        f"{escape(words)}</span>"
        for css, words in entries
    )
    return f'<p class="legend">{"".join(swatches)}</p>'


def peaks(
    xs: NDArray[np.float64], ys: NDArray[np.float64], columns: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `columns` points that keep the greatest y of each stretch, so that no spike is lost in drawing."""
    if len(xs) <= columns:
        return xs, ys
    starts = np.linspace(0, len(xs), columns, endpoint=False).astype(int)
    return xs[starts], np.maximum.reduceat(ys, starts)


def sparse(count: int, columns: int) -> NDArray[np.int64]:
    """Indices of at most `columns` evenly spaced samples out of `count`."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, columns)).round().astype(np.int64))
