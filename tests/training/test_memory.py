"""What a training's memory is said to be, beside what autograd really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgerazor import recipe as recipes
from edgerazor import training
from edgerazor.console import Console
from edgerazor.job import JobContext
from edgerazor.training.memory import TrainedShape, saved_bytes, step_memory
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, write_recipe


def kept(trainer: training.Trainer, length: int) -> int:
    """Bytes that autograd keeps of one sequence, without parameters."""
    model, storages = trainer.student.model, {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def save(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        states = model.get_decoder()(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in storages.items() if place not in own)
    del states
    return total


@pytest.mark.parametrize("fields", [{}, {"rotation": "hadamard", "group_size": 32}, {"scales": "learned"}])
def test_activations_are_counted_without_a_weight(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    recipe_file = write_recipe(
        tmp_path / "r.yaml", llama, text_file, calibrate=fields, distill={"precision": "float32"}
    )
    assert run("calibrate", "--recipe", recipe_file, "--work", tmp_path / "job").code == 0
    recipe = recipes.build(recipes.load(recipe_file))
    context = JobContext(recipe, WorkDir(tmp_path / "job"), Console(quiet=True))
    trainer, plan = training.prepare(context, {})
    outline = context.planning_teacher()
    weights = sum(weight.numel() for weight in outline.model.parameters())
    shape = TrainedShape(
        model=outline.model,
        specs=plan.specs(),
        computing=context.student_settings(plan, outline.structure),
        dtype=torch.float32,
        length=48,
        weights=weights,
        trained=weights,
        teacher_bytes=4 * weights,
    )
    counted = saved_bytes(shape, checkpointed=False)
    assert counted == pytest.approx(kept(trainer, 48), rel=0.25)  # the attention that is chosen for shapes may differ
    assert saved_bytes(shape, checkpointed=True) < counted
    whole = step_memory(shape, recipe.distill, torch.device("cpu"))
    assert whole.peak > 16 * weights + counted
    assert step_memory(shape, recipe.distill, torch.device("cuda")).program == 0
