"""Calls of tools in what a model writes: each family of chat templates has its own way to write them.

- *hermes* (Qwen, Hermes, and others): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times;
- *mistral*: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}` in newer templates;
- *llama3*: the whole answer is `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`, several
  separated by semicolons.

What looks like a call and is none stays text: nothing that the model wrote is lost.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["hermes", "mistral", "llama3"]
#: What opens a call, by the kind of template, and how forced calls begin; closing marks of hermes.
MARKS: dict[Kind, str] = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": "<|python_tag|>"}
CLOSING = "</tool_call>"
FORCED: dict[Kind, str] = {"hermes": "<tool_call>\n", "mistral": "[TOOL_CALLS]", "llama3": ""}
NAMED_ARGUMENTS = re.compile(r"\s*([a-zA-Z0-9_.-]{1,128})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True)
class ToolCall:
    """A call: the function's name, and its arguments as JSON."""

    name: str
    arguments: str
    identifier: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.identifier, "type": "function", "function": function}


def kind_of(template: str) -> Kind:
    """How a chat template writes calls; hermes where it does not say."""
    if MARKS["hermes"] in template:
        return "hermes"
    if MARKS["mistral"] in template:
        return "mistral"
    return "llama3" if "python_tag" in template or '"parameters"' in template else "hermes"


class CallReader:
    """Text as it comes -> text for people, and calls.

    Args:
        kind: of the template.
        names: of the functions that there are.
    """

    def __init__(self, kind: Kind, names: Collection[str]) -> None:
        self.kind, self.names = kind, names
        self.calls: list[ToolCall] = []
        self._text = ""  # not given out yet
        self._inside = False  # of a call, or of what may be one
        self._blanks = ""  # before it
        self._begun = False  # there was text before

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text that is certainly none of a call, and the calls that are complete."""
        self._text += text
        before, content = len(self.calls), ""
        while True:
            if not self._inside:
                content += self._outside()
            if not self._inside or self.kind != "hermes" or CLOSING not in self._text:
                return content, self.calls[before:]
            words, _, self._text = self._text.partition(CLOSING)
            call = one_call(load(words.removeprefix(MARKS["hermes"])))
            self._inside = False
            if call is None:
                content += f"{self._blanks}{words}{CLOSING}"
            else:
                self.calls.append(call)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest, now that no more text comes."""
        before, rest = len(self.calls), self._text
        self._text = ""
        if self._inside:
            calls = self._calls_of(rest)
            self.calls += calls
            return ("" if calls else self._blanks + rest), self.calls[before:]
        return ("" if self.calls and not rest.strip() else rest), []

    def _outside(self) -> str:
        """The text before the next call; none that may be its beginning, nor blanks before it."""
        mark = MARKS[self.kind]
        place = self._text.find(mark)
        if self.kind == "llama3" and place < 0 and not self._begun and self._text.lstrip().startswith("{"):
            place = len(self._text) - len(self._text.lstrip())
        if place >= 0:
            self._inside = True
            content, self._text = self._text[:place], self._text[place:]
            self._blanks = content[len(content.rstrip()) :]
        else:
            lengths = range(min(len(mark) - 1, len(self._text)), 0, -1)
            held = next((count for count in lengths if mark.startswith(self._text[-count:])), 0)
            content = self._text[: len(self._text) - held].rstrip()
            self._text = self._text[len(content) :]
        content = content.rstrip()
        self._begun = self._begun or bool(content)
        return content

    def _calls_of(self, text: str) -> list[ToolCall]:
        """The calls in all that follows the mark; none unless the whole of it is calls."""
        words = text.removeprefix(MARKS[self.kind]).strip()
        if self.kind == "mistral":
            return mistral_calls(words)
        calls = [one_call(value) for value in several(words)]
        known = [call for call in calls if call is not None and (self.kind == "hermes" or call.name in self.names)]
        return known if len(known) == len(calls) else []


def mistral_calls(words: str) -> list[ToolCall]:
    """The calls behind Mistral's mark, in either way of writing them."""
    if words.startswith("["):
        values = load(words)
        calls = [one_call(value) for value in values] if isinstance(values, list) else []
        known = [call for call in calls if call is not None]
        return known if len(known) == len(calls) else []
    calls_by_name = []
    for part in filter(None, (part.strip() for part in words.split(MARKS["mistral"]))):
        name = NAMED_ARGUMENTS.match(part)
        arguments = load(part[name.end() :]) if name else None
        if name is None or not isinstance(arguments, dict):
            return []
        calls_by_name.append(ToolCall(name[1], dumps(arguments)))
    return calls_by_name


def forced_call(text: str) -> ToolCall | None:
    """The call in an answer that a grammar made one; None where it was cut off."""
    value = load(text)
    return one_call(value[0] if isinstance(value, list) and value else value)


def forced_schema(kind: Kind, functions: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The JSON schema of an answer that has to be a call.

    Args:
        kind: of the template.
        functions: name and parameters of those that may be called.
    """
    key = "parameters" if kind == "llama3" else "arguments"
    calls = []
    definitions: dict[str, Any] = {}
    for name, parameters in functions:
        own = dict(parameters)
        for place in ("$defs", "definitions"):  # references lead to the top
            definitions.setdefault(place, {}).update(own.pop(place, {}))
        properties = {"name": {"const": name}, key: own or {"type": "object"}}
        calls.append(
            {"type": "object", "properties": properties, "required": ["name", key], "additionalProperties": False}
        )
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if kind == "mistral" else call
    return {**schema, **{place: values for place, values in definitions.items() if values}}


# JSON that a model wrote ---------------------------------------------------------------------------------------------


def load(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def several(text: str) -> list[Any]:
    """The values of a text of several, separated by semicolons or blanks; [None] where it is none."""
    values, decoder = [], json.JSONDecoder()
    place = 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return [None]
        values.append(value)
        while place < len(text) and text[place] in "; \n\t\r":
            place += 1
    return values or [None]


def one_call(value: Any) -> ToolCall | None:
    """The call that a value is, if it is one."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str) and isinstance(load(arguments), dict):
        return ToolCall(value["name"], arguments)
    return ToolCall(value["name"], dumps(arguments)) if isinstance(arguments, dict) else None


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
