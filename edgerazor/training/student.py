"""The student: the model in training, with fake-quantized weights, and what the losses read of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgerazor import models, modules
from edgerazor.allocate import Plan
from edgerazor.losses import Head, Outputs
from edgerazor.models import PreTrainedModel, Structure
from edgerazor.recipe import Distill
from edgerazor.training import sharding, zero3
from edgerazor.training.captured_states import Captures, capture

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Student:
    """The model in training.

    Attributes:
        model: with training modules in the places of linear layers, embedding and head.
        structure: where its layers are.
        logit_shape: factor and cap of its logits (see `models.logit_shape`).
        accelerator: knows the other processes and the precision of products.
        by_fsdp: whether it is spread over the processes (`sharding.py`).
        by_deepspeed: likewise (`zero3.py`), from when the training has an optimizer.
        wrapped: the model as accelerate wraps it where several processes have it whole, else the model itself.
        engine: of DeepSpeed.
    """

    model: PreTrainedModel
    structure: Structure
    logit_shape: tuple[float, float | None]
    accelerator: Accelerator
    by_fsdp: bool = False
    by_deepspeed: bool = False
    wrapped: nn.Module = field(init=False)
    engine: zero3.Engine | None = field(init=False, default=None)

    @property
    def sharded(self) -> bool:
        """Whether no process has it whole."""
        return self.by_fsdp or self.by_deepspeed

    def __post_init__(self) -> None:
        if self.by_fsdp:
            sharding.shard(self.model, self.structure.layers_path, self.accelerator.device)
        self.wrapped = self.model if self.sharded else self.accelerator.prepare_model(self.model)

    def start_engine(self, optimizer: torch.optim.Optimizer, settings: Distill) -> None:
        """Let DeepSpeed spread the model, where it is to."""
        if self.by_deepspeed:
            head = self.model.get_submodule(self.structure.head_path)
            self.engine = zero3.Engine(self.model, head, optimizer, settings)
            self.wrapped = self.engine.engine

    def rewrap(self) -> None:
        """Wrap the model again after other parameters have become trainable: a wrapper keeps those of its beginning."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.wrapped = self.accelerator.prepare_model(self.model)

    def outputs(self, input_ids: Tensor, needed: Captures, wrapped: bool = True) -> Outputs:
        """What the losses read, with gradients: last hidden state, head, captured states.

        Args:
            input_ids: `[B, T]` int64.
            needed: the states to capture.
            wrapped: compute with `wrapped`, which averages the gradients of all processes, and not with `model`.
        """
        module = self.wrapped if wrapped else self.model
        head_path = self.structure.head_path
        capturing = capture(self.model, self.structure, head_path, needed)
        with capturing as captured, self.accelerator.autocast():
            module(input_ids=input_ids, use_cache=False)
            if self.engine is not None:
                self.engine.hold_head()
            head = self.model.get_submodule(head_path)
            assert isinstance(head, modules.FakeQuantLinear)
            states, matrix = head.as_head(captured.last_hidden_state)
        scale, cap = self.logit_shape
        return Outputs(
            states, captured.hidden_states, Head(scale=scale, cap=cap, **matrix), captured.attention, captured.routing
        )


def make_student(
    model: PreTrainedModel,
    structure: Structure,
    plan: Plan,
    computing: modules.Settings,
    settings: Distill,
    input_scales: dict[str, float] | None,
    initial: Callable[[str], modules.InitialWeight] | None = None,
) -> PreTrainedModel:
    """Put training modules into a float32 model, in place, and return it in training mode.

    Args:
        model: a copy of the teacher, or a randomly initialised one.
        structure: where the matrices are.
        plan: the format of each matrix.
        computing: how the student computes.
        settings: the `distill` section.
        input_scales: calibrated scales of the inputs of linear layers; None where they are computed in each pass.
        initial: module path -> initial weight and scales of its matrix; None for the model's weights and the scales
            that follow from them.
    """
    if settings.gradient_checkpointing:
        models.checkpoint_activations(model)
    scales_only = settings.train == "scales"
    modules.prepare_for_training(model, structure, plan.specs(), computing, scales_only, input_scales, initial)
    model.config.use_cache = False
    return model.train()
