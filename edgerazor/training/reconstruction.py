"""Block-by-block reconstruction, before the training of the whole student.

Each decoder layer in turn, from the first to the last, is trained to give what the teacher's layer gives, at a fraction
of what a step of the whole model costs: `min |block_S(x_S) - block_T(x_T)|² / |block_T(x_T)|²`. Here `x_T` is the input
of the layer in the teacher and `x_S` its input in the student, whose earlier layers are already reconstructed, so that
a layer also compensates the errors of those before it. All parameters of the layer are trained. The hidden states of a
sample of sequences are kept in memory and advanced from layer to layer.

Sources: BRECQ (arXiv 2102.05426) and Block-AP, the first phase of EfficientQAT (arXiv 2407.11062).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgerazor import data, modules
from edgerazor.errors import usage_error
from edgerazor.models import Blocks, PreTrainedModel, Structure
from edgerazor.recipe import Distill, Recipe
from edgerazor.training.optimizer import cosine_decay, make_optimizer, set_learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class BlockTargets:
    """What one layer is trained on: a micro-batch of sequences, on the CPU.

    Attributes:
        student_states: `[B, T, H]`, the input of the student's layer.
        teacher_states: `[B, T, H]`, the output of the teacher's layer, which the student's layer should give.
        mask: bool `[B, T]`, the positions that count.
        input_ids: int64 `[B, T]`.
    """

    student_states: Tensor
    teacher_states: Tensor
    mask: Tensor
    input_ids: Tensor

    def squared_error(self, output: Tensor) -> Tensor:
        """Squared error of the student's output `[B, T, H]`, summed over positions that count, float32 []."""
        mask = self.mask.to(output.device)
        target = self.teacher_states.to(output.device)[mask].float()
        return (output[mask].float() - target).square().sum()

    @property
    def squared_norm(self) -> float:
        """Squared norm of the teacher's output, summed over positions that count."""
        return float(self.teacher_states[self.mask].float().square().sum())


def check(recipe: Recipe) -> None:
    """Refuse what cannot be reconstructed.

    Raises:
        UserError: activations whose bits depend on another layer's attention.
    """
    if recipe.distill.reconstruct and recipe.calibrate.adaptive_tokens != "off":
        raise usage_error(
            "Layers cannot be reconstructed one by one while the bits of their activations depend on the attention of "
            "the layer before.",
            "Leave out `distill.reconstruct`, or set `calibrate.adaptive_tokens: off`.",
        )


def reconstruct(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    structure: Structure,
    rows: data.TokenRows,
    settings: Distill,
    accelerator: Accelerator,
    layers_done: int,
    interrupted: Callable[[], bool],
) -> Iterator[tuple[float, float] | None]:
    """Train layer after layer, in place.

    Args:
        student: with training modules.
        teacher: the same layers in 16 or 32 bits.
        structure: of both.
        rows: the text.
        settings: `reconstruct` among them.
        accelerator: each process takes its share of the text, and gradients are summed over processes.
        layers_done: layers that are already reconstructed.
        interrupted: whether to stop, called before each step.

    Returns:
        iterator over the layers to be reconstructed: relative squared error before and after; None, and no more, when
        interrupted.
    """
    student_blocks, teacher_blocks = Blocks(student, structure), Blocks(teacher, structure)
    steps = make_block_targets(student_blocks, teacher_blocks, rows, settings, accelerator)
    targets = [micro_batch for step in steps for micro_batch in step]
    for index in range(structure.layer_count):
        advance(teacher_blocks, index, targets, "teacher_states", accelerator)
        if index >= layers_done:
            before = relative_error(student_blocks, index, targets, accelerator)
            if not train_block(student_blocks, index, steps, settings, accelerator, interrupted):
                yield None
                return
            yield before, relative_error(student_blocks, index, targets, accelerator)
        advance(student_blocks, index, targets, "student_states", accelerator)


def make_block_targets(
    student: Blocks, teacher: Blocks, rows: data.TokenRows, settings: Distill, accelerator: Accelerator
) -> list[list[BlockTargets]]:
    """The inputs of both first layers: the micro-batches of this process, step by step.

    A step has as many sequences as one of the whole training, however they are divided among processes and
    micro-batches; the last one may have fewer.
    """
    assert settings.reconstruct is not None
    processes = accelerator.num_processes
    micro_batches = settings.accumulation * processes  # of a step
    steps: list[list[BlockTargets]] = []
    for number, batch in enumerate(data.sample_batches(rows, settings.reconstruct.sequences, settings.batch_size)):
        if number % micro_batches == 0:
            steps.append([])
        if number % processes == accelerator.process_index:
            input_ids = batch["input_ids"].to(accelerator.device)
            with accelerator.autocast():
                student_states = student.inputs(input_ids).cpu()
            teacher_states = teacher.inputs(input_ids).cpu()
            mask = batch["labels"] != data.MASKED
            steps[-1].append(BlockTargets(student_states, teacher_states, mask, batch["input_ids"]))
    return steps


@torch.no_grad()
def advance(blocks: Blocks, index: int, targets: Sequence[BlockTargets], states: str, accelerator: Accelerator) -> None:
    """Replace the inputs of a layer by its outputs, in the attribute `states` of all micro-batches."""
    with modules.encoded_once(blocks.layers[index]), accelerator.autocast():
        for micro_batch in targets:
            inputs = getattr(micro_batch, states).to(accelerator.device)
            setattr(micro_batch, states, blocks.forward_layer(index, inputs, micro_batch.input_ids).cpu())


@torch.no_grad()
def relative_error(blocks: Blocks, index: int, targets: Sequence[BlockTargets], accelerator: Accelerator) -> float:
    """Squared error of the student's layer relative to the squared norm of the teacher's output, over all processes."""
    error = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    with modules.encoded_once(blocks.layers[index]), accelerator.autocast():
        for micro_batch in targets:
            error += micro_batch.squared_error(_output(blocks, index, micro_batch, accelerator))
    return float(accelerator.reduce(error, "sum")) / total_squared_norm(targets, accelerator)


def total_squared_norm(targets: Sequence[BlockTargets], accelerator: Accelerator) -> float:
    """Squared norm of the teacher's output, over all micro-batches and processes; never 0."""
    norm = sum(micro_batch.squared_norm for micro_batch in targets)
    total = torch.tensor(norm, dtype=torch.float64, device=accelerator.device)
    return max(float(accelerator.reduce(total, "sum")), 1e-30)


def train_block(
    blocks: Blocks,
    index: int,
    steps: Sequence[Sequence[BlockTargets]],
    settings: Distill,
    accelerator: Accelerator,
    interrupted: Callable[[], bool],
) -> bool:
    """Train one layer, at a learning rate that falls to zero along a cosine.

    Returns:
        whether all steps were taken; False when interrupted.
    """
    reconstruction = settings.reconstruct
    assert reconstruction is not None
    layer = blocks.layers[index]
    optimizer = make_optimizer(layer, settings)
    peak = settings.learning_rate if reconstruction.learning_rate is None else reconstruction.learning_rate
    squared_norms = [total_squared_norm(targets, accelerator) for targets in steps]
    for step in range(reconstruction.steps):
        if interrupted():
            return False
        set_learning_rate(optimizer, peak * cosine_decay(step / reconstruction.steps))
        for micro_batch in steps[step % len(steps)]:
            with accelerator.autocast():
                error = micro_batch.squared_error(_output(blocks, index, micro_batch, accelerator))
            (error / squared_norms[step % len(steps)]).backward()
        all_reduce_gradients(layer, accelerator)
        nn.utils.clip_grad_norm_(layer.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return True


def _output(blocks: Blocks, index: int, micro_batch: BlockTargets, accelerator: Accelerator) -> Tensor:
    """The output of the student's layer, `[B, T, H]`."""
    states = micro_batch.student_states.to(accelerator.device)
    return blocks.forward_layer(index, states, micro_batch.input_ids)


def all_reduce_gradients(layer: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the sum of all processes' gradients; a process without text of its own adds zeros."""
    if accelerator.num_processes > 1:
        for parameter in layer.parameters():
            if parameter.requires_grad:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = accelerator.reduce(own, "sum")
