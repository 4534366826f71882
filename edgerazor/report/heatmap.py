"""A plan drawn: bits by layer and role, as coloured cells with their numbers, in a terminal and as a PNG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderableType
from rich.style import Style
from rich.text import Text

from edgerazor import formats
from edgerazor.console import megabytes
from edgerazor.errors import usage_error
from edgerazor.report.plan_summary import PlannedMatrix, PlanSummary
from edgerazor.workdir import alone, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

#: Few bits are pale, many are dark: the colours of ColorBrewer's YlGnBu.
COLOURS = (
    (255, 255, 217),
    (237, 248, 177),
    (199, 233, 180),
    (127, 205, 187),
    (65, 182, 196),
    (29, 145, 192),
    (34, 94, 168),
    (37, 52, 148),
    (8, 29, 88),
)
#: With more rows than this the names of the columns are repeated below them.
SCREEN = 30
#: Inches that the bars of a picture take at most.
BARS_HEIGHT = 6.0


def colour(bits: float, low: float, high: float) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of bits in a range."""
    share = (bits - low) / (high - low) if high > low else 0.5
    place = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    start = min(int(place), len(COLOURS) - 2)
    red, green, blue = (round(a + (place - start) * (b - a)) for a, b in zip(*COLOURS[start : start + 2], strict=True))
    return red, green, blue


def luminance(rgb: tuple[int, int, int]) -> float:
    """Relative luminance, 0 to 1, of an sRGB colour (WCAG 2)."""
    shares = [part / 255 for part in rgb]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def is_light(rgb: tuple[int, int, int]) -> bool:
    """Whether black letters stand out more on it than white ones."""
    return (luminance(rgb) + 0.05) ** 2 > 0.05 * 1.05


def show(plan: PlanSummary) -> list[RenderableType]:
    """The plan, for people in a terminal."""
    return [*map(Text, in_short(plan)), "", bits_grid(plan), "", *ends_lines(plan), *_sensitive(plan)]


def in_short(plan: PlanSummary) -> list[str]:
    """What it is, how large, and shares of its formats: three lines."""
    size = "real bits not recorded"
    if plan.real_bits is not None and plan.bytes is not None:
        size = f"{plan.real_bits:.3g} real bits, {megabytes(plan.bytes)}"
    predicted = "" if plan.predicted_kl is None else f", predicted KL {plan.predicted_kl:.3g} nats per token"
    rotated = f", rotated ({plan.rotation})" if plan.rotation else ""
    return [
        f"{plan.notation}: {plan.strategy} by {plan.granularity}{rotated}",
        f"{plan.nominal_bits:.3g} nominal bits, {size}{predicted}",
        f"Decoder linear layers: {in_words(plan.formats)}",
    ]


def in_words(shares: dict[str, float]) -> str:
    """`ternary 87.5 %, int4 12.5 %`, or the only format."""
    return (
        next(iter(shares)) if len(shares) == 1 else ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    )


def bits_grid(plan: PlanSummary) -> Grid:
    """Bits of the linear layers: a row for each decoder layer, a column for each role."""
    cells = {(str(layer), str(role)): Cell(f"{bits:.2f}", bits) for (layer, role), bits in plan.grid().items()}
    return Grid("layer", [str(layer) for layer in plan.layers()], plan.roles(), cells, plan.range())


def sensitivity_grid(plan: PlanSummary) -> Grid:
    """The most sensitive matrices, what they have, and what each format would cost them."""
    names = _formats_of(plan)
    cells: dict[tuple[str, str], Cell] = {}
    for matrix in plan.most_sensitive:
        label = _short(plan, matrix.name)
        if matrix.bits is not None:
            cells[label, "bits"] = Cell(f"{matrix.bits:.2f}", matrix.bits)
        cells |= {(label, name): Cell(f"{matrix.damage[name]:.2g}") for name in names if name in matrix.damage}
    labels = [_short(plan, matrix.name) for matrix in plan.most_sensitive]
    return Grid("layer, role", labels, ["bits", *names], cells, plan.range())


def _sensitive(plan: PlanSummary) -> list[RenderableType]:
    if plan.estimate is None:
        return []
    source = f"{plan.estimate}, {plan.tokens:,} tokens"
    title = Text(f"Most sensitive matrices: nats of KL per token if all of it had the format ({source})")
    shown: list[RenderableType] = ["", title]
    if plan.kv_damage is None:
        return [*shown, sensitivity_grid(plan)]
    costs = ", ".join(f"{name} {damage:.2g}" for name, damage in plan.kv_damage.items())
    return [*shown, sensitivity_grid(plan), "", Text(f"Keys and values: {costs}")]


def _short(plan: PlanSummary, name: str) -> str:
    """`3 down_proj` for a linear layer of the plan, and the last word of the path for embedding and head."""
    for matrix in plan.matrices:
        if matrix.name == name:
            return name.rpartition(".")[2] if matrix.layer is None else f"{matrix.layer} {matrix.role}"
    return name


def _formats_of(plan: PlanSummary) -> list[str]:
    """Formats that damage was estimated for, the narrowest first."""
    known = formats.names()
    names = {name for matrix in plan.most_sensitive for name in matrix.damage}
    return sorted(names, key=lambda name: (formats.get(name).nominal_bits if name in known else 99.0, name))


# In a terminal ----------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A number as it is shown, and the bits that colour it, if any."""

    text: str
    bits: float | None = None


class Grid:
    """Rows and columns of cells as lines of a terminal, as wide as it allows.

    Names above the columns are broken where they must be, and columns that do not fit beside the others follow below
    them. Every cell says its number, so that nothing is lost without colours.
    """

    def __init__(
        self,
        corner: str,
        rows: list[str],
        columns: list[str],
        cells: Mapping[tuple[str, str], Cell],
        scale: tuple[float, float],
    ) -> None:
        self.corner, self.rows, self.columns, self.cells, self.scale = corner, rows, columns, cells, scale

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        beside = max(map(len, (self.corner, *self.rows))) + 1
        above = beside > options.max_width // 2  # no room: the names of the rows stand above their cells
        beside = 2 if above else beside
        for number, columns in enumerate(self._blocks(options.max_width - beside)):
            if number:
                yield Text()
            header = list(self._header(columns, beside))
            yield from header
            for row in self.rows:
                if above:
                    yield Text(row)
                yield self._line("" if above else row, row, columns, beside)
            if len(self.rows) > SCREEN:
                yield from header

    def _blocks(self, width: int) -> list[dict[str, int]]:
        """Columns and their widths, side by side as far as they fit."""
        whole = {name: max(self._widest(name), len(name)) + 2 for name in self.columns}
        if sum(whole.values()) <= width:
            return [whole]
        blocks: list[dict[str, int]] = [{}]
        for name in self.columns:
            needed = max(self._widest(name) + 2, *(len(piece) + 1 for piece in _pieces(name)))
            if blocks[-1] and sum(blocks[-1].values()) + needed > width:
                blocks.append({})
            blocks[-1][name] = needed
        return blocks

    def _widest(self, column: str) -> int:
        return max((len(cell.text) for (_, name), cell in self.cells.items() if name == column), default=0)

    def _header(self, columns: dict[str, int], beside: int) -> Iterator[Text]:
        names = {name: _broken(name, width - 1) for name, width in columns.items()}
        height = max(map(len, names.values()))
        for line in range(height):
            words = (([""] * (height - len(names[name])) + names[name])[line].center(w) for name, w in columns.items())
            corner = self.corner if line == height - 1 and len(self.corner) < beside else ""
            yield Text(corner.ljust(beside) + "".join(words), style="bold", no_wrap=True)

    def _line(self, label: str, row: str, columns: dict[str, int], beside: int) -> Text:
        label = label.rjust(beside - 1) if label.isdecimal() else label.ljust(beside - 1)
        line = Text(f"{label} ", no_wrap=True)
        for name, width in columns.items():
            line.append_text(coloured(self.cells.get((row, name), Cell("")), width, self.scale))
        return line


def coloured(cell: Cell, width: int, scale: tuple[float, float]) -> Text:
    """A cell in the middle of so many characters."""
    text = cell.text.center(width)
    if cell.bits is None:
        return Text(text)
    background = colour(cell.bits, *scale)
    front = (0, 0, 0) if is_light(background) else (255, 255, 255)
    return Text(text, style=Style(color=Color.from_rgb(*front), bgcolor=Color.from_rgb(*background)))


def ends_lines(plan: PlanSummary) -> list[Text]:
    """Embedding and head, a line each."""
    longest = max((len(end.name) for end in plan.ends()), default=0)
    cells = [(end, coloured(Cell(f"{end.bits:.2f}", end.bits), 6, plan.range())) for end in plan.ends()]
    return [Text.assemble(f"{end.name:{longest}} ", cell, f" {in_words(end.formats)}") for end, cell in cells]


def _pieces(role: str) -> list[str]:
    """Where a name may be broken: behind `_` and `.`."""
    return re.findall(r"[^_.]*[_.]|[^_.]+", role)


def _broken(role: str, width: int) -> list[str]:
    """The name in lines of at most so many characters, where its pieces allow it."""
    lines = [""]
    for piece in _pieces(role):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return lines


# As a picture -----------------------------------------------------------------------------------------------------


def write_png(plan: PlanSummary, path: Path) -> None:
    """Draw the plan into a PNG file.

    Raises:
        UserError: the path is a folder.
    """
    if path.is_dir():
        raise usage_error(f"--png wants the name of a file, but {path} is a folder.")
    picture = figure(plan)
    with alone(path):
        write_atomically(path, lambda temporary: picture.savefig(temporary, format="png", dpi=120))


def figure(plan: PlanSummary) -> Figure:
    """The same map with matplotlib, and bars for the most sensitive matrices where they are known."""
    from matplotlib.figure import Figure

    layers, ends, roles = len(plan.layers()), len(plan.ends()), len(plan.roles())
    bars = bool(plan.most_sensitive)
    map_width, height = max(5.0, 1.0 + 0.85 * roles), 1.6 + 0.26 * max(layers + ends, 8)
    picture = Figure(figsize=(map_width + 6.0 * bars, height), layout="constrained")
    picture.suptitle("\n".join(in_short(plan)), fontsize=9)
    left, *right = picture.subfigures(1, 1 + bars, width_ratios=[map_width, 6.0][: 1 + bars], squeeze=False)[0]
    axes = _stacked(left, layers, ends)
    _draw_map(plan, axes[0])
    if ends:
        _draw_ends(plan, plan.ends(), axes[1])
    scale = left.colorbar(axes[0].images[0], ax=axes, shrink=min(1.0, 12 / (layers + 2)), anchor=(0, 1), pad=0.02)
    scale.set_label("nominal bits a weight", fontsize=8)
    scale.ax.tick_params(labelsize=8)
    if right:
        top, *empty = _stacked(right[0], BARS_HEIGHT, height - BARS_HEIGHT)
        _draw_bars(plan, top)
        for bar_axes in empty:
            bar_axes.set_axis_off()
    return picture


def _stacked(place: SubFigure, *heights: float) -> list[Axes]:
    """Axes one below the other in proportion to their heights; none where that is not positive."""
    ratios = [height for height in heights if height > 0]
    return list(place.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0])


def _draw_map(plan: PlanSummary, axes: Axes) -> None:
    layers, roles, cells = plan.layers(), plan.roles(), plan.grid()
    values = [[cells.get((layer, role), float("nan")) for role in roles] for layer in layers]
    axes.imshow(values, aspect="auto", **_scale(plan))
    axes.set_xticks(range(len(roles)), ["\n".join(_broken(role, 10)) for role in roles], fontsize=8)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.set_ylabel("layer", fontsize=8)
    for y, row in enumerate(values):
        for x, bits in enumerate(row):
            if bits == bits:
                _label(plan, axes, x, y, bits)


def _draw_ends(plan: PlanSummary, ends: list[PlannedMatrix], axes: Axes) -> None:
    axes.imshow([[end.bits] for end in ends], aspect="auto", **_scale(plan))
    axes.set_xticks([])
    axes.set_yticks(range(len(ends)), [end.name.rpartition(".")[2] for end in ends], fontsize=8)
    axes.tick_params(length=0)
    for y, end in enumerate(ends):
        _label(plan, axes, 0, y, end.bits, f"  {in_words(end.formats)}")


def _draw_bars(plan: PlanSummary, axes: Axes) -> None:
    """A group of bars per matrix, one per format."""
    names = _formats_of(plan)
    low, high = plan.range()
    known, thick = formats.names(), 0.8 / len(names)
    for number, name in enumerate(names):
        bits = formats.get(name).nominal_bits if name in known else high
        places = [y + (number - (len(names) - 1) / 2) * thick for y in range(len(plan.most_sensitive))]
        lengths = [max(matrix.damage.get(name, 0.0), 0.0) for matrix in plan.most_sensitive]
        shade = [part / 255 for part in colour(bits, low, high)]
        axes.barh(places, lengths, thick, color=shade, edgecolor="0.4", linewidth=0.4, label=name)
    axes.set_yticks(
        range(len(plan.most_sensitive)), [_short(plan, matrix.name) for matrix in plan.most_sensitive], fontsize=8
    )
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"nats of KL per token if all of it had the format ({plan.estimate})", fontsize=8)
    axes.set_title("most sensitive", fontsize=9)
    axes.legend(fontsize=8)


def _label(plan: PlanSummary, axes: Axes, x: int, y: int, bits: float, more: str = "") -> None:
    dark = "black" if is_light(colour(bits, *plan.range())) else "white"
    axes.text(x, y, f"{bits:.2f}{more}", ha="center", va="center", color=dark, fontsize=7)


def _scale(plan: PlanSummary) -> dict[str, Any]:
    """Colours of `imshow`; a range of one value is widened so that it lies in its middle, as in `colour`."""
    from matplotlib.colors import LinearSegmentedColormap

    low, high = plan.range()
    if low == high:
        low, high = low - 0.5, high + 0.5
    colours = [tuple(part / 255 for part in rgb) for rgb in COLOURS]
    return {"cmap": LinearSegmentedColormap.from_list("bits", colours), "vmin": low, "vmax": high}
