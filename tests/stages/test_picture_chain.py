"""Every stage with pictures, on a tiny random model of SmolVLM's architecture: the shapes, and what was killed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

import edgerazor
from edgerazor import formats, models, student_plan
from edgerazor.errors import UserError
from edgerazor.packed import PackedModel
from edgerazor.training.trainer import Trainer
from edgerazor.workdir import WorkDir
from helpers.places import ROOT
from helpers.tiny_job import SMALL, Run, call, load_script

SHAPES = ROOT / "recipes" / "shapes"
corpus = load_script(SHAPES / "corpus.py")
training = load_script(SHAPES / "train_teacher.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher that knows nothing, talks about shapes, and questions with answers to choose from."""
    folder = tmp_path_factory.mktemp("shapes")
    config = training.config()
    config.text_config.num_hidden_layers = 2
    torch.manual_seed(0)
    training.Idefics3ForConditionalGeneration(config).save_pretrained(folder / "teacher")
    training.make_processor().save_pretrained(folder / "teacher")
    corpus.write_lines(folder / "talks.jsonl", (talk.record() for talk in corpus.talks("distill", 12)))
    corpus.write_lines(folder / "held.jsonl", (talk.record() for talk in corpus.talks("heldout", 4)))
    (folder / "tasks").mkdir()
    for task in corpus.TASKS[:2]:
        corpus.write_lines(folder / "tasks" / f"{task}.jsonl", iter(corpus.items(task, 3)))
    pixels = next(corpus.talks("heldout", 1)).picture.png()
    (folder / "picture.png").write_bytes(pixels)
    recipe = {
        **SMALL,
        "model": str(folder / "teacher"),
        "data": {
            "train": [{"file": str(folder / "talks.jsonl")}],
            "held_out": [{"file": str(folder / "held.jsonl")}],
            **{"sequence_length": 128, "packing": "document"},
        },
        "calibrate": {"bits": 2, "group_size": 64, "sequences": 4, "sensitivity_tokens": 256},
        "eval": {"text_sequences": 4, "pictures": [str(folder / "tasks")], "blind": True},
        "bench": {**SMALL["bench"], "contexts": [0]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def job(place: Path) -> Path:
    made = call("run", place / "recipe.yaml", "--work", place / "job")
    assert made.code == 0, made.err
    return place / "job"


def result(job: Path, stage: str) -> dict:
    return json.loads(WorkDir(job).result_file(stage).read_text())


def test_all_five_stages(job: Path) -> None:
    assert result(job, "calibrate")["tokens"] > 0
    assert result(job, "distill")["steps"] == 5
    measured = result(job, "eval")
    assert set(measured["tasks"]) == {"color", "shape"}
    assert measured["tasks"]["color"]["chance"] == 0.25
    assert set(measured["blind"]) == {"color", "shape"}
    text = measured["text"]
    assert text["kl"] > 0
    assert text["picture_kl"] > 0
    assert text["picture_tokens"] == 4 * training.SEQUENCE
    phases = {run["phase"] for run in result(job, "bench")["runs"]}
    assert phases == {"prefill", "decode", "tower", "picture prefill"}


def test_the_tower_was_asked_once(job: Path, place: Path) -> None:
    """Features lie in the job; another stage, or the same one again, reads them."""
    stored = {file: file.stat().st_mtime_ns for file in (job / "pictures").iterdir()}
    assert len(stored) == 2  # one file for each source
    assert call("calibrate", "--recipe", place / "recipe.yaml", "--work", job, "--force", "--dry-run").code == 0
    assert call("eval", "--recipe", place / "recipe.yaml", "--work", job, "--force").code in (0, 3)
    assert {file: file.stat().st_mtime_ns for file in (job / "pictures").iterdir()} == stored


def test_the_tower_is_packed_as_it_was(job: Path, place: Path) -> None:
    from safetensors.torch import load_file

    teacher = load_file(place / "teacher" / "model.safetensors")
    packed = load_file(WorkDir(job).folder("pack") / "model.safetensors")
    towers = [name for name in teacher if name.startswith(("model.vision_model", "model.connector"))]
    assert towers
    assert all(torch.equal(teacher[name].float(), packed[name].float()) for name in towers)
    assert all(teacher[name].dtype == packed[name].dtype for name in towers)  # and takes no more bytes
    assert (WorkDir(job).folder("pack") / "processor_config.json").exists()


def test_a_tower_of_16_bits_stays_one() -> None:
    half = {"a": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(), "b": torch.ones(3).bfloat16()}
    whole = {name: tensor.float() for name, tensor in half.items()}
    assert all(torch.equal(tensor, half[name]) for name, tensor in student_plan.in_sixteen_bits(whole).items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in student_plan.in_sixteen_bits(whole).values())
    whole["b"] = whole["b"] / 3
    assert student_plan.in_sixteen_bits(whole) == whole


def test_the_size_with_a_tower_of_16_bits_is_foretold(place: Path, tmp_path: Path) -> None:
    """To the byte, although the student holds the tower in float32."""
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    model, _ = models.load(place / "teacher")
    model.config.get_text_config().dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    recipe = yaml.safe_load((place / "recipe.yaml").read_text()) | {"model": str(tmp_path / "teacher")}
    recipe["calibrate"]["plan"], recipe["distill"]["steps"] = "interleave", 1
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    words = ("--recipe", tmp_path / "r.yaml", "--work", tmp_path / "job")
    foretold = call("calibrate", *words, "--dry-run", "--json")
    assert foretold.code == 0, foretold.err
    for stage in ("calibrate", "distill", "pack"):
        done = call(stage, *words)
        assert done.code == 0, done.err
    size = result(tmp_path / "job", "pack")["bytes"]
    assert result(tmp_path / "job", "calibrate")["bytes"] == size
    assert json.loads(foretold.out)["bytes"] == size


def test_a_packed_tower_makes_the_features_of_the_teachers(job: Path, place: Path) -> None:
    """Keys and values are rounded in the decoder alone."""
    [picture] = corpus.talks("heldout", 1)
    pixels = training.pixel_values([picture.picture])
    packed, teacher = edgerazor.load(WorkDir(job).folder("pack"), threads=1), models.load(place / "teacher")[0]
    expected = models.features_of(teacher, {"pixel_values": pixels}).rows
    assert torch.allclose(models.features_of(packed.pictures.model, {"pixel_values": pixels}).rows, expected, atol=1e-5)


@pytest.mark.parametrize("towers", ["int8", "int4"])
def test_a_tower_in_fewer_bits(towers: str, place: Path, job: Path, tmp_path: Path) -> None:
    """Its matrices are measured, rounded, packed and counted; the student learns and is measured with its features."""
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe["calibrate"] |= {"towers": towers, "plan": "interleave"}
    recipe["distill"]["steps"] = 2
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("calibrate", "distill", "pack", "eval"):
        done = call(stage, "--recipe", tmp_path / "r.yaml", "--work", tmp_path / "job")
        assert done.code in (0, 3), done.err
    moved = result(tmp_path / "job", "calibrate")["towers"]
    assert moved["format"] == towers
    assert moved["pictures"] == 8
    assert 0 < max(moved["moved"].values()) < moved["together"] * 2 < 0.2
    folder = WorkDir(tmp_path / "job").folder("pack")
    packed = PackedModel.open(folder)
    assert packed.header.version == 4
    teacher, _ = models.load(place / "teacher")
    linears = {
        name: module
        for name, module in teacher.named_modules()
        if name.startswith(("model.vision_model", "model.connector")) and isinstance(module, torch.nn.Linear)
    }
    assert set(moved["moved"]) == set(linears)
    for name, module in linears.items():
        entry, matrix = packed.header.matrices[name], packed.matrix(name)
        assert (entry.kind, entry.formats, entry.group_size) == ("tower", (towers,), 64)
        decoded = formats.decode_matrix(matrix.encoded, matrix.spec)
        assert torch.equal(decoded, student_plan.rounded(module.weight, matrix.spec))
    sizes = {one["kind"]: one for one in result(tmp_path / "job", "pack")["classes"]}
    assert sizes["tower"]["weights"] == sum(module.weight.numel() for module in linears.values())
    assert sizes["tower"]["nominal_bits"] == int(towers.removeprefix("int"))
    assert sizes["tower"]["real_bits"] == pytest.approx(sizes["tower"]["nominal_bits"] + 16 / 64, abs=0.1)
    size = result(tmp_path / "job", "pack")["bytes"]
    assert size < 0.8 * result(job, "pack")["bytes"]
    # What the packed model sees is what a rounded tower makes of a picture; both engines see the same.
    pixels = training.pixel_values([next(corpus.talks("heldout", 1)).picture])
    loaded = edgerazor.load(folder, threads=1)
    exact = models.features_of(teacher, {"pixel_values": pixels}).rows
    student_plan.round_towers(teacher, {name: (packed.spec(name), (0, 0)) for name in linears})
    expected = models.features_of(teacher, {"pixel_values": pixels}).rows
    given = models.features_of(loaded.pictures.model, {"pixel_values": pixels}).rows
    assert torch.allclose(given, expected, atol=1e-5)
    assert not torch.allclose(given, exact, atol=1e-3)
    text = loaded.generate("What is in the picture?", images=[place / "picture.png"], max_tokens=4).text
    other = edgerazor.load(folder, threads=1, engine="transformers")
    assert other.generate("What is in the picture?", images=[place / "picture.png"], max_tokens=4).text == text
    assert len(list((tmp_path / "job" / "pictures").iterdir())) == 4  # two sources, both towers


def test_an_interrupted_training_goes_on(place: Path, job: Path, tmp_path: Path, monkeypatch, run: Run) -> None:
    """Ended behind its third step, it ends with the very student of a training that was not."""
    count_step = Trainer.count_step

    def ending(self: Trainer, loss: float) -> None:
        count_step(self, loss)
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    words = ("distill", "--recipe", place / "recipe.yaml", "--work", tmp_path / "job")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "count_step", ending)
        assert run(*words).code == 130
    assert run(*words).code == 0
    students = [WorkDir(folder).student("last") / "model.safetensors" for folder in (job, tmp_path / "job")]
    assert students[0].read_bytes() == students[1].read_bytes()


def test_generate_sees(job: Path, place: Path, run: Run) -> None:
    model = edgerazor.load(WorkDir(job).folder("pack"), threads=1)
    question, picture = "What is in the picture?", place / "picture.png"
    told = model.generate(question, images=[picture], max_tokens=4)
    assert told.prompt_tokens > training.SEQUENCE
    assert model.generate(question, images=[picture.read_bytes()], max_tokens=4).text == told.text
    shown = run("generate", question, "--work", job, "--image", picture, "--max-tokens", 4, "--json")
    assert json.loads(shown.out)["text"] == told.text
    chat = model.chat(max_tokens=4)
    first = "".join(chat.ask(question, [picture]))
    assert first == told.text
    assert "".join(chat.ask("Count the circles.")) is not None
    part = {"type": "image", "base64": base64.b64encode(picture.read_bytes()).decode()}
    message = {"role": "user", "content": [part, {"type": "text", "text": question}]}
    assert model.generate([message], chat=True, max_tokens=4).text == told.text


def test_what_cannot_be_seen_is_one_sentence(job: Path, place: Path, tmp_path: Path, run: Run) -> None:
    model = edgerazor.load(WorkDir(job).folder("pack"), threads=1)
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no picture that can be read"):
        model.generate("What?", images=[tmp_path / "no.png"])
    with pytest.raises(UserError, match="no file"):
        model.generate("What?", images=[tmp_path / "missing.png"])
    failed = run("eval", place / "teacher", "--pictures", tmp_path / "none")
    assert failed.code == 2
    assert "There are no questions about pictures" in failed.err
    copy = tmp_path / "blind"
    shutil.copytree(place / "teacher", copy)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no processor"):
        models.load_processor(copy)


def test_streams_do_not_hold_pictures(place: Path, tmp_path: Path, run: Run) -> None:
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe["data"]["packing"] = "stream"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    failed = run("calibrate", "--recipe", tmp_path / "r.yaml", "--work", tmp_path / "job")
    assert failed.code == 1
    assert "packing: document" in failed.err


def test_a_model_of_text_sees_nothing(tmp_path: Path, llama: Path, place: Path, run: Run) -> None:
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    recipe |= {"model": str(llama)}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    failed = run("calibrate", "--recipe", tmp_path / "r.yaml", "--work", tmp_path / "job")
    assert failed.code == 1
    assert "holds pictures" in failed.err


def test_the_teacher_writes_about_pictures(tmp_path: Path, run: Run) -> None:
    """Descriptions, answers to questions, and conversations with pictures answered anew, all to be read again."""
    (tmp_path / "pictures").mkdir()
    for number, talk in enumerate(corpus.talks("heldout", 3)):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(talk.picture.png())
    words = ("data", SHAPES / "teacher", "--images", tmp_path / "pictures", "--temperature", 0)
    told = run(*words, "--out", tmp_path / "own.jsonl")
    assert told.code == 0, told.err
    rows = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"][0]["path"] for row in rows] == [f"pictures/{n}.png" for n in range(3)]
    assert len({row["messages"][1]["content"][0]["text"] for row in rows}) > 1  # it looks at them
    assert "up to date" in run(*words, "--out", tmp_path / "own.jsonl").err
    questions = [json.dumps({"text": f"Count the {shape}s."}) for shape in ("circle", "square")]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions))
    words = (*words, "--prompts", tmp_path / "questions.jsonl", "--out", tmp_path / "answers.jsonl")
    assert run(*words).code == 0
    answers = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 6
    again = run(
        *("data", SHAPES / "teacher", "--prompts", tmp_path / "own.jsonl", "--temperature", 0),
        *("--out", tmp_path / "pictures" / "again.jsonl"),
    )
    assert again.code == 0, again.err
    written = [json.loads(line) for line in (tmp_path / "pictures" / "again.jsonl").read_text().splitlines()]
    assert [row["messages"][1] for row in written] == [row["messages"][1] for row in rows]
    assert written[0]["messages"][0]["content"][0]["path"] == "0.png"
    none = run("data", SHAPES / "teacher", "--images", tmp_path, "--out", tmp_path / "none.jsonl")
    assert none.code == 2
    assert "There are no pictures in" in none.err
