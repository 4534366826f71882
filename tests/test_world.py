"""The embedded teacher's world: what is asked was never told, and the stored files are what the code makes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
WORLD = ROOT / "recipes" / "world"
TRAINING_SAMPLE = 20_000


def load_corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus", WORLD / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["corpus"] = module
    spec.loader.exec_module(module)
    return module


corpus = load_corpus()

NAME = "|".join(corpus.NAMES)
MOVE = re.compile(rf"\b({NAME}|[Hh]e|[Ss]he) (?:went|walked|ran|hurried|came|moved) to the (\w+)\.")
HAND = re.compile(rf"\b({NAME}) (?:gave|handed|sold) the (\w+) to ({NAME})\.")
TAKE = re.compile(rf"\b({NAME}) (?:took|bought) the (\w+) from ({NAME})\.")
RULE = re.compile(r"\b(?:Every|Each) (\w+) (?:likes|eats|sells) (\w+)\.")
TRADE = re.compile(rf"\b({NAME}) (?:is|works as) a (\w+)\.")
HAD = re.compile(rf"\b({NAME}) had (\w+) (\w+)\.")
CHANGE = re.compile(rf"\b({NAME}) (found|bought|got|lost|sold|gave away) (\w+) (?:more|of them)\.")


def combinations_in(text: str) -> set[tuple[str, ...]]:
    """Read the combinations off a story's words, knowing nothing of how it was made."""
    found: set[tuple[str, ...]] = set()
    places: dict[str, list[str]] = {}
    last = ""
    for who, place in MOVE.findall(text):
        last = last if who.lower() in ("he", "she") else who
        places.setdefault(last, []).append(place)
    for who, path in places.items():
        found |= {("where", who, before, now) for before, now in pairwise(path)}
    found |= {("owner", thing, giver, taker) for giver, thing, taker in HAND.findall(text)}
    found |= {("owner", thing, giver, taker) for taker, thing, giver in TAKE.findall(text)}
    rules = dict(RULE.findall(text))
    found |= {("follows", who, kind, rules[kind]) for who, kind in TRADE.findall(text) if kind in rules}
    starts = {who: (number, noun) for who, number, noun in HAD.findall(text) if number in corpus.NUMBERS}
    for who, verb, amount in CHANGE.findall(text):
        if who in starts and amount in corpus.NUMBERS:
            number, noun = starts[who]
            sign = "plus" if verb in ("found", "bought", "got") else "minus"
            found.add(("count", who, noun, number, sign, amount))
    return found


@pytest.fixture(scope="module")
def items() -> dict[str, list[dict]]:
    return {
        task: [json.loads(line) for line in (corpus.TASK_FOLDER / f"{task}.jsonl").read_text().splitlines()]
        for task in corpus.TASKS
    }


def test_items_are_a_thousand_fair_four_way_choices(items):
    for task, rows in items.items():
        assert len(rows) == 1000
        assert len({row["passage"] for row in rows}) == 1000
        gold = [row["gold"] for row in rows]
        assert all(150 < gold.count(place) < 350 for place in range(4)), task
        for row in rows:
            assert len(set(row["choices"])) == 4


def test_the_reader_sees_what_items_ask(items):
    """Else the next test would prove nothing."""
    for rows in items.values():
        for row in rows:
            assert tuple(row["combination"]) in combinations_in(row["passage"])


def test_no_combination_of_a_task_occurs_in_training_or_distillation_text(items):
    asked = {tuple(row["combination"]) for rows in items.values() for row in rows}
    assert len(asked) > 2000
    texts = [document.story for document in corpus.documents("train", TRAINING_SAMPLE)]
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
