"""What a training reports: its result, the estimate of a dry run, and how both are shown."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from rich.console import RenderableType

from edgerazor.console import table


class PhaseResult(BaseModel):
    """What one phase reached.

    Attributes:
        phase: its number among the recipe's, from 1; 0 for what comes before them.
        what: `initialise`, `reconstruct`, `scales` or `all`.
        steps: optimizer steps; of `reconstruct`, those of all layers.
        seconds: of training and evaluation.
        held_out: held-out loss at its end, in the training's measure.
    """

    phase: int
    what: str
    steps: int
    seconds: float
    held_out: float


class PhaseEstimate(BaseModel):
    """What a phase would take; None where only the clock limits it."""

    steps: int | None
    seconds: float | None


class DistillResult(BaseModel):
    """What distill reached.

    `stopped` says why it ended: the budget was used up, or the target of quality reached. `chosen` is what the budget
    chose of the settings that nobody had set, by section and field. `passes` says how often the source that was
    repeated most was read; null of a stream.
    """

    notation: str
    steps: int
    tokens: int
    seconds: float
    loss: float
    best: float
    best_step: int
    measure: str
    tokens_per_second: float
    block_errors: list[tuple[float, float]] = []
    phases: list[PhaseResult] = []
    stopped: Literal["budget", "target"] = "budget"
    chosen: dict[str, dict[str, Any]] = {}
    passes: float | None = None


class DistillDryRun(BaseModel):
    """What distill would do; `speed` says whether its times are estimated or from an earlier training."""

    notation: str
    steps: int | None
    tokens_per_step: int
    memory_bytes: int
    disk_bytes: int
    result_bytes: int
    seconds_per_step: float
    seconds: float | None
    tokens_per_second: float
    speed: str
    phases: dict[str, PhaseEstimate] = {}
    chosen: dict[str, dict[str, Any]] = {}


class ScaleDryRun(BaseModel):
    """What distill would take of each of many processes, student and teacher spread over them; `memory_bytes` and
    `received_bytes` are those of one process, `received_bytes` of a step. `fits` is null where no memory was named."""

    notation: str
    processes: int
    tokens_per_step: int
    memory_bytes: int
    gpu_memory_bytes: int | None
    fits: bool | None
    memory_parts: dict[str, str]
    received_bytes: int
    seconds_computing: float
    seconds_receiving: float
    seconds_per_step: float
    tokens_per_second: float
    speed: str


def result_tables(result: DistillResult) -> list[RenderableType]:
    """The training as tables for a terminal; its phases first, where it has any."""
    tables: list[RenderableType] = [_summary(result)]
    if result.phases:
        names = [f"{phase.phase} {phase.what}" if phase.phase else phase.what for phase in result.phases]
        rows = [
            [name, str(phase.steps), f"{phase.seconds:.0f}", f"{phase.held_out:.4f}"]
            for name, phase in zip(names, result.phases, strict=True)
        ]
        tables.insert(0, table("Phases", ["phase", "steps", "seconds", f"{result.measure}, at its end"], rows))
    return tables


def _summary(result: DistillResult) -> RenderableType:
    errors = [f"{before:.3f} to {after:.3f}" for before, after in result.block_errors]
    return table(
        f"Student {result.notation}" + (", target reached" if result.stopped == "target" else ""),
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
        caption=f"Layers were reconstructed first, relative error from {', '.join(errors)}" if errors else "",
    )
