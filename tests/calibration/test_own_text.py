"""Text that a teacher writes with the native engine: alike however it is divided, and no longer than it may take."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgerazor.calibration import own_text
from edgerazor.calibration.batched_writing import NativeWriter, WritingRequest
from edgerazor.calibration.generated_text import Answer, Row, Writer, written_with
from edgerazor.console import Console
from edgerazor.errors import INTERRUPTED
from edgerazor.job import JobContext, RecipeContext
from edgerazor.kernels import native
from edgerazor.packaging.native_teacher import native_teacher
from edgerazor.recipe import Sampling, build
from edgerazor.training.budget_defaults import FEWEST_WRITTEN, WRITING_SHARE
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, with_template, write_recipe

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library is not built")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=0, answer_tokens=40)


@pytest.fixture(scope="module")
def native_llama(llama: Path) -> Iterator[Any]:
    context = RecipeContext(build({"model": str(llama), "threads": 1}), Console(quiet=True))
    with native_teacher(context.load_teacher(torch.device("cpu")), context) as model:
        assert model is not None
        yield model


def own_writer(folder: Path, sampling: Sampling = PLAIN) -> Writer:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Writer(model, AutoTokenizer.from_pretrained(folder), sampling, 3, 128)


def test_a_text_does_not_depend_on_its_neighbours(native_llama: Any) -> None:
    requests = [WritingRequest([5, 9, number], 12, seed=number) for number in range(7)]
    together, alone = NativeWriter(native_llama, 7), NativeWriter(native_llama, 1)
    try:
        texts = together.write(requests, PLAIN, frozenset({1}))
        assert texts == [alone.write([request], PLAIN, frozenset({1}))[0] for request in requests]
        assert len({tuple(text) for text in texts}) > 1
        assert all(1 not in text for text in texts)
        unending = together.write(requests, PLAIN, frozenset(range(200)), unending=True)
        assert all(len(text) == 12 and min(text) >= 200 for text in unending)
    finally:
        together.close()
        alone.close()


def test_what_is_written_natively_is_the_teachers_distribution(llama: Path, native_llama: Any) -> None:
    """Frequencies of one token against the softmax of the logits of the native engine, cut by top-k."""
    sampling = Sampling(temperature=1.5, top_p=1.0, top_k=7, batch_size=2000)
    logits = native_llama.logits([5, 9, 40])[-1].double() / 1.5
    logits[logits < logits.topk(7).values[-1]] = -torch.inf
    with written_with(own_writer(llama, sampling), native_llama) as writer:
        drawn = [answer.ids[0] for answer in writer.draw([[5, 9, 40]] * 2000, (0,), exactly=1) if answer.ids]
    observed = torch.bincount(torch.tensor(drawn), minlength=len(logits)).double() / 2000
    expected = logits.softmax(-1)
    expected[list(writer._text_ends())] = 0  # which `exactly` rules out
    assert (observed - expected / expected.sum()).abs().max() < 4 * 0.5 / 2000**0.5


def test_both_engines_cut_texts_alike(llama: Path, native_llama: Any) -> None:
    """`enough` ends all texts of a batch where they are, in either engine."""
    for model in (None, native_llama):
        with written_with(own_writer(llama), model) as writer:
            answers = writer.draw([[5]] * 4, (0,), enough=lambda tokens: tokens >= 20)
            assert 15 <= sum(len(answer.ids) for answer in answers) <= 24
            rows = writer.write([None, "Nora took"], 0, lambda tokens: tokens >= 4)
            assert all(row.tokens <= 3 for row in rows)


@pytest.mark.parametrize("seconds", [None, 0.4])
def test_writing_ends_with_its_share_of_the_time(
    tmp_path: Path, llama: Path, native_llama: Any, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that moves by a second for each token that is drawn."""
    values = {"model": str(llama), "data": {"generated_tokens": 9000}, "distill": {"max_time": 1e6}}
    context = JobContext(build(values), WorkDir(tmp_path / "job"), Console(quiet=True))
    limit = None if seconds is None else seconds * 9000
    if limit is not None:
        context.recipe.distill.__dict__["max_time"] = limit / WRITING_SHARE
        context.chosen = {"data": {"generated_tokens": 9000}}
    context.work.progress("calibrate", "generated.json").parent.mkdir(parents=True)
    now = [0.0]
    see = own_text.Writer.write

    def slow(self: Writer, prompts: Any, number: int, enough: Any = None) -> Any:
        def counting(tokens: int) -> bool:
            now[0] = start + tokens
            return bool(enough and enough(tokens))

        start = now[0]
        rows = see(self, prompts, number, counting)
        now[0] = start + sum(row.tokens for row in rows)
        return rows

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(own_text.Writer, "write", slow)
    progress = own_text.Progress(asked="x")
    with written_with(own_writer(llama), native_llama) as writer:
        own_text.write(context, writer, 128, progress)
    assert progress.finished
    if limit is None:
        assert 9000 <= progress.tokens < 9000 + 32 * 128
    else:
        assert max(FEWEST_WRITTEN, limit) <= progress.tokens < 1.05 * max(FEWEST_WRITTEN, limit)


def test_an_interrupted_text_goes_on_to_the_same_one(
    run: Run, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, None, data={"generated_tokens": 3000})
    assert run("calibrate", "--recipe", recipe, "--work", tmp_path / "whole").code == 0
    whole = (tmp_path / "whole" / "calibrate" / "generated.jsonl").read_bytes()
    write, numbers = Writer.write, []

    def stopped(self: Writer, prompts: Any, number: int, enough: Any = None) -> Any:
        numbers.append(number)
        if numbers == [0, 1]:
            raise KeyboardInterrupt
        return write(self, prompts, number, enough)

    monkeypatch.setattr(Writer, "write", stopped)
    assert run("calibrate", "--recipe", recipe, "--work", tmp_path / "job").code == INTERRUPTED
    assert run("calibrate", "--work", tmp_path / "job").code == 0
    assert numbers[:3] == [0, 1, 1]
    assert (tmp_path / "job" / "calibrate" / "generated.jsonl").read_bytes() == whole


def test_transformers_writes_what_the_native_engine_does_not_know(make_model: Any, tmp_path: Path) -> None:
    make_model(tmp_path / "phi", "phi")
    context = RecipeContext(build({"model": str(tmp_path / "phi")}), Console())
    said: list[str] = []
    context.console.say = said.append  # type: ignore[method-assign]
    with native_teacher(context.load_teacher(torch.device("cpu")), context) as model:
        assert model is None
    assert "there is no native code for models of type phi" in said[0]


class ScriptedWriter(Writer):
    """A writer whose words are given; what begins with a dash comes to no end."""

    script: list[list[str]]
    drawn: list[tuple[list[str], float]]

    def draw(self, prompts: list[list[int]], *_arguments: Any, **_options: Any) -> list[Answer]:
        self.drawn.append((self.tokenizer.batch_decode(prompts), self.sampling.temperature))
        texts = self.script.pop(0)
        return [Answer(self.tokenizer.encode(text), not text.startswith("-")) for text in texts]


def scripted(writer: Writer, *script: list[str]) -> ScriptedWriter:
    ScriptedWriter.script, ScriptedWriter.drawn = list(script), []
    return ScriptedWriter(writer.teacher, writer.tokenizer, writer.sampling, writer.seed, writer.context)


def test_a_teacher_asks_itself_and_answers(llama: Path) -> None:
    own = own_writer(llama)
    own.tokenizer.chat_template = TEMPLATE
    writer = scripted(own, ["who sings", "- nobody ends", "where to"], ["nora", "- far"])
    rows = writer.ask_and_answer(3, 1)
    opening, temperature = writer.drawn[0]
    assert opening == ["<user> "] * 3
    assert writer.drawn[1] == (["<user> who sings</s><assistant> ", "<user> where to</s><assistant> "], 0.7)
    assert temperature == 1.0
    user, assistant = {"role": "user", "content": "who sings"}, {"role": "assistant", "content": "nora"}
    assert [row.record for row in rows] == [{"messages": [user, assistant]}, None, None]
    assert all(row.tokens > 0 for row in rows)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}"])
def test_without_an_opening_of_questions_there_are_none(llama: Path, template: str | None) -> None:
    own = own_writer(llama)
    own.tokenizer.chat_template = template
    assert [row.record for row in own.ask_and_answer(2, 1)] == [None, None]


def test_own_text_has_conversations_where_the_teacher_is_tuned(
    run: Run, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other batch, unless most of them come to no end; a base model writes texts alone."""
    question = {"role": "user", "content": "who sings"}
    talk = Row({"messages": [question, {"role": "assistant", "content": "nora sings"}]}, 40)
    kinds = {}
    for name, row in (("tuned", talk), ("endless", Row(None, 40))):
        folder = with_template(llama, tmp_path / name, TEMPLATE)
        monkeypatch.setattr(Writer, "ask_and_answer", lambda self, count, number, row=row: [row] * count)
        recipe = write_recipe(tmp_path / f"{name}.yaml", folder, None, data={"generated_tokens": 4000})
        assert run("calibrate", "--recipe", recipe, "--work", tmp_path / f"{name}-job").code == 0
        lines = WorkDir(tmp_path / f"{name}-job").generated_text.read_text(encoding="utf-8").splitlines()
        kinds[name] = {"messages" if "messages" in json.loads(line) else "text" for line in lines}
    assert kinds == {"tuned": {"messages", "text"}, "endless": {"text"}}
