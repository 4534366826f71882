"""Training: resumed equals uninterrupted, divided equals whole, and what cannot work is refused at the start."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config

from edgerazor import losses, models
from edgerazor.errors import UserError
from edgerazor.recipe import Distill
from edgerazor.training import Captures, Teacher, Trainer, capture, checkpoint, objective, preparation
from edgerazor.training.optimizer import learning_rate_factor
from helpers.tiny_job import Run, call, metrics, sha256, spawn, write_recipe
from helpers.tiny_models import ModelMaker, mostly_slow
from helpers.trainings import DEADLY, WEIGHTS, assert_same, interrupt_at, largest_difference


@pytest.fixture
def recipe(tmp_path: Path, llama: Path, text_file: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", llama, text_file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path, text_file: Path) -> Path:
    """The working directory of an uninterrupted training and its packed model, made in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder / "recipe.yaml", llama, text_file)
    done = spawn("distill", "--recipe", recipe, "--work", folder / "job")
    assert done.code == 0, done.err
    assert call("pack", "--work", folder / "job").code == 0
    return folder / "job"


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", mostly_slow([1, 2, 3], 2))
def test_interrupted_and_resumed_equals_uninterrupted(
    run: Run, recipe: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    """Ctrl-C at the end of a step saves and exits with 130."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(step, patch)
        stopped = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert stopped.code == 130
    assert f"Interrupted at step {step}; everything is saved." in stopped.err
    resumed = run("distill", "--work", tmp_path / "job")
    assert resumed.code == 0
    assert f"distill goes on from step {step}" in resumed.err
    assert_same(run, tmp_path / "job", whole)


@pytest.mark.slow
def test_killed_again_and_again_equals_uninterrupted(run: Run, recipe: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL while the first students are saved, between the renames of checkpoints, in the middle of others."""
    job = tmp_path / "job"
    for moment in (12, 59, 28, 24):
        died = spawn("distill", "--recipe", recipe, "--work", job, code=DEADLY.format(moment=moment))
        assert died.code == -signal.SIGKILL, died.err
    done = run("distill", "--work", job)
    assert done.code == 0
    assert "goes on from step" in done.err
    assert_same(run, job, whole)


def test_a_full_disk_loses_nothing(
    run: Run, recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, count = tmp_path / "job", [0]

    def save_file(tensors: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, *args, **kwargs)

    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    full = run("distill", "--recipe", recipe, "--work", job)
    assert (full.code, full.err.count("The disk is full")) == (1, 1)
    monkeypatch.setattr(checkpoint, "save_file", original)
    assert run("distill", "--work", job).code == 0
    assert_same(run, job, whole)


def test_a_lost_student_is_trained_again(run: Run, whole: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    shutil.copytree(whole, job)
    (job / "distill" / "best" / "model.safetensors").unlink()
    again = run("distill", "--work", job)
    assert again.code == 0
    assert "starts again, because a student that it made is missing" in again.err
    assert_same(run, job, whole)


def test_a_lost_report_costs_no_training(run: Run, whole: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    shutil.copytree(whole, job)
    (job / "distill" / "result.json").unlink()
    again = run("distill", "--work", job, "--json")
    assert "goes on from step 5" in again.err
    assert again.json()["steps"] == 5
    assert_same(run, job, whole)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_one_sentence(run: Run, whole: Path, tmp_path: Path, name: str) -> None:
    job = tmp_path / "job"
    shutil.copytree(whole, job)
    (job / "distill" / "manifest.json").unlink()
    path = job / "distill" / "checkpoints" / "current" / name
    path.write_bytes(path.read_bytes()[:100])
    failed = run("distill", "--work", job)
    assert failed.code == 1
    assert "is damaged and cannot be resumed" in failed.err
    assert "edgerazor distill --force" in failed.err
    assert run("distill", "--work", job, "--force").code == 0
    assert_same(run, job, whole)


def test_max_time_counts_across_resumes(run: Run, recipe: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(2, patch)
        assert run("distill", "--recipe", recipe, "--work", job, "--max-time", 1000).code == 130
    state_file = job / "distill" / "checkpoints" / "current" / "state.json"
    state = json.loads(state_file.read_text())
    assert state["progress"]["seconds"] > 0
    state["progress"]["seconds"] = 1001.0
    state_file.write_text(json.dumps(state))
    done = run("distill", "--work", job, "--json").json()
    assert done["steps"] == 3  # the one step in which it notices
    assert done["seconds"] > 1000


# --- one step ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_divided_equals_whole(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    """One process with 4 sequences, accumulation of 2 times 2, and two processes with 2 give the same weights."""
    shared = {"steps": 3, "learning_rate": 2e-5}
    whole = write_recipe(tmp_path / "whole.yaml", llama, text_file, distill={**shared, "batch_size": 4})
    halves = write_recipe(tmp_path / "halves.yaml", llama, text_file, distill={**shared, "batch_size": 2})
    assert run("distill", "--recipe", whole, "--work", tmp_path / "one").code == 0
    assert run("distill", "--recipe", halves, "--work", tmp_path / "parts", "--accumulation", 2).code == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = spawn("distill", "--recipe", halves, "--work", tmp_path / "two", "--json", launcher=torchrun)
    assert two.code == 0, two.err
    assert two.json()["steps"] == 3  # only the main process prints
    assert two.err.count("distill: 3/3") == 1
    start = load_file(llama / "model.safetensors")
    trained = load_file(tmp_path / "one" / WEIGHTS)
    assert max(float((trained[name] - start[name]).abs().max()) for name in start) > 2e-5
    for other in ("parts", "two"):
        assert largest_difference(tmp_path / "one", tmp_path / other) < 1e-5, other


def test_a_training_may_go_on_with_smaller_batches(run: Run, recipe: Path, tmp_path: Path, whole: Path) -> None:
    job = tmp_path / "job"
    shutil.copytree(whole, job)
    same = run("distill", "--work", job, "--batch-size", 1, "--accumulation", 2)
    assert "distill is up to date" in same.err
    other = run("distill", "--work", job, "--batch-size", 1, "--accumulation", 3)
    assert other.code == 1
    assert "sequences per step was 2, and is 3 now" in other.err


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    break_one = "import os\nfrom edgerazor.training import Trainer\nfrom edgerazor.errors import UserError\n"
    break_one += "step = Trainer.step\n"
    break_one += "def failing(trainer, batches):\n    if os.environ['RANK'] == '1': raise UserError('Only here.')\n"
    break_one += "    return step(trainer, batches)\nTrainer.step = failing\n"
    script = tmp_path / "script.py"
    script.write_text(break_one + "from edgerazor.cli import main\nmain()\n")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script))
    done = subprocess.run(
        [sys.executable, *torchrun, "distill", "--recipe", str(recipe), "--work", str(tmp_path / "job")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 1
    assert "Error: Only here." in done.stderr


@pytest.mark.parametrize(
    ("settings", "share", "factor"),
    [
        ({}, 0.0, 1e-3 / 0.051),
        ({}, 0.05, 1.0),
        ({}, 1.0, 1.0),
        ({"warmup": 0.0, "schedule": "linear"}, 0.25, 0.75),
        ({"warmup": 0.2, "schedule": "linear", "final_learning_rate": 0.5}, 0.6, 0.75),
        ({"warmup": 0.0, "schedule": "cosine"}, 0.5, 0.5),
        ({"warmup": 0.0, "schedule": "cosine"}, 1 / 3, 0.75),
        ({"warmup": 0.0, "schedule": "cosine", "final_learning_rate": 0.1}, 1.0, 0.1),
    ],
)
def test_the_schedule(settings: dict[str, Any], share: float, factor: float) -> None:
    assert learning_rate_factor(Distill(**settings), share) == pytest.approx(factor)


def test_the_best_student_is_the_one_with_the_lowest_loss(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [line["tokens"] for line in lines] == [2 * 64, 4 * 64, 5 * 64]
    best = min(lines, key=lambda line: line["kl"])
    measured = json.loads((whole / "distill" / "best" / "measured.json").read_text())
    assert (measured["step"], measured["value"]) == (best["step"], best["kl"])
    result = json.loads((whole / "distill" / "result.json").read_text())
    assert (result["best_step"], result["best"]) == (best["step"], best["kl"])


def test_training_lowers_the_divergence(whole: Path) -> None:
    lines = metrics(whole)
    assert lines[-1]["kl"] < lines[0]["kl"]


# --- without a teacher, and the control --------------------------------------------------------


def test_training_without_a_teacher(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    settings = {"losses": [{"name": "ce"}], "steps": 8, "evaluate_every": 1, "learning_rate": 3e-3}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    done = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json")
    assert done.json()["measure"] == "held-out cross_entropy, nats per token"
    lines = metrics(tmp_path / "job")
    assert all("kl" not in line for line in lines)
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"]


def test_the_control_begins_at_random(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    settings = {"initialise": "random", "steps": 1, "learning_rate": 1e-9}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    done = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json")
    assert done.code == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    student = load_file(tmp_path / "job" / WEIGHTS)[name]
    teacher = load_file(llama / "model.safetensors")[name]
    assert abs(float(torch.corrcoef(torch.stack([student.flatten(), teacher.flatten()]))[0, 1])) < 0.05
    assert float(student.std()) == pytest.approx(0.02, rel=0.05)  # Llama's own initialisation
    # a random model is about as sure as a uniform one
    assert metrics(tmp_path / "job")[0]["cross_entropy"] == pytest.approx(math.log(300), rel=0.05)


# --- what losses capture, schedules, several teachers -------------------------------------------

GUIDED: list[dict[str, Any]] = [
    {"name": "forward_kl", "temperature": 2.0, "schedule": "cosine", "end_factor": 0.2},
    {"name": "attention_kl", "options": {"layers": "last"}},
    {"name": "attention_cosine", "schedule": "linear", "start_factor": 0.0, "end_factor": 2.0, "schedule_share": 0.5},
    {"name": "relation", "options": {"of": "both"}},
    {"name": "qk_entropy", "weight": 0.5},
    {"name": "lafd", "options": {"metric": "l2", "count": 1}},
]


@pytest.mark.parametrize("kv_bits", mostly_slow([8, 16], 8))
def test_checkpointing_and_division_change_nothing_that_losses_see(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, kv_bits: int
) -> None:
    shared = {"losses": GUIDED, "steps": 3, "learning_rate": 2e-5}
    settings = {
        "whole": {"batch_size": 4},
        "recomputed": {"batch_size": 4, "gradient_checkpointing": True},
        "parts": {"batch_size": 1, "accumulation": 4},
    }
    for name, own in settings.items():
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", llama, text_file, calibrate={"kv_bits": kv_bits}, distill={**shared, **own}
        )
        assert run("distill", "--recipe", recipe, "--work", tmp_path / name).code == 0
    assert sha256(tmp_path / "whole" / WEIGHTS) == sha256(tmp_path / "recomputed" / WEIGHTS)
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") < 1e-5
    plain = write_recipe(tmp_path / "plain.yaml", llama, text_file, distill={**shared, "losses": GUIDED[:1]})
    assert run("distill", "--recipe", plain, "--work", tmp_path / "plain").code == 0
    assert largest_difference(tmp_path / "whole", tmp_path / "plain") > 2e-5


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_a_teacher_with_dropout_makes_a_student_that_resumes_exactly(
    family: str, run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"attention_dropout": 0.4} | ({"resid_pdrop": 0.4, "embd_pdrop": 0.4} if family == "phi" else {})
    make_model(tmp_path / "model", family, **rates)
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model", text_file, distill={"steps": 4})
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "whole").code == 0
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == 130
    torch.manual_seed(1234)  # the random state of another process
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == 0
    assert sha256(tmp_path / "job" / WEIGHTS) == sha256(tmp_path / "whole" / WEIGHTS)
    assert metrics(tmp_path / "job") == metrics(tmp_path / "whole")


def test_activations_of_sixteen_bits_train_from_end_to_end(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate={"activation_bits": 16})
    done = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json")
    assert done.code == 0, done.err
    assert done.json()["steps"] == 5
    assert run("pack", "--work", tmp_path / "job", "--json").json()["verified"] is True


def test_losses_are_given_hidden_states_as_transformers_returns_them(llama: Path) -> None:
    """The last one is behind the final norm; of student and teacher."""
    model, _ = models.load(str(llama))
    structure, ids = models.structure(model), torch.arange(4, 20)[None]
    layers = tuple(range(structure.layer_count + 1))
    needed = Captures(hidden_layers=layers)
    teacher = Teacher(model, structure, structure.head_path, (1.0, None))
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
        with capture(model, structure, structure.head_path, needed) as captured:
            model(input_ids=ids, use_cache=False)
    for hidden in (captured.hidden_states, teacher.outputs(ids, needed).hidden_states):
        assert sorted(hidden) == list(layers)
        for layer, state in enumerate(expected):
            assert torch.equal(hidden[layer], state), layer


def test_hidden_states_of_all_layers_are_never_kept_for_two_micro_batches(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAFD that chooses anew in each step needs all layers of the teacher. Of the micro-batches before the current one
    only the layers are kept that were compared last, and the losses are the same as with all layers kept."""
    compared: list[list[int]] = []
    waiting: list[int] = []
    total_loss, batch_statistics = losses.total_loss, objective.batch_statistics
    targets: list[Any] = []

    def noting(terms: Any, student: Any, teacher: Any, labels: Any, totals: Any) -> Any:
        compared.append(sorted(teacher.hidden_states))
        targets.clear()
        return total_loss(terms, student, teacher, labels, totals)

    def counting(terms: Any, labels: Any, target: Any) -> Any:
        assert len(target.hidden_states) == 3  # the embedding's output and two layers
        waiting.extend(len(earlier.hidden_states) for earlier in targets)
        targets.append(target)
        return batch_statistics(terms, labels, target)

    monkeypatch.setattr(losses, "total_loss", noting)
    monkeypatch.setattr(objective, "batch_statistics", counting)
    terms = [{"name": "eakld"}, {"name": "lafd", "options": {"select": "batch", "count": 1}}]
    settings = {"losses": terms, "steps": 3, "accumulation": 3, "evaluate_every": 9}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == 0
    assert len(compared) == 9
    assert {len(layers) for layers in compared} == {1}
    assert waiting == [0, 0, 0, *[1] * 6]  # (1, 2) micro-batches wait in each of three steps
    expected = metrics(tmp_path / "job")
    monkeypatch.setattr(objective, "drop_other_layers", lambda target, layers: None)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "all").code == 0
    assert len(compared[-1]) == 3
    assert metrics(tmp_path / "all") == expected


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_teachers_head_multiplies_each_position_once_in_a_step(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """EAKLD needs the teacher's logits before the student's forward pass, for its gate, and after it."""
    rows: dict[bool, int] = {True: 0, False: 0}
    logits, step = losses.Head.logits, Trainer.step
    steps: list[tuple[int, int, int]] = []

    def counting(self: Any, states: torch.Tensor) -> torch.Tensor:
        rows[self.master is None] += len(states)
        return logits(self, states)

    def stepping(trainer: Trainer, batches: Any) -> float:
        rows.update({True: 0, False: 0})
        loss = step(trainer, batches)
        predicted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        steps.append((rows[True], rows[False], predicted))
        return loss

    monkeypatch.setattr(losses.Head, "logits", counting)
    monkeypatch.setattr(Trainer, "step", stepping)
    terms = [{"name": "ce", "weight": 0.1}, {"name": "eakld", "weight": 2.0}, {"name": "lafd", "weight": 0.1}]
    settings = {"losses": terms, "steps": 2, "accumulation": accumulation, "evaluate_every": 9}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == 0
    assert len(steps) == 2
    assert all(teacher == predicted == student > 0 for teacher, student, predicted in steps)


def test_a_scheduled_training_resumes_exactly(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill={"losses": GUIDED})
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "whole").code == 0
    assert run("pack", "--work", tmp_path / "whole").code == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(2, patch)
        assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == 130
    assert run("distill", "--work", tmp_path / "job").code == 0
    assert_same(run, tmp_path / "job", tmp_path / "whole")


def test_a_schedule_multiplies_the_weight(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    for name, term in {
        "scheduled": {"weight": 4.0, "schedule": "linear", "start_factor": 0.5, "end_factor": 0.5},
        "constant": {"weight": 2.0},
    }.items():
        losses = [{"name": "ce"}, {"name": "eakld", **term}]
        recipe = write_recipe(tmp_path / f"{name}.yaml", llama, text_file, distill={"losses": losses})
        assert run("distill", "--recipe", recipe, "--work", tmp_path / name).code == 0
    assert sha256(tmp_path / "scheduled" / WEIGHTS) == sha256(tmp_path / "constant" / WEIGHTS)


def test_several_teachers(run: Run, tmp_path: Path, llama: Path, text_file: Path, make_model: ModelMaker) -> None:
    """One more teacher that is the model itself changes nothing; one of another kind (EdgeQAT's GPT-2) does."""
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": 304}
    make_model(tmp_path / "other", GPT2Config(**shape))
    jobs: dict[str, list[str]] = {"alone": [], "twice": [str(llama)], "two": ["other"]}
    for name, teachers in jobs.items():
        settings = {"teachers": teachers, "steps": 2, "learning_rate": 2e-5}
        recipe = write_recipe(tmp_path / f"{name}.yaml", llama, text_file, distill=settings)
        done = run("distill", "--recipe", recipe, "--work", tmp_path / name)
        assert done.code == 0, done.err
        assert (f"Compared with {llama} alone: lafd;" in done.err) == bool(teachers)
    assert largest_difference(tmp_path / "alone", tmp_path / "twice") < 1e-6
    assert largest_difference(tmp_path / "alone", tmp_path / "two") > 1e-5
    again = write_recipe(tmp_path / "two.yaml", llama, text_file, distill={"teachers": [str(llama)], "steps": 2})
    assert "distill.teachers was" in run("distill", "--recipe", again, "--work", tmp_path / "two").err


def test_padding_of_another_teachers_vocabulary(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, make_model: ModelMaker
) -> None:
    """It is left out of the mean, and the user hears of it."""
    entries = load_file(llama / "model.safetensors")["lm_head.weight"].shape[0]
    make_model(tmp_path / "padded", "llama", vocab_size=entries + 24)
    settings = {"teachers": [str(tmp_path / "padded")], "steps": 2, "losses": [{"name": "forward_kl"}]}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    done = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert done.code == 0, done.err
    words = " ".join(done.err.split())
    assert f"have {entries:,} and {entries + 24:,} entries; what only one of them has is padding" in words
    assert all(math.isfinite(line["kl"]) for line in metrics(tmp_path / "job"))


def test_teachers_that_cannot_be_averaged_are_refused(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["zzz"] = words.pop(max(words, key=lambda word: words[word]))
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill={"teachers": [str(other)]})
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert refused.code == 2
    assert "have different vocabularies" in refused.err
    settings = {"teachers": [str(llama)], "losses": [{"name": "ce"}, {"name": "lafd"}]}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "other_job")
    assert refused.code == 2
    assert "none of its losses compares next-token distributions" in refused.err


def test_layers_that_differ_are_not_compared(tmp_path: Path, llama: Path, make_model: ModelMaker) -> None:
    small = make_model(tmp_path / "small", "llama", hidden_size=48)
    narrow = make_model(tmp_path / "narrow", "llama", num_key_value_heads=3)
    model, _ = models.load(llama)
    objective.check_comparable(small, model, Captures(attention_layers=(1, 2)))
    objective.check_comparable(narrow, model, Captures(hidden_layers=(1,)))
    with pytest.raises(UserError, match="their hidden_size differ: 48 and 96"):
        objective.check_comparable(small, model, Captures(hidden_layers=(1,)))
    with pytest.raises(UserError, match="their num_key_value_heads differ: 3 and 2"):
        objective.check_comparable(narrow, model, Captures(attention_layers=(2,)))


# --- refused at the start ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        ({"name": "eakdl"}, "called 'eakdl'"),
        ({"name": "ce", "options": {"temprature": 2}}, "has no option called 'temprature'"),
        ({"name": "eakld", "options": {"temperature": -1}}, "it must be a number greater than 0"),
        ({"name": "lafd", "options": {"layers": [1, 3]}}, "A loss asks for layer 3, but"),
        ({"name": "lafd", "options": {"count": 0}}, "count is 0"),
        ({"name": "lafd", "options": {"select": "bach"}}, "select is 'bach'"),
        ({"name": "lafd", "options": {"metric": "l1"}}, "metric is 'l1'"),
        ({"name": "attention_kl", "options": {"layers": [1, 7]}}, "A loss asks for layer 7, but"),
        ({"name": "attention_cosine", "temperature": 2.0}, "has no option called 'temperature'"),
        ({"name": "relation", "options": {"of": "query_key"}}, "of is 'query_key'"),
        ({"name": "eakld", "temperature": 2.0, "options": {"temperature": 2.0}}, "`temperature` is given twice"),
        ({"name": "eakld", "end_factor": 0.5}, "`end_factor` needs `schedule: linear`"),
        ({"name": "eakld", "schedule": "up"}, "expected constant, linear or cosine"),
    ],
)
def test_an_impossible_loss_stops_before_anything_is_done(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, loss: dict[str, Any], sentence: str
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill={"losses": [loss]})
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert refused.code == 2
    assert sentence in refused.err
    assert not (tmp_path / "job").exists()


def test_force_throws_a_student_away_only_for_a_training_that_can_begin(
    run: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job"
    shutil.copytree(whole, job)

    def fail(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(preparation, "load_student", fail)
    failed = run("distill", "--work", job, "--force")
    assert failed.code == 1
    assert "not enough memory" in failed.err
    assert sha256(job / WEIGHTS) == sha256(whole / WEIGHTS)
    assert "up to date" in run("distill", "--work", job).err
