"""Calls of tools in the text of a model, in whatever pieces it comes; and the names of single tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from edgerazor.server.token_text import TokenTexts
from edgerazor.server.tool_calls import CallReader, Kind, forced_call, forced_schema, kind_of

ROME, BERN = {"city": "Rome"}, {"city": "Bern"}


def read(kind: Kind, text: str, size: int) -> tuple[str, list[tuple[str, Any]]]:
    """What a reader makes of a text that comes in pieces of a size."""
    reader = CallReader(kind, {"weather"})
    content, calls = "", []
    for start in range(0, len(text), size):
        more, new = reader.push(text[start : start + size])
        content, calls = content + more, calls + new
    more, new = reader.finish()
    return content + more, [(call.name, json.loads(call.arguments)) for call in calls + new]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [
        ("hermes", "Hello there.", "Hello there.", []),
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "", [ROME]),
        (
            "hermes",
            'Both.\n<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>\n'
            '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Bern\\"}"}</tool_call>\n',
            "Both.",
            [ROME, BERN],
        ),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}', "", [ROME]),
        ("hermes", "<tool_call>no JSON</tool_call> after", "<tool_call>no JSON</tool_call> after", []),
        ("hermes", "a < b, <tool_", "a < b, <tool_", []),
        ("hermes", "<tool_call>[1]", "<tool_call>[1]", []),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]', "", [ROME]),
        (
            "mistral",
            'Yes.[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]weather{"city": "Bern"}',
            "Yes.",
            [ROME, BERN],
        ),
        ("mistral", "[TOOL_CALLS]nothing", "[TOOL_CALLS]nothing", []),
        ("llama3", '{"name": "weather", "parameters": {"city": "Rome"}}', "", [ROME]),
        (
            "llama3",
            '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}; '
            '{"name": "weather", "parameters": {"city": "Bern"}}',
            "",
            [ROME, BERN],
        ),
        ("llama3", '{"a": 1}', '{"a": 1}', []),
        ("llama3", '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        ("llama3", "It is {warm}.", "It is {warm}.", []),
    ],
)
def test_calls_and_the_text_around_them(kind: Kind, text: str, content: str, calls: list[Any], size: int) -> None:
    assert read(kind, text, size) == (content, [("weather", arguments) for arguments in calls])


def streamed(kind: Kind, text: str, size: int) -> tuple[str, list[list[str]], list[int]]:
    """What is streamed of a text in pieces of a size: the text for people, the parts of the arguments of each call, and
    after which piece each call began."""
    reader = CallReader(kind, {"weather"}, stream=True)
    content, parts, begun = "", [], []
    for start in range(0, len(text) + size, size):
        content += (reader.push(text[start : start + size]) if start < len(text) else reader.finish())[0]
        for delta in reader.take_deltas():
            if delta.call is not None:
                assert delta.call.name == "weather"
                assert delta.index == len(parts)
                parts.append([])
                begun.append(start)
            assert delta.index == len(parts) - 1
            parts[delta.index].append(delta.arguments)
    return content, parts, begun


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("kind", "text", "content", "arguments"),
    [
        (
            "hermes",
            'Both.\n<tool_call>{"name": "weather", "arguments": {"city": "R{]\\"ome"}}</tool_call>\n'
            '<tool_call>{"arguments": {"city": "Bern"}, "name": "weather"}</tool_call>\n',
            "Both.",
            ['{"city": "R{]\\"ome"}', '{"city": "Bern"}'],
        ),
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro', "", ['{"city": "Ro']),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {}} or so</tool_call>', "} or so</tool_call>", ["{}"]),
        ("hermes", "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]', "", ['{"city": "Rome"}']),
        (
            "mistral",
            'Yes.[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]weather{"city": "Bern"}',
            "Yes.",
            ['{"city": "Rome"}', '{"city": "Bern"}'],
        ),
        (
            "llama3",
            '{"name": "weather", "parameters": {"a": [{}]}}; {"name": "weather", "parameters": {"city": "Bern"}}',
            "",
            ['{"a": [{}]}', '{"city": "Bern"}'],
        ),
        ("llama3", '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ],
)
def test_calls_in_a_stream(kind: Kind, text: str, content: str, arguments: list[str], size: int) -> None:
    shown, parts, begun = streamed(kind, text, size)
    assert (shown, ["".join(of_call) for of_call in parts]) == (content, arguments)
    if size == 1 and arguments:
        assert len(parts[0]) >= len(arguments[0])
        assert begun[0] < text.index(arguments[0][:1], text.index("weather")) + 2


def test_the_kind_is_that_of_the_template() -> None:
    assert kind_of("{{ '<tool_call>' }}") == "hermes"
    assert kind_of("[TOOL_CALLS]") == "mistral"
    assert kind_of('{"name": function name, "parameters": dictionary}') == "llama3"
    assert kind_of("nothing of it") == "hermes"


def test_schemas_of_calls_that_have_to_be() -> None:
    parameters = {
        "type": "object",
        "$defs": {"town": {"type": "string"}},
        "properties": {"city": {"$ref": "#/$defs/town"}},
    }
    one = forced_schema("hermes", [("weather", parameters)])
    assert one["properties"]["name"] == {"const": "weather"}
    assert one["$defs"] == {"town": {"type": "string"}}
    assert "$defs" not in one["properties"]["arguments"]
    two = forced_schema("llama3", [("a", {}), ("b", {})])
    assert [call["required"] for call in two["anyOf"]] == [["name", "parameters"]] * 2
    assert forced_schema("mistral", [("a", {})])["type"] == "array"
    call = forced_call('[{"name": "a", "arguments": {}}]')
    assert call is not None
    assert call.name == "a"
    assert forced_call('{"name": "a", "argu') is None


def test_names_of_tokens_say_their_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = TokenTexts(tokenizer)
    ids = tokenizer("Nora \u2603")["input_ids"]
    assert b"".join(map(texts.raw, ids)).decode() == "Nora \u2603"
    assert texts.name(ids[0]) == "Nora"
    assert texts.name(tokenizer.eos_token_id) == "</s>"
    assert "bytes:\\xe2" in [texts.name(token) for token in ids]
    assert texts.raw(100_000) == b""


def test_names_of_tokens_with_byte_fallback() -> None:
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "\u2581the": 2, "x": 3}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert [texts.raw(token) for token in (1, 2, 3)] == [b"\xe2", b" the", b"x"]
    assert texts.name(1) == "bytes:\\xe2"
