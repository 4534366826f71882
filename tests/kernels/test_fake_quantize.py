"""Rounding with trained scales in the native library: what PyTorch computes, to the bit."""

from __future__ import annotations

import pytest
import torch

from edgerazor import formats, kernels
from edgerazor.formats import MatrixSpec
from edgerazor.formats.core import lsq
from edgerazor.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"there is no native library: {native.missing()}")

SHAPES = [(7, 64, 64), (33, 100, 32), (5, 17, 16), (3, 300, 128), (6, 5, 5), (40, 576, 64)]


def spec_of(rows: int, group_size: int, *names: str) -> MatrixSpec:
    row_formats = (torch.arange(rows) * 7 % 5 % len(names)).to(torch.uint8) if len(names) > 1 else None
    return MatrixSpec(names, group_size, row_formats=row_formats)


def weight_and_scales(rows: int, columns: int, spec: MatrixSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of many magnitudes, some exactly between two levels; scales from the smallest to large ones."""
    torch.manual_seed(rows * columns)
    w = torch.randn(rows, columns) * torch.logspace(-6, 3, rows).unsqueeze(1)
    scales = lsq.initial_scales(w, spec) * (0.5 + torch.rand(rows, formats.group_count(columns, spec.group_size)))
    scales[0, 0] = 1e-30
    held = formats.stored_scales(scales).float()
    w[-1, :3] = held[-1, 0] * torch.tensor([0.5, -1.5, 1.0])
    w[1, 0] = -0.0
    return w, scales


@pytest.mark.parametrize("isa", range(len(native.isas())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("ternary", "int2", "int3", "int4", "int8"), ("int2",), ("int2z", "int5")])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_rounds_as_pytorch(
    rows: int, columns: int, group_size: int, names: tuple[str, ...], dtype: torch.dtype, isa: int
) -> None:
    spec = spec_of(rows, group_size, *names)
    w, scales = weight_and_scales(rows, columns, spec)
    stored = formats.stored_scales(scales)
    expected = formats.quantize_dequantize(w, spec, dtype, stored)
    for threads in (1, 3):
        rounded = native.round_weights(w, stored.float(), spec, dtype, isa, threads)
        as_integers = torch.int16 if dtype == torch.bfloat16 else torch.int32
        assert torch.equal(rounded.view(as_integers), expected.view(as_integers))  # zeros have one sign


@pytest.mark.parametrize("isa", range(len(native.isas())))
@pytest.mark.parametrize("names", [("ternary", "int2", "int3", "int4", "int8"), ("int2",), ("int2z", "int5")])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_gradients_are_those_of_pytorch(
    rows: int, columns: int, group_size: int, names: tuple[str, ...], isa: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(rows, group_size, *names)
    w, scales = weight_and_scales(rows, columns, spec)
    upstream = torch.randn(rows, columns)
    monkeypatch.setattr(lsq, "_accelerated", [])
    leaf_w, leaf_scales = w.clone().requires_grad_(), scales.clone().requires_grad_()
    formats.ste_target(leaf_w, leaf_scales, spec).backward(upstream)
    held = formats.stored_scales(scales).float()
    to_w, to_scales = native.learned_gradients(upstream, w, held, spec, isa)
    assert torch.equal(to_w, leaf_w.grad)
    torch.testing.assert_close(to_scales, leaf_scales.grad, rtol=1e-5, atol=1e-5)
    again = native.learned_gradients(upstream, w, held, spec, 0, threads=2)
    assert all(torch.equal(one, other) for one, other in zip(again, (to_w, to_scales), strict=True))  # on all machines


def test_training_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(8, 32, "ternary", "int3")
    w, scales = weight_and_scales(8, 64, spec)
    monkeypatch.setattr(kernels, "is_native", lambda: False)
    expected = formats.learned_weight(w, scales, spec)
    monkeypatch.undo()
    if not kernels.is_native():
        pytest.skip("other kernels were chosen")
    calls = []
    original = native.round_weights
    monkeypatch.setattr(native, "round_weights", lambda *arguments: calls.append(1) or original(*arguments))
    assert torch.equal(formats.learned_weight(w, scales, spec), expected)
    assert torch.equal(formats.learned_weight(w.double(), scales, spec), expected)  # not natively
    assert len(calls) == 1


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("column", [0, 63, 70])
def test_refuses_what_is_not_finite(bad: float, column: int) -> None:
    spec = spec_of(8, 32, "ternary", "int2")
    w, scales = weight_and_scales(8, 71, spec)
    w[5, column] = bad
    with pytest.raises(ValueError, match="a weight is not finite"):
        formats.learned_weight(w, scales, spec)
    for isa in range(len(native.isas())):
        with pytest.raises(ValueError, match="a weight is not finite"):
            native.round_weights(w, formats.stored_scales(scales).float(), spec, torch.bfloat16, isa)


def test_gradients_that_are_not_finite_stay_so() -> None:
    """The step is skipped because of them, wherever they are."""
    spec = spec_of(4, 32, "ternary")
    w, scales = weight_and_scales(4, 32, spec)
    upstream = torch.zeros(4, 32)
    upstream[2] = torch.nan
    to_w, to_scales = native.learned_gradients(upstream, w, formats.stored_scales(scales).float(), spec)
    assert to_w[2].isnan().all()
    assert to_scales[2].isnan().all()
    assert to_w[[0, 1, 3]].isfinite().all()
