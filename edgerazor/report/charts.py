"""Small charts as shapes with coordinates; the templates draw them as inline SVG.

A chart is 360 units wide, as a phone is, and grows with the page. Each has a title and a description for those who do
not see it, and a table of its numbers beside it; series differ in their marks and not in colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Units of every chart: its width, and the room left and right of what is drawn.
WIDTH, LEFT, RIGHT = 360.0, 40.0, 10.0
#: Height of a row of bars or dots with its name above it.
ROW = 34.0
#: Units of a letter of 11 units, about.
LETTER = 6.0


@dataclass(frozen=True)
class Shape:
    """One element. `kind`: line (x, y, x2, y2), text, circle, square, rect (x, y, width x2, height y2) or path (d).

    Attributes:
        css: its class; `s0`, `s1` ... are the colours of series.
        title: what a pointer over it says.
    """

    kind: str
    x: float = 0.0
    y: float = 0.0
    x2: float = 0.0
    y2: float = 0.0
    text: str = ""
    anchor: str = "start"
    css: str = ""
    title: str = ""


@dataclass
class Table:
    """The numbers of a chart, for those who would rather read them."""

    columns: list[str]
    rows: list[list[str]]


@dataclass
class Chart:
    """A chart."""

    title: str
    description: str
    height: float
    shapes: list[Shape] = field(default_factory=list)
    table: Table | None = None
    legend: list[tuple[str, str]] = field(default_factory=list)

    def line(self, x: float, y: float, x2: float, y2: float, css: str) -> None:
        self.shapes.append(Shape("line", rounded(x), rounded(y), rounded(x2), rounded(y2), css=css))

    def write(self, x: float, y: float, text: str, anchor: str = "start", css: str = "") -> None:
        self.shapes.append(Shape("text", rounded(x), rounded(y), text=text, anchor=anchor, css=css))

    def mark(self, x: float, y: float, series: int, title: str = "") -> None:
        """A point of a series: a circle, a square for every second one."""
        kind = "square" if series % 2 else "circle"
        self.shapes.append(Shape(kind, rounded(x), rounded(y), css=f"s{series % 6}", title=title))

    def bar(self, x: float, y: float, width: float, height: float, css: str, title: str = "") -> None:
        box = (rounded(x), rounded(y), rounded(max(width, 0.5)), rounded(height))
        self.shapes.append(Shape("rect", *box, css=css, title=title))

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Straight lines from point to point."""
        text = " ".join(f"{'L' if index else 'M'}{rounded(x):g} {rounded(y):g}" for index, (x, y) in enumerate(points))
        self.shapes.append(Shape("path", text=text, css=css))


def rounded(value: float) -> float:
    return round(value, 1)


class Scale:
    """From numbers to places on an axis.

    Args:
        low, high: of the numbers.
        start, end: of the places.
        logarithmic: equal ratios are equal distances; all numbers are positive then.
    """

    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool = False) -> None:
        self.logarithmic = logarithmic
        self.low, self.high = self._value(low), self._value(high)
        self.start, self.end = start, end
        if self.high <= self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def _value(self, number: float) -> float:
        return math.log10(number) if self.logarithmic else number

    def __call__(self, number: float) -> float:
        share = (self._value(number) - self.low) / (self.high - self.low)
        return self.start + min(max(share, -0.05), 1.05) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers within the range, about so many."""
        if self.logarithmic:
            return self._powers()
        step = nice_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _powers(self) -> list[float]:
        """Powers of ten, with their doubles and fives where there are few of them."""
        steps = (1,) if self.high - self.low > 2 else (1, 2, 5)
        exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
        numbers = [step * 10.0**exponent for exponent in exponents for step in steps]
        return [number for number in numbers if self.low - 1e-9 <= math.log10(number) <= self.high + 1e-9]


def nice_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def number(value: float) -> str:
    """A number of an axis: 0.05, 40, 1,000, 20k."""
    if abs(value) >= 10_000:
        for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- points over points ------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A model: its name, the letter that stands for it, where it is, and an error of y."""

    name: str
    x: float
    y: float
    error: float | None = None
    main: bool = True


def letter(index: int) -> str:
    """A, B ... Z, A1, B1 ..."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def pareto(points: Sequence[Point], y_name: str, better: str, percent: bool) -> Chart:
    """Models by real bits and what they keep (or lose), and the line of those that no other beats in both.

    Args:
        points: at least one.
        y_name: what y is.
        better: `up` or `down`.
        percent: y is a share; else it is positive, and on a logarithmic axis.
    """
    height, top, bottom = 258.0, 26.0, 40.0
    xs = [point.x for point in points]
    low, high = min(xs), max(xs)
    margin = max(0.25, 0.12 * (high - low))
    x = Scale(max(low - margin, 0.0), high + margin, LEFT + 6, WIDTH - RIGHT)
    if percent:
        bounds = [point.y + sign * (point.error or 0.0) for point in points for sign in (-1, 1)]
        y = Scale(min(0.0, *bounds), max(1.0, *bounds), height - bottom, top)
    else:
        values = [point.y for point in points]
        y = Scale(min(values) / 1.6, max(values) * 1.6, height - bottom, top, logarithmic=True)
    chart = Chart(
        title=f"{y_name} over real bits",
        description=f"{len(points)} models; the line joins those that no other one beats in both. "
        + "; ".join(f"{letter(i)}, {p.name}: {p.x:.2f} real bits, {shown(p.y, percent)}" for i, p in enumerate(points)),
        height=height,
    )
    axes(chart, x, y, "real bits a weight", y_name, percent)
    front = frontier(points, better)
    if len(front) > 1:
        chart.path([(x(point.x), y(point.y)) for point in front], "front")
    for index, point in enumerate(points):
        across, down = x(point.x), y(point.y)
        if point.error:
            error_bar(chart, across, y(point.y - point.error), across, y(point.y + point.error))
        chart.mark(across, down, 0 if point.main else 1, f"{point.name}: {point.x:.2f} bits, {shown(point.y, percent)}")
        above = down - 9 if down > top + 14 else down + 17
        chart.write(across + 7, above, letter(index), css="letter")
    rows = [
        [f"{letter(i)}: {p.name}", f"{p.x:.2f}", shown(p.y, percent) + (f" ± {100 * p.error:.1f}" if p.error else "")]
        for i, p in enumerate(points)
    ]
    chart.table = Table(["model", "real bits", y_name], rows)
    return chart


def frontier(points: Sequence[Point], better: str) -> list[Point]:
    """Those that no other one beats in both, by ascending x."""
    sign = 1.0 if better == "up" else -1.0
    front: list[Point] = []
    for point in sorted(points, key=lambda model: (model.x, -sign * model.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def shown(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def axes(chart: Chart, x: Scale, y: Scale, x_name: str, y_name: str, percent: bool = False) -> None:
    """Both axes with their grids and names."""
    for value in y.ticks():
        chart.line(x.start, y(value), x.end, y(value), "grid")
        text = f"{100 * value:.0f} %" if percent else number(value)
        chart.write(x.start - 4, y(value) + 4, text, "end", "tick")
    for value in x.ticks():
        chart.line(x(value), y.start, x(value), y.start + 4, "axis")
        chart.write(x(value), y.start + 16, number(value), "middle", "tick")
    chart.line(x.start, y.start, x.end, y.start, "axis")
    chart.write(x.end, y.start + 31, x_name, "end", "name")
    chart.write(2, 10, y_name, css="name")


def error_bar(chart: Chart, x: float, y: float, x2: float, y2: float) -> None:
    """A line with its two ends across it."""
    chart.line(x, y, x2, y2, "error")
    upright = x == x2
    for end_x, end_y in ((x, y), (x2, y2)):
        across, down = (3.0, 0.0) if upright else (0.0, 3.0)
        chart.line(end_x - across, end_y - down, end_x + across, end_y + down, "error")


# --- rows of dots and bars ---------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """A share with its error, in a row; `series` is its job."""

    row: str
    value: float
    error: float | None
    series: int
    job: str


def dots(title: str, dots_: Sequence[Dot]) -> Chart:
    """Shares with error bars: a row for each name, a mark in it for each job."""
    rows = list(dict.fromkeys(dot.row for dot in dots_))
    bounds = [dot.value + sign * (dot.error or 0.0) for dot in dots_ for sign in (-1, 1)]
    many = len({dot.series for dot in dots_})
    row_height = ROW + 7.0 * (many - 1)
    height = len(rows) * row_height + 34
    x = Scale(min(0.0, *bounds), max(1.0, *bounds), 16, WIDTH - 22)
    chart = Chart(
        title,
        "; ".join(f"{dot.job}, {dot.row}: {shown(dot.value, True)}" for dot in dots_),
        height,
    )
    bottom = len(rows) * row_height + 4
    for value in x.ticks(4):
        chart.line(x(value), 4, x(value), bottom, "grid")
        chart.write(x(value), bottom + 15, f"{100 * value:.0f} %", "middle", "tick")
    for index, row in enumerate(rows):
        y = index * row_height + 14
        chart.write(4, y, cut(row, 50), css="row")
        for place, dot in enumerate(dot for dot in dots_ if dot.row == row):
            middle = y + 10 + 7 * place
            if dot.error:
                error_bar(chart, x(dot.value - dot.error), middle, x(dot.value + dot.error), middle)
            chart.mark(x(dot.value), middle, dot.series, f"{dot.job}: {shown(dot.value, True)}")
    error = [f" ± {100 * dot.error:.1f}" if dot.error is not None else "" for dot in dots_]
    chart.table = Table(
        ["task", "model", "retention above chance"],
        [[d.row, d.job, shown(d.value, True) + e] for d, e in zip(dots_, error, strict=True)],
    )
    if many > 1:
        chart.legend = legend(list(dict.fromkeys((dot.series, dot.job) for dot in dots_)))
    return chart


def legend(series: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
    """Class and name of each series."""
    return [(f"s{index % 6}{' square' if index % 2 else ''}", name) for index, name in series]


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


@dataclass(frozen=True)
class Part:
    """A part of a bar: its name, length, and the number of its colour."""

    name: str
    value: float
    series: int


def stacked(title: str, bars: Sequence[tuple[str, Sequence[Part]]], unit: str) -> Chart:
    """Bars that are made of parts, each with its name above it."""
    longest = max(sum(part.value for part in parts) for _, parts in bars)
    x = Scale(0.0, longest, 8, WIDTH - 8)
    chart = Chart(
        title,
        "; ".join(
            f"{name}: " + ", ".join(f"{part.name} {number(part.value)} {unit}" for part in parts)
            for name, parts in bars
        ),
        height=len(bars) * (ROW + 4) + 4,
    )
    for index, (name, parts) in enumerate(bars):
        y, begin = index * (ROW + 4) + 13, 0.0
        total = sum(part.value for part in parts)
        chart.write(8, y, cut(f"{name}: {number(total)} {unit}", 56), css="row")
        for part in parts:
            start, end = x(begin), x(begin + part.value)
            chart.bar(start, y + 5, end - start, 14, f"s{part.series}", f"{part.name}: {number(part.value)} {unit}")
            begin += part.value
    seen = dict.fromkeys((part.series, part.name) for _, parts in bars for part in parts)
    chart.legend = [(f"s{series} square", name) for series, name in seen]
    return chart


@dataclass(frozen=True)
class Speed:
    """An engine: tokens a second, and those at which it would read all that the memory gives."""

    name: str
    value: float
    limit: float | None


def roofline(title: str, speeds: Sequence[Speed]) -> Chart:
    """Bars of speed with a mark at each one's roofline."""
    longest = max(max(speed.value, speed.limit or 0.0) for speed in speeds)
    x = Scale(0.0, longest, 8, WIDTH - 12)
    described = [
        f"{speed.name}: {number(speed.value)} tokens a second"
        + (f", {100 * speed.value / speed.limit:.0f} % of its roofline" if speed.limit else "")
        for speed in speeds
    ]
    chart = Chart(title, "; ".join(described), height=len(speeds) * (ROW + 4) + 4)
    for index, (speed, words) in enumerate(zip(speeds, described, strict=True)):
        y = index * (ROW + 4) + 13
        chart.write(8, y, cut(words, 58), css="row")
        chart.bar(x(0.0), y + 5, x(speed.value) - x(0.0), 14, "s0" if index == 0 else "s5", words)
        if speed.limit:
            chart.line(x(speed.limit), y + 2, x(speed.limit), y + 22, "roof")
    return chart


# --- curves ------------------------------------------------------------------------------------


def curves(
    title: str, x_name: str, y_name: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]
) -> Chart | None:
    """Positive numbers over others, on a logarithmic axis; None where there are not two points of any series."""
    drawn_series = [(name, [(x, y) for x, y in points if y > 0 and math.isfinite(y)]) for name, points in series]
    drawn_series = [(name, points) for name, points in drawn_series if points]
    if not any(len(points) > 1 for _, points in drawn_series):
        return None
    height = 228.0
    all_x = [x for _, points in drawn_series for x, _ in points]
    all_y = [y for _, points in drawn_series for _, y in points]
    x = Scale(min(0.0, *all_x), max(all_x), LEFT + 6, WIDTH - RIGHT - 6)
    y = Scale(min(all_y) / 1.3, max(all_y) * 1.3, height - 40, 24, logarithmic=True)
    ends = "; ".join(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in drawn_series)
    chart = Chart(title, ends, height)
    axes(chart, x, y, x_name, y_name)
    for index, (name, points) in enumerate(drawn_series):
        chart.path([(x(a), y(b)) for a, b in points], f"curve c{index}")
        for a, b in points if len(points) <= 40 else points[-1:]:
            chart.mark(x(a), y(b), index, f"{name}: {b:.4g} at {number(a)}")
    chart.legend = legend(list(enumerate(name for name, _ in drawn_series)))
    return chart
