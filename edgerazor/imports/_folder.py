"""A folder of safetensors whose names are those of transformers, whatever the tensors hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from edgerazor import models, untrusted
from edgerazor.errors import UserError
from edgerazor.imports._base import Source, Stored


def settings(path: Path) -> dict[str, Any]:
    """config.json of a folder as it stands; empty where there is none that can be read."""
    try:
        found: dict[str, Any] = untrusted.load_json(path / "config.json")
    except (OSError, ValueError):
        return {}
    return found


class FolderSource(Source):
    """The tensors of a folder, mapped.

    Args:
        path: the folder.
        config: its configuration without settings of a quantization.

    Raises:
        UserError: a weight file is missing or damaged, or two hold the same tensor.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        untrusted.check_configuration(path / "config.json", config)
        untrusted.refuse_code(path, "Give a model that transformers knows.")
        untrusted.check_shapes(path / "config.json", config, models.stored_shapes(path))
        self.path, self.config = path, models.completed(config)
        self.files: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            try:
                opened = safe_open(file, framework="pt")
            except Exception as error:  # the library raises its own, the system's and decoding errors
                raise UserError(f"The weight file {file} is damaged: {error}.", "Download it again.") from None
            for name in opened.keys():  # noqa: SIM118 (a safetensors file cannot be iterated over)
                if name in self.files:
                    raise UserError(f"{file} holds {name}, which another file of the folder holds, too.")
                self.files[name] = opened
        if not self.files:
            raise UserError(f"{path} holds no safetensors weights.", "Download it again.")

    def tensor(self, name: str) -> Tensor:
        """One stored tensor."""
        found: Tensor = self.files[name].get_tensor(name)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def names(self) -> set[str]:
        """Names of all of them."""
        return set(self.files)

    def quantized(self, name: str) -> bool:
        """None is, if nobody knows better."""
        return False

    def read(self, name: str) -> Stored:
        """As it is stored, if nobody knows better."""
        return self.tensor(name)

    def write_tokenizer(self, folder: Path) -> None:
        """Copy it."""
        models.copy_companions(self.path, folder)
