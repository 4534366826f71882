"""Speed beside llama.cpp, ik_llama.cpp and transformers: one table for each shape, and a plot.

    make bench-peers                  everything, into peers.md and bench-peers.png of recipes/results
    make bench-peers IK_LLAMA_BENCH=/path/to/ik_llama.cpp/build/bin/llama-bench
    python -m recipes.benchmarks.bench_peers --layers 1 --vocabulary 4096 --rounds 1 --results none      to try it

Models of the shapes of Qwen3-0.6B and Llama-3.2-1B with random weights; all programs compute on the CPU, in turns,
round by round, with one thread and with two, and the bandwidth of memory is measured before each turn. Ours are packed
models in the native engine, each in a process of its own, with 8-bit activations, keys and values and an int4 head;
llama.cpp's files are its own quantizer's, measured by its own bench program. *4-bit head*: embedding and head in Q4_0,
because its own choice for ternary files is 6 bits. *MB a token* are the weights that decoding a token reads; *share* is
these, and the cache's, times tokens per second, of the bandwidth measured in the same round.

- *no cliffs*: bytes a second of awkward models over those of base 3 in groups of 256, which should be the same.
- *AVX2*: ours with `EDGERAZOR_ISA=avx2`, beside llama.cpp built for AVX2 alone (`make llamacpp-avx2`).

Whatever is finished is kept in build/bench-peers and found by the next run of the same commit; a complete run deletes
it (`--keep` does not). Exit code 3 when a promise is not kept. Alone on the machine, about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgerazor.benchmark import peers
from edgerazor.benchmark.bandwidth import Bandwidth
from edgerazor.benchmark.engines import EngineConfig, Round, Speed, ask, worker
from edgerazor.benchmark.peers import GgufFile, Program
from edgerazor.console import Console
from edgerazor.errors import QUALITY, UserError, usage_error
from edgerazor.workdir import machine, versions
from recipes.benchmarks import bench_tables as tables
from recipes.benchmarks.bench_models import Place, gguf, packed, wide
from recipes.benchmarks.bench_tables import LONG, THREADS, Log
from recipes.benchmarks.folders import BUILD, RESULTS
from recipes.benchmarks.interop import version
from recipes.benchmarks.results import commit, publish

SHAPES = ("Qwen3-0.6B", "Llama-3.2-1B")
PREFILL, DECODE = 256, 32


@dataclass(frozen=True)
class Entry:
    """A line of a table.

    Attributes:
        name: in the table.
        make: gives the model: a folder of ours or of transformers, or a file for a program.
        program: of others; None for a folder.
        isa: instruction set that ours is kept to.
        rounds: most rounds that it takes part in.
        long: rounds in which it also decodes behind long contexts.
    """

    name: str
    make: Callable[[], Path | GgufFile]
    program: Program | None = None
    isa: str | None = None
    rounds: int = 1 << 30
    long: int = 0


@dataclass(frozen=True)
class Table:
    """Entries that are measured in turns."""

    name: str
    entries: tuple[Entry, ...]
    rounds: int


@dataclass(frozen=True)
class Setting:
    """What there is to measure with; programs of others are None where they are not there."""

    place: Place
    rounds: int
    long: int
    llama: Program
    llama_avx2: Program | None
    ik: Program | None
    console: Console


# --- what is measured --------------------------------------------------------------------------


def peers_table(shape: str, setting: Setting) -> Table:
    """Everybody. The second shape, twice as large, in fewer rounds; so are those that nothing is promised beside."""
    rounds, most = (setting.rounds, 2) if shape == SHAPES[0] else (min(setting.rounds, 3), 1)
    long = min(most, setting.long)
    place, few = setting.place, min(rounds, 3)

    def ours(name: str, kind: str, **more: Any) -> Entry:
        return Entry(name, partial(packed, place, shape, kind), **more)

    def theirs(program: Program, kind: str, head: bool = False, **more: Any) -> Entry:
        name = f"{program.name} {kind}{', 4-bit head' if head else ''}"
        return Entry(name, partial(gguf, place, shape, kind, program, head), program, **more)

    entries = [
        ours(tables.BASE3, "base 3", long=long),
        ours(tables.MIXED, "1.88 bits"),
        ours(tables.INT4, "int4"),
        theirs(setting.llama, "TQ2_0", head=True, long=long),
        theirs(setting.llama, "TQ2_0", rounds=few),
        theirs(setting.llama, "TQ1_0", rounds=few),
        theirs(setting.llama, "Q4_0", rounds=few),
        theirs(setting.llama, "BF16", rounds=few),
        Entry(tables.BFLOAT16, partial(wide, place, shape), rounds=few),
    ]
    if setting.ik:
        entries.insert(3, theirs(setting.ik, "IQ2_BN_R4", head=True))
    return Table(shape, tuple(entries), rounds)


def cliffs_table(setting: Setting) -> Table:
    """Ours alone, in shapes and groups that are awkward."""
    models = {
        tables.BASE3: (SHAPES[0], "base 3"),
        tables.MIXED: (SHAPES[0], "1.88 bits"),
        tables.GROUP64: (SHAPES[0], "group 64"),
        tables.TAILS: ("tails", "base 3"),
        tables.WIDTH960: ("SmolLM2-360M", "base 3"),
    }
    entries = tuple(Entry(name, partial(packed, setting.place, *model)) for name, model in models.items())
    return Table(tables.CLIFFS, entries, setting.rounds)


def avx2_table(setting: Setting, program: Program) -> Table:
    """Ours with AVX2, beside llama.cpp built for it."""
    place, shape = setting.place, SHAPES[0]
    entries = (
        Entry(tables.OURS_AVX2, partial(packed, place, shape, "base 3"), isa="avx2"),
        Entry(tables.TQ2_AVX2, partial(gguf, place, shape, "TQ2_0", program, True), program),
        Entry(tables.Q4_AVX2, partial(gguf, place, shape, "Q4_0", program), program),
    )
    return Table(tables.AVX2, entries, min(setting.rounds, 3))


def all_tables(setting: Setting) -> list[Table]:
    every_table = [*(peers_table(shape, setting) for shape in SHAPES), cliffs_table(setting)]
    return [*every_table, avx2_table(setting, setting.llama_avx2)] if setting.llama_avx2 else every_table


# --- measuring ---------------------------------------------------------------------------------


def run_table(table: Table, log: Log, bandwidth: Bandwidth, setting: Setting) -> None:
    """The rounds that are not there yet."""
    for threads in THREADS:
        missing = [number for number in range(table.rounds) if not log.has(table.name, threads, number)]
        if not missing:
            continue
        setting.console.say(f"{table.name}: loading, {threads} thread{'s' * (threads > 1)}")
        with ExitStack() as stack:
            engines = {}
            for entry in table.entries:
                try:
                    engines[entry] = opened(entry, table, threads, log, stack)
                except UserError as error:
                    if entry.program is None:
                        raise
                    log.note(f"{entry.name}: {error}")
            for number in missing:
                setting.console.say(f"{table.name}: {threads} thread{'s' * (threads > 1)}, round {number + 1}")
                one_round(engines, table, threads, number, log, bandwidth)


def opened(entry: Entry, table: Table, threads: int, log: Log, stack: ExitStack) -> Callable[[Round], list[Speed]]:
    """What measures an entry: a process that has loaded its model, or the program of others."""
    model = entry.make()
    if isinstance(model, GgufFile):
        assert entry.program is not None
        log.describe(table.name, entry.name, peers.describe(entry.program, model))
        return partial(peers.measure, entry.program, model)
    link = stack.enter_context(worker(EngineConfig(model, threads, isa=entry.isa)))
    description = ask(link, "describe")
    log.describe(table.name, entry.name, description)
    if description["note"]:
        log.note(f"{entry.name}: {description['note']}")
    return partial(ask, link)


def one_round(
    engines: dict[Entry, Callable[[Round], list[Speed]]],
    table: Table,
    threads: int,
    number: int,
    log: Log,
    bandwidth: Bandwidth,
) -> None:
    """All entries in turns; a program of others that fails is left out from then on."""
    speeds: dict[str, list[Speed]] = {}
    read = []
    for entry, measure in list(engines.items()):
        if number >= entry.rounds:
            continue
        contexts = (0, *LONG) if number < entry.long else (0,)
        read.append(bandwidth.measure(threads))
        try:
            speeds[entry.name] = measure(Round(threads, PREFILL, DECODE, contexts))
        except UserError as error:
            if entry.program is None:
                raise
            log.note(f"{entry.name}: {error}")
            del engines[entry]
    log.add(table.name, threads, number, statistics.median(read), speeds)


# --- the command line --------------------------------------------------------------------------


def program(name: str, path: Path | None) -> Program | None:
    """A program, if one is named.

    Raises:
        UserError: it is not there.
    """
    if path is None:
        return None
    if not path.is_file():
        raise usage_error(f"There is no {path}.", "Build llama.cpp with `make llamacpp` or `make llamacpp-avx2`.")
    return Program(name=name, path=path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    build = BUILD
    avx2 = build / "llamacpp-avx2" / "tools" / "llama-bench"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long-rounds", type=int, default=2, help="most rounds with contexts of thousands of tokens")
    parser.add_argument("--tables", nargs="+", help="measure these alone: a shape, 'no cliffs' or AVX2")
    parser.add_argument("--llama-bench", type=Path, default=build / "llamacpp" / "tools" / "llama-bench")
    parser.add_argument("--llama-bench-avx2", type=Path, default=avx2 if avx2.exists() else None)
    parser.add_argument("--ik-llama-bench", type=Path, help="llama-bench of ik_llama.cpp, its llama-quantize beside it")
    parser.add_argument("--layers", type=int, help="most layers of a model, to try it")
    parser.add_argument("--vocabulary", type=int, help="most entries of a vocabulary, to try it")
    parser.add_argument("--build", type=Path, default=build / "bench-peers", help="of models and measurements")
    parser.add_argument("--keep", action="store_true", help="leave models and measurements where they are")
    parser.add_argument("--results", default=str(RESULTS), help="folder of peers.md and the plot, or `none`")
    return parser.parse_args(arguments)


def facts(setting: Setting) -> str:
    """Machine, versions and commit."""
    python = setting.llama.path.parent.parent / "bin" / "python"
    used = ", ".join(f"{name} {value}" for name, value in versions().items() if name in ("torch", "transformers"))
    llama = f"; {version(python)}" if python.exists() else ""
    return f"{machine()}; {used}{llama}; commit {commit()}"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    try:
        llama = program(peers.LLAMA, options.llama_bench)
        assert llama is not None
        avx2, ik = program(peers.LLAMA, options.llama_bench_avx2), program(peers.IK, options.ik_llama_bench)
        place = Place(options.build / "models", options.layers, options.vocabulary)
        setting = Setting(place, options.rounds, options.long_rounds, llama, avx2, ik, console)
        decides = {"facts": facts(setting), "layers": options.layers, "vocabulary": options.vocabulary}
        log, bandwidth = Log(options.build / "rounds.json", decides), Bandwidth()
        for table in all_tables(setting):
            if options.tables is None or table.name in options.tables:
                run_table(table, log, bandwidth, setting)
    except UserError as error:
        console.error(error)
        return error.code
    shapes = [shape for shape in SHAPES if options.tables is None or shape in options.tables]
    text, wrong = tables.all_tables(log, shapes)
    text = f"{facts(setting)}; memory read by {bandwidth.how}; at most {options.rounds} rounds.\n\n{text}"
    print(text)
    if options.results != "none":
        place_of = Path(options.results)
        tables.plot(log, shapes, place_of / "bench-peers.png", f"{machine()}; commit {commit()}")
        if (place_of / "peers.md").exists():
            publish("bench-peers", f"{text}\n\n![Speed beside others](bench-peers.png)", place_of / "peers.md")
    if not options.keep:
        shutil.rmtree(options.build, ignore_errors=True)
    for sentence in wrong:
        console.error(UserError(sentence))
    return QUALITY if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
