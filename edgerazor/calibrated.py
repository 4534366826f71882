"""What calibrate left in the working directory for the stages behind it: the plan and the statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from edgerazor import untrusted
from edgerazor.allocate import Plan
from edgerazor.errors import UserError
from edgerazor.losses import METRICS
from edgerazor.modules import InitialWeight
from edgerazor.workdir import WorkDir

#: Ends of tensors' names in the file of an initialization.
WEIGHT, SCALES = ".weight", ".scales"


def read_plan(work: WorkDir) -> Plan:
    """What calibrate decided.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return untrusted.load_model(work.plan_file, Plan)
    except (OSError, ValueError):
        raise unusable(work.plan_file) from None


def read_vector(work: WorkDir, name: str) -> list[float]:
    """A vector of the statistics, by its name in `stats.safetensors`.

    Raises:
        UserError: the file is missing or damaged, or has no such vector.
    """
    try:
        return [float(value) for value in load_file(work.statistics_file)[name]]
    except (OSError, SafetensorError, KeyError):
        raise unusable(work.statistics_file) from None


def read_layer_metrics(work: WorkDir) -> dict[str, list[float]]:
    """What was measured of each decoder layer (see `losses.METRICS`), by metric.

    Raises:
        UserError: the file is missing or damaged.
    """
    return {metric: read_vector(work, f"layer_{metric}") for metric in METRICS}


def read_input_scales(
    work: WorkDir, names: Iterable[str], activation_bits: int, rotation: str | None
) -> dict[str, float]:
    """The stored scales of inputs, by their names in `stats.safetensors`.

    Raises:
        UserError: the file is missing or damaged, or its scales are for other bits, or for inputs rotated otherwise.
    """
    plan = read_plan(work)
    if plan.rotation != rotation:
        raise UserError(
            f"The scales in {work.statistics_file} are not for inputs with the rotation {rotation or 'none'}.",
            "Run `edgerazor calibrate` first.",
        )
    if plan.activation_bits != activation_bits:
        raise UserError(
            f"The scales in {work.statistics_file} are not for {activation_bits}-bit activations.",
            "Run `edgerazor calibrate` first.",
        )
    try:
        stored = load_file(work.statistics_file)
        return {name: float(stored[name]) for name in names}
    except (OSError, SafetensorError, KeyError):
        raise unusable(work.statistics_file) from None


def read_initialization(work: WorkDir, init: str, plan: Plan) -> Callable[[str], InitialWeight] | None:
    """What calibrate made for the matrices to begin with.

    Args:
        work: the working directory.
        init: the name of the initialization.
        plan: that training or rounding follows.

    Returns:
        module path -> where its matrix begins; None where calibrate made another initialization.

    Raises:
        UserError: the file is damaged.
    """
    try:
        file = safe_open(work.start_file, framework="pt").__enter__()
        names = set(file.keys())
        stored = (file.metadata() or {}).get("start")
    except (OSError, SafetensorError):
        raise unusable(work.start_file) from None
    if stored != init:
        return None
    if not names >= {matrix.name + SCALES for matrix in plan.matrices}:
        raise unusable(work.start_file)

    def of(name: str) -> InitialWeight:
        weight = file.get_tensor(name + WEIGHT) if name + WEIGHT in names else None
        return InitialWeight(weight, file.get_tensor(name + SCALES))

    return of


def unusable(path: Path) -> UserError:
    """What to say of a file of calibrate that is missing or damaged."""
    return UserError(f"{path} is missing or damaged.", "Make it again with `edgerazor calibrate --force`.")
