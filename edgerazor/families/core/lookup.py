"""Finding a family by its model type: the files of the room are the list."""

from __future__ import annotations

from edgerazor import registry
from edgerazor.families.core.base import Family


def available() -> dict[str, Family]:
    """Every family by its model type, sorted."""
    return {name: registry.find("families", name, "FAMILY") for name in registry.names("families")}


def find(model_type: object) -> Family | None:
    """The family of a configuration's `model_type`; None where no file is named after it."""
    if model_type not in registry.names("families"):
        return None
    family: Family = registry.find("families", str(model_type), "FAMILY")
    return family


def with_gguf() -> dict[str, str]:
    """Model types that we write as GGUF files -> llama.cpp's name of the architecture, sorted."""
    return {name: family.gguf.name for name, family in available().items() if family.gguf and family.gguf.exported}


def from_gguf() -> dict[str, str]:
    """llama.cpp's names of the architectures whose GGUF files we read -> model type, sorted."""
    read = {family.gguf.name: name for name, family in available().items() if family.gguf and family.gguf.configure}
    return dict(sorted(read.items()))
