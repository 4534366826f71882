"""The bandwidth of memory: how fast threads can read far more than any cache holds."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from edgerazor.errors import UserError
from edgerazor.kernels import native
from edgerazor.kernels.memory import huge_memory

#: Bytes read in one measurement.
BYTES = 512 * 1024 * 1024
#: Passes of a measurement; the fastest counts, because whatever else the machine does makes a pass slower.
PASSES = 3


class Bandwidth:
    """Memory to read, held from one measurement to the next.

    Attributes:
        how: it is read, in words.
    """

    def __init__(self) -> None:
        self.native = native.library() is not None
        self.memory = huge_memory(BYTES).fill_(1)
        self.how = f"{'the native library' if self.native else 'torch.sum'}, {BYTES >> 20} MB in huge pages"

    def measure(self, threads: int) -> float:
        """Bytes a second that so many threads read.

        Raises:
            UserError: the system does not give us so many.
        """
        with ThreadPoolExecutor(threads) as pool:
            try:
                return max(BYTES / self._seconds(pool, threads) for _ in range(PASSES))
            except RuntimeError as error:
                if "start new thread" not in str(error):
                    raise
                raise UserError(
                    f"The system gives this process no {threads} threads to measure with.",
                    "Ask for fewer: --threads 1.",
                ) from None

    def _seconds(self, pool: ThreadPoolExecutor, threads: int) -> float:
        if self.native:
            pieces = self.memory.view(torch.int64).chunk(threads)
            began = time.perf_counter()
            list(pool.map(native.read, pieces))
            return time.perf_counter() - began
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        began = time.perf_counter()
        self.memory.view(torch.float32).sum()
        seconds = time.perf_counter() - began
        torch.set_num_threads(before)
        return seconds
