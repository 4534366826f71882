"""The tokenizer of a GGUF file as the files of a model folder: tokenizer.json, its configuration, the chat template.

tokenizer.json is written from the metadata, entry by entry: no library has to build the tokenizer first, which for
vocabularies of 262,144 pieces takes seconds instead of minutes. Two kinds of vocabularies are read. `gpt2` is
byte-level BPE: merges as they are, and a pattern that is only named. `llama` is SentencePiece's BPE, which llama.cpp
computes from scores: it joins the neighbours whose union is the piece of the highest score. As merges these are all
pairs of pieces whose union is a piece, in the order of that one's score.

Whatever llama.cpp does to a text, this tokenizer does, too: it does not normalize, user-defined tokens are found before
anything else, and a text (or what follows a special token) gets a space before it where the file says so.

Source: `llama-vocab.cpp` of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgerazor import workdir
from edgerazor.errors import UserError, plain
from edgerazor.models.gguf_patterns import DIGITS, ENDS, PreTokenizer, find_pre_tokenizer
from edgerazor.untrusted.gguf_file import GgufFile

PREFIX = "tokenizer.ggml."
#: Types of tokens: `gguf.TokenType`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: Those that are found in a text before it is cut into words.
ADDED = (UNKNOWN, CONTROL, USER_DEFINED)
SPACE = "\u2581"
#: Special tokens: as transformers calls them -> as GGUF's keys do.
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
#: llama.cpp's special tokens of SentencePiece vocabularies that name none.
USUAL = {"bos": 1, "eos": 2, "unk": 0}
#: Roles of further tokens that end a text.
ENDING = ("eot", "eom")
#: Keys of recommended sampling -> fields of generation_config.json.
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json of a file into a folder.

    Raises:
        UserError: its tokenizer is of a kind or pattern that is not known, or damaged.
    """
    vocabulary = GgufTokenizer(file)
    for name, values in (
        ("tokenizer.json", vocabulary.tokenizer_json()),
        ("tokenizer_config.json", vocabulary.tokenizer_config()),
        ("generation_config.json", vocabulary.generation_config()),
    ):
        workdir.write_text(folder / name, json.dumps(values, ensure_ascii=False, indent=None if len(values) > 8 else 1))


class GgufTokenizer:
    """The tokenizer that a file's metadata describe.

    Attributes:
        tokens: text of each token, by its number.
        types: their types.
        special: role of transformers (`bos`, `eos`, `unk`, `pad`) -> number.
        ends: tokens that end a text, the usual one first.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file, self.metadata = file, file.metadata
        self.kind = self._value("model", str, "nothing")
        if self.kind not in ("gpt2", "llama"):
            raise UserError(
                f"{file.path} has a tokenizer of the kind {plain(self.kind, 40)!r}, and only gpt2 (byte-level BPE) and "
                "llama (SentencePiece) are read.",
                "Give the original model's folder or hub id.",
            )
        self.tokens = self._texts("tokens")
        self.types = self._numbers("token_type", [NORMAL] * len(self.tokens))
        self.pre = self._pre_tokenizer()
        known = {role: self._token(key) for role, key in ROLES.items()}
        if self.kind == "llama":
            known |= {
                role: number for role, number in USUAL.items() if known[role] is None and number < len(self.tokens)
            }
        self.special = {role: number for role, number in known.items() if number is not None}
        self.ends = self._ends()
        self._settle_types()

    # --- what is written ---

    def tokenizer_json(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        vocabulary = {
            text: number
            for number, text in enumerate(self.tokens)
            if self.types[number] != UNUSED or self._named(number)
        }
        build = self._byte_level if self.kind == "gpt2" else self._sentencepiece
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [self._added(number) for number, kind in enumerate(self.types) if kind in ADDED],
            **build(vocabulary),
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json: special tokens, longest text, chat template."""
        named = {f"{role}_token": self.tokens[number] for role, number in self.special.items()}
        values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        values["clean_up_tokenization_spaces"] = False
        length = self.metadata.get(f"{self.metadata.get('general.architecture')}.context_length")
        if isinstance(length, int) and length > 0:
            values["model_max_length"] = length
        if template := self._chat_template():
            values["chat_template"] = template
        return values

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json: what ends a text, and recommended sampling."""
        values: dict[str, Any] = {
            f"{role}_token_id": self.special[role] for role in ("bos", "pad") if role in self.special
        }
        if self.ends:
            values["eos_token_id"] = self.ends[0] if len(self.ends) == 1 else self.ends
        for key, name in SAMPLING.items():
            value = self.metadata.get(f"general.sampling.{key}")
            if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 20:
                values[name] = value if isinstance(value, int) else float(f"{value:.7g}")
        if values.keys() & set(SAMPLING.values()):
            values["do_sample"] = values.get("temperature", 1) != 0
        return values

    # --- metadata ---

    def _value(self, key: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(PREFIX + key, default)
        if not isinstance(value, kind):
            raise self.file.damaged(f"its {PREFIX}{key} is {plain(value, 40)}")
        return value

    def _texts(self, key: str) -> list[str]:
        """The texts of tokens; an empty one gets the name that llama.cpp gives it.

        Raises:
            UserError: there are none, or two alike.
        """
        values = self._value(key, list, None)
        if not values or not all(isinstance(text, str) for text in values):
            raise self.file.damaged(f"its {PREFIX}{key} is no list of texts")
        values = [text or f"[EMPTY_{number}]" for number, text in enumerate(values)]
        if len(set(values)) < len(values):
            seen: set[str] = set()
            twice = next(text for text in values if text in seen or seen.add(text))  # type: ignore[func-returns-value]
            raise self.file.damaged(f"it has the token {plain(twice, 40)!r} twice")
        return values

    def _numbers(self, key: str, default: list[Any]) -> list[Any]:
        """A number for each token."""
        values = self._value(key, list, default)
        if len(values) < len(self.tokens) or not all(isinstance(value, int | float) for value in values):
            raise self.file.damaged(f"its {PREFIX}{key} has no number for each token")
        return values[: len(self.tokens)]

    def _token(self, role: str) -> int | None:
        number = self.metadata.get(f"{PREFIX}{role}_token_id")
        return number if type(number) is int and 0 <= number < len(self.tokens) else None

    def _ends(self) -> list[int]:
        """What ends a text: the last token, the end of a turn, and those that llama.cpp knows by their texts."""
        ends = [self.special.get("eos"), *(self._token(role) for role in ENDING)]
        ends += [number for number, text in enumerate(self.tokens) if text in ENDS and self.types[number] in ADDED]
        return list(dict.fromkeys(number for number in ends if number is not None))

    def _settle_types(self) -> None:
        """Special tokens are found in texts, whatever their type says, as the tokenizers of models have it."""
        for number in (*self.special.values(), *self.ends):
            if self.types[number] not in ADDED:
                self.types[number] = CONTROL

    def _named(self, number: int) -> bool:
        return number in self.special.values()

    def _chat_template(self) -> str | list[dict[str, str]]:
        """The chat template, or several by their names."""
        default = self.metadata.get("tokenizer.chat_template")
        templates = {"default": default} if isinstance(default, str) else {}
        names = self.metadata.get("tokenizer.chat_templates")
        for name in names if isinstance(names, list) else []:
            template = self.metadata.get(f"tokenizer.chat_template.{name}")
            if isinstance(template, str):
                templates[str(name)] = template
        if templates.keys() <= {"default"}:
            return templates.get("default", "")
        return [{"name": name, "template": template} for name, template in templates.items()]

    def _pre_tokenizer(self) -> PreTokenizer | None:
        """How text is cut into words; None where it is not."""
        if self.kind != "gpt2":
            return None
        name = self._value("pre", str, "default")
        found = find_pre_tokenizer(name)
        if found is None:
            raise UserError(
                f"{self.file.path} cuts text into words by the pattern {plain(name, 40)!r}, which is not known here.",
                "Give the original model's folder or hub id.",
            )
        return found

    # --- parts of tokenizer.json ---

    def _added(self, number: int) -> dict[str, Any]:
        """A token that is found before text is cut into words."""
        text = self.tokens[number]
        return {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": self._strips(text),
            "normalized": False,
            "special": self.types[number] != USER_DEFINED,
        }

    def _strips(self, text: str) -> bool:
        """Whether spaces behind a token are dropped: llama.cpp knows Phi 3 by its name."""
        name = str(self.metadata.get("general.name", "")).lower()
        return ("phi-3" in name or "phi3" in name) and text not in ("<unk>", "<s>", "<|endoftext|>")

    def _around(self, others: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The post-processor: it puts the first and last token around a text."""
        first = self._value("add_bos_token", bool, self.kind == "llama" or bool(self.pre and self.pre.add_bos))
        last = self._value("add_eos_token", bool, False)
        around = [("bos", first), ("eos", last)]
        ids = {role: self.special[role] for role, is_put in around if is_put and role in self.special}
        if ids:
            marks = {role: {"SpecialToken": {"id": self.tokens[number], "type_id": 0}} for role, number in ids.items()}
            before, after = ([marks[role]] if role in marks else [] for role in ("bos", "eos"))
            entries = {self.tokens[number]: number for number in ids.values()}
            template = {
                "type": "TemplateProcessing",
                "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after],
                "pair": [
                    *before,
                    {"Sequence": {"id": "A", "type_id": 0}},
                    *after,
                    *_second(before),
                    {"Sequence": {"id": "B", "type_id": 1}},
                    *_second(after),
                ],
                "special_tokens": {
                    text: {"id": text, "ids": [number], "tokens": [text]} for text, number in entries.items()
                },
            }
            others = [*others, template]
        if len(others) < 2:
            return others[0] if others else None
        return {"type": "Sequence", "processors": others}

    def _byte_level(self, vocabulary: dict[str, int]) -> dict[str, Any]:
        assert self.pre is not None
        cuts: list[dict[str, Any]] = [
            {"type": "Digits", "individual_digits": True}
            if step == DIGITS
            else {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
            for step in self.pre.steps
        ]
        octets = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, octets]},
            "post_processor": self._around([{**octets, "trim_offsets": False}]),
            "decoder": {**octets, "add_prefix_space": True, "use_regex": True},
            "model": _bpe(vocabulary, self._merges(vocabulary), ignore_merges=self.pre.whole_words),
        }

    def _merges(self, vocabulary: Mapping[str, int]) -> list[list[str]]:
        """The merges of byte-level BPE.

        Raises:
            UserError: there are none, or one is of pieces that are no tokens.
        """
        merges = []
        for entry in self._value("merges", list, None) or []:
            first, mark, second = str(entry)[1:].partition(" ")  # a piece may begin with a space, as llama.cpp has it
            first = str(entry)[:1] + first
            if not mark or not {first, second, first + second} <= vocabulary.keys():
                raise self.file.damaged(f"its merge {plain(entry, 40)!r} is not one of two tokens into a third")
            merges.append([first, second])
        if not merges:
            raise self.file.damaged(f"it has no {PREFIX}merges")
        return merges

    def _sentencepiece(self, vocabulary: dict[str, int]) -> dict[str, Any]:
        prefix = self._value("add_space_prefix", bool, True)
        marked = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        steps = [{"type": "Prepend", "prepend": SPACE}, marked] if prefix else [marked]
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        scores = self._numbers("scores", [0.0] * len(self.tokens))
        merges = [list(pair) for pair in merges_by_score(vocabulary, scores)]
        unknown = self.tokens[self.special["unk"]] if "unk" in self.special else None
        return {
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "post_processor": self._around([]),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
        }


def merges_by_score(vocabulary: Mapping[str, int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """All pairs of pieces whose union is a piece, the one of the highest score first.

    Args:
        vocabulary: piece -> number.
        scores: of each number.
    """
    order = sorted((piece for piece in vocabulary if len(piece) > 1), key=lambda piece: -scores[vocabulary[piece]])
    for piece in order:
        for at in range(1, len(piece)):
            if piece[:at] in vocabulary and piece[at:] in vocabulary:
                yield piece[:at], piece[at:]


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    usual = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    usual |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **usual, **settings, "vocab": vocabulary, "merges": merges}


def _second(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens around the second of two texts."""
    return [{"SpecialToken": {**token["SpecialToken"], "type_id": 1}} for token in tokens]
