"""The rotation by the native library: the reference's bits, with every instruction set that this machine can run."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from edgerazor import formats, kernels
from edgerazor.formats import Rotation
from edgerazor.formats.core.rotation import hadamard_transform, seeded_signs
from edgerazor.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library is not built")

#: Columns, and blocks that divide them: every block, with rows that are no power of two and rows of one block.
SHAPES = [(2, 2), (6, 2), (12, 4), (48, 16), (576, 64), (1024, 512), (1536, 512), (1000, 8), (960, 64), (96, 32)]
SHAPES += [(3 * block, block) for block in (2, 4, 8, 16, 32, 64, 128, 256, 512)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of all magnitudes, zeros of both signs among them."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.tensor([0.0, -0.0, 1e-42, 1e-30, 1e-3, 1.0, 1.0, 30.0, 1e20])
    return torch.randn(shape, generator=draw) * scales[torch.randint(len(scales), shape, generator=draw)]


def equal(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit."""
    return found.dtype == expected.dtype == torch.float32 and torch.equal(
        found.view(torch.int32), expected.view(torch.int32)
    )


def defined(x: Tensor, rotation: Rotation, back: bool) -> Tensor:
    """By the reference of PyTorch."""
    x, signs = x.float(), rotation.signs.float()
    if back:
        return hadamard_transform(x, rotation.block) * signs
    return hadamard_transform(x * signs, rotation.block)


@pytest.mark.parametrize("isa", range(len(native.isas())), ids=native.isas())
def test_the_bits_are_those_of_the_reference(isa: int) -> None:
    draw = random.Random(1)
    for columns, block in SHAPES:
        rotation = Rotation(block, seeded_signs(columns))
        x = numbers(draw.randint(1, 9), columns, seed=columns + block)
        for back in (False, True):
            found = native.rotate(x, rotation, back, isa, threads=draw.randint(1, 3))
            assert equal(found, defined(x, rotation, back)), (columns, block, back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_shape_and_dtype(dtype: torch.dtype) -> None:
    rotation = Rotation(16, seeded_signs(48))
    x = numbers(48, 2, 5).to(dtype)
    given = x.movedim(0, 2)
    assert equal(native.rotate(given, rotation), defined(given, rotation, False))
    assert native.rotate(given[:0], rotation).shape == (0, 5, 48)
    with pytest.raises(ValueError, match="the rotation has 48 columns, but there are 5"):
        native.rotate(x, rotation)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """A sum that is too large becomes infinite in both: rounding of activations refuses it."""
    rotation = Rotation(64, torch.ones(128, dtype=torch.int8))
    x = torch.zeros(128)
    x[3] = x[7] = value
    for isa in range(len(native.isas())):
        found = native.rotate(x, rotation, isa=isa)
        assert torch.equal(torch.isfinite(found), torch.isfinite(defined(x, rotation, False)))
        assert not torch.isfinite(found).all()


def test_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `formats`, on a CPU, unless the reference is asked for; and gradients are as ever."""
    rotation = formats.hadamard(96)
    assert rotation is not None
    calls: list[tuple[int, ...]] = []
    original = native.rotate
    monkeypatch.setattr(native, "rotate", lambda x, *arguments: (calls.append(x.shape), original(x, *arguments))[1])
    x = numbers(3, 96).requires_grad_()
    used = 2 if kernels.is_native() else 0
    rotation.rotate(x).sum().backward()
    assert len(calls) == used
    assert x.grad is not None
    assert equal(x.grad, defined(torch.ones(3, 96), rotation, True))
    monkeypatch.setenv(kernels.VARIABLE, "reference")
    assert equal(rotation.rotate(x.detach()), defined(x.detach(), rotation, False))
    assert len(calls) == used


def test_of_a_shape_there_is_a_shape() -> None:
    rotation = formats.find_rotation("hadamard", 96)
    assert rotation is not None
    with FakeTensorMode(), kernels.shapes_only():
        for back in (False, True):
            product = rotation.rotate_back if back else rotation.rotate
            rotated = product(torch.empty(2, 5, 96, dtype=torch.bfloat16))
            assert (rotated.shape, rotated.dtype) == ((2, 5, 96), torch.float32)
