"""lm-eval's tasks with pictures: answers are those of its own class for them, and models of text are refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from edgerazor import pictures, runtime
from edgerazor.console import Console
from edgerazor.kernels import native
from helpers.seeing_teachers import shown, write_seeing_teacher
from helpers.task_data import write_rows
from helpers.tiny_job import Run

pytestmark = pytest.mark.job

#: The processor needs no torchvision.
FAMILY = "idefics3"
#: Fields of ChartQA and of MMMU, as their data sets have them, but for pictures as files or bytes.
QUESTION = "what is this ?"


def chart(color: str) -> dict[str, Any]:
    return {"query": QUESTION, "label": [color], "image": {"type": "image", "base64": shown(color)}}


def exam(place: str) -> dict[str, Any]:
    return {
        **{"question": "<image 1> and that <image 2> ?", "options": "['red', 'blue']", "answer": "B"},
        **{"question_type": "multiple-choice", "image_1": {"type": "image", "base64": shown("red")}},
        "image_2": {"type": "image", "path": place},
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    write_seeing_teacher(folder / "teacher", FAMILY, {"max_position_embeddings": 512})
    (folder / "items").mkdir()
    (folder / "items" / "blue.png").write_bytes(base64.b64decode(shown("blue")))
    write_rows(folder / "items" / "chartqa.jsonl", [chart("red"), chart("blue"), chart("green")])
    write_rows(folder / "items" / "mmmu_val_math.jsonl", [exam("blue.png"), exam("blue.png")])
    return folder


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_those_of_lm_evals_own_class(place: Path, chat: bool) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.hf_vlms import HFMultimodalLM

    from edgerazor.tasks.lm_eval_pictures import SeeingTransformersLM

    model = AutoModelForImageTextToText.from_pretrained(place / "teacher", trust_remote_code=False).eval()
    reader = pictures.PictureReader(place / "teacher", lambda: model, "teacher")
    ours = SeeingTransformersLM(model, reader, 2, Console(quiet=True), "ours")
    theirs = HFMultimodalLM(pretrained=model, batch_size=1)
    options = {"until": ["<end>"], "max_gen_toks": 6, "do_sample": False}
    texts = [f"<image>{QUESTION}", "<image><image> and that ?", f"<image>{QUESTION}"]
    shapes = [["red"], ["red", "blue"], ["blue"]]
    answers = []
    for scored in (ours, theirs):
        requests = []
        for number, (text, colors) in enumerate(zip(texts, shapes, strict=True)):
            prompt = scored.apply_chat_template([{"role": "user", "content": text}]) if chat else text
            visual = {"visual": [Image.new("RGB", (16, 16), color) for color in colors]}
            given = (prompt, dict(options), visual)
            requests.append(Instance("generate_until", {}, given, 0, metadata=("chartqa", number, 1)))
        answers.append(scored.generate_until(requests))
    assert answers[0] == answers[1]
    assert all(answers[0])


def test_both_engines_answer_tasks_of_the_registry(place: Path, run: Run) -> None:
    """The teacher, and the packed model in its engine: chat templates, several pictures, files and bytes."""
    made = run("pack", place / "teacher", "--bits", 4, "--group-size", 32, "--work", place / "job")
    assert made.code == 0, made.err
    words = ("--tasks", "chartqa,mmmu_val_math", "--task-data", place / "items", "--apply-chat-template", "--json")
    measured = run("eval", place / "job" / "packed", "--against", place / "teacher", *words)
    assert measured.code in (0, 3), measured.err
    result = json.loads(measured.out)
    assert set(result["tasks"]) == {"chartqa", "mmmu_val_math"}
    assert result["tasks"]["chartqa"]["items"] == 3
    assert result["engine"] == ("native" if native.library() is not None else "transformers")
    assert all(0 <= task["score"] <= 1 for task in result["tasks"].values())


@pytest.mark.skipif(native.library() is None, reason="the native library is not built")
def test_the_native_engine_writes_what_transformers_writes(place: Path, run: Run) -> None:
    from lm_eval.api.instance import Instance

    from edgerazor.tasks.lm_eval_pictures import SeeingEngineLM

    made = run("pack", place / "teacher", "--bits", 4, "--group-size", 32, "--work", place / "job")
    assert made.code == 0, made.err
    answers = []
    for engine in ("native", "transformers"):
        model = runtime.load(place / "job" / "packed", threads=1, engine=engine)
        scored = SeeingEngineLM(model, model.pictures, 2, Console(quiet=True), engine)
        visual = {"visual": [Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")]}
        given = ("<image> and <image> ?", {"until": [], "max_gen_toks": 8, "do_sample": False}, visual)
        request = Instance("generate_until", {}, given, 0, metadata=("chartqa", 0, 1))
        text = Instance("generate_until", {}, (QUESTION, dict(given[1])), 0, metadata=("text", 0, 1))
        answers.append(scored.generate_until([request, text, request]))
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][2]


def test_what_cannot_be_asked_is_one_sentence(place: Path, tmp_path: Path, llama: Path, run: Run) -> None:
    words = ("--tasks", "chartqa", "--task-data")
    blind = run("eval", llama, *words, place / "items")
    assert blind.code == 1
    assert "The questions of chartqa are about pictures, and model sees none" in blind.err
    for row, sentence in (
        ({**chart("red"), "image": {"type": "image", "path": "none.png"}}, "there is no file"),
        ({**chart("red"), "image": {"type": "image", "path": "http://a/b.png"}}, "nothing is fetched"),
        ({"query": QUESTION, "label": ["red"]}, "needs image"),
    ):
        write_rows(tmp_path / "chartqa.jsonl", [row])
        failed = run("eval", place / "teacher", *words, tmp_path)
        assert failed.code == 1
        assert sentence in failed.err
    write_rows(tmp_path / "chartqa.jsonl", [{**chart("red"), "query": "<image> what ?"}])
    failed = run("eval", place / "teacher", *words, tmp_path)
    assert failed.code == 1
    assert "has 1 pictures, but 2 placeholders" in failed.err


def test_a_prompt_without_room_is_one_sentence(place: Path) -> None:
    from lm_eval.api.instance import Instance

    from edgerazor.errors import UserError
    from edgerazor.tasks.lm_eval_pictures import SeeingTransformersLM

    model = AutoModelForImageTextToText.from_pretrained(place / "teacher", trust_remote_code=False).eval()
    reader = pictures.PictureReader(place / "teacher", lambda: model, "teacher")
    scored = SeeingTransformersLM(model, reader, 2, Console(quiet=True), "ours")
    visual = {"visual": [Image.new("RGB", (16, 16), "red")]}
    given = ("<image> " + "this " * 600, {"until": [], "max_gen_toks": 8}, visual)
    with pytest.raises(UserError, match="Item 1 of chartqa takes 6"):
        scored.generate_until([Instance("generate_until", {}, given, 0, metadata=("chartqa", 0, 1))])
    assert torch.is_grad_enabled()
