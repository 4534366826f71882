"""Answers that have to be JSON of a schema: llguidance says before every token which may come.

Its automaton works on the bytes of the tokenizer's tokens, so a token may hold several letters of the JSON, and the
masks cost less than a millisecond. The JSON is written as `json.dumps` writes it, with one blank behind commas and
colons and no other: with any white space allowed, a small model may write nothing else to the end.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from edgerazor.errors import UserError, plain, usage_error
from edgerazor.models import PreTrainedTokenizerBase

#: How the JSON is written.
WRITING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarConstraint:
    """What may follow so far, for one text; a `TokenConstraint` of the schedulers.

    Args:
        matcher: of the grammar, at its beginning.
        vocabulary: number of logits.
        ends: tokens that end the text, once the JSON is complete.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int, ends: frozenset[int]) -> None:
        self._matcher, self._ends = matcher, ends
        self._vocabulary = vocabulary
        self._only_ends = np.zeros(vocabulary, dtype=bool)
        self._only_ends[[end for end in ends if end < vocabulary]] = True

    def mask(self) -> NDArray[np.bool_]:
        """Bool [vocabulary]: which tokens may follow.

        Raises:
            UserError: the grammar has become too large to be followed.
        """
        if self._matcher.is_error():
            raise UserError(f"The answer's grammar gave up: {plain(self._matcher.get_error(), 200)}.")
        if self._matcher.is_stopped():
            return self._only_ends
        bits = allocate_token_bitmask(1, self._vocabulary)
        fill_next_token_bitmask(self._matcher, bits)
        mask = np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._vocabulary].astype(bool)
        return mask if mask.any() else self._only_ends

    def accept(self, token: int) -> None:
        """Go on behind a token."""
        if token not in self._ends and not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Makes constraints for a tokenizer; the first takes about a second for a large vocabulary.

    Args:
        tokenizer: of transformers, with a tokenizer.json.
        vocabulary: number of logits.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Iterable[int]) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._ends = frozenset(ends)
        self._lock = threading.Lock()
        self._of_library: LLTokenizer | None = None

    def constraint(self, schema: dict[str, Any]) -> GrammarConstraint:
        """A constraint to the JSON of a schema.

        Raises:
            UserError: the schema is none, or has what the library does not know; or there is no tokenizer.json.
        """
        tokenizer = self._opened()
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=WRITING)
        if (problem := LLMatcher.validate_grammar(grammar, tokenizer)) and not problem.startswith("WARNING"):
            raise usage_error(f"The JSON schema cannot be followed: {plain(problem.splitlines()[0], 300)}.")
        return GrammarConstraint(LLMatcher(tokenizer, grammar), self._vocabulary, self._ends)

    def _opened(self) -> LLTokenizer:
        with self._lock:
            if self._of_library is None:
                if not self._tokenizer.is_fast:
                    raise usage_error("The model's tokenizer has no tokenizer.json, which answers in JSON need.")
                engine = type(self._tokenizer.backend_tokenizer).from_str(self._tokenizer.backend_tokenizer.to_str())
                engine.no_padding()
                engine.no_truncation()
                count = max(self._vocabulary, engine.get_vocab_size(with_added_tokens=True))
                self._of_library = LLTokenizer(engine.to_str(), n_vocab=count, eos_token=sorted(self._ends))
            return self._of_library
