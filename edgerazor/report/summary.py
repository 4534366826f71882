"""A whole job in one table: the teacher, the packed model, and what was compared with it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from rich.console import RenderableType

from edgerazor import calibrated, packed, recipe, transformers_plugin
from edgerazor.benchmark.bench_result import BenchResult
from edgerazor.console import megabytes, table
from edgerazor.evaluation.eval_result import EvalResult, Measured
from edgerazor.packaging.pack_result import PackResult
from edgerazor.workdir import FOLDERS, WorkDir


class ModelRow(BaseModel):
    """One model of a job: what it knows, how large and how fast it is. Null where it was not measured."""

    name: str
    scores: dict[str, float]
    average: float | None = None
    retention_above_chance: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    real_bits: float | None = None
    bytes: int | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None


class Summary(BaseModel):
    """A job: the teacher, the packed model, and what was compared with it."""

    notation: str | None
    stages: list[str]
    models: list[ModelRow]
    notes: list[str]
    failures: list[str]


def summarize(work: WorkDir) -> Summary:
    """Collect the results of the finished stages of a job."""
    work.find()
    results = {stage: manifest.result for stage in FOLDERS if (manifest := work.manifest(stage))}
    evaluated = EvalResult.model_validate(results["eval"]) if "eval" in results else None
    benched = BenchResult.model_validate(results["bench"]) if "bench" in results else None
    packed_result = PackResult.model_validate(results["pack"]) if "pack" in results else None
    rows = []
    if evaluated:
        compared = (_measured_row(name, measured) for name, measured in evaluated.compared.items())
        rows = [_teacher_row(evaluated, packed_result), *compared]
    rows.append(_measured_row("packed", evaluated or Measured()))
    if packed_result:
        rows[-1].bytes, rows[-1].real_bits = packed_result.bytes, packed_result.real_bits
    for row in rows:
        _add_speed(row, benched)
        _add_size(row, work)
    notation = packed_result.notation if packed_result else None
    if notation is None and work.plan_file.exists():
        notation = calibrated.read_plan(work).notation()
    return Summary(
        notation=notation,
        stages=list(results),
        models=rows,
        notes=(evaluated.notes if evaluated else []) + (benched.notes if benched else []),
        failures=evaluated.failures if evaluated else [],
    )


def _teacher_row(result: EvalResult, packed_result: PackResult | None) -> ModelRow:
    scores = {name: task.teacher_score for name, task in result.tasks.items() if task.teacher_score is not None}
    return ModelRow(
        name="teacher",
        scores=scores,
        average=result.average.teacher_score if result.average else None,
        perplexity=result.text.teacher_perplexity if result.text else None,
        real_bits=round(8 * packed_result.teacher_bytes / packed_result.parameters, 4) if packed_result else None,
        bytes=packed_result.teacher_bytes if packed_result else None,
    )


def _measured_row(name: str, measured: Measured) -> ModelRow:
    return ModelRow(
        name=name,
        scores={task: result.score for task, result in measured.tasks.items()},
        average=measured.average.score if measured.average else None,
        retention_above_chance=measured.average.retention_above_chance if measured.average else None,
        perplexity=measured.text.perplexity if measured.text else None,
        kl=measured.text.kl if measured.text else None,
    )


def _add_speed(row: ModelRow, benched: BenchResult | None) -> None:
    """Of the most threads, and of decoding with the shortest context."""
    if benched is None:
        return
    most = max(benched.threads)
    for run in (run for run in benched.runs if (run.engine, run.threads) == (row.name, most)):
        if run.phase == "prefill":
            row.prefill_tokens_per_second = run.tokens_per_second
        elif row.decode_tokens_per_second is None:
            row.decode_tokens_per_second = run.tokens_per_second


def _add_size(row: ModelRow, work: WorkDir) -> None:
    """Sizes of the folders that were compared."""
    folder = recipe.load(work.recipe_file).get("compare", {}).get(row.name)
    if row.bytes is None and folder and transformers_plugin.is_packed(Path(folder)):
        sizes = packed.size_table(packed.PackedModel.open(Path(folder)))
        row.bytes, row.real_bits = sizes.bytes, round(sizes.real_bits, 4)


def show(summary: Summary) -> list[RenderableType]:
    """The table, notes and failures, for people."""
    tasks = list(dict.fromkeys(task for row in summary.models for task in row.scores))
    columns = ["model", *tasks, "above chance", "perplexity", "KL", "real bits", "size", "prefill/s", "decode/s"]
    return [
        table(
            f"{summary.notation or 'No plan yet'}; finished: {', '.join(summary.stages) or 'nothing yet'}",
            columns,
            [_summary_row(row, tasks) for row in summary.models],
            caption="above chance: what is left of the teacher's score above guessing, over all tasks; "
            "prefill and decode in tokens per second",
        ),
        *(f"Note: {note}" for note in summary.notes),
        *(f"Failed: {failure}" for failure in summary.failures),
    ]


def _summary_row(row: ModelRow, tasks: list[str]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    above = 1.0 if row.name == "teacher" and row.scores else row.retention_above_chance
    return [
        row.name,
        *(number(row.scores.get(task), ".1%") for task in tasks),
        number(above, ".1%"),
        number(row.perplexity, ".3f"),
        number(row.kl, ".4f"),
        number(row.real_bits, ".2f"),
        "" if row.bytes is None else megabytes(row.bytes),
        number(row.prefill_tokens_per_second, ",.0f"),
        number(row.decode_tokens_per_second, ",.1f"),
    ]
