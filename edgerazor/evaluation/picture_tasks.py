"""Questions about pictures with answers to choose from, scored by log-likelihood.

An item is a JSON object with `image` (a file beside the JSON lines, or base64), `question`, `choices` and `gold`, the
number of the right one. The model is shown the picture and asked the question in its own chat template; the answer is
right if it is the most probable of the choices, its tokens and the end of the turn together.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgerazor import data, models, runtime, tasks
from edgerazor.console import Console
from edgerazor.data import Conversation
from edgerazor.errors import UserError, usage_error
from edgerazor.evaluation.evaluated_model import EvaluatedModel
from edgerazor.pictures import PictureReader

#: Items whose choices are scored in one call of an engine.
ITEMS_AT_ONCE = 16


@dataclass(frozen=True)
class PictureItem:
    """A question about a picture.

    Attributes:
        conversation: the user's turn.
        choices: answers.
        gold: number of the right one.
    """

    conversation: Conversation
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class PictureTask:
    """The items of a file.

    Attributes:
        entry: as of other tasks: name, file, number of items, chance.
        items: in their order.
    """

    entry: tasks.LoadedTask
    items: tuple[PictureItem, ...]


def load(places: Sequence[str], limit: int | None) -> list[PictureTask]:
    """The tasks of some files and folders: a folder has one in each of its `.jsonl` files.

    Args:
        places: paths.
        limit: most items of a task; None for all.

    Raises:
        UserError: there is no such place, no file in it, or a row is no item.
    """
    loaded = [_task(file, limit) for place in places for file in files_of(place)]
    names = [task.entry.name for task in loaded]
    for name in names:
        if names.count(name) > 1:
            raise usage_error(f"Two files of questions about pictures are called {name}.", "Rename one of them.")
    return loaded


def files_of(place: str) -> list[Path]:
    """The files of questions at a place.

    Raises:
        UserError: there are none.
    """
    path = Path(place)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise usage_error(f"There are no questions about pictures at {place}.", "Give a .jsonl file, or their folder.")
    return files


def _task(file: Path, limit: int | None) -> PictureTask:
    rows = tasks.read_rows(file)
    items = tuple(_item(row, file, number) for number, row in enumerate(rows[:limit], 1))
    chance = sum(1 / len(item.choices) for item in items) / len(items)
    entry = tasks.LoadedTask(file.stem, None, str(file), len(items), len(items) == len(rows), chance, "")
    return PictureTask(entry, items)


def _item(row: dict[str, Any], file: Path, number: int) -> PictureItem:
    where = f"item {number} of {file}"
    image, question, choices, gold = (row.get(name) for name in ("image", "question", "choices", "gold"))
    if not isinstance(image, str) or not isinstance(question, str) or not question:
        raise UserError(f"{where.capitalize()} needs `image`, a file or base64, and `question`, a text.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where.capitalize()}: `choices` must be a list of at least two texts.")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise UserError(f"{where.capitalize()}: `gold` must be a number from 0 to {len(choices) - 1}.")
    part = {"type": "image", "base64" if _is_base64(image) else "path": image}
    message = {"role": "user", "content": [part, {"type": "text", "text": question}]}
    return PictureItem(data.parse_conversation(where, [message], None, file.parent), tuple(choices), gold)


def _is_base64(text: str) -> bool:
    """Whether a text is the bytes of a picture, and not a name: names of files have a dot."""
    try:
        return "." not in text and bool(base64.b64decode(text[:64], validate=True))
    except (binascii.Error, ValueError):
        return False


def score(
    evaluated: EvaluatedModel, task: PictureTask, reader: PictureReader, console: Console, blind: bool = False
) -> tasks.TaskScore:
    """The share of items that a model answers right.

    Args:
        evaluated: of the runtime or of transformers.
        task: what it is asked.
        reader: of pictures, for this model.
        console: shows the progress.
        blind: take the features of pictures away: what the questions alone tell.
    """
    right = 0
    title = f"{task.entry.name}, {evaluated.title}{', blind' if blind else ''}"
    with console.track(title, len(task.items)) as tracker, evaluated.seeing(models.BLIND if blind else ""):
        for first in range(0, len(task.items), ITEMS_AT_ONCE):
            items = task.items[first : first + ITEMS_AT_ONCE]
            requests = [(reader.prompt(item.conversation), _answers(item, reader)) for item in items]
            for item, scores in zip(items, _scores(evaluated, requests), strict=True):
                right += max(range(len(scores)), key=scores.__getitem__) == item.gold
                tracker.advance()
    share = right / len(task.items)
    error = math.sqrt(share * (1 - share) / max(1, len(task.items) - 1))
    return tasks.TaskScore(share, error, "acc", True)


def _answers(item: PictureItem, reader: PictureReader) -> list[list[int]]:
    """The tokens of each choice, with the end of the turn."""
    return [reader.answer(item.conversation, choice) for choice in item.choices]


def _scores(evaluated: EvaluatedModel, requests: list[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
    """Log-probabilities of the answers to each prompt."""
    if isinstance(evaluated.model, runtime.Model):
        scored = evaluated.model.score(requests)
    else:
        checked = [
            runtime.ScoreRequest(prompt, answers, [len(answer) for answer in answers]) for prompt, answers in requests
        ]

        def logits(tokens: Tensor, last: int) -> Tensor:
            model = evaluated.model
            with torch.inference_mode():
                output = model(tokens.to(model.device), use_cache=False, logits_to_keep=last).logits
            computed: Tensor = output[:, -last:].float().cpu()
            return computed

        scored = runtime.score_whole(checked, logits)
    return [[one.log_probability for one in scores] for scores in scored]
