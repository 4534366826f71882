"""The scales of least squared error: within 1 % of the best there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import Format, MatrixSpec
from edgerazor.formats.core import least_error
from edgerazor.formats.core.least_error import ScaleGrid
from edgerazor.kernels import native

ALL = formats.names()
#: Weights of a group -> groups.
GROUPS = {32: 64, 64: 32, 128: 16, 256: 8, 2048: 1}


SIZES = [1, 3, 31, 33, 127, 256, 960, 5000]
ISAS = native.isas()

needs_library = pytest.mark.skipif(not ISAS, reason="no library: there was no C++ compiler")


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def laplace(*shape: int) -> Tensor:
    u = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def errors(name: str, w: Tensor, scales: Tensor) -> Tensor:
    """Squared error of each row, a group, at the scale that is given for it."""
    spec = MatrixSpec((name,), w.shape[1])
    return (formats.quantize_dequantize(w, spec, scales=scales[:, None]) - w).double().square().sum(1)


def least(name: str, w: Tensor) -> float:
    """The sum over rows of the least error at any of the scales of a grid so fine that it has no better neighbours."""
    fine = name in ("int5", "int8")
    first, last, count = (0.6, 1.25, 700) if fine else (0.12, 1.3, 350)
    shares = torch.tensor(least_error.geometric(first, last, count))
    scales = torch.outer(shares, w.abs().amax(1) / formats.get(name).max_level)
    return float(errors(name, w.repeat(count, 1), scales.flatten()).view(count, -1).amin(0).sum())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("draw", [gaussian, laplace])
@pytest.mark.parametrize("group_size", GROUPS)
def test_the_error_is_within_a_percent_of_the_best_scales(
    name: str, draw: Callable[..., Tensor], group_size: int
) -> None:
    w = draw(GROUPS[group_size], group_size)
    ours = float((formats.quantize_dequantize(w, MatrixSpec((name,), group_size)) - w).double().square().sum())
    assert ours <= 1.01 * least(name, w)


@pytest.mark.parametrize("draw", [gaussian, laplace])
def test_the_errors_are_those_of_the_best_quantizers(draw: Callable[..., Tensor]) -> None:
    """Of Gaussian weights in groups of 256: the figures known for it, and those of the published rules beside them."""
    figures = {
        "ternary": (0.188, 0.231),
        "int2": (0.118, 0.137),
        "int2z": (0.147, 0.65),
        "int3": (0.039, 0.087),
        "int4": (0.0110, 0.0160),
    }
    w = draw(256, 256)
    for name, (best, rule) in figures.items():
        error_of = {
            published: float(
                (formats.quantize_dequantize(w, MatrixSpec((name,), 256, published=published)) - w).square().mean()
            )
            / float(w.square().mean())
            for published in (False, True)
        }
        assert error_of[False] < error_of[True]
        if draw is gaussian:
            assert error_of[False] == pytest.approx(best, rel=0.03)
            assert error_of[True] == pytest.approx(rule, rel=0.03)


@pytest.mark.parametrize("name", ALL)
def test_groups_that_are_unlike_any_distribution(name: str) -> None:
    """A single weight, equal ones, far outliers, the smallest and largest numbers: the search stays with the best."""
    groups = {
        "alone": torch.tensor([[0.0, 0, 0, -3, 0, 0, 0, 0]]),
        "equal": torch.full((1, 8), 0.7),
        "outlier": torch.cat([gaussian(1, 63), torch.tensor([[40.0]])], dim=1),
        "tiny": gaussian(1, 64) * 2.0**-18,
        "huge": gaussian(1, 64) * 1e4,
    }
    for title, w in groups.items():
        encoded = formats.encode_matrix(w, MatrixSpec((name,), w.shape[1]))
        decoded = formats.decode_matrix(encoded, MatrixSpec((name,), w.shape[1]))
        ours = float((decoded - w).double().square().sum())
        assert ours <= 1.05 * least(name, w) + 1e-6 * float(w.double().square().sum()), title
        # a scale that is given chooses the codes as one that was found
        again = formats.encode_matrix(w, MatrixSpec((name,), w.shape[1]), encoded.scales)
        assert torch.equal(again.codes, encoded.codes)


@pytest.mark.parametrize("name", ALL)
def test_a_power_of_two_and_the_order_of_weights_do_not_show(name: str) -> None:
    w = gaussian(5, 96).bfloat16().float()
    spec = MatrixSpec((name,), 96)
    scales = formats.encode_matrix(w, spec).scales
    assert torch.equal(formats.encode_matrix(w * 2.0**-3, spec).scales, scales * 2.0**-3)
    assert torch.equal(formats.encode_matrix(w[:, torch.randperm(96)], spec).scales, scales)


# The native search ------------------------------------------------------------------------------------------------


def awkward(size: int) -> dict[str, Tensor]:
    """Groups [9, size] of all kinds."""
    zeros = gaussian(9, size)
    zeros[2] = 0
    zeros[5, 1:] = 0
    return {
        "gaussian": gaussian(9, size) * 0.02,
        "laplace": laplace(9, size),
        "bfloat16": gaussian(9, size).bfloat16().float(),
        "zeros": zeros,
        "outliers": gaussian(9, size) ** 7,
        "equal": torch.full((9, size), -0.7),
        "tiny": gaussian(9, size) * 2.0**-21,
        "denormal": gaussian(9, size) * 1e-41,
        "large": gaussian(9, size) * 2e4,
        "huge": gaussian(9, size) * 5e37,
    }


@needs_library
@pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", SIZES)
def test_the_native_search_finds_the_same_scales_to_the_bit(isa: int, name: str, size: int) -> None:
    number_format = formats.get(name)
    for title, groups in awkward(size).items():
        expected = least_error.reference_search(number_format, groups)
        codes = torch.empty(groups.shape, dtype=torch.int8)
        assert torch.equal(native.least_error(number_format, groups, codes, isa), expected), title
        assert torch.equal(native.least_error(number_format, groups, None, isa), expected), title
        chosen, _ = number_format.encode_block(groups, 1, expected[:, None])
        assert torch.equal(codes, chosen[:, 0].to(torch.int8)), title


@needs_library
@pytest.mark.parametrize("count", [1, 2, 3])
def test_grids_of_any_length(count: int) -> None:
    class Other(Format):
        name, nominal_bits, code_bits = "other", 4.0, 4
        min_rule_code, max_code = -7, 7
        grid = ScaleGrid(least_error.geometric(0.5, 1.1, 5)[:count], 1.0, absmax=count == 2, refinements=count)

        def scale_rule(self, groups: Tensor) -> Tensor:
            return groups.abs().amax(-1) / 7

    groups = laplace(20, 70)
    expected = least_error.reference_search(Other(), groups)
    assert torch.equal(native.least_error(Other(), groups), expected)


@needs_library
def test_threads_shapes_and_strides_of_the_native_search() -> None:
    number_format = formats.get("int4")
    groups = gaussian(6, 7, 48)
    expected = least_error.reference_search(number_format, groups)
    for threads in (1, 2, 5, 100):
        assert torch.equal(native.least_error(number_format, groups, threads=threads), expected)
    turned = groups.transpose(0, 1)
    assert torch.equal(native.least_error(number_format, turned), expected.transpose(0, 1))
    assert native.least_error(number_format, groups[:0]).shape == (0, 7)
    assert native.least_error(number_format, groups[0, 0]) == expected[0, 0]


@needs_library
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 40, 99])
def test_what_is_not_finite_has_no_scale(wrong: float, place: int) -> None:
    number_format = formats.get("ternary")
    groups = gaussian(12, 100)
    groups[7, place] = wrong
    with pytest.raises(ValueError, match="a weight is not finite"):
        least_error.reference_search(number_format, groups)
    for isa in range(len(ISAS)):
        with pytest.raises(ValueError, match="a weight is not finite"):
            native.least_error(number_format, groups, isa=isa, threads=3)


@needs_library
@pytest.mark.parametrize("groups", [torch.zeros(()), torch.zeros(3, 0), torch.zeros(3, 4).double()])
def test_groups_that_the_native_search_does_not_take(groups: Tensor) -> None:
    with pytest.raises(ValueError, match="groups must be float32"):
        native.least_error(formats.get("int4"), groups)


@needs_library
def test_codes_have_the_shape_of_their_groups() -> None:
    with pytest.raises(ValueError, match="codes must be contiguous int8"):
        native.least_error(formats.get("int4"), gaussian(3, 5), torch.empty(5, 3, dtype=torch.int8).T)
    with pytest.raises(ValueError, match="codes must be contiguous int8"):
        native.least_error(formats.get("int4"), gaussian(3, 5), torch.empty(3, 4, dtype=torch.int8))


@needs_library
def test_formats_search_natively_where_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in PyTorch where `EDGERAZOR_ISA` asks for it, or where a format rounds in a way of its own."""
    number_format, groups = formats.get("int3"), gaussian(4, 64)
    monkeypatch.setattr(native, "least_error", lambda *arguments: "native")
    monkeypatch.delenv("EDGERAZOR_ISA", raising=False)
    monkeypatch.setenv("EDGERAZOR_ISA", "portable")
    assert least_error.accelerated_search(number_format, groups) == "native"
    monkeypatch.setenv("EDGERAZOR_ISA", "reference")
    assert least_error.accelerated_search(number_format, groups) is None
    monkeypatch.setenv("EDGERAZOR_ISA", "portable")
    monkeypatch.setattr(type(number_format), "rounding", None)
    assert least_error.accelerated_search(number_format, groups) is None


@needs_library
@pytest.mark.parametrize("name", ALL)
def test_a_matrix_is_the_same_with_and_without_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, results = laplace(40, 100).bfloat16(), {}
    w[7, 64:] = 0
    for isa in ("portable", "reference"):
        monkeypatch.setenv("EDGERAZOR_ISA", isa)
        encoded = formats.encode_matrix(w, MatrixSpec((name,), 64))
        results[isa] = (*encoded, formats.quantize_dequantize(w, MatrixSpec((name,), 64)))
    for native_one, other in zip(*results.values(), strict=True):
        assert torch.equal(native_one, other)
