"""Vocabularies for llama.cpp: its patterns and algorithms against those of the tokenizers."""

from __future__ import annotations

import heapq
import json
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from edgerazor import models
from edgerazor.errors import UserError
from edgerazor.exporters.core import gguf_vocabulary
from helpers.places import ROOT, SHARED

TEACHER = ROOT / "recipes" / "world" / "teacher"
TEXT = "The lamp, don't: 1234 we'LL\n\n  see\tit  there. Ünï \U0001f680 a  b\n x"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*steps: Any, ignore_merges: bool = False, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose words are cut by these steps."""
    raw = Tokenizer(BPE(ignore_merges=ignore_merges))
    raw.pre_tokenizer = pre_tokenizers.Sequence([*steps]) if len(steps) > 1 else steps[0]
    if normalizer:
        raw.normalizer = normalizer
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<s>")


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def test_patterns_have_the_names_that_llama_cpp_gives_them() -> None:
    for steps, wins, name in (
        ((WORDS,), False, "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), WORDS), False, "smollm"),
        ((split(QWEN2), BYTES), False, "qwen2"),
        ((split(QWEN35), BYTES), False, "qwen35"),
        ((split(LLAMA3), BYTES), True, "llama-bpe"),
        ((split(LLAMA3), BYTES), False, "smaug-bpe"),
        ((split(TEKKEN), BYTES), True, "tekken"),
    ):
        tokenizer = byte_level(*steps, ignore_merges=wins)
        found = gguf_vocabulary.build_vocabulary(tokenizer, 300, [])
        assert (found.model, found.pre) == ("gpt2", name)
        assert all(found.tokens[number] == piece for piece, number in tokenizer.vocab.items())
        assert found.types[0] == TokenType.CONTROL
        assert found.types[-1] == TokenType.UNUSED
        assert len(set(found.tokens)) == 300
        first = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"][0]
        assert found.merges[0] == " ".join(first)


def refusal(tokenizer: Any, size: int = 300) -> str:
    with pytest.raises(UserError) as refused:
        gguf_vocabulary.build_vocabulary(tokenizer, size, [])
    return refused.value.message


def test_other_tokenizers_are_refused() -> None:
    assert "pattern that llama.cpp is not known to have ([a-z]+)" in refusal(byte_level(split("[a-z]+"), BYTES))
    assert "by Whitespace" in refusal(byte_level(pre_tokenizers.Whitespace(), BYTES))
    assert "not known to have" in refusal(byte_level(split(QWEN2), BYTES, ignore_merges=True))
    assert "normalizes text by Lowercase" in refusal(byte_level(WORDS, normalizer=normalizers.Lowercase()))
    assert "by ByteLevel" in refusal(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    unigram = Tokenizer(Unigram([("a", -1.0), ("b", -2.0)], unk_id=0))
    assert "Unigram model" in refusal(PreTrainedTokenizerFast(tokenizer_object=unigram))
    assert "beyond the 100 rows" in refusal(byte_level(WORDS), 100)


def test_text_that_is_normalized_is_said() -> None:
    (note,) = gguf_vocabulary.build_vocabulary(byte_level(WORDS, normalizer=normalizers.NFC()), 300, []).notes
    assert "NFC" in note


def test_ordinary_tokens_that_llama_cpp_takes_for_an_end_are_said() -> None:
    about = json.loads(byte_level(WORDS).backend_tokenizer.to_str())
    about["model"]["vocab"]["</s>"] = len(about["model"]["vocab"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(about)), eos_token="<s>")
    (note,) = gguf_vocabulary.build_vocabulary(tokenizer, 300, []).notes
    assert note == "llama.cpp takes the ordinary token </s> for the end of a text."


def test_first_and_last_token() -> None:
    for template, ends in (("$A", (False, False)), ("<s> $A", (True, False)), ("<s> $A </s>", (True, True))):
        tokenizer = byte_level(WORDS)
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        special = [("<s>", 0), ("</s>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
        found = gguf_vocabulary.build_vocabulary(tokenizer, 300, [0, tokenizer.eos_token_id])
        assert (found.add_bos, found.add_eos) == ends
        assert found.special["bos"] == found.special["eot"] == 0
        assert found.tokens[tokenizer.eos_token_id] == "</s>"


def test_added_words_and_tokens_beyond_the_embedding() -> None:
    tokenizer = byte_level(WORDS)
    tokenizer.add_tokens([AddedToken("hello", special=False), AddedToken("<far>", special=True)])
    size = tokenizer.convert_tokens_to_ids("<far>")
    found = gguf_vocabulary.build_vocabulary(tokenizer, size, [])
    assert found.tokens[-1] == "hello"
    assert found.types[-1] == TokenType.USER_DEFINED
    assert any("beyond" in note for note in found.notes)


# SentencePiece ----------------------------------------------------------------------------------------------------


def sentencepiece(words: list[str], merges: list[tuple[str, str]], prefix: bool = True) -> PreTrainedTokenizerFast:
    """BPE with byte fallback, as tokenizers made of SentencePiece have it."""
    pieces = ["<unk>", "<s>", "</s>", *sorted(gguf_vocabulary.BYTES), *words]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    raw = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend(gguf_vocabulary.SPACE)] if prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", gguf_vocabulary.SPACE)])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def joined_by_score(found: gguf_vocabulary.Vocabulary, text: str) -> list[int]:
    """llama.cpp's algorithm: of all neighbours whose union is a piece, the best score first, then the leftmost."""
    known = {piece: number for number, piece in enumerate(found.tokens)}
    symbols: list[str | None] = list((" " * found.space_prefix + text).replace(" ", gguf_vocabulary.SPACE))
    queue: list[tuple[float, int, int, str]] = []

    def neighbour(at: int, step: int) -> int:
        at += step
        while 0 <= at < len(symbols) and symbols[at] is None:
            at += step
        return at

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(symbols):
            union = f"{symbols[left]}{symbols[right]}"
            if union in known:
                heapq.heappush(queue, (-found.scores[known[union]], left, right, union))

    for at in range(len(symbols) - 1):
        offer(at, at + 1)
    while queue:
        _, left, right, union = heapq.heappop(queue)
        if symbols[left] is None or symbols[right] is None or f"{symbols[left]}{symbols[right]}" != union:
            continue
        symbols[left], symbols[right] = union, None
        offer(neighbour(left, -1), left)
        offer(left, neighbour(left, 1))
    ids = []
    for symbol in symbols:
        if symbol is not None:
            bytes_of = [f"<0x{byte:02X}>" for byte in symbol.encode()]
            ids += [known[symbol]] if symbol in known else [known[each] for each in bytes_of]
    return ids


def learned_sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """Merges learned from a text, and whatever they leave out added, as conversions from SentencePiece do."""
    raw = Tokenizer(BPE())
    trainer = trainers.BpeTrainer(vocab_size=120)
    raw.train_from_iterator([TEXT.replace(" ", gguf_vocabulary.SPACE), "the other lamp there, then others"], trainer)
    learned = json.loads(raw.to_str())["model"]
    order = [first + second for first, second in learned["merges"]]
    known = set(learned["vocab"])
    merges = [
        (made[:at], made[at:])
        for made in order
        for at in range(1, len(made))
        if (made[:at] in known or at == 1) and (made[at:] in known or at == len(made) - 1)
    ]
    return sentencepiece(list(learned["vocab"]), merges, prefix)


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_join_as_merges_do(prefix: bool) -> None:
    tokenizer = learned_sentencepiece(prefix)
    found = gguf_vocabulary.build_vocabulary(tokenizer, len(tokenizer) + 3, [])
    assert (found.model, found.space_prefix, found.merges) == ("llama", prefix, [])
    assert found.types[3] == TokenType.BYTE
    assert found.types[1] == TokenType.CONTROL
    for text in (TEXT, "the lamp then", "  others  there ", "Q\u00e9"):
        assert joined_by_score(found, text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_a_step_that_finds_nothing_to_cut_changes_nothing() -> None:
    """Gemma's tokenizers cut at spaces when all of them are written as another character."""
    tokenizer = learned_sentencepiece(prefix=False)
    expected = gguf_vocabulary.build_vocabulary(tokenizer, 500, [])
    backend: Any = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    assert gguf_vocabulary.build_vocabulary(tokenizer, 500, []) == expected
    backend.normalizer = normalizers.NFC()
    with pytest.raises(UserError, match="changes text by"):
        gguf_vocabulary.build_vocabulary(tokenizer, 500, [])


def test_merges_that_scores_cannot_express_are_refused() -> None:
    letters = ["a", "b", "c", gguf_vocabulary.SPACE]
    missing = sentencepiece([*letters, "ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("ab", "c")])
    assert "'a' and 'bc' are no merge of it, but make the piece 'abc'" in refusal(missing)
    between = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "c"), ("a", "bc")]
    assert "merges into 'abc' do not follow" in refusal(sentencepiece([*letters, "ab", "bc", "abc", "cc"], between))


def test_sentencepiece_needs_bytes_and_spaces() -> None:
    raw = sentencepiece([gguf_vocabulary.SPACE, "a"], [])
    about = json.loads(raw.backend_tokenizer.to_str())

    def changed(**parts: Any) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps({**about, **parts})))

    model = {**about["model"], "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}}
    assert "no pieces for the 256 bytes" in refusal(changed(model=model))
    assert "does not write spaces" in refusal(changed(normalizer=None))
    assert "changes text by NFKC" in refusal(changed(normalizer={"type": "NFKC"}))
    meta = {"type": "Metaspace", "replacement": gguf_vocabulary.SPACE, "prepend_scheme": "first", "split": False}
    found = gguf_vocabulary.build_vocabulary(changed(normalizer=None, pre_tokenizer=meta), 300, [])
    assert found.space_prefix
    assert "every special token" in found.notes[0]


# Tokenizers at hand -----------------------------------------------------------------------------------------------


def test_the_tokenizer_of_the_embedded_teacher() -> None:
    found = gguf_vocabulary.build_vocabulary(models.load_tokenizer(TEACHER), 2048, [1])
    assert (found.model, found.pre, found.add_bos, found.add_eos) == ("gpt2", "gpt-2", True, False)
    assert (found.special["bos"], found.special["eos"]) == (0, 1)
    assert len(found.tokens) == len(set(found.tokens)) == 2048


@pytest.mark.parametrize(
    ("folder", "model", "pre", "size"),
    [
        ("models/realtext-4m", "gpt2", "gpt-2", 4096),
        ("models/stories260K", "llama", "default", 512),
        ("tokenizers/qwen", "gpt2", "qwen2", 151936),
    ],
)
def test_tokenizers_of_real_models(folder: str, model: str, pre: str, size: int) -> None:
    if not (SHARED / folder).exists():
        pytest.skip("real models are not here")
    tokenizer = models.load_tokenizer(SHARED / folder)
    found = gguf_vocabulary.build_vocabulary(tokenizer, size, [])
    assert (found.model, found.pre, len(found.tokens)) == (model, pre, size)
    if model == "llama":
        text = "Once upon a time, there was a little girl named Lily. <3 \u00e9\n\nShe  said:"
        assert joined_by_score(found, text) == tokenizer(text, add_special_tokens=False)["input_ids"]
