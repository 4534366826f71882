"""Tables and plot of the rows that `real.py` made, and the page that they are put into.

Nothing is computed here but means: rows of one method and one number of bits that differ in their seed are one line,
with how many seeds it is the mean of.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgerazor.workdir import write_text
from recipes.benchmarks import methods, results
from recipes.benchmarks.methods import Row
from recipes.benchmarks.results import markdown, number, percent

NAME = "real"
PAGE = """# Real language models

What a line means is said in [real.py](../benchmarks/real.py). The teachers were dequantized from files of about 4 bits:
types that share their groups and grid have it easier than they would with a model that was never rounded. Tables and
picture are made by `make results-real` from the rows that are there.

<!-- real: begin -->
<!-- real: end -->
"""
INK, GRID = "#1f2328", "#d8dee4"
#: Families of methods: colour and marker; those of ours are blue.
STYLES = {
    "rtn": ("#8c959f", "o"),
    "rounded": ("#9ec5e8", "o"),
    "planned": ("#6aa8dc", "o"),
    "gptq": ("#3f8acb", "s"),
    "layers": ("#2a6db0", "^"),
    "distill": ("#123f73", "D"),
    "two-bits": ("#123f73", "*"),
    "peer-gptq": ("#c9822b", "s"),
    "peer-auto-round": ("#b1453a", "^"),
    "peer-hqq": ("#8e5a9e", "v"),
    "llamacpp": ("#5b8c4a", "P"),
}
#: Real bits that the plot shows.
MOST_BITS = 8.0
#: Of the axis of KL.
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True)
class Line:
    """One line of a table: rows that differ in their seed."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def failed(self) -> str | None:
        """Why there is nothing, if none of the rows could be made."""
        return str(self.first["failed"]) if all("failed" in row for row in self.rows) else None

    def made(self) -> list[Row]:
        """The rows that could be made."""
        return [row for row in self.rows if "failed" not in row]

    def mean(self, name: str) -> float | None:
        """Of a number; None where a row has none."""
        values = [row.get(name) for row in self.made()]
        known = [float(value) for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None

    def task(self, name: str) -> float | None:
        """Mean score in a task."""
        values = [row["tasks"].get(name) for row in self.made() if row.get("tasks")]
        known = [float(value) for value in values if value is not None]
        return statistics.fmean(known) if known else None


def lines_of(rows: Sequence[Row], order: Sequence[str]) -> list[Line]:
    """Lines by real bits; those of which nothing could be made last, in the order of the methods."""
    places = {name: place for place, name in enumerate(order)}
    together: dict[tuple[str, float], list[Row]] = {}
    for row in sorted(rows, key=lambda row: places.get(row["method"], len(places))):
        together.setdefault((row["title"], row["bits"]), []).append(row)
    lines = [Line(tuple(group)) for group in together.values()]
    return sorted(lines, key=lambda line: line.mean("real_bits") or float("inf"))


def title_of(line: Line) -> str:
    count = len(line.made())
    return line.first["title"] + (f" ({count} seeds)" if count > 1 else "")


def plus_minus(line: Line) -> str:
    """Retention above chance with the standard error of one row, and those of single seeds."""
    above, error = line.mean("above_chance"), line.mean("above_chance_stderr")
    if above is None:
        return ""
    seeds = [percent(row["above_chance"]) for row in line.made()]
    text = percent(above) + (f" ± {percent(error)}" if error is not None else "")
    return text + (f" ({', '.join(seeds)})" if len(seeds) > 1 else "")


def quality_cells(line: Line) -> list[str]:
    """What is left of the teacher, or why there is nothing."""
    target = "" if line.first["family"] in ("teacher", "llamacpp") else f"{line.first['bits']:g}"
    if line.failed is not None:
        return ["", line.first["title"], target, f"does not run: {line.failed.replace('|', '/')}", "", "", "", ""]
    bits, minutes = line.mean("real_bits"), line.mean("cpu_seconds")
    return [
        "" if bits is None else f"{bits:.2f}",
        title_of(line),
        target,
        plus_minus(line),
        number(line.mean("kl")),
        number(line.mean("perplexity"), 4),
        percent(line.mean("top1_agreement")),
        "" if minutes is None else f"{minutes / 60:.1f}",
    ]


def size_cells(line: Line, tasks: Sequence[str]) -> list[str]:
    """Scores and bytes, and what the types of llama.cpp became."""
    bits, size = line.mean("real_bits"), line.first.get("bytes")
    cells = ["" if bits is None else f"{bits:.2f}", title_of(line), *(percent(line.task(task)) for task in tasks)]
    groups = f"groups of {line.first['group_size']}" if line.first.get("group_size") else ""
    return [*cells, "" if size is None else f"{size:,}", line.first.get("types") or groups]


def model_table(name: str, rows: Sequence[Row], order: Sequence[str]) -> str:
    """Facts and two tables of one model."""
    lines = lines_of(rows, order)
    teacher = next((row for row in rows if row["family"] == "teacher"), {})
    made = [line for line in lines if line.failed is None]
    tasks = list(teacher.get("tasks") or {})
    facts = [f"The teacher is {teacher['origin']}"] if teacher.get("origin") else []
    if teacher.get("items"):
        facts.append(f"items: {', '.join(f'{task} {count}' for task, count in teacher['items'].items())}")
        chances = {task: chance for task, chance in teacher["chances"].items() if chance is not None}
        facts.append(f"guessing scores {', '.join(f'{percent(chance)}' for chance in chances.values())}")
    for key in ("machine", "package"):
        facts += sorted({row[key] for row in rows if row.get(key)})
    facts.append(f"commit {', '.join(sorted({row['commit'] for row in rows if row.get('commit')}))}")
    head = ["real bits", "method", "asked", "above chance", "KL", "perplexity", "top-1", "minutes"]
    quality = markdown(head, map(quality_cells, lines))
    sizes = markdown(
        ["real bits", "method", *tasks, "bytes", "types, groups"], [size_cells(line, tasks) for line in made]
    )
    return f"## {name}\n\n{'; '.join(facts)}.\n\n{quality}\n\nScores and sizes:\n\n{sizes}{curves(made)}"


def curves(lines: Sequence[Line]) -> str:
    """A table of held-out KL over tokens of the rows that were trained; empty where none was."""
    cells = [
        [title_of(line), f"{line.first['bits']:g}", ", ".join(f"{tokens:,}: {kl:.3g}" for tokens, kl in row["curve"])]
        for line in lines
        for row in line.made()
        if row.get("curve")
    ]
    table = markdown(["method", "asked", "tokens: KL on the held-out sequences of the training"], cells)
    return f"\n\nWhile they were trained:\n\n{table}" if cells else ""


def stored_rows(folder: Path) -> dict[str, list[Row]]:
    """All rows by their model."""
    models = {}
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        rows = [row for file in sorted(place.glob("*.json")) if (row := methods.stored(file)) and "title" in row]
        if rows:
            models[place.name] = rows
    return models


def publish(folder: Path, order: Sequence[str], page: Path) -> str:
    """Tables and plot of the stored rows into a page, which is begun where there is none.

    Args:
        folder: of the rows.
        order: names of the methods.
        page: a Markdown file; the picture lies beside it under the same name.

    Returns:
        what was put between the marks of the page.
    """
    models = stored_rows(folder)
    parts = [model_table(name, rows, order) for name, rows in models.items()]
    picture = page.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    if plot({name: lines_of(rows, order) for name, rows in models.items()}, picture):
        parts.insert(
            0, f"![How much of the score above chance is left, and KL to the teacher, over real bits]({picture.name})"
        )
    text = "\n\n".join(parts) or "There are no rows yet."
    if not page.exists():
        write_text(page, PAGE)
    results.publish(NAME, text, page)
    return text


# --- the plot ------------------------------------------------------------------------------------


def points(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines that have a place in the plot, by the name of their curve."""
    curves: dict[str, list[Line]] = {}
    for line in lines:
        family, bits = line.first["family"], line.mean("real_bits")
        if family == "teacher" or line.failed is not None or line.mean("above_chance") is None or bits is None:
            continue
        if bits <= MOST_BITS:
            curves.setdefault("llama.cpp" if family == "llamacpp" else line.first["title"], []).append(line)
    return curves


def plot(models: dict[str, list[Line]], path: Path) -> bool:
    """Retention above chance, and KL, over real bits, a column of panels for each model, as PNG.

    Args:
        models: name -> its lines.
        path: of the picture.

    Returns:
        whether there was anything to draw; without, no picture is left.
    """
    panels = {name: curves for name, lines in models.items() if (curves := points(lines))}
    if not panels:
        path.unlink(missing_ok=True)
        return False
    import matplotlib as mpl
    from matplotlib.figure import Figure

    styles = appearances(list(panels.values()))
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}):
        figure = Figure(figsize=(max(6.0 * len(panels), 8.0), 8.5), layout="constrained")
        rows = figure.subplots(2, len(panels), squeeze=False, sharex="all", sharey="row")
        for (scores, divergences), (name, curves) in zip(rows.T, panels.items(), strict=True):
            draw(scores, curves, styles, "above_chance", 100.0)
            draw(divergences, curves, styles, "kl", 1.0)
            scores.axhline(100, color=GRID, linewidth=1)
            scores.set_title(name, loc="left", fontsize=10, fontweight="bold")
            divergences.set_yscale("log")
            divergences.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
            divergences.minorticks_off()
            divergences.set_xlabel("real bits: 8 x bytes / weights, everything counted")
        rows[0, 0].set_ylabel("score above chance that is left, % of the teacher's")
        rows[1, 0].set_ylabel("KL to the teacher, nats a token (less is better)")
        handles = {
            label: line for axis in rows[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        named = {title: handles[title] for title in styles}
        figure.legend(named.values(), named, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        figure.savefig(path, dpi=150, metadata={"Software": None}, bbox_inches="tight")
    return True


def appearances(models: Sequence[dict[str, list[Line]]]) -> dict[str, dict[str, Any]]:
    """How the curve of each title is drawn, alike for all models; those of one family differ in line and fill."""
    families = {title: lines[0].first["family"] for curves in models for title, lines in curves.items()}
    styles: dict[str, dict[str, Any]] = {}
    for title, family in families.items():
        colour, marker = STYLES.get(family, (INK, "x"))
        again = sum(families[before] == family for before in styles)
        styles[title] = {
            "color": colour,
            "marker": marker,
            "markerfacecolor": colour if again % 2 == 0 else "white",
            "markersize": 5 + 1.5 * (again // 2),
            "linestyle": "" if family == "llamacpp" else ("-", "--", ":", "-.")[again % 4],  # types are no one method
        }
    return styles


def draw(
    axis: Any, curves: dict[str, list[Line]], styles: dict[str, dict[str, Any]], value: str, factor: float
) -> None:
    """The curves of a model, with error bars of one standard error where there is one."""
    for title, lines in curves.items():
        ordered = sorted(lines, key=lambda line: line.mean("real_bits") or 0.0)
        axis.errorbar(
            [line.mean("real_bits") for line in ordered],
            [factor * (line.mean(value) or 0.0) for line in ordered],
            [factor * (line.mean(f"{value}_stderr") or 0.0) for line in ordered],
            label=title,
            linewidth=1.4,
            capsize=2,
            **styles[title],
        )
    axis.grid(True, color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, colors=INK)
    for side in axis.spines.values():
        side.set_visible(False)
