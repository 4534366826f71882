"""Items from a local JSONL file, for a task of lm-eval's registry.

A file holds rows with lm-eval's own fields (those of the data set on the hub), or rows of the simple form that many
evaluation kits use:

    {"query": "Question: Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"], "gold": 1}

A simple row is turned back into the fields that the registry task expects, and the task's own prompt is applied to
it. So the bytes the model sees are those of the registry, whatever the file looks like: kits that write "Question: "
into the query (ARC, PIQA) or break the line after it (PIQA) do not have it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgerazor import untrusted
from edgerazor.errors import UserError
from edgerazor.untrusted.pictures import picture_of_part

SIMPLE = ("query", "choices", "gold")
Row = dict[str, Any]


@dataclass(frozen=True)
class Items:
    """The items of one local file, in a registry task's fields.

    Args:
        rows: the documents.
        overrides: settings of the registry task that no longer apply.
        note: what a reader of the result should know about the prompt.
    """

    rows: list[Row]
    overrides: dict[str, Any]
    note: str = ""


def _question(query: str) -> str:
    """The bare question of a query that may carry the prompt's own beginning and end."""
    return query.removeprefix("Question: ").removesuffix("\n").removesuffix("\nAnswer:")


def _lettered(query: str, choices: list[str], gold: int) -> tuple[str, Row, str]:
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    return _question(query), {"text": choices, "label": letters}, letters[gold]


def _arc(query: str, choices: list[str], gold: int) -> Row:
    question, options, answer = _lettered(query, choices, gold)
    return {"question": question, "choices": options, "answerKey": answer}


def _openbookqa(query: str, choices: list[str], gold: int) -> Row:
    question, options, answer = _lettered(query, choices, gold)
    return {"question_stem": question, "choices": options, "answerKey": answer}


def _piqa(query: str, choices: list[str], gold: int) -> Row:
    return {"goal": _question(query), "sol1": choices[0], "sol2": choices[1], "label": gold}


def _hellaswag(query: str, choices: list[str], gold: int) -> Row:
    return {"query": query, "choices": choices, "gold": gold, "label": str(gold)}


#: task -> (how a simple row becomes the task's fields, number of choices or None, overrides, note)
CONVERSIONS: dict[str, tuple[Callable[[str, list[str], int], Row], int | None, dict[str, Any], str]] = {
    "arc_easy": (_arc, None, {}, ""),
    "arc_challenge": (_arc, None, {}, ""),
    "openbookqa": (_openbookqa, None, {}, ""),
    "piqa": (_piqa, 2, {}, ""),
    # A simple row holds HellaSwag's text after the registry's clean-up, which must not be done twice: it would
    # strip the blank that it left before some endings.
    "hellaswag": (_hellaswag, None, {"process_docs": None}, "query and endings are taken as already cleaned up"),
}


def read(path: Path, task: str) -> Items:
    """Read the items of a task.

    Args:
        path: a JSONL file.
        task: name in lm-eval's registry.

    Raises:
        UserError: unreadable, not JSONL, empty, rows that differ in their fields, or a simple row that is wrong or
            that this task has no conversion for.
    """
    rows = read_rows(path)
    if not set(SIMPLE) <= set(rows[0]):
        _same_fields(rows, path)
        return Items(rows, {})
    if task not in CONVERSIONS:
        raise UserError(
            f"{path} has query/choices/gold rows, which are understood for {', '.join(CONVERSIONS)} only, not for "
            f"{task}.",
            f"Give rows with the fields of {task}'s own data set.",
        )
    convert, count, overrides, note = CONVERSIONS[task]
    converted = [convert(*_checked(row, count, path, number)) for number, row in enumerate(rows, 1)]
    return Items(converted, overrides, note)


def with_pictures(items: Items, path: Path) -> Items:
    """Items whose pictures, parts `{type: image, path | base64}` as in chats, are read.

    Args:
        items: of a file.
        path: of that file, beside which the pictures lie.

    Raises:
        UserError: as `untrusted.pictures.picture_of_part`.
    """
    rows = []
    for number, row in enumerate(items.rows, 1):
        shown = {name: value for name, value in row.items() if isinstance(value, dict) and value.get("type") == "image"}
        where = f"item {number} of {path}, {{}},"
        read = {name: picture_of_part(where.format(name), part, path.parent) for name, part in shown.items()}
        rows.append({**row, **read})
    return replace(items, rows=rows)


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSONL file, at least one; blank lines are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text, so it holds no task items.") from None
    except OSError as error:
        raise UserError(f"The task items {path} cannot be read: {error.strerror}.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = untrusted.parse_json(line)
        except ValueError:
            raise UserError(f"Line {number} of {path} is not valid JSON.") from None
        if not isinstance(row, dict):
            raise UserError(f"Line {number} of {path} is not a JSON object.")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no items.")
    return rows


def _same_fields(rows: list[Row], path: Path) -> None:
    for number, row in enumerate(rows, 1):
        if lacking := [name for name in rows[0] if name not in row]:
            raise UserError(f"Item {number} of {path} has no field {lacking[0]!r}, which the first item has.")


def _checked(row: Row, count: int | None, path: Path, number: int) -> tuple[str, list[str], int]:
    """Query, choices and gold of a simple row."""
    query, choices, gold = (row.get(name) for name in SIMPLE)
    if not isinstance(query, str) or not query:
        raise UserError(f"Item {number} of {path}: `query` must be a text that is not empty.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"Item {number} of {path}: `choices` must be a list of at least two texts.")
    if count is not None and len(choices) != count:
        raise UserError(f"Item {number} of {path}: this task has {count} choices, the item has {len(choices)}.")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise UserError(f"Item {number} of {path}: `gold` must be a number from 0 to {len(choices) - 1}.")
    return query, choices, gold
