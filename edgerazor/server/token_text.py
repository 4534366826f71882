"""What a single token looks like: its bytes, and the text that log-probabilities name it by.

A token may be a part of a character. Its text is then `bytes:\\xe2\\x98`, as OpenAI writes it, so that two tokens of
different bytes never have the same name.
"""

from __future__ import annotations

import functools
import re

from edgerazor.models import PreTrainedTokenizerBase

#: A byte of a tokenizer with byte fallback, and the blank of SentencePiece.
BYTE, BLANK = re.compile(r"<0x([0-9A-Fa-f]{2})>"), "\u2581"


@functools.cache
def byte_letters() -> dict[str, int]:
    """Letter -> byte of byte-level BPE, which writes each byte as a letter that can be seen (that of GPT-2)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenTexts:
    """Bytes and names of a tokenizer's tokens.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
        description = decoder.__getstate__().decode() if decoder is not None else ""
        self._byte_level, self._sentencepiece = '"ByteLevel"' in description, BLANK in description

    def raw(self, token: int) -> bytes:
        """The bytes of a token; none for a number that the tokenizer has no token for."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._byte_level and all(letter in byte_letters() for letter in piece):
            return bytes(byte_letters()[letter] for letter in piece)
        if self._sentencepiece:
            byte = BYTE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace(BLANK, " ").encode()
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()

    def name(self, token: int) -> str:
        """The text of a token; `bytes:` and its bytes where they are no text."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
