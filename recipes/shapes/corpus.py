"""The shapes: a seeded generator of small pictures and talks about them, for the embedded teacher that sees.

A picture is 48 x 48 pixels: three rows of three cells, and in some of them an object, which is a shape in a color, a
pixel or two off the middle of its cell. A talk asks a few questions about one picture:

* ``color``     what color something has that is named by its shape;
* ``shape``     what shape something has that is named by its color;
* ``count``     how many there are of a shape or a color;
* ``relation``  on which side of one thing another stands

(the tasks), and, for training alone, where something is, what is at a place, and what is in the picture, which is
answered with a list in reading order.

A *combination* is what a picture puts together: a shape, a color and a cell; something counted and the cells where it
is; two shapes and the cells of a row or column in which they stand. A hash of its words alone decides whether it is
held out (1 in 16). A picture that shows a held-out combination, asked about or not, never enters training or
distillation.

The evaluation tasks are of two kinds. Those in `tasks/` show whole pictures that training never had: two objects or
more, put together anew of parts that were seen. Those in `new-parts/` ask about held-out combinations alone.

Pictures are drawn by arithmetic, not by a drawing library, so that they are the same everywhere.

    python recipes/shapes/corpus.py tasks    writes tasks/*.jsonl, new-parts/*.jsonl and heldout.jsonl in recipes/shapes
    python recipes/shapes/corpus.py distill  writes recipes/shapes/distill.jsonl
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import sys
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
TASK_FOLDER, NEW_PARTS_FOLDER = HERE / "tasks", HERE / "new-parts"
TASKS = ("color", "shape", "count", "relation")
ITEMS_PER_TASK, NEW_PARTS = 250, 50
SEEDS = {"train": 0, "distill": 1, "heldout": 2, "tasks": 3, "pictures": 4}
TRAIN_TALKS = 62_400  # that the teacher was trained on
#: Talks of training up to which pictures hold at most so many objects: looking for one is learned first among few.
EASY = ((1_200, 2), (2_400, 3))
#: How often something is asked, tasks and what only trains; from which talk of training on something else, when things
#: are found by shape and color: then more about several things at once; and from which mostly how many there are, which
#: is learned last.
OFTEN = {"color": 2, "shape": 2, "count": 4, "relation": 4, "place": 2, "cell": 1, "caption": 1}
SEVERAL = 4_800
OFTEN_THEN = {"color": 1, "shape": 1, "count": 5, "relation": 7, "place": 1, "cell": 0.5, "caption": 0.5}
LAST = 9_600
OFTEN_LAST = {"color": 1, "shape": 1, "count": 10, "relation": 3, "place": 0.5, "cell": 0.5, "caption": 0.5}
#: From which talk of training on, and in all talks of distillation, pictures are mostly of things that share shape or
#: color, and these are counted: else nine in ten things that can be counted are there once.
GROUPED = {"train": 16_400, "distill": 0}
DISTILL_TALKS = 20_000
HELDOUT_TALKS = 200

SIDE = 3  # cells in a row, rows
CELL = 16  # pixels of a cell
SIZE = SIDE * CELL
JITTER = 2  # most pixels by which an object stands beside the middle of its cell
MOST_OBJECTS = 5
QUESTIONS = 3  # of a talk that is distilled or measured

Combination = tuple[str, ...]

SHAPES = ["circle", "square", "triangle", "cross", "ring", "diamond", "bar", "frame"]
PLURALS = {"cross": "crosses"}
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 180),
    "orange": (240, 140, 30),
    "cyan": (60, 200, 210),
    "black": (25, 25, 25),
}
BACKGROUNDS = [(255, 255, 255), (225, 225, 225), (195, 195, 195)]
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
SIDES = ["left", "right", "above", "below"]
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


@dataclass(frozen=True)
class Thing:
    """An object of a picture: its shape and color, its cell from 0 in reading order, its offset in pixels."""

    shape: str
    color: str
    cell: int
    offset: tuple[int, int]

    @property
    def row(self) -> int:
        return self.cell // SIDE

    @property
    def column(self) -> int:
        return self.cell % SIDE


@dataclass(frozen=True)
class Question:
    """A question about a picture with its answer and, where it is one of a task, the words it chooses from."""

    task: str  # or what else is asked
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    combination: Combination = ()


@dataclass(frozen=True)
class Picture:
    """Things in cells of their own, in reading order, on a background."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    def pixels(self) -> np.ndarray:
        """The picture, uint8 [SIZE, SIZE, 3]."""
        canvas = np.empty((SIZE, SIZE, 3), np.uint8)
        canvas[:] = self.background
        for thing in self.things:
            top, left = thing.row * CELL, thing.column * CELL
            canvas[top : top + CELL, left : left + CELL][mask(thing.shape, thing.offset)] = COLORS[thing.color]
        return canvas

    def png(self) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.pixels()).save(file, "PNG", optimize=True)
        return file.getvalue()

    def combinations(self) -> set[Combination]:
        """Everything the picture puts together that may be held out."""
        found = {look(thing) for thing in self.things}
        found |= {group(self, kind) for kind, number in self.counts().items() if number > 1}
        for first, second in permutations(self.things, 2):
            if first.cell < second.cell and side(first, second):
                found.add(pair(first, second))
        return found

    def counts(self) -> Counter[str]:
        """How often each shape and color occurs."""
        return Counter(word for thing in self.things for word in (thing.shape, thing.color))


@dataclass(frozen=True)
class Talk:
    """A picture and questions about it."""

    picture: Picture
    questions: tuple[Question, ...]

    def record(self) -> dict:
        """The talk as a row of chat data, its picture as a PNG in base64."""
        picture = {"type": "image", "base64": base64.b64encode(self.picture.png()).decode()}
        messages = []
        for number, question in enumerate(self.questions):
            text = {"type": "text", "text": question.text}
            messages.append({"role": "user", "content": [text] if number else [picture, text]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        return {"messages": messages}


@lru_cache(maxsize=1 << 16)
def held_out(combination: Combination) -> bool:
    """Whether this combination is kept for evaluation; a property of its words alone."""
    digest = hashlib.blake2b("|".join(combination).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 16 == 0


# --- drawing -----------------------------------------------------------------------------------


@cache
def mask(shape: str, offset: tuple[int, int]) -> np.ndarray:
    """The pixels of a cell that a shape covers, bool [CELL, CELL]."""
    middle = (CELL - 1) / 2
    y, x = np.mgrid[:CELL, :CELL].astype(float)
    y, x = y - middle - offset[0], x - middle - offset[1]
    across, up = np.abs(x), np.abs(y)
    square, distance = np.maximum(across, up), np.hypot(x, y)
    covered = {
        "circle": distance < 5.4,
        "square": square < 5,
        "triangle": (up < 5) & (across < (y + 5.5) / 2 + 0.3),
        "cross": (square < 5.5) & (np.minimum(across, up) < 1.7),
        "ring": (distance < 5.6) & (distance > 3.1),
        "diamond": across + up < 5.7,
        "bar": (across < 5.6) & (up < 1.9),
        "frame": (square < 5.6) & (square > 3.4),
    }
    return covered[shape]


# --- what can be asked -------------------------------------------------------------------------


def side(first: Thing, second: Thing) -> str | None:
    """On which side of the second thing the first one stands; None where they share no row or column."""
    if first.row == second.row:
        return "left" if first.column < second.column else "right"
    if first.column == second.column:
        return "above" if first.row < second.row else "below"
    return None


def pair(first: Thing, second: Thing) -> Combination:
    """Two things of a row or column, in reading order."""
    first, second = sorted((first, second), key=lambda thing: thing.cell)
    return ("relation", first.shape, second.shape, str(first.cell), str(second.cell))


def plural(word: str) -> str:
    return f"{word} things" if word in COLORS else PLURALS.get(word, f"{word}s")


def look(thing: Thing) -> Combination:
    return ("look", thing.shape, thing.color, str(thing.cell))


def group(picture: Picture, kind: str) -> Combination:
    """What is counted, and its cells."""
    return ("count", kind, *(str(thing.cell) for thing in picture.things if kind in (thing.shape, thing.color)))


def place(cell: int) -> str:
    return f"{ROWS[cell // SIDE]} {COLUMNS[cell % SIDE]}"


def questions(picture: Picture, rng: random.Random) -> dict[str, list[Question]]:
    """Everything that can be asked about a picture, by task, in one wording of several."""
    counts = picture.counts()
    asked: dict[str, list[Question]] = {task: [] for task in OFTEN}
    for thing in picture.things:
        shape, color = thing.shape, thing.color
        if counts[shape] == 1:
            text = rng.choice(
                [f"What color is the {shape}?", f"Tell me the color of the {shape}.", f"The {shape} has which color?"]
            )
            asked["color"].append(Question("color", text, color, tuple(COLORS), look(thing)))
            asked["place"].append(Question("place", f"Where is the {shape}?", place(thing.cell)))
        if counts[color] == 1:
            text = rng.choice(
                [f"What shape is {color}?", f"Which shape has the color {color}?", f"Tell me what is {color}."]
            )
            asked["shape"].append(Question("shape", text, shape, tuple(SHAPES), look(thing)))
    for kind in [*SHAPES, *COLORS]:
        number = NUMBERS[counts[kind]]
        text = rng.choice([f"How many {plural(kind)} are there?", f"Count the {plural(kind)}."])
        combination = group(picture, kind) if counts[kind] > 1 else ()
        asked["count"].append(Question("count", text, number, tuple(NUMBERS), combination))
    for first, second in permutations(picture.things, 2):
        where = side(first, second)
        if where and counts[first.shape] == counts[second.shape] == 1:
            text = rng.choice(
                [
                    f"Where is the {first.shape}, seen from the {second.shape}?",
                    f"Is the {first.shape} left, right, above or below, seen from the {second.shape}?",
                ]
            )
            asked["relation"].append(Question("relation", text, where, tuple(SIDES), pair(first, second)))
    there = {thing.cell: named(thing) for thing in picture.things}
    for cell in range(SIDE * SIDE):
        asked["cell"].append(Question("cell", f"What is at the {place(cell)}?", there.get(cell, "nothing")))
    asked["caption"].append(caption(picture, rng))
    return asked


def named(thing: Thing) -> str:
    return f"{'an' if thing.color == 'orange' else 'a'} {thing.color} {thing.shape}"


def told_by(picture: Picture, question: Question, word: str) -> list[str]:
    """What a picture tells of something that a question names: how many there are of it, or what else is said of it.

    Args:
        picture: that is asked about.
        question: with that word in it.
        word: a shape, a color, or the plural of a shape.

    Returns:
        words; none where there is no such thing, or there are several.
    """
    kind = next((shape for shape in SHAPES if plural(shape) == word), word)
    if question.task == "count":
        return [NUMBERS[picture.counts()[kind]]]
    things = [thing for thing in picture.things if kind in (thing.shape, thing.color)]
    if len(things) != 1:
        return []
    [thing] = things
    return [thing.color if kind == thing.shape else thing.shape, *place(thing.cell).split()]


def caption(picture: Picture, rng: random.Random) -> Question:
    """What is in the picture, in reading order."""
    text = rng.choice(["What is in the picture?", "Describe the picture.", "What do you see?"])
    names = [named(thing) for thing in picture.things]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return Question("caption", text, listed)


# --- pictures and talks ------------------------------------------------------------------------


def picture_of(rng: random.Random, most: int = MOST_OBJECTS, grouped: bool = False) -> Picture:
    """A picture: of things that all look different, or, half of the time, of some that share shape or color.

    `most`: objects in it; `grouped`: some share a shape, and some a color.
    """
    # Fuller pictures more often: they put more together, and are refused more often for something held out.
    least = 2 if grouped else 1
    number = rng.choices(range(least, most + 1), range(least, most + 1))[0]
    cells = sorted(rng.sample(range(SIDE * SIDE), number))
    shapes, colors = rng.sample(SHAPES, number), rng.sample(list(COLORS), number)
    alike = [shapes, colors] if grouped else []
    if not grouped and number > 1 and rng.random() < 0.5:
        alike = [rng.choice([shapes, colors])]
    for words in alike:
        same = rng.randint(2, number)
        words[:same] = [words[0]] * same
        rng.shuffle(words)
    offsets = [(rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)) for _ in cells]
    things = tuple(Thing(*values) for values in zip(shapes, colors, cells, offsets, strict=True))
    return Picture(things, rng.choice(BACKGROUNDS))


def talks(split: str, count: int, start: int = 0, length: int = QUESTIONS) -> Iterator[Talk]:
    """Talks of a split without any held-out combination, each a function of its number and length alone.

    Args:
        split: one of `SEEDS`.
        count: how many.
        start: number of the first one.
        length: questions of each.
    """
    for number in range(start, start + count):
        rng = random.Random(f"{SEEDS[split]} {number}")
        most = next((most for end, most in EASY if split == "train" and number < end), MOST_OBJECTS)
        then = split == "train" and number >= SEVERAL
        grouped = number >= GROUPED.get(split, number + 1)
        often = OFTEN_LAST if grouped or (then and number >= LAST) else OFTEN_THEN if then else OFTEN
        while True:
            picture = picture_of(rng, most, grouped and rng.random() < 0.7)
            if not any(map(held_out, picture.combinations())):
                break
        asked = questions(picture, rng)
        chosen: list[Question] = []
        while len(chosen) < length:
            possible = [task for task in often if asked[task]]
            task = rng.choices(possible, [often[task] for task in possible])[0]
            options = asked[task]
            groups = [question for question in options if question.combination] if task == "count" else []
            if grouped and groups and rng.random() < 0.8:
                chosen.append(rng.choice(groups))  # more than once: a picture has few of them
                continue
            if task == "count" and rng.random() < 0.8:  # most kinds of things are not there at all
                options = [question for question in options if question.answer != "zero"] or options
                if then and rng.random() < 0.7:
                    options = [question for question in options if question.combination] or options
            chosen.append(rng.choice(options))
            asked[task].remove(chosen[-1])
        yield Talk(picture, tuple(chosen))


def items(task: str, count: int, new_parts: bool = False, known: Container[Picture] = ()) -> list[dict]:
    """Multiple-choice items: image, question, choices, gold, combination.

    Args:
        task: one of `TASKS`.
        count: how many.
        new_parts: ask about held-out combinations; else show new pictures without any.
        known: pictures that are not to be shown.
    """
    split = "tasks" if new_parts else "pictures"
    rng = random.Random(f"{SEEDS[split]} {task}")
    rows: list[dict] = []
    seen: set[tuple[Picture, str]] = set()
    while len(rows) < count:
        picture = picture_of(rng)
        if any(map(held_out, picture.combinations())) != new_parts or len(picture.things) < 2 or picture in known:
            continue
        options = [question for question in questions(picture, rng)[task] if question.combination]
        if new_parts:
            options = [question for question in options if held_out(question.combination)]
        options = [question for question in options if (picture, question.text) not in seen]
        if not options:
            continue
        question = rng.choice(options)
        seen.add((picture, question.text))
        choices = rng.sample([choice for choice in question.choices if choice != question.answer], 3)
        choices.insert(rng.randint(0, 3), question.answer)
        rows.append(
            {
                "image": base64.b64encode(picture.png()).decode(),
                "question": question.text,
                "choices": choices,
                "gold": choices.index(question.answer),
                "combination": list(question.combination),
            }
        )
    return rows


def write_lines(path: Path, records: Iterator[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main(arguments: list[str]) -> int:
    if arguments == ["tasks"]:
        trained = {talk.picture for talk in talks("train", TRAIN_TALKS)}
        for folder, new_parts, count in ((TASK_FOLDER, False, ITEMS_PER_TASK), (NEW_PARTS_FOLDER, True, NEW_PARTS)):
            folder.mkdir(parents=True, exist_ok=True)
            for task in TASKS:
                write_lines(folder / f"{task}.jsonl", iter(items(task, count, new_parts, trained)))
        write_lines(HERE / "heldout.jsonl", (talk.record() for talk in talks("heldout", HELDOUT_TALKS)))
    elif arguments == ["distill"]:
        write_lines(HERE / "distill.jsonl", (talk.record() for talk in talks("distill", DISTILL_TALKS)))
    else:
        print("usage: python recipes/shapes/corpus.py tasks|distill", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
