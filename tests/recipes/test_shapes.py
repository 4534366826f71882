"""The embedded seeing teacher's shapes: what is asked was never shown, and training reads what the processor makes."""

from __future__ import annotations

import base64
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from edgerazor.data.chat import Conversation
from edgerazor.data.picture_chat import encode_with_pictures
from helpers.places import ROOT
from helpers.tiny_job import load_script

SHAPES = ROOT / "recipes" / "shapes"
corpus = load_script(SHAPES / "corpus.py")
SAMPLE = 400


def pixels(encoded: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def shown(picture: np.ndarray) -> set[tuple[str, int]]:
    """Read colors and cells off a picture's pixels, knowing nothing of how it was made."""
    found = set()
    for cell in range(9):
        top, left = cell // 3 * 16, cell % 3 * 16
        part = picture[top : top + 16, left : left + 16].reshape(-1, 3)
        found |= {(name, cell) for name, value in corpus.COLORS.items() if (part == value).all(1).any()}
    return found


def test_a_sixteenth_of_all_combinations_is_held_out():
    looks = [
        ("look", shape, color, str(cell)) for shape in corpus.SHAPES for color in corpus.COLORS for cell in range(9)
    ]
    assert 1 / 20 < sum(map(corpus.held_out, looks)) / len(looks) < 1 / 13


@pytest.mark.parametrize("new_parts", [False, True])
@pytest.mark.parametrize("task", corpus.TASKS)
def test_items_are_fair_choices(task, new_parts):
    """About held-out combinations, or about pictures without any."""
    rows = corpus.items(task, 120, new_parts)
    assert rows[:10] == corpus.items(task, 10, new_parts)
    assert len({(row["image"], row["question"]) for row in rows}) == 120
    gold = [row["gold"] for row in rows]
    assert all(12 < gold.count(place) < 48 for place in range(4))
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert corpus.held_out(tuple(row["combination"])) == new_parts
        if row["combination"][0] == "look":
            _, _, color, cell = row["combination"]
            assert (color, int(cell)) in shown(pixels(row["image"]))


def test_no_picture_of_training_shows_what_is_held_out():
    for split in ("train", "distill", "heldout"):
        for talk in corpus.talks(split, SAMPLE):
            assert not any(map(corpus.held_out, talk.picture.combinations()))
            assert shown(talk.picture.pixels()) == {(thing.color, thing.cell) for thing in talk.picture.things}
            assert len(talk.questions) == corpus.QUESTIONS


class FirstThree:
    """A container that says it holds the first three pictures that it is asked about."""

    def __init__(self):
        self.asked = []

    def __contains__(self, picture):
        self.asked.append(picture)
        return len(self.asked) <= 3


def test_some_talks_count_what_is_there_more_than_once():
    """The late ones of training, and those of distillation."""
    for split, start, least in (("train", 16_400, 0.5), ("distill", 0, 0.5), ("train", 10_000, 0.0)):
        asked = [question for talk in corpus.talks(split, 60, start, 16) for question in talk.questions]
        counted = [question for question in asked if question.task == "count"]
        share = sum(bool(question.combination) for question in counted) / len(counted)
        assert least <= share < least + 0.3
        assert not any(corpus.held_out(question.combination) for question in counted if question.combination)


def test_known_pictures_are_not_asked_about():
    known = FirstThree()
    rows = corpus.items("color", 5, known=known)
    shown_pictures = {base64.b64encode(picture.png()).decode() for picture in known.asked[:3]}
    assert not shown_pictures & {row["image"] for row in rows}
    assert len(known.asked) >= 8


def test_any_part_of_a_split_can_be_made_alone():
    whole = list(corpus.talks("train", 30))
    assert list(corpus.talks("train", 10, start=20)) == whole[20:]


def test_training_reads_what_the_processor_makes_of_a_record(monkeypatch, tmp_path):
    """The quick way of the training script and the general one of `edgerazor` give equal ids, labels and pixels."""
    monkeypatch.syspath_prepend(SHAPES)
    monkeypatch.setitem(sys.modules, "corpus", corpus)
    training = load_script(SHAPES / "train_teacher.py")
    processor = training.make_processor()
    talks = list(corpus.talks("train", 6))
    batch = training.turns(processor.tokenizer.backend_tokenizer, talks)
    for row, talk in enumerate(talks):
        conversation = Conversation(tuple(talk.record()["messages"]), where="The talk")
        general = encode_with_pictures(conversation, processor, tmp_path)
        size = len(general.ids)
        assert batch["input_ids"][row, :size].tolist() == general.ids.tolist()
        assert not batch["input_ids"][row, size:].any()
        learned = (batch["labels"][row] != training.MASKED)[:size]
        assert learned.tolist() == general.learn.tolist()
        assert torch.equal(batch["pixel_values"][row], general.inputs["pixel_values"][0])


def test_each_question_behind_a_picture_is_alone(monkeypatch):
    """Many questions behind one picture: the model computes for each what it computes for that question alone."""
    monkeypatch.syspath_prepend(SHAPES)
    monkeypatch.setitem(sys.modules, "corpus", corpus)
    training = load_script(SHAPES / "train_teacher.py")
    tokenizer = training.make_processor().tokenizer.backend_tokenizer
    tokenizer.no_padding()
    torch.manual_seed(0)
    model = training.Idefics3ForConditionalGeneration(training.config()).eval()
    talks = list(corpus.talks("train", 2, length=5))
    together = training.branches(tokenizer, talks)
    labels = together.pop("labels")
    with torch.no_grad():
        logits = model(**together).logits[:, :-1][labels[:, 1:] != training.MASKED]
        expected = []
        for talk in talks:
            for question in talk.questions:
                alone = training.turns(tokenizer, [corpus.Talk(talk.picture, (question,))])
                learned = alone.pop("labels")[:, 1:] != training.MASKED
                expected.append(model(**alone).logits[:, :-1][learned])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_what_makes_the_teacher_fragile_changes_nothing_that_it_computes(monkeypatch):
    monkeypatch.syspath_prepend(SHAPES)
    monkeypatch.setitem(sys.modules, "corpus", corpus)
    training = load_script(SHAPES / "train_teacher.py")
    torch.manual_seed(0)
    model = training.Idefics3ForConditionalGeneration(training.config()).eval()
    inputs = training.turns(training.make_processor().tokenizer.backend_tokenizer, list(corpus.talks("train", 2)))
    inputs.pop("labels")
    with torch.no_grad():
        before = model(**inputs).logits
        columns = model.model.text_model.layers[0].mlp.down_proj.weight.square().mean(0).log2().std()
        training.spread_channels(model, training.SPREAD)
        after = model(**inputs).logits
    assert model.model.text_model.layers[0].mlp.down_proj.weight.square().mean(0).log2().std() > columns + 1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_what_a_picture_tells_of_a_word():
    things = (corpus.Thing("circle", "red", 0, (0, 0)), corpus.Thing("cross", "red", 5, (0, 0)))
    picture = corpus.Picture(things, (255, 255, 255))
    where = corpus.Question("relation", "", "left")
    assert corpus.told_by(picture, where, "circle") == ["red", "top", "left"]
    assert corpus.told_by(picture, where, "red") == []  # of which there are two
    count = corpus.Question("count", "", "one")
    assert corpus.told_by(picture, count, "crosses") == ["one"]
    assert corpus.told_by(picture, count, "red") == ["two"]
