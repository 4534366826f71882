"""The rotation of weights and inputs: orthogonal, the same everywhere to the bit, and with less error to round."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import MatrixSpec, Rotation
from edgerazor.formats.core.rotation import hadamard_transform, seeded_signs

COLUMNS = (2, 12, 96, 576, 1536)


def rotation_of(columns: int) -> Rotation:
    rotation = formats.hadamard(columns)
    assert rotation is not None
    return rotation


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sylvester(block: int) -> Tensor:
    """The Hadamard matrix by its definition, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def defined(rotation: Rotation) -> Tensor:
    """R by its definition, float64."""
    block, count = rotation.block, rotation.columns // rotation.block
    return rotation.signs.double()[:, None] * torch.block_diag(*[sylvester(block)] * count) / math.sqrt(block)


def by_the_letter(x: np.ndarray, rotation: Rotation) -> np.ndarray:
    """`x R` of one row, number by number, as `packed/FORMAT.md` says."""
    x, b = x * rotation.signs.numpy().astype(np.float32), rotation.block
    for start in range(0, len(x), b):
        h = 1
        while h < b:
            for i in range(start, start + b):
                if not (i - start) & h:
                    x[i], x[i + h] = x[i] + x[i + h], x[i] - x[i + h]
            h *= 2
    return np.float32(1 / math.sqrt(b)) * x


@pytest.mark.parametrize(
    ("columns", "block"), [(1, 1), (101, 1), (2, 2), (12, 4), (96, 32), (576, 64), (1536, 512), (4096, 512)]
)
def test_the_block_is_the_largest_power_of_two(columns: int, block: int) -> None:
    rotation = formats.hadamard(columns)
    assert (rotation.block if rotation else 1) == block
    assert formats.find_rotation("hadamard", columns) is rotation
    assert formats.find_rotation(None, columns) is None
    with pytest.raises(ValueError, match="no rotation called fourier"):
        formats.find_rotation("fourier", columns)


@pytest.mark.parametrize("columns", COLUMNS)
def test_it_is_orthogonal_and_as_defined(columns: int) -> None:
    rotation = rotation_of(columns)
    matrix = defined(rotation)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(columns, dtype=torch.float64))
    x = weights(3, 2, columns)
    torch.testing.assert_close(rotation.rotate(x).double(), x.double() @ matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation.rotate_back(x).double(), x.double() @ matrix.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation.rotate_back(rotation.rotate(x)), x, rtol=0, atol=1e-5)
    w = weights(7, columns, seed=1)
    torch.testing.assert_close(rotation.rotate(x) @ rotation.rotate(w).T, x @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_as_specified(columns: int, dtype: torch.dtype) -> None:
    rotation, x = rotation_of(columns), weights(150, columns).mul(3).to(dtype)  # more rows than are worked on at once
    rotated = rotation.rotate(x)
    assert rotated.dtype == torch.float32
    for row in (0, 77, 149):
        assert np.array_equal(rotated[row].numpy(), by_the_letter(x[row].float().numpy(), rotation))
    assert torch.equal(rotation.rotate(x.T.contiguous().T), rotated)  # wherever the numbers lie
    assert torch.equal(rotation.rotate(x[77]), rotated[77])
    back = hadamard_transform(rotated, rotation.block) * rotation.signs
    assert torch.equal(rotation.rotate_back(rotated), back)


def test_no_rows_and_other_widths() -> None:
    rotation = rotation_of(96)
    assert rotation.rotate(torch.zeros(0, 3, 96)).shape == (0, 3, 96)
    with pytest.raises(ValueError, match="the rotation has 96 columns, but there are 32"):
        rotation.rotate(torch.zeros(2, 32))


def test_gradients_are_rotated_back() -> None:
    rotation, upstream = rotation_of(96), weights(5, 96)
    for forwards, backwards in ((rotation.rotate, rotation.rotate_back), (rotation.rotate_back, rotation.rotate)):
        x = weights(5, 96, seed=1).bfloat16().requires_grad_()
        forwards(x).backward(upstream)
        assert x.grad is not None
        assert torch.equal(x.grad, backwards(upstream).bfloat16())


@pytest.mark.parametrize("columns", [2, 12, 576, 1000])
def test_signs_are_bits_of_sha256(columns: int) -> None:
    stream = b"".join(hashlib.sha256(f"edgerazor signs {columns} {number}".encode()).digest() for number in range(4))
    bits = [stream[j // 8] >> j % 8 & 1 for j in range(columns)]
    signs = seeded_signs(columns)
    assert signs.tolist() == [-1 if bit else 1 for bit in bits]
    packed = formats.pack_signs(signs)
    assert packed.numpy().tobytes()[: columns // 8] == stream[: columns // 8]
    assert len(packed) == formats.sign_bytes(columns)
    assert torch.equal(formats.unpack_signs(packed, columns), signs)


def test_signs_are_the_same_for_ever() -> None:
    assert formats.pack_signs(seeded_signs(576))[:8].tolist() == list(
        hashlib.sha256(b"edgerazor signs 576 0").digest()[:8]
    )
    assert formats.pack_signs(seeded_signs(12)).tolist() == SIGNS_OF_12


#: The stored signs of twelve columns.
SIGNS_OF_12 = [36, 6]


def test_what_is_no_rotation_is_refused() -> None:
    signs = seeded_signs(96)
    for block, reason in ((3, "power of two"), (1, "power of two"), (1024, "power of two"), (64, "no multiple")):
        with pytest.raises(ValueError, match=reason):
            Rotation(block, signs)
    for bad in (signs.float(), signs * 2, signs * 0):
        with pytest.raises(ValueError, match="each 1 or -1"):
            Rotation(32, bad)
    packed = formats.pack_signs(seeded_signs(12))
    with pytest.raises(ValueError, match="must be 2 bytes"):
        formats.unpack_signs(packed[:1], 12)
    packed[1] |= 0x80
    with pytest.raises(ValueError, match="a bit behind the last sign"):
        formats.unpack_signs(packed, 12)


@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
def test_rotated_weights_with_outliers_are_rounded_with_less_error(name: str) -> None:
    w = weights(64, 256)
    w[:, ::50] *= 30  # a few columns of large weights, as embeddings and down projections have them
    plain, rotated = MatrixSpec((name,), 64), MatrixSpec((name,), 64, rotation=formats.hadamard(256))

    def error(spec: MatrixSpec) -> float:
        return float((formats.rounded_weight(w, spec) - w).square().sum())

    assert error(rotated) < 0.8 * error(plain), (error(rotated), error(plain))
    assert torch.equal(formats.rounded_weight(w, plain), formats.quantize_dequantize(w, plain))
    assert formats.rounded_weight(w, rotated, torch.bfloat16).dtype == torch.bfloat16


def test_a_specification_knows_both_bases() -> None:
    w, plain = weights(6, 96), MatrixSpec(("int4",), 40)
    assert plain.rotate(w) is w
    assert plain.rotate_back(w) is w
    blocks = MatrixSpec(("int4", "int2"), 40, block_formats=torch.tensor([[0, 1, 0]], dtype=torch.uint8))
    for spec in (plain, blocks):
        turned = MatrixSpec(spec.formats, 40, None, spec.block_formats, rotation=formats.hadamard(96))
        encoded = formats.encode_matrix(turned.rotate(w), turned)
        expected = turned.rotate_back(formats.decode_matrix(encoded, turned))
        assert torch.equal(formats.rounded_weight(w, turned), expected)
        assert turned.take(torch.tensor([1, 3])).rotation is turned.rotation
        assert turned.packed_bytes((6, 96)) == spec.packed_bytes((6, 96))
