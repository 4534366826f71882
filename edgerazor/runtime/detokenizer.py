"""Tokens to text as they come: characters that no later token changes, up to the first stop string.

A token is not a text: its bytes may be a part of a character, and what it looks like depends on its neighbours
(tokenizers drop the blank before the first word). So the tokens since a place where the text was whole are decoded
twice, without and with the new ones; what the latter has more is new text. While it ends with the replacement
character, which stands for a part of a character, nothing is given out yet. (This way is that of vLLM's detokenizer.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from edgerazor.models import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
#: Tokens of the prompt that are decoded with the first new ones; and tokens without a whole character after which their
#: text is given out as it is: a character has at most 4 bytes, so more of them are no text.
CONTEXT, PATIENCE = 5, 16


class Detokenizer:
    """Tokens to text, a few at a time: all pieces together are the text of all tokens behind those before.

    Args:
        tokenizer: of transformers.
        before: tokens that the text goes on from, whose text is not given; none where it is a text of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before)[-CONTEXT:]
        self.emitted = len(self.ids)  # leading tokens whose text has been given out

    def push(self, ids: Sequence[int]) -> str:
        """The new text, which no later token changes; special tokens have none."""
        pieces = []
        for token in ids:
            self.ids.append(token)
            pieces.append(self._new(waiting=len(self.ids) - self.emitted <= PATIENCE))
        return "".join(pieces)

    def finish(self) -> str:
        """The text that was held back for more tokens: replacement characters for parts of characters."""
        return self._new(waiting=False)

    def _new(self, waiting: bool) -> str:
        """The text of the tokens that is not given out yet; none while it may change, if it is to wait."""
        before, now = self._decode(self.ids[: self.emitted]), self._decode(self.ids)
        if waiting and (now.endswith(REPLACEMENT) or len(now) <= len(before)):
            return ""
        self.ids, self.emitted = self.ids[self.emitted :], len(self.ids) - self.emitted
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Lets text through up to the first stop string; what may be the beginning of one is held back until it is known.

    It does not depend on the pieces that the text comes in: the stop string that ends first counts, and of several
    that end together the longest.

    Args:
        stops: not empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """What of the text so far is certain to stand before any stop string, and was not given out yet."""
        if self.matched:
            return ""
        self.held += text
        ends = [(place + len(stop), place) for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if ends:
            self.matched = True
            return self._release(min(ends)[1])
        return self._release(len(self.held) - self._beginning())

    def finish(self) -> str:
        """The text that was held back, now that no more text comes."""
        return "" if self.matched else self._release(len(self.held))

    def _beginning(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        most = min(len(self.held), max(map(len, self.stops), default=1) - 1)
        return next((n for n in range(most, 0, -1) if any(s.startswith(self.held[-n:]) for s in self.stops)), 0)

    def _release(self, count: int) -> str:
        released, self.held = self.held[:count], self.held[count:]
        return released


class TextAssembler:
    """Tokens to the text that a caller is given: whole characters, up to the first stop string.

    Args:
        tokenizer: of transformers.
        before: tokens that the text goes on from; none where it is a text of its own.
        stops: strings before the first of which the text ends.
        shown: special tokens that are a part of the text (those that mark tool calls); others have no text.

    Attributes:
        decoded: characters that all tokens so far have, held back ones and stop strings included; less those of parts
            of characters.
        released: characters that were given out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        before: Sequence[int] = (),
        stops: Sequence[str] = (),
        shown: Collection[int] = (),
    ) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._detokenizer = Detokenizer(tokenizer, before)
        self._stops = StopStrings(stops)
        self.decoded = self.released = 0

    @property
    def matched(self) -> bool:
        """Whether a stop string came up, so that no more text follows."""
        return self._stops.matched

    def push(self, ids: Sequence[int]) -> str:
        """The new text that no later token changes and no stop string cuts."""
        return "".join(self._let_through(self._decode(token)) for token in ids)

    def finish(self) -> str:
        """The text that was held back, now that no more tokens come."""
        return self._let_through(self._detokenizer.finish()) + self._count(self._stops.finish())

    def _decode(self, token: int) -> str:
        if token not in self._shown:
            return self._detokenizer.push([token])
        held = self._detokenizer.finish()
        self._detokenizer = Detokenizer(self._tokenizer, [token])
        return held + str(self._tokenizer.convert_ids_to_tokens(token))

    def _let_through(self, text: str) -> str:
        self.decoded += len(text)
        return self._count(self._stops.push(text))

    def _count(self, text: str) -> str:
        self.released += len(text)
        return text
