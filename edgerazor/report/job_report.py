"""Everything a report tells of a job, gathered from its manifests: whatever of the stages is there.

A stage that is not there is said to be missing, with the command that makes it; one that was made of something else
than what lies there now is said to be stale.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from edgerazor import packed, untrusted
from edgerazor.benchmark.bench_result import BenchResult
from edgerazor.calibration.calibrate_result import CalibrateResult
from edgerazor.console import megabytes, percent
from edgerazor.errors import UserError, plain
from edgerazor.evaluation.eval_result import EvalResult, TaskResult
from edgerazor.job import JobContext, training_in
from edgerazor.packaging.pack_result import PackResult
from edgerazor.packed import PackedModel
from edgerazor.report import plan_summary, summary
from edgerazor.report.commands import Flags, at, stage_command
from edgerazor.report.plan_summary import PlannedMatrix, PlanSummary
from edgerazor.report.side_by_side import Samples, samples_of
from edgerazor.report.summary import ModelRow
from edgerazor.training.budget import GOOD_PASSES
from edgerazor.training.results import DistillResult
from edgerazor.workdir import FOLDERS, Manifest, WorkDir

#: Rows of the training curve: of more, some are left out.
MOST_ROWS = 400
#: Bytes of the metrics that are read, and of a line of them.
MOST_BYTES = 1 << 26
#: Most characters of a name of strangers.
LONGEST_NAME = 100
#: The input of a stage that is another stage's fingerprint, where it has another name than that stage.
INPUTS_OF = {"student": "distill"}

State = Literal["done", "stale", "missing", "damaged"]


class StageReport(BaseModel):
    """A stage: whether it is done, by which command, and how long it took."""

    name: str
    state: State
    why: str = Field("", description="it is stale or damaged")
    command: str = Field(description="that made it, or makes it")
    seconds: float | None = None
    machine: str | None = None
    versions: dict[str, str] = {}


class Caution(BaseModel):
    """What to know before a number is believed; `grave`: it may be wrong without that."""

    grave: bool
    text: str


class JobReport(BaseModel):
    """A job. Null is what was not done, or was written by another version of this program."""

    name: str
    folder: str
    teacher: str
    notation: str | None
    sentence: str
    stages: list[StageReport]
    cautions: list[Caution]
    models: list[ModelRow]
    calibrate: CalibrateResult | None = None
    distill: DistillResult | None = None
    pack: PackResult | None = None
    eval: EvalResult | None = None
    bench: BenchResult | None = None
    plan: PlanSummary | None = None
    curve: list[dict[str, float]] = Field([], description="evaluations during training")
    samples: Samples | None = None
    no_samples: str = Field("", description="why there are none")

    def stage(self, name: str) -> StageReport:
        return next(stage for stage in self.stages if stage.name == name)


class Report(BaseModel):
    """Jobs side by side, and the file that shows them."""

    file: str
    jobs: list[JobReport]


def gather(context: JobContext, flags: Flags, want_samples: bool) -> JobReport:
    """Everything there is to tell of a job.

    Args:
        context: of its recipe and working directory.
        flags: options of the command line.
        want_samples: let teacher and student write where that was not done yet.
    """
    work = context.work
    work.find()
    manifests = {name: manifest for name in FOLDERS if (manifest := work.manifest(name))}
    stages = [stage_report(name, work, manifests, flags) for name in FOLDERS if takes_part(name, context, manifests)]
    results = {name: read_result(name, manifest) for name, manifest in manifests.items()}
    job = JobReport(
        name=plain(work.path.name if work.path.name not in ("", "..") else work.path.resolve().name, LONGEST_NAME),
        folder=str(work.path),
        teacher=plain(
            Path(context.recipe.model).name if Path(context.recipe.model).exists() else context.recipe.model,
            LONGEST_NAME,
        ),
        notation=None,
        sentence="",
        stages=stages,
        cautions=[],
        models=models_of(work),
        curve=read_curve(work) if "distill" in manifests else [],
        **{name: result for name, result in results.items() if result is not None},
    )
    job.plan = plan_of(work)
    notations = (result.notation for result in (job.pack, job.distill, job.calibrate) if result is not None)
    job.notation = next(notations, None)
    job.samples, job.no_samples = find_samples(context, want_samples)
    job.cautions = list(cautions(job, work))
    job.sentence = sentence(job)
    return job


def takes_part(name: str, context: JobContext, manifests: dict[str, Manifest]) -> bool:
    """Whether a stage is a part of this job: a teacher that is rounded needs neither calibrate nor distill."""
    if name in manifests or context.work.has_damaged_manifest(name):
        return True
    rounded = (
        manifests["pack"].result.get("source") == "teacher"
        if "pack" in manifests
        else (context.recipe.pack.source == "teacher")
    )
    return not rounded or name not in ("calibrate", "distill")


# --- stages ------------------------------------------------------------------------------------


def stage_report(name: str, work: WorkDir, manifests: dict[str, Manifest], flags: Flags) -> StageReport:
    """How a stage stands."""
    manifest = manifests.get(name)
    command = stage_command(name, work.path, manifest, flags)
    if manifest is None:
        if work.has_damaged_manifest(name):
            return StageReport(name=name, state="damaged", why="its record cannot be read", command=command)
        return StageReport(name=name, state="missing", command=command)
    why = stale_because(manifest, work, manifests)
    return StageReport(
        name=name,
        state="stale" if why else "done",
        why=why,
        command=command,
        seconds=manifest.seconds,
        machine=plain(manifest.machine, 120),
        versions=manifest.versions,
    )


def stale_because(manifest: Manifest, work: WorkDir, manifests: dict[str, Manifest]) -> str:
    """Why a stage does not fit what lies there now; empty where it does."""
    lost = [name for name in manifest.outputs if not (work.folder(manifest.stage) / name).exists()]
    if lost:
        return f"its file {plain(lost[0], 80)} is gone"
    for name, value in manifest.inputs.items():
        stage = INPUTS_OF.get(name, name)
        if stage not in FOLDERS or stage == manifest.stage or not re.fullmatch("[0-9a-f]{64}", value):
            continue
        if stage not in manifests:
            return f"it was made of a {stage} that is gone"
        if value != manifests[stage].fingerprint():
            return f"{stage} was done again since, with another outcome"
    return ""


_RESULTS: dict[str, type[BaseModel]] = {
    "calibrate": CalibrateResult,
    "distill": DistillResult,
    "pack": PackResult,
    "eval": EvalResult,
    "bench": BenchResult,
}


def read_result(name: str, manifest: Manifest) -> Any:
    """The result of a stage; None where another version of this program wrote it."""
    try:
        return _RESULTS[name].model_validate(manifest.result)
    except ValidationError:
        return None


def models_of(work: WorkDir) -> list[ModelRow]:
    """The models of a job as `show` has them: teacher, what was compared, and the packed one."""
    try:
        return summary.summarize(work).models
    except (UserError, ValidationError):
        return []


def plan_of(work: WorkDir) -> PlanSummary | None:
    """The plan; of a model that was rounded without one, the formats in its packed file."""
    for read in (plan_summary.summarize, plan_of_packed):
        try:
            return read(work)
        except UserError:
            continue
    return None


def plan_of_packed(work: WorkDir) -> PlanSummary:
    """The formats of a packed model, as if they had been planned.

    Raises:
        UserError: there is none, or it is damaged.
    """
    model = PackedModel.open(work.folder("pack"))
    specs = {name: model.spec(name) for name in model.header.matrices}
    where = plan_summary.places([name for name, entry in model.header.matrices.items() if entry.kind == "linear"])
    matrices, linear = [], Counter[str]()
    for name, entry in model.header.matrices.items():
        weights, count = specs[name].weights_by_format(entry.shape), math.prod(entry.shape)
        linear.update(weights if entry.kind == "linear" else {})
        layer, role = where.get(name, (None, None))
        matrices.append(
            PlannedMatrix(
                name=name,
                kind=entry.kind,
                layer=layer,
                role=role,
                rows=entry.shape[0],
                columns=entry.shape[1],
                bits=round(specs[name].nominal_bits(entry.shape), 4),
                formats={format_name: number / count for format_name, number in weights.items()},
            )
        )
    sizes = packed.size_table(model)
    return PlanSummary(
        notation="",
        strategy="",
        granularity="",
        nominal_bits=sizes.nominal_bits,
        real_bits=sizes.real_bits,
        bytes=sizes.bytes,
        predicted_kl=None,
        formats={name: number / linear.total() for name, number in linear.items()},
        matrices=matrices,
        estimate=None,
        tokens=None,
        most_sensitive=[],
        kv_damage=None,
    )


def read_curve(work: WorkDir) -> list[dict[str, float]]:
    """The evaluations of a training: numbers by name, at most `MOST_ROWS` of them, the last one always."""
    try:
        lines = untrusted.read_bytes(work.metrics_file, MOST_BYTES).decode("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return []
    rows = []
    stride = max(1, -(-len(lines) // MOST_ROWS))
    for line in [*lines[: -1 if lines else 0 : stride], *lines[-1:]]:
        try:
            values = untrusted.parse_json(line, dict)
        except ValueError:
            continue
        rows.append({name: float(value) for name, value in values.items() if type(value) in (int, float)})
    return [row for row in rows if "step" in row]


def find_samples(context: JobContext, wanted: bool) -> tuple[Samples | None, str]:
    """Texts side by side, or why there are none."""
    command = f"`edgerazor report{''.join(' ' + word for word in at(context.work.path))}`"
    if not wanted:
        return None, f"Texts side by side were left out (--no-samples); {command} writes them."
    try:
        return samples_of(context), ""
    except UserError as error:
        return None, f"No texts side by side: {plain(error.message, 300)} {plain(error.hint, 200)}".rstrip()


# --- what to know before a number is believed --------------------------------------------------


def cautions(job: JobReport, work: WorkDir) -> Iterator[Caution]:
    """Warnings and notes, the grave ones first."""
    for stage in job.stages:
        if stage.state in ("stale", "damaged"):
            again = "is stale" if stage.state == "stale" else "is damaged"
            yield grave(f"{stage.name} {again}: {stage.why}. Make it again: `{stage.command}`.")
    if training_in(work) == "an interrupted training":
        yield grave(f"The training was interrupted. Finish it: `{job.stage('distill').command}`.")
    if job.eval is not None:
        yield from map(grave, job.eval.failures)
    if job.samples is not None:
        yield from loop_cautions(job.samples)
    yield from training_cautions(job)
    if job.pack is not None:
        for export in job.pack.exports:
            if export.lossy:
                yield grave(f"The export {export.export} changes the weights of {len(export.lossy)} tensors.")
    for stage in job.stages:
        if stage.state == "missing":
            yield note(f"{stage.name} was not run: `{stage.command}`.")
    if job.eval is not None:
        yield from eval_cautions(job.eval)
    if job.bench is not None:
        yield from map(note, job.bench.notes)


def training_cautions(job: JobReport) -> Iterator[Caution]:
    """Text that was read more than once."""
    if job.distill is not None and job.distill.passes is not None and job.distill.passes > 1:
        sentence = f"The training read its text {job.distill.passes:.1f} times"
        if job.distill.passes > GOOD_PASSES:
            yield grave(f"{sentence}; over {GOOD_PASSES} times, more text would teach more than repeating it.")
        else:
            yield note(f"{sentence}.")


def grave(text: str) -> Caution:
    return Caution(grave=True, text=plain(text, 600))


def note(text: str) -> Caution:
    return Caution(grave=False, text=plain(text, 600))


def loop_cautions(samples: Samples) -> Iterator[Caution]:
    """Texts of the student that turn in circles, where they are more than the teacher's."""
    students = sum(text.student_loops for text in samples.texts)
    teachers = sum(text.teacher_loops for text in samples.texts)
    if students > teachers:
        yield grave(
            f"{students} of {len(samples.texts)} greedy texts of the student end in a loop, and {teachers} of the "
            "teacher's."
        )


def eval_cautions(result: EvalResult) -> Iterator[Caution]:
    """Parts of task sets, scores that nothing can be kept of, and what `eval` notes."""
    partial = {name: task for name, task in result.tasks.items() if task.full_set is False}
    if partial:
        names = ", ".join(f"{name} ({task.items:,} items)" for name, task in partial.items())
        yield note(f"Only a part of the items was asked: {names}. Do not compare with published scores.")
    for name, task in result.tasks.items():
        if has_no_retention(task):
            yield note(
                f"{name}: the teacher is within two standard errors of chance, so there is nothing to retain, and no "
                "retention."
            )
    known = (" items of ", "within two standard errors of chance")
    yield from (note(text) for text in result.notes if not any(words in text for words in known))


def has_no_retention(task: TaskResult) -> bool:
    return task.chance is not None and task.teacher_score is not None and task.retention_above_chance is None


# --- in a sentence -----------------------------------------------------------------------------


def sentence(job: JobReport) -> str:
    """What it is, as far as it is known."""
    name = job.teacher or "A model"
    if job.pack is not None:
        size = job.pack
        smaller = (
            f", {size.teacher_bytes / size.bytes:.1f} times smaller than its teacher" if size.teacher_bytes else ""
        )
        parts = [
            f"{name} at {size.nominal_bits:.2f} nominal and {size.real_bits:.2f} real bits a weight "
            f"({megabytes(size.bytes)}{smaller})"
        ]
    elif job.plan is not None:
        parts = [f"{name}, planned at {job.plan.nominal_bits:.2f} nominal bits a weight, not packed yet"]
    else:
        return f"{name}: nothing is finished yet."
    if job.distill is not None:
        parts.append(f"distilled in {job.distill.steps:,} steps of {job.distill.tokens:,} tokens altogether")
    elif job.pack is not None and job.pack.source == "teacher":
        parts.append("rounded without training")
    mean = job.eval.average if job.eval else None
    if mean is not None and mean.retention_above_chance is not None:
        error = f" (± {100 * mean.retention_stderr:.1f})" if mean.retention_stderr is not None else ""
        count = sum(task.chance is not None for task in job.eval.tasks.values()) if job.eval else 0
        parts.append(
            f"keeps {percent(mean.retention_above_chance)}{error} of what its teacher knows above chance in "
            f"{count} task{'s' * (count != 1)}"
        )
    elif job.eval is not None and job.eval.text is not None and job.eval.text.kl is not None:
        parts.append(f"{job.eval.text.kl:.3g} nats per token from its teacher on held-out text")
    elif job.eval is None:
        parts.append("not measured yet")
    return ", ".join(parts) + "."
