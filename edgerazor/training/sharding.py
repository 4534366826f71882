"""Student and teacher spread over processes: FSDP2 of PyTorch (`fully_shard`), as accelerate's launcher asks for it.

Each process holds a part of every parameter, its gradient and its moments, and gathers one decoder layer at a time to
compute with it. Embedding, final norm and head are gathered for the whole of a step, since the losses compute logits
from the head a chunk of positions at a time. The gradients of a micro-batch are reduced and divided at once.

Rounding needs whole groups of a row, and a layer that is gathered has whole weights, so codes are those of one process.
For an evaluation every process encodes all matrices, too, with one layer gathered at a time.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from edgerazor import devices
from edgerazor.errors import UserError, plain, usage_error
from edgerazor.recipe import Distill
from edgerazor.training import zero3

#: What `accelerate launch` puts into the environment.
USE_FSDP, FSDP_VERSION = devices.USE_FSDP, "FSDP_VERSION"
#: What libraries of communication say of a process that has gone away.
LOST_CONNECTION = ("connection closed by peer", "connection reset", "broken pipe", "nccl", "gloo", "timed out")


def is_wanted() -> bool:
    """Whether a launcher started several processes and asked for FSDP.

    Raises:
        UserError: for its first version, which cannot gather single layers of rounded weights.
    """
    if devices.process_count() == 1 or os.environ.get(USE_FSDP, "false").lower() != "true":
        return False
    if os.environ.get(FSDP_VERSION, "1") != "2":
        raise usage_error("FSDP of version 1 is not supported.", "Set `fsdp_version: 2` in accelerate's configuration.")
    return True


def check(settings: Distill) -> None:
    """Refuse what a sharded training cannot do, by name.

    Raises:
        UserError: which, and what to do.
    """
    if settings.phases or settings.train == "scales" or settings.reconstruct is not None:
        raise usage_error(
            "With FSDP a training has one phase, in which everything is trained.",
            "Leave out `distill.phases`, `distill.train: scales` and `distill.reconstruct`, or do without FSDP.",
        )
    if settings.teacher_source == "streamed":
        raise usage_error(
            "With FSDP a teacher is spread over the processes, so it need not be streamed.",
            "Leave out `distill.teacher_source`.",
        )


def shard(model: nn.Module, layers_path: str, device: torch.device) -> None:
    """Spread a model over all processes, in place; a model on the CPU moves to the device layer by layer.

    Args:
        model: the same one on every process.
        layers_path: of its decoder layers.
        device: to compute on.

    Raises:
        UserError: a parameter is a single number, which cannot be divided.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise UserError(
                f"The parameter {plain(name)} is a single number, which FSDP cannot divide.",
                "Set `calibrate.activation_scales: dynamic`, or train without FSDP.",
            )
    # of the model's own output, which nothing here uses
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (devices.process_count(),))
    for layer in model.get_submodule(layers_path).children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


@contextlib.contextmanager
def gathering(model: nn.Module) -> Iterator[Callable[[nn.Module], AbstractContextManager[None]]]:
    """Gives what gathers the parameters of a part of a model, with the layer that it is in, inside a block; outside of
    this one nothing is gathered any more. Does nothing to a model that is not sharded."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    owners = {id(part): module for module in sharded for part in module.modules()}  # the whole first, then its layers

    @contextlib.contextmanager
    def whole(part: nn.Module) -> Iterator[None]:
        owner = owners.get(id(part))
        if owner is not None:
            owner.unshard()
        try:
            with zero3.gathered(part.parameters()):
                yield
        finally:
            if owner is not None:
                owner.reshard()

    try:
        yield whole
    finally:
        for module in sharded:
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the model over processes."""
    return isinstance(next(model.parameters(), None), DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes have to ask for it."""
    if zero3.is_part(tensor):
        return zero3.whole(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale the gradients of a sharded model so that their norm is at most `most`; returns the norm before."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


@contextlib.contextmanager
def ended_with_others(processes: int) -> Iterator[None]:
    """Say in one sentence that this process could not go on because another one has gone away.

    Raises:
        UserError: instead of what the library of communication raises.
    """
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not any(word in str(error).lower() for word in LOST_CONNECTION):
            raise
        raise UserError(
            "Another process of this training has ended, so this one ends, too.",
            "The same command goes on from the last checkpoint.",
        ) from None
