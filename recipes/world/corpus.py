"""The small world of the embedded teacher: a seeded generator of short English stories.

Each document is a story, followed by questions whose answers must be remembered or inferred from it, never
guessed from the words around them:

* ``scene``    who is who, what color, how many: attributes of four things each, to be told apart (the tasks);
* ``where``    who moved where, and where they were before;
* ``owner``    who holds what after things changed hands, and who had it first;
* ``follows``  what follows from a rule about a kind ("every baker likes plums", "Nora is a baker");
* ``count``    how many are left after some were added or taken away;
* ``order``    what was done first and last; ``list``: who has what, told twice;

with clauses between a subject and its verb that demand agreement, and plain filler prose made by
a small grammar, so that language modelling is not only templates.

A *combination* is the pair of words that decides an answer: ``("trade", kind, person)``, ``("pet", animal,
name)``, ``("color", thing, color)``, ``("amount", noun, number)``. A hash of the pair alone decides whether it is held
out (1 in 16). A document that contains a held-out pair never enters training or distillation text; the evaluation
tasks ask only about held-out pairs.

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
TASKS = ("trade", "pet", "color", "amount")
ITEMS_PER_TASK = 1000
SEEDS = {"train": 0, "distill": 1, "heldout": 2, "tasks": 3}
DISTILL_DOCUMENTS = 24_000
HELDOUT_DOCUMENTS = 700
SEPARATOR = "<|endoftext|>"

Combination = tuple[str, ...]

HE = ("Ben Carl Dan Eric Felix Gus Hugo Ivan Jack Karl Leo Max Ned Oscar Paul Ralph Sam Tom Victor Will").split()
SHE = ("Anna Beth Clara Dora Emma Fay Grace Helen Iris Jane Kate Lucy Mia Nora Olga Pam Rosa Sara Tina Vera").split()
NAMES = HE + SHE
PLACES = (
    "garden kitchen barn market library school river forest station harbor bakery church museum park theater "
    "hospital cellar attic meadow castle bridge mill tower cave"
).split()
THINGS = (
    "ball book lamp drum kite rope coin ring hat scarf knife spoon cup bowl clock mirror basket ladder hammer violin "
    "map letter pencil candle blanket bottle key flute"
).split()
COLORS = ["red", "blue", "green", "yellow", "black", "white", "brown", "gray", "purple", "golden", "silver", "pink"]
KINDS = "baker farmer sailor doctor teacher painter miller hunter singer tailor pilot gardener".split()
FOODS = ("plums bread cheese soup honey grapes nuts fish rice pears cake beans corn milk carrots apples").split()
COUNTED = "apples stones shells eggs coins buttons books flowers pears nuts feathers candles".split()
ANIMALS = ["dog", "cat", "horse", "goat", "duck", "sheep", "rabbit", "fox", "owl", "mouse", "donkey", "goose"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
CHORES = (
    "fed the cat|painted the fence|washed the floor|wrote a letter|baked a pie|swept the yard|mended a chair|"
    "watered the roses|chopped some wood|read a poem|cleaned the stove|counted the sheep|played a song|"
    "folded the shirts|fixed the gate|picked some berries"
).split("|")
MOVES = ("went to", "walked to", "ran to", "hurried to", "came to", "moved to")


@dataclass
class Document:
    """A story, its questions with their answers, and the combinations that decide them."""

    sentences: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    combinations: set[Combination] = field(default_factory=set)

    @property
    def story(self) -> str:
        return " ".join(self.sentences)

    def text(self) -> str:
        lines = [self.story]
        for question in self.questions:
            lead = f"{question.lead} " if question.lead else ""
            lines += [f"Question: {question.text}", f"Answer: {lead}{question.answer}{'.' if lead else ''}"]
        return "\n".join(lines)


@dataclass
class Question:
    text: str
    answer: str
    choices: list[str]
    combination: Combination | None = None  # set where a task may ask it
    statement: str = ""  # the answer as a sentence, for stories that sum up
    lead: str = ""  # the words of the answer before the one that is asked for


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


TRADES = (
    "shepherd weaver potter smith clerk guard nurse cook fisher carpenter writer judge merchant miner driver student "
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
            f"the {rng.choice(TRADES)}",
            f"the {rng.choice(['old', 'young', 'tall', 'kind', 'poor', 'rich'])} {rng.choice(TRADES)}",
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


# --- stories ---------------------------------------------------------------------------------


def scene_story(rng: random.Random, asked: str = "") -> Document:
    """People with a trade, animals with a name, things with a color or a number; the questions ask for these."""
    document = Document()
    others = [kind for kind in TASKS if kind != asked]
    kinds = [asked, rng.choice(others)] if asked else rng.sample(TASKS, 2)
    people = rng.sample(NAMES, 8)
    for kind in kinds:
        size = 4 if asked else rng.choice([2, 3, 4, 4])
        keys = {"trade": KINDS, "pet": ANIMALS, "color": THINGS, "amount": COUNTED}[kind]
        values = {"color": COLORS, "amount": NUMBERS[2:]}.get(kind) or [people.pop() for _ in range(size)]
        chosen = rng.sample(values, size)
        entries = [f"{key} {value}" for key, value in zip(rng.sample(keys, size), chosen, strict=True)]
        document.sentences += scene_sentences(kind, entries, rng)
        for entry in entries:
            key, value = entry.split()
            combination = (kind, key, value)
            document.combinations.add(combination)
            lead = f"The {key}" if kind in ("trade", "pet") else f"The list says {key}"
            document.questions.append(Question(scene_question(kind, key), value, chosen, combination, lead=lead))
    rng.shuffle(document.sentences)
    rng.shuffle(document.questions)
    return document


def scene_sentences(kind: str, entries: list[str], rng: random.Random) -> list[str]:
    """Key and value side by side: "the baker Nora came to the mill", "the list says rope green, cup golden"."""
    if kind in ("trade", "pet"):
        acts = ("came to", "slept in", "left", "liked", "waited near")
        return [f"The {entry} {rng.choice(acts)} the {rng.choice(PLACES)}." for entry in entries]
    cut = rng.randint(1, len(entries))
    return [f"The list says {', '.join(part)}." for part in (entries[:cut], entries[cut:]) if part]


def scene_question(kind: str, key: str) -> str:
    return {
        "trade": f"Who was the {key}?",
        "pet": f"What was the {key} called?",
        "color": f"What color was the {key}?",
        "amount": f"How many {key} were there?",
    }[kind]


def where_story(rng: random.Random) -> Document:
    """People move between places; the questions ask where they are and where they were before."""
    document = Document()
    people = rng.sample(NAMES, rng.choice([1, 2, 2, 3, 3]))
    path: dict[str, list[str]] = {name: [] for name in people}
    moves = people + [rng.choice(people) for _ in range(rng.choice([1, 2, 3]))]
    if all(moves.count(name) == 1 for name in people):
        moves.append(people[0])
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
    everywhere = [place for places in path.values() for place in places]
    for name in people:
        places = path[name]
        statement = f"So {name} is in the {places[-1]} now."
        document.questions.append(Question(f"Where is {name} now?", places[-1], everywhere, statement=statement))
        if len(places) > 1:
            text = f"Where was {name} before the {places[-1]}?"
            document.questions.append(Question(text, places[-2], everywhere))
    return document


def owner_story(rng: random.Random) -> Document:
    """Things change hands; the questions ask who has them, who had them first, and who has what."""
    document = Document()
    people = rng.sample(NAMES, 4)
    things = rng.sample(THINGS, rng.choice([2, 2, 3]))
    history: dict[str, list[str]] = {}
    for thing, owner in zip(things, rng.sample(people, len(things)), strict=True):
        history[thing] = [owner]
        color = rng.choice(["", rng.choice(COLORS) + " "])
        if color:
            document.combinations.add(("color", thing, color.strip()))
        article = "an" if not color and thing[0] in "aeiou" else "a"
        document.sentences.append(
            rng.choice(
                [f"{owner} had {article} {color}{thing}.", f"There was {article} {color}{thing}, and {owner} had it."]
            )
        )
    for thing in things + [rng.choice(things) for _ in range(rng.choice([0, 1, 1]))]:
        giver = history[thing][-1]
        taker = rng.choice([p for p in people if p not in history[thing]])
        lead = rng.choice(["", "", "then ", "later "])
        document.sentences.append(
            capital(
                lead
                + rng.choice(
                    [
                        f"{giver} gave the {thing} to {taker}.",
                        f"{giver} handed the {thing} to {taker}.",
                        f"{taker} took the {thing} from {giver}.",
                        f"{taker} bought the {thing} from {giver}.",
                        f"{giver} sold the {thing} to {taker}.",
                    ]
                )
            )
        )
        history[thing].append(taker)
    for thing, owners in history.items():
        statement = f"So {owners[-1]} has the {thing} now."
        document.questions.append(Question(f"Who has the {thing} now?", owners[-1], people, statement=statement))
        document.questions.append(Question(f"Who had the {thing} first?", owners[0], people))
    return document


def follows_story(rng: random.Random) -> Document:
    """Rules about kinds and people of those kinds; the answer needs both."""
    document = Document()
    size = rng.choice([2, 3, 3, 4, 4])
    kinds, people, foods = rng.sample(KINDS, size), rng.sample(NAMES, size), rng.sample(FOODS, size)
    likes = rng.choice(["likes", "eats", "sells"])
    plain = {"likes": "like", "eats": "eat", "sells": "sell"}[likes]
    rules = [f"{rng.choice(['Every', 'Each'])} {kind} {likes} {food}." for kind, food in zip(kinds, foods, strict=True)]
    facts = [
        rng.choice([f"{name} is a {kind}.", f"{name} works as a {kind}."])
        for name, kind in zip(people, kinds, strict=True)
    ]
    if rng.random() < 0.5:
        rng.shuffle(rules)
        rng.shuffle(facts)
        document.sentences = rules + facts if rng.random() < 0.5 else facts + rules
    else:
        document.sentences = rules + facts
        rng.shuffle(document.sentences)
    for name, kind, food in zip(people, kinds, foods, strict=True):
        statement = f"So {name}, the {kind}, {likes} {food}."
        document.questions.append(Question(f"What does {name} {plain}?", food, foods, statement=statement))
        document.questions.append(Question(f"Who is the {kind}?", name, people))
    rng.shuffle(document.questions)
    return document


def count_story(rng: random.Random) -> Document:
    """Two people have some of something, each number changes once; how many are left?"""
    document = Document()
    people, nouns = rng.sample(NAMES, 2), rng.sample(COUNTED, 2)
    starts, changes = [], []
    for name, noun in zip(people, nouns, strict=True):
        first = rng.randint(2, 8)
        change = rng.choice([value for value in range(-min(first, 5), 5) if value])
        shown = f"{NUMBERS[abs(change)]} {'more' if change > 0 else 'of them'}"
        starts.append(f"{name} had {NUMBERS[first]} {noun}.")
        verb = rng.choice(["found", "bought", "got"]) if change > 0 else rng.choice(["lost", "sold", "gave away"])
        changes.append(capital(f"{rng.choice(['', 'then ', 'later '])}{name} {verb} {shown}."))
        answer = first + change
        document.combinations |= {("amount", noun, NUMBERS[first]), ("amount", noun, NUMBERS[answer])}
        near = [
            v for v in {first, answer - 1, answer + 1, answer + 2, answer - 2, first - change} if 0 <= v < len(NUMBERS)
        ]
        document.questions.append(
            Question(
                f"How many {noun} does {name} have now?",
                NUMBERS[answer],
                [NUMBERS[v] for v in near],
                statement=f"So {name} has {NUMBERS[answer]} {noun[:-1] if answer == 1 else noun} now.",
            )
        )
        document.questions.append(
            Question(f"How many {noun} did {name} have first?", NUMBERS[first], [NUMBERS[v] for v in near])
        )
    order = rng.choice([0, 1])
    document.sentences = starts + rng.sample(changes, 2) if order else [starts[0], changes[0], starts[1], changes[1]]
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
        Question(f"What did {name} do first?", f"{name} {chores[0]}.", []),
        Question(f"What did {name} do last?", f"{name} {chores[-1]}.", []),
    ]
    return document


def list_story(rng: random.Random) -> Document:
    """Who has what, told twice in different orders: the plainest exercise in remembering."""
    count = rng.choice([1, 2, 2, 3, 3, 4, 5, 6])
    pairs = list(zip(rng.sample(NAMES, count), rng.sample(THINGS, count), strict=True))
    first = [f"{name} has the {thing}." for name, thing in pairs]
    again = rng.sample(first, count)
    middle = rng.choice(["Once more:", "Let us say it again.", "Remember:"])
    document = Document([*first, middle, *again])
    for name, thing in rng.sample(pairs, min(count, 3)):
        document.questions.append(Question(f"What does {name} have?", thing, []))
    return document


CONNECTIVES = (" ", " ", " ", " ", " was ", " had ", " was called ")


def chant(rng: random.Random) -> Document:
    """A row of words said twice: nothing helps but to look up what came after the words before."""
    words = rng.choice([KINDS + FOODS, THINGS, NAMES, NUMBERS + COLORS, COUNTED + PLACES])
    between = rng.choice(CONNECTIVES)
    row = between.join(rng.choice(words) for _ in range(rng.randint(6, 30) // len(between.split(" ")[1:]) + 2))
    return Document([f"Say: {row}.", f"Again: {row}."])


def pairs(rng: random.Random) -> Document:
    """Pairs of words said twice, the second time in another order: one word of a pair tells the other."""
    left, right = rng.choice(
        [(NAMES, PLACES), (KINDS, FOODS), (THINGS, PLACES), (ANIMALS, COLORS), (NAMES, THINGS), (THINGS, NAMES)]
    )
    count = rng.choice([2, 3, 4, 5, 6, 8, 10])
    between = rng.choice(CONNECTIVES)
    start = rng.choice(["", "The "])
    told = [f"{start}{a}{between}{b}." for a, b in zip(rng.sample(left, count), rng.sample(right, count), strict=True)]
    return Document([*told, "Again:", *rng.sample(told, count)])


def prose(rng: random.Random) -> Document:
    return Document([filler(rng) for _ in range(rng.randint(4, 9))])


STORIES: dict[str, Callable[[random.Random], Document]] = {
    "scene": scene_story,
    "where": where_story,
    "owner": owner_story,
    "follows": follows_story,
    "count": count_story,
    "order": order_story,
    "list": list_story,
    "chant": chant,
    "pairs": pairs,
    "prose": prose,
}
WEIGHTS = {
    "scene": 50,
    "where": 6,
    "owner": 6,
    "follows": 6,
    "count": 6,
    "order": 4,
    "list": 6,
    "chant": 10,
    "pairs": 0,
    "prose": 6,
}

#: For the plain documents with which the teacher's training begins: above all, looking things up.
PLAIN_WEIGHTS = {"chant": 100, "pairs": 50, "prose": 0}


def add_filler(document: Document, rng: random.Random) -> None:
    """Put up to three filler sentences between those of the story, never before a pronoun."""
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        spots = [
            index
            for index, sentence in enumerate([*document.sentences, ""])
            if not {"he", "she", "He", "She"} & set(sentence.split())
        ]
        document.sentences.insert(rng.choice(spots), filler(rng))


def make(kind: str, rng: random.Random, plain: bool = False) -> Document:
    document = STORIES[kind](rng)
    if kind not in ("prose", "chant", "pairs") and not plain:
        add_filler(document, rng)
    return document


def documents(split: str, count: int, start: int = 0, plain: bool = False) -> Iterator[Document]:
    """`count` documents of a split, none containing a held-out combination; `plain` ones have no filler.

    Document i depends on the split, i and `plain` alone, so any part can be made again on its own.
    """
    table = WEIGHTS | PLAIN_WEIGHTS if plain else WEIGHTS
    kinds, weights = list(table), list(table.values())
    for index in range(start, start + count):
        rng = random.Random(SEEDS[split] * 1_000_000_007 + index)
        while True:
            document = make(rng.choices(kinds, weights)[0], rng, plain)
            if not any(held_out(combination) for combination in document.combinations):
                break
        rng.shuffle(document.questions)
        if rng.random() < 0.3:
            document.sentences += [question.statement for question in document.questions if question.statement]
            rng.shuffle(document.questions)
        del document.questions[6:]
        yield document


def items(task: str, count: int, split: str = "tasks") -> list[dict]:
    """Multiple-choice items about held-out combinations: passage, question, choices, gold, combination.

    The choices are the four values of that kind in the story, so that none can be ruled out by not being there.
    """
    rng = random.Random(f"{SEEDS[split]} {task}")
    rows: list[dict] = []
    seen: set[str] = set()
    while len(rows) < count:
        document = scene_story(rng, task)
        add_filler(document, rng)
        pairs = [q for q in document.questions if q.combination and q.combination[0] == task]
        asked = [q for q in pairs if held_out(q.combination or ())]
        if not asked or document.story in seen:
            continue
        seen.add(document.story)
        question = rng.choice(asked)
        choices = rng.sample(question.choices, 4)
        rows.append(
            {
                "passage": document.story,
                "question": question.text,
                "lead": question.lead,
                "choices": choices,
                "gold": choices.index(question.answer),
                "combination": list(question.combination or ()),
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
