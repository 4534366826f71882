"""Layer-by-layer pass with onloading: forwards and backwards through a decoder that is larger than memory.

Layer-major order: all batches go through one layer before any goes through the next. So a layer's weights are onloaded
once in each direction: copied to the compute device and dtype for as long as the layer is worked on (`onloading.py`).

The inputs of each layer are kept in a file per layer. The backward pass starts from the gradient with respect to the
outputs of the last layer, computes each layer again from its inputs, this time with gradients of activations, and hands
the gradient with respect to its inputs to the layer before. No gradient of a weight is computed.

After each layer the progress is written to the folder, with all that observers have gathered. A pass that was killed
goes on behind the last finished layer, bit for bit as if nothing had happened (`pass_progress.py`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgerazor.console import Console, Tracker
from edgerazor.models.blocks import Blocks
from edgerazor.models.experts import at_tokens, expert_of
from edgerazor.models.observer import Observer
from edgerazor.models.onloading import drop_pages, onloaded, trim_heap
from edgerazor.models.pass_progress import PassProgress
from edgerazor.models.structure import Structure, embedding_scale
from edgerazor.workdir import digest_json, make_folder, versions, write_atomically

#: Computes the gradient with respect to the outputs of the last layer: (batch, states [B, T, H]) -> [B, T, H].
Upstream = Callable[[int, Tensor], Tensor]
#: Gives what takes the place of the weight [rows, columns] of a linear layer, by its path.
WeightTransform = Callable[[str, Tensor], Tensor]


class LayerwisePass:
    """A pass through a model, layer by layer, for some batches of token ids.

    Args:
        model: in evaluation mode, on the CPU, in any dtype; best as `load(..., dtype=None)` left it. Its parameters are
            set to need no gradient; all but the decoder layers, the embedding and the head are converted for good. One
            without weights (on the meta device) can only be asked for `memory`.
        structure: where its layers are.
        batches: (token ids int64 [B, T], counts bool [B, T]) of each micro-batch; padding only on the right.
        folder: for the files of this pass only; `clear` removes it.
        dtype: to compute in.
        device: to compute on.
        identity: of the model and of whatever else decides what is computed and observed, but for the batches, `dtype`
            and the versions of the libraries, which are added; files of a pass of another identity are ignored.
        console: where progress is shown.
        transform: is applied to the weights of linear layers whenever they are onloaded; the identity must say what it
            does.
    """

    # Nine parameters: each is a choice of its own, of what is computed (model, structure, batches, transform), of where
    # (folder, dtype, device, console), and of which earlier files may be used (identity).
    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        batches: Sequence[tuple[Tensor, Tensor]],
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        identity: str = "",
        console: Console | None = None,
        transform: WeightTransform | None = None,
    ) -> None:
        self.transform = transform
        self.model, self.structure, self.batches, self.folder = model, structure, batches, folder
        self.dtype, self.device = dtype, torch.device(device)
        self.blocks = Blocks(model, structure)
        self.console = console or Console(quiet=True)
        self.identity = digest_json([identity, str(dtype), _digest(batches), versions()])
        model.requires_grad_(False)
        self._onload_rest()

    def forward(self, *observers: Observer, keep_inputs: bool = True, title: str = "layers forwards") -> None:
        """All batches through all layers.

        Args:
            observers: their `layer`, `linear` and `final` are called; in a resumed pass they are restored first.
            keep_inputs: whether the inputs of all layers stay on disk, which `backward` and `layer_inputs` read.
            title: of the progress.
        """
        progress = PassProgress(self.folder / "forward.safetensors", [self.identity, keep_inputs], observers)
        done, count = progress.restore(), self.structure.layer_count
        if done is None or not self._states_file(min(done, count)).exists():
            self.clear()
            self._write(self._states_file(0), (self.inputs(number) for number in range(len(self.batches))))
            done = 0
        self._capture_calls()
        with self.console.track(title, count * len(self.batches), done * len(self.batches)) as tracker:
            for index in range(done, count):
                with self.layer(index), torch.no_grad():
                    outputs = (self._forward_layer(index, number, observers) for number in range(len(self.batches)))
                    self._write(self._states_file(index + 1), _tracked(outputs, tracker))
                progress.save(index + 1)
                if not keep_inputs:
                    self._states_file(index).unlink()
        if done <= count:
            for (_, counts), states in zip(self.batches, self.outputs(), strict=True):
                with torch.no_grad():
                    head_inputs = self.final(states)
                for observer in observers:
                    observer.final(_counted(head_inputs, counts.to(self.device)))
            progress.save(count + 1)

    def backward(
        self,
        upstream: Upstream,
        *observers: Observer,
        name: str = "backward",
        title: str = "layers backwards",
        identity: str = "",
    ) -> None:
        """The gradient through all layers, from the last to the first; after `forward`.

        Args:
            upstream: called once per batch, in their order, with the outputs of the last layer (see `final`). What it
                sums up beside the gradient must belong to one of the observers, to survive an interruption.
            observers: their `gradient` is called; in a resumed pass they are restored first.
            name: of the files of this backward pass, where there are several.
            title: of the progress.
            identity: of what decides the gradient besides the pass: files of another one are not gone on with.
        """
        progress = PassProgress(self.folder / f"{name}.safetensors", [self.identity, identity], observers)
        remaining, count = progress.restore(), self.structure.layer_count
        if remaining is None or (remaining and not self._gradients_file(name, remaining).exists()):
            remaining = count
            gradients = (upstream(number, states).detach() for number, states in enumerate(self.outputs()))
            self._write(self._gradients_file(name, count), gradients)
            progress.save(count)
        self._capture_calls()
        with self.console.track(title, count * len(self.batches), (count - remaining) * len(self.batches)) as tracker:
            for index in reversed(range(remaining)):
                with self.layer(index):
                    gradients = (
                        self._backward_layer(index, number, name, observers) for number in range(len(self.batches))
                    )
                    self._write(self._gradients_file(name, index), _tracked(gradients, tracker))
                progress.save(index)
                self._gradients_file(name, index + 1).unlink()

    def input_gradients(self, name: str = "backward") -> Iterator[Tensor]:
        """Gradient with respect to the inputs of the first layer, [B, T, H] for each batch; after `backward`.

        As wide as these inputs, where inputs of single layers lie behind the hidden states.
        """
        for number in range(len(self.batches)):
            yield self._read(self._gradients_file(name, 0), number)

    def outputs(self) -> Iterator[Tensor]:
        """Outputs of the last layer, [B, T, H] for each batch; after `forward`."""
        self._capture_calls()
        for number in range(len(self.batches)):
            yield self._read(self._states_file(self.structure.layer_count), number)

    def layer_inputs(self, index: int) -> Iterator[Tensor]:
        """Inputs of a layer, [B, T, H] for each batch; after `forward`."""
        for number in range(len(self.batches)):
            yield self._read(self._states_file(index), number)

    def forward_from(self, index: int, inputs: Iterable[Tensor]) -> list[Tensor]:
        """Outputs of the last layer, [B, T, H] for each batch, from the inputs of the layer `index`; without files."""
        self._capture_calls()
        states = list(inputs)
        for layer in range(index, self.structure.layer_count):
            with self.layer(layer), torch.no_grad():
                pairs = zip(states, self.batches, strict=True)
                states = [self.blocks.forward_layer(layer, batch, ids) for batch, (ids, _) in pairs]
        return states

    def final(self, states: Tensor) -> Tensor:
        """Input of the head, [B, T, H], from the output of the last layer (the final norm); differentiable."""
        return self.blocks.final(states)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A layer whose weights are onloaded, in the compute dtype and transformed, inside the block."""
        module = self.blocks.layers[index]
        with onloaded(module, self.device, self.dtype):
            if self.transform is not None:
                for target in self.structure.linears:
                    if target.layer == index:
                        weight = self.model.get_submodule(target.name).weight
                        weight.data = self.transform(target.name, weight.data)
            yield module
        for parameter in module.parameters():
            drop_pages(parameter.data)

    def memory(self, backward: bool = False, whole_attention: bool = False) -> int:
        """Estimated bytes that a pass needs at once, besides mapped weights: those of one layer, its activations, and
        what an observer computes from the widest of them in float32.

        Args:
            backward: also for the backward pass (without `upstream`): activations are kept, and have gradients.
            whole_attention: also attention probabilities of all tokens, where the model's own attention is fused.
        """
        on_cpu = self.device.type == "cpu"
        layer = list(self.blocks.layers[0].parameters())
        copied = sum(p.numel() for p in layer if not on_cpu or p.dtype != self.dtype) * self.dtype.itemsize
        if not on_cpu:
            in_layers = {id(p) for p in self.model.get_submodule(self.structure.layers_path).parameters()}
            copied += sum(p.numel() * p.element_size() for p in self.model.parameters() if id(p) not in in_layers)
        rows, tokens = max(((ids.shape[0], ids.shape[1]) for ids, _ in self.batches), key=math.prod)
        width = math.ceil(sum(t.token_share * (t.rows + t.columns) for t in self.structure.linears if t.layer == 0))
        width += 4 * self.structure.embedding.columns  # inputs, outputs, and the states between attention and MLP
        config = self.model.config.get_text_config()
        if whole_attention or config._attn_implementation == "eager":
            width += 3 * config.num_attention_heads * tokens
        observed = 2 * 4 * max(target.columns for target in self.structure.linears)
        return copied + rows * tokens * (width * self.dtype.itemsize * (2 if backward else 1) + observed)

    def clear(self) -> None:
        """Remove all files of the pass, once its results are stored elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- a layer and a batch ---

    def _forward_layer(self, index: int, number: int, observers: Sequence[Observer]) -> Tensor:
        """Outputs of a layer for a batch, whose inputs are read from the file."""
        counts = self.batches[number][1].to(self.device)
        inputs = self._read(self._states_file(index), number)

        def observe(path: str, x: Tensor, _weight: Tensor, _output: Tensor) -> None:
            expert = expert_of(self.model, path)
            counted, weights = at_tokens(expert, counts), None
            if expert is not None and expert.routed is not None:
                weights = expert.routed.weights[counted]
            for observer in observers:
                observer.linear(path, _counted(x, counted), weights)

        with self._linear_hooks(index, observe):
            outputs = self.blocks.forward_layer(index, inputs, self.batches[number][0])
        for observer in observers:
            observer.layer(index, self.blocks.hidden(inputs), self.blocks.hidden(outputs), counts)
        return outputs

    def _backward_layer(self, index: int, number: int, name: str, observers: Sequence[Observer]) -> Tensor:
        """Gradient with respect to the inputs of a layer for a batch; both are read from files."""
        inputs = self._read(self._states_file(index), number).requires_grad_()

        def observe(path: str, x: Tensor, weight: Tensor, output: Tensor) -> None:
            x = x.detach()

            def observe_gradient(g: Tensor) -> None:
                for observer in observers:
                    observer.gradient(path, weight, x.flatten(0, -2), g.flatten(0, -2))

            output.register_hook(observe_gradient)

        with torch.enable_grad(), self._linear_hooks(index, observe):
            outputs = self.blocks.forward_layer(index, inputs, self.batches[number][0])
            gradient = self._read(self._gradients_file(name, index + 1), number)
            return torch.autograd.grad(outputs, inputs, gradient)[0]

    @contextlib.contextmanager
    def _linear_hooks(self, index: int, observe: Callable[[str, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Call `observe` with path, input, weight and output of each linear layer of a layer, when it is called."""

        def hook_of(path: str) -> Any:
            def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
                observe(path, args[0], module.weight, output)

            return hook

        paths = [target.name for target in self.structure.linears if target.layer == index]
        handles = [self.model.get_submodule(path).register_forward_hook(hook_of(path)) for path in paths]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- what is outside the layers ---

    def _onload_rest(self) -> None:
        """Convert and move all but the decoder layers, for good; embedding and head keep their dtype."""
        if self.model.device.type == "meta":  # only what it would take is asked
            return
        layers = self.model.get_submodule(self.structure.layers_path)
        in_layers = {id(module) for module in layers.modules()}
        tables = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        tables |= {id(self.model.get_submodule(table.name).weight) for table in self.structure.tables}
        for module in self.model.modules():
            if id(module) not in in_layers:
                for parameter in module.parameters(recurse=False):
                    dtype = parameter.dtype if id(parameter) in tables else self.dtype
                    parameter.data = parameter.data.to(self.device, dtype)
                for key, buffer in module.named_buffers(recurse=False):
                    module._buffers[key] = buffer.to(self.device)

    def _capture_calls(self) -> None:
        """Make sure that layers can be called for the shapes of all batches. Not inside `layer`: this onloads the first
        layer itself."""
        for number, (ids, _) in enumerate(self.batches):
            if not self.blocks.knows(ids):
                self.inputs(number)

    def inputs(self, number: int, change_rows: Callable[[Tensor], Tensor] | None = None, of: str = "") -> Tensor:
        """Inputs of the first layer, [B, T, H], for a batch.

        Args:
            number: of the batch.
            change_rows: gives what takes the place of the rows of an embedding, [B, T, columns], before a family's
                factor.
            of: path of that embedding; empty: the one whose rows are hidden states.
        """
        embedding: Any = self.model.get_input_embeddings()
        tables: list[Any] = [embedding, *(self.model.get_submodule(table.name) for table in self.structure.tables)]
        changed: Any = self.model.get_submodule(of) if of else embedding

        def embed(table: Any, ids: Tensor) -> Tensor:
            rows, scale = nn.functional.embedding(ids, table.weight), embedding_scale(table)
            rows = (rows if change_rows is None or table is not changed else change_rows(rows)).to(self.dtype)
            return rows if scale is None else rows * torch.tensor(scale, dtype=torch.float32).to(rows)

        for table in tables:
            table.forward = functools.partial(embed, table)
        try:
            with self.layer(0):
                return self.blocks.inputs(self.batches[number][0].to(self.device))
        finally:
            for table in tables:
                del table.forward

    # --- files ---

    def _states_file(self, index: int) -> Path:
        """File of the inputs of a layer; for the number of layers: of the outputs of the last."""
        return self.folder / f"entering-{index}.raw"

    def _gradients_file(self, name: str, index: int) -> Path:
        """File of the gradient with respect to the inputs of a layer, or the outputs of the last, likewise."""
        return self.folder / f"{name}-{index}.raw"

    def _write(self, path: Path, tensors: Iterator[Tensor]) -> None:
        """Write [B, T, H] of each batch in the compute dtype, one behind the other."""
        make_folder(path.parent)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                for tensor in tensors:
                    file.write(tensor.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data)

        write_atomically(path, write)

    def _read(self, path: Path, number: int) -> Tensor:
        """Read [B, T, H] of a batch."""
        sizes = [ids.numel() for ids, _ in self.batches]
        width = path.stat().st_size // sum(sizes)  # bytes
        mapped = torch.from_file(str(path), size=width * sum(sizes), dtype=torch.uint8)
        first = width * sum(sizes[:number])
        states = mapped[first : first + width * sizes[number]].view(self.dtype)
        return states.view(*self.batches[number][0].shape, -1).to(self.device, copy=True)


def _counted(x: Tensor, counts: Tensor) -> Tensor:
    """The positions that count, [n, features], of x [B, T, features] or [B·T, features].

    Where x holds another number of positions (what a model's own list of experts calls them with), all of them count.
    """
    flat = x.reshape(-1, x.shape[-1])
    return flat if len(flat) != counts.numel() or bool(counts.all()) else flat[counts.flatten()]


def _tracked(tensors: Iterator[Tensor], tracker: Tracker) -> Iterator[Tensor]:
    """The given tensors, each of them a step of progress."""
    for tensor in tensors:
        yield tensor
        tracker.advance()
        trim_heap()


def _digest(batches: Sequence[tuple[Tensor, Tensor]]) -> str:
    return digest_json([[ids.tolist(), counts.tolist()] for ids, counts in batches])
