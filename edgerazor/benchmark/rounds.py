"""Rounds of measurements: all engines take turns, beside the machine's bandwidth, and the medians count.

These machines are noisy, and only what was measured side by side can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgerazor import kernels
from edgerazor.benchmark.bandwidth import Bandwidth
from edgerazor.benchmark.bench_result import BenchResult, Engine, MeasuredBandwidth, Run
from edgerazor.benchmark.engines import Phase, Round, Speed
from edgerazor.console import Tracker
from edgerazor.errors import UserError
from edgerazor.workdir import machine


@dataclass
class MeasuredEngine:
    """An engine under measurement.

    Attributes:
        name: in the result.
        threads: numbers of threads that it is measured with.
        measure: one round.
        description: what is known of it, as `Engine` has it, and more.
        foreign: a program of others, which may fail.
    """

    name: str
    threads: tuple[int, ...]
    measure: Callable[[Round], list[Speed]]
    description: Callable[[], dict[str, Any]]
    foreign: bool = False


@dataclass
class Measurements:
    """What the rounds gave.

    Attributes:
        bandwidth: threads -> bytes a second, of each round.
        rates: (engine, threads, phase, context) -> tokens a second, of each round.
        notes: what went wrong with engines of others, and whatever else there is to say.
    """

    bandwidth: dict[int, list[float]] = field(default_factory=dict)
    rates: dict[tuple[str, int, Phase, int], list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def measure_round(
    engines: list[MeasuredEngine],
    workloads: Sequence[Round],
    bandwidth: Bandwidth,
    measurements: Measurements,
    tracker: Tracker,
) -> None:
    """All engines in turns, for each number of threads.

    Args:
        engines: those under measurement; one that fails is left out from then on, if it is not ours.
        workloads: what is measured, for each number of threads.
        bandwidth: of the machine, measured with as many threads.
        measurements: gets the numbers and notes.
        tracker: shows the progress.

    Raises:
        UserError: an engine of ours fails.
    """
    for workload in workloads:
        measurements.bandwidth.setdefault(workload.threads, []).append(bandwidth.measure(workload.threads))
        for engine in [engine for engine in engines if workload.threads in engine.threads]:
            try:
                speeds = engine.measure(workload)
            except UserError as error:
                if not engine.foreign:
                    raise
                measurements.notes.append(str(error))
                engines.remove(engine)
                continue
            for phase, context, rate in speeds:
                measurements.rates.setdefault((engine.name, workload.threads, phase, context), []).append(rate)
            tracker.advance()


def summarize(engines: list[Engine], measurements: Measurements, packed: str, bandwidth_of: str) -> BenchResult:
    """Medians, and what follows from them.

    Args:
        engines: those that lasted.
        measurements: of all rounds.
        packed: name of the engine whose size, load time and memory are the result's own.
        bandwidth_of: how memory was read.
    """
    bandwidth = {threads: statistics.median(values) for threads, values in measurements.bandwidth.items()}
    most = max(bandwidth)
    by_threads = {(engine.name, engine.threads): engine for engine in engines}
    first, notes = by_threads[packed, most], measurements.notes
    slow = kernels.note(first.kernel)
    return BenchResult(
        bytes=first.weight_bytes,
        load_seconds=first.load_seconds or 0.0,
        peak_memory_bytes=first.peak_memory_bytes or 0,
        bandwidth_bytes_per_second=round(bandwidth[most]),
        threads=list(bandwidth),
        bandwidths=[
            MeasuredBandwidth(threads=threads, bytes_per_second=round(value)) for threads, value in bandwidth.items()
        ],
        bandwidth_of=bandwidth_of,
        machine=machine(),
        engines=engines,
        runs=_runs(by_threads, measurements, bandwidth),
        notes=notes if slow is None or slow in notes else [slow, *notes],
    )


def _runs(
    engines: Mapping[tuple[str, int], Engine], measurements: Measurements, bandwidth: Mapping[int, float]
) -> list[Run]:
    """The median speed of every engine, number of threads, phase and context."""
    most, runs = max(bandwidth), []
    for (name, threads, phase, context), rates in measurements.rates.items():
        engine = engines.get((name, threads)) or engines.get((name, most))
        if engine is not None:
            runs.append(_run(engine, threads, phase, context, statistics.median(rates), bandwidth[threads]))
    return runs


def _run(engine: Engine, threads: int, phase: Phase, context: int, rate: float, bandwidth: float) -> Run:
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
