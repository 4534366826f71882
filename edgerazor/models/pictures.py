"""Pictures as tokens of their own.

A tower makes features of a picture, which take the places of some tokens in the inputs of the decoder. Here every
feature has a token id of its own, far behind any vocabulary, and a table gives the feature of an id. What handles
token ids handles pictures: rows of training data, masks, caches, prefixes that two prompts have in common. The tower
runs once for a picture, however many models read its tokens.

A model of transformers gets a hook (`let_see`): before it computes, such ids become the placeholders that its family
knows, and their features are handed to it in the place of pixels, so that it computes positions and masks itself.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import inspect
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel
from transformers.utils import ModelOutput

from edgerazor.errors import UserError

#: The first token id of a picture; vocabularies are smaller.
FIRST = 1 << 24
#: The tower that sees nothing: all of its features are 0.
BLIND = "blind"


@dataclass(frozen=True)
class PictureFeatures:
    """What a tower makes of a picture, or of several that stand side by side.

    Attributes:
        rows: `[P, H]`, what takes the places of P tokens.
        deep: `[L, P, H]`, what is added to the outputs of the first L decoder layers there (deep-stack features).
        grid: patches of the picture in time, height and width, where the family's positions depend on them.
    """

    rows: Tensor
    deep: Tensor | None = None
    grid: tuple[int, int, int] | None = None

    def digest(self) -> bytes:
        """Identity of what is in it."""
        made = hashlib.sha256(repr((self.grid, tuple(self.rows.shape))).encode())
        for tensor in (self.rows, self.deep):
            if tensor is not None:
                made.update(tensor.float().contiguous().numpy().tobytes())
        return made.digest()


@dataclass(frozen=True)
class GatheredPictures:
    """The features of the picture tokens of a batch, in its order.

    Attributes:
        rows: `[P, H]`.
        deep: `[L, P, H]`, or None.
        grids: int64 `[pictures, 3]`, or None.
    """

    rows: Tensor
    deep: Tensor | None
    grids: Tensor | None


class _Rows(tuple[Tensor, ...]):
    """Features of all pictures in one tensor, for families that take a tensor for each picture, and for those that take
    one."""

    def to(self, *args: Any) -> Tensor:
        return self[0].to(*args)


@dataclass
class _TowerOutput(ModelOutput):
    """Features in the form in which a tower gives them to its family's model."""

    pooler_output: Any = None
    deepstack_features: Any = None


@dataclass
class PictureTable:
    """The pictures that a process knows, by the token ids of their features."""

    _pictures: list[PictureFeatures] = field(default_factory=list)
    _begins: list[int] = field(default_factory=list)
    _known: dict[bytes, int] = field(default_factory=dict)
    _others: dict[tuple[str, int], PictureFeatures] = field(default_factory=dict)
    _size: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, features: PictureFeatures, key: bytes | None = None) -> np.ndarray:
        """Token ids int32 `[P]` of a picture's features; those of a known picture are the same as before.

        Args:
            features: of the picture, on the CPU.
            key: identity of the picture; by default the features' digest.
        """
        key = features.digest() if key is None else key
        with self._lock:
            if key not in self._known:
                self._known[key] = len(self._pictures)
                self._pictures.append(features)
                self._begins.append(self._size)
                self._size += len(features.rows)
            number = self._known[key]
        begin = FIRST + self._begins[number]
        return np.arange(begin, begin + len(features.rows), dtype=np.int32)

    def add_view(self, tower: str, ids: np.ndarray, features: PictureFeatures) -> None:
        """Note what another tower makes of the picture that has these token ids."""
        self._others[tower, self._number(int(ids[0]))] = features

    def view(self, tower: str, number: int) -> PictureFeatures:
        """What a tower makes of a picture; every tower that nothing was noted of makes what the first one did."""
        if tower == BLIND:
            picture = self._pictures[number]
            deep = None if picture.deep is None else torch.zeros_like(picture.deep)
            return PictureFeatures(torch.zeros_like(picture.rows), deep, picture.grid)
        return self._others.get((tower, number), self._pictures[number])

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and FIRST <= token < FIRST + self._size

    def gather(self, ids: Tensor, tower: str = "") -> GatheredPictures:
        """The features of picture tokens int64 `[P]`, as they follow one another, on the CPU.

        Raises:
            UserError: there is no such token.
        """
        rows: list[Tensor] = []
        deep: list[Tensor] = []
        grids: list[tuple[int, int, int]] = []
        places = [token - FIRST for token in ids.tolist()]
        at = 0
        while at < len(places):
            number = self._number(places[at] + FIRST)
            picture, first = self.view(tower, number), places[at] - self._begins[number]
            count = 1
            while at + count < len(places) and places[at + count] == places[at] + count:
                count += 1
            count = min(count, len(picture.rows) - first)
            rows.append(picture.rows[first : first + count])
            if picture.deep is not None:
                deep.append(picture.deep[:, first : first + count])
            if picture.grid is not None:
                grids.append(picture.grid)
            at += count
        return GatheredPictures(
            torch.cat(rows), torch.cat(deep, dim=1) if deep else None, torch.tensor(grids) if grids else None
        )

    def _number(self, token: int) -> int:
        """Which picture a token is of."""
        place = token - FIRST
        if not 0 <= place < self._size:
            raise UserError(f"There is no picture token {token} in this process.")
        return bisect.bisect_right(self._begins, place) - 1


#: The pictures of this process.
PICTURES = PictureTable()


def picture_mask(ids: Tensor) -> Tensor:
    """Where token ids are of pictures: bool of their shape."""
    return ids >= FIRST


def has_pictures(ids: Tensor) -> bool:
    """Whether any of these tokens is of a picture."""
    return bool(picture_mask(ids).any())


# --- models ------------------------------------------------------------------------------------


def _tower_owner(model: PreTrainedModel) -> Any:
    """The module that makes features of pictures."""
    for module in (model.base_model, model):
        if hasattr(module, "get_image_features"):
            return module
    raise UserError(f"{type(model).__name__} has no way to make features of pictures that is understood.")


def placeholder_of(config: Any) -> int:
    """The token id that stands for a feature of a picture in a family's own inputs.

    Raises:
        UserError: the configuration does not say.
    """
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    raise UserError(f"The configuration of {type(config).__name__} does not say which token stands for pictures.")


@torch.no_grad()
def features_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> PictureFeatures:
    """What a model's tower makes of pictures, all of them together, float32 on the CPU.

    Args:
        model: that sees.
        inputs: what its processor made of them: pixels, sizes.

    Raises:
        UserError: the model makes none, or something else than rows of features.
    """
    owner = _tower_owner(model)
    names = inspect.signature(type(owner).get_image_features).parameters
    given = {name: value.to(model.device) for name, value in inputs.items() if name in names}
    output = owner.get_image_features(**given, return_dict=True)
    deep = getattr(output, "deepstack_features", None)
    levels = [_flat(level) for level in deep] if deep else []
    return PictureFeatures(_flat(output.pooler_output), torch.stack(levels) if levels else None)


def _flat(features: Tensor | Sequence[Tensor]) -> Tensor:
    """Rows of features float32 [P, H], of a tensor [..., H] or several of them."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).float().cpu()


def split_pictures(features: PictureFeatures, counts: Sequence[int], grids: Tensor | None) -> list[PictureFeatures]:
    """One `PictureFeatures` for each run of placeholders; where there are grids, for each picture.

    Args:
        features: of all.
        counts: placeholders of each run.
        grids: int64 `[pictures, 3]`, or None.

    Raises:
        UserError: there are more or fewer features than placeholders.
    """
    total = len(features.rows)
    if grids is not None:
        patches = grids.prod(-1)
        merged = int(patches.sum()) // max(total, 1)
        counts = (patches // max(merged, 1)).tolist()
    if sum(counts) != total:
        raise UserError(f"The tower makes {total} features, but there are places for {sum(counts)} of them.")
    bounds = np.concatenate([[0], np.cumsum(counts)]).tolist()
    return [
        PictureFeatures(
            features.rows[begin:end],
            None if features.deep is None else features.deep[:, begin:end],
            None if grids is None else tuple(grids[number].tolist()),
        )
        for number, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]


def let_see(model: PreTrainedModel, table: PictureTable = PICTURES, tower: str = "") -> PreTrainedModel:
    """Let a model that sees read picture tokens among its `input_ids`, in place; another one is left as it is.

    Args:
        model: of transformers.
        table: where its pictures are.
        tower: whose features it reads, where several made some (`PictureTable.view`).
    """
    if getattr(model.config, "vision_config", None) is None:
        return model
    names = inspect.signature(type(model).forward).parameters
    if "mm_encoder_outputs" not in names:
        return model  # its towers are no part of what is understood; picture tokens fail in its embedding
    placeholder = placeholder_of(model.config)
    if (handle := getattr(model, "_picture_hook", None)) is not None:
        handle.remove()
    hook = functools.partial(_with_features, table, tower, placeholder, frozenset(names))
    model._picture_hook = model.register_forward_pre_hook(hook, with_kwargs=True)
    model._picture_tower = tower
    return model


def tower_of(model: PreTrainedModel) -> str:
    """Whose features a model reads, as `let_see` was told."""
    return str(getattr(model, "_picture_tower", ""))


def _with_features(
    table: PictureTable,
    tower: str,
    placeholder: int,
    names: frozenset[str],
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a forward pass with the family's own placeholders, and features in the place of pixels."""
    ids = args[0] if args else kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or not has_pictures(ids):
        return None
    mask = picture_mask(ids)
    gathered = table.gather(ids[mask].cpu(), tower)
    rows = gathered.rows.to(ids.device)
    given: dict[str, Any] = {"input_ids": ids.masked_fill(mask, placeholder)}
    if "mm_token_type_ids" in names:
        given["mm_token_type_ids"] = mask.int()
    if "token_type_ids" in names:
        given["token_type_ids"] = mask.long()
    if gathered.grids is not None and "image_grid_thw" in names:
        given["image_grid_thw"] = gathered.grids.to(ids.device)
    deep = None if gathered.deep is None else [(level.to(ids.device),) for level in gathered.deep]
    given["mm_encoder_outputs"] = {"image": _TowerOutput(pooler_output=_Rows((rows,)), deepstack_features=deep)}
    return args[1:], {**kwargs, **given}


@contextlib.contextmanager
def own_positions(model: PreTrainedModel, deltas: Any) -> Iterator[list[Any]]:
    """Let a model go on with a sequence that it knows how far positions are ahead of; yields a list of what it knows
    afterwards. Families of several dimensions note it in the model, where the next sequence would find it."""
    owner, known = model.base_model, [deltas]
    if not hasattr(owner, "rope_deltas"):
        yield known
        return
    owner.rope_deltas = deltas
    try:
        yield known
    finally:
        known.append(owner.rope_deltas)
        owner.rope_deltas = None


def input_names(config: Any) -> frozenset[str]:
    """The inputs of a configuration's model that sees; none of one that reads text alone."""
    if getattr(config, "vision_config", None) is None:
        return frozenset()
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return frozenset(inspect.signature(kind.forward).parameters) if kind is not None else frozenset()


def added_between_layers(table: PictureTable, ids: Tensor) -> bool:
    """Whether features of pictures are added behind decoder layers for these tokens."""
    return has_pictures(ids) and table.gather(ids[picture_mask(ids)].cpu()).deep is not None
