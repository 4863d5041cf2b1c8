"""Figures as SVG that stands in a page: heat maps, lines, histograms, scatter plots.

A figure is drawn on a canvas WIDTH units wide, scales with the page and takes its colors from the page's style
sheet, so that it is right in light and dark. Its title, and a title on each mark, are what pointers and screen
readers get; there is no script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 270
COLORS = 8  # of lines and groups, --c0 … --c7 in the style sheet; after them the same ones dashed
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot: a label, the group that colors it, and where it stands."""

    label: str
    group: str
    x: float
    y: float


def figure(title: str, body: Iterable[str], width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """An SVG element around finished parts."""
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img"><title>{}</title>{}</svg>'
    ).format(width, height, title, Markup("".join(body)))


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float | None],
    say: Callable[[float], str],
    log: bool = False,
) -> Markup:
    """A table of {(column, row): value}, darker where it is larger, empty where there is none; a scale below it."""
    known = {key: value for key, value in values.items() if value is not None and _drawable(value, log)}
    if not known:
        return Markup()
    high = max(known.values())
    # On a logarithmic scale three decades are enough to look at: one tiny value would take all the shades.
    shade = _Scale([max(v, high / 1000) if log else v for v in known.values()], 0.06, 1.0, log)
    left, top = 12 + 8.5 * max(map(len, rows)), 4
    size = (WIDTH - left - 4) / len(columns)
    tall = min(30.0, max(20.0, size))
    bottom = top + tall * len(rows)
    parts = []
    for i, row in enumerate(rows):
        y = top + i * tall
        parts.append(_text(left - 6, y + tall / 2 + 4, row, "end"))
        for j, column in enumerate(columns):
            found = known.get((column, row))
            about = f"block {column}, {row}: {'dense' if found is None else say(found)}"
            fill = ' class="none"' if found is None else f' class="cell" fill-opacity="{shade(found):.3f}"'
            parts.append(
                f'<rect x="{left + j * size:.2f}" y="{y:.1f}" width="{max(size - 0.6, 0.3):.2f}"'
                f' height="{tall - 0.8:.1f}"{fill}><title>{escape(about)}</title></rect>'
            )
    stride = max(1, math.ceil(len(columns) / 10))
    for j in range(0, len(columns), stride):
        parts.append(_text(left + (j + 0.5) * size, bottom + 14, columns[j], "middle"))
    parts.append(_text(left + (WIDTH - left) / 2, bottom + 30, "block", "middle"))
    at, wide = bottom + 42, 5.0
    shades = [0.06 + 0.94 * k / 23 for k in range(24)] if shade.high > shade.low else [shade(shade.low)] * 4
    for k, opacity in enumerate(shades):
        parts.append(
            f'<rect class="cell" x="{left + k * wide:.1f}" y="{at:.1f}" width="{wide}" height="10"'
            f' fill-opacity="{opacity:.3f}"/>'
        )
    ends = say(shade.high) + (" (logarithmic)" if log else "")
    parts.append(_text(left + len(shades) * wide + 6, at + 10, ends, "start"))
    if shade.high > shade.low:
        below = "\u2264 " if min(known.values()) < shade.low else ""
        parts.append(_text(left - 6, at + 10, below + say(shade.low), "end"))
    return figure(title, parts, height=math.ceil(at + 16))


def lines(
    title: str,
    series: Mapping[str, Points],
    x: str,
    y: str,
    say: Callable[[float], str] | None = None,
    log: bool = False,
) -> Markup:
    """One line a series, in the colors of `legend`."""
    shown = {name: [(a, b) for a, b in points if _drawable(b, log)] for name, points in series.items()}
    axes = _Axes([p for points in shown.values() for p in points], x, y, say, log_y=log)
    if not axes.points:
        return Markup()
    parts = axes.frame()
    for k, (name, points) in enumerate(shown.items()):
        if points:
            path = " ".join(f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in points)
            parts.append(f'<polyline class="line" {_color(k)} points="{path}"><title>{escape(name)}</title></polyline>')
            if len(points) == 1:
                parts.append(_dot(axes, points[0], k, name))
    return figure(title, parts)


def legend(names: Iterable[str]) -> Markup:
    """Which color is whose, for `lines` and `scatter`."""
    sign = '<svg viewBox="0 0 18 10" aria-hidden="true"><path class="line" {} d="M1,5H17"/></svg>'
    items = (Markup("<li>" + sign.format(_color(k)) + "{}</li>").format(name) for k, name in enumerate(names))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def histogram(title: str, before: Sequence[float], after: Sequence[float], span: float, unit: str) -> Markup:
    """Two histograms over the same bins, -span … span: one as an outline, one filled."""
    width, height, bottom = 240, 120, 100
    top = max((*before, *after), default=0)
    if not top:
        return Markup()

    def path(counts: Sequence[float]) -> str:
        wide = width / len(counts)
        steps = "".join(f"V{bottom - 92 * n / top:.1f}h{wide:.2f}" for n in counts)
        return f"M0,{bottom}{steps}V{bottom}"

    ticks = [(0.0, "start"), (width / 2, "middle"), (float(width), "end")]
    names = (f"\u2212{span:g} {unit}", "0", f"{span:g} {unit}")
    return figure(
        title,
        [
            f'<path class="after" d="{path(after)}Z"/>',
            f'<path class="before" d="{path(before)}"/>',
            f'<line class="axis" x1="0" x2="{width}" y1="{bottom}" y2="{bottom}"/>',
            *(_text(at, 114, name, anchor) for (at, anchor), name in zip(ticks, names, strict=True)),
        ],
        width,
        height,
    )


def scatter(title: str, marks: Sequence[Mark], front: Sequence[Mark], x: str, y: str, log: bool = False) -> Markup:
    """Marks, those of the front joined by a line and labelled."""
    shown = [mark for mark in marks if _drawable(mark.y, log) and math.isfinite(mark.x)]
    axes = _Axes([(mark.x, mark.y) for mark in shown], x, y, None, log_y=log)
    if not axes.points:
        return Markup()
    groups = list(dict.fromkeys(mark.group for mark in marks))
    parts = axes.frame()
    joined = sorted((mark for mark in front if mark in shown), key=lambda mark: mark.x)
    if len(joined) > 1:
        path = " ".join(f"{axes.x(m.x):.1f},{axes.y(m.y):.1f}" for m in joined)
        parts.append(f'<polyline class="front" points="{path}"/>')
    parts += [_dot(axes, (mark.x, mark.y), groups.index(mark.group), mark.label) for mark in shown]
    for mark in joined:
        right = axes.x(mark.x) < WIDTH * 0.6
        parts.append(
            _text(axes.x(mark.x) + (7 if right else -7), axes.y(mark.y) - 6, mark.label, "start" if right else "end")
        )
    return figure(title, parts)


# ---------------------------------------------------------------------------------------------------------
# Scales and axes


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


class _Scale:
    """From values to a range of the canvas, linear or logarithmic."""

    def __init__(self, values: Iterable[float], start: float, stop: float, log: bool = False):
        found = list(values)
        self.low, self.high, self.log = min(found), max(found), log
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        low, high = self._at(self.low), self._at(self.high)
        share = (self._at(value) - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start)

    def _at(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        """A few round numbers within the scale."""
        if self.log and self.high / self.low > 3:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
                if len(found) <= 7:
                    break
            return found
        span = self.high - self.low
        if not span:
            return [self.low]
        rough = span / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


class _Axes:
    """The frame of a plot, and where its points stand."""

    right, top, bottom = WIDTH - 10.0, 10.0, HEIGHT - 48.0

    def __init__(self, points: Points, x: str, y: str, say: Callable[[float], str] | None, log_y: bool):
        self.points, self.names = points, (x, y)
        self.say = say or (lambda value: f"{value:,.6g}")
        if points:
            self.y = _Scale([b for _, b in points], self.bottom - 8, self.top + 8, log_y)
            self.left = 36 + 7.5 * max(len(self.say(tick)) for tick in self.y.ticks())
            self.x = _Scale([a for a, _ in points], self.left + 8, self.right - 8)

    def frame(self) -> list[str]:
        parts = []
        for tick in self.y.ticks():
            y = self.y(tick)
            parts.append(f'<line class="rule" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(self.left - 6, y + 4, self.say(tick), "end"))
        for tick in self.x.ticks():
            parts.append(_text(self.x(tick), self.bottom + 17, f"{tick:,.6g}", "middle"))
        parts.append(f'<path class="axis" d="M{self.left},{self.top}V{self.bottom}H{self.right}"/>')
        middle = (self.left + self.right) / 2
        parts.append(_text(middle, HEIGHT - 9, self.names[0], "middle"))
        across = (self.top + self.bottom) / 2
        parts.append(_text(14, across, self.names[1], "middle", f' transform="rotate(-90 14 {across:.0f})"'))
        return parts


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _dot(axes: _Axes, point: tuple[float, float], k: int, label: str) -> str:
    x, y = axes.x(point[0]), axes.y(point[1])
    return f'<circle class="dot" {_color(k)} cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(label)}</title></circle>'


def _color(k: int) -> str:
    dash = ' stroke-dasharray="6 3"' if k // COLORS % 2 else ""
    return f'style="--c: var(--c{k % COLORS})"{dash}'


def front(marks: Sequence[Mark], more_is_better: bool = False, higher: bool = False) -> list[Mark]:
    """The marks that no other beats in both x and y: less x (or more of it) is better, and less y (or, `higher`, more
    of it)."""
    sign, up = -1 if more_is_better else 1, -1 if higher else 1
    best, out = math.inf, []
    for mark in sorted(marks, key=lambda m: (sign * m.x, up * m.y)):
        if up * mark.y < best:
            best = up * mark.y
            out.append(mark)
    return out
