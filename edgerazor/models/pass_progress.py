"""How far a layer-by-layer pass has come, in a file, so that a killed pass goes on behind its last finished layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgerazor.models.observer import Observer
from edgerazor.workdir import digest_json, write_atomically


class PassProgress:
    """The number of finished layers of a pass in one direction, and the state of its observers, in one file.

    Args:
        path: of the file.
        identity: what the file must have been written for, as JSON.
        observers: whose state is stored.
    """

    def __init__(self, path: Path, identity: list[Any], observers: Sequence[Observer]) -> None:
        self.path, self.observers = path, observers
        classes = ([type(observer).__qualname__, observer.identity()] for observer in observers)
        self.identity = digest_json([*identity, *classes])

    def save(self, layer: int) -> None:
        """Replace the file."""
        tensors = {
            f"{number}/{name}": tensor.detach().cpu().contiguous()
            for number, observer in enumerate(self.observers)
            for name, tensor in observer.state().items()
        }
        metadata = {"identity": self.identity, "layer": str(layer)}
        write_atomically(self.path, lambda path: save_file(tensors, path, metadata))

    def restore(self) -> int | None:
        """Restore the observers and return the layer that was saved; None where there is nothing to go on from."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self.identity:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError):
            return None
        for number, observer in enumerate(self.observers):
            prefix = f"{number}/"
            observer.restore({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        return int(metadata["layer"])
