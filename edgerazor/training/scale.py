"""What a training takes of machines that are not here: memory, traffic and time of each of many processes (FSDP2).

Everything follows from shapes, by the formulas of `memory.py` and `speed.py` and those here. A process holds its part
of weights, gradients, moments and teacher; embedding, final norm and head whole for the time of a step, and two layers
at a time, since the next one is gathered while one computes. It receives all parts that it does not have: of the
student's layers for the forward and for the backward pass, of the rest once, of the teacher once; and its share of the
others' gradients (ring collectives: what each process receives is what it sends).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgerazor import models
from edgerazor.devices import Machines
from edgerazor.models import PreTrainedModel
from edgerazor.recipe import Distill
from edgerazor.training.memory import TrainedShape, step_memory
from edgerazor.training.results import ScaleDryRun
from edgerazor.training.speed import PASSES, MachineSpeed, cost_of, step_seconds

#: Processes of one machine with GPUs, and bytes a second that each receives from others of it, and of other machines.
#: Assumed: a third of what NVLink of an H100 gives in one direction, and half of a 400 Gbit network card.
PER_NODE, WITHIN, ACROSS = 8, 150e9, 25e9
#: The same between processes of a machine without GPUs, through the loopback device. Assumed, too.
LOOPBACK = 1e9
#: An accelerator of the class of an H100, with a third of its products' peak and what its memory gives. Assumed.
ACCELERATOR = MachineSpeed(operations=330e12, elements=4e11, calls=2e5)
#: Bytes that CUDA, its libraries and NCCL take of an accelerator. Assumed.
CONTEXT = 1_500_000_000
#: Bytes that torch.distributed with gloo, and accelerate, take of a process on a CPU (recipes/results/training.md).
JOINED = 110_000_000


@dataclass(frozen=True)
class Parts:
    """Weights of a model by how FSDP2 gathers them: `layers` of all decoder layers, `largest` of one, `rest`."""

    layers: int
    largest: int
    rest: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Parts:
        layers = list(model.get_submodule(models.structure(model).layers_path).children())
        sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
        whole = sum(weight.numel() for weight in model.parameters())
        return cls(sum(sizes), max(sizes), whole - sum(sizes))


def received_bytes(student: Parts, teacher: Parts, processes: int, micro_batches: int, teacher_item: int) -> int:
    """Bytes that each process receives in an optimizer step.

    Args:
        student: its parts, float32.
        teacher: its parts.
        processes: that train together.
        micro_batches: of a step, on each process.
        teacher_item: bytes of a weight of the teacher.
    """
    weights = 4 * (2 * student.layers + student.rest)
    gradients = 4 * (student.layers + student.rest)
    of_teacher = teacher_item * (teacher.layers + teacher.rest)
    return micro_batches * (weights + gradients + of_teacher) * (processes - 1) // processes


def sharded_memory(shape: TrainedShape, settings: Distill, device: torch.device, processes: int) -> dict[str, int]:
    """Bytes of each process at the fullest moment of a step, by what they are for.

    Args:
        shape: of the training.
        settings: the `distill` section.
        device: of the kind that trains.
        processes: that train together.
    """
    alone = step_memory(shape, settings.model_copy(update={"cache_rounding": False}), device)
    parts, item = Parts.of(shape.model), shape.dtype.itemsize
    has_teacher = shape.teacher_bytes > 0
    gathered = 4 * (parts.rest + 2 * parts.largest) + 4 * parts.largest + item * parts.largest
    gathered += item * parts.rest if has_teacher else 0
    return {
        "program": alone.program + JOINED if device.type == "cpu" else CONTEXT,
        "weights": alone.weights // processes,
        "moments": alone.moments // processes,
        "gradients": alone.gradients // processes,
        "teacher": shape.teacher_bytes // processes,
        "gathered": gathered,
        "activations": alone.activations,
        "logits": alone.logits,
    }


def plan_at_scale(
    shape: TrainedShape, settings: Distill, machines: Machines, machine: MachineSpeed | None, notation: str
) -> ScaleDryRun:
    """What a training takes of each of many processes.

    Args:
        shape: of the training.
        settings: the `distill` section.
        machines: how many, and their memory; without it, processes that share this machine.
        machine: the measured speed of this machine, for that case.
        notation: of the student's formats.
    """
    count, on_gpus = machines.world_size, machines.gpu_memory is not None
    device = torch.device("cuda" if on_gpus else "cpu")
    memory = sharded_memory(shape, settings, device, count)
    parts = Parts.of(shape.model)
    teacher = parts if shape.teacher_bytes else Parts(0, 0, 0)
    received = received_bytes(parts, teacher, count, settings.accumulation, shape.dtype.itemsize)
    tokens = settings.batch_size * settings.accumulation * shape.length
    cost = cost_of(models.structure(shape.model), shape.length)
    passes = PASSES + settings.gradient_checkpointing - (not shape.teacher_bytes)
    if on_gpus:
        speed, wire = ACCELERATOR, WITHIN if count <= PER_NODE else ACROSS
    else:
        assert machine is not None
        speed = MachineSpeed(*(value / count for value in (machine.operations, machine.elements, machine.calls)))
        wire = LOOPBACK
    computing = step_seconds(cost, speed, tokens, settings.accumulation, passes)
    receiving = received / wire
    seconds = max(computing, receiving)
    peak = sum(memory.values())
    return ScaleDryRun(
        notation=notation,
        processes=count,
        tokens_per_step=tokens * count,
        memory_bytes=peak,
        gpu_memory_bytes=machines.gpu_memory,
        fits=None if machines.gpu_memory is None else peak <= machines.gpu_memory,
        memory_parts={name: f"{size / 1e9:.2f} GB" for name, size in memory.items()},
        received_bytes=received,
        seconds_computing=float(f"{computing:.3g}"),
        seconds_receiving=float(f"{receiving:.3g}"),
        seconds_per_step=float(f"{seconds:.3g}"),
        tokens_per_second=float(f"{tokens * count / seconds:.3g}"),
        speed=("assumed: " if on_gpus else "measured products and assumed traffic: ")
        + f"{speed.operations / 1e9:,.0f} billion operations and {wire / 1e9:g} GB received a second and process, "
        "both at the same time",
    )
