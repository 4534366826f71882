"""Documents -> the tokens of a source, one after another, and where each document begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgerazor.data import chat
from edgerazor.data.sources import Document
from edgerazor.errors import UserError
from edgerazor.untrusted import vocabulary
from edgerazor.untrusted.tokenizer import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Label of a position that no loss counts (the convention of PyTorch and transformers).
MASKED = -100
#: Documents that are tokenized at once.
BATCH_DOCUMENTS = 256


#: Gives for conversations with pictures their tokens, ids `[n]` int32, and which are to be learned, `[n]` bool.
PictureEncoder = Callable[[Sequence[chat.Conversation]], list[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one source.

    Args:
        ids: `[N]` int32.
        starts: `[D]` int64, ascending from 0: where in `ids` each document begins.
        learn: `[N]` bool: which tokens are to be predicted; the others are only read.
        prefix: what every row begins with (see `prefix_of`).
    """

    ids: np.ndarray
    starts: np.ndarray
    learn: np.ndarray
    prefix: tuple[int, ...] = ()

    @classmethod
    def of(cls, pieces: Sequence[tuple[np.ndarray, np.ndarray]], prefix: tuple[int, ...] = ()) -> Tokens:
        """Documents `(ids [n], learn [n])` one after another."""
        lengths = np.array([len(ids) for ids, _ in pieces], dtype=np.int64)
        ids = np.concatenate([ids for ids, _ in pieces]) if pieces else np.empty(0, dtype=np.int32)
        learn = np.concatenate([learn for _, learn in pieces]) if pieces else np.empty(0, dtype=bool)
        return cls(ids, np.cumsum(lengths) - lengths, learn, prefix)

    @classmethod
    def of_text(cls, ids: np.ndarray) -> Tokens:
        """One text, all of it to be learned; `ids [N]` int32."""
        return cls(ids, np.zeros(1, dtype=np.int64), np.ones(len(ids), dtype=bool))

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """`(ids [n] int32, learn [n] bool)` of a row that holds the tokens `begin` to `end`, with its prefix."""
        return with_prefix(self.ids[begin:end], self.learn[begin:end], self.prefix)

    def has_prefix(self) -> np.ndarray:
        """`[N]` bool: where the prefix stands in the tokens already, as at the beginning of a text."""
        present = np.ones(len(self), dtype=bool)
        for place, token in enumerate(self.prefix):
            present[len(self) - place :] = False
            present[: len(self) - place] &= self.ids[place:] == token
        return present


def with_prefix(ids: np.ndarray, learn: np.ndarray, prefix: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the mask of a row, which begins with the prefix; added where it is missing, it is not learned."""
    if tuple(ids[: len(prefix)].tolist()) == prefix:
        return ids, learn
    return (
        np.concatenate([np.array(prefix, dtype=ids.dtype), ids]),
        np.concatenate([np.zeros(len(prefix), dtype=bool), learn]),
    )


def around_text(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and behind a text: what it does, whatever its settings say."""
    ids = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    if not bare:  # it has no token for this letter
        end = len(ids) - (ids[-1:] == [tokenizer.eos_token_id])
        return tuple(ids[:end]), tuple(ids[end:])
    at = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
    return tuple(ids[:at]), tuple(ids[at + len(bare) :])


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What every row begins with: the BOS of a tokenizer that puts one before a text, else nothing.

    A model that has seen BOS before every text gives its attention to it, and is lost without: a window from the middle
    of a text needs it as much as the text's beginning.
    """
    return around_text(tokenizer)[0]


def tokenize(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
    prefix: tuple[int, ...] | None = None,
    read_pictures: PictureEncoder | None = None,
) -> Tokens:
    """All documents as one stream of tokens (see `encode`), whose rows begin with `prefix` (by default `prefix_of`)."""
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    documents = iter(documents)
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        pieces += encode(batch, tokenizer, options, read_pictures)
    return Tokens.of(pieces, prefix_of(tokenizer) if prefix is None else prefix)


def encode(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
    read_pictures: PictureEncoder | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens of each document, and which of them are to be learned.

    A text gets the special tokens that the tokenizer adds (a BOS where it has one), and the tokenizer's EOS at its end
    where it has one and did not add it. All of it is learned; of a conversation, the assistant's turns. Its first token
    never is: where documents follow one another, it would be predicted from the end of another one. Chat templates are
    given `options` beside the messages. Conversations with pictures are read by `read_pictures`, all of them at once.

    Returns:
        `(ids [n] int32, learn [n] bool)` for each document.

    Raises:
        UserError: a conversation cannot be encoded (see `chat.encode`), or the model does not know a token.
    """
    texts = iter(_encode_texts([document for document in documents if isinstance(document, str)], tokenizer))
    talks = [
        replace(document, options=options or {}) for document in documents if isinstance(document, chat.Conversation)
    ]
    seeing = iter(_encode_pictures([talk for talk in talks if talk.pictures], read_pictures))
    conversations = iter(talks)
    pieces = []
    for document in documents:
        if isinstance(document, str):
            ids = next(texts)
            learn = np.ones(len(ids), dtype=bool)
        else:
            talk = next(conversations)
            ids, learn = next(seeing) if talk.pictures else chat.encode(talk, tokenizer)
            learn[:1] = False
        if isinstance(document, str) or not document.pictures:
            vocabulary.check(tokenizer, ids)
        pieces.append((ids, learn))
    return pieces


def _encode_pictures(
    conversations: Sequence[chat.Conversation], read_pictures: PictureEncoder | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    if not conversations:
        return []
    if read_pictures is None:
        raise UserError(
            f"{conversations[0].where} holds pictures, but they cannot be read here.",
            "Give a model that sees, as the only teacher and in memory, with `data.packing: document`.",
        )
    return read_pictures(conversations)


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    if not texts:
        return []
    eos = tokenizer.eos_token_id
    with reading():
        encoded = tokenizer(
            texts,
            add_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # rows are cut later, so texts longer than the model's context are no reason to warn
        )
    pieces = []
    for ids in encoded["input_ids"]:
        ended = eos is None or (len(ids) > 0 and ids[-1] == eos)
        pieces.append(np.array(ids if ended else [*ids, eos], dtype=np.int32))
    return pieces


def batch_of(ids: np.ndarray, learn: np.ndarray) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, int64 `[n]`, of some tokens; labels are -100 where nothing is to be learned."""
    wide = ids.astype(np.int64)
    return {"input_ids": torch.from_numpy(wide), "labels": torch.from_numpy(np.where(learn, wide, MASKED))}


def permutation(seed: tuple[int, ...], size: int) -> np.ndarray:
    """A permutation `[size]` int64 that is the same in every version of NumPy, which promises that of raw bits only."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return np.argsort(bits, kind="stable")
