"""GGUF files of llama.cpp: what they hold is read in `core/gguf_source.py`."""

from __future__ import annotations

from pathlib import Path

from edgerazor.importers.core.base import Importer, SourceModel
from edgerazor.models import is_gguf


class Gguf(Importer):
    """A single GGUF file."""

    name = "gguf"
    describe = "GGUF files of llama.cpp with ternary, Q4_0, Q8_0 and similar blocks"
    only = False  # with --bits it is dequantized and rounded anew

    def recognises(self, path: Path) -> bool:
        """Whether a file begins with the four bytes of GGUF."""
        return is_gguf(path)

    def open(self, path: Path) -> SourceModel:
        """Read metadata, and where tensors lie."""
        from edgerazor.importers.core.gguf_source import GgufSource
        from edgerazor.untrusted.gguf_file import GgufFile  # these need the package gguf, of an extra

        return GgufSource(GgufFile(path))


IMPORTER = Gguf()
