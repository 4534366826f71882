"""Block-by-block reconstruction, before the training of the whole student.

Each decoder layer in turn, the first one first, learns to give what the teacher's gives, at a fraction of what a step
of the whole model costs: `min |block_S(x_S) - block_T(x_T)|² / |block_T(x_T)|²`, where `x_T` is what enters the layer
in the teacher and `x_S` what enters it in the student whose earlier layers are done, so that a layer also mends what
those before it have lost. All parameters of the layer are trained. The inputs of some sequences are kept in memory and
move on from layer to layer.

Sources: BRECQ (arXiv 2102.05426) and Block-AP, the first phase of EfficientQAT (arXiv 2407.11062).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edgerazor import data, modules
from edgerazor.errors import usage_error
from edgerazor.models import Blocks, PreTrainedModel, Structure
from edgerazor.recipe import Distill, Recipe
from edgerazor.training.optimizer import falling, make_optimizer, set_rate


@dataclass
class BlockTargets:
    """What one layer learns from: some sequences.

    Attributes:
        entering: what enters the student's layer, [B, T, H], on the CPU.
        wanted: what leaves the teacher's, the same.
        counts: bool [B, T], the positions that count.
    """

    entering: Tensor
    wanted: Tensor
    counts: Tensor

    def error(self, made: Tensor) -> Tensor:
        """Squared error, summed over positions that count, float32 []."""
        counts = self.counts.to(made.device)
        wanted = self.wanted.to(made.device)[counts].float()
        return (made[counts].float() - wanted).square().sum()

    @property
    def length(self) -> float:
        """Squared length of what is wanted, summed likewise."""
        return float(self.wanted[self.counts].float().square().sum())


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
    done: int,
    stop: Callable[[], bool],
) -> Iterator[tuple[float, float] | None]:
    """Train layer after layer, in place.

    Args:
        student: with training modules.
        teacher: the same layers in 16 or 32 bits.
        structure: of both.
        rows: the text.
        settings: `reconstruct` among them.
        accelerator: each process takes its share of the text, and gradients are averaged.
        done: layers that are finished.
        stop: whether to stop, asked before each step.

    Returns:
        iterator over the layers to be done: relative squared error before and after; None, and no more, when stopped.
    """
    ours, theirs = Blocks(student, structure), Blocks(teacher, structure)
    steps = begin(ours, theirs, rows, settings, accelerator)
    lessons = [lesson for step in steps for lesson in step]
    for index in range(structure.layer_count):
        move_on(theirs, index, lessons, "wanted", accelerator)
        if index >= done:
            before = relative_error(ours, index, lessons, accelerator)
            if not train(ours, index, steps, settings, accelerator, stop):
                yield None
                return
            yield before, relative_error(ours, index, lessons, accelerator)
        move_on(ours, index, lessons, "entering", accelerator)


def begin(
    ours: Blocks, theirs: Blocks, rows: data.TokenRows, settings: Distill, accelerator: Accelerator
) -> list[list[BlockTargets]]:
    """What enters the first layers: the micro-batches of this process, step by step.

    A step has as many sequences as one of the whole training, however they are shared out; the last one may have fewer.
    """
    assert settings.reconstruct is not None
    processes = accelerator.num_processes
    each = settings.accumulation * processes  # micro-batches of a step
    steps: list[list[BlockTargets]] = []
    for number, batch in enumerate(data.sample_batches(rows, settings.reconstruct.sequences, settings.batch_size)):
        if number % each == 0:
            steps.append([])
        if number % processes == accelerator.process_index:
            ids = batch["input_ids"].to(accelerator.device)
            with accelerator.autocast():
                entering = ours.inputs(ids).cpu()
            steps[-1].append(BlockTargets(entering, theirs.inputs(ids).cpu(), batch["labels"] != data.MASKED))
    return steps


@torch.no_grad()
def move_on(blocks: Blocks, index: int, lessons: Sequence[BlockTargets], which: str, accelerator: Accelerator) -> None:
    """Replace what enters a layer by what leaves it."""
    with modules.encoded_once(blocks.layers[index]), accelerator.autocast():
        for lesson in lessons:
            states = getattr(lesson, which).to(accelerator.device)
            setattr(lesson, which, blocks.forward_layer(index, states).cpu())


@torch.no_grad()
def relative_error(blocks: Blocks, index: int, lessons: Sequence[BlockTargets], accelerator: Accelerator) -> float:
    """Squared error of what leaves the student's layer, as a share of what is wanted, over all processes."""
    wrong = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    with modules.encoded_once(blocks.layers[index]), accelerator.autocast():
        for lesson in lessons:
            wrong += lesson.error(blocks.forward_layer(index, lesson.entering.to(accelerator.device)))
    return float(accelerator.reduce(wrong, "sum")) / total(lessons, accelerator)


def total(lessons: Sequence[BlockTargets], accelerator: Accelerator) -> float:
    """Squared length of what is wanted, over all processes."""
    length = torch.tensor(sum(lesson.length for lesson in lessons), dtype=torch.float64, device=accelerator.device)
    return max(float(accelerator.reduce(length, "sum")), 1e-30)


def train(
    blocks: Blocks,
    index: int,
    steps: Sequence[Sequence[BlockTargets]],
    settings: Distill,
    accelerator: Accelerator,
    stop: Callable[[], bool],
) -> bool:
    """Some steps of one layer, at a learning rate that falls to zero; False when stopped."""
    asked = settings.reconstruct
    assert asked is not None
    layer = blocks.layers[index]
    optimizer = make_optimizer(layer, settings)
    peak = settings.learning_rate if asked.learning_rate is None else asked.learning_rate
    wholes = [total(lessons, accelerator) for lessons in steps]
    for step in range(asked.steps):
        if stop():
            return False
        set_rate(optimizer, peak * falling(step / asked.steps))
        for lesson in steps[step % len(steps)]:
            with accelerator.autocast():
                wrong = lesson.error(blocks.forward_layer(index, lesson.entering.to(accelerator.device)))
            (wrong / wholes[step % len(steps)]).backward()
        add_gradients(layer, accelerator)
        nn.utils.clip_grad_norm_(layer.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return True


def add_gradients(layer: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the sum of all processes' gradients; one without text of its own has none to add."""
    if accelerator.num_processes > 1:
        for parameter in layer.parameters():
            if parameter.requires_grad:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = accelerator.reduce(own, "sum")
