"""Calls of tools in what a model writes: each family of chat templates has its own way to write them.

- *hermes* (Qwen, Hermes, and others): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times;
- *mistral*: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}` in newer templates;
- *llama3*: the whole answer is `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`, several
  separated by semicolons.

What looks like a call and is none stays text: nothing that the model wrote is lost. In a stream, a call of a function
that there is begins as soon as its name is written, and its arguments follow as they are; one that breaks off leaves
them as far as they came.
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
#: A call as far as its arguments, which are an object: with group 1, its name.
OPENING = re.compile(
    r'\s*\[?\s*\{\s*"name"\s*:\s*"([a-zA-Z0-9_.-]{1,128})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
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


@dataclass(frozen=True)
class CallDelta:
    """What a stream adds to a call.

    Attributes:
        index: of the call, in the message.
        arguments: what was written of them since the last one.
        call: with the first one of a call, its name and identifier.
    """

    index: int
    arguments: str
    call: ToolCall | None = None

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        begun = self.call.body() if self.call is not None else {"function": {}}
        return {"index": self.index, **begun, "function": {**begun["function"], "arguments": self.arguments}}


class ArgumentStream:
    """The arguments of one call while it is written.

    Args:
        kind: of the template.
        names: of the functions that there are.
        index: of the call, in the message.

    Attributes:
        given: characters of the call's text that deltas cover; 0: its name is not known yet, or it has none.
    """

    def __init__(self, kind: Kind, names: Collection[str], index: int) -> None:
        self.kind, self.names, self.index = kind, names, index
        self.given = 0
        self._depth, self._in_string, self._escaped, self._complete = 0, False, False, False

    def read(self, words: str) -> list[CallDelta]:
        """What is new in the text of the call, which begins behind the mark and has grown since the last time."""
        call = None
        if not self.given:
            name = OPENING.match(words)
            if name is None and self.kind == "mistral":
                name = NAMED_ARGUMENTS.match(words)
            if name is None or name[1] not in self.names:
                return []
            call, self.given = ToolCall(name[1], ""), name.end()
        begin = self.given
        while self.given < len(words) and not self._complete:
            self._step(words[self.given])
            self.given += 1
        arguments = words[begin : self.given]
        return [CallDelta(self.index, arguments, call)] if arguments or call else []

    def _step(self, character: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        else:
            self._depth += (character in "{[") - (character in "}]")
            self._complete = self._depth == 0


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
        stream: whether calls are given out as they are written, by `take_deltas`.
    """

    def __init__(self, kind: Kind, names: Collection[str], stream: bool = False) -> None:
        self.kind, self.names, self.stream = kind, names, stream
        self.calls: list[ToolCall] = []
        self._deltas: list[CallDelta] = []
        self._arguments = ArgumentStream(kind, names, 0)
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
                self._read_arguments(self._text)
                return content, self.calls[before:]
            words, _, self._text = self._text.partition(CLOSING)
            call = one_call(load(words.removeprefix(MARKS["hermes"])))
            self._read_arguments(words)
            self._inside = False
            if call is None:
                content += self._text_of(f"{words}{CLOSING}")
            self._end_calls([call] if call is not None else [])

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest, now that no more text comes."""
        before, rest = len(self.calls), self._text
        self._text = ""
        if self._inside:
            calls = self._calls_of(rest)
            content = "" if calls else self._text_of(rest)
            self._end_calls(calls)
            return content, self.calls[before:]
        return ("" if self.calls and not rest.strip() else rest), []

    def take_deltas(self) -> list[CallDelta]:
        """What is new of calls, where they are streamed."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def _read_arguments(self, words: str) -> None:
        """Stream what is new of the call whose text, from its mark on, is given."""
        if self.stream and self._inside:
            self._deltas += self._arguments.read(words.removeprefix(MARKS[self.kind]))

    def _text_of(self, words: str) -> str:
        """What is left for people of what is no call; of one that was streamed, what follows its arguments."""
        given = self._arguments.given
        return words.removeprefix(MARKS[self.kind])[given:].strip() if given else self._blanks + words

    def _end_calls(self, calls: Sequence[ToolCall]) -> None:
        """Note calls that are complete, the first of which may have been streamed."""
        unseen = calls[1:] if self._arguments.given else calls
        first = self._arguments.index + len(calls) - len(unseen)
        if self.stream:
            self._deltas += [CallDelta(index, call.arguments, call) for index, call in enumerate(unseen, first)]
        self.calls += calls
        begun = self._arguments.index + max(len(calls), bool(self._arguments.given))
        self._arguments = ArgumentStream(self.kind, self.names, begun)

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
