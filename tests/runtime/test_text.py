"""Text as it comes: the pieces are the text, whole characters only, up to the first stop string."""

from __future__ import annotations

import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from edgerazor.runtime.detokenizer import PATIENCE, REPLACEMENT, Detokenizer, StopStrings, TextAssembler
from helpers.tiny_models import sentences

TEXTS = [
    sentences(5, seed=4),
    "Grüße, naïve façade: 日本語のテキスト, 👩‍👩‍👧‍👦 and 🇩🇪; \u0301 alone.\n\n  two  blanks \t.",
    " begins with a blank , and ends with one ",
    "don 't stop !",
]


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 2's: words begin with a blank that the first one loses, unknown characters are bytes."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁Nora", "▁took", "▁the", "b", "all", "a", ".", "▁to"]
    vocabulary = {word: place for place, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(params=["byte level", "metaspace"])
def any_tokenizer(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, metaspace: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    return tokenizer if request.param == "byte level" else metaspace


def pieces(ids: list[int], draw: random.Random) -> list[list[int]]:
    """The same tokens, one to four at a time."""
    parts = []
    while ids:
        count = draw.randint(1, 4)
        parts.append(ids[:count])
        ids = ids[count:]
    return parts


def test_all_pieces_are_the_text_and_each_has_whole_characters(any_tokenizer: PreTrainedTokenizerFast) -> None:
    for text, seed in itertools.product(TEXTS, range(3)):
        ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
        stream = Detokenizer(any_tokenizer)
        found = [stream.push(part) for part in pieces(ids, random.Random(seed))]
        assert REPLACEMENT not in "".join(found)
        assert stream.finish() == ""
        assert "".join(found) == any_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_what_goes_on_from_a_prompt_keeps_its_blank(metaspace: PreTrainedTokenizerFast) -> None:
    before = [4, 5]  # Nora took
    for prompt, expected in (([], "the ball."), (before, " the ball.")):
        stream = Detokenizer(metaspace, prompt)
        assert stream.push([6, 3, 7, 8, 10]) == expected
    assert Detokenizer(metaspace, before).push([6]) == " the"


def test_half_a_character_waits_for_the_rest(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("é日👍", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2 + 3 + 4  # bytes
    stream = Detokenizer(tokenizer)
    assert [stream.push([each]) for each in ids] == ["", "é", "", "", "日", "", "", "", "👍"]
    stream = Detokenizer(tokenizer)
    assert stream.push(ids[:4]) == "é"
    assert stream.finish() == REPLACEMENT
    assert stream.finish() == ""


def test_bytes_that_are_no_text_do_not_wait_forever(any_tokenizer: PreTrainedTokenizerFast) -> None:
    known = any_tokenizer.get_vocab()
    byte = known.get("<0xFF>", known.get("ÿ"))
    stream = Detokenizer(any_tokenizer)
    said = [stream.push([byte]) for _ in range(3 * PATIENCE)]
    assert len("".join(said)) >= 2 * PATIENCE
    assert len(stream.ids) <= 2 * PATIENCE + 2


def test_special_tokens_have_no_text(any_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = any_tokenizer("Nora took", add_special_tokens=False)["input_ids"]
    special = any_tokenizer.bos_token_id
    stream = Detokenizer(any_tokenizer, [special])
    said = stream.push([special, *ids[:1], special, *ids[1:]]) + stream.push([special] * 50) + stream.finish()
    assert said.strip() == any_tokenizer.decode(ids)
    assert len(stream.ids) < 50


# --- stop strings ------------------------------------------------------------------------------


def by_hand(text: str, stops: list[str]) -> str:
    """The text up to the stop string that ends first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def test_the_text_ends_before_the_stop_string_however_it_comes() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("abc\n", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("abc\n", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        stream, said, rest = StopStrings(stops), "", text
        while rest and not stream.matched:
            count = draw.randint(1, 5)
            said += stream.push(rest[:count])
            rest = rest[count:]
            assert by_hand(text, stops).startswith(said)  # nothing is taken back
        assert said + stream.finish() == by_hand(text, stops), (text, stops)
        assert stream.matched == (by_hand(text, stops) != text)


def test_only_what_may_be_a_beginning_waits() -> None:
    stream = StopStrings(["\nUser:", "\n\n"])
    assert [stream.push(each) for each in ("Hi\n", "U", "s", "a\n", "\nmore")] == ["Hi", "", "", "\nUsa", ""]
    assert stream.matched
    assert stream.push("more") == stream.finish() == ""
    plain = StopStrings([])
    assert plain.push("abc") == "abc"
    open_end = StopStrings(["abc"])
    assert open_end.push("xab") + open_end.finish() == "xab"
    assert not open_end.matched


def test_an_assembler_gives_the_text_before_a_stop_string_and_shows_what_it_is_told_to(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = list(tokenizer("Nora took the ball to the mill.")["input_ids"])
    assembler = TextAssembler(tokenizer, (), ["the mill"])
    pieces = [assembler.push([token]) for token in ids]
    assert "".join(pieces) + assembler.finish() == "Nora took the ball to "
    assert assembler.matched
    assert assembler.released == len("Nora took the ball to ")
    assert assembler.decoded >= len("Nora took the ball to the mill")
    end = tokenizer.eos_token_id
    hidden, shown = TextAssembler(tokenizer), TextAssembler(tokenizer, shown=frozenset([end]))
    assert hidden.push([ids[0], end, ids[0]]) + hidden.finish() == "NoraNora"
    assert shown.push([ids[0], end, ids[0]]) + shown.finish() == "Nora</s>Nora"
