"""How fast this machine trains, estimated in a second: from the multiplications of a token and a measured product.

Nothing of a model is loaded. The estimate is for a budget that is still to be spent; what a training has measured of
itself replaces it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgerazor import devices, kernels
from edgerazor.job import JobContext
from edgerazor.models import Structure
from edgerazor.recipe import Distill
from edgerazor.training.results import DistillResult

#: Forward passes of student and teacher and a backward pass, which is two forward passes.
PASSES = 4
#: Element-wise passes over the weights in a step: rounding, decoding, their gradients, AdamW; and where the native
#: library rounds with trained scales (a step of SmolLM2-135M: 0.5 s of one core beside 2.4 s for 256 tokens).
WEIGHT_PASSES, NATIVE_WEIGHT_PASSES = 40, 9
#: Element-wise passes over all that enters and leaves a matrix, for a token: rounding, norms, activations, losses.
ACTIVATION_PASSES = 30
#: Calls of PyTorch in a step, for each linear layer: forward, backward, optimizer, of both models.
CALLS = 600
#: About how many forward passes over the calibration text a start takes that calibrate finds with text.
INIT_PASSES = {"clip": 1, "gptq": 6}
#: GPTQ rounds one column after the other: calls of PyTorch for each, and element-wise passes over the weights.
GPTQ_CALLS, GPTQ_WEIGHT_PASSES = 120, 80
#: How much longer a token takes when it is written, a few texts at a time, than when many are read at once.
DECODE_FACTOR = 3.0
#: Rows and columns of the measured product, and elements of the measured rounding: more than a cache holds.
PRODUCT, ELEMENTS = 512, 1 << 24
#: Seconds that each measurement lasts.
MEASURED_SECONDS = 0.1


@dataclass(frozen=True)
class MachineSpeed:
    """What a device does in a second, measured in one.

    Attributes:
        operations: multiplications and additions in products of matrices.
        elements: roundings of one element.
        calls: of a tiny operation.
    """

    operations: float
    elements: float
    calls: float


@dataclass(frozen=True)
class ModelCost:
    """What a token and a step take of a model.

    Attributes:
        multiplied: weights that a token is multiplied with, the head and the chosen experts among them.
        attended: multiplications of a token with keys and values.
        activations: elements that enter and leave the matrices, for a token.
        weights: of all matrices.
        linears: linear layers.
        columns: of the linear layers, added up.
    """

    multiplied: int
    attended: int
    activations: int
    weights: int
    linears: int
    columns: int

    def forward_operations(self) -> int:
        """Multiplications and additions of one token in a forward pass of one model."""
        return 2 * (self.multiplied + self.attended)


def training_dtype(settings: Distill, device: torch.device) -> torch.dtype:
    """Of a training's products: as the recipe says; by default bfloat16 where the device is fast at it."""
    fast = settings.precision == "auto" and devices.fast_bfloat16(device)
    return torch.bfloat16 if settings.precision == "bfloat16" or fast else torch.float32


def weight_passes(learned: bool, device: torch.device) -> int:
    """Element-wise passes over the weights in a step.

    Args:
        learned: scales of weights are trained.
        device: that trains.
    """
    return NATIVE_WEIGHT_PASSES if learned and device.type == "cpu" and kernels.is_native() else WEIGHT_PASSES


def measure_machine(device: torch.device, dtype: torch.dtype) -> MachineSpeed:
    """Measure a product, a rounding and a call, for a third of a second together.

    Args:
        device: that will train.
        dtype: of its products.
    """
    size = PRODUCT if device.type == "cpu" else 8 * PRODUCT
    left, right, product = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))
    many, rounded, one = (torch.ones(count, device=device) for count in (ELEMENTS, ELEMENTS, 8))
    return MachineSpeed(
        operations=2.0 * size**3 / _seconds(lambda: torch.mm(left, right, out=product), device),
        elements=ELEMENTS / _seconds(lambda: torch.round(many, out=rounded), device),
        calls=1 / _seconds(lambda: one + one, device),
    )


def _seconds(operation: Callable[[], object], device: torch.device) -> float:
    """The median time of an operation, so that a moment in which the machine does something else counts for nothing."""

    def timed() -> float:
        began = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed()
    times: list[float] = []
    ends = time.perf_counter() + MEASURED_SECONDS
    while not times or time.perf_counter() < ends:
        times.append(timed())
    return max(statistics.median(times), 1e-9)


def cost_of(structure: Structure, sequence_length: int) -> ModelCost:
    """What a model's tokens take in sequences of this length.

    Args:
        structure: of the model.
        sequence_length: tokens of a sequence.
    """
    head = structure.head or structure.embedding
    matrices = (*structure.linears, head)
    weights = sum(target.weights for target in matrices)
    weights += structure.embedding.weights if structure.head else 0
    return ModelCost(
        multiplied=round(sum(target.token_share * target.weights for target in matrices)),
        attended=2 * sequence_length * structure.embedding.columns * structure.layer_count,
        activations=round(sum(target.token_share * (target.rows + target.columns) for target in matrices)),
        weights=weights,
        linears=len(structure.linears),
        columns=sum(target.columns for target in structure.linears),
    )


def step_seconds(
    cost: ModelCost,
    machine: MachineSpeed,
    step_tokens: int,
    micro_batches: int = 1,
    passes: float = PASSES,
    over_weights: int = WEIGHT_PASSES,
) -> float:
    """Estimated seconds of an optimizer step.

    Args:
        cost: of the model.
        machine: its speed.
        step_tokens: of a step, on one process.
        micro_batches: forward passes of the student in a step.
        passes: what a token takes, in forward passes: student and teachers, two for a backward pass.
        over_weights: element-wise passes over the weights.
    """
    elements = over_weights * cost.weights + ACTIVATION_PASSES * cost.activations * step_tokens
    calls = micro_batches * CALLS * cost.linears / machine.calls
    return passes * _product_seconds(cost, machine, step_tokens) + elements / machine.elements + calls


def forward_seconds(cost: ModelCost, machine: MachineSpeed, tokens: int) -> float:
    """Estimated seconds of forward passes of so many tokens in large batches, without gradients."""
    return _product_seconds(cost, machine, tokens) + 2 * cost.activations * tokens / machine.elements


def init_seconds(init: str, cost: ModelCost, machine: MachineSpeed, tokens: int) -> float:
    """Estimated seconds in which calibrate finds where the student begins.

    Args:
        init: its name in a recipe.
        cost: of the model.
        machine: its speed.
        tokens: of calibration text.
    """
    seconds = forward_seconds(cost, machine, INIT_PASSES.get(init, 0) * tokens)
    if init == "gptq":
        seconds += GPTQ_CALLS * cost.columns / machine.calls + GPTQ_WEIGHT_PASSES * cost.weights / machine.elements
    return seconds


def writing_seconds(cost: ModelCost, machine: MachineSpeed, tokens: int) -> float:
    """Estimated seconds in which a teacher writes so many tokens, a few texts at a time."""
    return DECODE_FACTOR * forward_seconds(cost, machine, tokens)


def _product_seconds(cost: ModelCost, machine: MachineSpeed, tokens: int) -> float:
    return cost.forward_operations() * tokens / machine.operations


@dataclass(frozen=True)
class Speed:
    """The speed of training: one of the two.

    Attributes:
        tokens_per_second: over all processes, as an earlier training here measured it.
        machine: what the device was measured to do with matrices and elements.
    """

    tokens_per_second: float | None = None
    machine: MachineSpeed | None = None

    @property
    def source(self) -> str:
        """In words."""
        if self.machine is None:
            return "measured by the training in the working directory"
        return f"estimated from matrix products at {self.machine.operations / 1e9:,.0f} billion operations a second"


def speed_of(context: JobContext) -> Speed:
    """The speed of training here."""
    manifest = context.work.manifest("distill")
    if manifest is not None:
        try:
            measured = DistillResult.model_validate(manifest.result).tokens_per_second
        except ValueError:  # of another version of this program
            measured = 0.0
        if measured > 0:
            return Speed(tokens_per_second=measured)
    return Speed(machine=measure_machine(context.device, training_dtype(context.recipe.distill, context.device)))
