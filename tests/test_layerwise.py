"""One layer at a time computes what the whole model does, forwards and backwards, whole and resumed."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ModelMaker
from torch import Tensor

from edgerazor import models
from edgerazor.models import LayerwisePass, Observer

Batches = list[tuple[Tensor, Tensor]]


def some_batches() -> Batches:
    """Batches of different shapes, with padding on the right and positions that do not count."""
    draw = torch.Generator().manual_seed(3)
    batches = []
    for rows, length in ((2, 13), (3, 9), (2, 13), (1, 17)):
        ids = torch.randint(2, 60, (rows, length), generator=draw)
        counts = torch.ones(rows, length, dtype=torch.bool)
        if rows > 1:
            counts[0, length - 4 :] = False
            ids[0, length - 4 :] = 1
            counts[1, :3] = False
        batches.append((ids, counts))
    return batches


def upstream_of(walk: LayerwisePass) -> Any:
    """The gradient of the sum of squares of what enters the head, at the positions that count."""

    def upstream(number: int, states: Tensor) -> Tensor:
        states = states.requires_grad_()
        loss = walk.final(states)[walk.batches[number][1]].square().sum()
        return torch.autograd.grad(loss, states)[0]

    return upstream


class Everything(Observer):
    """Keeps all that it is told."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def layer(self, index: int, entering: Tensor, leaving: Tensor, counts: Tensor) -> None:
        self.keep(f"entering {index}", entering[counts])
        self.keep(f"leaving {index}", leaving[counts])

    def linear(self, path: str, x: Tensor) -> None:
        self.keep(f"input {path}", x)

    def final(self, x: Tensor) -> None:
        self.keep("final", x)

    def gradient(self, path: str, weight: Tensor, x: Tensor, g: Tensor) -> None:
        assert weight.shape == (g.shape[1], x.shape[1])
        self.keep(f"x {path}", x)
        self.keep(f"g {path}", g)

    def keep(self, name: str, value: Tensor) -> None:
        before = [self.kept[name]] if name in self.kept else []
        self.kept[name] = torch.cat([*before, value.clone()])

    def state(self) -> dict[str, Tensor]:
        return dict(self.kept)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.kept = dict(state)


def by_hooks(model: Any, batches: Batches) -> dict[str, Tensor]:
    """The same from ordinary passes of the whole model."""
    found = models.structure(model)
    seen = Everything()
    model.requires_grad_(True)
    counts = torch.empty(0)

    def hook(path: str) -> Any:
        def forward(_module: Any, args: tuple, output: Tensor) -> None:
            seen.keep(f"input {path}", args[0][counts].detach())
            seen.keep(f"x {path}", args[0].flatten(0, -2).detach())
            output.register_hook(lambda g: seen.keep(f"g {path}", g.flatten(0, -2)))

        return forward

    for site in found.linears:
        model.get_submodule(site.name).register_forward_hook(hook(site.name))
    for ids, mask in batches:
        counts = mask
        layers = range(found.layer_count + 1)
        with models.capture_hidden(model, found, layers) as hidden, models.final_states(model, found.head_path) as last:
            model(input_ids=ids, use_cache=False)
        seen.keep("final", last[0][counts].detach())
        hidden[0].retain_grad()
        last[0][counts].square().sum().backward()
        assert hidden[0].grad is not None
        seen.keep("returned", hidden[0].grad.flatten(0, 1))
        for index in range(found.layer_count):
            seen.keep(f"entering {index}", hidden[index][counts].detach())
            seen.keep(f"leaving {index}", hidden[index + 1][counts].detach())
    return seen.kept


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_sees_what_hooks_on_the_whole_model_see(make_model: ModelMaker, tmp_path: Path, family: str) -> None:
    make_model(tmp_path / "model", family)
    whole = models.load(tmp_path / "model")[0].double()
    walked, _ = models.load(tmp_path / "model")
    batches = some_batches()
    seen = Everything()
    walk = LayerwisePass(walked, models.structure(walked), batches, tmp_path / "walk", torch.float64)
    walk.forward(seen)
    walk.backward(upstream_of(walk), seen)
    for gradient in walk.returned():
        seen.keep("returned", gradient.flatten(0, 1))
    wanted = by_hooks(whole, batches)
    assert seen.kept.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(seen.kept[name], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_in_16_bits_it_is_walked_like_the_model_loaded_in_32(
    make_model: ModelMaker, tmp_path: Path, family: str
) -> None:
    make_model(tmp_path / "model", family, torch.bfloat16)
    whole, _ = models.load(tmp_path / "model", dtype=torch.float32)
    stored, _ = models.load(tmp_path / "model")
    found = models.structure(stored)
    before = {name: parameter.data_ptr() for name, parameter in stored.named_parameters()}
    seen = Everything()
    walk = LayerwisePass(stored, found, some_batches(), tmp_path / "walk")
    walk.forward(seen)
    walk.backward(upstream_of(walk), seen)
    wanted = by_hooks(whole, some_batches())
    for name in seen.kept:
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(seen.kept[name], wanted[name], rtol=1e-4, atol=1e-5 * scale)
        if not name.startswith(("g ", "x ")):
            assert torch.equal(seen.kept[name], wanted[name])
    for site in found.linears:  # the weights are the stored ones again, in their place in the file
        assert stored.get_parameter(f"{site.name}.weight").data_ptr() == before[f"{site.name}.weight"]
        assert stored.get_parameter(f"{site.name}.weight").dtype == torch.bfloat16


class StoppedError(Exception):
    """What ends a walk in the middle."""


class Stopping(Everything):
    """Raises at the n-th thing it is told."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def keep(self, name: str, value: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise StoppedError
        super().keep(name, value)


def walk_of(folder: Path, llama: Path, **options: Any) -> LayerwisePass:
    model, _ = models.load(llama)
    return LayerwisePass(model, models.structure(model), options.pop("batches", some_batches()), folder, **options)


def both_ways(walk: LayerwisePass, seen: Everything) -> int:
    """A walk forwards and backwards; how often `upstream` was called."""
    calls: list[int] = []
    upstream = upstream_of(walk)

    def counting(number: int, states: Tensor) -> Tensor:
        calls.append(number)
        return upstream(number, states)

    walk.forward(seen)
    walk.backward(counting, seen)
    return len(calls)


#: What is told forwards for a layer (4 batches of 7 inputs and 2 states), at the end, and backwards for a layer.
LAYER, END, BACK = 4 * (7 + 2), 4, 4 * 7 * 2
TOLD = 2 * LAYER + END + 2 * BACK


@pytest.mark.parametrize(
    ("after", "spared"),
    [
        (1, 0),
        (LAYER, 0),
        (LAYER + 1, LAYER),
        (2 * LAYER, LAYER),
        (2 * LAYER + 2, 2 * LAYER),
        (2 * LAYER + END + 1, 2 * LAYER + END),
        (TOLD - BACK, 2 * LAYER + END),
        (TOLD - BACK + 1, TOLD - BACK),
        (TOLD, TOLD - BACK),
    ],
)
def test_resumed_equals_uninterrupted(llama: Path, tmp_path: Path, after: int, spared: int) -> None:
    whole = Everything()
    assert both_ways(walk_of(tmp_path / "whole", llama), whole) == 4
    with pytest.raises(StoppedError):
        both_ways(walk_of(tmp_path / "walk", llama), Stopping(after))
    resumed = Stopping(0)
    assert both_ways(walk_of(tmp_path / "walk", llama), resumed) == 4 * (after <= 2 * LAYER + END)
    assert -resumed.left == TOLD - spared
    again = Stopping(0)
    assert both_ways(walk_of(tmp_path / "walk", llama), again) == again.left == 0  # all is done
    for seen in (resumed, again):
        assert seen.kept.keys() == whole.kept.keys()
        assert all(torch.equal(seen.kept[name], value) for name, value in whole.kept.items())
    assert not list((tmp_path / "walk").glob(".*"))


def test_what_another_walk_left_is_ignored(llama: Path, tmp_path: Path) -> None:
    folder, batches = tmp_path / "walk", some_batches()
    others: list[dict[str, Any]] = [
        {"identity": "other"},
        {"dtype": torch.float64},
        {"batches": [(ids + 1, counts) for ids, counts in batches]},
        {"batches": [(ids, ~counts) for ids, counts in batches]},
        {"batches": batches[:3]},
    ]
    for options in others:
        both_ways(walk_of(folder, llama), Everything())
        seen, fresh = Stopping(0), Everything()
        assert both_ways(walk_of(folder, llama, **options), seen) > 0
        both_ways(walk_of(tmp_path / "fresh", llama, **options), fresh)
        assert all(torch.equal(seen.kept[name], value) for name, value in fresh.kept.items())
    both_ways(walk_of(folder, llama), Everything())
    (folder / "forward.safetensors").write_bytes(b"damaged")
    seen = Stopping(0)
    both_ways(walk_of(folder, llama), seen)
    assert -seen.left == TOLD


def test_without_a_way_back_the_states_of_two_layers_are_on_the_disk_at_most(llama: Path, tmp_path: Path) -> None:
    most: list[int] = []

    class Counting(Observer):
        def layer(self, *_: Any) -> None:
            most.append(len(list((tmp_path / "walk").glob("*.raw"))))

    walk = walk_of(tmp_path / "walk", llama)
    walk.forward(Counting(), keep=False)
    assert max(most) == 1  # and the one that is being written
    assert [path.name for path in (tmp_path / "walk").glob("*.raw")] == ["entering-2.raw"]
    walk.clear()
    assert not (tmp_path / "walk").exists()


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="asks Linux what its pages of memory are")
def test_pages_of_a_mapped_weight_are_given_back_and_nothing_is_lost(tmp_path: Path) -> None:
    values = torch.arange(1 << 18, dtype=torch.float32)
    values.numpy().tofile(tmp_path / "weights")

    def mapped() -> Tensor:
        return torch.from_file(str(tmp_path / "weights"), shared=False, size=len(values)).view(512, 512)

    def in_memory(weight: Tensor) -> int:
        """Bytes of it that this process holds."""
        first, pages = weight.data_ptr() // mmap.PAGESIZE, weight.nbytes // mmap.PAGESIZE
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(8 * first)
            return int((np.frombuffer(file.read(8 * pages), np.uint64) >> np.uint64(63)).sum()) * mmap.PAGESIZE

    weight = mapped()
    assert torch.equal(weight.flatten(), values)
    assert in_memory(weight) == weight.nbytes
    models.drop_pages(weight)
    assert in_memory(weight) == 0
    assert torch.equal(weight.flatten(), values)
    written, own = mapped(), values.clone()
    written[100, 100] = 7
    models.drop_pages(written)
    models.drop_pages(own)
    models.drop_pages(weight[3:5, 1:])  # no whole matrix
    assert written[100, 100] == 7
    assert torch.equal(own, values)
