"""Writing a packed model again, compressed or not; its weights and the rest of its header stay the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from edgerazor.formats import Encoded
from edgerazor.packed.header import Header
from edgerazor.packed.reading import PackedModel
from edgerazor.packed.writing import MatrixSource, write


def rewrite(model: PackedModel, folder: Path, *, compress: bool, done: Callable[[], None] | None = None) -> Header:
    """Write the weight files of a packed model again, with the bytes that `write` gives with this `compress`.

    Args:
        model: the packed model; every byte of it is checked on the way.
        folder: an existing folder without weight files.
        compress: store parts of codes and scales as zstd frames.
        done: called after each matrix, from any thread.

    Raises:
        UserError: the model is damaged.
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    header = model.header

    def encode(name: str) -> Encoded:
        return model.matrix(name).encoded

    sources = [
        MatrixSource(name, entry.kind, model.spec(name), entry.shape, functools.partial(encode, name))
        for name, entry in header.matrices.items()
    ]
    return write(
        folder,
        sources,
        model.others(),
        tied=header.tied,
        settings=header.settings,
        provenance=header.provenance,
        extras=header.extras,
        shards=model.shards(),
        done=done,
        compress=compress,
    )
