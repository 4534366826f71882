"""Pictures in prompts: from files or pictures in memory to tokens, and the positions that a sequence has then."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgerazor import models
from edgerazor.errors import usage_error
from edgerazor.runtime.rope import Rotary

#: A picture: a file, the bytes of one, or one of Pillow's.
Picture = str | os.PathLike[str] | bytes | Any
#: Positions behind a prompt that are computed at once.
AHEAD = 256


def with_pictures(text: str, images: Sequence[Picture]) -> list[dict[str, Any]]:
    """A user's turn: pictures, then text, as the parts of a message."""
    return [*map(_part, images), {"type": "text", "text": text}]


def _part(picture: Picture) -> dict[str, Any]:
    if isinstance(picture, str | os.PathLike):
        return {"type": "image", "path": str(Path(picture).absolute())}
    if not isinstance(picture, bytes):
        if not hasattr(picture, "save"):
            raise usage_error(f"A picture is a file, bytes or one of Pillow's, not {type(picture).__name__}.")
        file = io.BytesIO()
        picture.save(file, "PNG")
        picture = file.getvalue()
    return {"type": "image", "base64": base64.b64encode(picture).decode()}


class PicturePositions:
    """Tables of cosines and sines of sequences with pictures, in families whose positions have several dimensions.

    The family's own model in transformers says which positions a sequence has; text behind it counts on.

    Args:
        config: of the whole model.
        rotary: of its decoder.
    """

    def __init__(self, config: Any, rotary: Rotary) -> None:
        values = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
        model = models.skeleton(values) if models.sees(config) else None
        self._index = getattr(getattr(model, "base_model", None), "get_rope_index", None)
        self._placeholder = models.placeholder_of(config) if models.sees(config) else 0
        self._rotary = rotary

    @property
    def depend_on_pictures(self) -> bool:
        """Whether a picture makes positions others than numbers; else nobody need look for one in a sequence."""
        return self._index is not None

    def differ(self, ids: Tensor) -> bool:
        """Whether positions of these tokens, of any shape, are others than their numbers in a sequence."""
        return self.depend_on_pictures and models.has_pictures(ids)

    def tables(self, ids: Sequence[int], length: int) -> tuple[Tensor, ...]:
        """As `Rotary.tables`, for a sequence that begins with these tokens and goes on as text to a length."""
        tokens = torch.tensor([list(ids)])
        mask = models.picture_mask(tokens)
        grids = models.PICTURES.gather(tokens[mask]).grids
        positions, _ = self._index(  # type: ignore[misc]
            tokens.masked_fill(mask, self._placeholder), mm_token_type_ids=mask.int(), image_grid_thw=grids
        )
        last = int(positions.max())
        more = torch.arange(last + 1, last + 1 + max(0, length - len(ids)))
        return self._rotary.tables_at(torch.cat([positions, more.expand(3, 1, -1)], dim=-1))


class PicturePrefix:
    """What a sequence begins with, up to the last token of a picture: all that decides its positions.

    A sequence grows by a token at a time, or goes back and on; its old tokens are not looked at again.

    Attributes:
        ids: token ids; none where there is no picture.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []

    def follow(self, before: Sequence[int], start: int, tokens: Sequence[int]) -> bool:
        """Note tokens from a place on, which forgets what was there; whether `ids` are others now.

        Args:
            before: a sequence whose first `start` tokens are those before them.
            start: place of the first one.
            tokens: that follow.
        """
        known = self.ids
        if start < len(known):
            self.ids = _until_picture(known[:start])
        if newest := _until_picture(tokens):
            self.ids = [*before[:start], *newest]
        return self.ids is not known


def _until_picture(ids: Sequence[int]) -> list[int]:
    """Token ids up to the last one of a picture; none where there is none."""
    end = next((place for place in range(len(ids), 0, -1) if ids[place - 1] >= models.FIRST), 0)
    return list(ids[:end])
