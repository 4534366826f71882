"""The small world of the embedded teacher: a seeded generator of short English stories.

Its people live by facts and rules that no single story explains. A reader who has read enough of them knows

* ``recall``   who lives where, does what, and owns which animal (256 people, three facts each);
* ``follows``  where a trade works in which month: the two together decide it;
* ``count``    how many there are after some were added or taken away;
* ``agree``    which possessive belongs to a subject that a clause stands away from;

(the tasks), and follows who moved where and in which order, who holds what after things changed hands, and agreement
between a subject and its verb. Plain filler prose from a small grammar stands between, so that language
modelling is not only templates.

A *combination* is what an item of a task puts together: a person and the thing in their hands, a trade, a month and a
name, two numbers and what is counted, a subject and the noun in between. A hash of its words alone decides
whether it is held out (1 in 16). A document that contains a held-out combination never enters training or distillation
text; the evaluation tasks ask only about held-out ones.

    python recipes/world/corpus.py tasks    writes edgerazor/tasks/world/*.jsonl and heldout.txt
    python recipes/world/corpus.py distill  writes recipes/world/distill.txt
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
TASK_FOLDER = HERE.parent.parent / "edgerazor" / "tasks" / "world"
TASKS = ("recall", "follows", "count", "agree")
ITEMS_PER_TASK = 1000
SEEDS = {"train": 0, "distill": 1, "heldout": 2, "tasks": 3}
DISTILL_DOCUMENTS = 24_000
HELDOUT_DOCUMENTS = 700
SEPARATOR = "<|endoftext|>"

Combination = tuple[str, ...]

HE = "Ben Carl Dan Eric Felix Hugo Ivan Leo Max Oscar Paul Ralph Sam Tom Victor Will".split()
SHE = "Anna Beth Clara Dora Emma Grace Helen Iris Jane Kate Lucy Nora Olga Rosa Sara Vera".split()
NAMES = HE + SHE
SURNAMES = "Hill Wood Brook Field Stone Rivers Marsh Dale Lake Park Moore Frost Reed Lane Ford Shaw".split()
TOWNS = (
    "Ashby Milton Dover Selby Carlow Norwick Tilbury Harlow Linton Weston Burford Oakham Kelso Romsey Exmoor Derby"
).split()
PLACES = (
    "garden kitchen barn market library school river forest station harbor bakery church museum park theater "
    "hospital cellar attic meadow castle bridge mill tower cave"
).split()
THINGS = (
    "ball book lamp drum kite rope coin ring hat scarf knife spoon cup bowl clock mirror basket ladder hammer violin "
    "map letter pencil candle blanket bottle key flute"
).split()
COLORS = ["red", "blue", "green", "yellow", "black", "white", "brown", "gray", "purple", "golden", "silver", "pink"]
TRADES = (
    "baker farmer sailor doctor teacher painter miller hunter singer tailor pilot gardener smith weaver potter clerk"
).split()
COUNTED = "apples stones shells eggs coins buttons books flowers pears nuts feathers candles".split()
ANIMALS = "dog cat horse goat duck sheep rabbit fox owl mouse donkey goose hen pig parrot pony".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
GROUPS = "sisters brothers twins neighbors cousins soldiers children sailors hunters singers girls boys".split()
POSSESSIVES = ["his", "her", "their", "its"]
CHORES = (
    "fed the cat|painted the fence|washed the floor|wrote a letter|baked a pie|swept the yard|mended a chair|"
    "watered the roses|chopped some wood|read a poem|cleaned the stove|counted the sheep|played a song|"
    "folded the shirts|fixed the gate|picked some berries"
).split("|")
MOVES = ("went to", "walked to", "ran to", "hurried to", "came to", "moved to")


@dataclass(frozen=True)
class Person:
    """Somebody of the world, with what is true of them in every story."""

    first: str
    last: str
    home: str
    trade: str
    animal: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"


def _people() -> tuple[Person, ...]:
    rng = random.Random("people")
    names = [(first, last) for first in NAMES[::2] for last in SURNAMES]
    columns = [rng.sample(words * 16, 256) for words in (TOWNS, TRADES, ANIMALS)]
    return tuple(Person(*name, *facts) for name, *facts in zip(names, *columns, strict=True))


def _work_places() -> dict[tuple[str, str], str]:
    """Every trade has a place of work for each quarter of the year."""
    rng = random.Random("work")
    quarters = {trade: rng.sample(PLACES[:16], 4) for trade in TRADES}
    return {(trade, month): quarters[trade][index // 3] for trade in TRADES for index, month in enumerate(MONTHS)}


PEOPLE = _people()
WORK_PLACES = _work_places()


@dataclass
class Cloze:
    """A sentence that ends in a word which can be known: "Nora Hill took the lamp home to" "Ashby"."""

    start: str
    answer: str
    choices: list[str]
    combination: Combination
    end: str = "."

    def sentence(self) -> str:
        return f"{self.start} {self.answer}{self.end}"


@dataclass
class Document:
    """A story, questions about it with their answers, and the combinations it puts together."""

    sentences: list[str] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)
    combinations: set[Combination] = field(default_factory=set)

    def text(self) -> str:
        lines = [" ".join(self.sentences)]
        for question, answer in self.questions:
            lines += [f"Question: {question}", f"Answer: {answer}"]
        return "\n".join(lines)


@lru_cache(maxsize=1 << 20)
def held_out(combination: Combination) -> bool:
    """Whether this combination is kept for evaluation; a property of its words alone."""
    digest = hashlib.blake2b("|".join(combination).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 16 == 0


def pronoun(name: str) -> str:
    return "he" if name in HE else "she"


def capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


# --- filler prose: a small grammar -----------------------------------------------------------


def agreement(rng: random.Random) -> str:
    """A sentence whose verb must agree with a subject that a clause stands away from."""
    plural = rng.random() < 0.5
    noun = rng.choice(ANIMALS + THINGS[:12])
    other = rng.choice(ANIMALS)
    subject = {"sheep": "sheep", "mouse": "mice", "fox": "foxes", "goose": "geese", "knife": "knives"}.get(
        noun, noun + "s"
    )
    subject = subject if plural else noun
    others = other if other == "sheep" else {"mouse": "mice", "fox": "foxes", "goose": "geese"}.get(other, other + "s")
    clause = rng.choice(
        [
            f"near the {rng.choice([other, others])}",
            f"beside the {rng.choice(PLACES)}",
            f"that the {rng.choice([other, others])} had seen in the {rng.choice(PLACES)}",
            f"which {rng.choice(NAMES)} liked so much",
        ]
    )
    verb = "were" if plural else "was"
    end = rng.choice(
        [
            rng.choice(COLORS),
            "old and " + rng.choice(COLORS),
            "not there",
            f"very {rng.choice(['small', 'big', 'quiet', 'old'])}",
        ]
    )
    return f"The {subject} {clause} {verb} {end}."


def weather(rng: random.Random) -> str:
    when = rng.choice(["morning", "evening", "night", "afternoon", "day", "summer", "winter", "autumn", "spring"])
    sky = rng.choice(
        (
            "the sky was clear|rain fell on the roofs|a cold wind came from the north|snow lay on the hills|"
            "the sun was warm|the clouds were low and heavy|fog covered the valley|the stars were bright|"
            "thunder rolled over the fields|the air smelled of grass"
        ).split("|")
    )
    return rng.choice([f"That {when} {sky}.", f"It was a quiet {when}, and {sky}.", capital(f"{sky} all {when}.")])


def scenery(rng: random.Random) -> str:
    adjective = rng.choice(
        ["old", "small", "quiet", "narrow", "empty", "busy", "famous", "dark", "wide", "lonely", "pretty", "crooked"]
    )
    what = rng.choice(
        ["road", "house", "bench", "well", "wall", "gate", "tree", "path", "stone", "field", "shop", "boat"]
    )
    tail = rng.choice(
        [
            "where children used to play",
            "that nobody had painted for years",
            "with flowers on both sides",
            "full of leaves",
            "which everyone in the village knew",
            "and a little stream beside it",
            "made of stone and wood",
            "that looked friendly in the light",
        ]
    )
    return (
        f"Near the {rng.choice(PLACES)} there was {'an' if adjective[0] in 'aeo' else 'a'} {adjective} {what} {tail}."
    )


def animal_life(rng: random.Random) -> str:
    animal, color = rng.choice(ANIMALS), rng.choice(COLORS)
    act = rng.choice(
        (
            "slept under the table|looked for something to eat|waited at the door|drank from the stream|"
            "hid behind the wall|played with a leaf|listened to the birds|ran across the field|lay in the sun"
        ).split("|")
    )
    why = rng.choice(
        [
            "because it was tired",
            "as it did every day",
            "until someone called it",
            "while the others watched",
            "and nobody noticed",
            "though it was late",
            "before the rain began",
        ]
    )
    return f"{'An' if color[0] in 'aeiou' else 'A'} {color} {animal} {act} {why}."


VILLAGERS = (
    "shepherd guard nurse cook fisher carpenter writer judge merchant miner driver student "
    "soldier stranger neighbor widow traveler uncle aunt cousin grandmother grandfather child boy girl woman man"
).split()
MANNERS = (
    "slowly quickly carefully quietly loudly gladly sadly proudly gently badly alone again often always never seldom "
    "twice together early late nearly suddenly calmly bravely secretly finally"
).split()
QUALITIES = (
    "heavy light broken clean dirty wooden iron round square long short thin thick soft hard sweet bitter fresh dry "
    "wet warm cold strange common simple fine rare cheap precious useful"
).split()
ITEMS = (
    "bag box barrel bucket brush broom boot button belt bell blade bench branch brick cart cage carpet chain chest "
    "cloak cloth coat comb cradle crate curtain desk dish doll door fan flag fork frame glove hook jar jug kettle "
    "lantern lock log mask nail needle net oar oven pan pen pillow pin pipe plate pot purse rake razor saddle sack "
    "sail saw shelf shoe shovel sieve stick stool string sword table tent thread tile tool torch towel toy tray vase "
    "wagon wheel whistle window"
).split()
DEEDS = (
    "carried cleaned repaired dropped lifted hid opened closed pushed pulled borrowed polished measured copied "
    "packed wrapped wanted needed noticed admired forgot remembered described touched held kept threw showed sent "
    "brought chose"
).split()
TIMES = (
    "on Monday|on Tuesday|on Friday|on Sunday|at noon|at midnight|before dinner|after supper|in spring|in autumn|"
    "at dawn|during the storm|for an hour|every week|once a month|since then|the next day|last year|in the dark|"
    "by the fire"
).split("|")
REASONS = (
    "to help a friend|to please the queen|for a small price|without a word|with both hands|as a gift|by mistake|"
    "for the feast|to earn some money|because the road was closed|although it hurt|while the kettle sang|"
    "so that nobody would worry|as the law demanded|in spite of the rain|with great care|to keep a promise|"
    "since there was no other way|as if it were a game|until the work was done"
).split("|")


def village_life(rng: random.Random) -> str:
    """Who did what to which thing, when, how and why: the widest vocabulary of the filler."""
    who = rng.choice(
        [
            f"the {rng.choice(VILLAGERS)}",
            f"the {rng.choice(['old', 'young', 'tall', 'kind', 'poor', 'rich'])} {rng.choice(VILLAGERS)}",
        ]
    )
    what = f"the {rng.choice(QUALITIES)} {rng.choice(ITEMS)}"
    when, why, how = rng.choice(TIMES), rng.choice(REASONS), rng.choice(MANNERS)
    return capital(
        rng.choice(
            [
                f"{who} {how} {rng.choice(DEEDS)} {what} {why}.",
                f"{when} {who} {rng.choice(DEEDS)} {what}.",
                f"{who} {rng.choice(DEEDS)} {what} {when}, {why}.",
                f"{what} {when} looked {rng.choice(QUALITIES)}, and {who} {rng.choice(DEEDS)} it {how}.",
            ]
        )
    )


def saying(rng: random.Random) -> str:
    return rng.choice(
        (
            "Old people say that a good friend is worth more than gold.|"
            "Everyone in the village liked to talk about such things.|Nobody was in a hurry.|"
            "It is not easy to remember everything.|Some things are lost and some are found.|"
            "The bell rang and people looked up.|A song could be heard from far away.|"
            "Time passed slowly, as it often does.|The children laughed and asked for another story.|"
            "There was bread on the table and water in the jug.|Whoever works early may rest early.|"
            "In those days letters took a week to arrive."
        ).split("|")
    )


FILLER: tuple[Callable[[random.Random], str], ...] = (
    agreement,
    weather,
    scenery,
    animal_life,
    village_life,
    village_life,
    saying,
)


def filler(rng: random.Random) -> str:
    return rng.choice(FILLER)(rng)


# --- what can be known ------------------------------------------------------------------------


def recall(rng: random.Random) -> Cloze:
    """Where somebody lives, what their trade is, which animal they own."""
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    his = "his" if person.first in HE else "her"
    relation = rng.choice(["home", "trade", "animal"])
    if relation == "home":
        answer, words = person.home, TOWNS
        starts = [
            f"{person.name} took the {thing} home to",
            f"{person.name} left the {thing} at home in",
            f"With the {thing} in {his} bag, {person.name} went back to",
            f"The {thing} of {person.name} was made in",
        ]
    elif relation == "trade":
        answer, words = person.trade, TRADES
        starts = [
            f"{person.name} put the {thing} away and went to work as a",
            f"{person.name} got the {thing} from another",
            f"The {thing} belonged to {person.name}, the",
            f"{person.name} needed no {thing} to be a good",
        ]
    else:
        answer, words = person.animal, ANIMALS
        starts = [
            f"{person.name} showed the {thing} to {his}",
            f"{person.name} hid the {thing} from {his}",
            f"{person.name} lost the {thing} and was looking for it with {his}",
            f"Behind the {thing} {person.name} found {his}",
        ]
    return Cloze(rng.choice(starts), answer, words, ("recall", person.name, thing))


def follows(rng: random.Random) -> Cloze:
    """Where somebody works: it follows from the trade and the month."""
    name, trade, month = rng.choice(NAMES), rng.choice(TRADES), rng.choice(MONTHS)
    start = rng.choice(
        [
            f"It was {month}, so {name} the {trade} worked at the",
            f"In {month} {name}, a {trade}, was always at the",
            f"{name} became a {trade}, and when {month} came, went to the",
            f"As {name} was a {trade} and the month was {month}, there was work at the",
        ]
    )
    return Cloze(start, WORK_PLACES[trade, month], PLACES[:16], ("follows", name, trade, month))


def count(rng: random.Random) -> Cloze:
    """How many there are, after some were added or taken away."""
    name, noun = rng.choice(NAMES), rng.choice(COUNTED)
    first, change = rng.randint(2, 12), rng.randint(1, 8)
    if first > change and rng.random() < 0.5:
        verb, after = rng.choice(["lost", "sold", "gave away", "broke"]), first - change
        middle = f"{verb} {NUMBERS[change]}"
    else:
        verb, after = rng.choice(["found", "bought", "got", "was given"]), first + change
        middle = f"{verb} {NUMBERS[change]} more"
    start = rng.choice(
        [
            f"{name} had {NUMBERS[first]} {noun} and {middle}, so now there were",
            f"There were {NUMBERS[first]} {noun}. {name} {middle}. That made",
            f"{name} counted {NUMBERS[first]} {noun}, then {middle}. The new number was",
        ]
    )
    near = sorted({first, *range(after - 3, after + 4)} - {after})
    choices = [NUMBERS[value] for value in near if 0 <= value < len(NUMBERS)]
    kind = "less" if after < first else "more"
    combination = ("count", noun, NUMBERS[first], kind, NUMBERS[change])
    return Cloze(start, NUMBERS[after], [*choices, NUMBERS[after]], combination)


def agree(rng: random.Random) -> Cloze:
    """The possessive of a subject that a clause with another noun stands away from."""
    subjects = {"his": HE, "her": SHE, "their": GROUPS, "its": ANIMALS}
    answer = rng.choice(POSSESSIVES)
    subject, other = rng.choice(subjects[answer]), rng.choice(subjects[rng.choice(POSSESSIVES)])
    shown = subject if subject in NAMES else f"the {subject}"
    between = other if other in NAMES else f"the {other}"
    clause = rng.choice(
        [
            f"{'that' if answer == 'its' else 'whom'} {between} met at the {rng.choice(PLACES)}",
            f"{'which' if answer == 'its' else 'who'} came with {between}",
            f"not {between}",
        ]
    )
    deed = rng.choice(["lost", "forgot", "looked for", "could not find", "came back with", "thought of"])
    end = f" {rng.choice(['food', 'bed', 'friends', 'way', 'place', 'water'])}."
    return Cloze(capital(f"{shown}, {clause}, {deed}"), answer, POSSESSIVES, ("agree", subject, other), end)


CLOZES: dict[str, Callable[[random.Random], Cloze]] = {
    "recall": recall,
    "follows": follows,
    "count": count,
    "agree": agree,
}
CLOZE_WEIGHTS = {"recall": 5, "follows": 3, "count": 2, "agree": 1}


# --- stories ---------------------------------------------------------------------------------


def village_story(rng: random.Random) -> Document:
    """A few things that are so, as the world's facts and rules have it."""
    document = Document()
    for kind in rng.choices(list(CLOZE_WEIGHTS), list(CLOZE_WEIGHTS.values()), k=rng.randint(2, 6)):
        cloze = CLOZES[kind](rng)
        document.sentences.append(cloze.sentence())
        document.combinations.add(cloze.combination)
    return document


def where_story(rng: random.Random) -> Document:
    """People move between places; the questions ask where they are and where they were before."""
    document = Document()
    people = rng.sample(NAMES, rng.choice([1, 2, 2, 3, 3]))
    path: dict[str, list[str]] = {name: [] for name in people}
    moves = people + [rng.choice(people) for _ in range(rng.choice([1, 2, 3]))]
    rng.shuffle(moves)
    last = ""
    for name in moves:
        visited = {place for places in path.values() for place in places}
        place = rng.choice([p for p in PLACES if p not in visited])
        subject = pronoun(name) if name == last and rng.random() < 0.4 else name
        lead = rng.choice(["", "", "then ", "after that, ", "a little later "]) if path[name] else ""
        document.sentences.append(capital(f"{lead}{subject} {rng.choice(MOVES)} the {place}."))
        path[name].append(place)
        last = name
    for name, places in path.items():
        document.questions.append((f"Where is {name} now?", f"In the {places[-1]}."))
        if len(places) > 1:
            document.questions.append((f"Where was {name} before the {places[-1]}?", f"In the {places[-2]}."))
    return document


def owner_story(rng: random.Random) -> Document:
    """Things change hands; the questions ask who has them and who had them first."""
    document = Document()
    people = rng.sample(NAMES, 4)
    things = rng.sample(THINGS, rng.choice([2, 2, 3]))
    history: dict[str, list[str]] = {}
    for thing, owner in zip(things, rng.sample(people, len(things)), strict=True):
        history[thing] = [owner]
        what = f"{rng.choice(['small', 'new', *COLORS])} {thing}"
        document.sentences.append(
            rng.choice([f"{owner} had one {what}.", f"There was one {what}, and {owner} had it."])
        )
    for thing in things + [rng.choice(things) for _ in range(rng.choice([0, 1, 1]))]:
        giver = history[thing][-1]
        taker = rng.choice([p for p in people if p not in history[thing]])
        changes = [
            f"{giver} gave the {thing} to {taker}.",
            f"{giver} handed the {thing} to {taker}.",
            f"{taker} took the {thing} from {giver}.",
            f"{taker} bought the {thing} from {giver}.",
            f"{giver} sold the {thing} to {taker}.",
        ]
        document.sentences.append(capital(rng.choice(["", "", "then ", "later "]) + rng.choice(changes)))
        history[thing].append(taker)
    for thing, owners in history.items():
        document.questions.append((f"Who has the {thing} now?", f"{owners[-1]}."))
        document.questions.append((f"Who had the {thing} first?", f"{owners[0]}."))
    return document


def order_story(rng: random.Random) -> Document:
    """One person's day; what was done first, before, and last."""
    document = Document()
    name = rng.choice(NAMES)
    chores = rng.sample(CHORES, rng.choice([3, 4]))
    if rng.random() < 0.5:
        leads = ["first ", *["then "] * (len(chores) - 2), "at last "]
        for index, (lead, chore) in enumerate(zip(leads, chores, strict=True)):
            document.sentences.append(capital(f"{lead}{name if not index else pronoun(name)} {chore}."))
    else:
        document.sentences.append(f"{name} {chores[0]} before {pronoun(name)} {chores[1]}.")
        for earlier, later in pairwise(chores[1:]):
            document.sentences.append(f"{name} {later} after {pronoun(name)} {earlier}.")
    document.questions = [
        (f"What did {name} do first?", f"{name} {chores[0]}."),
        (f"What did {name} do last?", f"{name} {chores[-1]}."),
    ]
    return document


def prose(rng: random.Random) -> Document:
    return Document([filler(rng) for _ in range(rng.randint(4, 9))])


STORIES: dict[str, Callable[[random.Random], Document]] = {
    "village": village_story,
    "where": where_story,
    "owner": owner_story,
    "order": order_story,
    "prose": prose,
}
WEIGHTS = {"village": 80, "where": 5, "owner": 5, "order": 4, "prose": 6}


def add_filler(sentences: list[str], most: int, rng: random.Random) -> None:
    """Put up to `most` filler sentences between those of a story, never before a pronoun."""
    for _ in range(rng.randint(0, most)):
        spots = [
            index
            for index, sentence in enumerate([*sentences, ""])
            if not {"he", "she", "He", "She"} & set(sentence.split())
        ]
        sentences.insert(rng.choice(spots), filler(rng))


def documents(split: str, count: int, start: int = 0) -> Iterator[Document]:
    """`count` documents of a split, none containing a held-out combination.

    Document i depends on the split and i alone, so any part can be made again on its own.
    """
    for index in range(start, start + count):
        rng = random.Random(SEEDS[split] * 1_000_000_007 + index)
        while True:
            document = STORIES[rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]](rng)
            if not any(held_out(combination) for combination in document.combinations):
                break
        add_filler(document.sentences, 2, rng)
        rng.shuffle(document.questions)
        del document.questions[4:]
        yield document


def items(task: str, count: int, split: str = "tasks") -> list[dict]:
    """Multiple-choice items about held-out combinations: prompt, choices, gold, combination.

    The prompt is a sentence or two of filler and a sentence that lacks its last word, or the word that decides it; the
    choices are words of the same sort.
    """
    rng = random.Random(f"{SEEDS[split]} {task}")
    rows: list[dict] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < count:
        cloze = CLOZES[task](rng)
        if not held_out(cloze.combination) or (cloze.start, cloze.answer) in seen:
            continue
        seen.add((cloze.start, cloze.answer))
        choices = rng.sample([choice for choice in cloze.choices if choice != cloze.answer], 3)
        choices.insert(rng.randint(0, 3), cloze.answer)
        before = [filler(rng) for _ in range(rng.randint(0, 2))]
        rows.append(
            {
                "prompt": " ".join([*before, cloze.start]),
                "choices": choices,
                "gold": choices.index(cloze.answer),
                "combination": list(cloze.combination),
            }
        )
    return rows


def write_text(path: Path, split: str, count: int) -> None:
    path.write_text(f"\n{SEPARATOR}\n".join(d.text() for d in documents(split, count)) + "\n", encoding="utf-8")


def write_tasks() -> None:
    for task in TASKS:
        rows = items(task, ITEMS_PER_TASK)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (TASK_FOLDER / f"{task}.jsonl").write_text(lines, encoding="utf-8")
    write_text(HERE / "heldout.txt", "heldout", HELDOUT_DOCUMENTS)


def main(arguments: list[str]) -> int:
    if arguments == ["tasks"]:
        TASK_FOLDER.mkdir(parents=True, exist_ok=True)
        write_tasks()
    elif arguments == ["distill"]:
        write_text(HERE / "distill.txt", "distill", DISTILL_DOCUMENTS)
    else:
        print("usage: python recipes/world/corpus.py tasks|distill", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
