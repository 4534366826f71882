"""The student: the model in training, with fake-quantized weights, and what the losses read of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edgerazor import models, modules
from edgerazor.allocate import Plan
from edgerazor.losses import Head, Outputs
from edgerazor.models import PreTrainedModel, Structure
from edgerazor.recipe import Recipe
from edgerazor.training.captured_states import Captures, capture


@dataclass
class Student:
    """The model in training.

    Attributes:
        model: with training modules in the places of linear layers, embedding and head.
        structure: where its layers are.
        logit_shape: factor and cap of its logits (see `models.logit_shape`).
        accelerator: knows the other processes and the precision of products.
        wrapped: the model as accelerate wraps it where there are several processes, else the model itself.
    """

    model: PreTrainedModel
    structure: Structure
    logit_shape: tuple[float, float | None]
    accelerator: Accelerator
    wrapped: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.wrapped = self.accelerator.prepare_model(self.model)

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
            head = self.model.get_submodule(head_path)
            assert isinstance(head, modules.FakeQuantLinear)
            states, matrix = head.as_head(captured.last_hidden_state)
        scale, cap = self.logit_shape
        return Outputs(states, captured.hidden_states, Head(scale=scale, cap=cap, **matrix), captured.attention)


def make_student(
    recipe: Recipe,
    structure: Structure,
    plan: Plan,
    settings: modules.Settings,
    input_scales: dict[str, float] | None,
    device: torch.device,
    start: Callable[[str], modules.Start] | None = None,
) -> PreTrainedModel:
    """A float32 copy of the teacher, or a randomly initialised one for the control, with training modules in it.

    Args:
        recipe: names the model and says how the student is initialised and what is trained.
        structure: where the matrices are.
        plan: the format of each.
        settings: how the student computes.
        input_scales: calibrated scales of the inputs of linear layers; None where they are computed in each pass.
        device: where the student is trained.
        start: module path -> initial weight and scales of its matrix; None for the teacher's weights and the scales
            that follow from them.
    """
    if recipe.distill.initialise == "teacher":
        student, _ = models.load(recipe.model, recipe.revision, "cpu", torch.float32, recipe.trust_remote_code)
    else:
        student = models.initialise(recipe.model, recipe.revision, recipe.seed, recipe.trust_remote_code)
    if recipe.distill.gradient_checkpointing:
        models.checkpoint_activations(student)
    scales_only = recipe.distill.train == "scales"
    modules.prepare_for_training(student, structure, plan.specs(), settings, scales_only, input_scales, start)
    student.config.use_cache = False
    return student.to(device).train()
