"""One look at a job, its plan or a packed model; the JSON schemas and the packed format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel
from rich.console import RenderableType

from edgerazor import transformers_plugin
from edgerazor.benchmark.bench_result import BenchResult
from edgerazor.calibration.calibrate_result import CalibrateResult
from edgerazor.console import Console
from edgerazor.errors import usage_error
from edgerazor.evaluation.eval_result import EvalResult
from edgerazor.packaging.pack_result import CompressResult, ForeignResult, PackResult
from edgerazor.recipe import json_schema
from edgerazor.report import differences, heatmap, inspection, plan_summary, recording_summary, summary
from edgerazor.report.differences import Differences
from edgerazor.report.generate_result import GenerateResult
from edgerazor.report.inspection import PackedSummary, show_format
from edgerazor.report.job_report import Report
from edgerazor.report.plan_summary import PlanSummary
from edgerazor.report.recording_summary import RecordingSummary
from edgerazor.report.serve_result import ServeResult
from edgerazor.report.summary import Summary, summarize
from edgerazor.stages.distill import DistillResult
from edgerazor.stages.push import PushResult
from edgerazor.stages.record import RecordResult
from edgerazor.stages.write_data import DataResult
from edgerazor.workdir import WorkDir, find_folder

__all__ = ["draw_plan", "inspect", "schema", "show", "show_format", "summarize"]

#: Name of a JSON interface -> its model.
INTERFACES: dict[str, type[BaseModel]] = {
    "calibrate": CalibrateResult,
    "record": RecordResult,
    "distill": DistillResult,
    "pack": PackResult,
    "eval": EvalResult,
    "bench": BenchResult,
    "data": DataResult,
    "generate": GenerateResult,
    "report": Report,
    "serve": ServeResult,
    "push": PushResult,
    "show": Summary,
    "show plan": PlanSummary,
    "show PACKED": PackedSummary,
    "show RECORDING": RecordingSummary,
    "show PACKED --against": Differences,
    "pack PACKED --compress": CompressResult,
    "pack FOREIGN": ForeignResult,
}


def inspect(
    path: Path, console: Console, verify: bool = False, against: Path | None = None
) -> Summary | PackedSummary | RecordingSummary | Differences:
    """Look at a working directory, at a packed folder or a weight file in it, or at a recording.

    Args:
        path: of one of them.
        console: where progress is shown.
        verify: check every byte of the packed folder or the recording.
        against: another packed folder: tell what differs.

    Raises:
        UserError: it is none of them, or damaged.
    """
    if recording_summary.is_recording(path) and not against:
        return recording_summary.look_into(path, verify)
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
    plan = plan_summary.summarize(work)
    if png is not None:
        heatmap.write_png(plan, png)
    return plan


def schema(flags: Mapping[str, str]) -> str:
    """JSON schemas of the recipe and of what `--json` prints; `flags` names the options of the recipe's fields."""
    results = {name: model.model_json_schema() for name, model in INTERFACES.items()}
    return json.dumps({"recipe": json_schema(flags), **results}, indent=1)


def show(result: Summary | PlanSummary | PackedSummary | RecordingSummary | Differences) -> list[RenderableType]:
    """What was looked at, for people."""
    if isinstance(result, PlanSummary):
        return heatmap.show(result)
    if isinstance(result, PackedSummary):
        return inspection.show(result)
    if isinstance(result, RecordingSummary):
        return recording_summary.show(result)
    if isinstance(result, Differences):
        return differences.show(result)
    return summary.show(result)
