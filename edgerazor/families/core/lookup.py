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
    """Model types whose families GGUF files can hold -> llama.cpp's name of the architecture, sorted."""
    return {name: family.gguf.name for name, family in available().items() if family.gguf is not None}
