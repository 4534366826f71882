"""The embedded teacher's world: what is asked was never told, and the stored files are what the code makes."""

from __future__ import annotations

import json
import random
import re
from itertools import product

import pytest

from helpers.places import ROOT
from helpers.tiny_job import load_script

WORLD = ROOT / "recipes" / "world"
TRAINING_SAMPLE = 15_000


corpus = load_script(WORLD / "corpus.py")

FULL_NAME = re.compile(rf"\b(?:{'|'.join(corpus.NAMES)}) (?:{'|'.join(corpus.SURNAMES)})\b")
NUMBER, NOUN = "|".join(corpus.NUMBERS), "|".join(corpus.COUNTED)
COUNT = re.compile(
    rf"\b({NUMBER}) ({NOUN})(?:\.| and|, then)(?: [A-Z][a-z]+)? "
    rf"(lost|sold|gave away|broke|found|bought|got|was given) ({NUMBER})\b"
)
SUBJECTS = "|".join([*corpus.NAMES, *corpus.GROUPS, *corpus.ANIMALS])
AGREE = re.compile(
    rf"\b({SUBJECTS}), (?:(?:whom|that|not)|(?:who|which) came with) (?:the )?({SUBJECTS})\b", re.IGNORECASE
)


def words_of(sentence: str, words: list[str]) -> list[str]:
    return [word for word in re.findall(r"[A-Za-z]+", sentence) if word in words]


def combinations_in(text: str) -> set[tuple[str, ...]]:
    """Read the combinations off a story's words, knowing nothing of how it was made."""
    found: set[tuple[str, ...]] = set()
    for sentence in text.split("."):
        people, names = FULL_NAME.findall(sentence), words_of(sentence, corpus.NAMES)
        found |= {("recall", *pair) for pair in product(people, words_of(sentence, corpus.THINGS))}
        when = product(names, words_of(sentence, corpus.TRADES), words_of(sentence, corpus.MONTHS))
        found |= {("follows", *triple) for triple in when}
    for first, noun, verb, change in COUNT.findall(text):
        kind = "less" if verb in ("lost", "sold", "gave away", "broke") else "more"
        found.add(("count", noun, first, kind, change))
    return found | {("agree", *pair) for pair in AGREE.findall(text)}


@pytest.fixture(scope="module")
def items() -> dict[str, list[dict]]:
    return {
        task: [json.loads(line) for line in (corpus.TASK_FOLDER / f"{task}.jsonl").read_text().splitlines()]
        for task in corpus.TASKS
    }


def test_a_sixteenth_of_all_combinations_is_held_out(items):
    """And every task asks about many different ones."""
    combinations = [("recall", person.name, thing) for person in corpus.PEOPLE for thing in corpus.THINGS]
    share = sum(map(corpus.held_out, combinations)) / len(combinations)
    assert 1 / 20 < share < 1 / 13
    for rows in items.values():
        assert len({tuple(row["combination"]) for row in rows}) >= 100


def test_items_are_a_thousand_fair_four_way_choices(items):
    for task, rows in items.items():
        assert len(rows) == 1000
        assert len({(row["prompt"], *row["choices"]) for row in rows}) == 1000
        gold = [row["gold"] for row in rows]
        assert all(150 < gold.count(place) < 350 for place in range(4)), task
        for row in rows:
            assert len(set(row["choices"])) == 4


def test_every_person_is_told_of_in_one_way_only():
    """Facts must not contradict each other, or nobody could know them."""
    assert len({person.name for person in corpus.PEOPLE}) == 256
    answers: dict[tuple[str, str], set[str]] = {}
    for seed in range(5_000):
        cloze = corpus.recall(random.Random(seed))
        relation = next(kind for kind in ("TOWNS", "TRADES", "ANIMALS") if cloze.answer in getattr(corpus, kind))
        answers.setdefault((cloze.combination[1], relation), set()).add(cloze.answer)
    assert all(len(found) == 1 for found in answers.values())


def test_the_reader_sees_what_items_ask(items):
    """Else the next test would prove nothing."""
    for rows in items.values():
        for row in rows:
            assert tuple(row["combination"]) in combinations_in(row["prompt"])


@pytest.mark.slow
def test_no_combination_of_a_task_occurs_in_training_or_distillation_text(items):
    asked = {tuple(row["combination"]) for rows in items.values() for row in rows}
    assert len(asked) > 100
    texts = [document.text() for document in corpus.documents("train", TRAINING_SAMPLE)]
    texts += [document.text() for document in corpus.documents("distill", corpus.DISTILL_DOCUMENTS)]
    texts += (WORLD / "heldout.txt").read_text().split(corpus.SEPARATOR)
    seen = 0
    for text in texts:
        found = combinations_in(text)
        seen += len(found)
        assert not found & asked
    assert seen > len(texts)  # the reader reads


def test_stored_files_are_what_the_generator_makes(items):
    for task, rows in items.items():
        assert rows[:50] == json.loads(json.dumps(corpus.items(task, 50)))
    first = next(corpus.documents("heldout", 1)).text()
    assert (WORLD / "heldout.txt").read_text().startswith(first)


def test_any_part_of_a_split_can_be_made_alone():
    whole = [document.text() for document in corpus.documents("train", 30)]
    assert [document.text() for document in corpus.documents("train", 10, start=20)] == whole[20:]
