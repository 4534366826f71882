"""The decoder of the library, through ctypes: a whole transformer on packed matrices, with its cache and its threads.

What is described here is checked here; the C++ code (`cpp/decoder.h`, which says what it computes) trusts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from edgerazor.errors import MOST_THREADS
from edgerazor.formats import SMALLEST
from edgerazor.kernels import native
from edgerazor.kernels.memory import memory_bytes
from edgerazor.kernels.native import LARGEST, NotFiniteError

__all__ = [
    "CELLS",
    "RMS",
    "Decoder",
    "Layer",
    "Linear",
    "Network",
    "Norm",
    "NotFiniteError",
    "OtherProcessError",
    "Run",
    "round_up",
]

#: Ranges of cells of the cache begin at multiples of this.
CELLS = 16
#: Kinds of norms.
NO_NORM, RMS, LAYER = 0, 1, 2


class OtherProcessError(RuntimeError):
    """A decoder was made in another process: a fork copies its memory, but not its threads."""


_OK, _NO_MEMORY, _NOT_FINITE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Linear:
    """`y = W x + bias`.

    Attributes:
        matrix: W [rows, columns].
        bias: float32 [rows].
        activation_group: features of x that share a scale.
        scale: of all of x, where it is stored.
    """

    matrix: native.Matrix
    bias: Tensor | None = None
    activation_group: int = 256
    scale: float | None = None

    @property
    def geometry(self) -> native.Geometry:
        """How its columns are cut."""
        whole = self.scale is not None
        return self.matrix.geometry(self.matrix.columns if whole else self.activation_group)


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of vectors.

    Attributes:
        kind: `RMS` or `LAYER`.
        epsilon: added to the mean square, or to the variance.
        weight: float32 [features]; None for ones.
        bias: float32 [features]; None for zeros. Of a LayerNorm alone.
    """

    kind: int
    epsilon: float
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer, as at `edgerazor_layer` of `cpp/decoder.h`; None where there is no norm.

    Attributes:
        rotary: leading features of a head that the rotary embedding turns; 0: none.
        window: latest positions that a token sees, its own among them; 0: all.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary: int = 0
    window: int = 0


@dataclass(frozen=True, eq=False)
class Network:
    """A whole decoder, as at `edgerazor_model` of `cpp/decoder.h`."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    embedding: Linear
    head: Linear
    final_norm: Norm | None
    layers: Sequence[Layer]
    rotary_features: int
    activation_bits: int = 8
    kv_bits: int = 8
    norm_all_heads: bool = False
    attention_scale: float = 1.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def vocabulary(self) -> int:
        """Columns of logits."""
        return self.head.matrix.out

    def cell_bytes(self) -> int:
        """Of the cache, for a token."""
        if self.kv_bits == 16:
            width = 4 * self.head_dim
        else:
            width = (self.head_dim if self.kv_bits == 8 else -(-self.head_dim // 2)) + 4
        return 2 * width * self.kv_heads * len(self.layers)

    def check(self) -> None:
        """ValueError unless shapes fit together, numbers are in range, and tensors are float32 and contiguous."""
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_dim, self.intermediate)
        whole = all(isinstance(size, int) and 1 <= size <= LARGEST for size in sizes)
        if not whole or self.heads % self.kv_heads:
            raise ValueError(f"impossible sizes: {sizes}")
        if self.activation_bits != 16 and not 2 <= self.activation_bits <= 8:
            raise ValueError(f"activations have 2 to 8 or 16 bits, not {self.activation_bits}")
        if self.kv_bits not in (4, 8, 16):
            raise ValueError(f"keys and values have 4, 8 or 16 bits, not {self.kv_bits}")
        if self.rotary_features < 0 or self.rotary_features % 2 or self.rotary_features > self.head_dim:
            raise ValueError(f"{self.rotary_features} features of {self.head_dim} cannot be turned in pairs")
        _check_linear("embedding", self.embedding, (self.head.matrix.out, self.hidden))
        _check_linear("head", self.head, (self.head.matrix.out, self.hidden))
        _check_norm("final_norm", self.final_norm, self.hidden)
        for layer in self.layers:
            self._check_layer(layer)

    def _check_layer(self, layer: Layer) -> None:
        query, key, hidden, inner = (
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.hidden,
            self.intermediate,
        )
        shapes = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
        shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        for name, shape in shapes.items():
            _check_linear(name, getattr(layer, name), shape)
        for name in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
            _check_norm(name, getattr(layer, name), hidden)
        _check_norm("q_norm", layer.q_norm, query if self.norm_all_heads else self.head_dim)
        _check_norm("k_norm", layer.k_norm, key if self.norm_all_heads else self.head_dim)
        if layer.rotary not in (0, self.rotary_features):
            raise ValueError(f"a layer turns all {self.rotary_features} features or none, not {layer.rotary}")
        if not isinstance(layer.window, int) or not 0 <= layer.window <= LARGEST:
            raise ValueError(f"a window cannot have {layer.window} positions")


@dataclass(frozen=True)
class Run:
    """Consecutive new tokens of a sequence, as at `edgerazor_run` of `cpp/decoder.h`."""

    prefix_cell: int
    prefix: int
    cell: int
    own: int
    count: int

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """All of them, in order."""
        return self.prefix_cell, self.prefix, self.cell, self.own, self.count

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.prefix + self.own + self.count

    @property
    def written(self) -> tuple[int, int]:
        """The first cell that its tokens fill, and the one behind the last."""
        return self.cell + self.own, self.cell + self.own + self.count


def round_up(cells: int) -> int:
    """The next place where a range of cells may begin."""
    return -(-cells // CELLS) * CELLS


def _check_linear(name: str, linear: Linear, shape: tuple[int, int]) -> None:
    matrix = linear.matrix
    if (matrix.out, matrix.columns) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {[matrix.out, matrix.columns]}")
    if linear.scale is not None and not 0 < linear.scale < float("inf"):
        raise ValueError(f"{name} has the scale {linear.scale}")
    for part in matrix.parts:
        part.check(linear.geometry, matrix.out)
    _check_vector(f"bias of {name}", linear.bias, shape[0])


def _check_norm(name: str, norm: Norm | None, features: int) -> None:
    if norm is None:
        return
    if norm.kind not in (RMS, LAYER) or not norm.epsilon >= 0 or (norm.kind == RMS and norm.bias is not None):
        raise ValueError(f"{name} is no norm that we know")
    _check_vector(f"weight of {name}", norm.weight, features)
    _check_vector(f"bias of {name}", norm.bias, features)


def _check_vector(name: str, tensor: Tensor | None, size: int) -> None:
    if tensor is None:
        return
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (size,) or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 [{size}], got {tensor.dtype} {list(tensor.shape)}")


# The structures of decoder.h ----------------------------------------------------------------------------------------


class _Matrix(Structure):
    _fields_ = (
        ("geometry", c_void_p),
        ("parts", POINTER(native.PartStructure)),
        ("part_count", c_int32),
        ("rows", c_int32),
        ("bias", c_void_p),
        ("scale", c_float),
    )


class _Norm(Structure):
    _fields_ = (("kind", c_int32), ("epsilon", c_float), ("weight", c_void_p), ("bias", c_void_p))


_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "q_norm", "k_norm")


class _Layer(Structure):
    _fields_ = (
        *((name, _Matrix) for name in _LINEARS),
        *((name, _Norm) for name in _NORMS),
        ("rotary", c_int32),
        ("window", c_int32),
    )


_SIZES = ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary")
_SETTINGS = ("norm_all_heads", "activation_bits", "kv_bits")
_SCALES = ("attention_scale", "embedding_scale", "logit_scale")


class _Network(Structure):
    _fields_ = (
        *((name, c_int32) for name in (*_SIZES, *_SETTINGS)),
        *((name, c_float) for name in _SCALES),
        ("rotary_features", c_int32),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("final_norm", _Norm),
        ("layers", POINTER(_Layer)),
        ("layer_count", c_int32),
    )


class _Run(Structure):
    _fields_ = tuple((each.name, c_int64) for each in dataclasses.fields(Run))


_TOKENS = [c_void_p, POINTER(_Run), c_int64, c_void_p, c_void_p]
_SIGNATURES = {
    "edgerazor_decoder_new": (c_void_p, [POINTER(_Network), c_int, c_int]),
    "edgerazor_decoder_free": (None, [c_void_p]),
    "edgerazor_decoder_rotary": (None, [c_void_p] * 3),
    "edgerazor_decoder_reserve": (c_int, [c_void_p, c_int64]),
    "edgerazor_decoder_cache_bytes": (c_int64, [c_void_p]),
    "edgerazor_decoder_logits": (c_int, [*_TOKENS, c_int64, c_void_p]),
    "edgerazor_decoder_scores": (c_int, [*_TOKENS, c_void_p, c_int64, c_void_p, c_void_p]),
    "edgerazor_decoder_greedy": (
        c_int,
        [c_void_p, POINTER(_Run), c_int32, c_void_p, c_int64, c_int64, c_void_p, POINTER(c_int64)],
    ),
    "edgerazor_decoder_layer": (c_int, [c_void_p, c_int32, POINTER(_Run), c_int64, c_void_p]),
}


@cache
def _loaded() -> ctypes.CDLL:
    found = native.loaded()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


class _Structures:
    """The structures of a network; what they point to lives as long as this object and the network."""

    def __init__(self, network: Network) -> None:
        self._kept: list[ctypes.Array] = []
        layers = [
            _Layer(
                *(self._matrix(getattr(layer, name)) for name in _LINEARS),
                *(self._norm(getattr(layer, name)) for name in _NORMS),
                layer.rotary,
                layer.window,
            )
            for layer in network.layers
        ]
        self.network = _Network(
            *(getattr(network, name) for name in (*_SIZES, *_SETTINGS, *_SCALES)),
            network.rotary_features,
            self._matrix(network.embedding),
            self._matrix(network.head),
            self._norm(network.final_norm),
            (_Layer * len(layers))(*layers),
            len(layers),
        )

    def _matrix(self, linear: Linear) -> _Matrix:
        matrix = linear.matrix
        parts = (native.PartStructure * len(matrix.parts))(*(part.structure() for part in matrix.parts))
        self._kept.append(parts)
        scale = 0.0 if linear.scale is None else max(linear.scale, SMALLEST)
        return _Matrix(linear.geometry.handle, parts, len(parts), matrix.out, _pointer(linear.bias), scale)

    @staticmethod
    def _norm(norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm(NO_NORM, 0.0, None, None)
        return _Norm(norm.kind, norm.epsilon, _pointer(norm.weight), _pointer(norm.bias))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# The decoder --------------------------------------------------------------------------------------------------------


class Decoder:
    """A network with a cache and threads of its own. Calls from several threads wait for one another.

    Threads do not survive a fork: a child that has a copy of it cannot call it (`OtherProcessError`), and lets its
    memory be.

    Args:
        network: what to compute.
        threads: at least 1, the caller's own among them.
        isa: number of an instruction set of `native.isas`; -1 for the best.

    Raises:
        ValueError: the network does not fit together.
        MemoryError: there is not enough, or the system has no more threads.
    """

    def __init__(self, network: Network, threads: int = 1, isa: int = -1) -> None:
        network.check()
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"there are 1 to {MOST_THREADS} threads, not {threads}")
        self.network = network
        self.cells = 0
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._cosines = self._sines = torch.empty(0, network.rotary_features // 2)
        structures = _Structures(network)
        handle = _loaded().edgerazor_decoder_new(ctypes.byref(structures.network), isa % len(native.isas()), threads)
        if not handle:
            raise MemoryError(f"there is not enough memory, or are not enough threads, for a decoder with {threads}")
        self._handle = c_void_p(handle)
        # The weights stay until the library has let go of them.
        weakref.finalize(self, _free, self._handle, network, self.process)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread calls the library meanwhile.

        Raises:
            OtherProcessError: this is not the process that made the decoder.
        """
        if os.getpid() != self.process:  # before the lock, which a thread may have held that is not here
            raise OtherProcessError("a decoder belongs to the process that made it")
        with self._lock:
            yield

    def rotary(self, cosines: Tensor, sines: Tensor) -> None:
        """Tables of the next calls, float32 [positions, rotary_features / 2]."""
        shape = (len(cosines), self.network.rotary_features // 2)
        for table in (cosines, sines):
            if table.dtype != torch.float32 or tuple(table.shape) != shape or not table.is_contiguous():
                raise ValueError(f"tables of the rotary embedding must be contiguous float32 {list(shape)}")
        with self._alone():
            self._cosines, self._sines = cosines, sines
            _loaded().edgerazor_decoder_rotary(self._handle, cosines.data_ptr(), sines.data_ptr())

    def reserve(self, cells: int) -> None:
        """Memory for that many cells of the cache, at least; what is in it stays.

        Raises:
            MemoryError: there is not enough.
        """
        if not isinstance(cells, int) or not 0 <= cells <= LARGEST:
            raise ValueError(f"a cache has 0 to {LARGEST} cells, not {cells}")
        if cells > self.cells:
            if cells * self.network.cell_bytes() > memory_bytes():
                raise MemoryError(f"there is not enough memory for a cache of {cells} tokens")
            with self._alone():
                _done(_loaded().edgerazor_decoder_reserve(self._handle, round_up(cells)))
            self.cells = round_up(cells)

    def cache_bytes(self) -> int:
        """Memory of the cache."""
        found: int = _loaded().edgerazor_decoder_cache_bytes(self._handle)
        return found

    def logits(self, runs: Sequence[Run], tokens: Sequence[int] | Tensor, wanted: Sequence[int] | Tensor) -> Tensor:
        """Logits float32 [wanted, vocabulary].

        Args:
            runs: new tokens of sequences, whose cells must be reserved and, where they are seen, computed.
            tokens: of all runs, one run after the other.
            wanted: indices of those after which logits are asked for; none: tokens only go to the cache.

        Raises:
            ValueError: something is out of range.
            NotFiniteError: a number became infinite, or none.
        """
        ids, indices = self._arguments(runs, tokens, wanted)
        logits = torch.empty(len(indices), self.network.vocabulary)
        self._call("logits", runs, ids.data_ptr(), indices.data_ptr(), len(indices), logits.data_ptr())
        return logits

    def scores(
        self, runs: Sequence[Run], tokens: Sequence[int], wanted: Sequence[int], targets: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities float32 [wanted] of targets, and the most probable tokens int32 [wanted].

        Args:
            targets: the token asked about after each of `wanted`.

        Other arguments, and errors: as `logits`.
        """
        ids, indices = self._arguments(runs, tokens, wanted)
        asked = _int32(targets)
        if len(asked) != len(indices):
            raise ValueError(f"there are {len(asked)} targets of {len(indices)} tokens")
        _check_range("targets", asked, self.network.vocabulary)
        chances, best = torch.empty(len(indices)), torch.empty(len(indices), dtype=torch.int32)
        inputs = (ids.data_ptr(), indices.data_ptr(), asked.data_ptr(), len(indices))
        self._call("scores", runs, *inputs, chances.data_ptr(), best.data_ptr())
        return chances, best

    def greedy(self, run: Run, token: int, count: int, stops: Sequence[int] = ()) -> list[int]:
        """The most probable tokens after `token`, which is the one new token of `run`.

        Args:
            count: of tokens, at least 1; `run.own + count` cells must be reserved.
            stops: tokens behind which to stop.

        Errors: as `logits`.
        """
        if run.count != 1 or count < 1:
            raise ValueError(f"greedy decoding begins with 1 token, not {run.count}, and writes 1 or more, not {count}")
        self._check_runs([dataclasses.replace(run, count=count)])
        _check_range("tokens", _int32([token]), self.network.vocabulary)
        known = [each for each in stops if 0 <= each < self.network.vocabulary]
        ends, out, written = _int32(known), torch.empty(count, dtype=torch.int32), c_int64()
        with self._alone():
            code = _loaded().edgerazor_decoder_greedy(
                self._handle,
                _structures([run]),
                token,
                ends.data_ptr(),
                len(ends),
                count,
                out.data_ptr(),
                ctypes.byref(written),
            )
        _done(code)
        found: list[int] = out[: written.value].tolist()
        return found

    def layer(self, index: int, runs: Sequence[Run], states: Tensor) -> Tensor:
        """What a layer makes of states float32 [tokens, hidden]; its part of the cache is filled.

        Errors: as `logits`.
        """
        if not 0 <= index < len(self.network.layers):
            raise ValueError(f"there is no layer {index}")
        self._check_runs(runs)
        shape = (sum(run.count for run in runs), self.network.hidden)
        if tuple(states.shape) != shape:
            raise ValueError(f"states must be {list(shape)}, not {list(states.shape)}")
        found = states.to(torch.float32, copy=True).contiguous()
        with self._alone():
            code = _loaded().edgerazor_decoder_layer(
                self._handle, index, _structures(runs), len(runs), found.data_ptr()
            )
        _done(code)
        return found

    def _call(self, name: str, runs: Sequence[Run], *arguments: int) -> None:
        function = getattr(_loaded(), f"edgerazor_decoder_{name}")
        with self._alone():
            code = function(self._handle, _structures(runs), len(runs), *arguments)
        _done(code)

    def _arguments(
        self, runs: Sequence[Run], tokens: Sequence[int] | Tensor, wanted: Sequence[int] | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens int32 and wanted int64, checked."""
        self._check_runs(runs)
        ids = _int32(tokens)
        if len(ids) != sum(run.count for run in runs):
            raise ValueError(f"there are {len(ids)} tokens in runs of {sum(run.count for run in runs)}")
        _check_range("tokens", ids, self.network.vocabulary)
        indices = torch.as_tensor(wanted, dtype=torch.int64).contiguous()
        _check_range("wanted tokens", indices, len(ids))
        return ids, indices

    def _check_runs(self, runs: Sequence[Run]) -> None:
        if not runs:
            raise ValueError("there are no runs")
        rotates = any(layer.rotary for layer in self.network.layers)
        for run in runs:
            if run.count < 1 or min(run.numbers) < 0 or run.cell % CELLS or run.prefix_cell % CELLS:
                raise ValueError(f"impossible run: {run}")
            if max(run.prefix_cell + run.prefix, run.written[1]) > self.cells:
                raise ValueError(f"of {self.cells} reserved cells there are not those of {run}")
            if rotates and run.end > len(self._cosines):
                raise ValueError(f"the rotary embedding has {len(self._cosines)} positions, too few for {run}")
        written = sorted(run.written for run in runs)
        if any(before[1] > after[0] for before, after in pairwise(written)):
            raise ValueError("two runs write to the same cell")


def _free(handle: c_void_p, network: Network, process: int) -> None:
    if os.getpid() == process:  # a child would wait for threads that it has not
        _loaded().edgerazor_decoder_free(handle)


def _structures(runs: Sequence[Run]) -> ctypes.Array[_Run]:
    return (_Run * len(runs))(*(_Run(*run.numbers) for run in runs))


def _int32(numbers: Sequence[int] | Tensor) -> Tensor:
    found = torch.as_tensor(numbers, dtype=torch.int64)
    if found.dim() != 1:
        raise ValueError(f"tokens must be in a row, not {list(found.shape)}")
    _check_range("tokens", found, LARGEST)
    return found.to(torch.int32).contiguous()


def _check_range(name: str, numbers: Tensor, end: int) -> None:
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
        raise ValueError(f"{name} must be between 0 and {end - 1}")


def _done(code: int) -> None:
    if code == _NO_MEMORY:
        raise MemoryError("there is not enough memory for the cache and activations")
    if code == _NOT_FINITE:
        raise NotFiniteError("a number is not finite")
    assert code == _OK
