"""Quantization-aware distillation: train the student's float32 master weights so that their low-bit version copies
the teacher.

The forward pass computes with `decode(encode(weight))`, int8 activations and int8 keys and values, exactly as the packed
model will; the gradient passes straight through the rounding. The objective is a weighted sum of losses from
`edgerazor/losses`, by default EdgeRazor's CE + EAKLD + LAFD (arXiv 2605.04062).

An optimizer step is `accumulation` micro-batches on each process. Counts and teacher statistics of the whole step are
known before the student's first backward pass, so that 2B sequences on one process, B on two, and 2 micro-batches of
B give the same gradient. The order of the data is a function of the step, so the step is the position in the data.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel
from rich.console import RenderableType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor import data, losses, models, surgery
from edgerazor.allocate import Plan
from edgerazor.console import Console, table
from edgerazor.errors import INTERRUPTED, UserError
from edgerazor.losses._base import Loss, Outputs, StepTotals, predicting, step_counts
from edgerazor.losses.lafd import least_similar
from edgerazor.recipe import Distill, LossTerm, Recipe
from edgerazor.stages import _checkpoint, _shared
from edgerazor.workdir import WorkDir, make_folder, replace_folder, write_json

NAME = "distill"
DEFAULT_STEPS = 1000
#: Layers that LAFD matches (EdgeRazor's k).
LAFD_LAYERS = 3

Batch = dict[str, Tensor]


class DistillResult(BaseModel):
    """What distill reached."""

    notation: str
    steps: int
    tokens: int
    seconds: float
    loss: float
    best: float
    best_step: int
    measure: str
    tokens_per_second: float


class DistillDryRun(BaseModel):
    """What distill would do."""

    notation: str
    steps: int | None
    tokens_per_step: int
    memory_bytes: int
    disk_bytes: int
    result_bytes: int
    seconds_per_step: float
    seconds: float | None


def inputs(recipe: Recipe, work: WorkDir) -> dict[str, str]:
    """Everything the result depends on. `max_time` and how often to measure and save do not change what is trained."""
    calibrated = work.manifest("calibrate")
    skip = ("max_time", "checkpoint_every", "gradient_checkpointing")
    return {
        "calibrate": calibrated.fingerprint() if calibrated else "missing",
        "model": _shared.teacher_fingerprint(recipe),
        "data": _shared.data_fingerprint(recipe),
        "held_out": _shared.held_out_fingerprint(recipe),
        "data.sequence_length": str(recipe.data.sequence_length),
        "bits": str(recipe.calibrate.bits),
        "seed": str(recipe.seed),
        **_shared.settings("distill", recipe.distill, skip),
    }


@dataclass
class Job:
    """Everything the training loop uses."""

    settings: Distill
    accelerator: Accelerator
    teacher: PreTrainedModel | None
    student: PreTrainedModel
    trained: Any  # the student, wrapped by accelerate when there are several processes
    optimizer: torch.optim.Optimizer
    structure: models.Structure
    plan: Plan
    rows: data.TokenRows
    held_out: data.TokenRows
    length: int
    terms: list[tuple[float, Loss]]
    hidden_layers: tuple[int, ...]
    progress: _checkpoint.Progress = field(default_factory=_checkpoint.Progress)
    began: float = 0.0

    @property
    def tokens_per_step(self) -> int:
        rows = self.settings.batch_size * self.settings.accumulation * self.accelerator.num_processes
        return rows * self.length

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the budget; None when only the clock limits them."""
        limits = [self.settings.steps] if self.settings.steps else []
        if self.settings.tokens:
            limits.append(math.ceil(self.settings.tokens / self.tokens_per_step))
        if not limits and not self.settings.max_time:
            limits.append(DEFAULT_STEPS)
        return min(limits) if limits else None

    def seconds(self) -> float:
        """Training time so far, resumes included."""
        return self.progress.seconds + time.monotonic() - self.began

    def share(self) -> float:
        """How much of the budget is used, 0 to 1."""
        shares = [self.progress.step / self.steps] if self.steps else []
        if self.settings.max_time:
            shares.append(self.seconds() / self.settings.max_time)
        return min(1.0, max(shares))


class Interrupted(UserError):
    """Ctrl-C or a termination signal, after saving."""


def run(recipe: Recipe, work: WorkDir, console: Console) -> DistillResult:
    """Train, from the last checkpoint if there is one, and write the `best` and `last` students."""
    job = prepare(recipe, work)
    identity = inputs(recipe, work)
    main = job.accelerator.is_main_process
    make_folder(work.folder(NAME))
    found = _checkpoint.restore(work.checkpoint("current"), job.student, job.optimizer)
    if found:
        job.progress = found
        console.say(f"distill goes on from step {found.step}")
    if main:
        trim_metrics(work.metrics_file, job.progress.metrics_lines)
    job.began = time.monotonic()
    with watch_signals() as signals, console.track("distill", job.steps or 0, job.progress.step) as tracker:
        for batches in step_batches(job):
            loss = train_step(job, batches)
            job.progress.step += 1
            job.progress.tokens += job.tokens_per_step
            job.progress.loss = loss
            step = job.progress.step
            finished = over(job, False)
            interrupted = bool(agree(job, float(signals.received)))
            if main and (step % job.settings.evaluate_every == 0 or finished):
                measure(job, work, tracker)
            if main and (step % job.settings.checkpoint_every == 0 or finished or interrupted):
                save_progress(job, work, identity)
            tracker.advance()
            if finished:
                break
            if interrupted:
                raise Interrupted(
                    f"Interrupted at step {step}; everything is saved.",
                    "The same command goes on from there.",
                    INTERRUPTED,
                )
    job.accelerator.wait_for_everyone()
    return finish(job, work)


# --- preparation -------------------------------------------------------------------------------


def prepare(recipe: Recipe, work: WorkDir) -> Job:
    """Load the teacher, make the student, open the text. A recipe that cannot work is refused here, at the start."""
    device = _shared.device_of(recipe)
    settings = recipe.distill
    wants = settings.precision
    half = wants == "bfloat16" or (wants == "auto" and _shared.fast_bfloat16(device))
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", cpu=device.type == "cpu")
    plan = Plan.model_validate_json(work.plan_file.read_text(encoding="utf-8"))
    terms = [(term.weight, make_loss(term, work)) for term in settings.losses]
    teacher, tokenizer = _shared.load_teacher(recipe, accelerator.device, torch.bfloat16 if half else torch.float32)
    structure = models.structure(teacher)
    student = make_student(recipe, structure, plan, accelerator.device)
    length = _shared.sequence_length(recipe, teacher)
    rows, held_out = _shared.open_text(recipe, work, tokenizer, length)
    optimizer = make_optimizer(student, settings)
    trained = accelerator.prepare_model(student)
    hidden = sorted({layer for _, loss in terms for layer in loss.hidden_layers()})
    if hidden and hidden[-1] > structure.layer_count:
        raise UserError(f"A loss asks for layer {hidden[-1]}, but {recipe.model} has {structure.layer_count} layers.")
    needs_teacher = any(loss.needs_teacher for _, loss in terms)
    return Job(
        settings=settings,
        accelerator=accelerator,
        teacher=teacher if needs_teacher else None,
        student=student,
        trained=trained,
        optimizer=optimizer,
        structure=structure,
        plan=plan,
        rows=rows,
        held_out=held_out,
        length=length,
        terms=terms,
        hidden_layers=tuple(hidden),
    )


def make_student(recipe: Recipe, structure: models.Structure, plan: Plan, device: torch.device) -> PreTrainedModel:
    """A float32 copy of the teacher, or a random one for the control, with training modules in it."""
    if recipe.distill.initialise == "teacher":
        student, _ = models.load(recipe.model, recipe.revision, "cpu", torch.float32, recipe.trust_remote_code)
    else:
        torch.manual_seed(recipe.seed)
        config = models.load_config(models.resolve(recipe.model, recipe.revision), recipe.trust_remote_code)
        student = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=recipe.trust_remote_code
        )
    if recipe.distill.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    surgery.prepare_for_training(student, structure, plan)
    student.config.use_cache = False
    return student.to(device).train()


def make_loss(term: LossTerm, work: WorkDir) -> Loss:
    """A loss with its options; LAFD's layers come from calibrate unless the recipe names them."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in term.options.items()}
    if term.name == "lafd" and "layers" not in options:
        similarities = load_file(work.statistics_file)["layer_similarity"].tolist()
        if options.get("select") == "batch":
            options["layers"] = tuple(range(1, len(similarities) + 1))
        else:
            options["layers"] = least_similar(similarities, int(options.pop("count", LAFD_LAYERS)))
    return losses.make(term.name, **options)


def make_optimizer(student: PreTrainedModel, settings: Distill) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


# --- one step ----------------------------------------------------------------------------------


def step_batches(job: Job) -> Iterator[list[Batch]]:
    """The micro-batches of this process for every step, from the current one on."""
    accelerator, settings = job.accelerator, job.settings
    while not over(job, True):
        yield [
            job.rows.batch(
                step=job.progress.step,
                micro=micro,
                accumulation=settings.accumulation,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                batch_size=settings.batch_size,
            )
            for micro in range(settings.accumulation)
        ]


def train_step(job: Job, batches: list[Batch]) -> float:
    """One optimizer step; returns its loss."""
    accelerator = job.accelerator
    batches = [{key: value.to(accelerator.device) for key, value in batch.items()} for batch in batches]
    targets = [teacher_outputs(job, batch) for batch in batches]
    totals = step_totals(job, batches, targets)
    rate = job.settings.learning_rate * schedule(job.settings, job.share())
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=accelerator.device)
    for index, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        last = index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(job.trained):
            student = student_outputs(job, batch)
            loss = sum(weight * term(student, target, batch["labels"], totals) for weight, term in job.terms)
            # Processes' gradients are averaged, but contributions add up.
            accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
    norm = accelerator.clip_grad_norm_(job.student.parameters(), job.settings.clip)
    if not torch.isfinite(norm):
        raise UserError(
            f"The gradient is not finite at step {job.progress.step + 1}.",
            "Lower --learning-rate, or train with `precision: float32` in the recipe.",
        )
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return float(accelerator.reduce(total, "sum"))


@torch.no_grad()
def teacher_outputs(job: Job, batch: Batch) -> Outputs | None:
    """Logits [B, T, V] and the hidden states that losses ask for."""
    if job.teacher is None:
        return None
    with models.capture_hidden(job.teacher, job.structure, job.hidden_layers) as hidden:
        logits = job.teacher(input_ids=batch["input_ids"], use_cache=False).logits
    return Outputs(logits, dict(hidden))


def student_outputs(job: Job, batch: Batch) -> Outputs:
    """The same of the student, with gradients."""
    with models.capture_hidden(job.student, job.structure, job.hidden_layers) as hidden, job.accelerator.autocast():
        logits = job.trained(input_ids=batch["input_ids"], use_cache=False).logits
    return Outputs(logits, dict(hidden))


def step_totals(job: Job, batches: list[Batch], targets: list[Outputs | None]) -> StepTotals:
    """Counts and teacher statistics over all micro-batches and processes of the step."""
    sums: dict[str, Tensor] = {}
    device = job.accelerator.device
    for batch, target in zip(batches, targets, strict=True):
        samples, tokens = step_counts(batch["labels"])
        found = {
            "samples": torch.tensor(samples, dtype=torch.float64, device=device),
            "tokens": torch.tensor(tokens, dtype=torch.float64, device=device),
        }
        for _, term in job.terms:
            if target is not None:
                found |= term.teacher_statistics(target, batch["labels"])
        for name, value in found.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + value.double()
    sums = {name: job.accelerator.reduce(value, "sum") for name, value in sums.items()}
    samples, tokens = int(sums.pop("samples")), int(sums.pop("tokens"))
    return StepTotals(samples, tokens, {name: float(value) / max(samples, 1) for name, value in sums.items()})


def schedule(settings: Distill, share: float) -> float:
    """Learning rate as a share of its peak, when `share` of the budget is used."""
    if share < settings.warmup:
        return (share + 1e-3) / (settings.warmup + 1e-3)
    if settings.schedule == "constant":
        return 1.0
    rest = (share - settings.warmup) / (1 - settings.warmup)
    fall = 1 - rest if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * rest))
    return settings.final_learning_rate + (1 - settings.final_learning_rate) * fall


def over(job: Job, before: bool) -> bool:
    """Whether the budget is used up, as the main process sees it; `before` a step, only counters are looked at."""
    if job.steps is not None and job.progress.step >= job.steps:
        return True
    if before or not job.settings.max_time:
        return False
    return bool(agree(job, float(job.seconds() >= job.settings.max_time)))


def agree(job: Job, value: float) -> float:
    """The largest of the processes' values, so that all of them decide alike."""
    if job.accelerator.num_processes == 1:
        return value
    return float(job.accelerator.gather(torch.tensor([value], device=job.accelerator.device)).max())


# --- measuring and saving ----------------------------------------------------------------------


@torch.no_grad()
def measure(job: Job, work: WorkDir, tracker: Any) -> None:
    """Held-out loss of the student as it would be packed; keep the best."""
    job.student.eval()
    sums = {"cross_entropy": 0.0, "kl": 0.0, "tokens": 0.0}
    with surgery.frozen_codes(job.student) as digests:
        for batch in data.sample_batches(job.held_out, job.settings.evaluate_sequences, job.settings.batch_size):
            for name, value in held_out_sums(job, batch).items():
                sums[name] += value
    job.student.train()
    tokens = sums["tokens"]
    found = {"cross_entropy": sums["cross_entropy"] / tokens}
    if job.teacher is not None:
        found["kl"] = sums["kl"] / tokens
    value = found[measured_by(job)]
    if not math.isfinite(value):
        raise UserError(f"The held-out loss is not finite at step {job.progress.step}.", "Lower --learning-rate.")
    if job.progress.best is None or value < job.progress.best:
        job.progress.best, job.progress.best_step = value, job.progress.step
        save_student(job, work.student("best"), digests)
    save_student(job, work.student("last"), digests)
    tracker.note(", ".join(f"held-out {name} {value:.4f}" for name, value in found.items()))
    line = {"step": job.progress.step, "tokens": job.progress.tokens, "seconds": round(job.seconds(), 1)}
    append_metrics(work.metrics_file, {**line, "loss": job.progress.loss, **found})
    job.progress.metrics_lines += 1


def measured_by(job: Job) -> str:
    """What decides which student is the best."""
    return "kl" if job.teacher is not None else "cross_entropy"


def held_out_sums(job: Job, batch: Batch) -> dict[str, float]:
    """Sums over the predicted tokens of a batch, in nats: cross entropy, KL(teacher || student); and their count."""
    batch = {key: value.to(job.accelerator.device) for key, value in batch.items()}
    mask = predicting(batch["labels"])
    targets = batch["labels"].roll(-1, 1)[mask]
    with job.accelerator.autocast():
        logits = job.student(input_ids=batch["input_ids"], use_cache=False).logits[mask]
    student = logits.float().log_softmax(-1)
    result = {
        "cross_entropy": float(torch.nn.functional.nll_loss(student, targets, reduction="sum")),
        "tokens": float(mask.sum()),
    }
    target = teacher_outputs(job, batch)
    if target is not None:
        teacher = target.logits[mask].float().log_softmax(-1)
        size = min(teacher.shape[-1], student.shape[-1])
        result["kl"] = float((teacher.exp() * (teacher - student[:, :size])).sum())
    return result


def save_student(job: Job, folder: Path, digests: dict[str, str]) -> None:
    """Master weights (float32) under the teacher's own names, and the digests of the codes that were just used."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in job.student.state_dict(keep_vars=True).items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().contiguous().cpu()
    with replace_folder(folder) as new:
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        (new / "digests.json").write_text(json.dumps(digests, indent=1), encoding="utf-8")


def save_progress(job: Job, work: WorkDir, identity: dict[str, str]) -> None:
    """Write the checkpoint; the clock goes on from here."""
    job.progress.seconds, job.began = job.seconds(), time.monotonic()
    _checkpoint.save(work.checkpoint("current"), job.student, job.optimizer, job.progress, identity)


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def trim_metrics(path: Path, lines: int) -> None:
    """Drop what was measured after the checkpoint that we go on from."""
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines] if path.exists() else []
    path.write_text("".join(kept), encoding="utf-8")


def finish(job: Job, work: WorkDir) -> DistillResult:
    progress = job.progress
    result = DistillResult(
        notation=job.plan.notation(),
        steps=progress.step,
        tokens=progress.tokens,
        seconds=round(progress.seconds, 1),
        loss=progress.loss or 0.0,
        best=progress.best or 0.0,
        best_step=progress.best_step,
        measure=f"held-out {measured_by(job)}, nats per token",
        tokens_per_second=round(progress.tokens / max(progress.seconds, 1e-9), 1),
    )
    if job.accelerator.is_main_process:
        write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


class Signals:
    received = False


@contextmanager
def watch_signals() -> Iterator[Signals]:
    """Note Ctrl-C and termination instead of dying in the middle of a step; a second one kills at once."""
    seen = Signals()

    def note(number: int, _frame: Any) -> None:
        if seen.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        seen.received = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dry_run(recipe: Recipe, work: WorkDir, console: Console) -> DistillDryRun:
    """What would be trained, and how long it would take, from one measured step that is thrown away."""
    job = prepare(recipe, work)
    batches = next(step_batches(job))
    train_step(job, batches)
    began = time.monotonic()
    train_step(job, batches)
    seconds = time.monotonic() - began
    parameters = sum(p.numel() for p in job.student.parameters())
    teacher = sum(p.numel() * p.element_size() for p in job.teacher.parameters()) if job.teacher else 0
    logits = job.settings.batch_size * job.length * job.student.config.get_text_config().vocab_size * 4
    return DistillDryRun(
        notation=job.plan.notation(),
        steps=job.steps,
        tokens_per_step=job.tokens_per_step,
        memory_bytes=16 * parameters + teacher + 4 * logits,
        disk_bytes=(12 + 12 + 4 + 4 + 4) * parameters,  # checkpoint, the next one, best, last, and one being written
        result_bytes=job.plan.bytes(),
        seconds_per_step=round(seconds, 3),
        seconds=round(seconds * job.steps, 1) if job.steps else job.settings.max_time,
    )


def show(result: DistillResult) -> list[RenderableType]:
    """The training, for people."""
    return [
        table(
            f"Student {result.notation}",
            ["steps", "tokens", "seconds", "tokens/s", "loss", result.measure, "at step"],
            [
                [
                    str(result.steps),
                    f"{result.tokens:,}",
                    f"{result.seconds:.0f}",
                    f"{result.tokens_per_second:,.0f}",
                    f"{result.loss:.4f}",
                    f"{result.best:.4f}",
                    str(result.best_step),
                ]
            ],
        )
    ]
