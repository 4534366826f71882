"""From the data to the training: what a conversation's labels are, the loss sees, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from edgerazor import losses, training
from edgerazor import recipe as recipes
from edgerazor.calibration import generated_text
from edgerazor.console import Console
from edgerazor.data import MASKED, RowSettings, TokenRows, documents, open_rows, render, thinking_options
from edgerazor.data.chat import parse_conversation
from edgerazor.errors import UserError
from edgerazor.job import JobContext
from edgerazor.recipe import Source
from edgerazor.training import objective
from edgerazor.training.budget import default_steps, report_passes
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, metrics, with_template, write_recipe

TEMPLATE = """{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""


@pytest.fixture(scope="module")
def chatty(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template."""
    return with_template(llama, tmp_path_factory.mktemp("models") / "chatty", TEMPLATE)


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    words = ["Nora took the ball", "Then Ben found 3", "of them there", "to the mill"]
    lines = []
    for number in range(60):
        content = [" ".join(words[: 1 + (number + turn) % 4]) for turn in range(4)]
        roles = ("user", "assistant") * 2
        lines.append({"messages": [{"role": r, "content": c} for r, c in zip(roles, content, strict=True)]})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["stream", "document"])
def test_distilling_conversations(run: Run, tmp_path: Path, chatty: Path, chat_file: Path, packing: str) -> None:
    settings = {"losses": [{"name": "ce"}, {"name": "eakld"}, {"name": "lafd"}], "steps": 8, "learning_rate": 3e-4}
    fields = {"packing": packing, "sequence_length": 64}
    recipe = write_recipe(tmp_path / "r.yaml", chatty, chat_file, distill=settings, data=fields)
    done = run("run", recipe, "--work", tmp_path / "job", "--json")
    assert done.code == 0, done.err
    lines = metrics(tmp_path / "job")
    assert lines[-1]["kl"] < lines[0]["kl"]
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"]


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_the_loss_is_that_of_the_assistants_tokens(
    run: Run, tmp_path: Path, chatty: Path, chat_file: Path, packing: str
) -> None:
    """Cross entropy and its gradient against a plain computation over the tokens that the template's masks name."""
    settings = {"losses": [{"name": "ce"}], "steps": 1}
    fields = {"packing": packing, "sequence_length": 64}
    path = write_recipe(tmp_path / "r.yaml", chatty, chat_file, distill=settings, data=fields)
    assert run("calibrate", "--recipe", path, "--work", tmp_path / "job").code == 0
    recipe = recipes.build(recipes.load(path))
    trainer = training.prepare(JobContext(recipe, WorkDir(tmp_path / "job"), Console(quiet=True)), {}).trainer
    batch = trainer.rows.batch(0, batch_size=4)
    totals = trainer.step_totals([objective.batch_statistics(trainer.terms, batch["labels"], None)])
    loss = losses.total_loss(
        [(term.weight, loss) for term, loss in trainer.terms],
        trainer.student.outputs(batch["input_ids"], trainer.student_captures),
        None,
        batch["labels"],
        totals,
    )
    loss.backward()
    student = trainer.student.model
    weight = student.get_parameter("model.layers.0.mlp.down_proj.weight")
    gradient, weight.grad = weight.grad, None
    logits = student(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    wanted = batch["labels"][:, 1:] != MASKED
    assert 0 < int(wanted.sum()) == totals.tokens < batch["input_ids"].numel() / 2
    every = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=MASKED, reduction="none"
    )
    plain = every.sum() / wanted.sum()
    plain.backward()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-6)


def test_labels_are_what_the_assistant_says(chatty: Path, chat_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    source = Source(file=str(chat_file))
    rows, _ = open_rows([source], tokenizer, RowSettings(200, packing="document"))
    said = []
    for row, talk in zip(rows.in_order(), documents(source), strict=True):
        said.append(tokenizer.decode([token for token in row["labels"] if token != MASKED]))
        assert said[-1] == "".join(m["content"] + "</s>" for m in talk.messages[1::2])  # type: ignore[union-attr]
    assert len(said) == 60


def test_a_model_without_a_template_is_refused(run: Run, tmp_path: Path, llama: Path, chat_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, chat_file)
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert refused.code == 1
    assert "is a conversation, but the model's tokenizer has no chat template" in refused.err
    assert "Traceback" not in refused.err


def test_packing_is_part_of_what_a_student_was_made_from(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    jobs: dict[str, Any] = {}
    for packing in ("stream", "document"):
        path = write_recipe(tmp_path / f"{packing}.yaml", llama, text_file, data={"packing": packing})
        jobs[packing] = run("distill", "--recipe", path, "--work", tmp_path / "job", "--steps", 1)
    assert jobs["stream"].code == 0
    assert jobs["document"].code == 1
    assert "data.packing was stream, and is document now" in jobs["document"].err


def test_held_out_text_of_a_recipe_is_packed_alike(llama: Path, text_file: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps({"text": "Nora took the ball. " * n}) for n in range(1, 5)))
    values = {"model": str(llama), "data": {"train": [{"file": str(text_file)}], "held_out": [{"file": str(held)}]}}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for packing, count in (("stream", 1), ("document", 4)):
        recipe = recipes.build(recipes.merge(values, {"data": {"packing": packing}}))
        _, rows = JobContext(recipe, WorkDir(tmp_path), Console(quiet=True)).open_text(tokenizer, 500)
        assert len(rows) == count


# How often data are read ------------------------------------------------------------------------------------------


def two_sources() -> TokenRows:
    """Two sources of 8 and 2 rows, of which three rows come from the first for one of the second."""
    return TokenRows([np.arange(8 * 16, dtype=np.int32), np.arange(1000, 1032, dtype=np.int32)], [3.0, 1.0], 16)


def test_passes_are_those_of_the_source_that_is_repeated_most() -> None:
    rows = two_sources()
    assert [rows.passes(count) for count in (0, 8, 32)] == [0, 1, 4]  # a fourth of 32 rows are 4 times 2
    first = [tuple(rows.row(index)["input_ids"].tolist()) for index in range(32)]
    assert sorted(Counter(first).values()) == [3] * 8 + [4, 4]  # three fourths of 32 are 3 times 8


@pytest.mark.parametrize(
    ("rows_per_step", "steps"),
    [(1, 128), (2, 64), (1000, 1)],  # 16 times 2 rows are a fourth of 128; at least one step
)
def test_the_default_number_of_steps_reads_the_data_sixteen_times(rows_per_step: int, steps: int) -> None:
    assert default_steps(two_sources(), rows_per_step) == steps
    assert default_steps(TokenRows([np.arange(16 * 1000, dtype=np.int32)], [1.0], 16), 16) == 1000


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (None, ""),
        (8, ""),
        (12, "12 steps read the 10 sequences of the data 1.5 times."),
        (32, "32 steps read the 10 sequences of the data 4.0 times."),
        (36, "Warning: 36 steps read the 10 sequences of the data 4.5 times; more text (--data FILE) would teach more"),
    ],
)
def test_how_often_data_are_read_is_said(steps: int | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    report_passes(steps, two_sources(), 1, Console())
    sentence = " ".join(capsys.readouterr().err.split())
    assert sentence.startswith(said)
    assert bool(sentence) == bool(said)


# Thinking ---------------------------------------------------------------------------------------------------------

SWITCHES = {
    "qwen3": "{% if enable_thinking is defined and enable_thinking is false %}[quiet]{% endif %}",
    "granite": "{% if thinking %}[thoughts]{% endif %}",
    "without a switch": "",
}


@pytest.mark.parametrize(
    ("template", "asked", "given"),
    [
        ("qwen3", [], {"enable_thinking": False}),
        ("qwen3", ["--thinking"], {"enable_thinking": True}),
        ("granite", [], {"thinking": False}),
        ("without a switch", [], {}),
        ("without a switch", ["--thinking"], {}),
    ],
)
def test_the_teacher_does_not_think_unless_asked(
    run: Run,
    llama: Path,
    chat_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    asked: list[str],
    given: dict[str, bool],
) -> None:
    """EdgeRazor's distilled data are written with `enable_thinking=False` where the template knows it."""
    teacher = with_template(llama, tmp_path / "model", TEMPLATE + SWITCHES[template])
    options: list[Any] = []

    def writer(*arguments: Any) -> Any:
        options.append(arguments[5])
        raise UserError("enough")

    monkeypatch.setattr(generated_text, "Writer", writer)
    run("data", teacher, "--prompts", chat_file, "--out", tmp_path / "own.jsonl", *asked)
    assert options == [given]


def test_the_switch_reaches_the_prompt(llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(with_template(llama, tmp_path / "model", TEMPLATE + SWITCHES["qwen3"]))
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    for thinking, ending in ((False, "[assistant][quiet]"), (True, "[assistant]")):
        dialogue = replace(parse_conversation("here", talk), options=thinking_options(tokenizer, thinking))
        assert render(dialogue, tokenizer, talk[:1], prompt=True).endswith(ending)
