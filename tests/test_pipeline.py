"""The order of the stages: what is skipped, done again, refused, remembered; and dry runs, which change nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from edgerazor import packed, pipeline
from edgerazor import recipe as recipes
from edgerazor.calibration import generated_text
from edgerazor.calibration.generated_text import Answer
from edgerazor.job import JobContext
from edgerazor.stages import bench
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Outcome, Run, sha256, snapshot, write_recipe
from helpers.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path, text_file: Path) -> Path:
    """A finished job: calibrated, distilled, packed."""
    folder = tmp_path_factory.mktemp("made")
    values = yaml.safe_load(write_recipe(folder / "r.yaml", llama, text_file, distill={"steps": 2}).read_text())
    recipe, work, console = recipes.build(values), WorkDir(folder / "job"), pipeline.Console(quiet=True)
    for name in ("distill", "pack"):
        pipeline.run(name, recipe, work, console)
    return folder / "job"


@pytest.fixture
def job(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "job"))


def refused(outcome: Outcome, *sentences: str, code: int = 1) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    for sentence in sentences:
        assert sentence in outcome.err


# --- skip, and do again ------------------------------------------------------------------------


def test_what_is_up_to_date_is_skipped(run: Run, job: Path) -> None:
    before = snapshot(job)
    for name in ("calibrate", "distill", "pack"):
        again = run(name, "--work", job)
        assert f"{name} is up to date, skipping (--force to redo)" in again.err
    assert snapshot(job) == before


def test_force_does_it_again_with_the_same_outcome(run: Run, job: Path) -> None:
    before = snapshot(job)
    for name, file in (
        ("calibrate", "calibrate/stats.safetensors"),
        ("distill", "distill/best/model.safetensors"),
        ("pack", "packed/model.safetensors"),
    ):
        assert run(name, "--work", job, "--force").code == 0
        digest, time = snapshot(job)[file]
        assert digest == before[file][0]
        assert time > before[file][1]


@pytest.mark.parametrize("file", ["calibrate/plan.json", "packed/model.safetensors", "packed/tokenizer.json"])
def test_a_lost_file_is_made_again(run: Run, job: Path, file: str) -> None:
    digest = sha256(job / file)
    (job / file).unlink()
    stage = "pack" if file.startswith("packed") else "calibrate"
    assert "up to date" not in run(stage, "--work", job).err
    assert sha256(job / file) == digest
    assert "up to date" in run("distill", "--work", job).err


@pytest.mark.parametrize("stage", ["calibrate", "distill", "pack"])
def test_a_damaged_manifest_is_no_manifest(run: Run, job: Path, stage: str) -> None:
    path = WorkDir(job).manifest_file(stage)
    path.write_text("{")
    again = run(stage, "--work", job)
    assert again.code == 0
    assert f"{stage} is not taken for finished" in again.err
    assert json.loads(path.read_text())["stage"] == stage
    assert "up to date" in run("pack", "--work", job).err


def test_a_packed_student_is_the_same_wherever_the_teacher_lies(
    run: Run, job: Path, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(llama, tmp_path / "elsewhere" / llama.name)
    text = shutil.copy(text_file, tmp_path / "other.txt")
    recipe = write_recipe(tmp_path / "r.yaml", elsewhere, Path(text), distill={"steps": 2})
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "second").code == 0
    assert run("pack", "--work", tmp_path / "second").code == 0
    assert sha256(tmp_path / "second/packed/model.safetensors") == sha256(job / "packed/model.safetensors")


def test_measuring_follows_a_new_pack(run: Run, job: Path) -> None:
    first = run("eval", "--work", job, "--json")
    assert first.code == 0, first.err
    assert run("eval", "--work", job, "--json").out == first.out
    recipe = recipes.build(recipes.load(job / "recipe.yaml"))
    before = bench.STAGE.inputs(JobContext(recipe, WorkDir(job), pipeline.Console(quiet=True)))
    assert run("distill", "--work", job, "--steps", 3, "--force").code == 0
    again = run("eval", "--work", job, "--json")
    assert "pack: writing the packed model" in again.err
    assert again.json()["text"]["kl"] != first.json()["text"]["kl"]
    after = bench.STAGE.inputs(JobContext(recipe, WorkDir(job), pipeline.Console(quiet=True)))
    assert {key for key in after if after[key] != before[key]} == {"pack"}


# --- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--bits", 4], "bits was 1.88, and is 4.0 now"),
        (["--seed", 3], "seed was 0, and is 3 now"),
        (["--steps", 9], "distill.steps was 2, and is 9 now"),
        (["--group-size", 32], "calibrate.group_size was 40, and is 32 now"),
        (["--sequence-length", 16], "data.sequence_length was 32, and is 16 now"),
    ],
)
def test_other_settings_do_not_throw_a_student_away(run: Run, job: Path, options: list[Any], difference: str) -> None:
    before = snapshot(job)
    refused(run("distill", "--work", job, *options), difference, "--force")
    assert snapshot(job) == before  # the recipe neither
    assert run("distill", "--work", job).code == 0


def test_other_text_is_named_by_its_hash(run: Run, job: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Some other text. " * 200)
    refused(run("distill", "--work", job, "--data", tmp_path / "other.txt"), "data was ", ", and is ")


def test_calibrate_does_not_pull_the_plan_from_under_a_student(run: Run, job: Path) -> None:
    before = snapshot(job)
    refused(run("calibrate", "--work", job, "--bits", 3), "bits was 1.88, and is 3.0 now")
    shutil.rmtree(job / "distill" / "best")
    (job / "distill" / "manifest.json").unlink()  # an interrupted training is protected as well
    refused(run("calibrate", "--work", job, "--bits", 3), "holds an interrupted training")
    assert snapshot(job / "calibrate") == {
        name.removeprefix("calibrate/"): value for name, value in before.items() if name.startswith("calibrate/")
    }


def test_force_takes_the_new_settings(run: Run, job: Path) -> None:
    done = run("distill", "--work", job, "--bits", 4, "--force", "--json")
    assert done.json()["notation"].startswith("W4-")
    assert run("pack", "--work", job, "--json").json()["nominal_bits"] == 4.0


def test_another_model_is_told_the_command_that_would_be_right(
    run: Run, job: Path, make_model: Any, tmp_path: Path
) -> None:
    make_model(tmp_path / "other", "qwen3")
    for name in ("calibrate", "distill"):
        answer = run(name, tmp_path / "other", "--work", job)
        refused(answer, "belongs to another model", f"edgerazor {name} {tmp_path / 'other'} --work {job}-other", code=2)


def test_a_changed_teacher_is_named_as_such(run: Run, job: Path, llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    values = yaml.safe_load((job / "recipe.yaml").read_text()) | {"model": str(copy)}
    WorkDir(job).write_recipe(yaml.safe_dump(values))
    assert run("distill", "--work", job).code == 0
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    refused(run("distill", "--work", job), "have changed since", code=2)


def test_pack_without_a_student_names_the_command(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    refused(run("pack", "--recipe", recipe, "--work", tmp_path / "job"), f"`edgerazor distill {llama}`")
    refused(run("eval", "--recipe", recipe, "--work", tmp_path / "job"), "no finished student to pack")
    assert not (tmp_path / "job").exists()


def test_rounding_does_not_replace_a_student(run: Run, job: Path, llama: Path) -> None:
    before = snapshot(job)
    refused(run("pack", llama, "--bits", 4, "--work", job), "holds a student", f"--work {job}-rounded", code=2)
    assert snapshot(job) == before


def test_a_rounded_model_stands_alone(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    job = tmp_path / "rounded"
    assert run("pack", llama, "--bits", 4, "--group-size", 40, "--work", job).code == 0
    measured = run("eval", "--work", job, "--data", text_file, "--json")
    assert measured.code == 0, measured.err
    assert measured.json()["text"]["kl"] > 0
    assert "up to date" in run("pack", llama, "--bits", 4, "--work", job).err


def test_two_runs_in_one_folder(run: Run, job: Path) -> None:
    with WorkDir(job).lock():
        refused(run("distill", "--work", job), f"Another edgerazor (process {os.getpid()}) is working in {job}.")


def test_somebody_elses_folder(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    (tmp_path / "project" / "eval").mkdir(parents=True)
    (tmp_path / "project" / "eval" / "mine.py").write_text("mine")
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    refused(run("distill", "--recipe", recipe, "--work", tmp_path / "project"), "did not write", code=2)
    assert (tmp_path / "project" / "eval" / "mine.py").read_text() == "mine"


# --- remembered --------------------------------------------------------------------------------


@pytest.mark.slow
def test_later_commands_know_what_was_asked_from_any_folder(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    shutil.copytree(llama, here / "model")
    shutil.copy(text_file, here / "text.txt")
    monkeypatch.chdir(here)
    options = ["--bits", 2, "--steps", 1, "--group-size", 40, "--sequence-length", 32, "--batch-size", 2]
    assert run("distill", "./model", "--data", "text.txt", *options, "--threads", 1).code == 0
    stored = yaml.safe_load((here / "edgerazor-work" / "recipe.yaml").read_text())
    assert stored["model"] == str(here / "model")
    assert stored["data"]["train"] == [{"file": str(here / "text.txt")}]
    monkeypatch.chdir(there)
    work = "../here/edgerazor-work"
    assert "distill is up to date" in run("distill", "--work", work).err
    assert run("pack", "--work", work).code == 0
    os.rename(here / "edgerazor-work", there / "edgerazor-work")
    assert "pack is up to date" in run("pack").err


def test_a_recipe_files_paths_are_relative_to_it(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    shutil.copytree(llama, tmp_path / "model")
    shutil.copy(text_file, folder / "text.txt")
    write_recipe(folder / "r.yaml", Path("../model"), Path("text.txt"), calibrate={"bits": 4})
    monkeypatch.chdir(tmp_path)
    done = run("calibrate", "--recipe", "recipes/r.yaml", "--bits", "1.58", "--json")
    assert done.json()["nominal_bits"] == 1.58  # the command line wins
    stored = yaml.safe_load((tmp_path / "edgerazor-work" / "recipe.yaml").read_text())
    assert stored["calibrate"]["bits"] == 1.58
    assert stored["data"]["train"] == [{"file": str(folder / "text.txt")}]


def test_measuring_on_other_text_changes_nothing_for_the_student(run: Run, job: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Some other text. " * 200)
    other = run("eval", "--work", job, "--data", tmp_path / "other.txt", "--json")
    assert other.code == 0, other.err
    assert "distill is up to date" in run("distill", "--work", job).err
    own = run("eval", "--work", job, "--json")
    assert own.json()["text"]["kl"] != other.json()["text"]["kl"]


# --- no data -----------------------------------------------------------------------------------


def test_without_data_the_teacher_writes(run: Run, tmp_path: Path, llama: Path) -> None:
    data = {"sequence_length": 100000, "generated_tokens": 3000}
    recipe = write_recipe(tmp_path / "r.yaml", llama, None, data=data, distill={"steps": 1})
    done = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json")
    assert done.code == 0, done.err
    assert "the teacher writes 3,000 tokens itself" in done.err
    assert done.json()["tokens"] == 2 * 128  # rows are no longer than the model's positions
    lines = (tmp_path / "job" / "calibrate" / "generated.jsonl").read_text().splitlines()
    assert len({json.loads(line)["text"] for line in lines}) > 0.9 * len(lines)
    assert json.loads((tmp_path / "job" / "calibrate" / "result.json").read_text())["tokens"] >= 128 * 4
    (tmp_path / "job" / "calibrate" / "manifest.json").unlink()
    assert "distill is up to date" in run("distill", "--work", tmp_path / "job").err  # it writes the same again


def test_a_teacher_without_words_is_refused(
    run: Run, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        generated_text.Writer, "draw", lambda _self, prompts, *_, **__: [Answer([1], True)] * len(prompts)
    )
    recipe = write_recipe(tmp_path / "r.yaml", llama, None)
    refused(run("calibrate", "--recipe", recipe, "--work", tmp_path / "job"), "writes no text by itself", "--data FILE")


# --- dry runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["calibrate", "distill", "pack", "eval", "bench"])
def test_a_dry_run_changes_nothing(run: Run, job: Path, name: str) -> None:
    before = snapshot(job)
    plan = run(name, "--work", job, "--dry-run", "--json")
    assert plan.code == 0, plan.err
    assert isinstance(plan.json(), dict)
    for_people = run(name, "--work", job, "--dry-run")
    assert " MB" in for_people.out
    assert "bytes" not in for_people.out
    assert snapshot(job) == before


@pytest.mark.parametrize("name", ["calibrate", "distill"])
@pytest.mark.parametrize("with_text", [True, False])
def test_a_dry_run_makes_no_folder_and_foretells_the_size(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, name: str, with_text: bool, made: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file if with_text else None, distill={"steps": 2})
    plan = run(name, "--recipe", recipe, "--work", tmp_path / "job", "--dry-run", "--json")
    assert plan.code == 0, plan.err
    assert not (tmp_path / "job").exists()
    found = plan.json()
    assert found["seconds"] > 0
    assert found["memory_bytes"] + found.get("mapped_bytes", 0) > (llama / "model.safetensors").stat().st_size
    calibrated = json.loads((made / "calibrate" / "result.json").read_text())
    assert found["notation"] == calibrated["notation"]
    size = pytest.approx(calibrated["bytes"], abs=0 if with_text else 64)  # the packed file says from what text
    if name == "calibrate":
        assert (found["bytes"], found["tokens"]) == (size, calibrated["tokens"])
    else:
        assert (found["result_bytes"], found["steps"], found["tokens_per_step"]) == (size, 2, 64)
        assert "calibrate would run first" in plan.err


def test_pack_foretells_what_it_writes(run: Run, job: Path) -> None:
    plan = run("pack", "--work", job, "--dry-run", "--json").json()
    packed = json.loads((job / "packed" / "result.json").read_text())
    assert plan["notation"] == packed["notation"]
    assert (plan["bytes"], plan["real_bits"]) == (packed["bytes"], packed["real_bits"])


def test_a_dry_run_is_refused_like_the_run(run: Run, job: Path) -> None:
    refused(run("distill", "--work", job, "--bits", 4, "--dry-run"), "bits was 1.88, and is 4.0 now")
    assert "would be skipped" in run("distill", "--work", job, "--dry-run").err


def test_run_does_all_five(run: Run, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages of a recipe and one table; bench's processes have tests of their own."""
    recipe = job.parent / "r.yaml"
    recipe.write_text((job / "recipe.yaml").read_text())
    called: list[str] = []

    def measure(context: JobContext) -> Any:
        called.append("bench")
        context.work.folder("bench").mkdir(exist_ok=True)
        return bench.BenchResult(
            bytes=1,
            load_seconds=1,
            peak_memory_bytes=1,
            bandwidth_bytes_per_second=1,
            threads=[1],
            bandwidths=[],
            bandwidth_of="",
            machine="m",
            engines=[],
            runs=[],
            notes=[],
        )

    monkeypatch.setattr(bench.STAGE, "run", measure)
    done = run("run", recipe, "--work", job, "--json")
    assert done.code == 0, done.err
    assert done.json()["stages"] == ["calibrate", "distill", "pack", "eval", "bench"]
    assert [row["name"] for row in done.json()["models"]] == ["teacher", "packed"]
    run("run", recipe, "--work", job)
    assert called == ["bench"]


# --- the rotation of a model, where nobody says it ---------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model of 512 features."""
    folder = tmp_path_factory.mktemp("wide")
    write_tiny_model(
        tokenizer,
        folder,
        "llama",
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return folder


def rotations(folder: Path) -> dict[str, int]:
    return packed.PackedModel.open(folder).header.rotations


def test_wide_models_are_rotated_and_narrow_ones_are_not(run: Run, wide: Path, llama: Path, tmp_path: Path) -> None:
    said = run("pack", wide, "--bits", 4, "--work", tmp_path / "wide")
    assert said.code == 0, said.err
    assert "rotation: " in said.err
    assert rotations(tmp_path / "wide" / "packed") == {"64": 64, "128": 128, "512": 512}
    assert "rotation: " not in run("pack", llama, "--bits", 4, "--work", tmp_path / "narrow").err
    assert rotations(tmp_path / "narrow" / "packed") == {}


@pytest.mark.parametrize("words", [["--rotation", "none"], ["--export", "gptq"], ["--init", "rtn"]])
def test_what_is_not_rotated_stays_so(run: Run, wide: Path, tmp_path: Path, words: list[str]) -> None:
    work = tmp_path / "job"
    said = run("pack", wide, "--bits", 4, *words, "--work", work)
    assert said.code == 0, said.err
    assert rotations(work / "packed") == {}
    again = run("pack", wide, "--bits", 4, *words, "--work", work)
    assert "up to date" in again.err


def test_an_export_of_a_rotated_student_is_refused_and_nothing_lost(
    run: Run, wide: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", wide, text_file, distill={"steps": 1})
    work = tmp_path / "job"
    assert run("distill", "--recipe", recipe, "--work", work).code == 0
    assert run("pack", "--work", work).code == 0
    assert rotations(work / "packed")
    refused(run("pack", "--work", work, "--export", "gguf"), "`--rotation none`")
    assert run("pack", "--work", work).code == 0
    assert rotations(work / "packed")
