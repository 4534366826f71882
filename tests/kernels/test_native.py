"""The kernel library, on every instruction set that this machine can run: equal to `reference.linear` to the bit.

`kernels_selftest.cpp` compares the same functions where there is no Python: other processors, sanitizers.
"""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.kernels import build, native, reference
from edgerazor.kernels.native import FormatRows, RowLayout

ALL = formats.names()
COLUMNS = [1, 3, 31, 33, 127, 172, 960]
GROUPS = [32, 64, 100, 128, 256, 10**6]
ISAS = native.isas()

needs_library = pytest.mark.skipif(not ISAS, reason="no library: there was no C++ compiler")


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts_of(encoded: Encoded, spec: MatrixSpec) -> list[FormatRows]:
    """The stored parts of a matrix whose rows have formats."""
    stored = formats.pack_matrix(encoded, spec)
    parts = []
    for number_format, rows in spec.format_rows:
        name = number_format.name
        count = len(encoded.codes) if rows is None else len(rows)
        row_numbers = None if rows is None else rows.to(torch.int32)
        parts.append(FormatRows.of(stored[name], stored[f"{name}.scales"], count, number_format, row_numbers))
    return parts


def product(
    x: Tensor, encoded: Encoded, spec: MatrixSpec, isa: int, group: int, bias: Tensor | None = None, bits: int = 8
) -> Tensor:
    layout = RowLayout(x.shape[1], spec.group_size, group)
    return native.linear(native.quantize(x, layout, bits, None, isa), layout, parts_of(encoded, spec), bias, isa)


def test_the_library_is_built_where_there_is_a_compiler() -> None:
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler")
    assert ISAS[:1] == ("portable",), "run python -m edgerazor.kernels.build"


@needs_library
def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._opened.__wrapped__()[0] is not None
    monkeypatch.setattr(build, "fingerprint", lambda: "another")
    assert native._opened.__wrapped__() == (None, "the native library was built from other sources")


@needs_library
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: b"", "is an empty file"),
        (lambda whole: b"no library\n", "is no library"),
        (lambda whole: whole[:100], "is cut off"),
        (lambda whole: whole[: len(whole) // 2], "is cut off"),
        (lambda whole: whole[:-1], "is cut off"),
        (lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], "is cut off, or was changed"),
        (lambda whole: build.sealed(build.ELF), "cannot be loaded"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="libraries of other systems have no seal")
def test_a_damaged_library_is_not_loaded(damage, said, tmp_path, monkeypatch) -> None:
    """A cut one ends the process when the system loads it, so it is looked at first."""
    whole = Path(native.__file__).with_name(build.LIBRARY).read_bytes()
    folder = tmp_path / uuid4().hex  # a library whose path was loaded before is not looked at again
    folder.mkdir()
    (folder / build.LIBRARY).write_bytes(damage(whole))
    monkeypatch.setattr(native, "__file__", str(folder / "native.py"))
    library, reason = native._opened.__wrapped__()
    assert library is None
    assert said in reason
    (folder / build.LIBRARY).write_bytes(whole)
    assert native._opened.__wrapped__()[0] is not None


def test_only_sources_are_sources(tmp_path, monkeypatch) -> None:
    """A folder, or what an editor leaves behind, is none; a change of a source is another library."""
    (tmp_path / "a.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    before = build.fingerprint()
    (tmp_path / "folder.cpp").mkdir()
    (tmp_path / ".a.cpp.swp").write_text("int")
    assert build.fingerprint() == before
    (tmp_path / "b.h").write_text("int b;")
    assert build.fingerprint() != before


def test_a_build_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CXX", "'")
    monkeypatch.setattr(sys, "argv", ["build"])
    assert build.main() == 1
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "missing")
    monkeypatch.setattr(build, "_run", lambda command: "x86_64-linux-gnu")
    assert build.main() == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("the kernels were not built: ") for line in said)


@needs_library
def test_products_in_a_child_process_and_without_threads(monkeypatch) -> None:
    """A pool does not survive a fork; where the system has no more threads, those that there are do the work."""
    spec = MatrixSpec(("int4",), 32)
    encoded = formats.encode_matrix(weights(300, 64), spec)
    matrix = native.Matrix(formats.pack_matrix(encoded, spec), spec, (300, 64))
    x = weights(2, 64, seed=1)
    expected = matrix.linear(x, threads=3)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(matrix.linear(x, threads=3), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", no_thread)
    assert torch.equal(matrix.linear(x, threads=3), expected)


@needs_library
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("group", GROUPS)
def test_products_equal_the_reference_to_the_bit(columns: int, group: int) -> None:
    """Every format, row counts that fill no block, other activation groups; GEMV of a token and GEMM of several."""
    x = weights(7, columns)
    for name in ALL:
        for rows, activation_group in ((1, group), (31, 64), (33, 100), (70, 33)):
            spec = MatrixSpec((name,), group)
            encoded = formats.encode_matrix(weights(rows, columns, seed=1), spec)
            expected = reference.linear(x, encoded, spec, None, 8, activation_group)
            for isa, label in enumerate(ISAS):
                y = product(x, encoded, spec, isa, activation_group)
                assert torch.equal(y, expected), (label, name, rows)
                alone = product(x[2:3], encoded, spec, isa, activation_group)
                assert torch.equal(alone, expected[2:3]), (label, name, rows)


@needs_library
@pytest.mark.parametrize("columns", [172, 960])
def test_mixed_rows_bias_and_few_bits(columns: int) -> None:
    x, w, bias = weights(5, columns), weights(83, columns, seed=1), weights(83, seed=2)
    spec = MatrixSpec(tuple(ALL), 64, (torch.arange(83) * 5 % len(ALL)).to(torch.uint8))
    encoded = formats.encode_matrix(w, spec)
    for bits in (2, 4, 8):
        expected = reference.linear(x, encoded, spec, bias, bits, 64)
        for isa, label in enumerate(ISAS):
            assert torch.equal(product(x, encoded, spec, isa, 64, bias, bits), expected), label


@needs_library
@pytest.mark.parametrize("name", ALL)
def test_any_number_of_tokens_gives_the_same_bits(name: str) -> None:
    """In rows of whole chunks: one token, a few of them in one group or in several, and many."""
    x, spec = weights(70, 512), MatrixSpec((name,), 256)
    encoded = formats.encode_matrix(weights(35, 512, seed=1), spec)
    expected = reference.linear(x, encoded, spec, None, 8, 256)
    for isa, label in enumerate(ISAS):
        for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 32, 33, 70):
            assert torch.equal(product(x[:tokens], encoded, spec, isa, 256), expected[:tokens]), (label, tokens)


@needs_library
def test_extreme_codes_stay_exact() -> None:
    """The largest sums: every code the lowest or the highest of its format, every activation -127 or 127."""
    x = torch.full((3, 512), 127.0)
    x[1] = -127
    x[2, ::2] = -127
    for name in ALL:
        number_format = formats.get(name)
        for code in (number_format.min_code, number_format.max_code):
            codes = torch.full((17, 512), code, dtype=torch.int8)
            for group in (64, 256, 512):
                scales = torch.ones(17, 512 // group, dtype=torch.float16)
                level = float(number_format.level_(torch.tensor([float(code)])))
                expected = (x.double().sum(1, keepdim=True) * level).float().expand(3, 17)
                for isa, label in enumerate(ISAS):
                    y = product(x, Encoded(codes, scales), MatrixSpec((name,), group), isa, group)
                    assert torch.equal(y, expected), (label, name, code)


@needs_library
def test_segments_are_cut_before_sums_leave_32_bits() -> None:
    """A row of 100,000 columns in one group: the sums of int8 with int8 are beyond 2^31 together."""
    columns = 100_000
    codes = torch.full((2, columns), 127, dtype=torch.int8)
    encoded = Encoded(codes, torch.ones(2, 1, dtype=torch.float16))
    x = torch.full((2, columns), 127.0)
    for isa, label in enumerate(ISAS):
        y = product(x, encoded, MatrixSpec(("int8",), columns), isa, columns)
        assert torch.allclose(y, torch.tensor(127.0 * 127 * columns), rtol=1e-6), label


@needs_library
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("group", [32, 33, 256])
def test_activations_are_quantized_as_in_formats(columns: int, group: int) -> None:
    """Codes, scales and sums; ties, zero groups, tiny numbers and huge ones among them."""
    x = weights(9, columns)
    x[1] = 0
    x[2, ::2] = 0.5
    x[2, 0] = 127  # the scale is 1: halves are ties
    x[3] *= 1e-40
    x[4] *= 3e37
    x[5, : columns // 2] = 0
    layout = RowLayout(columns, 64, group)
    cuts = sorted({0, columns, *range(64, columns, 64), *range(group, columns, group)})
    for bits in (2, 5, 8):
        codes, scales = formats.quantize_activations(x, bits, group)
        sums = torch.stack([codes[:, a:b].sum(1, dtype=torch.int32) for a, b in pairwise(cuts)], dim=1)
        for isa, label in enumerate(ISAS):
            quantized = native.quantize(x, layout, bits, None, isa)
            assert torch.equal(quantized.scales, scales[:, [a // group for a, _ in pairwise(cuts)]]), label
            assert torch.equal(quantized.sums, sums), label
            if group != 33:
                assert torch.equal(quantized.codes[:, :columns], codes), label
                assert not quantized.codes[:, columns:].any()


@needs_library
def test_one_scale_for_all_activations() -> None:
    x, w, spec = weights(6, 200), weights(20, 200, seed=1), MatrixSpec(("ternary",), 64)
    encoded = formats.encode_matrix(w, spec)
    layout = RowLayout(200, 64, 200)
    for scale in (0.01, 0.03, 2.0):
        expected = reference.linear(x, encoded, spec, None, 8, 64, scale)
        for isa, label in enumerate(ISAS):
            quantized = native.quantize(x, layout, 8, scale, isa)
            assert torch.equal(native.linear(quantized, layout, parts_of(encoded, spec), None, isa), expected), label


@needs_library
def test_rows_of_a_table_are_the_decoded_rows() -> None:
    for name in ALL:
        for columns, group in ((960, 64), (172, 256), (33, 10), (300, 300)):
            spec = MatrixSpec((name,), group)
            encoded = formats.encode_matrix(weights(35, columns), spec)
            table, (part,) = formats.decode_matrix(encoded, spec), parts_of(encoded, spec)
            layout = RowLayout(columns, group, group)
            ids = torch.tensor([0, 34, 16, 16])
            assert torch.equal(native.dequantize_rows(layout, part, ids), table[ids]), name


@needs_library
def test_a_matrix_of_stored_parts_computes_what_the_reference_computes() -> None:
    """With rows of all formats and of one, any shape of x, dynamic and static scales, some threads."""
    w, x, bias = weights(200, 172), weights(2, 3, 172, seed=1), weights(200, seed=2)
    choice = (torch.arange(200) * 5 % len(ALL)).to(torch.uint8)
    ids = torch.tensor([[3, 199, 3], [0, 7, 16]])
    for spec in (MatrixSpec(tuple(ALL), 64, choice), MatrixSpec(("ternary",), 256)):
        encoded = formats.encode_matrix(w, spec)
        matrix = native.Matrix(formats.pack_matrix(encoded, spec), spec, (200, 172))
        for isa in range(len(ISAS)):
            for threads in (1, 2, 3, 20):
                for scale in (None, 0.02, 1e-9):
                    expected = reference.linear(x, encoded, spec, bias, 8, 64, scale)
                    assert torch.equal(matrix.linear(x, bias, 8, 64, scale, isa, threads), expected)
        assert torch.equal(matrix.embedding(ids), reference.embedding(ids, encoded, spec))
        assert matrix.embedding(ids[:0]).shape == (0, 3, 172)
        assert matrix.linear(x[:0]).shape == (0, 3, 200)
        with pytest.raises(ValueError, match="between 0 and 199"):
            matrix.embedding(ids + 1)
        with pytest.raises(ValueError, match="172 columns, but its input has 171"):
            matrix.linear(x[..., 1:])
    blocks = MatrixSpec(("int4",), 64, block_formats=torch.zeros(1, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="formats of blocks"):
        native.Matrix(formats.pack_matrix(formats.encode_matrix(w, blocks), blocks), blocks, (200, 172))


@needs_library
@pytest.mark.parametrize("columns", [33, 960, 1024])
def test_expanded_ternary_codes_compute_the_same(columns: int) -> None:
    x, spec = weights(5, columns), MatrixSpec(("ternary",), 64)
    encoded = formats.encode_matrix(weights(40, columns, seed=1), spec)
    layout = RowLayout(columns, 64, 64)
    (part,) = parts_of(encoded, spec)
    for isa, label in enumerate(ISAS):
        expanded = native.expand_ternary(layout, part, isa)
        quantized = native.quantize(x, layout, isa=isa)
        expected = native.linear(quantized, layout, [part], None, isa)
        assert torch.equal(native.linear(quantized, layout, [expanded], None, isa), expected), label


@needs_library
@pytest.mark.parametrize("columns", [33, 960, 1300])
def test_bytes_that_stand_for_no_codes_are_harmless(columns: int) -> None:
    """Base-3 bytes above 242 and ternary fields of 3, in files with checksums to match: numbers, and in their place."""
    layout, count = RowLayout(columns, 64, 64), 40
    generator = torch.Generator().manual_seed(0)
    for bits, min_level_x2 in ((0, -2), (2, -4), (3, -8), (4, -16)):
        shape = (3, layout.block_bytes(bits))
        for codes in (
            torch.randint(0, 256, shape, generator=generator).to(torch.uint8),
            torch.full(shape, 255, dtype=torch.uint8),
        ):
            part = FormatRows(codes, torch.ones(3, layout.groups, 16, dtype=torch.float16), count, bits, min_level_x2)
            for isa, label in enumerate(ISAS):
                for tokens in (1, 9, 40):
                    y = torch.full((tokens, count + 8), 7.0)
                    x = native.quantize(weights(tokens, columns), layout, isa=isa)
                    native.linear_blocks(x, layout, part, None, y, 0, part.blocks, isa)
                    assert y.isfinite().all(), label
                    assert (y[:, count:] == 7).all(), label
                if bits == 0:
                    assert (
                        native.dequantize_rows(layout, native.expand_ternary(layout, part, isa), torch.arange(count))
                        .isfinite()
                        .all()
                    )
            assert native.dequantize_rows(layout, part, torch.arange(count)).isfinite().all()


@needs_library
@pytest.mark.parametrize("words", [0, 1, 7, 8, 1003])
def test_reading_looks_at_every_word(words: int) -> None:
    memory = torch.randint(-(2**63), 2**63 - 1, (words,), generator=torch.Generator().manual_seed(0))
    expected = 0
    for each in memory.tolist():
        expected ^= each & (2**64 - 1)
    assert native.read(memory) == expected


@needs_library
def test_what_does_not_fit_is_refused() -> None:
    spec = MatrixSpec(("int4",), 64)
    encoded = formats.encode_matrix(weights(20, 100), spec)
    (part,) = parts_of(encoded, spec)
    layout = RowLayout(100, 64, 64)
    with pytest.raises(ValueError, match="not finite"):
        native.quantize(torch.full((1, 100), float("nan")), layout)
    with pytest.raises(ValueError, match="100 columns, but its input has 99"):
        native.quantize(torch.zeros(1, 99), layout)
    with pytest.raises(ValueError, match="2 to 8 bits, not 9"):
        native.quantize(torch.zeros(1, 100), layout, 9)
    quantized = native.quantize(torch.zeros(1, 100), layout)
    for wrong in (
        FormatRows(part.codes[:, :-1], part.scales, part.count, part.bits, part.min_level_x2),
        FormatRows(part.codes, part.scales.float(), part.count, part.bits, part.min_level_x2),
        FormatRows(part.codes, part.scales, part.count + 16, part.bits, part.min_level_x2),
        FormatRows(part.codes, part.scales, part.count, 5, part.min_level_x2),
        FormatRows(part.codes, part.scales, 20, 4, -16, torch.full((20,), 20, dtype=torch.int32)),
    ):
        with pytest.raises(ValueError, match="must be"):
            native.linear(quantized, layout, [wrong])
    with pytest.raises(ValueError, match="between 0 and 19"):
        native.dequantize_rows(layout, part, torch.tensor([20]))


def test_numpy_agrees_on_what_a_segment_sums() -> None:
    """By hand: one row, one group, codes 1 0 -1 1 with scale 2 and activations 127 -1 64 -127."""
    if not ISAS:
        pytest.skip("no library: there was no C++ compiler")
    codes = np.array([[1, 0, -1, 1]], dtype=np.int8)
    encoded = Encoded(torch.from_numpy(codes), torch.full((1, 1), 2.0, dtype=torch.float16))
    x = np.array([127.0, -1.0, 64.0, -127.0], dtype=np.float32)
    for isa in range(len(ISAS)):
        y = product(torch.from_numpy(x)[None], encoded, MatrixSpec(("ternary",), 4), isa, 4)
        assert float(y) == 2 * float(codes[0] @ x) == -128


@needs_library
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("group", [32, 33, 64, 100, 256, 300, 10**6])
def test_products_with_activations_as_they_are(columns: int, group: int) -> None:
    """Every format, bias, some threads, a token alone and among others: float64 products up to float32 rounding."""
    x, bias = weights(2, 5, columns), weights(83, seed=2)
    rows = (torch.arange(83) * 5 % len(ALL)).to(torch.uint8)
    for spec in (MatrixSpec(tuple(ALL), group, rows), *(MatrixSpec((name,), group) for name in ALL)):
        encoded = formats.encode_matrix(weights(83, columns, seed=1), spec)
        matrix = native.Matrix(formats.pack_matrix(encoded, spec), spec, (83, columns))
        exact = x.double() @ formats.decode_matrix(encoded, spec).double().T
        size = exact.norm(dim=-1, keepdim=True)
        for isa, label in enumerate(ISAS):
            y = matrix.linear_float(x, bias, isa, threads=3)
            assert y.dtype == torch.float32
            assert (((y - bias) - exact).abs() <= 1e-6 * size + 1e-6).all(), (label, spec.formats)
            alone = matrix.linear_float(x[1, 3], None, isa)
            assert ((alone - exact[1, 3]).abs() <= 1e-6 * size[1, 3]).all(), (label, spec.formats)


@needs_library
def test_many_tokens_and_no_tokens_as_they_are() -> None:
    x, spec = weights(500, 100), MatrixSpec(("int3",), 50)
    encoded = formats.encode_matrix(weights(150, 100, seed=1), spec)
    matrix = native.Matrix(formats.pack_matrix(encoded, spec), spec, (150, 100))
    exact = x.double() @ formats.decode_matrix(encoded, spec).double().T
    for isa, label in enumerate(ISAS):
        y = matrix.linear_float(x, None, isa, 2)
        assert (y - exact).norm() <= 1e-6 * exact.norm(), label
        assert matrix.linear_float(x[:0], None, isa).shape == (0, 150)
        wrong = x.clone()
        wrong[3, 7] = torch.nan
        bad = matrix.linear_float(wrong, None, isa)
        assert bad[3].isnan().all()
        assert torch.equal(bad[4:], matrix.linear_float(x[4:], None, isa))
    with pytest.raises(ValueError, match="100 columns, but its input has 99"):
        matrix.linear_float(x[:, 1:])
