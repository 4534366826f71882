"""Scales by clipping and codes by GPTQ: initializations that are better than rounding to nearest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.formats.core import gptq as gptq_module
from helpers.tiny_models import mostly_slow

ALL = formats.names()
ROWS = 18
#: columns, group size: tails, groups longer and shorter than a lazy block, whole rows, single columns
SHAPES = [(1, 8), (31, 8), (101, 40), (130, 64), (300, 129), (257, 1000)]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def specs(cols: int, group_size: int) -> dict[str, MatrixSpec]:
    """Every format alone, all of them in rows, in blocks, and in blocks that are alike in all rows."""
    names, groups = tuple(ALL), formats.group_count(cols, group_size)
    each = {name: MatrixSpec((name,), group_size) for name in ALL}
    each["rows"] = MatrixSpec(names, group_size, (torch.arange(ROWS) * 3 % len(names)).to(torch.uint8))
    blocks = torch.arange(ROWS * groups).view(ROWS, groups) * 5 % len(names)
    each["blocks"] = MatrixSpec(names, group_size, block_formats=blocks.to(torch.uint8))
    each["columns"] = MatrixSpec(names, group_size, block_formats=blocks[:1].to(torch.uint8))
    return each


def correlated(cols: int, seed: int = 0) -> Tensor:
    """The Hessian, float64 [cols, cols], of inputs that go together and are of very different size."""
    mixing = weights(cols, cols, seed=seed).double() * torch.logspace(0, -2, cols, dtype=torch.float64)
    x = weights(4 * cols, cols, seed=seed + 1).double() @ mixing.T
    return x.T @ x / len(x)


def output_error(w: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T)."""
    wrong = (decoded - w).double()
    return float((wrong @ hessian.double() * wrong).sum())


def group_errors(w: Tensor, decoded: Tensor, importance: Tensor, group_size: int) -> Tensor:
    """float64 [rows, groups]."""
    wrong = (decoded - w).double().square() * importance.double()
    return torch.stack([part.sum(1) for part in wrong.split(min(group_size, w.shape[1]), dim=1)], dim=1)


def least_by_brute_force(w: Tensor, importance: Tensor, name: str) -> float:
    """The least weighted error of one group [1, n] at any fp16 scale from 2^-9 to 2^3."""
    scales = torch.arange(0x1800, 0x4800, dtype=torch.int16).view(torch.float16)
    rounded = formats.quantize_dequantize(
        w.expand(len(scales), -1), MatrixSpec((name,), w.shape[1]), scales=scales[:, None]
    )
    return float(((rounded - w).double().square() * importance).sum(1).min())


# Clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cols", "group_size"), SHAPES)
def test_clipping_is_never_worse_than_the_rule(cols: int, group_size: int) -> None:
    w = weights(ROWS, cols) ** 3 / 10  # many small ones, and some far out
    w[0], w[1, :] = 0, 1e-7
    for importance in (None, weights(cols, seed=1).square(), torch.zeros(cols)):
        alike = torch.ones(cols) if importance is None else importance
        for name, spec in specs(cols, group_size).items():
            scales = formats.search_scales(w, spec, importance)
            assert scales.dtype == torch.float16
            assert bool((scales > 0).all())
            ours = group_errors(w, formats.quantize_dequantize(w, spec, scales=scales), alike, group_size)
            rule_spec = replace(spec, published=True)
            rule = group_errors(w, formats.quantize_dequantize(w, rule_spec), alike, group_size)
            assert bool((ours <= rule * (1 + 1e-6) + cols * 2e-15).all()), name
            if importance is not None and not importance.any():
                assert torch.equal(scales, formats.stored_scales(formats.encode_matrix(w, rule_spec).scales)), name


@pytest.mark.parametrize("name", ALL)
def test_clipping_finds_nearly_the_least_error_there_is(name: str) -> None:
    """On average within 2 % of the best of all fp16 scales, 10 % at worst; among 255 codes there are many minima."""
    over = []
    for seed in range(12):
        w, importance = weights(1, 64, seed=seed), weights(64, seed=seed + 50).square()
        if seed % 3 == 0:
            w[0, 5] *= 8
        spec = MatrixSpec((name,), 64)
        rounded = formats.quantize_dequantize(w, spec, scales=formats.search_scales(w, spec, importance))
        error = float(((rounded - w).double().square() * importance).sum())
        over.append(error / least_by_brute_force(w, importance, name))
    mean, worst = (1.25, 1.7) if name == "int8" else (1.02, 1.10)
    assert sum(over) / len(over) < mean
    assert max(over) < worst


def test_clipping_by_hand() -> None:
    """One weight alone, or alone of importance, is exact; four of two sizes are met by int2's levels."""
    one = torch.tensor([[0.75, 0.0, 0.0, 0.0]])
    for name in ALL:
        spec = MatrixSpec((name,), 4)
        rounded = formats.quantize_dequantize(
            one, spec, scales=formats.search_scales(one, spec, torch.tensor([1.0, 0, 0, 0]))
        )
        assert abs(float(rounded[0, 0]) - 0.75) < 1e-3, name
    w = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) * 0.3
    assert formats.search_scales(w, MatrixSpec(("int2",), 4)).item() == torch.tensor(0.3).half().item()
    w = torch.tensor([[0.5, -0.5, 0.0, 0.0, 0.0, 0.0]])  # the rule's 2 * mean|w| is 1/3
    assert formats.search_scales(w, MatrixSpec(("ternary",), 6)).item() == 0.5


def test_blocks_are_clipped_like_matrices_of_their_own() -> None:
    w, importance = weights(ROWS, 101), weights(101, seed=1).square()
    spec = specs(101, 40)["blocks"]
    assert spec.block_formats is not None
    scales = formats.search_scales(w, spec, importance)
    for row in range(ROWS):
        for index in range(3):
            part = slice(40 * index, 40 * index + 40)
            alone = MatrixSpec((spec.formats[int(spec.block_formats[row, index])],), 40)
            assert torch.equal(
                scales[row, index], formats.search_scales(w[row : row + 1, part], alone, importance[part])[0, 0]
            )


def test_small_blocks_of_memory_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance, each = weights(ROWS, 101), weights(101, seed=1).square(), specs(101, 40)
    whole = {name: formats.search_scales(w, spec, importance) for name, spec in each.items()}
    monkeypatch.setattr("edgerazor.formats.core.base.BLOCK", 256)
    assert all(torch.equal(formats.search_scales(w, spec, importance), whole[name]) for name, spec in each.items())


def test_clipping_refuses_what_it_cannot_use() -> None:
    spec = MatrixSpec(("int4",), 4)
    w = weights(2, 6)
    with pytest.raises(ValueError, match=r"importance must be \[6\]"):
        formats.search_scales(w, spec, torch.ones(5))
    for bad in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="negative or not finite"):
            formats.search_scales(w, spec, torch.tensor([1, 1, 1, 1, 1, bad]))
    w[1, 5] = torch.nan
    for name in ALL:
        with pytest.raises(ValueError, match="a weight is not finite"):
            formats.search_scales(w, MatrixSpec((name,), 4))


# Compensation -----------------------------------------------------------------------------------------------------


def gptq(w: Tensor, spec: MatrixSpec, hessian: Tensor, scales: Tensor) -> Tensor:
    """GPTQ at given scales, as its paper derives it: column by column, the inverse of what is left each time.

    Returns:
        decoded weights, float64 [rows, cols].
    """
    left, cols = w.double().clone(), w.shape[1]
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(cols, dtype=torch.float64)
    decoded = torch.empty_like(left)
    for j in range(cols):
        inverse = torch.linalg.inv(damped[j:, j:])
        decoded[:, j] = formats.quantize_dequantize(left.float(), spec, scales=scales)[:, j].double()
        error = (left[:, j] - decoded[:, j]) / inverse[0, 0]
        left[:, j:] -= error[:, None] * inverse[0]
    return decoded


@pytest.mark.parametrize("shape", mostly_slow(SHAPES, *SHAPES[1:4]), ids=str)
def test_rounding_the_master_gives_gptqs_codes(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit those that were chosen column by column on the way."""
    cols, group_size = shape
    w, hessian, rounded = weights(ROWS, cols), correlated(cols), gptq_module._rounded
    for name, spec in specs(cols, group_size).items():
        chosen: list[Tensor] = []

        def noting(column: Tensor, parts: Any, chosen: list[Tensor] = chosen) -> Tensor:
            chosen.append(rounded(column, parts))
            return chosen[-1].clone()

        with monkeypatch.context() as patch:
            patch.setattr(gptq_module, "_rounded", noting)
            master, scales = formats.gptq_quantize(w, spec, hessian)
        assert (master.dtype, scales.dtype) == (torch.float32, torch.float16)
        again = formats.quantize_dequantize(master, spec, scales=scales)
        assert torch.equal(again, torch.stack(chosen, dim=1)), name
        assert torch.equal(formats.encode_matrix(master, spec, scales).scales, scales), name
        plain, same = formats.gptq_quantize(w, spec, hessian)
        assert torch.equal(plain, master), name
        assert torch.equal(same, scales), name


@pytest.mark.parametrize(("cols", "group_size"), [(31, 8), (101, 40), (140, 130)])
def test_it_is_gptq(cols: int, group_size: int) -> None:
    w, hessian = weights(ROWS, cols), correlated(cols)
    for name, spec in specs(cols, group_size).items():
        master, scales = formats.gptq_quantize(w, spec, hessian)
        ours, paper = formats.quantize_dequantize(master, spec, scales=scales), gptq(w, spec, hessian, scales)
        different = float((ours.double() != paper).double().mean())  # float32 decides a few ties otherwise
        assert different < 0.01, name


def test_compensation_lowers_the_error_of_correlated_inputs() -> None:
    w, hessian = weights(ROWS, 256), correlated(256)
    for name, spec in specs(256, 64).items():
        master, scales = formats.gptq_quantize(w, spec, hessian)
        ours = output_error(w, formats.quantize_dequantize(master, spec, scales=scales), hessian)
        best = formats.search_scales(w, spec, hessian.diagonal())
        assert ours < 0.5 * output_error(w, formats.quantize_dequantize(w, spec, scales=best), hessian), name
        assert ours < 0.5 * output_error(w, formats.quantize_dequantize(w, spec), hessian), name


def test_a_layer_makes_up_for_what_earlier_ones_did_to_its_input() -> None:
    """The goal is the output of the unrounded input: without rounding, the least squares of numpy."""
    w, hessian = weights(ROWS, 64), correlated(64)
    unrounded = weights(512, 64, seed=5).double() @ torch.linalg.cholesky(hessian).T
    x = 0.8 * unrounded + 0.1 * weights(512, 64, seed=6).double() * unrounded.std(0)
    second, drift = x.T @ x / len(x), (unrounded - x).T @ x / len(x)
    wanted = unrounded @ w.double().T

    def error(chosen: Tensor) -> float:
        return float((x @ chosen.double().T - wanted).square().mean())

    moved = gptq_module._moved(w, second, drift)
    damped = second + gptq_module.DAMPING * second.diagonal().mean() * torch.eye(64)
    whole = w.double() @ (unrounded.T @ x / len(x) + damped - second) @ torch.linalg.inv(damped)
    torch.testing.assert_close(moved, (w + gptq_module.DRIFT_SHARE * (whole - w)).float())
    assert error(whole) < error(moved) < 0.7 * error(w)
    for name, spec in specs(64, 32).items():
        found = []
        for known in (drift, None):
            master, scales = formats.gptq_quantize(w, spec, second, known)
            found.append(error(formats.quantize_dequantize(master, spec, scales=scales)))
        assert found[0] < found[1], name
    master, scales = formats.gptq_quantize(w, specs(64, 32)["rows"], second, torch.zeros(64, 64))
    plain, same = formats.gptq_quantize(w, specs(64, 32)["rows"], second)
    assert torch.equal(master, plain)
    assert torch.equal(scales, same)


def test_independent_inputs_leave_clipped_rounding() -> None:
    """Powers of four, so that the damped diagonal is found again exactly."""
    w, diagonal = weights(ROWS, 101), 4.0 ** (torch.arange(101) % 5)
    damped = diagonal + 0.01 * diagonal.double().mean().float()
    for name, spec in specs(101, 40).items():
        master, scales = formats.gptq_quantize(w, spec, torch.diag(diagonal))
        assert torch.equal(master, w), name
        assert torch.equal(scales, formats.search_scales(w, spec, damped)), name


def test_dead_columns_move_nothing_and_stay() -> None:
    w, hessian, spec = weights(ROWS, 101), correlated(101), specs(101, 40)["rows"]
    dead = torch.tensor([0, 39, 40, 77, 100])
    hessian[dead], hessian[:, dead] = 0, 0
    master, scales = formats.gptq_quantize(w, spec, hessian)
    assert torch.equal(master[:, dead], w[:, dead])
    assert not torch.equal(master, w)
    ours = output_error(w, formats.quantize_dequantize(master, spec, scales=scales), hessian)
    assert ours < 0.5 * output_error(w, formats.quantize_dequantize(w, spec), hessian)
    silent, scales = formats.gptq_quantize(w, spec, torch.zeros(101, 101))
    assert torch.equal(silent, w)
    assert torch.equal(scales, formats.search_scales(w, spec))


def test_compensation_refuses_what_it_cannot_use() -> None:
    w, spec = weights(2, 6), MatrixSpec(("int4",), 4)
    with pytest.raises(ValueError, match=r"must be \[6, 6\]"):
        formats.gptq_quantize(w, spec, torch.eye(5))
    for bad in (-torch.eye(6), torch.full((6, 6), torch.nan), torch.ones(6, 6) - 2 * torch.eye(6)):
        with pytest.raises(ValueError, match="not finite or not positive"):
            formats.gptq_quantize(w, spec, bad)
    with pytest.raises(ValueError, match="a weight is not finite"):
        formats.gptq_quantize(w.fill_(torch.inf), spec, torch.eye(6))


def test_the_given_weights_stay_as_they_are() -> None:
    for w in (weights(1, 31), weights(5, 1), weights(5, 31).bfloat16()):
        before, spec = w.clone(), MatrixSpec(("int3",), 8)
        formats.search_scales(w, spec)
        formats.gptq_quantize(w, spec, correlated(w.shape[1]))
        assert torch.equal(w, before)


def test_stored_scales_give_the_codes_again() -> None:
    """`encode(w, scale)` of what a training starts from is the start."""
    w = weights(ROWS, 101)
    for name, spec in specs(101, 40).items():
        scales = formats.search_scales(w, spec)
        encoded = formats.encode_matrix(w, spec, formats.stored_scales(scales.float()))
        assert torch.equal(encoded.scales, scales), name
        parts = formats.pack_matrix(encoded, spec)
        again, _ = formats.unpack_matrix(parts, spec.formats, 40, (ROWS, 101))
        assert all(torch.equal(one, other) for one, other in zip(Encoded(*again), encoded, strict=True)), name
