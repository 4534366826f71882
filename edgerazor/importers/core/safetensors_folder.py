"""A folder of safetensors with the tensor names of transformers, whatever the tensors hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from edgerazor import models, untrusted
from edgerazor.errors import UserError
from edgerazor.importers.core.base import SourceModel, Stored
from edgerazor.untrusted import weights


def read_settings(path: Path) -> dict[str, Any]:
    """config.json of a folder as it stands; empty where there is none that can be read."""
    try:
        settings: dict[str, Any] = untrusted.load_json(path / "config.json")
    except (OSError, ValueError):
        return {}
    return settings


class FolderSource(SourceModel):
    """The tensors of a folder, mapped.

    Args:
        path: the folder.
        config: its configuration without settings of a quantization.

    Raises:
        UserError: a weight file is missing or damaged, or two hold different numbers for a tensor.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        untrusted.check_configuration(path / "config.json", config)
        untrusted.refuse_code(path, "Give a model that transformers knows.")
        untrusted.check_shapes(path / "config.json", config, models.stored_shapes(path))
        self.path, self.config = path, models.completed(config)
        self.files = weights.open_tensors(path)

    def refuse_plain(self, what: str, parts: str) -> None:
        """Refuse a folder whose configuration says that it is quantized, where nothing in it is.

        Args:
            what: the configuration says.
            parts: of a matrix that is quantized, as its tensors are called.

        Raises:
            UserError: no tensor is quantized.
        """
        if not any(self.quantized(name) for name in self.names()):
            raise UserError(
                f"{self.path / 'config.json'} says that the weights are quantized ({what}), but no matrix in the "
                f"folder has {parts}: they are plain weights, or some are missing.",
                "Remove that entry from config.json if the weights are plain, or download the model again.",
            )

    def tensor(self, name: str) -> Tensor:
        """One stored tensor."""
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def names(self) -> set[str]:
        """Names of all stored tensors."""
        return set(self.files)

    def quantized(self, name: str) -> bool:
        """No tensor is quantized, unless a subclass says so."""
        return False

    def read(self, name: str) -> Stored:
        """A tensor as it is stored, unless a subclass decodes it."""
        return self.tensor(name)

    def write_tokenizer(self, folder: Path) -> None:
        """Copy tokenizer, chat template and generation settings."""
        models.copy_companions(self.path, folder)
