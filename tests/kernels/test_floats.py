"""The float kernels of the decoder (`cpp/float_kernels.hpp`), on every instruction set that this machine can run.

AttentionArgs is compared with PyTorch's own in float64, over keys and values that are read back from the cache.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, byref, c_bool, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.kernels import native
from edgerazor.kernels.decoder import rows_by_sixteen

pytestmark = pytest.mark.skipif(not native.isas(), reason="no library: there was no C++ compiler")

#: KV slots of a page, and keys that lie side by side.
PAGE, KEYS = 256, 16

Pair = tuple[int, int]


class KvPage(ctypes.Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("key_scales", c_void_p), ("value_scales", c_void_p))


class SlotRange(ctypes.Structure):
    _fields_ = (("slot", c_int64), ("count", c_int64), ("pages", c_void_p))


class AttentionArgs(ctypes.Structure):
    _fields_ = (
        ("bits", c_int),
        ("head_dim", c_int),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("pages", POINTER(KvPage)),
        ("queries", c_void_p),
        ("query_stride", c_int64),
        ("heads", c_int),
        ("tokens", c_int),
        ("ranges", SlotRange * 2),
        ("sliding_window", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("scratch", c_void_p),
        ("next_keys", c_void_p),
        ("next_values", c_void_p),
    )


class ConvolutionArgs(ctypes.Structure):
    _fields_ = (
        *(("tokens", c_int64), ("features", c_int64), ("kernel", c_int)),
        *(("x", c_void_p), ("x_stride", c_int64), ("before", c_void_p), ("after", c_void_p)),
        *(("weight", c_void_p), ("bias", c_void_p), ("weight_stride", c_int64), ("silu", c_bool)),
        *(("state_in", c_void_p), ("state_out", c_void_p), ("state_stride", c_int64)),
        *(("out", c_void_p), ("out_stride", c_int64)),
    )


class DeltaRuleArgs(ctypes.Structure):
    _fields_ = (
        *(("tokens", c_int64), ("key_dim", c_int), ("value_dim", c_int)),
        *(("q", c_void_p), ("k", c_void_p), ("v", c_void_p), ("stride", c_int64)),
        *(("decay", c_void_p), ("beta", c_void_p), ("factor_stride", c_int64)),
        *(("state_in", c_void_p), ("state_out", c_void_p), ("lengths", c_void_p)),
        *(("out", c_void_p), ("out_stride", c_int64)),
    )


class StateSpaceArgs(ctypes.Structure):
    _fields_ = (
        *(("tokens", c_int64), ("state_size", c_int), ("head_dim", c_int), ("skip", c_float)),
        *(("x", c_void_p), ("b", c_void_p), ("c", c_void_p), ("stride", c_int64)),
        *(("decay", c_void_p), ("step", c_void_p), ("factor_stride", c_int64)),
        *(("state_in", c_void_p), ("state_out", c_void_p), ("out", c_void_p), ("out_stride", c_int64)),
    )


class UnpackedArgs(ctypes.Structure):
    _fields_ = (
        *(("tokens", c_int64), ("columns", c_int64), ("blocks", c_int64)),
        *(("x", c_void_p), ("rows", c_void_p), ("half", c_bool), ("out", c_void_p), ("out_stride", c_int64)),
    )


class FloatKernels(ctypes.Structure):
    _fields_ = (
        ("rms_norm", CFUNCTYPE(None, c_void_p, c_int, c_float, c_void_p, c_void_p)),
        ("layer_norm", CFUNCTYPE(None, c_void_p, c_int, c_float, c_void_p, c_void_p, c_void_p)),
        ("rope", CFUNCTYPE(None, c_void_p, c_int, c_void_p, c_void_p)),
        ("swiglu", CFUNCTYPE(None, c_void_p, c_void_p, c_int, c_void_p)),
        ("add", CFUNCTYPE(None, c_void_p, c_void_p, c_int)),
        ("store_kv", CFUNCTYPE(c_bool, POINTER(KvPage), c_int, c_int, c_int, c_void_p, c_void_p)),
        ("attention", CFUNCTYPE(None, POINTER(AttentionArgs))),
        ("attention_scratch_bytes", CFUNCTYPE(c_int64, c_int, c_int, c_int)),
        ("argmax", CFUNCTYPE(c_int32, c_void_p, c_int64)),
        ("log_sum_exp", CFUNCTYPE(c_float, c_void_p, c_int64)),
        ("geglu", CFUNCTYPE(None, c_void_p, c_void_p, c_int, c_void_p)),
        ("reglu_squared", CFUNCTYPE(None, c_void_p, c_void_p, c_int, c_void_p)),
        ("sigmoid_gate", CFUNCTYPE(None, c_void_p, c_int, c_void_p)),
        ("soft_cap", CFUNCTYPE(None, c_void_p, c_int64, c_float)),
        ("convolve", CFUNCTYPE(None, POINTER(ConvolutionArgs))),
        ("delta_rule", CFUNCTYPE(None, POINTER(DeltaRuleArgs))),
        ("state_space", CFUNCTYPE(None, POINTER(StateSpaceArgs))),
        ("multiply_unpacked", CFUNCTYPE(None, POINTER(UnpackedArgs))),
        ("add_scaled", CFUNCTYPE(None, c_void_p, c_void_p, c_float, c_int64)),
    )


@cache
def floats(isa: str) -> FloatKernels:
    library = native.library()
    assert library is not None
    function = library.edgerazor_float_kernels
    function.restype, function.argtypes = POINTER(FloatKernels), [c_int]
    table: FloatKernels = function(native.isas().index(isa)).contents
    return table


@pytest.fixture(params=native.isas())
def table(request: pytest.FixtureRequest) -> FloatKernels:
    return floats(request.param)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(result: Tensor, expected: Tensor) -> float:
    """Relative, in the L2 norm."""
    return float((result.double() - expected).norm() / expected.norm())


def aligned(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that begins at a multiple of 64, filled with bytes that are neither numbers nor codes."""
    size = torch.empty(0, dtype=dtype).element_size()
    memory = torch.full((count * size + 64,), 255, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64
    return memory[begin : begin + count * size].view(dtype)


# The KV cache ---------------------------------------------------------------------------------------------------------


class Cache:
    """Some pages of one head."""

    def __init__(self, table: FloatKernels, pages: int, bits: int, head_dim: int) -> None:
        self.table, self.bits, self.head_dim = table, bits, head_dim
        width = head_dim if bits != 4 else (head_dim + 1) // 2
        dtype = {8: torch.int8, 4: torch.uint8, 16: torch.float32}[bits]
        self.keys = aligned(pages * PAGE * width, dtype).view(pages, PAGE // KEYS, width, KEYS)
        self.values = aligned(pages * PAGE * width, dtype).view(pages, PAGE, width)
        self.scales = aligned(2 * pages * PAGE).view(2, pages, PAGE)
        self.pages = (KvPage * pages)(
            *(
                KvPage(*(each[page].data_ptr() for each in (self.keys, self.values, *self.scales)))
                for page in range(pages)
            )
        )

    def store(self, slot: int, key: Tensor, value: Tensor) -> bool:
        page = byref(self.pages[slot // PAGE])
        place = (slot % PAGE, self.bits, self.head_dim)
        stored: bool = self.table.store_kv(page, *place, key.data_ptr(), value.data_ptr())
        return stored

    def dequantize(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values float32 [slots, head_dim] as they are stored."""
        page, slot = slots // PAGE, slots % PAGE
        keys, values = self.keys[page, slot // KEYS, :, slot % KEYS], self.values[page, slot]
        if self.bits == 16:
            return keys, values
        decoded = [
            codes.float() * scales[page, slot, None]
            for codes, scales in zip(map(self._codes, (keys, values)), self.scales, strict=True)
        ]
        return decoded[0], decoded[1]

    def _codes(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes
        return torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()[:, : self.head_dim] - 8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [1, 5, 64, 80, 128, 257, 600])
def test_the_kv_cache_rounds_as_formats_does(table: FloatKernels, bits: int, head_dim: int) -> None:
    keys, values = numbers(40, head_dim), numbers(40, head_dim, seed=1)
    keys *= torch.logspace(-12, 6, 40)[:, None]  # scales above the largest fp16, below the smallest, and all between
    values[3] = 0
    values[4] = torch.arange(head_dim) % 15 - 7.5  # ties
    values[4, 0] = 127
    cache = Cache(table, 1, bits, head_dim)
    for slot in range(40):
        assert cache.store(slot, keys[slot], values[slot])
    stored_keys, stored_values = cache.dequantize(torch.arange(40))
    assert torch.equal(stored_keys, formats.fake_quantize_kv(keys, bits))
    assert torch.equal(stored_values, formats.fake_quantize_kv(values, bits))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_stored(table: FloatKernels, bits: int, wrong: float) -> None:
    cache, good, bad = Cache(table, 1, bits, 33), numbers(33), numbers(33)
    bad[32] = wrong
    assert cache.store(0, good, good)
    assert not cache.store(0, bad, good)
    assert not cache.store(0, good, bad)


# Attention ------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Ranges are (first KV slot, count)."""

    bits: int
    head_dim: int
    heads: int
    tokens: int
    prefix: Pair
    own: Pair
    window: int = 0
    soft_cap: float = 0.0


def expected_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, soft_cap: float
) -> Tensor:
    """Float64 [tokens, heads, head_dim] of queries of that shape; keys and values [slots, head_dim]."""
    tokens, slots = len(queries), len(keys)
    last = torch.arange(slots - tokens, slots)[:, None]  # KV slot of each token
    mask = torch.arange(slots) <= last
    if window:
        mask &= torch.arange(slots) > last - window
    q, k, v = (tensor.double() for tensor in (queries.transpose(0, 1), keys, values))
    heads = len(q)
    if soft_cap:
        scores = soft_cap * torch.tanh(q @ k.T * scale / soft_cap)
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    result = torch.nn.functional.scaled_dot_product_attention(
        q, k.expand(heads, -1, -1), v.expand(heads, -1, -1), attn_mask=mask, scale=scale
    )
    return result.transpose(0, 1)


def attention_error(table: FloatKernels, case: Case) -> float:
    ranges = [case.prefix, case.own]
    slots = torch.cat([torch.arange(first, first + count) for first, count in ranges])
    cache = Cache(table, int(slots.max()) // PAGE + 1, case.bits, case.head_dim)
    keys, values = numbers(len(slots), case.head_dim), numbers(len(slots), case.head_dim, seed=1)
    for i, slot in enumerate(slots.tolist()):
        assert cache.store(slot, keys[i], values[i])
    stride = case.heads * case.head_dim + 3
    queries, out = numbers(case.tokens, stride, seed=2), torch.full((case.tokens, stride), 7.0)
    size = table.attention_scratch_bytes(case.head_dim, case.heads, case.tokens)
    scratch = aligned(size, torch.uint8)
    args = AttentionArgs(
        bits=case.bits,
        head_dim=case.head_dim,
        scale=case.head_dim**-0.5,
        soft_cap=case.soft_cap,
        pages=cache.pages,
        queries=queries.data_ptr(),
        query_stride=stride,
        heads=case.heads,
        tokens=case.tokens,
        ranges=(SlotRange * 2)(*(SlotRange(*each) for each in ranges)),
        sliding_window=case.window,
        out=out.data_ptr(),
        out_stride=stride,
        scratch=scratch.data_ptr(),
    )
    table.attention(byref(args))
    assert (out[:, -3:] == 7).all()
    shape = (case.tokens, case.heads, case.head_dim)
    result, query = (tensor[:, :-3].reshape(shape) for tensor in (out, queries))
    scale = case.head_dim**-0.5
    return error(result, expected_attention(query, *cache.dequantize(slots), scale, case.window, case.soft_cap))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", [1, 5, 31, 64, 80, 96, 128, 256])
def test_attention_of_one_token_and_of_many(table: FloatKernels, bits: int, head_dim: int) -> None:
    for heads, tokens, own in ((1, 1, 1), (2, 1, 300), (3, 7, 7), (1, 70, 130), (7, 20, 65)):
        case = Case(bits, head_dim, heads, tokens, (0, 0), (0, own))
        assert attention_error(table, case) < 1e-6, case


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    "ranges",
    [
        ((0, 0), (16, 700)),  # from within a block, over borders of pages
        ((512, 300), (240, 260)),  # a prefix, and own slots across a border
        ((0, 5), (256, 64)),  # a prefix that fills no 16 slots
        ((0, 1), (272, 40)),
        ((1024, 256), (0, 33)),
    ],
)
def test_attention_over_two_ranges_and_borders_of_pages(
    table: FloatKernels, bits: int, ranges: tuple[Pair, Pair]
) -> None:
    for head_dim, heads, tokens in ((64, 2, 1), (48, 3, 5), (17, 1, 33)):
        case = Case(bits, head_dim, heads, tokens, *ranges)
        assert attention_error(table, case) < 1e-6, case


@pytest.mark.parametrize("window", [1, 2, 15, 16, 63, 64, 65, 200, 10**6])
def test_attention_with_a_sliding_window(table: FloatKernels, window: int) -> None:
    for bits, tokens, prefix, own in (
        (8, 1, (0, 0), (0, 300)),
        (8, 100, (0, 0), (0, 100)),
        (4, 40, (256, 90), (16, 120)),
        (16, 7, (512, 70), (0, 7)),
    ):
        case = Case(bits, 32, 2, tokens, prefix, own, window)
        assert attention_error(table, case) < 1e-6, case


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_attention_with_capped_scores(table: FloatKernels, bits: int) -> None:
    for tokens, own, window in ((1, 300, 0), (40, 100, 17)):
        case = Case(bits, 48, 3, tokens, (0, 0), (0, own), window, soft_cap=1.5)
        assert attention_error(table, case) < 1e-6, case


def test_attention_of_more_query_rows_than_are_computed_together(table: FloatKernels) -> None:
    for heads, tokens in ((1, 96), (1, 97), (8, 32), (5, 61)):
        case = Case(8, 64, heads, tokens, (0, 0), (0, tokens + 3))
        assert attention_error(table, case) < 1e-6, case


def test_attention_of_one_kv_slot_is_its_value(table: FloatKernels) -> None:
    """The softmax of one score is 1; of scores that are far apart, the value of the largest is the result."""
    cache, key = Cache(table, 1, 16, 8), torch.zeros(8)
    values = numbers(3, 8)
    for slot in range(3):
        key[0] = 1000.0 * slot
        assert cache.store(slot, key, values[slot])
    query, out = torch.tensor([1.0] + 7 * [0.0]), torch.empty(8)
    scratch = aligned(table.attention_scratch_bytes(8, 1, 1), torch.uint8)
    for sign, count, expected in ((1, 1, 0), (1, 2, 1), (1, 3, 2), (-1, 3, 0)):
        signed = sign * query
        args = AttentionArgs(16, 8, 1.0, 0.0, cache.pages, signed.data_ptr(), 8, 1, 1)
        args.ranges[1] = SlotRange(0, count)
        args.out, args.out_stride, args.scratch = out.data_ptr(), 8, scratch.data_ptr()
        table.attention(byref(args))
        assert torch.equal(out, values[expected])


# Norms and other functions of vectors ------------------------------------------------------------------------------

COUNTS = [1, 3, 16, 31, 64, 100, 1024, 3000]


@pytest.mark.parametrize("count", COUNTS)
def test_norms(table: FloatKernels, count: int) -> None:
    x, weight, bias = 3 * numbers(count) + 1, numbers(count, seed=1), numbers(count, seed=2)
    out = torch.empty(count)
    where = x.data_ptr(), count, 1e-6
    for each in (weight, None):
        w = torch.ones(count) if each is None else each
        table.rms_norm(*where, None if each is None else each.data_ptr(), out.data_ptr())
        expected = x.double() * (x.double().square().mean() + 1e-6).rsqrt() * w.double()
        assert error(out, expected) < 1e-6
    in_place = x.clone()
    table.rms_norm(in_place.data_ptr(), *where[1:], None, in_place.data_ptr())
    assert torch.equal(in_place, out)
    for w, b in ((weight, bias), (None, None), (weight, None)):
        table.layer_norm(
            x.data_ptr(), count, 1e-5, *(None if each is None else each.data_ptr() for each in (w, b)), out.data_ptr()
        )
        double = [None if each is None else each.double() for each in (w, b)]
        normal = torch.nn.functional.layer_norm(x.double(), (count,), *double, 1e-5)
        assert ((out - normal).abs() <= 1e-6 * (1 + normal.abs())).all()


def test_a_layer_norm_of_a_large_mean(table: FloatKernels) -> None:
    x, out = 1000 + numbers(300), torch.empty(300)
    table.layer_norm(x.data_ptr(), 300, 1e-5, None, None, out.data_ptr())
    assert error(out, torch.nn.functional.layer_norm(x.double(), (300,), None, None, 1e-5)) < 1e-4


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(128, 128), (64, 32), (80, 20), (6, 2)])
def test_rope_is_that_of_transformers(table: FloatKernels, head_dim: int, rope_dim: int) -> None:
    head, angles = numbers(head_dim), numbers(rope_dim // 2, seed=1)
    cosines, sines = angles.cos(), angles.sin()
    expected, rotated = head.double(), head[:rope_dim].double()
    halves = torch.cat([-rotated[rope_dim // 2 :], rotated[: rope_dim // 2]])
    expected[:rope_dim] = rotated * cosines.double().repeat(2) + halves * sines.double().repeat(2)
    table.rope(head.data_ptr(), rope_dim, cosines.data_ptr(), sines.data_ptr())
    assert error(head, expected) < 1e-6
    assert torch.equal(head[rope_dim:].double(), expected[rope_dim:])


@pytest.mark.parametrize("count", COUNTS)
def test_swiglu_and_sums(table: FloatKernels, count: int) -> None:
    gate, up, out = 4 * numbers(count), numbers(count, seed=1), torch.empty(count)
    table.swiglu(gate.data_ptr(), up.data_ptr(), count, out.data_ptr())
    assert error(out, torch.nn.functional.silu(gate.double()) * up.double()) < 3e-7
    expected = gate + up
    table.add(gate.data_ptr(), up.data_ptr(), count)
    assert torch.equal(gate, expected)


def test_swiglu_relative_to_each_number_and_at_the_extremes(table: FloatKernels) -> None:
    gate = torch.linspace(-80, 80, 40_001)
    up, out = torch.ones_like(gate), torch.empty_like(gate)
    table.swiglu(gate.data_ptr(), up.data_ptr(), len(gate), out.data_ptr())
    expected = torch.nn.functional.silu(gate.double())
    assert ((out - expected).abs() <= 3e-7 * expected.abs()).all()
    gate = torch.tensor([1e38, -1e38, -200.0, -95.0, 200.0, 0.0, torch.nan, torch.inf, -3e38, -87.5, -88.5])
    up = torch.ones(len(gate))
    table.swiglu(gate.data_ptr(), up.data_ptr(), len(gate), out.data_ptr())
    expected = torch.nn.functional.silu(gate.double())
    finite = expected.isfinite()
    assert torch.allclose(out[: len(gate)][finite].double(), expected[finite], rtol=3e-7, atol=1e-36)
    assert out[6].isnan()
    assert out[7] == torch.inf


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu_squared"])
def test_activations(table: FloatKernels, name: str, gated: bool) -> None:
    for count in (1, 16, 101):
        gate, up, out = 4 * numbers(count), numbers(count, seed=1), torch.empty(count)
        getattr(table, name)(gate.data_ptr(), up.data_ptr() if gated else None, count, out.data_ptr())
        x = gate.double()
        expected = {
            "swiglu": torch.nn.functional.silu,
            "geglu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
            "reglu_squared": lambda x: x.relu().square(),
        }[name](x) * (up.double() if gated else 1)
        assert error(out, expected) < 1e-6


def test_gelu_relative_to_each_number(table: FloatKernels) -> None:
    gate = torch.linspace(-6, 60, 10_001)
    out = torch.empty_like(gate)
    table.geglu(gate.data_ptr(), None, len(gate), out.data_ptr())
    expected = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    x = gate.double()  # written with tanh, it loses all digits of a small factor
    exact = x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    assert ((out - exact).abs() <= 2e-5 * exact.abs()).all()
    assert ((out - expected).abs() <= 1e-6).all()


@pytest.mark.parametrize("count", COUNTS)
def test_gates_and_caps(table: FloatKernels, count: int) -> None:
    gate, x = 8 * numbers(count), numbers(count, seed=1)
    expected = x.double() * gate.double().sigmoid()
    table.sigmoid_gate(gate.data_ptr(), count, x.data_ptr())
    assert error(x, expected) < 1e-6
    capped = 3 * torch.tanh(gate.double() / 3)
    table.soft_cap(gate.data_ptr(), count, 3.0)
    assert error(gate, capped) < 1e-6


# Mixers that keep a state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "features", "gated"), [(3, 40, True), (4, 17, False), (1, 16, False), (7, 5, True)])
def test_a_convolution_in_pieces(table: FloatKernels, kernel: int, features: int, gated: bool) -> None:
    """It is that of the whole sequence; the state goes on in its place, or elsewhere."""
    tokens = 23
    x, factors = numbers(tokens, features), numbers(2, tokens, features, seed=1)
    weight, bias = numbers(kernel, features, seed=2), numbers(features, seed=3) if gated else None
    inputs = x.double() * (factors[0].double() if gated else 1)
    before = torch.cat([torch.zeros(kernel - 1, features, dtype=torch.float64), inputs])
    expected = sum(before[tap : tap + tokens] * weight[tap].double() for tap in range(kernel))
    expected = (expected + bias.double()) * factors[1] if bias is not None else torch.nn.functional.silu(expected)
    out, states = torch.full((tokens, features), 7.0), torch.full((2, max(1, kernel - 1), features), torch.nan)
    read = written = None
    for begin, end in ((0, 1), (1, 2), (2, 9), (9, 10), (10, 23)):
        written = states[0] if begin != 2 else states[1]
        args = ConvolutionArgs(
            *(end - begin, features, kernel, x[begin:].data_ptr(), features),
            *(factors[part, begin:].data_ptr() if gated else None for part in (0, 1)),
            *(weight.data_ptr(), None if bias is None else bias.data_ptr(), features, not gated),
            *(None if read is None else read.data_ptr(), written.data_ptr(), features),
            *(out[begin:].data_ptr(), features),
        )
        table.convolve(byref(args))
        read = written
    assert error(out, expected) < 1e-6


@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (12, 20), (5, 3), (64, 16)])
def test_the_gated_delta_rule_in_pieces(table: FloatKernels, key_dim: int, value_dim: int) -> None:
    tokens = 11
    width = 2 * key_dim + value_dim + 3
    qkv, decay, beta = numbers(tokens, width), numbers(tokens, seed=1).sigmoid(), numbers(tokens, seed=2).sigmoid()
    q, k, v = (part.double() for part in qkv[:, :-3].split([key_dim, key_dim, value_dim], dim=1))
    q, k = (part * (part.square().sum(1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
    state, rows = torch.zeros(key_dim, value_dim, dtype=torch.float64), []
    for t in range(tokens):
        state = state * decay[t].double()
        state = state + torch.outer(k[t], beta[t].double() * (v[t] - k[t] @ state))
        rows.append(q[t] @ state / key_dim**0.5)
    states = torch.full((2, -(-value_dim // 16) * 16 * key_dim), torch.nan)
    out, lengths = torch.full((tokens, value_dim), 7.0), torch.empty(2, tokens)
    read = None
    for begin, end in ((0, 1), (1, 6), (6, 7), (7, 11)):
        written = states[0] if begin != 6 else states[1]
        args = DeltaRuleArgs(
            *(end - begin, key_dim, value_dim),
            *(qkv[begin:].data_ptr() + 4 * offset for offset in (0, key_dim, 2 * key_dim)),
            *(width, decay[begin:].data_ptr(), beta[begin:].data_ptr(), 1),
            *(None if read is None else read.data_ptr(), written.data_ptr(), lengths.data_ptr()),
            *(out[begin:].data_ptr(), value_dim),
        )
        table.delta_rule(byref(args))
        read = written
    assert error(out, torch.stack(rows)) < 2e-6


@pytest.mark.parametrize(("state_size", "head_dim"), [(128, 64), (128, 32), (20, 16), (5, 3), (33, 20)])
def test_a_state_space_model_in_pieces(table: FloatKernels, state_size: int, head_dim: int) -> None:
    """In pieces it is, to the bit, what it is as a whole; the state goes on in its place, or elsewhere."""
    tokens, skip = 11, 0.7
    width = head_dim + 2 * state_size + 3
    rows, decay, steps = numbers(tokens, width), numbers(tokens, seed=1).sigmoid(), numbers(tokens, seed=2).exp()
    x, b, c = (part.double() for part in rows[:, :-3].split([head_dim, state_size, state_size], dim=1))
    state, expected = torch.zeros(state_size, head_dim, dtype=torch.float64), []
    for t in range(tokens):
        state = state * decay[t].double() + torch.outer(b[t], steps[t].double() * x[t])
        expected.append(c[t] @ state + skip * x[t])
    outputs = []
    for ends in ((11,), (1, 6, 7, 11)):
        states = torch.full((2, -(-head_dim // 16) * 16 * state_size), torch.nan)
        out, read = torch.full((tokens, head_dim), 7.0), None
        for begin, end in zip((0, *ends), ends, strict=False):
            written = states[0] if begin != 6 else states[1]
            args = StateSpaceArgs(
                *(end - begin, state_size, head_dim, skip),
                *(rows[begin:].data_ptr() + 4 * offset for offset in (0, head_dim, head_dim + state_size)),
                *(width, decay[begin:].data_ptr(), steps[begin:].data_ptr(), 1),
                *(None if read is None else read.data_ptr(), written.data_ptr()),
                *(out[begin:].data_ptr(), head_dim),
            )
            table.state_space(byref(args))
            read = written
        outputs.append(out)
    assert error(outputs[0], torch.stack(expected)) < 2e-6
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "columns"), [(1, 5), (16, 48), (64, 96), (130, 33)])
def test_unpacked_products_do_not_depend_on_other_tokens(
    table: FloatKernels, height: int, columns: int, dtype: torch.dtype
) -> None:
    blocks = -(-height // 16)
    matrix = numbers(height, columns).to(dtype)
    x, rows = numbers(23, columns, seed=1), rows_by_sixteen(matrix)
    assert rows.shape == (blocks, columns, 16)
    found = []
    for together in (23, 1, 4):
        out = torch.full((23, 16 * blocks), 7.0)
        for begin in range(0, 23, together):
            count = min(together, 23 - begin)
            args = UnpackedArgs(
                *(count, columns, blocks, x[begin:].data_ptr(), rows.data_ptr(), dtype == torch.bfloat16),
                *(out[begin:].data_ptr(), 16 * blocks),
            )
            table.multiply_unpacked(byref(args))
        found.append(out)
    assert error(found[0][:, :height], x.double() @ matrix.double().T) < 1e-6
    assert not found[0][:, height:].any()
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("count", COUNTS)
def test_scaled_sums(table: FloatKernels, count: int) -> None:
    x, y = numbers(count), numbers(count, seed=1)
    expected = x.double() + 0.3 * y.double()
    table.add_scaled(x.data_ptr(), y.data_ptr(), 0.3, count)
    assert error(x, expected) < 1e-6


@pytest.mark.parametrize("count", [*COUNTS, 151_936])
def test_argmax_and_log_sum_exp(table: FloatKernels, count: int) -> None:
    x = 5 * numbers(count)
    assert table.argmax(x.data_ptr(), count) == int(x.argmax())
    for shift in (0.0, 1000.0, -1000.0):
        moved = x + shift
        assert table.log_sum_exp(moved.data_ptr(), count) == pytest.approx(
            float(moved.double().logsumexp(0)), rel=1e-6, abs=2e-6
        )
    x[:] = -1e30
    x[count // 2 :] = 7
    assert table.argmax(x.data_ptr(), count) == count // 2
    x[:] = -torch.inf
    assert table.log_sum_exp(x.data_ptr(), count) == -torch.inf
    assert 0 <= table.argmax(x.data_ptr(), count) < count
    x[0] = torch.nan
    assert 0 <= table.argmax(x.data_ptr(), count) < count
