"""How large, how fast, how much memory: the packed model beside its 16-bit teacher.

Every engine lives in a process of its own, so that load time and peak memory are its alone, and they take turns,
round by round, with a measurement of the machine's memory bandwidth in the same rounds: these machines are noisy, and
only what was measured side by side can be compared. The median of the rounds counts.

Decoding one token reads every weight once, so tokens per second times bytes per token is bandwidth, and its share of
what the machine can do says how much room is left.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from rich.console import RenderableType

from edgerazor import kernels, models, surgery
from edgerazor.console import Console, megabytes, table
from edgerazor.errors import UserError
from edgerazor.recipe import Bench, Recipe
from edgerazor.stages import _shared
from edgerazor.workdir import WorkDir, hash_folder, machine, make_folder, write_json

NAME = "bench"

#: Bytes read in one measurement of memory bandwidth; far more than any cache.
BANDWIDTH_BYTES = 512 * 1024 * 1024


class Run(BaseModel):
    """One measured speed: the median over the rounds."""

    engine: str
    threads: int
    phase: Literal["prefill", "decode"]
    context: int
    tokens_per_second: float
    bandwidth_share: float | None = None


class Engine(BaseModel):
    """What one engine took."""

    name: str
    kernel: str
    weight_bytes: int
    bytes_per_token: int
    load_seconds: float
    peak_memory_bytes: int
    start_memory_bytes: int


class BenchResult(BaseModel):
    """Sizes and speeds. `bytes`, `load_seconds` and `peak_memory_bytes` are the packed model's."""

    bytes: int
    load_seconds: float
    peak_memory_bytes: int
    bandwidth_bytes_per_second: float
    threads: int
    machine: str
    engines: list[Engine]
    runs: list[Run]
    notes: list[str]


class BenchDryRun(BaseModel):
    """What bench would measure."""

    engines: list[str]
    rounds: int
    tokens_per_round: int
    memory_bytes: int
    seconds: float


def inputs(recipe: Recipe, work: WorkDir) -> dict[str, str]:
    """Everything the result depends on, but for the machine's mood."""
    packed = work.manifest("pack")
    return {
        "pack": packed.fingerprint() if packed else "missing",
        "model": _shared.teacher_fingerprint(recipe),
        "threads": str(recipe.threads or "all"),
        "machine": machine(),
        "kernel": kernels.name(),
        **{f"compare {name}": hash_folder(Path(folder)) for name, folder in recipe.compare.items()},
        **_shared.settings(NAME, recipe.bench),
    }


def subjects(recipe: Recipe, work: WorkDir) -> dict[str, Path]:
    """Engine name -> model folder; the packed model first, the teacher last."""
    folders = {"packed": work.folder("pack")}
    folders |= {name: Path(folder) for name, folder in recipe.compare.items()}
    folders["teacher"] = models.resolve(recipe.model, recipe.revision)
    return folders


def run(recipe: Recipe, work: WorkDir, console: Console) -> BenchResult:
    """Measure all engines in turns."""
    threads = recipe.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    folders = subjects(recipe, work)
    speeds: dict[tuple[str, str, int], list[float]] = {}
    bandwidth: list[float] = []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(folder, threads)) for name, folder in folders.items()}
        with console.track("bench", recipe.bench.rounds * len(workers)) as tracker:
            for _ in range(recipe.bench.rounds):
                bandwidth.append(measure_bandwidth())
                for name, link in workers.items():
                    for phase, context, rate in ask(link, recipe.bench):
                        speeds.setdefault((name, phase, context), []).append(rate)
                    tracker.advance()
        about = {name: ask(link, "about") for name, link in workers.items()}
    speed = statistics.median(bandwidth)
    engines = [Engine(name=name, **found) for name, found in about.items()]
    result = BenchResult(
        bytes=engines[0].weight_bytes,
        load_seconds=engines[0].load_seconds,
        peak_memory_bytes=engines[0].peak_memory_bytes,
        bandwidth_bytes_per_second=round(speed),
        threads=threads,
        machine=machine(),
        engines=engines,
        runs=[one_run(key, rates, threads, about, speed) for key, rates in speeds.items()],
        notes=[note] if (note := kernels.note(engines[0].kernel)) else [],
    )
    make_folder(work.folder(NAME))
    write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


def one_run(
    key: tuple[str, str, int], rates: list[float], threads: int, about: dict[str, Any], bandwidth: float
) -> Run:
    engine, phase, context = key
    rate = statistics.median(rates)
    share = rate * about[engine]["bytes_per_token"] / bandwidth if phase == "decode" else None
    return Run(
        engine=engine,
        threads=threads,
        phase="prefill" if phase == "prefill" else "decode",
        context=context,
        tokens_per_second=round(rate, 2),
        bandwidth_share=None if share is None else round(share, 4),
    )


def measure_bandwidth() -> float:
    """Bytes a second of reading memory, with torch's threads; the best of three passes."""
    block = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32)
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        block.sum()
        rates.append(BANDWIDTH_BYTES / (time.perf_counter() - began))
    return max(rates)


# --- an engine in its own process --------------------------------------------------------------


@contextmanager
def worker(folder: Path, threads: int) -> Iterator[Connection]:
    """A process that has loaded a model and answers on a connection."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, str(folder), threads), daemon=True)
    process.start()
    there.close()
    try:
        ask(here, "load")
        yield here
    finally:
        here.close()
        process.join(timeout=5)
        if process.is_alive():
            process.terminate()


def ask(link: Connection, request: Any) -> Any:
    """Send a request and wait for the answer.

    Raises:
        UserError: the engine failed, with its reason.
    """
    try:
        link.send(request)
        answer = link.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise UserError("A benchmark process ended by itself; it probably ran out of memory.") from None
    if isinstance(answer, UserError):
        raise answer
    if isinstance(answer, Exception):
        raise UserError(f"A benchmark process failed: {type(answer).__name__}: {answer}.")
    return answer


def serve(link: Connection, folder: str, threads: int) -> None:
    """The engine's process: load, then measure when asked."""
    torch.set_num_threads(threads)
    state: Served | None = None
    while True:
        try:
            request = link.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if request == "load":
                state = Served(Path(folder))
                link.send("loaded")
            elif request == "about":
                assert state is not None
                link.send(state.about())
            else:
                assert state is not None
                link.send(state.measure(request))
        except Exception as error:  # becomes one sentence in the parent
            link.send(error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}"))


class Served:
    """A loaded model and its measurements."""

    def __init__(self, folder: Path) -> None:
        from edgerazor import integration

        self.start_memory = peak_memory()
        began = time.perf_counter()
        self.packed = integration.is_packed(folder)
        if self.packed:
            self.model, _ = integration.load(folder)
        else:
            self.model, _ = models.load(folder)
        with torch.inference_mode():  # packed matrices are read at their first use
            self.model(input_ids=torch.zeros((1, 1), dtype=torch.int64))
        self.load_seconds = time.perf_counter() - began
        self.folder = folder

    def about(self) -> dict[str, Any]:
        files = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {
            "kernel": surgery.kernels_of(self.model) if self.packed else f"transformers {dtype}",
            "weight_bytes": files,
            "bytes_per_token": files - self._unread_embedding(),
            "load_seconds": round(self.load_seconds, 3),
            "peak_memory_bytes": peak_memory(),
            "start_memory_bytes": self.start_memory,
        }

    def _unread_embedding(self) -> int:
        """Bytes of an embedding table that is not also the head: decoding reads one row of it."""
        if self.packed:
            from edgerazor.packed import PackedModel, size_table

            model = PackedModel.open(self.folder)
            classes = {row.kind: row.bytes for row in size_table(model).classes}
            return 0 if model.header.tied else classes.get("embedding", 0)
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if embedding.weight is head.weight:
            return 0
        return embedding.weight.numel() * embedding.weight.element_size()

    @torch.inference_mode()
    def measure(self, settings: Bench) -> list[tuple[str, int, float]]:
        """(phase, context, tokens per second) of one round."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        prefill = min(settings.prefill_tokens, limit)
        results = [("prefill", 0, prefill / self._seconds_of(self._ids(prefill)))]
        for context in settings.contexts:
            if context + settings.decode_tokens > limit:
                continue
            results.append(("decode", context, self._decode(context, settings.decode_tokens)))
        return results

    def _ids(self, count: int) -> torch.Tensor:
        vocabulary = self.model.config.get_text_config().vocab_size
        return (torch.arange(count) * 7919 % vocabulary).unsqueeze(0)

    def _seconds_of(self, ids: torch.Tensor) -> float:
        began = time.perf_counter()
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    def _decode(self, context: int, count: int) -> float:
        """Tokens per second when `context` tokens are in the cache (one, where 0 is asked: something must start)."""
        out = self.model(input_ids=self._ids(max(context, 1)), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        began = time.perf_counter()
        for _ in range(count):
            out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return count / (time.perf_counter() - began)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux's getrusage counts what the parent held before the process was started, so its own mark is read instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def dry_run(recipe: Recipe, work: WorkDir, console: Console) -> BenchDryRun:
    """What would be measured, and about how long it would take (from one round of the teacher)."""
    folders = subjects(recipe, work)
    bench = recipe.bench
    _shared.device_of(recipe)
    began = time.monotonic()
    teacher = Served(folders["teacher"])
    teacher.measure(bench)
    seconds = (time.monotonic() - began) * bench.rounds * len(folders)
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in folders.values()]
    return BenchDryRun(
        engines=list(folders),
        rounds=bench.rounds,
        tokens_per_round=bench.prefill_tokens + sum(c + bench.decode_tokens for c in bench.contexts),
        memory_bytes=BANDWIDTH_BYTES + 2 * sum(sizes),
        seconds=float(f"{seconds:.3g}"),
    )


def show(result: BenchResult) -> list[RenderableType]:
    """Sizes and speeds, for people."""
    speeds = [
        [
            run.engine,
            run.phase,
            str(run.context),
            f"{run.tokens_per_second:,.1f}",
            "" if run.bandwidth_share is None else f"{run.bandwidth_share:.1%}",
        ]
        for run in result.runs
    ]
    sizes = [
        [
            engine.name,
            engine.kernel,
            megabytes(engine.weight_bytes),
            f"{engine.load_seconds:.2f}",
            megabytes(engine.peak_memory_bytes - engine.start_memory_bytes),
        ]
        for engine in result.engines
    ]
    bandwidth = result.bandwidth_bytes_per_second / 1e9
    return [
        table("Size", ["engine", "kernel", "weights", "load seconds", "memory above imports"], sizes),
        table(
            f"Speed, {result.threads} threads, {result.machine}",
            ["engine", "phase", "context", "tokens/s", "share of bandwidth"],
            speeds,
            caption=f"memory bandwidth in the same rounds: {bandwidth:.1f} GB/s",
        ),
        *result.notes,
    ]
