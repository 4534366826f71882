"""A model larger than memory: its layers are read from disk one after the other, whenever it computes.

Embedding, final norm and head stay in memory, and one or two layers at a time, since the next one is read while one
computes. All batches of a pass go through a layer before it is let go, so each pass reads the weights once, however
many batches it has. Files are read and never mapped, so the model takes no address space either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor.errors import UserError, plain
from edgerazor.losses import Attention, Head
from edgerazor.models.attention_capture import capture_attention
from edgerazor.models.blocks import Blocks
from edgerazor.models.hidden_states import logit_shape
from edgerazor.models.loading import caps_attention, error_summary, load_config, quiet_transformers, resolve
from edgerazor.models.onloading import map_large_blocks
from edgerazor.models.structure import Structure, structure
from edgerazor.untrusted import weights
from edgerazor.untrusted.weight_places import TensorPlace, tensor_places


@dataclass
class StreamedStates:
    """What a pass left of one batch.

    Attributes:
        last_hidden_state: the input of the head, `[B, T, H]`, behind the final norm.
        hidden_states: layer -> `[B, T, H]`, as `losses.Outputs.hidden_states`.
        attention: layer, counted from 1 -> inputs of its attention.
    """

    last_hidden_state: Tensor
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)


class StreamedModel:
    """A causal language model whose decoder layers stay on disk.

    Args:
        source: local folder or hub id.
        revision: of the hub model.
        device: to compute on.
        dtype: to compute in, and of what stays in memory.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: it cannot be read, or is not built as a decoder whose layers can be called one by one.
    """

    def __init__(
        self, source: str, revision: str | None, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
    ) -> None:
        map_large_blocks()
        self.folder, self.device, self.dtype = resolve(source, revision), device, dtype
        self.model = _without_weights(self.folder, dtype, trust_remote_code)
        self.structure: Structure = structure(self.model)
        self.blocks = Blocks(self.model, self.structure)
        self._places = _places_of(self.model, self.folder)
        self._checked: set[str] = set()
        in_layers = self.structure.layers_path + "."
        rest = [name for name in self._places if not name.startswith(in_layers)]
        self._install(dict(zip(rest, map(self._read, rest), strict=True)))
        self._tie()
        self._read_buffers()
        for module in self.model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(device)
        with self.blocks.first_layer_only(), self._onloaded(0, self._read_layer(0)):
            scale, cap = logit_shape(self.model, self.structure.head_path)
        head = self.model.get_submodule(self.structure.head_path)
        self.head = Head(head.weight, head.bias, scale, cap)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all its weights on disk."""
        return sum(place.nbytes for place in self._places.values())

    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[Tensor],
        hidden_layers: Collection[int] = (),
        attention_layers: Collection[int] = (),
        attention_parts: Collection[str] = (),
    ) -> list[StreamedStates]:
        """One pass over the layers for some batches of token ids, each `[B, T]` int64 without padding on the left.

        Args:
            batches: on the device.
            hidden_layers: whose states are kept (see `losses.Outputs.hidden_states`).
            attention_layers: whose attention inputs are kept, counted from 1.
            attention_parts: which of "query", "key" and "value" are kept of these.

        Raises:
            UserError: a file is damaged.
        """
        count = self.structure.layer_count
        states: list[Tensor] = []
        results = [StreamedStates(torch.empty(0)) for _ in batches]
        with ThreadPoolExecutor(1) as reader:
            reading: Future[dict[str, Tensor]] = reader.submit(self._read_layer, 0)
            for index in range(count):
                layer_weights = reading.result()
                if index + 1 < count:
                    reading = reader.submit(self._read_layer, index + 1)
                with self._onloaded(index, layer_weights):
                    del layer_weights
                    if index == 0:
                        states = [self.blocks.inputs(input_ids) for input_ids in batches]
                        self._keep(results, 0, map(self.blocks.hidden, states), hidden_layers)
                    captured_layers = [index + 1] if index + 1 in attention_layers else []
                    for number, batch_states in enumerate(states):
                        with capture_attention(
                            self.model, self.structure, captured_layers, attention_parts
                        ) as attention:
                            states[number] = self.blocks.forward_layer(index, batch_states, batches[number])
                        results[number].attention |= attention
                if index + 1 < count:  # the last layer's state is taken behind the final norm
                    self._keep(results, index + 1, map(self.blocks.hidden, states), hidden_layers)
        for number, batch_states in enumerate(states):
            results[number].last_hidden_state = self.blocks.final(batch_states)
        self._keep(results, count, [one.last_hidden_state for one in results], hidden_layers)
        return results

    @staticmethod
    def _keep(
        results: Sequence[StreamedStates], layer: int, states: Iterable[Tensor], hidden_layers: Collection[int]
    ) -> None:
        if layer in hidden_layers:
            for one, batch_states in zip(results, states, strict=True):
                one.hidden_states[layer] = batch_states

    # --- weights ---

    def _read(self, name: str) -> Tensor:
        """A parameter as it computes."""
        place = self._places[name]
        values = place.read()
        if name not in self._checked:  # once: it is the same file in every pass
            weights.refuse_not_finite(self.folder, [(place.name, values)])
            self._checked.add(name)
        return values.to(self.device, self.dtype)

    def _read_buffers(self) -> None:
        """Numbers that are stored although they are not trained (a factor of each layer, in Gemma 4)."""
        stored = tensor_places(self.folder)
        for name, buffer in self.model.named_buffers():
            if name in stored and stored[name].shape == tuple(buffer.shape):
                buffer.copy_(stored[name].read())

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        """The parameters of a layer by their names in the model."""
        prefix = f"{self.structure.layers_path}.{index}."
        return {name: self._read(name) for name in self._places if name.startswith(prefix)}

    def _install(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors in the places of parameters."""
        for name, tensor in tensors.items():
            path, _, key = name.rpartition(".")
            self.model.get_submodule(path)._parameters[key] = nn.Parameter(tensor, requires_grad=False)

    @contextlib.contextmanager
    def _onloaded(self, index: int, tensors: dict[str, Tensor]) -> Iterator[None]:
        """A layer with its weights inside the block, and without them behind it."""
        layer = self.blocks.layers[index]
        empty = [(module, dict(module._parameters)) for module in layer.modules()]
        self._install(tensors)
        tensors.clear()
        try:
            yield
        finally:
            for module, parameters in empty:
                module._parameters.update(parameters)

    def _tie(self) -> None:
        """Give head and embedding the one weight that was read, where they share it."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if embedding.weight.is_meta:
            embedding.weight = head.weight
        if head.weight.is_meta:
            head.weight = embedding.weight


def _without_weights(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The modules of a model, its parameters without memory, its buffers (of rotary embeddings) with their values.

    Raises:
        UserError: as `models.outline`.
    """
    from accelerate import init_empty_weights  # only training needs it

    config = load_config(folder, trust_remote_code)
    try:
        with init_empty_weights(include_buffers=False), quiet_transformers():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation="eager" if caps_attention(config) else None,
            )
    except Exception as error:
        raise UserError(f"transformers cannot build the model of {folder}: {error_summary(error)}.") from None
    if model.config.get_text_config().tie_word_embeddings:  # parameters without memory are made one by one
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model.eval().requires_grad_(False)


def _places_of(model: PreTrainedModel, folder: Path) -> dict[str, TensorPlace]:
    """Where each parameter of a model lies on disk, by its name; of a shared one, once.

    Raises:
        UserError: one is missing, of another shape or no 16- or 32-bit number, or tied matrices were stored apart.
    """
    stored = tensor_places(folder)
    prefix = f"{model.base_model_prefix}."
    paths = {id(module): name for name, module in model.named_modules()}
    embedding, head = (
        f"{paths[id(module)]}.weight" for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if (
        tied
        and embedding in stored
        and head in stored
        and not torch.equal(stored[embedding].read(), stored[head].read())
    ):
        raise UserError(
            f"{folder} stores an embedding and a head with different numbers, and its config.json says that they are "
            "one.",
            "Set `tie_word_embeddings` to false there, or let it stay in memory (`distill.teacher_source: resident`).",
        )
    places: dict[str, TensorPlace] = {}
    for name, parameter in model.named_parameters():
        names = [name, *([head] if tied and name == embedding else [])]
        names += [other.removeprefix(prefix) for other in names]
        place = next((stored[other] for other in names if other in stored), None)
        if place is None:
            raise UserError(
                f"{folder} has no tensor {plain(name)}, or stores it under another name, so it cannot be streamed.",
                "Let it stay in memory: `distill.teacher_source: resident`.",
            )
        if place.shape != tuple(parameter.shape):
            raise UserError(
                f"The weights of {folder} do not fit its config.json: {plain(name)} is {list(place.shape)}, not "
                f"{list(parameter.shape)}."
            )
        if place.dtype is None:
            raise UserError(f"{folder} stores {plain(name)} in numbers that are no 16- or 32-bit weights.")
        places[name] = place
    return places
