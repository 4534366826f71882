"""A fast tokenizer of transformers as the vocabulary of a GGUF file.

llama.cpp tokenizes with code of its own, in two ways that concern us. *Byte-level BPE* (`gpt2`) takes merges as they
are, but cuts text into words by one of the patterns compiled into it, which a file can only name: a tokenizer with an
unknown pattern is refused. *SentencePiece* (`llama`) has no merges: it joins the neighbours whose union has the highest
score, whatever they are. That is BPE exactly when every two pieces whose union is a piece are a merge, and merges into
one piece follow each other; then the scores are the order of the pieces. Otherwise the tokenizer is refused.

Sources: `src/llama-vocab.cpp` of llama.cpp (patterns and algorithms), `conversion/base.py` (types of tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gguf

from edgerazor import untrusted
from edgerazor.data import around_text
from edgerazor.errors import UserError
from edgerazor.models import PreTrainedTokenizerBase
from edgerazor.models.gguf_patterns import DIGITS, ENDS, GPT2, PATTERNS

#: Score of pieces that no merge gives.
UNREACHED = -1e6

Type = gguf.TokenType


@dataclass
class Vocabulary:
    """A vocabulary for llama.cpp.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
        pre: name of the pattern that cuts text into words.
        tokens, types: of all rows of the embedding.
        scores: of a SentencePiece vocabulary.
        merges: of BPE, two pieces with a space between.
        add_bos, add_eos: whether the tokenizer puts the first and the last token around a text.
        space_prefix: whether a text is tokenized as if it began with a space.
        special: role (`bos`, `eos`, `unk`, `pad`, `eot`) -> id.
        chat_template: Jinja, or empty.
        notes: what llama.cpp does otherwise.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    add_bos: bool
    add_eos: bool
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False
    special: dict[str, int] = field(default_factory=dict)
    chat_template: str = ""
    notes: list[str] = field(default_factory=list)

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write the vocabulary as metadata of a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, number in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{NAMES[role]}_token_id", number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


#: Roles of special tokens -> as GGUF's keys call them.
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}


def build_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, ends: list[int]) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        tokenizer: a fast one.
        size: rows of the embedding.
        ends: tokens that end a text, of the generation settings.

    Raises:
        UserError: llama.cpp would tokenize otherwise; the sentence says why.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it has no tokenizer.json form")
    tokenizer_json = untrusted.parse_json(backend.to_str(), dict, most_entries=untrusted.MOST_ENTRIES_OF_TOKENIZERS)
    if tokenizer_json["model"]["type"] != "BPE":
        raise _refused(f"it is a {tokenizer_json['model']['type']} model, and not BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if tokenizer_json["model"].get(name):
            raise _refused(f"it has a {name}")
    pieces = tokenizer_json["model"]["vocab"]
    added = {token["id"]: token for token in tokenizer_json["added_tokens"] if token["id"] < size}
    special = {token["content"] for token in tokenizer_json["added_tokens"]}
    if max((number for piece, number in pieces.items() if piece not in special), default=0) >= size:
        raise _refused(f"it has pieces beyond the {size} rows of the embedding")
    build = _sentencepiece if _is_sentencepiece(tokenizer_json) else _byte_level
    vocabulary = build(tokenizer_json, pieces)
    if len(added) < len(tokenizer_json["added_tokens"]):
        vocabulary.notes.append(f"Special tokens beyond the {size} rows of the embedding are left out.")
    _fill(vocabulary, pieces, added, size)
    if ordinary := sorted((pieces.keys() - special) & ENDS):
        vocabulary.notes.append(f"llama.cpp takes the ordinary token {', '.join(ordinary)} for the end of a text.")
    vocabulary.add_bos, vocabulary.add_eos = _ends(tokenizer_json, tokenizer)
    ends = [number for number in ends if number < size]
    vocabulary.special = {role: number for role, number in _special(tokenizer, ends).items() if number < size}
    _add_ends(vocabulary, ends)
    template = tokenizer.chat_template
    vocabulary.chat_template = template if isinstance(template, str) else (template or {}).get("default", "")
    return vocabulary


def _refused(reason: str) -> UserError:
    return UserError(
        f"The tokenizer cannot be exported as GGUF: {reason}, so llama.cpp would tokenize otherwise.",
        "Use the packed model, or an export of another format.",
    )


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return [step for child in part[inner] for step in _steps(child, inner)] if part["type"] == "Sequence" else [part]


def _normalizers(tokenizer_json: dict[str, Any]) -> list[dict[str, Any]]:
    return _steps(tokenizer_json["normalizer"], "normalizers")


def _pre_tokenizers(tokenizer_json: dict[str, Any]) -> list[dict[str, Any]]:
    return _steps(tokenizer_json["pre_tokenizer"], "pretokenizers")


def _fill(vocabulary: Vocabulary, pieces: dict[str, int], added: dict[int, Any], size: int) -> None:
    """Tokens and types of all rows of the embedding; rows without a token get a name of their own."""
    by_id = {number: piece for piece, number in pieces.items()}
    taken = {*pieces, *(token["content"] for token in added.values())}
    for number in range(size):
        if number in added:
            vocabulary.tokens.append(added[number]["content"])
            vocabulary.types.append(Type.CONTROL if added[number]["special"] else Type.USER_DEFINED)
        elif number in by_id:
            is_byte = vocabulary.model == "llama" and by_id[number] in BYTES
            vocabulary.tokens.append(by_id[number])
            vocabulary.types.append(Type.BYTE if is_byte else Type.NORMAL)
        else:
            name = f"[PAD{number}]"
            vocabulary.tokens.append(name if name not in taken else f"[UNUSED PAD{number}]")
            vocabulary.types.append(Type.UNUSED)
    if vocabulary.scores:
        scores = dict(zip(pieces.values(), vocabulary.scores, strict=True))
        vocabulary.scores = [scores.get(number, UNREACHED) for number in range(size)]


def _ends(tokenizer_json: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether one text gets a first and a last special token."""
    before, after = around_text(tokenizer)
    if before not in ((), (tokenizer.bos_token_id,)) or after not in ((), (tokenizer.eos_token_id,)):
        raise _refused("it puts other tokens than the first and the last one around a text")
    return bool(before), bool(after)


def _special(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> dict[str, int]:
    """Ids of the special tokens by role."""
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    if roles["eos"] is None and ends:
        roles["eos"] = ends[0]
    return {role: number for role, number in roles.items() if number is not None}


#: Tokens that llama.cpp takes for the end of a turn by their text.
KNOWN_ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"}


def _add_ends(vocabulary: Vocabulary, ends: list[int]) -> None:
    """The end of a turn, where it is another token than the end of the text and llama.cpp does not find it itself."""
    others = [end for end in ends if end != vocabulary.special.get("eos") and vocabulary.tokens[end] not in KNOWN_ENDS]
    if others:
        vocabulary.special["eot"] = others[0]
    if len(others) > 1:
        left = ", ".join(vocabulary.tokens[end] for end in others[1:])
        vocabulary.notes.append(f"llama.cpp does not stop at {left}, as the generation settings ask.")


# Byte-level BPE ---------------------------------------------------------------------------------------------------


def _byte_level(tokenizer_json: dict[str, Any], pieces: dict[str, int]) -> Vocabulary:
    notes = []
    for step in _normalizers(tokenizer_json):
        if step["type"] != "NFC":
            raise _refused(f"it normalizes text by {step['type']}")
        notes.append("llama.cpp does not normalize text to NFC, as the tokenizer does: give it text in that form.")
    steps = []
    for step in _pre_tokenizers(tokenizer_json):
        steps += _words(step)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer_json["model"]["merges"]]
    wins = bool(tokenizer_json["model"].get("ignore_merges"))
    pre = PATTERNS.get((tuple(steps), wins))
    if pre is None:
        shown = ", then ".join(steps) or "nothing"
        raise _refused(f"it cuts text into words by a pattern that llama.cpp is not known to have ({shown})")
    return Vocabulary("gpt2", pre, [], [], False, False, merges=merges, notes=notes)


def _words(step: dict[str, Any]) -> list[str]:
    """A pre-tokenizer as steps of `PATTERNS`."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step["individual_digits"]:
        return [DIGITS]
    pattern = step.get("pattern", {}).get("Regex")
    if kind == "Split" and pattern and step["behavior"] == "Isolated" and not step["invert"]:
        return [pattern]
    if kind == "Split" and pattern and step["behavior"] == "Removed" and step["invert"]:
        return [pattern]
    raise _refused(f"it cuts text into words by {kind} in a way that llama.cpp is not known to have")


# SentencePiece ----------------------------------------------------------------------------------------------------

SPACE = "\u2581"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def _is_sentencepiece(tokenizer_json: dict[str, Any]) -> bool:
    kinds = {step["type"] for step in (*_normalizers(tokenizer_json), *_pre_tokenizers(tokenizer_json))}
    return bool(tokenizer_json["model"].get("byte_fallback")) or bool(kinds & {"Prepend", "Metaspace"})


def _sentencepiece(tokenizer_json: dict[str, Any], pieces: dict[str, int]) -> Vocabulary:
    if not tokenizer_json["model"].get("byte_fallback") or not pieces.keys() >= BYTES:
        raise _refused("its vocabulary has no pieces for the 256 bytes")
    prefix, notes = _space_prefix(tokenizer_json)
    special = {token["content"] for token in tokenizer_json["added_tokens"]}
    merges = [
        tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in tokenizer_json["model"]["merges"]
    ]
    scores = _scores({piece for piece in pieces if piece not in special | BYTES}, merges)
    vocabulary = Vocabulary("llama", "default", [], [], False, False, space_prefix=prefix, notes=notes)
    vocabulary.scores = [scores.get(piece, UNREACHED) for piece in pieces]
    return vocabulary


def _space_prefix(tokenizer_json: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a text gets a space before it; the steps must do that and write spaces as `SPACE`, nothing else."""
    prefix, marked, notes = False, False, []
    for step in (*_normalizers(tokenizer_json), *_pre_tokenizers(tokenizer_json)):
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            marked = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            marked, prefix = True, step["prepend_scheme"] != "never"
            if step["prepend_scheme"] == "first":
                notes.append("llama.cpp puts a space before the text behind every special token, not only the first.")
        elif kind == "Split" and step["pattern"] == {"String": " "} and marked:
            pass  # Gemma's: no space is left to cut at
        else:
            raise _refused(f"it changes text by {kind} before it looks for pieces")
    if not marked:
        raise _refused(f"it does not write spaces as {SPACE}")
    return prefix, notes


def _scores(pieces: set[str], merges: list[tuple[str, ...]]) -> dict[str, float]:
    """A score for each piece that merges give: earlier merges score higher.

    Raises:
        UserError: joining by score is not the same as these merges.
    """
    order: dict[str, int] = {}
    latest = ""
    for first, second in merges:
        merged = first + second
        if merged in order and merged != latest:
            raise _refused(f"its merges into {merged!r} do not follow each other")
        order.setdefault(merged, len(order))
        latest = merged
    known = set(merges)
    for piece in pieces:
        for at in range(1, len(piece)):
            parts = (piece[:at], piece[at:])
            if parts not in known and all(len(part) == 1 or part in order for part in parts):
                raise _refused(f"{parts[0]!r} and {parts[1]!r} are no merge of it, but make the piece {piece!r}")
    return {piece: -float(place + 1) for piece, place in order.items()}
