"""Modules for running a packed model: they hold a packed matrix and call the kernels.

They quantize their inputs as the modules for training do, so both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgerazor import formats, kernels
from edgerazor.formats import Encoded, MatrixSpec, Rotation
from edgerazor.modules.attention import UNIMPORTANT_BITS
from edgerazor.modules.shared_activations import DYNAMIC, InputScales, TokenMask


class LazyMatrix:
    """A packed matrix that is read and checked at its first use; a tied embedding and head share one.

    Args:
        load: gives the codes, scales and formats, checked.
        load_stored: gives the matrix as it is stored, checked, or None where native kernels cannot compute with it.

    Attributes:
        cache_decoded: whether float32 weights are held in memory from their first use on, 4 bytes a weight, where no
            native kernels are in use. Batches are faster so.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Encoded, MatrixSpec]],
        load_stored: Callable[[], kernels.StoredMatrix | None] = lambda: None,
    ) -> None:
        self._load, self._load_stored = load, load_stored
        self._matrix: tuple[Encoded, MatrixSpec] | None = None
        self._stored: tuple[kernels.StoredMatrix | None] | None = None  # None: `load_stored` was not called yet
        self._decoded: Tensor | None = None
        self.cache_decoded = False

    def stored(self, device: torch.device) -> kernels.StoredMatrix | None:
        """The matrix as it is stored, where native kernels are in use and can compute with it, else None."""
        if device.type != "cpu" or not kernels.is_native():
            return None
        if self._stored is None:
            self._stored = (self._load_stored(),)
        return self._stored[0]

    def kernel(self, device: torch.device) -> str:
        """Name of the kernels that compute with this matrix on a device."""
        able = not kernels.is_native() or self.stored(device) is not None
        return kernels.name() if able else "reference"

    def encoded(self, device: torch.device) -> tuple[Encoded, MatrixSpec]:
        """Codes and scales on a device, and the formats of the rows."""
        if self._matrix is None:
            self._matrix = self._load()
        codes, scales = self._matrix[0]
        if codes.device != device:
            self._matrix = Encoded(codes.to(device), scales.to(device)), self._matrix[1]
        return self._matrix

    def decoded(self, device: torch.device) -> Tensor:
        """The weights as float32 [rows, columns] on a device."""
        if self._decoded is not None and self._decoded.device == device:
            return self._decoded
        weight = formats.decode_matrix(*self.encoded(device))
        self._decoded = weight if self.cache_decoded else None
        return weight


class PackedWeight(nn.Module):
    """A module whose weight is packed. The codes are no parameters, so nothing ever casts or trains them.

    Args:
        lazy: the packed matrix.
        rotation: codes are of the rotated weight; None: of the model's own.
    """

    def __init__(self, lazy: LazyMatrix, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.lazy, self.rotation = lazy, rotation

    @property
    def weight(self) -> Tensor:
        """The decoded weights, float32 [rows, columns] on the CPU, for code of others that reads `module.weight`."""
        weight = self.lazy.decoded(torch.device("cpu"))
        return weight if self.rotation is None else self.rotation.rotate_back(weight)


class PackedLinear(PackedWeight):
    """y = Ŵ x̂ + b through the kernels. Takes the place of nn.Linear.

    Args:
        lazy: the packed matrix.
        bias: [out], or None.
        shape: (out, in).
        activation_bits: bits of the input; 16 leaves it as it is.
        group_size: number of consecutive activations of a token that share a scale.
        input_scales: stored scales of the input, as numbers.
        rotation: of weight and input.
    """

    def __init__(
        self,
        lazy: LazyMatrix,
        bias: nn.Parameter | None,
        shape: tuple[int, int],
        activation_bits: int,
        group_size: int,
        input_scales: InputScales = DYNAMIC,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__(lazy, rotation)
        self.bias = bias
        self.out_features, self.in_features = shape
        self.activation_bits, self.group_size = activation_bits, group_size
        self.input_scales = input_scales
        self.important: TokenMask | None = None
        self._row_sums: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x; computed in float32."""
        if self.rotation is not None:
            return self._of_rotated(self.rotation.rotate(x)).to(x.dtype)
        return self._of_rotated(x)

    def _of_rotated(self, x: Tensor) -> Tensor:
        """The output for an input in the basis that codes are of."""
        scales = self.input_scales
        full = (self.activation_bits, _number(scales.scale), _number(scales.zero_point))
        if self.important is None:
            return self._matmul(x, *full)
        low = (UNIMPORTANT_BITS, _number(scales.low_scale), _number(scales.low_zero_point))
        important = self.important()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        y[important] = self._matmul(x[important], *full)
        y[~important] = self._matmul(x[~important], *low)
        return y

    def _matmul(self, x: Tensor, bits: int, scale: float | None, zero_point: float | None) -> Tensor:
        """The product with x as it is rounded with a scale and a zero point, [..., out] in the dtype of x."""
        bias = None if self.bias is None else self.bias.float()
        if scale is None or not zero_point:
            return self._symmetric_matmul(x, bias, bits, scale).to(x.dtype)
        # The kernels know symmetric codes only, so the input is shifted, and what the shift adds is taken off again.
        shift = zero_point * scale
        added = shift * self.row_sums(x.device)
        bias = -added if bias is None else bias - added
        return self._symmetric_matmul(x.float() + shift, bias, bits, scale).to(x.dtype)

    def row_sums(self, device: torch.device) -> Tensor:
        """Sums of the rows of the decoded weights, float32 [out]; computed once per device."""
        if self._row_sums is None or self._row_sums.device != device:
            ones = torch.ones(1, self.in_features, device=device)
            self._row_sums = self._symmetric_matmul(ones, None, kernels.UNQUANTIZED, None)[0]
        return self._row_sums

    def _symmetric_matmul(self, x: Tensor, bias: Tensor | None, bits: int, scale: float | None) -> Tensor:
        """The product with x as the kernels round it, float32 [..., out]."""
        group = self.group_size
        stored = self.lazy.stored(x.device)
        if stored is not None:
            return stored.linear(x, bias, bits, group, scale)
        if self.lazy.cache_decoded:
            return kernels.decoded_linear(x, self.lazy.decoded(x.device), bias, bits, group, scale)
        encoded, spec = self.lazy.encoded(x.device)
        return kernels.linear(x, encoded, spec, bias, bits, group, scale)


def _number(value: nn.Parameter | float | None) -> float | None:
    """A stored scale or zero point, which no training changes."""
    return None if value is None else float(value)


class PackedEmbedding(PackedWeight):
    """Rows of a packed table. Takes the place of nn.Embedding.

    Args:
        lazy: the packed matrix.
        scale: factor of the rows that some families apply inside the embedding module; None: 1.
        shape: (rows, columns).
        dtype: of the hidden states, which begin here.
        rotation: of the rows, which are rotated back.
    """

    like: Tensor

    def __init__(
        self,
        lazy: LazyMatrix,
        scale: float | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__(lazy, rotation)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = shape
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # follows `model.to(dtype)`

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., columns]."""
        stored = self.lazy.stored(ids.device)
        rows = stored.embedding(ids) if stored else kernels.embedding(ids, *self.lazy.encoded(ids.device))
        rows = (rows if self.rotation is None else self.rotation.rotate_back(rows)).to(self.like.dtype)
        return rows if self.scale is None else rows * self.scale


def kernels_of(model: PreTrainedModel) -> str:
    """Names of the kernels that a packed model computes with, `avx512` or `avx512, reference`; reads its matrices."""
    matrices = (module for module in model.modules() if isinstance(module, PackedWeight))
    return ", ".join(sorted({module.lazy.kernel(model.device) for module in matrices}))


def cache_decoded(model: nn.Module, enabled: bool = True) -> None:
    """Hold the decoded weights of a packed model in memory from their first use on, where kernels are not native."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.lazy.cache_decoded = enabled
