"""From pictures to tokens: a model's processor and tower, asked once for each picture, with the answers kept on disk.

The processor says where in a conversation a picture stands and how many tokens it takes; the tower makes a feature for
each of these, which gets a token id of its own (`models/pictures.py`). Teacher and student then read the same tokens.
Conversations are read some hundred at a time, and what became of them is a file with a digest of all that decides it:
conversations, pictures, processor, tower, settings. Another stage, or the same one after a kill, reads the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgerazor import data, models
from edgerazor.console import Console
from edgerazor.data import Conversation, PictureTokens
from edgerazor.errors import UserError
from edgerazor.models import PictureFeatures, PreTrainedModel
from edgerazor.workdir import make_folder, versions, write_atomically

#: Most values of pixels that go through a tower together.
BATCH_PIXELS = 1 << 22
Pieces = list[tuple[np.ndarray, np.ndarray]]
#: A conversation with the features of its pictures.
Looked = tuple[PictureTokens, list[PictureFeatures]]


class PictureReader:
    """Reads conversations with pictures for one model.

    Args:
        folder: of the model, with its processor.
        tower: gives the model whose tower makes features; asked at most once.
        identity: of processor and tower.
        store: folder for what was made; None keeps nothing.
        console: shows the progress.

    Attributes:
        others: name of another tower of the same model -> its reader. What it makes of a picture is noted beside
            (`models.PictureTable.view`), for models that are let see by that name.
    """

    def __init__(
        self,
        folder: Path,
        tower: Callable[[], PreTrainedModel],
        identity: str,
        store: Path | None = None,
        console: Console | None = None,
    ) -> None:
        self.folder, self.identity, self.store = folder, identity, store
        self._tower = tower
        self.console = console or Console(quiet=True)
        self.others: dict[str, PictureReader] = {}

    @functools.cached_property
    def processor(self) -> Any:
        """The model's processor."""
        return models.load_processor(self.folder)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model whose tower makes features."""
        return self._tower()

    def __call__(self, conversations: Sequence[Conversation], length: int) -> Pieces:
        """Tokens of conversations: ids `[n]` int32, those of pictures known to `models.PICTURES`; what is learned.

        Args:
            conversations: with pictures.
            length: most tokens of each; a picture is not cut apart.

        Raises:
            UserError: as `data.encode_with_pictures`.
        """
        made, name = self._kept(conversations, length)
        pieces = [
            self._place(tokens, parts, None if name is None else f"{name} {number}")
            for number, (tokens, parts) in enumerate(made)
        ]
        for tower, reader in self.others.items():
            for (ids, _), (_, parts) in zip(pieces, reader._kept(conversations, length)[0], strict=True):
                _note(tower, ids, parts)
        return pieces

    def _kept(self, conversations: Sequence[Conversation], length: int) -> tuple[list[Looked], str | None]:
        """What processor and tower make of conversations, from the disk where it was made before; and its identity."""
        if self.store is None:
            return self._read(conversations, length), None
        file = self.store / f"{self._digest(conversations, length)}.safetensors"
        stored = _stored(file)
        if stored is None:
            made = self._read(conversations, length)
            make_folder(self.store)
            tensors = _tensors(made)
            write_atomically(file, lambda path: save_file(tensors, path))
            stored = _stored(file) or made
        return stored, file.stem

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids of a prompt with pictures.

        Raises:
            UserError: as `data.prompt_with_pictures`.
        """
        return self.tokens(data.prompt_with_pictures(conversation, self.processor))

    def read_text(self, where: str, text: str, pictures: list[Any], special: bool = False) -> PictureTokens:
        """What the processor makes of a text with placeholders and its pictures, of Pillow.

        Raises:
            UserError: as `data.text_with_pictures`.
        """
        return data.text_with_pictures(where, text, pictures, self.processor, special)

    def tokens(self, made: PictureTokens) -> list[int]:
        """Token ids of what the processor made, its pictures looked at."""
        [(tokens, parts)] = self._look([made])
        ids = self._place(tokens, parts, None)[0]
        for tower, reader in self.others.items():
            _note(tower, ids, reader._look([made])[0][1])
        return [int(token) for token in ids]

    def answer(self, conversation: Conversation, text: str) -> list[int]:
        """Tokens of an answer to a prompt, with those that end the turn.

        Raises:
            UserError: as `data.answer_tokens`.
        """
        return data.answer_tokens(conversation, text, self.processor)

    # --- one after the other ---

    def _read(self, conversations: Sequence[Conversation], length: int) -> list[Looked]:
        """What processor and tower make of conversations."""
        read: list[Looked] = []
        waiting: list[PictureTokens] = []
        pixels = 0
        with self.console.track("pictures", len(conversations)) as tracker:
            for conversation in conversations:
                made = data.encode_with_pictures(conversation, self.processor, length=length)
                waiting.append(made)
                pixels += sum(value.numel() for value in made.inputs.values())
                if pixels > BATCH_PIXELS:
                    read += self._look(waiting)
                    waiting, pixels = [], 0
                tracker.advance()
            read += self._look(waiting)
        return read

    def _look(self, made: Sequence[PictureTokens]) -> list[Looked]:
        """Each conversation with the features of its pictures; of several at once where their pictures are alike."""
        if not made:
            return []
        placeholder = models.placeholder_of(self.model.config)
        inputs = [{name: value for name, value in one.inputs.items() if isinstance(value, Tensor)} for one in made]
        counts = [int((one.ids == placeholder).sum()) for one in made]
        together = _joined(inputs)
        if together is None:
            features = [models.features_of(self.model, one) for one in inputs]
        else:
            whole = models.features_of(self.model, together)
            if len(whole.rows) != sum(counts):
                raise _other_number(len(whole.rows), sum(counts))
            features = list(_cut(whole, counts))
        read = []
        for one, given, own, count in zip(made, inputs, features, counts, strict=True):
            if len(own.rows) != count:
                raise _other_number(len(own.rows), count)
            runs = [end - begin for begin, end in data.runs(one.ids == placeholder)]
            read.append((one, models.split_pictures(own, runs, given.get("image_grid_thw"))))
        return read

    def _place(
        self, made: PictureTokens, parts: Sequence[PictureFeatures], key: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a conversation, with those of its pictures in their places."""
        ids = made.ids.copy()
        at = np.flatnonzero(ids == models.placeholder_of(self._config))
        given = [
            models.PICTURES.add(part, None if key is None else hashlib.sha256(f"{key} {number}".encode()).digest())
            for number, part in enumerate(parts)
        ]
        ids[at] = np.concatenate(given) if given else ids[at]
        return ids, made.learn.copy()

    @functools.cached_property
    def _config(self) -> Any:
        return models.auto_config(self.folder)

    def _digest(self, conversations: Sequence[Conversation], length: int) -> str:
        """Identity of what becomes of conversations."""
        made = hashlib.sha256(json.dumps([self.identity, length, versions()], sort_keys=True).encode())
        for one in conversations:
            made.update(json.dumps([one.messages, one.tools, dict(one.options)], sort_keys=True, default=str).encode())
            for part in one.pictures:
                if isinstance(path := part.get("path"), str) and (one.folder / path).is_file():
                    made.update(hashlib.sha256((one.folder / path).read_bytes()).digest())
        return made.hexdigest()


def _note(tower: str, ids: np.ndarray, parts: Sequence[PictureFeatures]) -> None:
    """Note what another tower makes of the pictures among some tokens, in their order."""
    shown, begin = ids[ids >= models.FIRST], 0
    for part in parts:
        models.PICTURES.add_view(tower, shown[begin : begin + len(part.rows)], part)
        begin += len(part.rows)


def _other_number(made: int, places: int) -> UserError:
    return UserError(f"The tower makes {made} features of pictures, but there are {places} places for them.")


def _joined(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """The pictures of several conversations in one call of a tower; None where they differ in size."""
    if len(inputs) == 1:
        return dict(inputs[0])
    joined = {}
    for name in inputs[0]:
        if name in ("mm_token_type_ids", "token_type_ids"):  # they go with ids
            continue
        # Idefics and SmolVLM have a row for each text, with all of its pictures.
        dimension = 1 if inputs[0]["pixel_values"].ndim == 5 and name.startswith("pixel") else 0
        shapes = {
            tuple(size for place, size in enumerate(one[name].shape) if place != dimension) if name in one else ()
            for one in inputs
        }
        if len(shapes) > 1:
            return None
        joined[name] = torch.cat([one[name] for one in inputs], dim=dimension)
    return joined


def _cut(features: PictureFeatures, counts: Sequence[int]) -> Iterator[PictureFeatures]:
    """Features of several conversations, so many rows of each."""
    begin = 0
    for count in counts:
        deep = None if features.deep is None else features.deep[:, begin : begin + count]
        yield PictureFeatures(features.rows[begin : begin + count], deep)
        begin += count


# --- on disk -----------------------------------------------------------------------------------


def _tensors(made: Sequence[tuple[PictureTokens, list[PictureFeatures]]]) -> dict[str, Tensor]:
    """Conversations as the tensors of a file."""
    parts = [part for _, listed in made for part in listed]
    tensors = {
        "ids": torch.from_numpy(np.concatenate([tokens.ids for tokens, _ in made])),
        "learn": torch.from_numpy(np.concatenate([tokens.learn for tokens, _ in made]).astype(np.uint8)),
        "lengths": torch.tensor([len(tokens.ids) for tokens, _ in made]),
        "pictures": torch.tensor([len(listed) for _, listed in made]),
        "features": torch.tensor([len(part.rows) for part in parts]),
    }
    if parts:
        tensors["rows"] = torch.cat([part.rows for part in parts]).contiguous()
        if parts[0].deep is not None:
            tensors["deep"] = torch.cat([part.deep for part in parts if part.deep is not None], dim=1).contiguous()
        if parts[0].grid is not None:
            tensors["grids"] = torch.tensor([part.grid for part in parts])
    return tensors


def _stored(file: Path) -> list[Looked] | None:
    """Conversations of a file, whose features are read when they are used; None where it is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        begin = picture = row = 0
        made = []
        for length, count in zip(tensors["lengths"].tolist(), tensors["pictures"].tolist(), strict=True):
            ids = tensors["ids"][begin : begin + length].numpy()
            learn = tensors["learn"][begin : begin + length].numpy().astype(bool)
            parts: list[PictureFeatures] = []
            for features in tensors["features"][picture : picture + count].tolist():
                deep = tensors["deep"][:, row : row + features] if "deep" in tensors else None
                grid = tuple(tensors["grids"][picture + len(parts)].tolist()) if "grids" in tensors else None
                parts.append(PictureFeatures(tensors["rows"][row : row + features], deep, grid))
                row += features
            made.append((PictureTokens(ids, learn, (), {}), parts))
            begin, picture = begin + length, picture + count
        return made
    except (OSError, SafetensorError, KeyError, IndexError):
        return None
