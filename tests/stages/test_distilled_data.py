"""Data that the teacher writes: the same however often it is interrupted, and a source like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgerazor.calibration import generated_text
from edgerazor.calibration.batched_writing import NativeWriter
from edgerazor.data import documents
from edgerazor.data.chat import parse_conversation
from edgerazor.errors import UserError
from edgerazor.recipe import Sampling, Source
from helpers.tiny_job import Run, with_template, write_recipe

TEMPLATE = """{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<s>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""


@pytest.fixture(scope="module")
def chatty(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template whose turns end with a token that the model does not know to be an end."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    with_template(llama, folder, TEMPLATE, bos_token="Ċ")  # so that <s> may end a turn
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "chat.jsonl"
    lines = []
    for number in range(11):
        talk = [{"role": "system", "content": "Be kind."}] if number % 2 else []
        for turn in range(1 + number % 3):
            talk += [{"role": "user", "content": f"Then {turn}?"}, {"role": "assistant", "content": "Old words."}]
        lines.append({"messages": talk})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def writer_of(folder: Path, context: int = 128, **sampling: Any) -> generated_text.Writer:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return generated_text.Writer(model, AutoTokenizer.from_pretrained(folder), Sampling(**sampling), 3, context)


@pytest.fixture
def sure_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn becomes two or three tokens and the end of the turn, as of a teacher that answers briefly."""
    generate = generated_text.Writer._generate

    write = NativeWriter.write

    def brief(self: generated_text.Writer, ids: Any, mask: Any, key: Any, ends: set[int], *more: Any) -> torch.Tensor:
        found = generate(self, ids, mask, key, ends, *more)[:, : len(ids[0]) + 4]
        found[:, len(ids[0]) :].clamp_(min=50)
        found[:, -1] = max(ends - {1}, default=1)
        return found

    def briefly(self: NativeWriter, *request: Any) -> list[list[int]]:
        return [[max(token, 50) for token in ids[:3]] for ids in write(self, *request)]

    monkeypatch.setattr(generated_text.Writer, "_generate", brief)
    monkeypatch.setattr(NativeWriter, "write", briefly)


# --- drawing -----------------------------------------------------------------------------------


def test_what_is_drawn_is_the_teachers_distribution(llama: Path) -> None:
    """Frequencies of one token against the softmax of the logits over temperature, cut by top-k and top-p."""
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 40]])).logits[0, -1].double()
    for asked in ({"temperature": 1.5, "top_p": 1.0, "top_k": 7}, {"temperature": 2.0, "top_p": 0.4, "top_k": 0}):
        expected = (logits / asked["temperature"]).softmax(-1)
        if asked["top_k"]:
            expected[expected < expected.topk(int(asked["top_k"])).values[-1]] = 0
        ordered, order = expected.sort(descending=True)
        expected[order[ordered.cumsum(0) - ordered >= asked["top_p"]]] = 0
        expected /= expected.sum()
        writer = writer_of(llama, answer_tokens=1, **asked)
        drawn = [answer.ids[0] for answer in writer.draw([[5, 9, 40]] * 4000, (0,), exactly=1)]
        found = torch.bincount(torch.tensor(drawn), minlength=len(logits)).double() / 4000
        assert (found - expected).abs().max() < 4 * 0.5 / 4000**0.5
        assert set(drawn) <= set(expected.nonzero().flatten().tolist())


def test_without_temperature_the_likeliest_token_is_taken(llama: Path) -> None:
    writer = writer_of(llama, temperature=0.0, answer_tokens=6)
    prompts = [[5, 9, 40], [7], [250, 12, 13, 14]]
    together = writer.draw(prompts, (0,), exactly=6)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                logits = writer.teacher(torch.tensor([ids])).logits[0, -1]
            logits[1] = -torch.inf  # it may not end
            ids.append(int(logits.argmax()))
        assert [*prompt, *answer.ids] == ids


def test_a_batch_depends_on_its_number_and_the_seed_alone(llama: Path) -> None:
    def texts(writer: generated_text.Writer, numbers: Iterator[int]) -> list[Any]:
        return [[row.record for row in writer.write(["Nora took", None], number)] for number in numbers]

    writer = writer_of(llama, answer_tokens=12)
    forwards = texts(writer, iter(range(4)))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert texts(writer, iter(reversed(range(4)))) == forwards[::-1]
    assert torch.equal(torch.get_rng_state(), before)  # what else is drawn at random is not touched
    assert len({json.dumps(each) for each in forwards}) == 4
    other = generated_text.Writer(writer.teacher, writer.tokenizer, writer.sampling, 4, 128)
    assert texts(other, iter(range(4))) != forwards


def test_a_text_begins_with_its_prompt(llama: Path) -> None:
    rows = writer_of(llama, answer_tokens=5, prompt_tokens=3).write(["Nora took the ball to the mill."], 0)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    beginning = tokenizer.decode(tokenizer("Nora took the ball to the mill.")["input_ids"][:3])
    assert rows[0].record is not None
    assert rows[0].record["text"].startswith(beginning)
    assert rows[0].tokens <= 5


# --- conversations -----------------------------------------------------------------------------


@pytest.mark.usefixtures("sure_to_end")
def test_every_user_turn_is_answered_from_what_was_said_before(chatty: Path, prompts: Path) -> None:
    writer = writer_of(chatty, answer_tokens=8, batch_size=4)
    asked = list(documents(Source(file=str(prompts))))
    rows = [row for batch in writer.batches(iter(asked)) for row in batch]
    assert len(rows) == len(asked)
    for row, talk in zip(rows, asked, strict=True):
        assert row.record is not None
        messages = row.record["messages"]
        assert [m["role"] for m in messages] == [m["role"] for m in talk.messages]  # type: ignore[union-attr]
        for new, old in zip(messages, talk.messages, strict=True):  # type: ignore[union-attr]
            assert (new["content"] == old["content"]) is (new["role"] != "assistant")


def test_an_answer_is_conditioned_on_the_template(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    tokenizer = AutoTokenizer.from_pretrained(chatty)

    def answering(self: Any, prompts: list[list[int]], key: Any, stops: set[int]) -> list[generated_text.Answer]:
        seen.append([tokenizer.decode(each) for each in prompts])
        assert stops == {tokenizer.convert_tokens_to_ids("<s>")}
        return [generated_text.Answer(tokenizer(f"yes {key[1]}")["input_ids"], True) for _ in prompts]

    monkeypatch.setattr(generated_text.Writer, "draw", answering)
    user = [{"role": "user", "content": text} for text in "abc"]
    old = {"role": "assistant", "content": "old"}
    rows = writer_of(chatty).write(
        [parse_conversation("A", [user[0], old, user[1], user[2], old]), parse_conversation("B", [user[0]])], 0
    )
    assert seen == [
        ["[user]a<s>[assistant]"] * 2,
        ["[user]a<s>[assistant]yes 0<s>[user]b<s>[assistant]"],
        ["[user]a<s>[assistant]yes 0<s>[user]b<s>[assistant]yes 1<s>[user]c<s>[assistant]"],
    ]
    said = [[m["content"] for m in row.record["messages"]] for row in rows if row.record]
    assert said == [["a", "yes 0", "b", "yes 1", "c", "yes 2"], ["a", "yes 0"]]


def test_answers_that_are_cut_off_or_blank_are_not_kept(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([[(True, "yes"), (False, "yes"), (True, " ")], [(False, "and")]])
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    monkeypatch.setattr(
        generated_text.Writer,
        "draw",
        lambda *_: [generated_text.Answer(tokenizer(text)["input_ids"], done) for done, text in next(outcomes)],
    )
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    rows = writer_of(chatty).write([parse_conversation("A", talk)] * 3, 0)
    assert rows[0].record == {"messages": [talk[0], {"role": "assistant", "content": "yes"}]}
    assert [row.record for row in rows[1:]] == [None, None]


def test_a_conversation_that_fills_the_context_ends(chatty: Path) -> None:
    talk = parse_conversation("A", [{"role": "user", "content": "Then " * 200}])
    assert writer_of(chatty).write([talk], 0)[0].record is None


@pytest.mark.parametrize(
    ("roles", "message"),
    [(["user", "tool"], "A has a message of the role 'tool'"), (["system"], "A has no user turn")],
)
def test_conversations_that_cannot_be_answered_anew(chatty: Path, roles: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        writer_of(chatty).write([parse_conversation("A", [{"role": role, "content": "x"} for role in roles])], 0)


# --- the command -------------------------------------------------------------------------------


SMALL = ("--answer-tokens", 10, "--batch-size", 3, "--temperature", 1.5, "--top-k", 0, "--threads", 1)


@pytest.mark.usefixtures("sure_to_end")
def test_interrupted_and_resumed_equals_uninterrupted(run: Run, tmp_path: Path, chatty: Path, prompts: Path) -> None:
    done = run("data", chatty, "--prompts", prompts, "--out", tmp_path / "a.jsonl", *SMALL, "--json")
    assert done.code == 0, done.err
    result = done.json()
    whole = (tmp_path / "a.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert (result["rows"], result["prompts"]) == (len(lines), 11)
    assert result["tokens"] == sum(line["tokens"] for line in lines)
    assert (result["temperature"], result["top_k"], result["top_p"]) == (1.5, 0, 0.95)
    record = json.loads((tmp_path / "a.jsonl.json").read_text())
    assert record["settings"]["sampling.temperature"] == "1.5"
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    for cut in (0, 5, ends[0], ends[2], ends[3] + 4, ends[5], len(whole) - 1):
        path = tmp_path / "b.jsonl"
        path.write_bytes(whole[:cut])
        del record["result"]
        (tmp_path / "b.jsonl.json").write_text(json.dumps(record))
        again = run("data", chatty, "--prompts", prompts, "--out", path, *SMALL, "--json")
        assert again.code == 0, again.err
        assert path.read_bytes() == whole, cut
        different = {"out", "seconds"}
        assert {k: v for k, v in again.json().items() if k not in different} == {
            k: v for k, v in result.items() if k not in different
        }
        record["result"] = result
    assert "is up to date, skipping" in run("data", chatty, "--prompts", prompts, "--out", path, *SMALL).err


@pytest.mark.usefixtures("sure_to_end")
def test_more_tokens_go_on_and_fewer_change_nothing(run: Run, tmp_path: Path, llama: Path) -> None:
    def write(path: str, tokens: int) -> bytes:
        done = run("data", llama, "--out", tmp_path / path, "--tokens", tokens, *SMALL)
        assert done.code == 0, done.err
        return (tmp_path / path).read_bytes()

    few, many = write("a.jsonl", 20), write("b.jsonl", 60)
    assert len(few) < len(many)
    assert write("a.jsonl", 60) == many
    assert write("a.jsonl", 20) == many


def test_settings_that_differ_are_refused(run: Run, tmp_path: Path, llama: Path) -> None:
    base = ("data", llama, "--out", tmp_path / "a.jsonl", "--tokens", 20)
    assert run(*base, *SMALL).code == 0
    before = (tmp_path / "a.jsonl").read_bytes()
    for change, words in (
        (("--temperature", 0.9), "temperature was 1.5, and is 0.9 now"),
        (("--seed", 5), "seed was 0, and is 5 now"),
    ):
        refused = run(*base, *SMALL, *change)
        assert refused.code == 1
        assert words in refused.err
        assert (tmp_path / "a.jsonl").read_bytes() == before
    assert run(*base, *SMALL, "--seed", 5, "--force").code == 0
    assert (tmp_path / "a.jsonl").read_bytes() != before


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "There are no prompts in"), ('{"messages": [{"role": "user", "content": "x"}]}', "has no chat template")],
)
def test_prompts_that_cannot_be_used(run: Run, tmp_path: Path, llama: Path, content: str, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    refused = run("data", llama, "--prompts", path, "--out", tmp_path / "a.jsonl")
    assert refused.code == 1
    assert words in refused.err
    assert "Traceback" not in refused.err


def test_a_file_of_somebody_else_is_not_touched(run: Run, tmp_path: Path, llama: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "mine"}\n')
    refused = run("data", llama, "--out", path, "--tokens", 20)
    assert refused.code == 2
    assert "there is no record that this command wrote it" in refused.err
    assert path.read_text() == '{"text": "mine"}\n'


def test_options_out_of_range(run: Run, tmp_path: Path, llama: Path) -> None:
    for option, value in (("--temperature", -1), ("--top-p", 0), ("--top-k", -2), ("--batch-size", 0)):
        refused = run("data", llama, "--out", tmp_path / "a.jsonl", option, value)
        assert refused.code == 2
        assert f"{option} is {value}" in refused.err


@pytest.mark.usefixtures("sure_to_end")
def test_distilled_data_mixes_with_other_data_by_weight(
    run: Run, tmp_path: Path, chatty: Path, prompts: Path, text_file: Path
) -> None:
    own = tmp_path / "own.jsonl"
    assert run("data", chatty, "--prompts", prompts, "--out", own, *SMALL).code == 0
    sources = [{"file": str(text_file), "weight": 3.0}, {"file": str(own), "weight": 1.0}]
    fields = {"train": sources, "packing": "document", "held_out_fraction": 0.2}
    recipe = write_recipe(tmp_path / "r.yaml", chatty, None, data=fields, distill={"steps": 2})
    done = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json")
    assert done.code == 0, done.err


def test_writing_without_prompts_never_ends_by_itself(llama: Path) -> None:
    batches = writer_of(llama, answer_tokens=4, batch_size=2).batches(repeat(None))
    assert [len(next(batches)) for _ in range(5)] == [2] * 5
