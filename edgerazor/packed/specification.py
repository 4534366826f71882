"""The specification of the packed format, as a text."""

from __future__ import annotations

from importlib import resources


def specification() -> str:
    """The content of `FORMAT.md`."""
    return resources.files("edgerazor.packed").joinpath("FORMAT.md").read_text(encoding="utf-8")
