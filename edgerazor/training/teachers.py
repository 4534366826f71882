"""The teachers that the student is compared with, from wherever their outputs come.

`TeacherSource` is all that a training knows of them. Resident teachers are here: the model itself, in memory, and
further ones whose next tokens are averaged with its own. Recorded ones are in `recorded_teacher.py`, those that are
read from disk layer by layer in `streamed_teacher.py`, those of a server in `served_teacher.py`. `teacher_sources.py`
opens the one that a recipe asks for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgerazor import data, models
from edgerazor.console import Console
from edgerazor.losses import Head, Outputs
from edgerazor.models import PreTrainedModel, Structure
from edgerazor.training.captured_states import Captures, capture
from edgerazor.training.objective import Terms, averages_teachers


class TeacherSource(ABC):
    """Where the outputs of the teachers come from, a micro-batch at a time; false where there are none."""

    def __bool__(self) -> bool:
        return True

    @abstractmethod
    def outputs(self, batch: data.Batch, needed: Captures, held_out: bool = False) -> Outputs | None:
        """Captured states of the first teacher, next-token distributions of all; None without teachers.

        Args:
            batch: `input_ids` and `labels`, `[B, T]` int64.
            needed: the states of the first teacher that losses need.
            held_out: whether the batch is held-out text.

        Raises:
            UserError: the source does not have them.
        """

    def outputs_of(
        self, batches: Sequence[data.Batch], needed: Captures, held_out: bool = False
    ) -> Iterator[Outputs | None]:
        """The same for several batches, one after the other; a source may compute them all at once.

        Raises:
            UserError: as `outputs`.
        """
        for batch in batches:
            yield self.outputs(batch, needed, held_out)

    @abstractmethod
    def hidden_states(self, batches: Sequence[data.Batch], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Hidden states of the first teacher for training batches, layer -> `[B, T, H]` of each (see `Outputs`)."""


@dataclass(frozen=True)
class Teacher:
    """One model to compare with.

    Attributes:
        model: in evaluation mode, without gradients.
        structure: where its layers are; None for a further teacher, of which only next tokens are used.
        head_path: module path of its head.
        logit_shape: factor and cap of its logits (see `models.logit_shape`).
    """

    model: PreTrainedModel
    structure: Structure | None
    head_path: str
    logit_shape: tuple[float, float | None]

    @torch.no_grad()
    def outputs(self, input_ids: Tensor, needed: Captures) -> Outputs:
        """What the losses compare with, for token ids `[B, T]` int64: last hidden state, head, captured states."""
        with capture(self.model, self.structure, self.head_path, needed) as captured:
            self.model(input_ids=input_ids, use_cache=False)
        head = self.model.get_submodule(self.head_path)
        scale, cap = self.logit_shape
        return Outputs(
            captured.last_hidden_state,
            captured.hidden_states,
            Head(head.weight, head.bias, scale, cap),
            captured.attention,
            captured.routing,
            pictures=models.picture_mask(input_ids) if models.has_pictures(input_ids) else None,
        )


@dataclass(frozen=True)
class TeacherEnsemble(TeacherSource):
    """All teachers of a training, resident; false in a condition where there are none.

    Attributes:
        teachers: the recipe's model and further ones; empty where nothing needs a teacher.
        averaging: what is averaged over several teachers, "probabilities" or "logits" (see `Outputs`).
    """

    teachers: tuple[Teacher, ...]
    averaging: str = "probabilities"

    def __bool__(self) -> bool:
        return bool(self.teachers)

    def __iter__(self) -> Iterator[Teacher]:
        return iter(self.teachers)

    @property
    def first(self) -> Teacher:
        """The recipe's model, whose hidden states and attention are compared."""
        return self.teachers[0]

    def outputs(self, batch: data.Batch, needed: Captures, held_out: bool = False) -> Outputs | None:
        """See `TeacherSource`."""
        if not self.teachers:
            return None
        input_ids = batch["input_ids"]
        outputs = self.first.outputs(input_ids, needed)
        outputs.others = tuple(teacher.outputs(input_ids, Captures()) for teacher in self.teachers[1:])
        outputs.averaging = self.averaging
        return outputs

    def hidden_states(self, batches: Sequence[data.Batch], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """See `TeacherSource`."""
        needed = Captures(hidden_layers=tuple(layers))
        for batch in batches:
            yield self.first.outputs(batch["input_ids"], needed).hidden_states


def load_further_teachers(
    sources: Sequence[str], trust_remote_code: bool, device: torch.device, dtype: torch.dtype
) -> list[Teacher]:
    """Further teachers on a device in a dtype, in evaluation mode, their weights without gradients.

    Raises:
        UserError: one cannot be loaded, or its logits are not understood.
    """
    teachers = []
    for source in sources:
        model, _ = models.load(source, None, str(device), dtype, trust_remote_code)
        head_path = models.find_head(model)
        teachers.append(Teacher(model.requires_grad_(False), None, head_path, models.logit_shape(model, head_path)))
    return teachers


def report_teachers(
    model: str, sources: Sequence[str], ensemble: TeacherEnsemble, terms: Terms, console: Console
) -> None:
    """With several resident teachers, say which losses use only the first one, and where their vocabularies are padded.

    Args:
        model: the recipe's model, the first teacher.
        sources: of the further teachers.
        ensemble: all of them, loaded.
        terms: the objective.
        console: where it is said.
    """
    sizes = [int(teacher.model.get_submodule(teacher.head_path).weight.shape[0]) for teacher in ensemble]
    for source, size in zip(sources, sizes[1:], strict=False):
        if size != sizes[0]:
            console.say(
                f"The heads of {model} and {source} have {sizes[0]:,} and {size:,} entries; what only one of "
                "them has is padding, which no loss compares."
            )
    first_only = [term.name for term, loss in terms if loss.needs_teacher and not averages_teachers(loss)]
    if sources and first_only:
        console.say(f"Compared with {model} alone: {', '.join(first_only)}; with the mean of all teachers: the others.")
