"""Rungs of one training: codes that are fixed for a while, and what follows them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GROUP_SIZE, VOCABULARY, family_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor import formats, models, surgery
from edgerazor.allocate import make_plan
from edgerazor.formats import MatrixSpec
from edgerazor.recipe import Calibrate
from edgerazor.surgery import Settings

ALL = formats.names()
IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


# Weights that follow their scales ---------------------------------------------------------------------------------


def specs(rows: int, cols: int, group_size: int) -> list[MatrixSpec]:
    """Every format alone, all of them in the rows, and all of them in the blocks."""
    groups = formats.group_count(cols, group_size)
    mixed = (torch.arange(rows) * 3 % len(ALL)).to(torch.uint8)
    blocks = (torch.arange(rows * groups).view(rows, groups) * 5 % len(ALL)).to(torch.uint8)
    return [
        *(MatrixSpec((name,), group_size) for name in ALL),
        MatrixSpec(tuple(ALL), group_size, mixed),
        MatrixSpec(tuple(ALL), group_size, block_formats=blocks),
    ]


def on_the_edges(rows: int, cols: int, scales: Tensor, group_size: int) -> Tensor:
    """Weights on and a float beside every boundary between two codes, where one rounding decides."""
    spread = scales.float().repeat_interleave(group_size, dim=1)[:, :cols]
    steps = (torch.arange(rows * cols).view(rows, cols) % 37 - 18) / 2
    weight = steps * spread
    towards = torch.tensor([-1e9, 0.0, 1e9])[torch.arange(rows * cols).view(rows, cols) % 3]
    return torch.where(towards == 0, weight, torch.nextafter(weight, towards))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (13, 31), (17, 101), (40, 127)])
@pytest.mark.parametrize("group_size", [5, 40, 1000])
def test_a_carried_weight_has_exactly_the_fixed_codes(rows: int, cols: int, group_size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for spec in specs(rows, cols, group_size):
        shape = (rows, formats.group_count(cols, group_size))
        before = formats.stored_scales(torch.rand(shape, generator=draw) + 0.01)
        for width in (0.01, 0.3, 4.0):
            after = formats.stored_scales(before.float() * torch.exp(width * torch.randn(shape, generator=draw)))
            for w in (torch.randn(rows, cols, generator=draw), on_the_edges(rows, cols, before, group_size)):
                codes = formats.encode_matrix(w, spec, before).codes
                carried = formats.carried_weight(w, codes, before, after, spec)
                found = formats.encode_matrix(carried, spec, after)
                assert torch.equal(found.codes, codes)
                assert torch.equal(found.scales, after)
                spread = (after.double() / before.double()).repeat_interleave(min(group_size, cols), dim=1)[:, :cols]
                torch.testing.assert_close(carried.double(), w.double() * spread, rtol=1e-6, atol=1e-40)


@pytest.mark.parametrize("name", ALL)
def test_scales_that_stay_leave_weights_alone(name: str) -> None:
    spec, w = MatrixSpec((name,), 8), torch.randn(7, 29, generator=torch.Generator().manual_seed(0))
    scales = formats.stored_scales(formats.initial_scales(w, spec))
    codes = formats.encode_matrix(w, spec, scales).codes
    assert torch.equal(formats.carried_weight(w, codes, scales, scales, spec), w)


@pytest.mark.parametrize("name", ALL)
def test_extreme_scales(name: str) -> None:
    """From the smallest scale to the largest and back; weights of denormal size and far out of range."""
    spec = MatrixSpec((name,), 4)
    w = torch.tensor([[1e-45, -1e-45, 0.0, -0.0], [1e6, -1e6, 3e-39, -3e-39]])
    ends = [formats.stored_scales(torch.full((2, 1), value)) for value in (0.0, 1e9)]
    for before, after in (ends, ends[::-1]):
        codes = formats.encode_matrix(w, spec, before).codes
        carried = formats.carried_weight(w, codes, before, after, spec)
        assert torch.equal(formats.encode_matrix(carried, spec, after).codes, codes)


# Modules ----------------------------------------------------------------------------------------------------------


def student(tied: bool, **calibrate: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config("llama", tie_word_embeddings=tied)).eval()
    found = models.structure(model)
    plan = make_plan(found.sites, Calibrate(bits=1.88, group_size=GROUP_SIZE, **calibrate))
    surgery.prepare_for_training(model, found, plan.specs(), Settings(8, 8, GROUP_SIZE, True))
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("granularity", ["row", "block", "column"])
@pytest.mark.parametrize("tied", [True, False])
def test_fixing_and_releasing_codes_change_nothing_that_is_computed(tied: bool, granularity: str) -> None:
    model = student(tied, granularity=granularity)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = logits(model)
    surgery.fix_codes(model)
    assert torch.equal(logits(model), first)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.scales" for name in surgery.training_matrices(model)}
    surgery.release_codes(model)
    for name, parameter in model.named_parameters():  # no scale has changed
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name]), name

    surgery.fix_codes(model)
    with torch.no_grad():
        for matrix in surgery.training_matrices(model).values():
            assert matrix.scales is not None
            matrix.scales.mul_(torch.exp(0.2 * torch.randn_like(matrix.scales)))
    moved = logits(model)
    with surgery.frozen_codes(model) as digests:
        fixed = dict(digests)
    surgery.fix_codes(model)  # a second time: nothing
    surgery.release_codes(model)
    assert not torch.equal(moved, first)
    assert torch.equal(logits(model), moved)
    with surgery.frozen_codes(model) as digests:
        assert digests == fixed
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if tied:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert table.weight is head.weight
