"""A teacher larger than memory: its layers are read from disk in every step, once for all micro-batches of it.

What it computes is what a resident teacher does, so every loss is exact. A step takes longer by the time of reading the
teacher, whatever the step has of tokens: with `accumulation` more tokens share a reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from edgerazor import data
from edgerazor.losses import Outputs
from edgerazor.models import StreamedModel
from edgerazor.training.captured_states import Captures
from edgerazor.training.teachers import TeacherSource


@dataclass(frozen=True)
class StreamedTeacher(TeacherSource):
    """Teachers that stay on disk.

    Attributes:
        models: the first teacher and further ones, whose next tokens are averaged with its own.
        averaging: what is averaged, "probabilities" or "logits" (see `Outputs`).
    """

    models: tuple[StreamedModel, ...]
    averaging: str = "probabilities"

    def outputs(self, batch: data.Batch, needed: Captures, held_out: bool = False) -> Outputs | None:
        """See `TeacherSource`."""
        return next(self.outputs_of([batch], needed, held_out))

    def outputs_of(
        self, batches: Sequence[data.Batch], needed: Captures, held_out: bool = False
    ) -> Iterator[Outputs | None]:
        """See `TeacherSource`: all batches in one pass over the layers."""
        first, *others = [
            model_outputs(model, batches, needed if number == 0 else Captures())
            for number, model in enumerate(self.models)
        ]
        while first:  # let go of one after the other
            outputs = first.pop(0)
            outputs.others = tuple(other.pop(0) for other in others)
            outputs.averaging = self.averaging
            yield outputs

    def hidden_states(self, batches: Sequence[data.Batch], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """See `TeacherSource`."""
        for outputs in model_outputs(self.models[0], batches, Captures(hidden_layers=tuple(layers))):
            yield outputs.hidden_states


def model_outputs(model: StreamedModel, batches: Sequence[data.Batch], needed: Captures) -> list[Outputs]:
    """What the losses compare with, of one model for some batches, in one pass."""
    passed = model.forward(
        [batch["input_ids"] for batch in batches], needed.hidden_layers, needed.attention_layers, needed.attention_parts
    )
    return [Outputs(states.last_hidden_state, states.hidden_states, model.head, states.attention) for states in passed]
