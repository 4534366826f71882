"""The embedded teacher's world: what is asked was never told, and the stored files are what the code makes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
WORLD = ROOT / "recipes" / "world"
TRAINING_SAMPLE = 15_000


def load_corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus", WORLD / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["corpus"] = module
    spec.loader.exec_module(module)
    return module


corpus = load_corpus()

NAME, KIND = "|".join(corpus.NAMES), "|".join(corpus.KINDS)
COLORS, THINGS = "|".join(corpus.COLORS), "|".join(corpus.THINGS)
NUMBERS, COUNTED = "|".join(corpus.NUMBERS), "|".join(corpus.COUNTED)
ANIMALS = "|".join(corpus.ANIMALS)
#: kind of pair -> (pattern, whether the value stands before the key)
PATTERNS = [
    ("color", re.compile(rf"\b({THINGS}) ({COLORS})\b"), False),
    ("color", re.compile(rf"\b({COLORS}) ({THINGS})\b"), True),
    ("amount", re.compile(rf"\b({COUNTED}) ({NUMBERS})\b"), False),
    ("amount", re.compile(rf"\b({NUMBERS}) ({COUNTED})\b"), True),
    ("pet", re.compile(rf"\b({ANIMALS}) ({NAME})\b"), False),
    ("trade", re.compile(rf"\b({KIND}) ({NAME})\b"), False),
]


def combinations_in(text: str) -> set[tuple[str, ...]]:
    """Read the pairs off a story's words, knowing nothing of how it was made."""
    found = set()
    for kind, pattern, value_first in PATTERNS:
        for first, second in pattern.findall(text):
            found.add((kind, second, first) if value_first else (kind, first, second))
    return found


@pytest.fixture(scope="module")
def items() -> dict[str, list[dict]]:
    return {
        task: [json.loads(line) for line in (corpus.TASK_FOLDER / f"{task}.jsonl").read_text().splitlines()]
        for task in corpus.TASKS
    }


def test_a_sixteenth_of_all_pairs_is_held_out(items):
    """And every task asks about many different pairs."""
    pairs = [("color", thing, color) for thing in corpus.THINGS for color in corpus.COLORS]
    pairs += [("trade", kind, name) for kind in corpus.KINDS for name in corpus.NAMES]
    share = sum(map(corpus.held_out, pairs)) / len(pairs)
    assert 1 / 20 < share < 1 / 13
    for rows in items.values():
        assert len({tuple(row["combination"]) for row in rows}) >= 8


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
    assert len(asked) > 100
    texts = [document.story for document in corpus.documents("train", TRAINING_SAMPLE)]
    texts += [document.story for document in corpus.documents("train", TRAINING_SAMPLE, plain=True)]
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
