"""How large, how fast, how much memory: the packed model beside its 16-bit teacher, and beside llama.cpp where it is.

Every engine lives in a process of its own (`benchmark/engines.py`), so that load time and peak memory are its alone,
and they take turns, round by round, with a measurement of the machine's memory bandwidth in the same rounds and with as
many threads (`benchmark/rounds.py`).

Decoding one token reads every weight once, and the keys and values of all tokens before it, so tokens per second times
these bytes is bandwidth, and its share of what the machine can do says how much room is left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from rich.console import RenderableType

from edgerazor import kernels, transformers_plugin
from edgerazor.benchmark import peers
from edgerazor.benchmark.bandwidth import BYTES, Bandwidth
from edgerazor.benchmark.bench_result import BenchDryRun, BenchResult, Engine
from edgerazor.benchmark.engines import EngineConfig, Round, Served, ask, worker
from edgerazor.benchmark.rounds import MeasuredEngine, Measurements, measure_round, summarize
from edgerazor.errors import UserError
from edgerazor.job import JobContext
from edgerazor.recipe import Recipe
from edgerazor.report.tables import bench_tables
from edgerazor.stage import Stage
from edgerazor.workdir import hash_folder, machine, make_folder, write_json

PACKED, MAPPED, TEACHER = "packed", "packed, mmap", "teacher"


class BenchStage(Stage):
    """`edgerazor bench`."""

    name = "bench"
    result_model = BenchResult
    needs = ("pack",)
    #: The files that llama.cpp reads.
    keeps_progress = True

    def describe(self, context: JobContext) -> str:
        rounds = context.recipe.bench.rounds
        return f"{rounds} round{'s' * (rounds > 1)}"

    def inputs(self, context: JobContext) -> dict[str, str]:
        """Everything the result depends on, but for the machine's mood."""
        recipe, packed = context.recipe, context.work.manifest("pack")
        return {
            "pack": packed.fingerprint() if packed else "missing",
            "model": context.teacher_fingerprint,
            "threads": str(recipe.threads or "all"),
            "machine": machine(),
            "kernel": kernels.name(),
            **{program.name: str(program.path) for program in peers.programs(recipe.bench)},
            **{f"compare {name}": hash_folder(Path(folder)) for name, folder in recipe.compare.items()},
            **context.section_inputs(self.name),
        }

    def run(self, context: JobContext) -> BenchResult:
        """Measure all engines in turns."""
        settings, bandwidth, measurements = context.recipe.bench, Bandwidth(), Measurements()
        counts = thread_counts(context.recipe)
        with ExitStack() as stack:
            measured = [*our_engines(context, stack, measurements.notes), *peer_engines(context, measurements.notes)]
            limit = measured[0].description()["max_positions"]
            workloads = [Round.of(settings, threads, limit) for threads in counts]
            steps = settings.rounds * sum(len(engine.threads) for engine in measured)
            with context.console.track("bench", steps) as tracker:
                for _ in range(settings.rounds):
                    measure_round(measured, workloads, bandwidth, measurements, tracker)
            engines = [
                Engine(name=engine.name, threads=max(engine.threads), **engine.description()) for engine in measured
            ]
        result = summarize(engines, measurements, PACKED, bandwidth.how)
        make_folder(context.work.folder(self.name))
        write_json(context.work.result_file(self.name), result.model_dump(mode="json"))
        return result

    def dry_run(self, context: JobContext) -> BenchDryRun:
        """What would be measured, and about how long it would take (from one round of the teacher)."""
        settings, counts, folders = context.recipe.bench, thread_counts(context.recipe), folders_of(context)
        engines = [*folders, *(program.name for program in peers.programs(settings))]
        began = time.monotonic()
        teacher = Served(EngineConfig(folders[TEACHER], max(counts)))
        workload = Round.of(settings, max(counts), teacher.model.max_positions)
        teacher.measure(workload)
        seconds = (time.monotonic() - began) * settings.rounds * len(engines) * len(counts)
        sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders.values()]
        return BenchDryRun(
            engines=engines,
            threads=list(counts),
            rounds=settings.rounds,
            tokens_per_round=workload.prefill + sum(tokens + workload.decode for tokens in workload.contexts),
            memory_bytes=BYTES + 2 * sum(sizes),
            seconds=float(f"{seconds:.3g}"),
        )

    def show(self, result: BenchResult) -> list[RenderableType]:
        return bench_tables(result)


STAGE = BenchStage()


def folders_of(context: JobContext) -> dict[str, Path]:
    """Engine name -> model folder; the packed model first, the teacher last."""
    recipe, packed = context.recipe, context.work.folder("pack")
    folders = {PACKED: packed}
    folders |= {MAPPED: packed} if recipe.bench.mmap else {}
    folders |= {name: Path(folder) for name, folder in recipe.compare.items()}
    folders[TEACHER] = context.teacher_folder
    return folders


def thread_counts(recipe: Recipe) -> tuple[int, ...]:
    """Numbers of threads to measure with."""
    return recipe.bench.threads or (recipe.threads or torch.get_num_threads(),)


def our_engines(context: JobContext, stack: ExitStack, notes: list[str]) -> Iterator[MeasuredEngine]:
    """Our engines, loaded: a packed model once for each number of threads, one in 16 bits for all of them.

    Args:
        context: of the job.
        stack: ends their processes.
        notes: gets what there is to say of them.
    """
    counts = thread_counts(context.recipe)
    in_place = True
    for name, folder in folders_of(context).items():
        if name == MAPPED and not in_place:
            notes.append("Only the native engine can choose to read weights in place, so --mmap measures nothing more.")
            continue
        for threads in [(count,) for count in counts] if transformers_plugin.is_packed(folder) else [counts]:
            link = stack.enter_context(worker(EngineConfig(folder, max(threads), mmap=name == MAPPED)))
            description = ask(link, "describe")
            in_place = in_place and description["engine"] == "native"
            if description["note"] and description["note"] not in notes:
                notes.append(description["note"])
            yield MeasuredEngine(name, threads, partial(ask, link), partial(ask, link, "describe"))


def peer_engines(context: JobContext, notes: list[str]) -> Iterator[MeasuredEngine]:
    """Programs of others that are here, with each of the files that hold the packed model."""
    programs, work = peers.programs(context.recipe.bench), context.work
    if not programs:
        return
    packed = work.manifest("pack")
    assert packed is not None
    try:
        files = peers.files(work.folder("pack"), work.progress("bench", "gguf"), packed.fingerprint())
    except UserError as error:
        notes.append(f"Not beside {' and '.join(program.name for program in programs)}: {error}")
        return
    for program in programs:
        for file in files:
            name, measure = f"{program.name} {file.type}", partial(peers.measure, program, file)
            description = partial(peers.describe, program, file)
            yield MeasuredEngine(name, thread_counts(context.recipe), measure, description, foreign=True)
