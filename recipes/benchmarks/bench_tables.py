"""What `bench_peers.py` measured: kept round by round, and what it says, in tables and a plot.

Ratios, and shares of bandwidth, are taken within a round and a number of threads, where both sides were measured side
by side; their median over the rounds counts. Everything else is the median over the rounds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgerazor.benchmark.engines import Speed
from edgerazor.workdir import write_json
from recipes.benchmarks.results import markdown

THREADS = (1, 2)
LONG = (1024, 4096)
#: Names of entries.
BASE3, MIXED, INT4 = "edgerazor, base 3", "edgerazor, 1.88 bits", "edgerazor, int4"
BFLOAT16 = "transformers bf16"
TQ2 = "llama.cpp TQ2_0, 4-bit head"
IK = "ik_llama.cpp IQ2_BN_R4, 4-bit head"
GROUP64, TAILS, WIDTH960 = "groups of 64", "tail groups (rows of 1000 and 3000)", "rows of 960 (SmolLM2-360M)"
CLIFFS, AVX2 = "no cliffs", "AVX2"
OURS_AVX2, TQ2_AVX2, Q4_AVX2 = "edgerazor, base 3, AVX2", "llama.cpp TQ2_0, 4-bit head, AVX2", "llama.cpp Q4_0, AVX2"
#: What bytes may cost at most: tokens a second per byte, relative to base 3 in groups of 256.
NO_CLIFF = 0.85


class Log:
    """Measurements in a file, so that an interrupted run goes on where it was.

    Args:
        path: of the file.
        of: what decides what is measured; a file of something else begins anew.
    """

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {"of": of, "rounds": {}, "about": {}, "notes": []}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["of"] == of:
                self.values = stored

    def has(self, table: str, threads: int, number: int) -> bool:
        return f"{table}/{threads}/{number}" in self.values["rounds"]

    def add(self, table: str, threads: int, number: int, bandwidth: float, speeds: dict[str, list[Speed]]) -> None:
        """A whole round: bytes a second, and speeds by entry."""
        self.values["rounds"][f"{table}/{threads}/{number}"] = {"bandwidth": bandwidth, "speeds": speeds}
        write_json(self.path, self.values)

    def describe(self, table: str, entry: str, description: dict[str, Any]) -> None:
        """Sizes of an entry's model."""
        names = ("weight_bytes", "bytes_per_token", "cache_bytes_per_token", "engine", "kernel")
        self.values["about"][f"{table}/{entry}"] = {name: description[name] for name in names if name in description}

    def note(self, text: str) -> None:
        if text not in self.values["notes"]:
            self.values["notes"].append(text)

    def about(self, table: str, entry: str) -> dict[str, Any]:
        description: dict[str, Any] = self.values["about"].get(f"{table}/{entry}", {})
        return description

    def rounds(self, table: str, threads: int) -> Iterator[dict[str, Any]]:
        for name, values in self.values["rounds"].items():
            if name.startswith(f"{table}/{threads}/"):
                yield values

    def bandwidth(self, table: str, threads: int) -> float | None:
        """Bytes a second."""
        return _median(measured["bandwidth"] for measured in self.rounds(table, threads))

    def rate(self, table: str, entry: str, threads: int, phase: str, context: int = 0) -> float | None:
        """Tokens a second."""
        return _median(_rate(measured, entry, phase, context) for measured in self.rounds(table, threads))

    def ratio(
        self, table: str, entry: str, other: str, threads: int, phase: str, context: int = 0, of_bytes: bool = False
    ) -> float | None:
        """An entry's speed over another's; of the bytes that decoding a token moves, where these are asked for."""
        factor = self.moved(table, entry, context) / self.moved(table, other, context) if of_bytes else 1.0

        def one(values: dict[str, Any]) -> float | None:
            mine, theirs = (_rate(values, name, phase, context) for name in (entry, other))
            return factor * mine / theirs if mine and theirs else None

        return _median(one(measured) for measured in self.rounds(table, threads))

    def share(self, table: str, entry: str, threads: int, context: int = 0) -> float | None:
        """Of the machine's bandwidth."""
        moved = self.moved(table, entry, context)

        def one(values: dict[str, Any]) -> float | None:
            rate = _rate(values, entry, "decode", context)
            return rate * moved / values["bandwidth"] if rate else None

        return _median(one(measured) for measured in self.rounds(table, threads))

    def moved(self, table: str, entry: str, context: int) -> float:
        """Bytes that decoding a token moves; 1 where the entry was not measured."""
        description = self.about(table, entry)
        return description["bytes_per_token"] + context * description["cache_bytes_per_token"] if description else 1.0


def _rate(values: dict[str, Any], entry: str, phase: str, context: int) -> float | None:
    speeds = values["speeds"].get(entry, [])
    return next((rate for name, place, rate in speeds if (name, place) == (phase, context)), None)


def _median(values: Iterator[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else None


# --- what must hold ----------------------------------------------------------------------------


class Claim(NamedTuple):
    """A number with the least that is promised of it, for each number of threads; None promises nothing."""

    text: str
    values: tuple[float | None, ...]
    least: tuple[float | None, ...]
    percent: bool = False

    def cells(self) -> list[str]:
        words = [number(value, 2, self.percent) for value in self.values]
        promised = [number(value, 2, self.percent) for value in self.least]
        return [self.text, *words, " / ".join(dict.fromkeys(promised)) if any(self.least) else "", self.verdict()]

    def verdict(self) -> str:
        if not any(self.least):
            return ""
        return "yes" if self.holds() else "**no**"

    def holds(self) -> bool:
        """What is promised and was not measured does not hold."""
        pairs = zip(self.values, self.least, strict=True)
        return all(least is None or (value is not None and value >= least) for value, least in pairs)


def claims(log: Log, shape: str, first: bool) -> list[Claim]:
    """Of a shape's table; what is promised is promised of the first shape."""

    def ratios(other: str, phase: str, entry: str = BASE3, **more: bool) -> tuple[float | None, ...]:
        return tuple(log.ratio(shape, entry, other, threads, phase, **more) for threads in THREADS)

    def least(*numbers: float) -> tuple[float | None, ...]:
        return numbers if first else (None, None)

    checked = [
        Claim("decode over llama.cpp TQ2_0, same head", ratios(TQ2, "decode"), least(1.9, 2.2)),
        Claim("decode over ik_llama.cpp IQ2_BN_R4, same head", ratios(IK, "decode"), (None, None)),
        Claim("decode over llama.cpp BF16", ratios("llama.cpp BF16", "decode"), (None, None)),
        Claim("decode over transformers bf16", ratios(BFLOAT16, "decode"), (None, None)),
        Claim("prefill over llama.cpp TQ2_0, same head", ratios(TQ2, "prefill"), least(3.5, 3.5)),
        Claim("prefill over ik_llama.cpp IQ2_BN_R4, same head", ratios(IK, "prefill"), (None, None)),
        Claim(
            "decode, share of the bandwidth measured in the same rounds",
            tuple(log.share(shape, BASE3, threads) for threads in THREADS),
            least(0.8, 0.85),
            percent=True,
        ),
        Claim(
            "12.5 % int4 rows: bytes a second over base 3",
            ratios(BASE3, "decode", MIXED, of_bytes=True),
            (NO_CLIFF, NO_CLIFF),
            percent=True,
        ),
    ]
    return [claim for claim in checked if any(claim.values) or any(claim.least)]


def cliffs(log: Log) -> list[Claim]:
    """Bytes a second of awkward shapes over those of base 3."""
    return [
        Claim(
            name,
            tuple(log.ratio(CLIFFS, name, BASE3, threads, "decode", of_bytes=True) for threads in THREADS),
            (NO_CLIFF, NO_CLIFF),
            percent=True,
        )
        for name in (MIXED, GROUP64, TAILS, WIDTH960)
    ]


def with_avx2(log: Log) -> list[Claim]:
    """Ours with AVX2 over llama.cpp's build for it."""
    return [
        Claim(
            f"{phase} over {other}",
            tuple(log.ratio(AVX2, OURS_AVX2, other, threads, phase) for threads in THREADS),
            (1.0, 1.0) if other == TQ2_AVX2 else (None, None),
        )
        for phase in ("decode", "prefill")
        for other in (TQ2_AVX2, Q4_AVX2)
    ]


# --- tables ------------------------------------------------------------------------------------

CLAIM_HEAD = ("", "1 thread", "2 threads", "at least", "holds")


def number(value: float | None, digits: int = 1, percent: bool = False) -> str:
    if value is None:
        return ""
    return f"{100 * value:.0f} %" if percent else f"{value:,.{digits}f}"


def rate(value: float | None) -> str:
    return number(value, 0 if value and value >= 100 else 1)


def entries_of(log: Log, table: str) -> list[str]:
    return [name.removeprefix(f"{table}/") for name in log.values["about"] if name.startswith(f"{table}/")]


def speeds_table(log: Log, table: str) -> str:
    """Every entry: bytes, decode with its share of bandwidth, prefill."""
    head = ["program, format", "MB", "MB a token"]
    for phase in ("decode", "prefill"):
        for threads in THREADS:
            head += [f"{phase} {threads}T"] + (["share"] if phase == "decode" else [])
    rows = []
    for entry in entries_of(log, table):
        description = log.about(table, entry)
        row = [entry, number(description["weight_bytes"] / 1e6, 0), number(description["bytes_per_token"] / 1e6, 0)]
        for phase in ("decode", "prefill"):
            for threads in THREADS:
                row.append(rate(log.rate(table, entry, threads, phase)))
                row += [number(log.share(table, entry, threads), percent=True)] if phase == "decode" else []
        rows.append(row)
    return markdown(head, rows)


def contexts_table(log: Log, table: str) -> str:
    """Decoding behind long contexts."""
    head = ["program, format", "context", "MB a token", "decode 1T", "share", "decode 2T", "share"]
    rows = []
    for context in (0, *LONG):
        for entry in (BASE3, TQ2):
            if not log.about(table, entry):
                continue
            row = [entry, f"{context:,}", number(log.moved(table, entry, context) / 1e6, 0)]
            for threads in THREADS:
                row.append(rate(log.rate(table, entry, threads, "decode", context)))
                row.append(number(log.share(table, entry, threads, context), percent=True))
            rows.append(row)
    return markdown(head, rows)


def all_tables(log: Log, shapes: Sequence[str]) -> tuple[str, list[str]]:
    """Markdown of everything, and what does not hold."""
    parts, wrong = [], []

    def add(title: str, checked: list[Claim]) -> None:
        parts.append(f"{title}\n\n{markdown(CLAIM_HEAD, [claim.cells() for claim in checked])}")
        wrong.extend(f"{title}: {claim.text}: not as promised." for claim in checked if not claim.holds())

    for shape in shapes:
        read = [f"{(log.bandwidth(shape, threads) or 0) / 1e9:.1f} GB/s with {threads}T" for threads in THREADS]
        parts.append(f"## {shape}\n\nMemory bandwidth in the same rounds: {', '.join(read)}.")
        parts.append(speeds_table(log, shape))
        add(f"**{shape}: ratios**", claims(log, shape, shape == shapes[0]))
        parts.append(f"**{shape}: behind long contexts**\n\n{contexts_table(log, shape)}")
    parts.append(f"## No cliffs\n\n{speeds_table(log, CLIFFS)}")
    add("**Bytes a second, over those of base 3 in groups of 256**", cliffs(log))
    if any(True for _ in log.rounds(AVX2, 1)):
        parts.append(f"## AVX2\n\n{speeds_table(log, AVX2)}")
        add("**AVX2: ratios**", with_avx2(log))
    if notes := log.values["notes"]:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts), wrong


# --- the plot ----------------------------------------------------------------------------------

INK, GRID = "#1f2328", "#d8dee4"
#: Colours of ours and of others, with one thread and with two.
COLOURS = {True: ("#8fc1e8", "#1f6fb2"), False: ("#d0d4d9", "#8b929b")}


def plot(log: Log, shapes: Sequence[str], path: Path, facts: str) -> None:
    """Bars of decode and prefill for each shape, as PNG.

    Args:
        log: of all rounds.
        shapes: a row of the plot each.
        path: of the picture.
        facts: a line below.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    height = sum(0.42 * len(entries_of(log, shape)) + 0.9 for shape in shapes)
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}):
        figure = Figure(figsize=(11, height + 0.5), layout="constrained")
        ratios = [len(entries_of(log, shape)) for shape in shapes]
        axes = figure.subplots(len(shapes), 2, squeeze=False, height_ratios=ratios)
        for row, shape in zip(axes, shapes, strict=True):
            names = entries_of(log, shape)
            for axis, phase in zip(row, ("decode", "prefill"), strict=True):
                draw(axis, names, lambda name, threads, of=shape, at=phase: log.rate(of, name, threads, at))
                axis.set_title(f"{shape}: {phase}, tokens per second", loc="left", fontsize=10, fontweight="bold")
            row[1].set_yticklabels([])
        figure.supxlabel(f"upper bar: 1 thread, lower bar: 2 threads. {facts}", fontsize=7.5, color="#57606a")
        figure.savefig(path, dpi=150, metadata={"Software": None}, bbox_inches="tight")


def draw(axis: Any, names: Sequence[str], of: Callable[[str, int], float | None]) -> None:
    """Two bars for each name, the longest names on the left."""
    longest = max([of(name, threads) or 0.0 for name in names for threads in THREADS], default=1.0)
    for place, name in enumerate(names):
        for index, threads in enumerate(THREADS):
            value = of(name, threads)
            if value is None:
                continue
            y = place + (index - 0.5) * 0.38
            axis.barh(y, value, height=0.36, color=COLOURS[name.startswith("edgerazor")][index])
            axis.text(value + 0.012 * longest, y, rate(value), va="center", fontsize=7.5)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1.12 * longest)
    axis.tick_params(length=0, colors=INK)
    axis.xaxis.grid(True, color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)
