"""Through a decoder one layer at a time, forwards and backwards, for models larger than memory.

Layer-major order: all batches go through one layer before any goes through the next. So a layer's weights are brought
in once in each direction: copied to the compute device and dtype for as long as the layer is worked on. The rest of the
decoder stays where it was loaded, and that is no memory at all where the checkpoint's own dtype is kept on a CPU, since
transformers leaves safetensors mapped (`load(..., dtype=None)`).

What enters each layer is kept in a file per layer. The way back starts from the gradient with respect to what leaves
the last layer, computes each layer again from what entered it, this time with gradients of activations, and hands the
gradient with respect to its input to the layer before. No gradient of a weight is computed.

After each layer the progress is written to the folder, with all that observers have gathered, so that a walk that was
killed goes on behind the last finished layer, bit for bit as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgerazor.console import Console, Tracker
from edgerazor.models.blocks import Blocks
from edgerazor.models.structure import Structure, embedding_scale
from edgerazor.workdir import digest_json, make_folder, versions, write_atomically

#: Computes the gradient with respect to what leaves the last layer: (batch, states [B, T, H]) -> [B, T, H].
Upstream = Callable[[int, Tensor], Tensor]


class Observer:
    """What is gathered on a walk; its methods do nothing but where a subclass has something to do.

    Tensors are on the compute device and in the compute dtype, and must not be changed. `n` positions of a micro-batch
    count; batches come in their order, and layers in the order of the walk.
    """

    def layer(self, index: int, entering: Tensor, leaving: Tensor, counts: Tensor) -> None:
        """Forwards, behind each layer (from 0) and batch: states [B, T, H] twice; counts bool [B, T]."""

    def linear(self, path: str, x: Tensor) -> None:
        """Forwards, for each linear layer and batch, as it is called: its path in the model, its input [n, in]."""

    def final(self, x: Tensor) -> None:
        """Forwards, at the end, for each batch: what enters the head, [n, H]."""

    def gradient(self, path: str, weight: Tensor, x: Tensor, g: Tensor) -> None:
        """Backwards, for each linear layer and batch: its weight [out, in], its input x [B·T, in], and the gradient g
        [B·T, out] with respect to its output (bias included), as it follows from `upstream`: nothing is averaged. All
        positions are there, since those that count may look at those that do not; of padding g is zero."""

    def state(self) -> dict[str, Tensor]:
        """All that has been gathered, to be stored: tensors of any dtype under names without meaning to the walk."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`, in a new process."""

    def identity(self) -> str:
        """What decides what is gathered, beside the walk and the class: a `state` of another one is not restored."""
        return ""


class LayerwisePass:
    """A walk through a model for some batches of token ids.

    Args:
        model: in evaluation mode, on the CPU, in any dtype; best as `load(..., dtype=None)` left it. Its parameters are
            set to need no gradient; all but the decoder layers, the embedding and the head are converted for good.
        found: its structure.
        batches: (token ids int64 [B, T], counts bool [B, T]) of each micro-batch; padding only on the right.
        folder: for the files of the walk, its own; `clear` empties it.
        dtype: to compute in.
        device: to compute on.
        identity: of the model and of whatever else decides what is computed and observed, but for the batches, `dtype`
            and the versions of the libraries, which are added; files of a walk of another identity are ignored.
        console: where progress is shown.
        change: gives what takes the place of the weight of a linear layer, by its path, whenever its layer is brought
            in; the identity must say what it does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        found: Structure,
        batches: Sequence[tuple[Tensor, Tensor]],
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        identity: str = "",
        console: Console | None = None,
        change: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.change = change
        self.model, self.found, self.batches, self.folder = model, found, batches, folder
        self.dtype, self.device = dtype, torch.device(device)
        self.blocks = Blocks(model, found)
        self.console = console or Console(quiet=True)
        self.identity = digest_json([identity, str(dtype), _digest(batches), versions()])
        model.requires_grad_(False)
        self._bring_rest()

    def forward(self, *observers: Observer, keep: bool = True, title: str = "layers forwards") -> None:
        """All batches through all layers.

        Args:
            observers: their `layer` and `linear` are called; in a resumed walk they are restored first.
            keep: the states that enter each layer, which `backward` and `leaving` read.
            title: of the progress.
        """
        progress = _Progress(self.folder / "forward.safetensors", [self.identity, keep], observers)
        done, count = progress.restore(), self.found.layer_count
        if done is None or not self._states(min(done, count)).exists():
            self.clear()
            self._write(self._states(0), (self.entering(number) for number in range(len(self.batches))))
            done = 0
        self._meet_all()
        with self.console.track(title, count * len(self.batches), done * len(self.batches)) as tracker:
            for index in range(done, count):
                with self.layer(index), torch.no_grad():
                    outputs = (self._observed(index, number, observers) for number in range(len(self.batches)))
                    self._write(self._states(index + 1), _advancing(outputs, tracker))
                progress.save(index + 1)
                if not keep:
                    self._states(index).unlink()
        if done <= count:
            for (_, counts), states in zip(self.batches, self.leaving(), strict=True):
                with torch.no_grad():
                    entering_head = self.final(states)
                for observer in observers:
                    observer.final(counted(entering_head, counts.to(self.device)))
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
            upstream: called once per batch, in their order, with the states that leave the last layer (see `final`);
                what it adds up beside the gradient must belong to one of the observers, to survive an interruption.
            observers: their `gradient` is called; in a resumed walk they are restored first.
            name: of the files of this way back, where there are several.
            title: of the progress.
            identity: of what decides the gradient beside the walk: a way back of another one is not gone on with.
        """
        progress = _Progress(self.folder / f"{name}.safetensors", [self.identity, identity], observers)
        left, count = progress.restore(), self.found.layer_count
        if left is None or (left and not self._gradients(name, left).exists()):
            left = count
            gradients = (upstream(number, states).detach() for number, states in enumerate(self.leaving()))
            self._write(self._gradients(name, count), gradients)
            progress.save(count)
        self._meet_all()
        with self.console.track(title, count * len(self.batches), (count - left) * len(self.batches)) as tracker:
            for index in reversed(range(left)):
                with self.layer(index):
                    outputs = (self._returned(index, number, name, observers) for number in range(len(self.batches)))
                    self._write(self._gradients(name, index), _advancing(outputs, tracker))
                progress.save(index)
                self._gradients(name, index + 1).unlink()

    def returned(self, name: str = "backward") -> Iterator[Tensor]:
        """The gradient with respect to what enters the first layer, [B, T, H] for each batch; after `backward`."""
        for number in range(len(self.batches)):
            yield self._read(self._gradients(name, 0), number)

    def leaving(self) -> Iterator[Tensor]:
        """What leaves the last layer, [B, T, H] for each batch; after `forward`."""
        self._meet_all()
        for number in range(len(self.batches)):
            yield self._read(self._states(self.found.layer_count), number)

    def entered(self, index: int) -> Iterator[Tensor]:
        """What enters a layer, [B, T, H] for each batch; after `forward`."""
        for number in range(len(self.batches)):
            yield self._read(self._states(index), number)

    def onwards(self, index: int, entering: Iterable[Tensor]) -> list[Tensor]:
        """What leaves the last layer, [B, T, H] for each batch, for what enters the one of that index; no files."""
        self._meet_all()
        states = list(entering)
        for each in range(index, self.found.layer_count):
            with self.layer(each), torch.no_grad():
                states = [self.blocks.through(each, batch) for batch in states]
        return states

    def final(self, states: Tensor) -> Tensor:
        """What enters the head, [B, T, H], for what leaves the last layer (the final norm); differentiable."""
        return self.blocks.final(states)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A layer whose weights are here, in the compute dtype, while the block lasts."""
        module = self.blocks.layers[index]
        with brought(module, self.device, self.dtype):
            if self.change is not None:
                for site in self.found.linears:
                    if site.layer == index:
                        weight = self.model.get_submodule(site.name).weight
                        weight.data = self.change(site.name, weight.data)
            yield module
        for parameter in module.parameters():
            drop_pages(parameter.data)

    def seconds(self, batches: int) -> float:
        """About how long a walk forwards takes for so many batches like the first, from its pass through one layer."""
        states = self.entering(0)
        began = time.monotonic()
        with self.layer(0), torch.no_grad():
            brought_in = time.monotonic() - began
            self.blocks.through(0, states).sum().item()  # waits for the device
            each = time.monotonic() - began - brought_in
        return self.found.layer_count * (brought_in + batches * each)

    def memory(self, backward: bool = False, whole_attention: bool = False) -> int:
        """About how many bytes a walk needs at once, besides mapped weights: a layer's, its activations, and what an
        observer makes of the widest of them in float32.

        Args:
            backward: also on the way back (without `upstream`): activations are kept, and have gradients.
            whole_attention: also attention probabilities of all tokens, where attention does not show them as it is.
        """
        here = self.device.type == "cpu"
        layer = list(self.blocks.layers[0].parameters())
        copied = sum(p.numel() for p in layer if not here or p.dtype != self.dtype) * self.dtype.itemsize
        if not here:
            inside = {id(p) for p in self.model.get_submodule(self.found.layers_path).parameters()}
            copied += sum(p.numel() * p.element_size() for p in self.model.parameters() if id(p) not in inside)
        rows, tokens = max(((ids.shape[0], ids.shape[1]) for ids, _ in self.batches), key=math.prod)
        width = sum(site.rows + site.columns for site in self.found.linears if site.layer == 0)
        width += 4 * self.found.embedding.columns  # what enters and leaves, and what is between attention and MLP
        config = self.model.config.get_text_config()
        if whole_attention or config._attn_implementation == "eager":
            width += 3 * config.num_attention_heads * tokens
        seen = 2 * 4 * max(site.columns for site in self.found.linears)
        return copied + rows * tokens * (width * self.dtype.itemsize * (2 if backward else 1) + seen)

    def clear(self) -> None:
        """Remove all files of the walk, whose results are then elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- a layer and a batch ---

    def _observed(self, index: int, number: int, observers: Sequence[Observer]) -> Tensor:
        """Forwards: what leaves the layer."""
        counts = self.batches[number][1].to(self.device)
        entering = self._read(self._states(index), number)

        def seen(path: str, x: Tensor, _weight: Tensor, _output: Tensor) -> None:
            for observer in observers:
                observer.linear(path, counted(x, counts))

        with self._watching(index, seen):
            leaving = self.blocks.through(index, entering)
        for observer in observers:
            observer.layer(index, entering, leaving, counts)
        return leaving

    def _returned(self, index: int, number: int, name: str, observers: Sequence[Observer]) -> Tensor:
        """Backwards: the gradient with respect to what entered the layer."""
        entering = self._read(self._states(index), number).requires_grad_()

        def seen(path: str, x: Tensor, weight: Tensor, output: Tensor) -> None:
            x = x.detach()

            def arrived(g: Tensor) -> None:
                for observer in observers:
                    observer.gradient(path, weight, x.flatten(0, -2), g.flatten(0, -2))

            output.register_hook(arrived)

        with torch.enable_grad(), self._watching(index, seen):
            leaving = self.blocks.through(index, entering)
            gradient = self._read(self._gradients(name, index + 1), number)
            return torch.autograd.grad(leaving, entering, gradient)[0]

    @contextlib.contextmanager
    def _watching(self, index: int, seen: Callable[[str, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Call `seen` with path, input, weight and output of each linear layer of a layer, when it is called."""

        def watching(path: str) -> Any:
            def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
                seen(path, args[0], module.weight, output)

            return hook

        paths = [site.name for site in self.found.linears if site.layer == index]
        handles = [self.model.get_submodule(path).register_forward_hook(watching(path)) for path in paths]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- what is outside the layers ---

    def _bring_rest(self) -> None:
        """Convert and move all but the decoder layers; embedding and head keep their dtype."""
        layers = self.model.get_submodule(self.found.layers_path)
        inside = {id(module) for module in layers.modules()}
        big = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        for module in self.model.modules():
            if id(module) not in inside:
                for parameter in module.parameters(recurse=False):
                    dtype = parameter.dtype if id(parameter) in big else self.dtype
                    parameter.data = parameter.data.to(self.device, dtype)
                for key, buffer in module.named_buffers(recurse=False):
                    module._buffers[key] = buffer.to(self.device)

    def _meet_all(self) -> None:
        """Make sure that layers can be called for the shapes of all batches. Not while a layer's weights are here: the
        first layer's come for it."""
        for number, (ids, _) in enumerate(self.batches):
            if not self.blocks.knows(ids):
                self.entering(number)

    def entering(self, number: int, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What enters the first layer, [B, T, H], for a batch; `change` gives what takes the place of the rows of the
        embedding, [B, T, H], before they are multiplied by anything."""
        embedding: Any = self.model.get_input_embeddings()
        scale = embedding_scale(embedding)

        def rows(ids: Tensor) -> Tensor:
            found = nn.functional.embedding(ids, embedding.weight)
            found = (found if change is None else change(found)).to(self.dtype)
            return found if scale is None else found * torch.tensor(scale, dtype=torch.float32).to(found)

        embedding.forward = rows
        try:
            with self.layer(0):
                return self.blocks.entering(self.batches[number][0].to(self.device))
        finally:
            del embedding.forward

    # --- files ---

    def _states(self, index: int) -> Path:
        """What enters a layer; of the number of layers: what leaves the last."""
        return self.folder / f"entering-{index}.raw"

    def _gradients(self, name: str, index: int) -> Path:
        """The gradient with respect to the same."""
        return self.folder / f"{name}-{index}.raw"

    def _write(self, path: Path, tensors: Iterator[Tensor]) -> None:
        """[B, T, H] of each batch, one behind the other."""
        make_folder(path.parent)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                for tensor in tensors:
                    file.write(tensor.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data)

        write_atomically(path, write)

    def _read(self, path: Path, number: int) -> Tensor:
        """[B, T, H] of a batch."""
        sizes = [ids.numel() for ids, _ in self.batches]
        width = path.stat().st_size // sum(sizes)  # bytes
        mapped = torch.from_file(str(path), size=width * sum(sizes), dtype=torch.uint8)
        first = width * sum(sizes[:number])
        states = mapped[first : first + width * sizes[number]].view(self.dtype)
        return states.view(*self.batches[number][0].shape, -1).to(self.device, copy=True)


@contextlib.contextmanager
def brought(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Give a module copies of its weights on a device and in a dtype while the block lasts; buffers keep their dtype.

    Where both are what they are already, nothing is copied.
    """
    parameters = [(parameter, parameter.data) for parameter in module.parameters()]
    buffers = [(each, key, value) for each in module.modules() for key, value in each.named_buffers(recurse=False)]
    try:
        for parameter, data in parameters:
            parameter.data = data.to(device, dtype if data.is_floating_point() else data.dtype)
        for each, key, value in buffers:
            each._buffers[key] = value.to(device)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for each, key, value in buffers:
            each._buffers[key] = value


def drop_pages(weight: Tensor) -> None:
    """Give the memory of a weight that is mapped from its file back to the system; it is read again when it is used.

    Of other weights, and of mapped ones that were written to, nothing is given back. Nor is anything where the system
    is not Linux, or does not say what its pages of memory are.
    """
    page = mmap.PAGESIZE
    first, end = -(-weight.data_ptr() // page), (weight.data_ptr() + weight.nbytes) // page  # whole pages
    if weight.device.type != "cpu" or not weight.is_contiguous() or first >= end:
        return
    with contextlib.suppress(OSError), open("/proc/self/pagemap", "rb") as pages:
        pages.seek(8 * first)
        entries = np.frombuffer(pages.read(8 * (end - first)), dtype=np.uint64)
        held = entries >> np.uint64(62) != 0  # in memory or swapped out
        same = entries >> np.uint64(61) & np.uint64(1) == 1  # of a file, and as it is there
        if len(entries) == end - first and bool((same | ~held).all()):
            length = (end - first) * page
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def counted(x: Tensor, counts: Tensor) -> Tensor:
    """The positions that count, [n, features], of x [B, T, features] or [B·T, features]."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if bool(counts.all()) else flat[counts.flatten()]


class _Progress:
    """How far a walk in one direction has come, and what its observers have gathered, in one file.

    Args:
        path: of the file.
        identity: what it must have been written for, as JSON.
        observers: whose state is kept.
    """

    def __init__(self, path: Path, identity: list[Any], observers: Sequence[Observer]) -> None:
        self.path, self.observers = path, observers
        self.identity = digest_json([*identity, *([type(each).__qualname__, each.identity()] for each in observers)])

    def save(self, layer: int) -> None:
        """Replace the file."""
        tensors = {
            f"{number}/{name}": tensor.detach().cpu().contiguous()
            for number, observer in enumerate(self.observers)
            for name, tensor in observer.state().items()
        }
        metadata = {"identity": self.identity, "layer": str(layer)}
        write_atomically(self.path, lambda path: save_file(tensors, path, metadata))

    def restore(self) -> int | None:
        """The layer that was saved, observers having been restored; None where there is nothing to go on from."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self.identity:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError):
            return None
        for number, observer in enumerate(self.observers):
            start = f"{number}/"
            observer.restore({name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)})
        return int(metadata["layer"])


def _advancing(tensors: Iterator[Tensor], tracker: Tracker) -> Iterator[Tensor]:
    """The same, each of them a step of progress."""
    for tensor in tensors:
        yield tensor
        tracker.advance()
        _give_back()


def _give_back() -> None:
    """Let the C library return memory that is free; activations of all sizes would leave its heap full of holes."""
    with contextlib.suppress(AttributeError, OSError):  # another library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def _digest(batches: Sequence[tuple[Tensor, Tensor]]) -> str:
    return digest_json([[ids.tolist(), counts.tolist()] for ids, counts in batches])
