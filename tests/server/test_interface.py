"""OpenAI's own client against the server: chats, completions, streams, log-probabilities, JSON, tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from edgerazor import runtime
from edgerazor.runtime import Model
from helpers.serving import ScriptedScheduler, Served, serving, write_served_model
from helpers.tiny_models import ModelMaker

PROMPT = "Nora took the ball"
QUESTION: Any = [{"role": "user", "content": "Where is the lamp?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Bern"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: Any = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "place": {"enum": ["mill", "barn"]}},
    "required": ["count", "place"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = write_served_model(make_model, tmp_path_factory.mktemp("served"))
    return runtime.load(folder, threads=1)


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with serving(model) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return client_of(served)


def client_of(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=60)


def scripted(model: Model, text: str, **options: Any) -> ScriptedScheduler:
    return ScriptedScheduler(list(model.tokenizer(text)["input_ids"]), **options)


# --- completions -------------------------------------------------------------------------------


def test_a_greedy_completion_is_that_of_generate(client: openai.OpenAI, model: Model) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    expected = model.generate(PROMPT, max_tokens=20)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, 20)


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI, model: Model) -> None:
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert (
        "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        == model.generate(PROMPT, max_tokens=20).text
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


def test_seeds_and_texts_of_a_prompt(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int = 1) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=1.3, seed=seed, n=n)
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.text for choice in answer.choices]

    assert texts(5) == texts(5)
    assert len(set(texts(5, 3))) == 3
    assert texts(5, 3)[0] == texts(5)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_ends_before_a_stop_string(client: openai.OpenAI, model: Model, stream: bool) -> None:
    whole = model.generate(PROMPT, max_tokens=40)
    border = len(model.tokenizer.decode(whole.tokens[:20]))
    stop = whole.text[border - 2 : border + 2]
    answer: Any = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=40,
        temperature=0,
        stop=[stop, "never comes up"],
        stream=stream,
        logprobs=0,
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == whole.text[: whole.text.find(stop)]
    assert choices[-1].finish_reason == "stop"
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert offsets == sorted(offsets)
    assert all(offset < whole.text.find(stop) for offset in offsets)


def test_an_echoed_prompt_has_the_log_probabilities_of_the_model(client: openai.OpenAI, model: Model) -> None:
    """As lm-eval asks for them: several prompts of tokens, one token behind each."""
    prompts = [[5, 6, 70, 80, 200], [9, 30, 40]]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True)
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        logits = model.logits(prompt).log_softmax(-1)
        found: Any = choice.logprobs
        assert found.token_logprobs[0] is None
        expected = [float(logits[place, token]) for place, token in enumerate(prompt[1:])]
        assert found.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
        assert found.token_logprobs[-1] == pytest.approx(float(logits[-1].max()), abs=1e-4)
        for place, top in enumerate(found.top_logprobs[1:]):
            assert max(top.values()) == pytest.approx(float(logits[place].max()), abs=1e-4)
        assert choice.text.startswith(model.tokenizer.decode(prompt))
        assert len(found.tokens) == len(found.text_offset) == len(prompt) + 1
    scores = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    assert scores.choices[0].text == PROMPT
    assert scores.usage is not None
    assert scores.usage.completion_tokens == 0


def test_text_offsets_lead_to_the_tokens(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=10, temperature=0, logprobs=2, echo=True
    ).choices[0]
    logprobs: Any = choice.logprobs
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset:].startswith(token)


# --- chats -------------------------------------------------------------------------------------


def test_a_chat_is_that_of_generate(client: openai.OpenAI, model: Model) -> None:
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_completion_tokens=15, temperature=0)
    expected = model.generate(QUESTION, max_tokens=15, chat=True)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    again = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=15, temperature=0)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens is not None


def test_a_stream_of_a_chat_with_log_probabilities(client: openai.OpenAI, model: Model) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=15, temperature=0, stream=True, logprobs=True, top_logprobs=3
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == model.generate(QUESTION, max_tokens=15, chat=True).text
    entries: Any = [entry for chunk in chunks for entry in getattr(chunk.choices[0].logprobs, "content", None) or []]
    assert len(entries) == 15
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == text
    for entry in entries:
        values = [each.logprob for each in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0]  # the likeliest was taken


def test_biases_and_penalties_change_what_is_written(client: openai.OpenAI, model: Model) -> None:
    token = model.generate(QUESTION, max_tokens=1, chat=True).tokens[0]
    options: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 30, "temperature": 0, "logprobs": True}
    only = client.chat.completions.create(**options, logit_bias={str(token): 100})
    assert only.choices[0].logprobs is not None
    assert len({entry.token for entry in only.choices[0].logprobs.content or []}) == 1
    varied = client.chat.completions.create(**options, presence_penalty=2, frequency_penalty=2)
    plain = client.chat.completions.create(**options)
    assert varied.choices[0].logprobs is not None
    assert plain.choices[0].logprobs is not None
    assert len({entry.token for entry in varied.choices[0].logprobs.content or []}) > len(
        {entry.token for entry in plain.choices[0].logprobs.content or []}
    )


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_a_json_schema(client: openai.OpenAI, stream: bool) -> None:
    for seed in range(3):
        answer: Any = client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            seed=seed,
            stream=stream,
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in answer] if stream else []
        found = json.loads("".join(pieces) if stream else answer.choices[0].message.content)
        assert set(found) == {"count", "place"}
        assert 0 <= found["count"] <= 99
        assert found["place"] in ("mill", "barn")


def test_an_answer_that_is_a_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, seed=1, max_tokens=400, response_format={"type": "json_object"}
    )
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


# --- tools -------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_has_to_be(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, tools=[WEATHER], tool_choice=choice, seed=3
    ).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Bern")


def test_a_call_that_has_to_be_is_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=QUESTION, tools=[WEATHER], tool_choice="required", seed=3
    ) as stream:
        parts = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        answer = stream.get_final_completion().choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls or []
    assert call.function.name == "weather"
    assert "".join(parts) == call.function.arguments
    assert len(parts) > 1
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Bern")


def test_calls_in_a_text_and_their_results(model: Model) -> None:
    text = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    with serving(model, scheduler=scripted(model, text)) as served:
        client = client_of(served)
        answer = client.chat.completions.create(model="tiny", messages=QUESTION, tools=[WEATHER]).choices[0]
        assert answer.message.content == "Let me see."
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls or []
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {"city": "Rome"}
        chunks = list(client.chat.completions.create(model="tiny", messages=QUESTION, tools=[WEATHER], stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Let me see."
        first, *parts = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert first.id is not None
        assert first.function is not None
        assert first.function.name == "weather"
        assert len(parts) > 1
        assert {(part.index, part.id) for part in parts} == {(0, None)}
        functions = [part.function for part in (first, *parts)]
        assert "".join(part.arguments or "" for part in functions if part is not None) == '{"city": "Rome"}'
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        untouched = client.chat.completions.create(model="tiny", messages=QUESTION).choices[0]
        assert untouched.message.content == text
        history = [*QUESTION, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        assert client.chat.completions.create(model="tiny", messages=history, tools=[WEATHER]).choices


# --- around ------------------------------------------------------------------------------------


def test_models_and_tokens(client: openai.OpenAI, served: Served, model: Model) -> None:
    assert [each.id for each in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    status, made = served.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    assert status == 200
    assert made["tokens"] == model.tokenizer(PROMPT)["input_ids"]
    assert "".join(made["token_strs"]) == PROMPT
    assert served.post("/detokenize", {"tokens": made["tokens"]})[1] == {"prompt": PROMPT}
    chat = served.post("/tokenize", {"messages": QUESTION})[1]
    assert model.tokenizer.decode(chat["tokens"]).endswith("assistant:")


def test_the_metrics_count(served: Served, client: openai.OpenAI) -> None:
    def value(name: str) -> float:
        page = served.request("GET", "/metrics")[2].decode()
        return next((float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} ")), 0.0)

    before = value('edgerazor_tokens_total{kind="generated"}')
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=7, temperature=0)
    assert value('edgerazor_tokens_total{kind="generated"}') == before + 7
    assert value("edgerazor_first_token_seconds_count") > 0
    assert value("edgerazor_inter_token_seconds_count") >= 6
    assert value('edgerazor_requests_total{path="/v1/completions",status="200"}') > 0
    assert value("edgerazor_running") == 0


@torch.no_grad()
def test_the_transformers_engine_is_served_as_well(model: Model) -> None:
    other = runtime.load(model.folder, threads=1, engine="transformers")
    with serving(other) as served:
        answer = client_of(served).completions.create(
            model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=1, echo=True
        )
        expected = other.generate(PROMPT, max_tokens=8)
        assert answer.choices[0].text == PROMPT + expected.text
        logprobs: Any = answer.choices[0].logprobs
        ids = other.tokenizer(PROMPT)["input_ids"]
        logits = other.logits(ids).log_softmax(-1)
        assert logprobs.token_logprobs[1] == pytest.approx(float(logits[0, ids[1]]), abs=1e-4)
