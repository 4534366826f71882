"""How large, how fast, how much memory: the packed model beside its 16-bit teacher, and beside llama.cpp where it is.

Every engine lives in a process of its own, so that load time and peak memory are its alone, and they take turns,
round by round, with a measurement of the machine's memory bandwidth in the same rounds and with as many threads: these
machines are noisy, and only what was measured side by side can be compared. The median of the rounds counts.

Decoding one token reads every weight once, and the keys and values of all tokens before it, so tokens per second times
these bytes is bandwidth, and its share of what the machine can do says how much room is left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from rich.console import RenderableType

from edgerazor import job, kernels, models, transformers_plugin
from edgerazor.benchmark import peers as peers_
from edgerazor.benchmark.bandwidth import BYTES, Bandwidth
from edgerazor.benchmark.engines import Phase, Round, Served, Speed, Start, ask, worker
from edgerazor.console import Console, Tracker, megabytes, table
from edgerazor.errors import UserError
from edgerazor.recipe import Recipe
from edgerazor.workdir import WorkDir, hash_folder, machine, make_folder, write_json

NAME = "bench"
PACKED, MAPPED, TEACHER = "packed", "packed, mmap", "teacher"


class Run(BaseModel):
    """One measured speed: the median over the rounds."""

    engine: str
    threads: int
    phase: Phase
    context: int
    tokens_per_second: float
    bytes_per_token: int | None = Field(
        None, description="read to decode a token: weights, and the cache's at `context`"
    )
    bandwidth_share: float | None = Field(
        None, description="bytes read a second, of the machine's with as many threads"
    )


class Engine(BaseModel):
    """An engine, and what it took. What the programs of others take to load is not measured."""

    name: str
    threads: int = Field(description="that it was loaded with")
    kernel: str
    weight_bytes: int
    bytes_per_token: int = Field(description="of weights, read to decode a token")
    cache_bytes_per_token: int = Field(description="that a token adds to the cache")
    load_seconds: float | None = Field(None, description="until the first token is computed")
    peak_memory_bytes: int | None = Field(None, description="of its process, the caches of all contexts included")
    start_memory_bytes: int | None = Field(None, description="of its process before it loaded anything")


class MeasuredBandwidth(BaseModel):
    """Reading memory, the median over the rounds."""

    threads: int
    bytes_per_second: float


class BenchResult(BaseModel):
    """Sizes and speeds.

    `bytes`, `load_seconds` and `peak_memory_bytes` are the packed model's, they and `bandwidth_bytes_per_second` with
    the most threads.
    """

    bytes: int
    load_seconds: float
    peak_memory_bytes: int
    bandwidth_bytes_per_second: float
    threads: list[int]
    bandwidths: list[MeasuredBandwidth]
    bandwidth_of: str = Field(description="how memory was read")
    machine: str
    engines: list[Engine]
    runs: list[Run]
    notes: list[str]


class BenchDryRun(BaseModel):
    """What bench would measure."""

    engines: list[str]
    threads: list[int]
    rounds: int
    tokens_per_round: int
    memory_bytes: int
    seconds: float


@dataclass
class Subject:
    """An engine under measurement.

    Attributes:
        name: in the result.
        threads: numbers of threads that it is measured with.
        measure: one round.
        about: what is known of it, as `Engine` has it, and more.
        foreign: a program of others, which may fail.
    """

    name: str
    threads: tuple[int, ...]
    measure: Callable[[Round], list[Speed]]
    about: Callable[[], dict[str, Any]]
    foreign: bool = False


class Measured:
    """What the rounds gave: bytes a second by threads, tokens a second by engine, threads, phase and context."""

    def __init__(self) -> None:
        self.bandwidth: dict[int, list[float]] = {}
        self.rates: dict[tuple[str, int, Phase, int], list[float]] = {}


def inputs(recipe: Recipe, work: WorkDir) -> dict[str, str]:
    """Everything the result depends on, but for the machine's mood."""
    packed = work.manifest("pack")
    return {
        "pack": packed.fingerprint() if packed else "missing",
        "model": job.teacher_fingerprint(recipe),
        "threads": str(recipe.threads or "all"),
        "machine": machine(),
        "kernel": kernels.name(),
        **{each.name: str(each.path) for each in peers_.programs(recipe.bench)},
        **{f"compare {name}": hash_folder(Path(folder)) for name, folder in recipe.compare.items()},
        **job.settings(NAME, recipe.bench),
    }


def folders_of(recipe: Recipe, work: WorkDir) -> dict[str, Path]:
    """Engine name -> model folder; the packed model first, the teacher last."""
    folders = {PACKED: work.folder("pack")}
    folders |= {MAPPED: work.folder("pack")} if recipe.bench.mmap else {}
    folders |= {name: Path(folder) for name, folder in recipe.compare.items()}
    folders[TEACHER] = models.resolve(recipe.model, recipe.revision)
    return folders


def thread_counts(recipe: Recipe) -> tuple[int, ...]:
    """Numbers of threads to measure with."""
    return recipe.bench.threads or (recipe.threads or torch.get_num_threads(),)


def run(recipe: Recipe, work: WorkDir, console: Console) -> BenchResult:
    """Measure all engines in turns."""
    counts = thread_counts(recipe)
    bandwidth = Bandwidth()
    notes: list[str] = []
    with ExitStack() as stack:
        subjects = [*started(recipe, work, stack, notes), *peers(recipe, work, notes)]
        limit = subjects[0].about()["max_positions"]
        asked = [Round.of(recipe.bench, threads, limit) for threads in counts]
        measured = Measured()
        with console.track("bench", recipe.bench.rounds * sum(len(each.threads) for each in subjects)) as tracker:
            for _ in range(recipe.bench.rounds):
                one_round(subjects, asked, bandwidth, measured, notes, tracker)
        engines = [Engine(name=each.name, threads=max(each.threads), **each.about()) for each in subjects]
    result = summary(engines, measured, bandwidth.how, notes)
    make_folder(work.folder(NAME))
    write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


# --- what is measured --------------------------------------------------------------------------


def started(recipe: Recipe, work: WorkDir, stack: ExitStack, notes: list[str]) -> Iterator[Subject]:
    """Our engines, loaded: a packed model once for each number of threads, one in 16 bits for all of them."""
    counts = thread_counts(recipe)
    in_place = True
    for name, folder in folders_of(recipe, work).items():
        if name == MAPPED and not in_place:
            notes.append("Only the native engine can choose to read weights in place, so --mmap measures nothing more.")
            continue
        for threads in [(each,) for each in counts] if transformers_plugin.is_packed(folder) else [counts]:
            link = stack.enter_context(worker(Start(folder, max(threads), mmap=name == MAPPED)))
            about = ask(link, "about")
            in_place = in_place and about["engine"] == "native"
            if about["note"] and about["note"] not in notes:
                notes.append(about["note"])
            yield Subject(name, threads, partial(ask, link), partial(ask, link, "about"))


def peers(recipe: Recipe, work: WorkDir, notes: list[str]) -> Iterator[Subject]:
    """Programs of others that are here, with each of the files that hold the packed model."""
    programs = peers_.programs(recipe.bench)
    if not programs:
        return
    packed = work.manifest("pack")
    assert packed is not None
    try:
        files = peers_.files(work.folder("pack"), work.progress(NAME, "gguf"), packed.fingerprint())
    except UserError as error:
        notes.append(f"Not beside {' and '.join(each.name for each in programs)}: {error}")
        return
    for program in programs:
        for file in files:
            name = f"{program.name} {file.type}"
            measure = partial(peers_.measure, program, file)
            yield Subject(name, thread_counts(recipe), measure, partial(peers_.about, program, file), foreign=True)


def one_round(
    subjects: list[Subject],
    asked: list[Round],
    bandwidth: Bandwidth,
    measured: Measured,
    notes: list[str],
    tracker: Tracker,
) -> None:
    """All engines in turns, for each number of threads; one that fails is left out from then on, if it is not ours."""
    for each in asked:
        measured.bandwidth.setdefault(each.threads, []).append(bandwidth.measure(each.threads))
        for subject in [one for one in subjects if each.threads in one.threads]:
            try:
                speeds = subject.measure(each)
            except UserError as error:
                if not subject.foreign:
                    raise
                notes.append(str(error))
                subjects.remove(subject)
                continue
            for phase, context, rate in speeds:
                measured.rates.setdefault((subject.name, each.threads, phase, context), []).append(rate)
            tracker.advance()


def summary(engines: list[Engine], measured: Measured, how: str, notes: list[str]) -> BenchResult:
    """Medians, and what follows from them."""
    bandwidth = {threads: statistics.median(each) for threads, each in measured.bandwidth.items()}
    most = max(bandwidth)
    about = {(each.name, each.threads): each for each in engines}
    runs = []
    for (name, threads, phase, context), rates in measured.rates.items():
        engine = about.get((name, threads)) or about.get((name, most))
        if engine is not None:
            runs.append(one_run(engine, threads, phase, context, statistics.median(rates), bandwidth[threads]))
    first = about[PACKED, most]
    slow = kernels.note(first.kernel)
    return BenchResult(
        bytes=first.weight_bytes,
        load_seconds=first.load_seconds or 0.0,
        peak_memory_bytes=first.peak_memory_bytes or 0,
        bandwidth_bytes_per_second=round(bandwidth[most]),
        threads=list(bandwidth),
        bandwidths=[
            MeasuredBandwidth(threads=each, bytes_per_second=round(value)) for each, value in bandwidth.items()
        ],
        bandwidth_of=how,
        machine=machine(),
        engines=engines,
        runs=runs,
        notes=notes if slow is None or slow in notes else [slow, *notes],
    )


def one_run(engine: Engine, threads: int, phase: Phase, context: int, rate: float, bandwidth: float) -> Run:
    """A speed, and for decoding the bytes that it moves."""
    moved = engine.bytes_per_token + context * engine.cache_bytes_per_token
    return Run(
        engine=engine.name,
        threads=threads,
        phase=phase,
        context=context,
        tokens_per_second=round(rate, 2),
        bytes_per_token=moved if phase == "decode" else None,
        bandwidth_share=round(rate * moved / bandwidth, 4) if phase == "decode" else None,
    )


# --- dry runs and tables -----------------------------------------------------------------------


def dry_run(recipe: Recipe, work: WorkDir, console: Console) -> BenchDryRun:
    """What would be measured, and about how long it would take (from one round of the teacher)."""
    folders, counts = folders_of(recipe, work), thread_counts(recipe)
    programs = peers_.programs(recipe.bench)
    bench = recipe.bench
    began = time.monotonic()
    teacher = Served(Start(folders[TEACHER], max(counts)))
    asked = Round.of(bench, max(counts), teacher.model.max_positions)
    teacher.measure(asked)
    engines = [*folders, *(each.name for each in programs)]
    seconds = (time.monotonic() - began) * bench.rounds * len(engines) * len(counts)
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in folders.values()]
    return BenchDryRun(
        engines=engines,
        threads=list(counts),
        rounds=bench.rounds,
        tokens_per_round=asked.prefill + sum(each + asked.decode for each in asked.contexts),
        memory_bytes=BYTES + 2 * sum(sizes),
        seconds=float(f"{seconds:.3g}"),
    )


def show(result: BenchResult) -> list[RenderableType]:
    """Sizes and speeds, for people."""
    sizes = [
        [
            engine.name,
            str(engine.threads),
            engine.kernel,
            megabytes(engine.weight_bytes),
            "" if engine.load_seconds is None else f"{engine.load_seconds:.2f}",
            above_imports(engine),
        ]
        for engine in result.engines
    ]
    speeds = [
        [
            run.engine,
            str(run.threads),
            run.phase,
            str(run.context),
            f"{run.tokens_per_second:,.1f}",
            "" if run.bytes_per_token is None else megabytes(run.bytes_per_token),
            "" if run.bandwidth_share is None else f"{run.bandwidth_share:.1%}",
        ]
        for run in sorted(result.runs, key=lambda run: run.threads)
    ]
    read = [f"{each.bytes_per_second / 1e9:.1f} GB/s with {_threads(each.threads)}" for each in result.bandwidths]
    return [
        table("Size", ["engine", "threads", "kernel", "weights", "load seconds", "memory above imports"], sizes),
        table(
            f"Speed, {result.machine}",
            ["engine", "threads", "phase", "context", "tokens/s", "bytes a token", "share of bandwidth"],
            speeds,
            caption=f"memory bandwidth in the same rounds ({result.bandwidth_of}): {', '.join(read)}",
        ),
        *result.notes,
    ]


def above_imports(engine: Engine) -> str:
    """Memory that the model and its caches took, where it is known."""
    if engine.peak_memory_bytes is None or engine.start_memory_bytes is None:
        return ""
    return megabytes(engine.peak_memory_bytes - engine.start_memory_bytes)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
