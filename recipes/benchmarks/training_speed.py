"""Distillation beside transformers' own fine-tuning of the same model: tokens a second, and where a step's time goes.

    python -m recipes.benchmarks.training_speed MODEL --prepare              calibrates and records once, untimed
    python -m recipes.benchmarks.training_speed MODEL --precision bfloat16   then measures; alone on the machine
    python -m recipes.benchmarks.training_speed MODEL --profile              then also says what each part takes
    python -m recipes.benchmarks.training_speed MODEL --compile              of parts alone: what `torch.compile` gains
    python -m recipes.benchmarks.training_speed MODEL --products             of its matrices alone, on one thread

All take turns, a step each: fine-tuning (the model's own loss, the same autocast, clipping and fused AdamW), the same
with the C library's memory as `distill` sets it, `distill` with a recorded teacher and with a resident one, EdgeRazor's
default losses at two bits. Fine-tuning and `distill` are processes of their own, one of which waits for the other; the
two distillations share one student. `--compile` instead measures what a compiler can see of a step, since rounding
leaves PyTorch for the native library: a resident teacher's layers and the student's norms, compiled and not in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgerazor import data, devices, formats, losses, models, pipeline, training
from edgerazor import recipe as recipes
from edgerazor.calibrated import read_layer_metrics
from edgerazor.console import Console
from edgerazor.job import JobContext
from edgerazor.modules import fake_quant, shared_activations
from edgerazor.recipe import Recipe
from edgerazor.recording import Recording
from edgerazor.stages import record
from edgerazor.training import RecordedTeacher, Trainer, objective
from edgerazor.workdir import WorkDir, machine
from recipes.benchmarks.folders import BUILD, WORLD
from recipes.benchmarks.results import commit, markdown, packages

BITS = 2.0
#: Sequences that are recorded: as many steps as a measurement can last.
STEPS = 12
#: Layers of a teacher that are compiled for `--compile`, and timed turns of each.
COMPILED_LAYERS, COMPARED_TURNS = 4, 15
#: Of one timing, for `--products`.
REPEATED_PRODUCTS = 10
KEPT = "fine-tuning, freed memory kept"
PLAIN = ("fine-tuning", KEPT)
SOURCES = (*PLAIN, "recorded teacher", "resident teacher")


def recipe_of(options: argparse.Namespace, recording: Path | None, layers: tuple[int, ...] = ()) -> Recipe:
    """The recipe of the distillation."""
    return recipes.build(
        {
            "model": str(options.model),
            "data": {"train": [{"file": str(options.text)}], "sequence_length": options.length},
            "calibrate": {"bits": BITS, "plan": "interleave", "sequences": 4},
            "distill": {
                "steps": STEPS,
                "batch_size": options.sequences,
                "evaluate_sequences": 1,
                "precision": options.precision,
                "recording": None if recording is None else str(recording),
            },
            "record": {
                "tokens": (STEPS * options.sequences + 1) * options.length,
                "hidden_layers": list(layers),
                "held_out_sequences": 1,
            },
        }
    )


class Timer:
    """Seconds by the name of a part; what a part calls counts for the inner part alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.stack: list[tuple[str, float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        now = time.perf_counter()
        if self.stack:
            outer, began = self.stack[-1]
            self.seconds[outer] = self.seconds.get(outer, 0.0) + now - began
        self.stack.append((name, now))
        try:
            yield
        finally:
            now = time.perf_counter()
            _, began = self.stack.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + now - began
            if self.stack:
                self.stack[-1] = (self.stack[-1][0], now)

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Let a function of a class or module count as a part."""
        function: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)


def timed_parts() -> Timer:
    """Wrap what a step is made of; for a process that does nothing else."""
    timer = Timer()
    timer.wrap(fake_quant.FakeQuantWeight, "decoded", "rounding of weights")
    timer.wrap(fake_quant.FakeQuantEmbedding, "_quantized_rows", "rounding of weights")
    timer.wrap(shared_activations.SharedActivations, "_quantize", "rounding of activations")
    timer.wrap(formats, "fake_quantize_kv", "rounding of keys and values")
    timer.wrap(losses, "total_loss", "losses")
    timer.wrap(Trainer, "teacher_targets", "teacher")
    timer.wrap(Trainer, "optimize", "clipping and AdamW")
    timer.wrap(training.Student, "outputs", "forward pass")
    return timer


def trainer_of(options: argparse.Namespace, work: WorkDir, console: Console) -> tuple[Trainer, RecordedTeacher]:
    """A trainer with a resident teacher, and the recorded one to put in its place."""
    context = JobContext(recipe_of(options, None), work, console)
    trainer, _ = training.prepare(context, {})
    return trainer, RecordedTeacher(Recording(options.work / "recording"), trainer.accelerator.device)


def prepare(options: argparse.Namespace, work: WorkDir, console: Console) -> None:
    """Calibrate, and record what the losses need."""
    recipe = recipe_of(options, None)
    pipeline.run("calibrate", recipe, work, console)
    outline = models.outline(str(options.model), None, False)
    layer_count = models.structure(outline).layer_count
    terms = objective.make_terms(recipe.distill.losses, recipe.model, layer_count, read_layer_metrics(work), BITS)
    layers = tuple(sorted({layer for _, loss in terms for layer in loss.hidden_layers()}))
    with_layers = recipe_of(options, None, layers)
    record.run(JobContext(with_layers, work, console), options.work / "recording")


def plain_model(options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model in float32 as transformers trains it, and its optimizer."""
    model, _ = models.load(str(options.model), None, "cpu", torch.float32, False)
    model.train().requires_grad_(True)
    model.config.use_cache = False
    return model, torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def fine_tune(model: nn.Module, optimizer: torch.optim.Optimizer, batch: data.Batch, dtype: torch.dtype) -> None:
    """One step of plain fine-tuning."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def plain_worker(options: argparse.Namespace) -> None:
    """Fine-tune, a step for each line of the input that names how."""
    dtype = training.training_dtype(recipe_of(options, None).distill, torch.device("cpu"))
    ids = torch.randint(1000, (STEPS, options.sequences, options.length), generator=torch.Generator().manual_seed(0))
    model, optimizer = plain_model(options)
    for step, source in enumerate(sys.stdin):
        batch = {"input_ids": ids[step % STEPS], "labels": ids[step % STEPS]}
        with models.freed_blocks_kept() if source.strip() == KEPT else nullcontext():
            fine_tune(model, optimizer, batch, dtype)  # untimed, so that memory is as behind a step of its kind
            began = time.perf_counter()
            fine_tune(model, optimizer, batch, dtype)
            answer({"seconds": time.perf_counter() - began})


def distill_worker(options: argparse.Namespace) -> None:
    """Distill, a step for each line of the input that names the teacher's source."""
    trainer, recorded = trainer_of(options, WorkDir(options.work / "job"), Console(quiet=True))
    sources = {"recorded teacher": recorded, "resident teacher": trainer.teachers}
    trainer.begin_phase(1, budget_share=0.0)
    timer = timed_parts() if options.profile else Timer()
    batches = trainer.batches()
    with trainer.allocation():
        for source in sys.stdin:
            trainer.teachers = sources[source.strip()]
            batch = next(batches)
            trainer.step(batch)
            timer.seconds = {}
            began = time.perf_counter()
            with timer.part("backward pass"):
                loss = trainer.step(batch)
            answer({"seconds": time.perf_counter() - began, "loss": loss, "parts": timer.seconds})
            trainer.progress.step += 1


def compare_compiled(options: argparse.Namespace) -> None:
    """Print CPU seconds of a teacher's first layers and of a norm with its backward pass, as they are and compiled."""
    dtype = getattr(torch, options.precision)
    model, _ = models.load(str(options.model), None, "cpu", dtype, False)
    model.requires_grad_(False)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    del layers[COMPILED_LAYERS:]
    ids = torch.randint(1000, (options.sequences, options.length), generator=torch.Generator().manual_seed(0))
    states = torch.randn(*ids.shape, model.config.get_text_config().hidden_size, requires_grad=True)
    norm = next(module for name, module in layers[0].named_modules() if name.endswith("layernorm"))
    norm = copy.deepcopy(norm).float()

    def of_teacher() -> None:
        with torch.no_grad():
            model.get_decoder()(input_ids=ids, use_cache=False)

    def of_norm() -> None:
        norm(states).sum().backward()

    rows = []
    for what, parts, run in (
        (f"teacher, {len(layers)} layers", list(layers), of_teacher),
        ("student, a norm with its backward pass", [norm], of_norm),
    ):
        began = time.process_time()
        compiled = [torch.compile(part._call_impl) for part in parts]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * COMPARED_TURNS + 2):
            is_compiled = turn % 2 == 1
            for part, call in zip(parts, compiled, strict=True):
                part._compiled_call_impl = call if is_compiled else None
            start = time.process_time()
            run()
            seconds[is_compiled].append(time.process_time() - start)
            if turn == 1:
                rows.append([what, f"{time.process_time() - began:.1f}"])
        plain, fast = (statistics.median(values[1:]) for values in seconds.values())
        rows[-1] += [f"{plain:.4f}", f"{fast:.4f}", f"{fast / plain:.2f}"]
    print(f"{machine()}, {packages()}, commit {commit()}, {torch.get_num_threads()} threads, {options.precision}")
    print(markdown(["part", "first calls, CPU seconds", "eager", "compiled", "compiled of eager"], rows))


def compare_products(options: argparse.Namespace) -> None:
    """Print how fast a micro-batch is multiplied with matrices of each shape of the model, in both number types."""
    torch.set_num_threads(1)
    structure = models.structure(models.load(options.model)[0])
    shapes = sorted({(target.columns, target.rows) for target in structure.targets if target.kind == "linear"})
    rows = []
    for width, out in shapes:
        least = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
        for _ in range(COMPARED_TURNS):
            for dtype in least:
                left, right = (torch.ones(size, dtype=dtype) for size in ((options.length, width), (width, out)))
                began = time.process_time()
                for _ in range(REPEATED_PRODUCTS):
                    left @ right
                least[dtype] = min(least[dtype], (time.process_time() - began) / REPEATED_PRODUCTS)
        speeds = [2e-9 * options.length * width * out / seconds for seconds in least.values()]
        rows.append([f"{width} x {out}", *(f"{speed:.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}"])
    fast = devices.fast_bfloat16(torch.device("cpu"))
    print(f"{machine()}, {packages()}, commit {commit()}, one thread; training computes in bfloat16: {fast}")
    print(f"{options.length} rows times a matrix, 10^9 operations a second, best of {COMPARED_TURNS} in turns")
    print(markdown(["matrix", "float32", "bfloat16", "bfloat16 of float32"], rows))


def answer(measured: dict[str, Any]) -> None:
    """Say what was measured, as a line."""
    print(json.dumps(measured), flush=True)


def measure(options: argparse.Namespace) -> None:
    """Steps in turns, then a table; with `--profile` a second one of what each part takes."""
    words = [sys.executable, "-m", "recipes.benchmarks.training_speed", *sys.argv[1:], "--worker"]
    workers = {
        name: subprocess.Popen([*words, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("plain", "distill")
    }
    measured: dict[str, list[dict[str, Any]]] = {source: [] for source in options.sources}
    for _ in range(options.rounds):
        for source in options.sources:
            worker = workers["plain" if source in PLAIN else "distill"]
            assert worker.stdin is not None
            assert worker.stdout is not None
            print(source, file=worker.stdin, flush=True)
            measured[source].append(json.loads(worker.stdout.readline()))
            print(f"{source}: {measured[source][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    report(options, measured)


def report(options: argparse.Namespace, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Print the tables."""
    tokens = options.sequences * options.length
    print(f"{machine()}, {packages()}, commit {commit()}, {torch.get_num_threads()} threads")
    medians = {source: statistics.median(one["seconds"] for one in steps) for source, steps in measured.items()}
    plain = medians.get("fine-tuning")
    rows = [
        [source, f"{median:.2f}", f"{tokens / median:.0f}", f"{plain / median:.2f}" if plain else ""]
        for source, median in medians.items()
    ]
    print(f"{options.precision}, {options.sequences} x {options.length} tokens, median of {options.rounds} steps")
    print(markdown(["what", "seconds a step", "tokens/s", "of fine-tuning"], rows))
    shown = {source: steps[-1]["parts"] for source, steps in measured.items() if steps[-1].get("parts")}
    if options.profile and shown:
        names = sorted({name for parts in shown.values() for name in parts})
        lines = [[name, *(f"{parts.get(name, 0.0):.2f}" for parts in shown.values())] for name in names]
        print(markdown(["part", *shown], lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=BUILD / "training-speed")
    parser.add_argument("--text", type=Path, default=WORLD / "heldout.txt")
    parser.add_argument("--prepare", action="store_true", help="calibrate and record, and measure nothing")
    parser.add_argument("--profile", action="store_true", help="also measure the parts of the last step")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each")
    parser.add_argument("--compile", action="store_true", help="what `torch.compile` gains, and nothing else")
    parser.add_argument("--products", action="store_true", help="products in both number types, and nothing else")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--worker", choices=("plain", "distill"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    devices.choose("auto", None)
    if options.prepare:
        prepare(options, WorkDir(options.work / "job"), Console())
    elif options.compile:
        compare_compiled(options)
    elif options.products:
        compare_products(options)
    elif options.worker:
        {"plain": plain_worker, "distill": distill_worker}[options.worker](options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
