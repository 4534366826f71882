"""One layer at a time computes what the whole model does, forwards and backwards, whole and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ModelMaker
from torch import Tensor

from edgerazor import models
from edgerazor.models import Observer, Walk

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


def upstream_of(walk: Walk) -> Any:
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
            seen.keep(f"x {path}", args[0][counts].detach())
            mask = counts
            output.register_hook(lambda g: seen.keep(f"g {path}", g[mask]))

        return forward

    for site in found.linears:
        model.get_submodule(site.name).register_forward_hook(hook(site.name))
    for ids, mask in batches:
        counts = mask
        layers = range(found.layer_count + 1)
        with models.capture_hidden(model, found, layers) as hidden, models.final_states(model, found.head_path) as last:
            model(input_ids=ids, use_cache=False)
        last[0][counts].square().sum().backward()
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
    walk = Walk(walked, models.structure(walked), batches, tmp_path / "walk", torch.float64)
    walk.forward(seen)
    walk.backward(upstream_of(walk), seen)
    wanted = by_hooks(whole, batches)
    assert seen.kept.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(seen.kept[name], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()))
