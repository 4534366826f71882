"""The scales of least squared error: within 1 % of the best there are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import MatrixSpec, _least_error

ALL = formats.names()
#: Weights of a group -> groups.
GROUPS = {32: 64, 64: 32, 128: 16, 256: 8, 2048: 1}


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def laplace(*shape: int) -> Tensor:
    u = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def errors(name: str, w: Tensor, scales: Tensor) -> Tensor:
    """Squared error of each row, a group, at the scale that is given for it."""
    spec = MatrixSpec((name,), w.shape[1])
    return (formats.round_trip(w, spec, scales=scales[:, None]) - w).double().square().sum(1)


def least(name: str, w: Tensor) -> float:
    """The sum over rows of the least error at any of the scales of a grid so fine that it has no better neighbours."""
    fine = name in ("int5", "int8")
    first, last, count = (0.6, 1.25, 700) if fine else (0.12, 1.3, 350)
    reaching = w.abs().amax(1) / formats.get(name).highest
    found = torch.full((len(w),), math.inf, dtype=torch.float64)
    for share in _least_error.geometric(first, last, count):
        found = torch.minimum(found, errors(name, w, reaching * share))
    return float(found.sum())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("draw", [gaussian, laplace])
@pytest.mark.parametrize("group_size", GROUPS)
def test_the_error_is_within_a_percent_of_the_best_scales(
    name: str, draw: Callable[..., Tensor], group_size: int
) -> None:
    w = draw(GROUPS[group_size], group_size)
    ours = float((formats.round_trip(w, MatrixSpec((name,), group_size)) - w).double().square().sum())
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
        found = {
            published: float((formats.round_trip(w, MatrixSpec((name,), 256, published=published)) - w).square().mean())
            / float(w.square().mean())
            for published in (False, True)
        }
        assert found[False] < found[True]
        if draw is gaussian:
            assert found[False] == pytest.approx(best, rel=0.03)
            assert found[True] == pytest.approx(rule, rel=0.03)


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
