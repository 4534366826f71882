"""What a decoder computes beside products with matrices (`cpp/floats.hpp`), on every instruction set of this machine.

Attention is compared with PyTorch's own in float64, over keys and values that are read back from the cache.
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

pytestmark = pytest.mark.skipif(not native.isas(), reason="no library: there was no C++ compiler")

#: Cells of a page, keys side by side.
PAGE, KEYS = 256, 16

Pair = tuple[int, int]


class HeadPage(ctypes.Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("key_scales", c_void_p), ("value_scales", c_void_p))


class Range(ctypes.Structure):
    _fields_ = (("cell", c_int64), ("count", c_int64))


class Attention(ctypes.Structure):
    _fields_ = (
        ("bits", c_int),
        ("head_dim", c_int),
        ("scale", c_float),
        ("pages", POINTER(HeadPage)),
        ("queries", c_void_p),
        ("query_stride", c_int64),
        ("heads", c_int),
        ("tokens", c_int),
        ("ranges", Range * 2),
        ("window", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("scratch", c_void_p),
    )


class Floats(ctypes.Structure):
    _fields_ = (
        ("rms_norm", CFUNCTYPE(None, c_void_p, c_int, c_float, c_void_p, c_void_p)),
        ("layer_norm", CFUNCTYPE(None, c_void_p, c_int, c_float, c_void_p, c_void_p, c_void_p)),
        ("rotate", CFUNCTYPE(None, c_void_p, c_int, c_void_p, c_void_p)),
        ("swiglu", CFUNCTYPE(None, c_void_p, c_void_p, c_int, c_void_p)),
        ("add", CFUNCTYPE(None, c_void_p, c_void_p, c_int)),
        ("store", CFUNCTYPE(c_bool, POINTER(HeadPage), c_int, c_int, c_int, c_void_p, c_void_p)),
        ("attend", CFUNCTYPE(None, POINTER(Attention))),
        ("attention_scratch", CFUNCTYPE(c_int64, c_int, c_int, c_int)),
        ("largest", CFUNCTYPE(c_int32, c_void_p, c_int64)),
        ("log_sum_exp", CFUNCTYPE(c_float, c_void_p, c_int64)),
    )


@cache
def floats(isa: str) -> Floats:
    found = native.library()
    assert found is not None
    function = found.edgerazor_floats
    function.restype, function.argtypes = POINTER(Floats), [c_int]
    table: Floats = function(native.isas().index(isa)).contents
    return table


@pytest.fixture(params=native.isas())
def table(request: pytest.FixtureRequest) -> Floats:
    return floats(request.param)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the L2 norm."""
    return float((found.double() - expected).norm() / expected.norm())


def aligned(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that begins at a multiple of 64, of bytes that are no numbers and no codes."""
    size = torch.empty(0, dtype=dtype).element_size()
    memory = torch.full((count * size + 64,), 255, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64
    return memory[begin : begin + count * size].view(dtype)


# The cache ------------------------------------------------------------------------------------------------------------


class Cache:
    """Some pages of one head."""

    def __init__(self, table: Floats, pages: int, bits: int, head_dim: int) -> None:
        self.table, self.bits, self.head_dim = table, bits, head_dim
        width = head_dim if bits != 4 else (head_dim + 1) // 2
        dtype = {8: torch.int8, 4: torch.uint8, 16: torch.float32}[bits]
        self.keys = aligned(pages * PAGE * width, dtype).view(pages, PAGE // KEYS, width, KEYS)
        self.values = aligned(pages * PAGE * width, dtype).view(pages, PAGE, width)
        self.scales = aligned(2 * pages * PAGE).view(2, pages, PAGE)
        self.pages = (HeadPage * pages)(
            *(
                HeadPage(*(each[page].data_ptr() for each in (self.keys, self.values, *self.scales)))
                for page in range(pages)
            )
        )

    def store(self, cell: int, key: Tensor, value: Tensor) -> bool:
        page = byref(self.pages[cell // PAGE])
        where = (cell % PAGE, self.bits, self.head_dim)
        found: bool = self.table.store(page, *where, key.data_ptr(), value.data_ptr())
        return found

    def numbers(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values float32 [cells, head_dim] as they are stored."""
        page, cell = cells // PAGE, cells % PAGE
        keys, values = self.keys[page, cell // KEYS, :, cell % KEYS], self.values[page, cell]
        if self.bits == 16:
            return keys, values
        decoded = [
            codes.float() * scales[page, cell, None]
            for codes, scales in zip(map(self._codes, (keys, values)), self.scales, strict=True)
        ]
        return decoded[0], decoded[1]

    def _codes(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes
        return torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()[:, : self.head_dim] - 8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [1, 5, 64, 80, 128, 257, 600])
def test_the_cache_rounds_as_formats_does(table: Floats, bits: int, head_dim: int) -> None:
    keys, values = numbers(40, head_dim), numbers(40, head_dim, seed=1)
    keys *= torch.logspace(-12, 6, 40)[:, None]  # scales above the largest fp16, below the smallest, and all between
    values[3] = 0
    values[4] = torch.arange(head_dim) % 15 - 7.5  # ties
    values[4, 0] = 127
    cache = Cache(table, 1, bits, head_dim)
    for cell in range(40):
        assert cache.store(cell, keys[cell], values[cell])
    found = cache.numbers(torch.arange(40))
    assert torch.equal(found[0], formats.fake_quantize_kv(keys, bits))
    assert torch.equal(found[1], formats.fake_quantize_kv(values, bits))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_stored(table: Floats, bits: int, wrong: float) -> None:
    cache, good, bad = Cache(table, 1, bits, 33), numbers(33), numbers(33)
    bad[32] = wrong
    assert cache.store(0, good, good)
    assert not cache.store(0, bad, good)
    assert not cache.store(0, good, bad)


# Attention ------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Ranges are (first cell, count)."""

    bits: int
    head_dim: int
    heads: int
    tokens: int
    prefix: Pair
    own: Pair
    window: int = 0


def expected_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """Float64 [tokens, heads, head_dim] of queries of that shape; keys and values [cells, head_dim]."""
    tokens, cells = len(queries), len(keys)
    last = torch.arange(cells - tokens, cells)[:, None]  # cell of each token
    seen = torch.arange(cells) <= last
    if window:
        seen &= torch.arange(cells) > last - window
    q, k, v = (each.double() for each in (queries.transpose(0, 1), keys, values))
    heads = len(q)
    result = torch.nn.functional.scaled_dot_product_attention(
        q, k.expand(heads, -1, -1), v.expand(heads, -1, -1), attn_mask=seen, scale=scale
    )
    return result.transpose(0, 1)


def attention_error(table: Floats, case: Case) -> float:
    ranges = [case.prefix, case.own]
    cells = torch.cat([torch.arange(first, first + count) for first, count in ranges])
    cache = Cache(table, int(cells.max()) // PAGE + 1, case.bits, case.head_dim)
    keys, values = numbers(len(cells), case.head_dim), numbers(len(cells), case.head_dim, seed=1)
    for i, cell in enumerate(cells.tolist()):
        assert cache.store(cell, keys[i], values[i])
    stride = case.heads * case.head_dim + 3
    queries, out = numbers(case.tokens, stride, seed=2), torch.full((case.tokens, stride), 7.0)
    size = table.attention_scratch(case.head_dim, case.heads, case.tokens)
    scratch = aligned(size, torch.uint8)
    work = Attention(
        bits=case.bits,
        head_dim=case.head_dim,
        scale=case.head_dim**-0.5,
        pages=cache.pages,
        queries=queries.data_ptr(),
        query_stride=stride,
        heads=case.heads,
        tokens=case.tokens,
        ranges=(Range * 2)(*(Range(*each) for each in ranges)),
        window=case.window,
        out=out.data_ptr(),
        out_stride=stride,
        scratch=scratch.data_ptr(),
    )
    table.attend(byref(work))
    assert (out[:, -3:] == 7).all()
    shape = (case.tokens, case.heads, case.head_dim)
    found, asked = (each[:, :-3].reshape(shape) for each in (out, queries))
    return error(found, expected_attention(asked, *cache.numbers(cells), case.head_dim**-0.5, case.window))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("head_dim", [1, 5, 31, 64, 80, 96, 128, 256])
def test_attention_of_one_token_and_of_many(table: Floats, bits: int, head_dim: int) -> None:
    for heads, tokens, own in ((1, 1, 1), (2, 1, 300), (3, 7, 7), (1, 70, 130), (7, 20, 65)):
        case = Case(bits, head_dim, heads, tokens, (0, 0), (0, own))
        assert attention_error(table, case) < 1e-6, case
