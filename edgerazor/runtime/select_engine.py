"""Which engine runs a packed model, and why it is not the native one."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from edgerazor import transformers_plugin
from edgerazor.errors import MOST_THREADS, plain, usage_error
from edgerazor.runtime.engine import Model
from edgerazor.runtime.native_model import NativeModel
from edgerazor.runtime.network import NotNativeError
from edgerazor.runtime.transformers_model import TransformersModel

ENGINES = ("native", "transformers")


def load(
    folder: str | os.PathLike[str], threads: int | None = None, mmap: bool = False, engine: str | None = None
) -> Model:
    """Load a packed model to run it on a CPU.

    Args:
        folder: what `edgerazor pack` wrote.
        threads: to compute with; None for as many as torch has.
        mmap: read weights in place, from the mapped file, for machines with little memory; else they are copied once
            into memory with huge pages, which is faster, and the native engine reads nothing of the file any more. A
            mapped file must stay as it is: where another program cuts it, the system ends the process (SIGBUS).
            Replacing it by renaming another one is safe. The transformers engine always maps, as does a teacher.
        engine: one of `ENGINES`; None for `native` where it can.

    Raises:
        UserError: not a packed folder, or a damaged one; or the engine cannot compute it.
    """
    if engine is not None and engine not in ENGINES:
        raise usage_error(f"There is no engine called {engine!r}.", f"Known: {', '.join(ENGINES)}.")
    threads = min(torch.get_num_threads(), MOST_THREADS) if threads is None else threads
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise usage_error(f"A model runs on 1 to {MOST_THREADS} threads, not {plain(threads, 50)}.")
    folder = Path(folder)
    if engine == "transformers":
        return TransformersModel(folder, threads, None)
    try:
        return NativeModel(*transformers_plugin.open_folder(folder), threads, mmap)
    except NotNativeError as error:
        if engine == "native":
            raise usage_error(f"The native engine cannot run {folder}: {error.reason}.", error.hint) from None
        note = f"transformers runs this model, much slower than the native engine, because {error.reason}. {error.hint}"
        return TransformersModel(folder, threads, note.rstrip())
