"""One look at a job or a packed model: what came out, in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel
from rich.console import RenderableType

from edgerazor import job, packed, transformers_plugin
from edgerazor.console import Console, megabytes, table
from edgerazor.errors import usage_error
from edgerazor.packed.shipping import CompressResult
from edgerazor.recipe import json_schema
from edgerazor.report import differences, heatmap, inspection
from edgerazor.report.differences import Differences
from edgerazor.report.inspection import PackedSummary, show_format
from edgerazor.report.plan import PlanSummary
from edgerazor.report.plan import summarize as summarize_plan
from edgerazor.stages.bench import BenchResult
from edgerazor.stages.calibrate import CalibrateResult
from edgerazor.stages.distill import DistillResult
from edgerazor.stages.eval import EvalResult, Measured
from edgerazor.stages.generate import GenerateResult
from edgerazor.stages.pack import ForeignResult, PackResult
from edgerazor.stages.write_data import DataResult
from edgerazor.workdir import WorkDir, find_folder

__all__ = ["draw_plan", "inspect", "schema", "show", "show_format", "summarize"]

RESULTS: dict[str, type[BaseModel]] = {
    "calibrate": CalibrateResult,
    "distill": DistillResult,
    "pack": PackResult,
    "eval": EvalResult,
    "bench": BenchResult,
}


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


def inspect(
    path: Path, console: Console, verify: bool = False, against: Path | None = None
) -> Summary | PackedSummary | Differences:
    """Look at a working directory, or at a packed folder or a weight file in it.

    Args:
        path: of one of them.
        console: where progress is shown.
        verify: check every byte of the packed folder.
        against: another packed folder: tell what differs.

    Raises:
        UserError: it is none of them, or damaged.
    """
    path, against = folder_of(path), folder_of(against) if against else None
    if not transformers_plugin.is_packed(path) and (verify or against):
        raise usage_error(
            f"{path} is not a packed model, and {'--verify' if verify else '--against'} is for those.",
            f"Name the folder that pack wrote, such as {WorkDir(path).folder('pack')}.",
        )
    if against:
        if not transformers_plugin.is_packed(against):
            raise usage_error(f"{against} is not a packed model to compare with.", "Make one with `edgerazor pack`.")
        return differences.compare(path, against, console, verify)
    if transformers_plugin.is_packed(path):
        return inspection.look_into(path, verify, console)
    if not WorkDir(path).recipe_file.exists():
        raise usage_error(
            f"{path} is neither a working directory of edgerazor nor a packed model.",
            "Begin with `edgerazor distill MODEL --bits 2`, or see `edgerazor show recipe`.",
        )
    return summarize(WorkDir(path))


def folder_of(path: Path) -> Path:
    """The folder of a weight file; anything else is its own. Put back first where a killed process took it away."""
    find_folder(path.parent if path.suffix == ".safetensors" else path)
    return path.parent if path.is_file() and path.suffix == ".safetensors" else path


def draw_plan(work: WorkDir, png: Path | None = None) -> PlanSummary:
    """The plan of a working directory, also as a picture where a file is named for it.

    Raises:
        UserError: there is no plan, a file of calibrate is damaged, or `png` is a folder.
    """
    found = summarize_plan(work)
    if png is not None:
        heatmap.write_png(found, png)
    return found


def summarize(work: WorkDir) -> Summary:
    """Collect what the finished stages found."""
    work.find()
    results = {name: manifest.result for name in RESULTS if (manifest := work.manifest(name))}
    evaluated = EvalResult.model_validate(results["eval"]) if "eval" in results else None
    benched = BenchResult.model_validate(results["bench"]) if "bench" in results else None
    done = PackResult.model_validate(results["pack"]) if "pack" in results else None
    rows = []
    if evaluated:
        rows = [teacher_row(evaluated, done), *(measured_row(n, m) for n, m in evaluated.compared.items())]
    rows.append(measured_row("packed", evaluated or Measured()))
    if done:
        rows[-1].bytes, rows[-1].real_bits = done.bytes, done.real_bits
    for row in rows:
        add_speed(row, benched)
        add_size(row, work)
    notation = done.notation if done else None
    if notation is None and work.plan_file.exists():
        notation = job.read_plan(work).notation()
    return Summary(
        notation=notation,
        stages=list(results),
        models=rows,
        notes=(evaluated.notes if evaluated else []) + (benched.notes if benched else []),
        failures=evaluated.failures if evaluated else [],
    )


def teacher_row(result: EvalResult, done: PackResult | None) -> ModelRow:
    scores = {name: task.teacher_score for name, task in result.tasks.items() if task.teacher_score is not None}
    return ModelRow(
        name="teacher",
        scores=scores,
        average=result.average.teacher_score if result.average else None,
        perplexity=result.text.teacher_perplexity if result.text else None,
        real_bits=round(8 * done.teacher_bytes / done.parameters, 4) if done else None,
        bytes=done.teacher_bytes if done else None,
    )


def measured_row(name: str, measured: Measured) -> ModelRow:
    return ModelRow(
        name=name,
        scores={task: found.score for task, found in measured.tasks.items()},
        average=measured.average.score if measured.average else None,
        retention_above_chance=measured.average.retention_above_chance if measured.average else None,
        perplexity=measured.text.perplexity if measured.text else None,
        kl=measured.text.kl if measured.text else None,
    )


def add_speed(row: ModelRow, benched: BenchResult | None) -> None:
    """Of the most threads, and of decoding with the shortest context."""
    if benched is None:
        return
    most = max(benched.threads)
    for run in (each for each in benched.runs if (each.engine, each.threads) == (row.name, most)):
        if run.phase == "prefill":
            row.prefill_tokens_per_second = run.tokens_per_second
        elif row.decode_tokens_per_second is None:
            row.decode_tokens_per_second = run.tokens_per_second


def add_size(row: ModelRow, work: WorkDir) -> None:
    """Sizes of the folders that were compared."""
    from edgerazor import recipe

    folder = recipe.load(work.recipe_file).get("compare", {}).get(row.name)
    if row.bytes is None and folder and transformers_plugin.is_packed(Path(folder)):
        sizes = packed.size_table(packed.PackedModel.open(Path(folder)))
        row.bytes, row.real_bits = sizes.bytes, round(sizes.real_bits, 4)


def schema(flags: Mapping[str, str]) -> str:
    """JSON schemas of the recipe and of what `--json` prints; `flags` names the options of the recipe's fields."""
    others: dict[str, type[BaseModel]] = {
        "data": DataResult,
        "generate": GenerateResult,
        "show": Summary,
        "show plan": PlanSummary,
        "show PACKED": PackedSummary,
        "show PACKED --against": Differences,
        "pack PACKED --compress": CompressResult,
        "pack FOREIGN": ForeignResult,
    }
    results = {name: model.model_json_schema() for name, model in {**RESULTS, **others}.items()}
    return json.dumps({"recipe": json_schema(flags), **results}, indent=1)


def show(found: Summary | PlanSummary | PackedSummary | Differences) -> list[RenderableType]:
    """The same for people."""
    if isinstance(found, PlanSummary):
        return heatmap.show(found)
    if isinstance(found, PackedSummary):
        return inspection.show(found)
    if isinstance(found, Differences):
        return differences.show(found)
    tasks = list(dict.fromkeys(task for row in found.models for task in row.scores))
    columns = ["model", *tasks, "above chance", "perplexity", "KL", "real bits", "size", "prefill/s", "decode/s"]
    return [
        table(
            f"{found.notation or 'No plan yet'}; finished: {', '.join(found.stages) or 'nothing yet'}",
            columns,
            [summary_row(row, tasks) for row in found.models],
            caption="above chance: what is left of the teacher's score above guessing, over all tasks; "
            "prefill and decode in tokens per second",
        ),
        *(f"Note: {note}" for note in found.notes),
        *(f"Failed: {failure}" for failure in found.failures),
    ]


def summary_row(row: ModelRow, tasks: list[str]) -> list[str]:
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
