"""Where a job computes: the device, the number types that are fast on it, and the processes of a launcher."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from edgerazor.console import launched
from edgerazor.errors import UserError, usage_error

_T = TypeVar("_T")
#: What `accelerate launch` puts into the environment of a configuration for FSDP, and of one for DeepSpeed.
USE_FSDP, USE_DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"


class Machines(NamedTuple):
    """Processes of a training that is planned: how many, and bytes of memory of the GPU of each; None: they share this
    machine."""

    world_size: int
    gpu_memory: int | None


def choose(name: str, threads: int | None) -> torch.device:
    """The device of that name; also sets the number of CPU threads.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: CPU threads; None for torch's own choice, or an equal share where a launcher started several processes.

    Raises:
        UserError: there is no such device here.
    """
    if threads:
        torch.set_num_threads(threads)
    elif "LOCAL_WORLD_SIZE" in os.environ:  # several processes share the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, launched("LOCAL_WORLD_SIZE", 1))))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise usage_error(f"There is no device called {name!r}.", "Use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("No CUDA device was found by torch.", "Use --device cpu, or install torch with CUDA.")
    if device.type not in ("cpu", "cuda"):
        raise usage_error(f"The device {name!r} is not supported.", "Use auto, cpu, cuda or cuda:N.")
    return device


def resident_memory() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "VmRSS:"), 0)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may have in all: what is free for it now, and what it has; 0 where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    counts = Path("/proc/meminfo")
    if not counts.exists():
        return 0
    lines = (line.split() for line in counts.read_text(encoding="utf-8").splitlines())
    available = next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), 0)
    return available + resident_memory() if available else 0


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones.

    Of CPUs those with AMX do, and AMD's with AVX512_BF16; Intel's take twice as long with the latter as for float32
    (measured by `recipes.benchmarks.training_speed --products`, see `recipes/results/training.md`).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    amx, avx512 = (getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))
    return amx or (avx512 and not is_made_by_intel())


@functools.cache
def is_made_by_intel() -> bool:
    """Whether the CPU is one of Intel's, as far as the system says."""
    facts = Path("/proc/cpuinfo")
    return "GenuineIntel" in (facts.read_text(encoding="utf-8") if facts.exists() else platform.processor())


def inference_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of a teacher that only infers: the checkpoint's own (None) where bfloat16 is fast, else float32."""
    return None if fast_bfloat16(device) else torch.float32


def gradient_dtype(checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a teacher that gradients go through: bfloat16 where it is the checkpoint's and fast, else float32.

    Gradients leave the range of float16, so that is never chosen.
    """
    return checkpoint if fast_bfloat16(device) and checkpoint == torch.bfloat16 else torch.float32


# --- processes ---------------------------------------------------------------------------------


def process_count() -> int:
    """How many processes a launcher (torchrun, accelerate launch) started for this run."""
    return launched("WORLD_SIZE", 1)


def process_index() -> int:
    """The number of this process among them, from 0."""
    return launched("RANK", 0)


def join_processes(device: torch.device) -> None:
    """Meet the other processes of a launcher, if there are any; they may wait for each other for hours.

    Raises:
        UserError: the launcher asks for DeepSpeed, which is not installed.
    """
    wanted = os.environ.get(USE_DEEPSPEED, "false").lower() == "true"
    if wanted and importlib.util.find_spec("deepspeed") is None:
        raise usage_error(
            "The launcher asks for DeepSpeed, which is not installed.",
            "Install it (`pip install 'edgerazor-toolchain[deepspeed]'`), or launch with recipes/launch/fsdp2.yaml, "
            "which spreads weights, gradients and moments, too.",
        )
    if process_count() > 1:
        from accelerate import PartialState  # only training needs it

        with hidden_from_accelerate():
            PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))


@contextlib.contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Let accelerate make what spreads no weights over processes by itself."""
    hidden = {name: os.environ.pop(name) for name in (USE_FSDP, USE_DEEPSPEED) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def wait_for_everyone() -> None:
    """Barrier: block until every process of the launcher has arrived."""
    if process_count() > 1:
        from accelerate import PartialState  # only training needs it

        PartialState().wait_for_everyone()


def share_of(items: Sequence[_T]) -> Sequence[_T]:
    """The part of some items that this process does: each has a run of them, in the order of the processes."""
    count, index = process_count(), process_index()
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def all_values(value: _T) -> list[_T]:
    """The values that all processes give, in their order, on each of them; all have to have joined, and to ask."""
    if process_count() == 1:
        return [value]
    from accelerate.utils import gather_object  # only training needs it

    return list(gather_object([value]))


def of_main_process(value: _T) -> _T:
    """A value of the main process, on all processes that have joined."""
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list  # only training needs it

    shared = [value]
    broadcast_object_list(shared)
    return shared[0]
