"""Conversations with pictures: what is learned of them, with three processors, and pictures that nobody should see."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from edgerazor.data.chat import Conversation
from edgerazor.data.picture_chat import encode_with_pictures
from edgerazor.errors import UserError
from helpers.seeing_processors import gemma3, idefics3, qwen

#: Processor, and what it makes of the first and of the second picture (16 x 16 and 16 x 8 pixels).
PROCESSORS = {
    "idefics3": (
        idefics3,
        "<fake_token_around_image> <global-img> <image> <image> <image> <fake_token_around_image>".split(),
        "<fake_token_around_image> <global-img> <image> <image> <image> <fake_token_around_image>".split(),
    ),
    "qwen": (qwen, "<vs> <image> <image> <image> <image> <ve>".split(), "<vs> <image> <image> <ve>".split()),
    "gemma3": (gemma3, "<boi> <image> <image> <eoi>".split(), "<boi> <image> <image> <eoi>".split()),
}


def png(picture: Image.Image, kind: str = "PNG", **options) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def shown(picture: Image.Image | str) -> dict:
    return {"type": "image", "base64": picture if isinstance(picture, str) else png(picture)}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def talk(*pictures: dict) -> Conversation:
    """Two pictures in the first turn, and a second turn without."""
    return Conversation(
        (
            {"role": "user", "content": [pictures[0], said("this and"), *pictures[1:], said("what is that ?")]},
            {"role": "assistant", "content": [said("a red circle")]},
            {"role": "user", "content": [said("is this blue ?")]},
            {"role": "assistant", "content": [said("no")]},
        ),
        where="The talk",
    )


PAIR = (shown(Image.new("RGB", (16, 16), "red")), shown(Image.new("RGB", (16, 8), "blue")))


@pytest.mark.parametrize("name", PROCESSORS)
def test_masks_are_those_made_by_hand(name, tmp_path):
    make, first, second = PROCESSORS[name]
    processor = make()
    got = encode_with_pictures(talk(*PAIR), processor, tmp_path)
    asked = "this and".split(), "what is that ? <end>".split()
    expected = [("<bos> User :".split(), 0), (first, 0), (asked[0], 0), (second, 0), (asked[1], 0)]
    expected += [("Assistant :".split(), 0), ("a red circle <end>".split(), 1)]
    expected += [("User : is this blue ? <end> Assistant :".split(), 0), ("no <end>".split(), 1)]
    assert processor.tokenizer.convert_ids_to_tokens(got.ids.tolist()) == [
        word for words, _ in expected for word in words
    ]
    assert got.learn.tolist() == [bool(learn) for words, learn in expected for _ in words]
    assert len(got.expansions) == 2
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    inside = np.zeros(len(got.ids), dtype=bool)
    for begin, end in got.expansions:
        inside[begin:end] = True
    assert inside[got.ids == image].all()
    assert not got.learn[inside].any()
    assert "pixel_values" in got.inputs


@pytest.mark.parametrize("name", PROCESSORS)
def test_truncation_never_cuts_a_picture_apart(name, tmp_path):
    """A picture in the second user turn is whole or gone, its pixels with it, at any length."""
    processor = PROCESSORS[name][0]()
    conversation = Conversation(
        (
            {"role": "user", "content": [PAIR[0], said("what is this ?")]},
            {"role": "assistant", "content": [said("a red circle")]},
            {"role": "user", "content": [PAIR[1], said("what is this ?")]},
            {"role": "assistant", "content": [said("a blue square")]},
        ),
        where="The talk",
    )
    whole = encode_with_pictures(conversation, processor, tmp_path)
    first_answer = int(np.flatnonzero(whole.learn)[0])
    begin, end = whole.expansions[1]
    for length in range(first_answer + 1, len(whole.ids)):
        cut = encode_with_pictures(conversation, processor, tmp_path, length)
        assert len(cut.ids) == (begin if begin < length < end else length)
        assert np.array_equal(cut.ids, whole.ids[: len(cut.ids)])
        assert np.array_equal(cut.learn, whole.learn[: len(cut.ids)])
        pictures = 2 if length >= end else 1
        assert len(cut.expansions) == pictures
    with pytest.raises(UserError, match="nothing to learn"):
        encode_with_pictures(conversation, processor, tmp_path, first_answer)


def test_a_path_is_relative_to_the_file(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    got = encode_with_pictures(talk({"type": "image", "path": "red.png"}, PAIR[1]), qwen(), tmp_path)
    assert np.array_equal(got.ids, encode_with_pictures(talk(*PAIR), qwen(), tmp_path).ids)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_becomes_what_the_processor_wants(name, mode, tmp_path):
    picture = Image.new("RGB", (16, 16), "red").convert(mode)
    stored = png(picture, "JPEG") if mode == "CMYK" else png(picture)
    made = encode_with_pictures(talk(shown(stored), PAIR[1]), PROCESSORS[name][0](), tmp_path)
    assert len(made.expansions) == 2


def huge() -> str:
    """A picture of a few kilobytes that says it has 100 million pixels."""
    return png(Image.new("1", (10_000, 10_000)))


BAD = {
    "no base64": ("?", "base64"),
    "no picture": (base64.b64encode(b"hello").decode(), "no picture"),
    "huge": (huge(), "pixels"),
    "animated": (
        png(
            Image.new("RGB", (8, 8), "red"),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (8, 8), "blue")],
            duration=9,
        ),
        "animated",
    ),
    "torn": (png(Image.effect_noise((64, 64), 9))[:2000], "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_get_one_sentence(name, tmp_path):
    data, reason = BAD[name]
    with pytest.raises(UserError, match=reason):
        encode_with_pictures(talk(shown(data), PAIR[1]), idefics3(), tmp_path)


@pytest.mark.parametrize("name", ["idefics3", "gemma3"])
def test_one_pixel_is_read(name, tmp_path):
    made = encode_with_pictures(talk(shown(Image.new("RGB", (1, 1))), PAIR[1]), PROCESSORS[name][0](), tmp_path)
    assert len(made.expansions) == 2


def test_nothing_is_fetched(tmp_path):
    for part in ({"type": "image", "path": "https://a.b/c.png"}, {"type": "image", "url": "https://a.b/c.png"}):
        with pytest.raises(UserError, match="nothing is fetched"):
            encode_with_pictures(talk(part, PAIR[1]), idefics3(), tmp_path)
    with pytest.raises(UserError, match="there is no file"):
        encode_with_pictures(talk({"type": "image", "path": "none.png"}, PAIR[1]), idefics3(), tmp_path)


def test_a_placeholder_in_the_text_is_refused(tmp_path):
    conversation = talk(*PAIR)
    conversation.messages[2]["content"][0]["text"] = "is <image> blue ?"
    with pytest.raises(UserError, match="placeholder"):
        encode_with_pictures(conversation, idefics3(), tmp_path)
