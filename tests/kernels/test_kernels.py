"""The definition of products with packed matrices, against a loop over groups; implementations against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgerazor import formats, kernels
from edgerazor.errors import USAGE, UserError
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.kernels import StoredMatrix, native, reference

ALL = formats.names()
SIZES = [1, 3, 31, 33, 127, 172, 960]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def specs(rows: int, columns: int, group_size: int) -> list[MatrixSpec]:
    """Rows of all formats, blocks of all formats, and each format alone."""
    mixed = (torch.arange(rows) * 5 % len(ALL)).to(torch.uint8)
    groups = formats.group_count(columns, group_size)
    blocks = (torch.arange(rows * groups).view(rows, groups) * 5 % len(ALL)).to(torch.uint8)
    return [
        MatrixSpec(tuple(ALL), group_size, mixed),
        MatrixSpec(tuple(ALL), group_size, block_formats=blocks),
        *(MatrixSpec((name,), group_size) for name in ALL),
    ]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of float32 sums, relative to the largest result."""
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def by_definition(x: Tensor, encoded: Encoded, spec: MatrixSpec, bits: int, group: int) -> Tensor:
    """y[t, o] as sums of integers, column by column in float64."""
    codes, scales = formats.quantize_activations(x, bits, group)
    column = torch.arange(x.shape[-1])
    activations = codes.double() * scales[..., column // group].double()
    offsets = {"int2": 0.5}  # levels lie between the codes
    indices = torch.zeros(encoded.codes.shape, dtype=torch.int64)
    if spec.row_formats is not None:
        indices += spec.row_formats[:, None]
    if spec.block_formats is not None:
        indices += spec.block_formats[:, column // spec.group_size]
    offset = torch.tensor([offsets.get(name, 0.0) for name in spec.formats])[indices]
    w = (encoded.codes.double() + offset) * encoded.scales[:, column // spec.group_size].double()
    return (activations[..., None, :] * w).sum(-1).float()


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("group_size", [64, 256])
@pytest.mark.parametrize("activation_group", [64, 100, 256])
def test_all_implementations_follow_the_definition(
    columns: int, group_size: int, activation_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, bias = weights(2, 3, columns), weights(9, columns, seed=1), weights(9, seed=2)
    for spec in specs(9, columns, group_size):
        encoded = formats.encode_matrix(w, spec)
        for bits in (4, 8):
            expected = by_definition(x, encoded, spec, bits, activation_group) + bias
            assert close(reference.linear(x, encoded, spec, bias, bits, activation_group), expected)
            for name in kernels.names():
                monkeypatch.setenv("EDGERAZOR_ISA", name)
                assert close(kernels.linear(x, encoded, spec, bias, bits, activation_group), expected), name
        plain = torch.nn.functional.linear(x, formats.decode_matrix(encoded, spec), bias)
        for name in kernels.names():
            monkeypatch.setenv("EDGERAZOR_ISA", name)
            assert close(kernels.linear(x, encoded, spec, bias, 16), plain), name


def test_a_product_of_integers_is_exact() -> None:
    """Scales that are powers of two leave nothing to round: both ways give the integer result exactly."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-7, 8, (5, 96), generator=generator).float()
    w[:, ::32] = 7
    x = torch.randint(-127, 128, (4, 96), generator=generator).float()
    x[:, ::32] = 127
    spec = MatrixSpec(("int4",), 32)
    encoded = formats.encode_matrix(w, spec)
    assert torch.equal(reference.linear(x, encoded, spec, None, 8, 32), x @ w.T)
    assert torch.equal(reference.decoded_linear(x, formats.decode_matrix(encoded, spec), None, 8, 32), x @ w.T)


def test_training_computes_what_the_packed_matrix_computes() -> None:
    x, w = weights(7, 172), weights(9, 172, seed=1)
    for spec in specs(9, 172, 64)[:2]:
        trained = torch.nn.functional.linear(
            formats.fake_quantize_activations(x, 8, 64), formats.fake_quantize_matrix(w, spec)
        )
        assert torch.equal(kernels.linear(x, formats.encode_matrix(w, spec), spec, None, 8, 64), trained)


def test_shapes_dtypes_and_autocast_of_the_input() -> None:
    w, spec = weights(9, 33, seed=1), MatrixSpec(("ternary",), 64)
    encoded = formats.encode_matrix(w, spec)
    x = weights(6, 33).bfloat16()
    expected = reference.linear(x.float(), encoded, spec)
    for function in (reference.linear, kernels.linear):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert close(function(x, encoded, spec), expected)
        assert close(function(x.view(2, 3, 33), encoded, spec).view(6, 9), expected)
        assert close(function(x[0], encoded, spec), expected[0])
        assert function(x[:0], encoded, spec).shape == (0, 9)
        with pytest.raises(ValueError, match="33 columns, but its input has 32"):
            function(x[:, :32], encoded, spec)


def test_embedding_rows_are_the_decoded_rows() -> None:
    for spec in specs(20, 100, 64):
        encoded = formats.encode_matrix(weights(20, 100), spec)
        table = formats.decode_matrix(encoded, spec)
        ids = torch.tensor([[3, 19, 3], [0, 7, 1]])
        for each in (ids, ids[0, 0], ids[:0]):
            assert torch.equal(kernels.embedding(each, encoded, spec), table[each])


def test_slow_kernels_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERAZOR_ISA", "reference")
    assert kernels.note("avx512") is None
    if native.isas():
        assert "EDGERAZOR_ISA asks for them" in str(kernels.note("reference"))
        monkeypatch.setenv("EDGERAZOR_ISA", "portable")
        assert "do not compute formats of blocks" in str(kernels.note("portable, reference"))
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "isas", lambda: ())
    monkeypatch.delenv("EDGERAZOR_ISA")
    assert kernels.name() == "reference"
    assert "with `python -m edgerazor.kernels.build`" in str(kernels.note("reference"))


@pytest.mark.skipif(not native.isas(), reason="no library: there was no C++ compiler")
@pytest.mark.parametrize("name", native.isas())
def test_stored_matrices_follow_the_definition_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ternary codes among others, of which some machines keep other bytes; stored scales; many tokens and one."""
    monkeypatch.setenv("EDGERAZOR_ISA", name)
    x, w, bias = weights(2, 3, 172), weights(83, 172, seed=1), weights(83, seed=2)
    mixed = (torch.arange(83) * 5 % len(ALL)).to(torch.uint8)
    for spec in (MatrixSpec(tuple(ALL), 64, mixed), MatrixSpec(("ternary",), 64)):
        encoded = formats.encode_matrix(w, spec)
        matrix = StoredMatrix(formats.pack_matrix(encoded, spec), spec, (83, 172))
        for bits, scale in ((8, None), (4, None), (8, 0.02)):
            expected = reference.linear(x, encoded, spec, bias, bits, 64, scale)
            assert torch.equal(matrix.linear(x, bias, bits, 64, scale), expected)
            assert torch.equal(matrix.linear(x[1, 2], bias, bits, 64, scale), expected[1, 2])
        assert torch.equal(
            matrix.linear(x.bfloat16(), None, 8, 64), reference.linear(x.bfloat16(), encoded, spec, None, 8, 64)
        )
        ids = torch.tensor([[3, 82], [0, 7]])
        assert torch.equal(matrix.embedding(ids), reference.embedding(ids, encoded, spec))


@pytest.mark.skipif(not native.isas(), reason="no library: there was no C++ compiler")
def test_stored_matrices_give_nan_for_tokens_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERAZOR_ISA", native.isas()[-1])
    spec = MatrixSpec(("int4",), 64)
    parts = formats.pack_matrix(formats.encode_matrix(weights(20, 100), spec), spec)
    matrix, x = StoredMatrix(parts, spec, (20, 100)), weights(4, 100, seed=1)
    expected = matrix.linear(x, None, 8, 64)
    x[1, 7], x[3, 99] = torch.nan, torch.inf
    y = matrix.linear(x, None, 8, 64)
    assert y[1::2].isnan().all()
    assert torch.equal(y[::2], expected[::2])
    for wrong in (-1.0, torch.nan, torch.inf):
        scales = parts["int4.scales"].clone()
        scales[1, 0, 2] = wrong
        with pytest.raises(ValueError, match="a scale is negative or not finite"):
            StoredMatrix({**parts, "int4.scales": scales}, spec, (20, 100))


def test_the_environment_chooses_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGERAZOR_ISA", raising=False)
    assert kernels.name() == kernels.names()[-1]
    assert kernels.is_native() == (len(native.isas()) > 1)
    assert kernels.names()[: 2 + len(native.isas()[:1])] == ["integer", *native.isas()[:1], "reference"]
    for name in native.isas():
        monkeypatch.setenv("EDGERAZOR_ISA", name)
        assert kernels.name() == name
        assert kernels.is_native()
    monkeypatch.setenv("EDGERAZOR_ISA", "integer")
    assert kernels.name() == "integer"
    monkeypatch.setenv("EDGERAZOR_ISA", "refrence")
    with pytest.raises(UserError, match="EDGERAZOR_ISA") as failure:
        kernels.name()
    assert failure.value.code == USAGE
    assert "reference" in failure.value.hint
