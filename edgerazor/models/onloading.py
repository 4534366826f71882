"""Onloading: a module's weights on the compute device for as long as it is worked on, and off it again.

The rest of the model stays where it was loaded. On a CPU that is no memory at all where the checkpoint's own dtype is
kept, since transformers leaves safetensors mapped (`load(..., dtype=None)`), and `drop_pages` gives mapped pages back.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

#: Options of GNU's `mallopt`, and how many blocks it maps at most if nobody says otherwise.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MOST_MAPPED = 65536


@contextlib.contextmanager
def onloaded(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Give a module copies of its weights on a device and in a dtype inside the block; buffers keep their dtype.

    Where device and dtype are those of the weights already, nothing is copied.
    """
    parameters = [(parameter, parameter.data) for parameter in module.parameters()]
    buffers = [(owner, key, value) for owner in module.modules() for key, value in owner.named_buffers(recurse=False)]
    try:
        for parameter, data in parameters:
            parameter.data = data.to(device, dtype if data.is_floating_point() else data.dtype)
        for owner, key, value in buffers:
            owner._buffers[key] = value.to(device)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for owner, key, value in buffers:
            owner._buffers[key] = value


def drop_pages(weight: Tensor) -> None:
    """Give the memory of a weight that is mapped from its file back to the system; its next use reads it again.

    Of other weights, and of mapped ones that were written to, nothing is given back. Nor is anything where the system
    is not Linux, or does not tell the state of its memory pages.
    """
    page = mmap.PAGESIZE
    first, end = -(-weight.data_ptr() // page), (weight.data_ptr() + weight.nbytes) // page  # whole pages
    if weight.device.type != "cpu" or not weight.is_contiguous() or first >= end:
        return
    with contextlib.suppress(OSError), open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * first)
        entries = np.frombuffer(pagemap.read(8 * (end - first)), dtype=np.uint64)
        resident = entries >> np.uint64(62) != 0  # in memory or swapped out
        unchanged = entries >> np.uint64(61) & np.uint64(1) == 1  # a page of a file, and not written to
        if len(entries) == end - first and bool((unchanged | ~resident).all()):
            length = (end - first) * page
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Let the C library return free memory to the system; activations of all sizes would leave its heap fragmented."""
    with contextlib.suppress(AttributeError, OSError):  # another library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """Let the C library map each block above a megabyte by itself, so that its memory goes back as soon as it is freed.

    Left alone it keeps blocks of up to 32 MB in heaps, of which each thread has its own, and those of layers that are
    read by one thread and freed by another leave holes that nothing fits.
    """
    with contextlib.suppress(AttributeError, OSError):  # another library than GNU's
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


@contextlib.contextmanager
def freed_blocks_kept() -> Iterator[None]:
    """Let the C library keep what is freed inside the block for the next tensor, instead of giving it back.

    Else each large tensor of a training step is mapped anew, and the system clears every page of it first, which takes
    a fifth of a step. The peak of memory is that of the same steps without it; between the steps nothing is returned.
    """
    try:
        library = ctypes.CDLL(None)
        changed = library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1)
    except (AttributeError, OSError):  # another library than GNU's
        changed = 0
    try:
        yield
    finally:
        if changed:
            library.mallopt(M_MMAP_MAX, MOST_MAPPED)
            library.mallopt(M_TRIM_THRESHOLD, 1 << 20)
            trim_heap()
