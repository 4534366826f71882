"""What losses read inside a model: hidden states and the inputs of attention, captured during a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from edgerazor import models
from edgerazor.losses import Attention, Loss, Routing
from edgerazor.models import PreTrainedModel, Structure


@dataclass(frozen=True)
class Captures:
    """Which states of a model losses need.

    Attributes:
        hidden_layers: layers whose hidden states they need (see `Outputs.hidden_states`), ascending.
        attention_layers: layers whose attention inputs they need, counted from 1, ascending.
        attention_parts: which of "query", "key" and "value" they need of these layers.
        routing: whether they need what the routers of a mixture of experts say.
    """

    hidden_layers: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] = ()
    attention_parts: tuple[str, ...] = ()
    routing: bool = False


@dataclass
class CapturedStates:
    """The states that a forward pass left; filled while `capture` is active.

    Attributes:
        head_inputs: one tensor `[B, T, H]` per forward pass, the input of the head.
        layer_outputs: layer -> `[B, T, H]`, its output, for the requested layers except the last one.
        attention: layer -> the inputs of its attention, for the requested layers.
        last_layer: number of the last layer, if its hidden state was requested.
        routing: layer -> what its router said, if that was requested.
    """

    head_inputs: list[Tensor]
    layer_outputs: dict[int, Tensor]
    attention: dict[int, Attention]
    last_layer: int | None
    routing: dict[int, Routing]

    @property
    def last_hidden_state(self) -> Tensor:
        """The input of the head in the first forward pass, `[B, T, H]`, behind the final norm."""
        return self.head_inputs[0]

    @property
    def hidden_states(self) -> dict[int, Tensor]:
        """Layer -> `[B, T, H]` as in `Outputs.hidden_states`: the last layer's state is taken behind the final norm."""
        if self.last_layer is None:
            return self.layer_outputs
        return {**self.layer_outputs, self.last_layer: self.last_hidden_state}


def captures(losses: Iterable[Loss]) -> Captures:
    """Everything that these losses need of a model."""
    all_losses = list(losses)
    return Captures(
        hidden_layers=tuple(sorted({layer for loss in all_losses for layer in loss.hidden_layers()})),
        attention_layers=tuple(sorted({layer for loss in all_losses for layer in loss.attention_layers()})),
        attention_parts=tuple(sorted({part for loss in all_losses for part in loss.attention_parts})),
        routing=any(loss.needs_routing for loss in all_losses),
    )


@contextmanager
def capture(
    model: PreTrainedModel, structure: Structure | None, head_path: str, needed: Captures
) -> Iterator[CapturedStates]:
    """Capture the input of the head and the states that losses need, in the forward pass inside.

    The head itself is not computed: the losses compute logits from its input, a chunk of positions at a time.

    Args:
        model: opened with `models.enable_attention_capture` where attention is captured.
        structure: where the layers are; None captures the input of the head alone.
        head_path: module path of the head.
        needed: the states to capture.
    """
    with ExitStack() as stack:
        layer_outputs: dict[int, Tensor] = {}
        attention: dict[int, Attention] = {}
        routing: dict[int, Routing] = {}
        last_layer = None
        if structure is not None:
            last_layer = structure.layer_count if structure.layer_count in needed.hidden_layers else None
            inner_layers = [layer for layer in needed.hidden_layers if layer != last_layer]
            layer_outputs = stack.enter_context(models.capture_hidden(model, structure, inner_layers))
            attention = stack.enter_context(
                models.capture_attention(model, structure, needed.attention_layers, needed.attention_parts)
            )
            if needed.routing:
                routing = stack.enter_context(models.capture_routing(model, structure))
        head_inputs = stack.enter_context(models.final_states(model, head_path))
        yield CapturedStates(head_inputs, layer_outputs, attention, last_layer, routing)
