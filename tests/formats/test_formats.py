"""Laws that every number format obeys, the published rules, and golden bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.errors import USAGE, UserError
from edgerazor.formats import Encoded, MatrixSpec

ALL = formats.names()
SHAPES = [(1, 1), (3, 3), (2, 31), (5, 33), (4, 127), (3, 172), (2, 960), (7, 256), (1, 64)]
GROUPS = [1, 5, 64, 256, 10_000]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(name: str, rows: int, cols: int) -> Tensor:
    number_format = formats.get(name)
    generator = torch.Generator().manual_seed(rows * cols)
    return torch.randint(number_format.min_code, number_format.max_code + 1, (rows, cols), generator=generator).to(
        torch.int8
    )


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, so that -0.0 and 0.0 differ."""
    return (
        a.dtype == b.dtype and a.shape == b.shape and bytes(formats.tensor_bytes(a)) == bytes(formats.tensor_bytes(b))
    )


def mixed_spec(rows: int, group_size: int) -> MatrixSpec:
    return MatrixSpec(tuple(ALL), group_size, (torch.arange(rows) * 7 % len(ALL)).to(torch.uint8))


def block_specs(rows: int, cols: int, group_size: int) -> list[MatrixSpec]:
    """A format for every group of every row, and one for every group of all rows."""
    groups = formats.group_count(cols, group_size)
    blocks = (torch.arange(rows * groups).view(rows, groups) * 5 % len(ALL)).to(torch.uint8)
    two = (torch.arange(groups)[None] % 3 == 0).to(torch.uint8)
    return [
        MatrixSpec(tuple(ALL), group_size, block_formats=blocks),
        MatrixSpec(("ternary", "int4"), group_size, block_formats=two),
    ]


# Every format -----------------------------------------------------------------------------------------------------


def described(name: str, codes: Tensor, group_size: int) -> list[list[int]]:
    """Packed bytes of each row block, written down from the specification in `packed`, a byte at a time."""
    number_format = formats.get(name)
    (rows, cols), lowest = codes.shape, number_format.min_code
    group = min(group_size, cols)
    columns = []
    for start in range(0, cols, group):
        columns += range(start, min(start + group, cols))
        columns += [None] * (-len(columns) % 4)
    quads = len(columns) // 4

    def stored(row: int, quad: int, j: int) -> int:
        column = columns[4 * quad + j] if quad < quads else None
        return -lowest if column is None or row >= rows else int(codes[row, column]) - lowest

    def five(t: list[int]) -> int:
        r = t[0] + 3 * t[1] + 9 * t[2] + 27 * t[3]
        return 64 * t[4] + r if r < 64 else 192 + 17 * t[4] + (r - 64)

    ternary = name == "ternary"
    bits = {"ternary": 2, "int2z": 2}.get(name) or int(name.removeprefix("int"))
    widths = [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]
    blocks: list[list[int]] = []
    for top in range(0, rows, 16):
        blocks.append([])
        size = 64 if ternary else 8
        for first in range(0, quads, size):
            count = min(size, quads - first)
            fives = count // 5 if ternary else 0
            for v in range(fives):
                for lane in range(16):
                    for j in range(4):
                        blocks[-1].append(five([stored(top + lane, first + 5 * v + f, j) for f in range(5)]))
            shift, left = 0, count - 5 * fives
            for width in widths:
                for v in range(-(-left * width // 8)):
                    for lane in range(16):
                        for j in range(4):
                            byte = 0
                            for f in range(8 // width):
                                quad = 5 * fives + v * (8 // width) + f
                                u = stored(top + lane, first + quad if quad < count else quads, j)
                                byte |= (u >> shift & (2**width - 1)) << (f * width)
                            blocks[-1].append(byte)
                shift += width
    return blocks


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [5, 8, 64, 1000])
def test_packing_round_trip_is_exact(name: str, shape: tuple[int, int], group_size: int) -> None:
    number_format = formats.get(name)
    codes = random_codes(name, *shape)
    packed = number_format.pack(codes, group_size)
    assert packed.dtype == torch.uint8
    assert packed.shape == number_format.packed_shape(*shape, group_size)
    assert bits_equal(number_format.unpack(packed, shape, group_size), codes)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((1, 1), 8), ((3, 31), 8), ((17, 172), 256), ((33, 50), 30), ((2, 345), 100), ((16, 256), 256), ((1, 333), 64)],
)
def test_packed_bytes_lie_where_the_specification_says(name: str, shape: tuple[int, int], group_size: int) -> None:
    codes = random_codes(name, *shape)
    assert formats.get(name).pack(codes, group_size).tolist() == described(name, codes, group_size)


def test_packed_bits_a_weight() -> None:
    bits = {  # of 1024 rows in groups of 64, 256, and of a whole row
        ("ternary", 1024): (1.625, 1.625, 1.625),
        ("ternary", 960): (1.6 + 1 / 30, 1.6 + 1 / 30, 1.6 + 1 / 30),
        ("ternary", 172): (9 / 43 * 8, 9 / 43 * 8, 9 / 43 * 8),
        ("int3", 1024): (3, 3, 3),
        ("int5", 960): (5, 5, 5),
        ("int4", 172): (4 + 4 / 43, 4 + 4 / 43, 4 + 4 / 43),
    }
    for (name, cols), expected in bits.items():
        number_format = formats.get(name)
        bits_per_weight = [8 * number_format.row_bytes(cols, group_size) / cols for group_size in (64, 256, cols)]
        assert bits_per_weight == pytest.approx(expected), name


@pytest.mark.parametrize("name", ALL)
def test_packing_refuses_codes_out_of_range(name: str) -> None:
    number_format = formats.get(name)
    if number_format.max_code < 127:
        with pytest.raises(ValueError, match="range"):
            number_format.pack(torch.full((1, 3), number_format.max_code + 1, dtype=torch.int8), 8)
    if number_format.min_code > -128:
        with pytest.raises(ValueError, match="range"):
            number_format.pack(torch.full((1, 3), number_format.min_code - 1, dtype=torch.int8), 8)


@pytest.mark.parametrize("name", ALL)
def test_any_bytes_unpack_to_what_packs_to_them_or_are_refused(name: str) -> None:
    number_format = formats.get(name)
    for byte in range(256):
        for cols in (1, 4, 20, 24, 32):
            packed = torch.full(number_format.packed_shape(16, cols, 8), byte, dtype=torch.uint8)
            try:
                codes = number_format.unpack(packed, (16, cols), 8)
            except ValueError:
                continue
            assert bits_equal(number_format.pack(codes, 8), packed)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", GROUPS)
def test_a_group_is_encoded_as_if_it_were_alone(name: str, shape: tuple[int, int], group_size: int) -> None:
    number_format = formats.get(name)
    w = weights(*shape)
    codes, scales = number_format.encode(w, group_size)
    decoded = number_format.decode(codes, scales, group_size)
    for group, start in enumerate(range(0, shape[1], group_size)):
        part = w[:, start : start + group_size]
        alone = number_format.encode(part, part.shape[1])
        assert bits_equal(alone.codes, codes[:, start : start + group_size].contiguous())
        assert bits_equal(alone.scales, scales[:, group : group + 1].contiguous())
        expected = number_format.level_(alone.codes.float()) * alone.scales.float()
        assert bits_equal(expected, decoded[:, start : start + group_size].contiguous())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("group_size", GROUPS)
def test_fake_quantization_is_decode_of_encode_bit_for_bit_and_its_gradient_the_identity(
    name: str, group_size: int
) -> None:
    number_format = formats.get(name)
    for dtype in (torch.float32, torch.bfloat16):
        w = weights(5, 172).to(dtype).requires_grad_()
        quantized = number_format.fake_quantize(w, group_size)
        assert bits_equal(quantized, number_format.decode(*number_format.encode(w, group_size), group_size))
        upstream = weights(5, 172, seed=1)
        quantized.backward(upstream)
        assert w.grad is not None
        assert bits_equal(w.grad, upstream.to(dtype))


@pytest.mark.parametrize("name", ALL)
def test_blocks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number_format = formats.get(name)
    w = weights(37, 130)
    whole = number_format.encode(w, 64)
    decoded = number_format.quantize_dequantize(w, 64)
    monkeypatch.setattr("edgerazor.formats.core.base.BLOCK", 400)
    assert all(bits_equal(a, b) for a, b in zip(whole, number_format.encode(w, 64), strict=True))
    assert bits_equal(decoded, number_format.quantize_dequantize(w, 64))
    assert bits_equal(decoded, number_format.decode(*whole, 64))


@pytest.mark.parametrize("name", ALL)
def test_threads_layout_dtype_and_autocast_do_not_show(name: str) -> None:
    number_format = formats.get(name)
    w = weights(64, 960).bfloat16()
    expected = number_format.encode(w, 256)
    threads = torch.get_num_threads()
    variants = [w.float(), w.double(), w.t().contiguous().t(), torch.nn.Parameter(w)]
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            encodings = [number_format.encode(variant, 256) for variant in variants]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                encodings.append(number_format.encode(w.float(), 256))
            for each in encodings:
                assert bits_equal(each.codes, expected.codes)
                assert bits_equal(each.scales, expected.scales)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ALL)
def test_groups_without_a_scale_are_zero_and_large_ones_stay_finite(name: str) -> None:
    number_format = formats.get(name)
    for w in (torch.zeros(1, 7), torch.full((1, 7), 1e-12), torch.full((1, 7), -1e-40)):
        codes, scales = number_format.encode(w, 4)
        assert scales.tolist() == [[0, 0]]
        assert not codes.any()
        assert bits_equal(number_format.decode(codes, scales, 4), torch.zeros(1, 7))
    codes, scales = number_format.encode(torch.tensor([[3e38, -3e38, 1.0]]), 3)
    assert scales.item() == 65504.0
    assert number_format.decode(codes, scales, 3).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_weights_that_are_not_finite_and_impossible_arguments_are_refused(name: str) -> None:
    number_format = formats.get(name)
    for value in (math.nan, math.inf, -math.inf):
        w = weights(2, 9)
        w[1, 8] = value
        with pytest.raises(ValueError, match="not finite"):
            number_format.encode(w, 4)
        with pytest.raises(ValueError, match="not finite"):
            number_format.encode(w, 4, torch.ones(2, 3))
        with pytest.raises(ValueError, match="negative or not finite"):
            number_format.encode(weights(2, 9), 4, torch.tensor([[1.0, 1, 1], [1, 1, value]]))
    with pytest.raises(ValueError, match="negative"):
        number_format.encode(weights(1, 4), 4, torch.tensor([[-1.0]]))
    with pytest.raises(ValueError, match="scales must be"):
        number_format.encode(weights(1, 4), 4, torch.ones(1, 2))
    with pytest.raises(ValueError, match="group size"):
        number_format.encode(weights(1, 4), 0)
    with pytest.raises(ValueError, match="matrix"):
        number_format.encode(weights(4), 4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("group_size", [5, 256])
def test_given_scales_are_used_as_they_are(name: str, group_size: int) -> None:
    number_format = formats.get(name)
    w = weights(3, 33)
    ruled = number_format.encode(w, group_size)
    given = number_format.encode(w, group_size, ruled.scales)
    assert bits_equal(given.codes, ruled.codes)
    assert bits_equal(given.scales, ruled.scales)
    doubled = number_format.encode(2 * w, group_size, 2 * ruled.scales.float())
    assert bits_equal(doubled.codes, ruled.codes)


def test_an_empty_matrix_and_an_unknown_format() -> None:
    for name in ALL:
        codes, scales = formats.get(name).encode(torch.zeros(0, 10), 4)
        assert (codes.shape, scales.shape) == ((0, 10), (0, 3))
        assert formats.get(name).unpack(formats.get(name).pack(codes, 4), (0, 10), 4).shape == (0, 10)
    with pytest.raises(UserError, match="no format called 'ternery'") as failure:
        formats.get("ternery")
    assert failure.value.code == USAGE
    assert "ternary" in failure.value.hint


# The published rules ----------------------------------------------------------------------------------------------


def test_ternary_follows_its_published_rule() -> None:
    w = weights(6, 600)
    codes, scales = formats.get("ternary").encode(w, 256, published=True)
    for row in range(6):
        for group, start in enumerate((0, 256, 512)):
            part = w[row, start : start + 256].double()
            scale = (2 * part.abs().sum() / len(part)).float().half()  # the last group has 88 weights, not 256
            assert scales[row, group] == scale
            expected = torch.round(part.float() / scale.float()).clamp(-1, 1)
            assert torch.equal(codes[row, start : start + 256].float(), expected)
    assert formats.get("ternary").nominal_bits == 1.58


def test_ternary_zeroes_57_percent_of_gaussian_weights() -> None:
    codes = formats.get("ternary").encode(weights(256, 1024), 256, published=True).codes
    assert (codes == 0).float().mean().item() == pytest.approx(0.575, abs=0.01)


def test_ternary_is_not_idempotent() -> None:
    ternary = formats.get("ternary")
    once = ternary.quantize_dequantize(weights(4, 256), 256, published=True)
    twice = ternary.quantize_dequantize(once, 256, published=True)
    assert (once[once != 0] != twice[once != 0]).all()


@pytest.mark.parametrize(("name", "largest"), [("int4", 7), ("int8", 127)])
def test_absmax_follows_its_published_rule(name: str, largest: int) -> None:
    w = weights(6, 600)
    codes, scales = formats.get(name).encode(w, 256, published=True)
    for row in range(6):
        for group, start in enumerate((0, 256, 512)):
            part = w[row, start : start + 256]
            scale = (part.abs().max() / largest).half()
            assert scales[row, group] == scale
            expected = torch.round(part / scale.float()).clamp(-largest, largest)
            assert torch.equal(codes[row, start : start + 256].float(), expected)
            # Half a level, and what rounding the scale to 11 bits takes off the largest level.
            error = (expected * scale.float() - part).abs().max()
            assert error <= scale * (0.5 + largest * 2**-11)


def test_int2_has_four_levels_and_no_zero() -> None:
    w = torch.tensor([[1.0, -1.0, 3.0, -3.0], [0.0, 0.0, 9.0, -9.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = formats.get("int2").encode(w, 4, published=True)
    assert codes.tolist() == [[0, -1, 1, -2], [0, 0, 1, -2], [0, 0, 0, 0]]
    assert scales.flatten().tolist() == [2.0, 4.5, 0.0]
    decoded = formats.get("int2").decode(codes, scales, 4)
    assert decoded.tolist() == [[1.0, -1.0, 3.0, -3.0], [2.25, 2.25, 6.75, -6.75], [0.0] * 4]


def first_bytes(packed: Tensor, lanes: int = 1) -> str:
    """The bytes of the first row or rows of a block in each of its vectors, in hex."""
    return bytes(packed.reshape(-1, 64)[:, : 4 * lanes].flatten().tolist()).hex(" ", 4 * lanes)


def test_golden_bytes() -> None:
    golden = {
        # Columns 0 and 4 share a byte of 2-bit fields: 2 + 2*4 + (padding) 1*16 + 1*64 = 90; 0, 1, 1 are alone.
        "ternary": ([1, -1, 0, 0, 1], "5a545555"),
        "int2": ([1, -2, 0, -1, 1], "afa8aaa9"),  # 3 + 3*4 + 2*16 + 2*64 = 175
        "int2z": ([1, -1, 0, -1, 1], "afa9aaa9"),
        "int3": ([3, -3, 1, 0, -1], "0f010100 fdfeffff"),  # low bits of 7 and 3: 3 + 3*4; high bits, padding 1s
        "int4": ([7, -7, 1, 0, -1], "7f818988"),
        "int5": ([15, -15, 1, 0, -1], "ff010100 fdfeffff"),
        "int8": ([127, -127, 1, 0, -1], "ff018180 7f808080"),
    }
    for name, (codes, expected) in golden.items():
        packed = formats.get(name).pack(torch.tensor([codes], dtype=torch.int8), 8)
        assert first_bytes(packed) == expected, name
    assert set(golden) == set(ALL), "give the new format golden bytes"


def test_golden_bytes_of_base_3() -> None:
    rows = [[1, 1, 1, 0, -1], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [-1] * 5, [1] * 5]
    digits = torch.tensor(rows, dtype=torch.int8)
    # 2 + 6 + 18 + 27 = 53; 80 -> 192 + 17 + 16; 1 + 3 + 18 + 54 = 76 -> 192 + 34 + 12; 0; 192 + 34 + 16
    codes = torch.stack([digits, *[torch.zeros_like(digits)] * 3], dim=2).flatten(1)  # column j of each quad
    packed = formats.get("ternary").pack(codes, 256)
    assert packed.view(-1, 4)[:5, 0].tolist() == [53, 225, 238, 0, 242]
    assert packed.view(-1, 4)[5:].unique().tolist() == [121 - 81 + 64]  # 1 + 3 + 9 + 27 = 40, and a fifth 1


def test_golden_matrix() -> None:
    w = torch.tensor([[2.0, -2, 0, 0, 9, -3], [7, -3.5, 1, 0, 14, -14], [127, 1, -1, 0, 254, 2]])
    spec = MatrixSpec(("int8", "int4", "ternary"), 4, torch.tensor([2, 1, 0], dtype=torch.uint8), published=True)
    parts = formats.pack_matrix(formats.encode_matrix(w, spec), spec)
    bytes_of = {name: bytes(formats.tensor_bytes(part)) for name, part in parts.items()}
    padding = {"ternary": b"\x55", "int4": b"\x88", "int8": b"\x80"}
    beginnings = {
        "ternary": "5a545555",  # codes 1 -1 0 0, 1 0: 2 + 2*4 + 1*16 + 1*64 = 90
        "int4": "ff148988",  # codes 7 -4 1 0, 7 -7 (-3.5 is rounded to even): 15 + 15*16, 4 + 1*16
        "int8": "ff817f80",
    }
    for name, expected in beginnings.items():
        assert bytes_of[name][:4].hex() == expected, name
        assert bytes_of[name][4:64] == padding[name] * 60
    assert bytes_of["int8"][64:68].hex() == "ff818080"
    halves = {"ternary": [2.0, 12.0], "int4": [1.0, 2.0], "int8": [1.0, 2.0]}
    for name, (first, second) in halves.items():
        scales = parts[f"{name}.scales"]
        assert scales.shape == (1, 2, 16)
        assert scales[0, :, 0].tolist() == [first, second]
        assert not scales[0, :, 1:].any()
    assert bytes_of["row_formats"].hex() == "06"  # 2 + 1*4 + 0*16


def test_golden_matrix_of_blocks() -> None:
    w = torch.tensor([[2.0, -2, 0, 7, 1, -7, 3], [7, -3.5, 1, 2, -2, 0, -14]])
    chosen = torch.tensor([[1, 0, 2], [0, 1, 0]], dtype=torch.uint8)
    spec = MatrixSpec(("int4", "ternary", "int8"), 3, block_formats=chosen, published=True)
    encoded = formats.encode_matrix(w, spec)
    assert encoded.codes.tolist() == [[1, -1, 0, 7, 1, -7, 127], [7, -4, 1, 1, -1, 0, -7]]
    parts = formats.pack_matrix(encoded, spec)
    assert {name: first_bytes(part, 3) for name, part in parts.items() if part.shape[1] == 64} == {
        "ternary": "565455555654555555555555",  # codes 1 -1 0, twice, each filled with a column of 0
        "int4": "8f8981888f84898888888888",  # codes 7 1 -7, and 7 -4 1
        "int4.tail": "818888888888888888888888",
        "int8.tail": "ff8080808080808080808080",
    }
    assert parts["block_formats"].tolist() == [[1 + 0 * 4 + 2 * 16], [0 + 1 * 4 + 0 * 16]]
    scales = {name: part[0, 0, :2].tolist() for name, part in parts.items() if name.endswith("scales")}
    assert scales == {
        "ternary.scales": pytest.approx([8 / 3, 8 / 3], rel=1e-3),
        "int4.scales": [1.0, 1.0],
        "int4.tail.scales": [2.0, 0.0],
        "int8.tail.scales": pytest.approx([3 / 127, 0.0], rel=1e-3),
    }


@pytest.mark.parametrize(
    ("name", "reason", "index", "value", "cols"),
    [
        ("ternary", "byte", 0, 243, 20),
        ("ternary", "only fills up a vector", 0, 0x15, 4),  # the second quad of two-bit fields
        ("ternary", "only fills up a row", 3, 0x54, 3),
        ("ternary", "only fills up a row", 4, 0x54, 4),  # the second lane, where there is one row
        ("ternary", "range", 0, 0x57, 4),
        ("int4", "only fills up a vector", 0, 0x78, 1),
        ("int3", "only fills up a vector", 64, 0x7F, 4),
    ],
)
def test_invalid_bytes_are_refused(name: str, reason: str, index: int, value: int, cols: int) -> None:
    packed = formats.get(name).pack(torch.zeros(1, cols, dtype=torch.int8), 256)
    packed[0, index] = value
    with pytest.raises(ValueError, match=reason):
        formats.get(name).unpack(packed, (1, cols), 256)


def test_packed_codes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        formats.get("int4").unpack(torch.zeros(1, 128, dtype=torch.uint8), (1, 8), 8)


# Matrices of several formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [64, 256])
def test_each_row_of_a_mixed_matrix_is_in_its_own_format(shape: tuple[int, int], group_size: int) -> None:
    w, spec = weights(*shape), mixed_spec(shape[0], group_size)
    encoded = formats.encode_matrix(w, spec)
    decoded = formats.decode_matrix(encoded, spec)
    assert spec.row_formats is not None
    for row in range(shape[0]):
        number_format = formats.get(ALL[int(spec.row_formats[row])])
        alone = number_format.encode(w[row : row + 1], group_size)
        assert bits_equal(alone.codes[0], encoded.codes[row])
        assert bits_equal(alone.scales[0], encoded.scales[row])
        assert bits_equal(number_format.decode(*alone, group_size)[0], decoded[row])
    master = w.clone().requires_grad_()
    quantized = formats.fake_quantize_matrix(master, spec)
    assert bits_equal(quantized, decoded)
    quantized.backward(w)
    assert master.grad is not None
    assert bits_equal(master.grad, w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [5, 64, 10_000])
def test_each_block_of_a_matrix_is_in_its_own_format(shape: tuple[int, int], group_size: int) -> None:
    w = weights(*shape)
    for spec in block_specs(*shape, group_size):
        encoded = formats.encode_matrix(w, spec)
        decoded = formats.decode_matrix(encoded, spec)
        assert spec.block_formats is not None
        blocks = spec.block_formats.expand(shape[0], -1)
        for row in range(shape[0]):
            for group, start in enumerate(range(0, shape[1], group_size)):
                number_format, stop = formats.get(spec.formats[int(blocks[row, group])]), start + group_size
                alone = number_format.encode(w[row : row + 1, start:stop], group_size)
                assert bits_equal(alone.codes[0], encoded.codes[row, start:stop].contiguous())
                assert bits_equal(alone.scales[0, 0], encoded.scales[row, group])
                expected = number_format.decode(*alone, group_size)[0]
                assert bits_equal(expected, decoded[row, start:stop].contiguous())
        master = w.clone().requires_grad_()
        quantized = formats.fake_quantize_matrix(master, spec)
        assert bits_equal(quantized, decoded)
        quantized.backward(w)
        assert master.grad is not None
        assert bits_equal(master.grad, w)
        chosen = torch.tensor([shape[0] - 1, 0, 0])
        for some in (chosen, chosen[:0]):
            taken = Encoded(encoded.codes[some], encoded.scales[some])
            assert bits_equal(formats.decode_matrix(taken, spec.take(some)), decoded[some])


@pytest.mark.parametrize("shape", SHAPES)
def test_formats_of_rows_can_be_said_of_their_blocks(shape: tuple[int, int]) -> None:
    w, spec = weights(*shape), mixed_spec(shape[0], 64)
    assert spec.row_formats is not None
    blocks = spec.row_formats[:, None].expand(-1, formats.group_count(shape[1], 64)).contiguous()
    same = MatrixSpec(spec.formats, 64, block_formats=blocks)
    encoded = formats.encode_matrix(w, spec)
    assert all(bits_equal(a, b) for a, b in zip(encoded, formats.encode_matrix(w, same), strict=True))
    assert formats.digest(encoded, spec) == formats.digest(encoded, same)
    assert spec.nominal_bits(shape) == pytest.approx(same.nominal_bits(shape), abs=1e-12)
    assert spec.weights_by_format(shape) == same.weights_by_format(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_matrices_come_back_exactly(shape: tuple[int, int]) -> None:
    blocks = [spec for group_size in (5, 64) for spec in block_specs(*shape, group_size)]
    for spec in (mixed_spec(shape[0], 64), *blocks, *(MatrixSpec((name,), 64) for name in ALL)):
        encoded = formats.encode_matrix(weights(*shape), spec)
        parts = formats.pack_matrix(encoded, spec)
        assert {name: (part.dtype, (*part.shape,)) for name, part in parts.items()} == formats.part_shapes(spec, shape)
        stored = {name: b"".join(pieces) for name, pieces in formats.serialize_parts(parts).items()}
        assert {name: len(each) for name, each in stored.items()} == {
            name: math.prod(size) for name, size in formats.stored_shapes(spec, shape).items()
        }
        assert sum(map(len, stored.values())) == spec.packed_bytes(shape)
        assert all(len(each) % 64 == 0 for name, each in stored.items() if f"{name}.scales" in parts)
        again, again_spec = formats.unpack_matrix(parts, spec.formats, spec.group_size, shape)
        assert bits_equal(again.codes, encoded.codes)
        assert bits_equal(again.scales, encoded.scales)
        assert formats.digest(again, again_spec) == formats.digest(encoded, spec)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [1, 64])
def test_codes_and_scales_are_joined_and_separated(shape: tuple[int, int], group_size: int) -> None:
    for name in ALL:
        spec = MatrixSpec((name,), group_size)
        parts = formats.pack_matrix(formats.encode_matrix(weights(*shape), spec), spec)
        (pieces,) = formats.serialize_parts(parts).values()
        stored = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)
        for start in (0, 1, 2):  # wherever the bytes begin
            views = formats.deserialize_part(torch.cat([stored[:start], stored])[start:], name, shape[1], group_size)
            assert views.keys() == parts.keys()
            assert all(bits_equal(views[part], tensor) for part, tensor in parts.items())
        with pytest.raises(ValueError, match="whole blocks of rows"):
            formats.deserialize_part(stored[:-1], name, shape[1], group_size)
        if len(pieces[2]):
            stored[-1] = 1
            with pytest.raises(ValueError, match="only fills up"):
                formats.deserialize_part(stored, name, shape[1], group_size)


def test_nominal_bits_are_those_of_the_names() -> None:
    for every, bits in ((8, 1.8825), (2, 2.79)):
        rows = (torch.arange(64) % every == 0).to(torch.uint8)
        assert MatrixSpec(("ternary", "int4"), 256, rows).nominal_bits((64, 40)) == pytest.approx(bits, abs=1e-12)
    assert MatrixSpec(("ternary",), 256).nominal_bits((64, 40)) == 1.58


def test_the_digest_depends_on_the_numbers_and_not_on_how_they_are_held() -> None:
    w = weights(4, 33)
    spec = MatrixSpec(("ternary", "int4"), 8, torch.tensor([0, 1, 0, 0], dtype=torch.uint8))
    encoded = formats.encode_matrix(w, spec)
    original = formats.digest(encoded, spec)
    strided = Encoded(encoded.codes.t().contiguous().t(), encoded.scales.t().contiguous().t())
    renamed = MatrixSpec(("int8", "int4", "ternary"), 8, torch.tensor([2, 1, 2, 2], dtype=torch.uint8))
    assert formats.digest(strided, spec) == original
    assert formats.digest(encoded, renamed) == original
    uniform = formats.encode_matrix(w, MatrixSpec(("int4",), 8))
    spelled = MatrixSpec(("ternary", "int4"), 8, torch.ones(4, dtype=torch.uint8))
    assert formats.digest(uniform, MatrixSpec(("int4",), 8)) == formats.digest(uniform, spelled)
    other_code, other_scale = encoded.codes.clone(), encoded.scales.clone()
    other_code[3, 32] = (other_code[3, 32] + 2) % 3 - 1
    other_scale[3, 4] *= 1.01
    others = [
        formats.digest(Encoded(other_code, encoded.scales), spec),
        formats.digest(Encoded(encoded.codes, other_scale), spec),
        formats.digest(encoded, MatrixSpec(("int4", "ternary"), 8, spec.row_formats)),
    ]
    assert len({original, *others}) == 4


def test_impossible_specifications_are_refused() -> None:
    rows = torch.tensor([0, 1], dtype=torch.uint8)
    for arguments in ((("int4", "ternary"), 8), (("int4", "int4"), 8, rows), ((), 8), (("int4",), 0)):
        with pytest.raises(ValueError, match=r"format|group"):
            MatrixSpec(*arguments)
    with pytest.raises(ValueError, match="not below"):
        MatrixSpec(("int4",), 8, rows)
    with pytest.raises(ValueError, match="uint8"):
        MatrixSpec(("int4",), 8, rows.long())
    blocks = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8)
    for cols, wrong in ((4, blocks[:, :1]), (4, blocks[:, 0]), (9, blocks), (4, torch.cat([blocks, blocks]))):
        with pytest.raises(ValueError, match=r"blocks|uint8 matrix"):
            formats.encode_matrix(weights(2, cols), MatrixSpec(("int4", "ternary"), 3, block_formats=wrong))
    with pytest.raises(ValueError, match="not below"):
        MatrixSpec(("int4",), 8, block_formats=blocks)
    with pytest.raises(ValueError, match="not both"):
        MatrixSpec(("int4", "ternary"), 8, rows, blocks)
    with pytest.raises(ValueError, match="2 rows"):
        formats.encode_matrix(weights(3, 4), MatrixSpec(("int4", "ternary"), 8, rows))


def test_unpacking_a_matrix_trusts_nothing() -> None:
    spec = MatrixSpec(("ternary", "int4"), 8, torch.tensor([0, 1, 0], dtype=torch.uint8))
    parts = formats.pack_matrix(formats.encode_matrix(weights(3, 9), spec), spec)

    def changed(part: str, index: tuple[int, ...], value: float) -> dict[str, Tensor]:
        tensor = parts[part].clone()
        tensor[index] = value
        return {**parts, part: tensor}

    damaged = {
        "int4.scales is missing": {name: part for name, part in parts.items() if name != "int4.scales"},
        "int4 is missing": {name: part for name, part in parts.items() if name != "int4"},
        "int8 does not belong": {**parts, "int8": parts["int4"]},
        "part ternary must be": {**parts, "ternary": parts["ternary"][:, :-1]},
        "part int4.scales must be": {**parts, "int4.scales": parts["int4.scales"].float()},
        "part row_formats must be": {**parts, "row_formats": torch.zeros(4, dtype=torch.uint8)},
        "row formats are needed": {name: part for name, part in parts.items() if name != "row_formats"},
        "unused bits": changed("row_formats", (0, 0), 8),
        "part ternary is missing": {name: part for name, part in parts.items() if name != "ternary"},
        "negative or not finite": changed("ternary.scales", (0, 1, 1), math.nan),
        "is negative": changed("int4.scales", (0, 0, 0), -1.0),
        "scale that only fills up": changed("int4.scales", (0, 0, 1), 1.0),
        "a code that only fills up a row": changed("ternary", (0, 63), 0x54),
        "fills up a vector": changed("int4", (0, 64), 0),
    }
    for reason, bad in damaged.items():
        with pytest.raises(ValueError, match=reason):
            formats.unpack_matrix(bad, spec.formats, 8, (3, 9))


def test_unpacking_blocks_trusts_nothing() -> None:
    chosen = torch.tensor([[1, 0], [0, 1], [0, 0]], dtype=torch.uint8)
    spec = MatrixSpec(("ternary", "int4"), 6, block_formats=chosen)
    parts = formats.pack_matrix(formats.encode_matrix(weights(3, 9), spec), spec)
    codes = {"ternary", "ternary.tail", "int4", "int4.tail"}
    assert set(parts) == {*codes, *(f"{each}.scales" for each in codes), "block_formats"}

    def changed(part: str, index: tuple[int, ...], value: float) -> dict[str, Tensor]:
        tensor = parts[part].clone()
        tensor[index] = value
        return {**parts, part: tensor}

    damaged = {
        "int4.tail is missing": {name: part for name, part in parts.items() if name != "int4.tail"},
        "int8.tail does not belong": {**parts, "int8.tail": parts["int4"]},
        "row_formats does not belong": {**parts, "row_formats": torch.zeros(3, dtype=torch.uint8)},
        "part ternary.tail must be": {**parts, "ternary.tail": parts["ternary"][:, 1:]},
        "part block_formats must be": {**parts, "block_formats": parts["block_formats"][:2]},
        "part int4 does not belong": changed("block_formats", (0, 0), 0),
        "unused bits at the end of a row": changed("block_formats", (1, 0), 6),
        "only fills up a row": changed("ternary.tail", (0, 3), 0x54),
        "only fills up a vector": changed("int4.tail", (0, 0), 0x78),
    }
    for reason, bad in damaged.items():
        with pytest.raises(ValueError, match=reason):
            formats.unpack_matrix(bad, spec.formats, 6, (3, 9))
    three = {**parts, "block_formats": torch.full((3, 1), 0b1100, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="not below"):
        formats.unpack_matrix(three, ("ternary", "int4", "int8"), 6, (3, 9))


# Activations, keys and values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 3, 31, 33, 127, 172, 960])
@pytest.mark.parametrize("group_size", [64, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_code_times_scale_within_half_a_step(features: int, group_size: int, bits: int) -> None:
    x = weights(2, 5, features)
    codes, scales = formats.quantize_activations(x, bits, group_size)
    assert codes.abs().max() == 2 ** (bits - 1) - 1
    group = min(group_size, features)
    spread = scales.repeat_interleave(group, dim=-1)[..., :features]
    decoded = formats.fake_quantize_activations(x, bits, group_size)
    assert torch.equal(decoded, codes * spread)
    assert ((decoded - x).abs() <= spread * 0.5001).all()
    assert torch.equal(formats.fake_quantize_activations(x[:, :3], bits, group_size), decoded[:, :3])


def test_activations_keep_dtype_zeros_and_gradients() -> None:
    x = weights(4, 100).bfloat16().requires_grad_()
    with torch.no_grad():
        x[1] = 0
        x[2] = 1e-39  # subnormal in float32 after division by 127: counts as zero everywhere
    y = formats.fake_quantize_activations(x, 8, 64)
    assert torch.equal(y, formats.fake_quantize_activations(x.float(), 8, 64).bfloat16())
    assert not y[1:3].any()
    upstream = weights(4, 100, seed=2).bfloat16()
    y.backward(upstream)
    assert x.grad is not None
    assert bits_equal(x.grad, upstream)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        formats.fake_quantize_activations(x, 16, 64)
    with pytest.raises(ValueError, match="not finite"):
        formats.quantize_activations(torch.tensor([1.0, math.nan]))
    assert formats.fake_quantize_activations(torch.tensor([1.0, math.nan])).isnan().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_keys_and_values_have_a_stored_scale_per_head_vector(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    x = weights(2, 3, 5, 48)
    x[0, 0, 0] = 0
    x[0, 0, 1] *= 1e-5  # its scale is subnormal in fp16
    x[0, 0, 2] *= 1e9  # and this one would be infinite
    scales = (x.abs().amax(-1, keepdim=True) / largest).clamp(max=65504.0).half().float()
    codes = torch.where(scales > 0, x / scales, 0.0).round().clamp(-largest, largest)
    leaf = x.clone().requires_grad_()
    y = formats.fake_quantize_kv(leaf, bits)
    assert torch.equal(y, codes * scales)
    y.backward(x)
    assert leaf.grad is not None
    assert bits_equal(leaf.grad, x)
