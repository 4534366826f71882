"""A job under a budget: what is chosen, what the user keeps, and that a resumed training does not choose again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.job import JobContext
from edgerazor.recipe import CHOSEN_BY_BUDGET, Recipe, build
from edgerazor.training import budget, budget_choice, budget_defaults, speed
from edgerazor.training.speed import MachineSpeed
from edgerazor.workdir import WorkDir
from helpers.places import ROOT
from helpers.tiny_job import Run
from helpers.trainings import interrupt_at


@pytest.fixture(autouse=True)
def constant_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of_speed(monkeypatch, 1e10)


def machine_of_speed(monkeypatch: pytest.MonkeyPatch, operations: float) -> None:
    """Every machine does so many operations a second."""
    for module in (speed, budget_choice):
        monkeypatch.setattr(module, "measure_machine", lambda *_: MachineSpeed(operations, operations / 10, 1e5))


def write_short(path: Path, model: Path, text: Path, **distill: Any) -> Path:
    """A recipe that leaves the choice to the budget, but for what is given."""
    values = {
        "model": str(model),
        "threads": 1,
        "data": {"train": [{"file": str(text)}], "sequence_length": 32},
        "calibrate": {"bits": 1.88, "plan": "interleave", "group_size": 40, "sequences": 4},
        "distill": {"precision": "float32", "evaluate_sequences": 2, **distill},
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def kept(job: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((job / "budget.json").read_text())["values"]
    return values


def test_a_budget_of_tokens_chooses_and_says_so(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    job, recipe = tmp_path / "job", write_short(tmp_path / "r.yaml", llama, text_file)
    done = run("distill", "--recipe", recipe, "--work", job, "--tokens", "2k", "--json")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["Budget", "Training", "Start"]
    assert "2,000 tokens, about" in lines[0]
    result = done.json()
    assert result["chosen"] == kept(job)
    assert result["steps"] == 8  # 256 tokens each
    manifest = json.loads((job / "distill" / "manifest.json").read_text())
    assert manifest["inputs"]["distill.learning_rate"] == str(result["chosen"]["distill"]["learning_rate"])
    assert manifest["section"]["schedule"] == "cosine"
    stored = recipes.load(job / "recipe.yaml")
    assert stored["distill"]["tokens"] == 2000
    assert "learning_rate" not in stored["distill"]  # it was not asked for
    assert "distill is up to date" in run("distill", "--work", job).err
    packed = run("pack", "--work", job)
    assert packed.code == 0, packed.err
    assert "calibrate is up to date" not in packed.err or "distill: " not in packed.err


def test_what_is_set_stays(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    """Even where it is the default, and in commands that do not say it again."""
    job = tmp_path / "job"
    recipe = write_short(tmp_path / "r.yaml", llama, text_file, losses=[{"name": "ce"}], learning_rate=2e-5)
    asked = ("--tokens", "2k", "--batch-size", "8")
    done = run("distill", "--recipe", recipe, "--work", job, *asked, "--json")
    assert done.code == 0, done.err
    assert done.json()["steps"] == 8
    assert set(kept(job)["distill"]) == {"schedule", "warmup", "evaluate_every", "checkpoint_every"}
    stored = recipes.load(job / "recipe.yaml")["distill"]
    assert (stored["learning_rate"], stored["batch_size"]) == (2e-5, 8)
    again = run("distill", "--work", job)
    assert again.code == 0, again.err
    assert "distill is up to date" in again.err


def test_a_resumed_training_does_not_choose_again(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, recipe = tmp_path / "job", write_short(tmp_path / "r.yaml", llama, text_file)
    asked = ("distill", "--recipe", recipe, "--work", job, "--max-time", "1h")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(2, patch)
        assert run(*asked).code == 130
    before = kept(job)
    machine_of_speed(monkeypatch, 1e14)
    state_file = job / "distill" / "checkpoints" / "current" / "state.json"
    state = json.loads(state_file.read_text())
    state["progress"]["seconds"] = 4000.0
    state_file.write_text(json.dumps(state))
    done = run(*asked)
    assert done.code == 0, done.err
    assert "distill goes on from step 2" in done.err
    assert "chosen for the budget before" in done.err
    assert kept(job) == before
    forced = run(*asked, "--dry-run", "--force", "--json")
    assert forced.json()["chosen"]["distill"]["evaluate_every"] != before["distill"]["evaluate_every"]


def test_more_time_goes_on_with_the_same_settings(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    job, recipe = tmp_path / "job", write_short(tmp_path / "r.yaml", llama, text_file)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(2, patch)
        assert run("distill", "--recipe", recipe, "--work", job, "--max-time", "1h").code == 130
    before = kept(job)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        resumed = run("distill", "--work", job, "--max-time", "90h")
    assert resumed.code == 130, resumed.err
    assert "distill goes on from step 2" in resumed.err
    assert kept(job) == before


def test_nothing_is_chosen_without_a_budget_or_with_steps(run: Run, tmp_path: Path, llama: Path) -> None:
    for settings in ({}, {"steps": 5}, {"steps": 5, "tokens": 1000}, {"steps": 5, "max_time": 10.0}):
        recipe = build({"model": str(llama), "distill": settings})
        assert budget_choice.open_fields(recipe) == {}
        assert budget_choice.choose(JobContext(recipe, WorkDir(tmp_path), Console(quiet=True)), None) is None
    rounding = build({"model": str(llama), "distill": {"tokens": 5}, "pack": {"source": "teacher"}})
    assert budget_choice.open_fields(rounding) == {}


def test_text_that_the_teacher_has_written_stays(tmp_path: Path, llama: Path) -> None:
    """What a budget chooses of it is chosen before it is written, and kept with more time and with --force."""
    work = WorkDir(tmp_path / "job")

    def choice(**settings: Any) -> budget_choice.BudgetChoice:
        recipe = build({"model": str(llama), "data": {"sequence_length": 32}, "distill": settings})
        chosen = budget_choice.choose(JobContext(recipe, work, Console(quiet=True)), None)
        assert chosen is not None
        return chosen

    text = {"data": choice(tokens=6000).values["data"]}
    assert text["data"]["generated_tokens"] >= budget_defaults.FEWEST_WRITTEN
    work.generated_text.parent.mkdir(parents=True)
    work.generated_text.touch()
    assert "data" not in choice(tokens=6000).values  # calibrate had it written without a budget
    budget_choice.store(budget_choice.BudgetChoice(request="", values=text, reasons=[]), work)
    assert choice(tokens=50_000).values["data"] == text["data"]
    given = {"data": {"generated_tokens": 600}, "distill": {"tokens": 5}}
    assert budget_choice.open_fields(build(given))["data"] == {"sequence_length"}


def test_sequences_are_no_longer_than_a_step_where_nobody_says_how_long(tmp_path: Path, llama: Path) -> None:
    """A recording has sequences of its own."""

    def fields(**distill: Any) -> dict[str, set[str]]:
        return budget_choice.open_fields(build({"model": str(llama), "distill": {"tokens": 50_000, **distill}}))

    assert fields()["data"] == {"generated_tokens", "sequence_length"}
    assert "data" not in fields(recording=str(tmp_path))
    recipe = build({"model": str(llama), "distill": {"tokens": 50_000}})
    context = JobContext(recipe, WorkDir(tmp_path / "job"), Console(quiet=True))
    longest = context.sequence_length(context.teacher_outline.model)
    chosen = budget_choice.choose(context, None)
    assert chosen is not None
    assert chosen.values["data"]["sequence_length"] == min(256, longest)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_published_recipes_stay_as_they_are(file: Path) -> None:
    """They name every setting, or give steps."""
    assert budget_choice.open_fields(build(recipes.load(file))) == {}


def test_a_choice_is_applied_to_what_is_open_alone() -> None:
    recipe = build({"distill": {"tokens": 1000, "learning_rate": 0.5}})
    choice = budget_choice.BudgetChoice(
        request="", values={"distill": {"learning_rate": 1e-3, "warmup": 0.25, "losses": [{"name": "ce"}]}}, reasons=[]
    )
    resolved, chosen = budget_choice.apply(recipe, choice)
    assert (resolved.distill.learning_rate, resolved.distill.warmup) == (0.5, 0.25)
    assert [term.name for term in resolved.distill.losses] == ["ce"]
    assert chosen == {"distill": {"warmup": 0.25, "losses": [{"name": "ce"}]}}
    assert Recipe() == budget_choice.apply(Recipe(), choice)[0]


def test_a_damaged_choice_is_made_again(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    job, recipe = tmp_path / "job", write_short(tmp_path / "r.yaml", llama, text_file)
    assert run("distill", "--recipe", recipe, "--work", job, "--tokens", "600").code == 0
    whole = kept(job)
    for damaged in ("{", "[]", '{"request": 5}', json.dumps({"request": "", "values": {"distill": 7}, "reasons": []})):
        (job / "budget.json").write_text(damaged)
        assert run("distill", "--work", job).code == 0
        assert kept(job) == whole


def test_every_chosen_field_is_a_field() -> None:
    for section, names in CHOSEN_BY_BUDGET.items():
        assert set(names) <= set(type(getattr(Recipe(), section)).model_fields)


def test_time_of_cpu_passes_only_while_the_process_computes() -> None:
    wall, cpu = budget.clock("wall"), budget.clock("cpu")
    time.sleep(0.2)
    assert budget.clock("wall") - wall >= 0.2
    assert budget.clock("cpu") - cpu < 0.1


def test_the_speed_is_that_of_the_step(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    """A step has costs of its own, so that small steps train fewer tokens in the same time."""
    promised = {}
    for rows in (1, 64):
        recipe = write_short(tmp_path / f"{rows}.yaml", llama, text_file, batch_size=rows)
        done = run("distill", "--recipe", recipe, "--work", tmp_path / f"job{rows}", "--max-time", "60s", "--dry-run")
        assert done.code == 0, done.err
        line = next(line for line in done.err.splitlines() if line.startswith("Budget:"))
        promised[rows] = int(line.split()[1].replace(",", ""))
    assert promised[64] > 2 * promised[1]


def test_gptqs_codes_are_no_choice_where_memory_is_little_or_there_is_no_teacher(
    tmp_path: Path, llama: Path, text_file: Path
) -> None:
    """Nor where activations have bits of their tokens, which one layer alone does not know."""

    def seconds(**changes: Any) -> float | None:
        values = {"model": str(llama), "data": {"train": [{"file": str(text_file)}]}, **changes}
        context = JobContext(build(values), WorkDir(tmp_path / "job"), Console(quiet=True))
        return budget_choice.gptq_seconds(context, 32)

    plenty = seconds(distill={"max_time": 60})
    assert plenty is not None
    assert plenty > 0
    assert seconds(distill={"max_time": 60, "memory": "16GB"}) is None
    assert seconds(distill={"max_time": 60, "teacher_source": "streamed"}) is None
    assert seconds(distill={"max_time": 60, "initialise": "random"}) is None
    assert seconds(calibrate={"adaptive_tokens": "causal"}) is None
    more = seconds(calibrate={"sequences": 1024})
    assert more is not None
    assert more > plenty
