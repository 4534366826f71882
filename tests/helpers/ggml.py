"""llama.cpp's own code, loaded from what `make llamacpp` builds: its reader of GGUF files and its dequantizers."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
import pytest

from helpers.places import ROOT

LIBRARY = ROOT / "build" / "llamacpp" / "tools" / "libggml-base.so"
needs_ggml = pytest.mark.skipif(not LIBRARY.exists(), reason="no build/llamacpp; `make llamacpp` makes it")


class _Traits(ctypes.Structure):
    """The beginning of `ggml_type_traits` in ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class _Options(ctypes.Structure):
    """`gguf_init_params` of gguf.h: read no data."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = (ctypes.c_char_p, _Options)
    for name, result in (
        ("gguf_get_n_tensors", ctypes.c_int64),
        ("gguf_get_data_offset", ctypes.c_size_t),
        ("gguf_free", None),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, (ctypes.c_void_p,)
    for name, result in (
        ("gguf_get_tensor_name", ctypes.c_char_p),
        ("gguf_get_tensor_type", ctypes.c_int),
        ("gguf_get_tensor_offset", ctypes.c_size_t),
        ("gguf_get_tensor_size", ctypes.c_size_t),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, (ctypes.c_void_p, ctypes.c_int64)
    return library


def type_sizes(number: int) -> tuple[str, int, int]:
    """Name of a type, weights and bytes of a block."""
    traits = _library().ggml_get_type_traits(number).contents
    return traits.type_name.decode(), traits.blck_size, traits.type_size


def dequantized(octets: np.ndarray, number: int) -> np.ndarray:
    """Blocks of a type, uint8 [...], as llama.cpp decodes them: float32 [weights]."""
    if number == 0:
        return np.frombuffer(octets.tobytes(), dtype="<f4")
    traits = _library().ggml_get_type_traits(number).contents
    data = octets.tobytes()
    values = np.empty(len(data) // traits.type_size * traits.blck_size, dtype=np.float32)
    traits.to_float(data, values.ctypes.data, values.size)
    return values


def read(file: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Every tensor of a file by its name, as llama.cpp's reader finds it: number of its type, and decoded weights."""
    library = _library()
    handle = library.gguf_init_from_file(str(file).encode(), _Options(True, None))
    assert handle, f"llama.cpp does not read {file}"
    data, tensors = file.read_bytes(), {}
    begin = library.gguf_get_data_offset(handle)
    for index in range(library.gguf_get_n_tensors(handle)):
        start = begin + library.gguf_get_tensor_offset(handle, index)
        octets = np.frombuffer(data, np.uint8, library.gguf_get_tensor_size(handle, index), start)
        number = library.gguf_get_tensor_type(handle, index)
        tensors[library.gguf_get_tensor_name(handle, index).decode()] = (number, dequantized(octets, number))
    library.gguf_free(handle)
    return tensors
