"""Documents -> the tokens of a source, one after another, and where each document begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgerazor.data import chat
from edgerazor.data.sources import Document
from edgerazor.untrusted.tokenizer import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Label of a position that no loss counts (the convention of PyTorch and transformers).
MASKED = -100
#: How much of a source may be held out so as to hold out whole documents, when less was asked for.
LARGEST_HELD_OUT = 0.25
#: Documents that are tokenized at once.
TOGETHER = 256


@dataclass(frozen=True)
class Tokens:
    """The tokens of one source.

    Args:
        ids: `[N]` int32.
        starts: `[D]` int64, ascending from 0: where in `ids` each document begins.
        learn: `[N]` bool: which tokens are to be predicted; the others are only read.
    """

    ids: np.ndarray
    starts: np.ndarray
    learn: np.ndarray

    @classmethod
    def of(cls, pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tokens:
        """Documents `(ids [n], learn [n])` one after another."""
        lengths = np.array([len(ids) for ids, _ in pieces], dtype=np.int64)
        ids = np.concatenate([ids for ids, _ in pieces]) if pieces else np.empty(0, dtype=np.int32)
        learn = np.concatenate([learn for _, learn in pieces]) if pieces else np.empty(0, dtype=bool)
        return cls(ids, np.cumsum(lengths) - lengths, learn)

    @classmethod
    def of_text(cls, ids: np.ndarray) -> Tokens:
        """One text, all of it to be learned; `ids [N]` int32."""
        return cls(ids, np.zeros(1, dtype=np.int64), np.ones(len(ids), dtype=bool))

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, at: int) -> tuple[Tokens, Tokens]:
        """The first `at` tokens, and the rest."""
        before, after = self.starts[self.starts < at], self.starts[self.starts > at] - at
        rest = np.concatenate([np.zeros(min(1, len(self) - at), dtype=np.int64), after])
        return Tokens(self.ids[:at], before, self.learn[:at]), Tokens(self.ids[at:], rest, self.learn[at:])


def tokenize(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """All documents as one stream of tokens (see `encode`)."""
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    documents = iter(documents)
    while some := list(islice(documents, TOGETHER)):
        pieces += encode(some, tokenizer)
    return Tokens.of(pieces)


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens of each document, and which of them are to be learned.

    A text gets the special tokens that the tokenizer adds (a BOS where it has one), and the tokenizer's EOS at its end
    where it has one and did not add it. All of it is learned; of a conversation, the assistant's turns. Its first token
    never is: where documents follow one another, it would be predicted from the end of another one.

    Returns:
        `(ids [n] int32, learn [n] bool)` for each document.

    Raises:
        UserError: a conversation cannot be encoded (see `chat.encode`).
    """
    texts = iter(_encode_texts([each for each in documents if isinstance(each, str)], tokenizer))
    found = []
    for document in documents:
        if isinstance(document, str):
            ids = next(texts)
            found.append((ids, np.ones(len(ids), dtype=bool)))
        else:
            ids, learn = chat.encode(document, tokenizer)
            learn[:1] = False
            found.append((ids, learn))
    return found


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


def split_held_out(tokens: Tokens, length: int, fraction: float) -> tuple[Tokens, Tokens]:
    """Cut the end off a source, for measuring on text that training never sees.

    The cut is at the start of the last document that leaves at least `fraction` behind it. Where whole documents would
    take far more than asked for (one long document, for one), the cut goes through a document, between two rows.

    Args:
        tokens: of the source, N of them.
        length: tokens in a row.
        fraction: share of the tokens to hold out, above 0 and below 1.

    Returns:
        training and held-out tokens, views of `tokens`.
    """
    total = len(tokens)
    goal = int(total * (1 - fraction))
    candidates = tokens.starts[(tokens.starts > 0) & (tokens.starts <= goal)]
    cut = int(candidates[-1]) if len(candidates) else 0
    if total - cut > max(2 * fraction, LARGEST_HELD_OUT) * total:
        cut = goal // length * length or goal
    return tokens.split(cut)


def batch_of(ids: np.ndarray, learn: np.ndarray) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, int64 `[n]`, of some tokens; labels are -100 where nothing is to be learned."""
    wide = ids.astype(np.int64)
    return {"input_ids": torch.from_numpy(wide), "labels": torch.from_numpy(np.where(learn, wide, MASKED))}


def permutation(seed: tuple[int, ...], size: int) -> np.ndarray:
    """A permutation `[size]` int64 that is the same in every version of NumPy, which promises that of raw bits only."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return np.argsort(bits, kind="stable")
