"""Codes as other programs' integers: the same weights to the last bit, or a refusal."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.exporters.core import exact_dtypes, integers
from edgerazor.exporters.core.integers import Integers, UnfitError
from edgerazor.formats import Encoded, MatrixSpec

ALL = formats.names()
#: By hand: int2's levels -3/2, -1/2, 1/2, 3/2 are -3, -1, 1, 3 halves, so it takes three bits.
BITS = {"ternary": 2, "int2z": 2, "int2": 3, "int3": 3, "int4": 4, "int5": 5, "int8": 8}


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def specs(rows: int, cols: int, group: int) -> list[MatrixSpec]:
    """Every format alone, all by rows, and all by blocks."""
    mixed = (torch.arange(rows) % len(ALL)).to(torch.uint8)
    groups = formats.group_count(cols, group)
    blocks = (torch.arange(rows * groups).view(rows, groups) * 5 % len(ALL)).to(torch.uint8)
    return [
        *(MatrixSpec((name,), group) for name in ALL),
        MatrixSpec(tuple(ALL), group, mixed),
        MatrixSpec(tuple(ALL), group, block_formats=blocks),
        MatrixSpec(tuple(ALL), group, block_formats=blocks[:1].clone()),
    ]


@pytest.mark.parametrize("cols", [1, 31, 64, 97])
@pytest.mark.parametrize("group", [7, 32, 64, 1000])
def test_integers_are_the_same_weights(cols: int, group: int) -> None:
    w = weights(9, cols)
    w[2, : min(group, cols)] = 0  # a group without a scale
    for spec in specs(9, cols, group):
        encoded = formats.encode_matrix(w, spec)
        found = integers.integers(encoded, spec)
        assert torch.equal(found.decoded(), formats.decode_matrix(encoded, spec)), spec.formats
        width = integers.bits(spec.formats)
        assert -(2 ** (width - 1)) <= int(found.values.min())
        assert int(found.values.max()) < 2 ** (width - 1)


def test_bits_of_formats() -> None:
    assert {name: integers.bits([name]) for name in ALL} == BITS
    assert integers.bits(["ternary", "int4", "int2"]) == 4


def test_half_of_a_scale_that_is_no_float16_number_is_refused() -> None:
    spec = MatrixSpec(("int2",), 4)
    tiny = torch.tensor([[2.0**-24], [1.0]], dtype=torch.float16)  # the smallest subnormal
    encoded = Encoded(torch.zeros(2, 4, dtype=torch.int8), tiny)
    with pytest.raises(UnfitError, match="half of its smallest scale"):
        integers.integers(encoded, spec)
    whole = MatrixSpec(("ternary",), 4)
    assert torch.equal(integers.integers(encoded, whole).decoded(), formats.decode_matrix(encoded, whole))


def test_common_groups() -> None:
    known = (128, 64, 32)
    cases = {(1024, 256): 128, (960, 256): 64, (96, 64): 32, (1024, 64): 64, (100, 20): 20, (300, 300): 300}
    cases |= {(300, 1000): 300, (128, 128): 128, (3072, 96): 32, (240, 48): 48}
    for (columns, group), expected in cases.items():
        assert integers.common_group(columns, group, known) == expected
    with pytest.raises(UnfitError, match="rows of 101 weights are no whole groups of 40") as refused:
        integers.common_group(101, 40, known)
    assert "--group-size" in refused.value.remedy


@pytest.mark.parametrize(("cols", "group", "new"), [(96, 64, 32), (96, 64, 16), (96, 96, 32), (100, 40, 20), (5, 5, 1)])
def test_smaller_groups_are_the_same_weights(cols: int, group: int, new: int) -> None:
    spec = MatrixSpec(("int4",), group)
    found = integers.integers(formats.encode_matrix(weights(3, cols), spec), spec)
    regrouped = integers.regrouped(found, new)
    assert regrouped.scales.shape == (3, -(-cols // new))
    assert torch.equal(regrouped.decoded(), found.decoded())


def test_groups_that_do_not_fill_ours_are_refused() -> None:
    zeros = Integers(torch.zeros(1, 96, dtype=torch.int8), torch.ones(1, 2, dtype=torch.float16), 64)
    with pytest.raises(ValueError, match="do not fill groups of 64"):
        integers.regrouped(zeros, 48)


@pytest.mark.parametrize("width", range(1, 9))
def test_words_are_one_stream_of_bits(width: int) -> None:
    for count in (1, 31, 32, 33, 70):
        values = torch.randint(0, 2**width, (3, count), generator=torch.Generator().manual_seed(count))
        values[0] = 2**width - 1
        found = integers.words(values, width)
        assert found.dtype == torch.int32
        assert found.shape == (3, -(-count * width // 32))
        for row, numbers in enumerate(values.tolist()):
            stream = sum(number << (width * i) for i, number in enumerate(numbers))
            expected = [stream >> (32 * i) & 0xFFFFFFFF for i in range(found.shape[1])]
            assert [word & 0xFFFFFFFF for word in found[row].tolist()] == expected


def test_exact_floats() -> None:
    exact = {
        torch.float16: [1.0, -0.0, 2.0**-24, 65504.0, 1 + 2.0**-10],
        torch.bfloat16: [2.0**-30, 1e38 // 2**120 * 2.0**120, 65536.0],
        torch.float32: [1 + 2.0**-23, 1 / 3],
    }
    for dtype, numbers in exact.items():
        for number in numbers:
            assert exact_dtypes.smallest_float(torch.tensor([1.0, number])) == dtype, number
    for codes, scale in itertools.product((-128, -127, 1, 127), (2.0**-24, 1 + 2.0**-10, 65504.0)):
        product = torch.tensor(codes, dtype=torch.float64) * torch.tensor(scale, dtype=torch.float64)
        assert exact_dtypes.holds(torch.float32, product)
