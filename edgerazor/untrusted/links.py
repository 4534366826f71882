"""Links in a model's folder: one that leaves it would have other files read, and copied into what is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgerazor.errors import UserError, plain


def refuse_leaving(folder: Path, files: Iterable[Path]) -> None:
    """Refuse files of a folder that are links to somewhere else.

    The cache of the Hugging Face hub is made of such links: a file of `MODEL/snapshots/COMMIT` leads to `MODEL/blobs`,
    and nowhere else.

    Args:
        folder: of a model.
        files: in it.

    Raises:
        UserError: it names the first such link.
    """
    allowed = [folder.resolve()]
    if allowed[0].parent.name == "snapshots":
        allowed.append(allowed[0].parent.parent / "blobs")
    for file in files:
        if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in allowed):
            raise UserError(
                f"{folder / plain(file.name)} is a link that leaves the model's folder, so it is not read.",
                "If you trust it, put a copy of the file there instead of the link.",
            )
