"""Phases of one training: scales trained with frozen codes, and what follows them."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor import formats, models, modules, packed
from edgerazor.allocate import make_plan
from edgerazor.formats import MatrixSpec
from edgerazor.modules import Settings
from edgerazor.recipe import Calibrate
from edgerazor.training import Trainer
from edgerazor.training import trainer as trainer_module
from helpers.tiny_job import Run, call, metrics, spawn, write_recipe
from helpers.tiny_models import GROUP_SIZE, VOCABULARY, family_config, mostly_slow
from helpers.trainings import DEADLY, assert_same, interrupt_at, largest_difference

ALL = formats.names()
IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


# Weights that follow their scales ---------------------------------------------------------------------------------


def specs(rows: int, cols: int, group_size: int) -> list[MatrixSpec]:
    """Every format alone, all of them in the rows, and all of them in the blocks."""
    groups = formats.group_count(cols, group_size)
    mixed = (torch.arange(rows) * 3 % len(ALL)).to(torch.uint8)
    blocks = (torch.arange(rows * groups).view(rows, groups) * 5 % len(ALL)).to(torch.uint8)
    return [
        *(MatrixSpec((name,), group_size) for name in ALL),
        MatrixSpec(tuple(ALL), group_size, mixed),
        MatrixSpec(tuple(ALL), group_size, block_formats=blocks),
    ]


def on_the_edges(rows: int, cols: int, scales: Tensor, group_size: int) -> Tensor:
    """Weights on and a float beside every boundary between two codes, where one rounding decides."""
    spread = scales.float().repeat_interleave(group_size, dim=1)[:, :cols]
    steps = (torch.arange(rows * cols).view(rows, cols) % 37 - 18) / 2
    weight = steps * spread
    towards = torch.tensor([-1e9, 0.0, 1e9])[torch.arange(rows * cols).view(rows, cols) % 3]
    return torch.where(towards == 0, weight, torch.nextafter(weight, towards))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (13, 31), (17, 101), (40, 127)])
@pytest.mark.parametrize("group_size", [5, 40, 1000])
def test_a_rebased_weight_has_exactly_the_frozen_codes(rows: int, cols: int, group_size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for spec in specs(rows, cols, group_size):
        shape = (rows, formats.group_count(cols, group_size))
        before = formats.stored_scales(torch.rand(shape, generator=draw) + 0.01)
        for width in (0.01, 0.3, 4.0):
            after = formats.stored_scales(before.float() * torch.exp(width * torch.randn(shape, generator=draw)))
            for w in (torch.randn(rows, cols, generator=draw), on_the_edges(rows, cols, before, group_size)):
                codes = formats.encode_matrix(w, spec, before).codes
                rebased = formats.rebase_weight(w, codes, before, after, spec)
                encoded = formats.encode_matrix(rebased, spec, after)
                assert torch.equal(encoded.codes, codes)
                assert torch.equal(encoded.scales, after)
                spread = (after.double() / before.double()).repeat_interleave(min(group_size, cols), dim=1)[:, :cols]
                torch.testing.assert_close(rebased.double(), w.double() * spread, rtol=1e-6, atol=1e-40)


@pytest.mark.parametrize("name", ALL)
def test_scales_that_stay_leave_weights_alone(name: str) -> None:
    spec, w = MatrixSpec((name,), 8), torch.randn(7, 29, generator=torch.Generator().manual_seed(0))
    scales = formats.stored_scales(formats.initial_scales(w, spec))
    codes = formats.encode_matrix(w, spec, scales).codes
    assert torch.equal(formats.rebase_weight(w, codes, scales, scales, spec), w)


@pytest.mark.parametrize("name", ALL)
def test_extreme_scales(name: str) -> None:
    """From the smallest scale to the largest and back; weights of denormal size and far out of range."""
    spec = MatrixSpec((name,), 4)
    w = torch.tensor([[1e-45, -1e-45, 0.0, -0.0], [1e6, -1e6, 3e-39, -3e-39]])
    ends = [formats.stored_scales(torch.full((2, 1), value)) for value in (0.0, 1e9)]
    for before, after in (ends, ends[::-1]):
        codes = formats.encode_matrix(w, spec, before).codes
        rebased = formats.rebase_weight(w, codes, before, after, spec)
        assert torch.equal(formats.encode_matrix(rebased, spec, after).codes, codes)


# Modules ----------------------------------------------------------------------------------------------------------


def student(tied: bool, **calibrate: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config("llama", tie_word_embeddings=tied)).eval()
    structure = models.structure(model)
    plan = make_plan(structure.targets, Calibrate(bits=1.88, plan="interleave", group_size=GROUP_SIZE, **calibrate))
    modules.prepare_for_training(model, structure, plan.specs(), Settings(8, 8, GROUP_SIZE, True))
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        computed: Tensor = model(input_ids=IDS, use_cache=False).logits
    return computed


@pytest.mark.parametrize("granularity", ["row", "block", "column"])
@pytest.mark.parametrize("tied", [True, False])
def test_freezing_and_unfreezing_codes_changes_nothing_that_is_computed(tied: bool, granularity: str) -> None:
    model = student(tied, granularity=granularity)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = logits(model)
    modules.freeze_codes(model)
    assert torch.equal(logits(model), first)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scales = {f"{name}.scales" for name in modules.fake_quant_weights(model)}
    assert trained == scales | {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    modules.unfreeze_codes(model)
    for name, parameter in model.named_parameters():  # no scale has changed
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name]), name

    modules.freeze_codes(model)
    with torch.no_grad():
        for matrix in modules.fake_quant_weights(model).values():
            assert matrix.scales is not None
            matrix.scales.mul_(torch.exp(0.2 * torch.randn_like(matrix.scales)))
    moved = logits(model)
    with modules.encoded_once(model) as digests:
        frozen = dict(digests)
    modules.freeze_codes(model)  # a second time: nothing
    modules.unfreeze_codes(model)
    assert not torch.equal(moved, first)
    assert torch.equal(logits(model), moved)
    with modules.encoded_once(model) as digests:
        assert digests == frozen
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if tied:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert table.weight is head.weight


# Phases ------------------------------------------------------------------------------------------------------------

PHASES: list[dict[str, Any]] = [
    {"train": "scales", "share": 1, "learning_rate": 3e-3, "schedule": "linear"},
    {"train": "all", "share": 2, "losses": [{"name": "forward_kl"}]},
    {"train": "scales", "share": 1},
]


def write_phased(path: Path, model: Path, text: Path, calibrate: dict[str, Any] | None = None, **distill: Any) -> Path:
    settings = {"steps": 8, "evaluate_every": 3, "checkpoint_every": 3, "phases": PHASES, **distill}
    calibrated = {"scales": "learned", **(calibrate or {})}
    return write_recipe(path, model, text, calibrate=calibrated, distill=settings)


BLOCKS = {"reconstruct": {"steps": 4, "sequences": 4, "learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path, text_file: Path) -> Path:
    """The working directory of a schedule of phases that nobody interrupted, and its packed model."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_phased(folder / "recipe.yaml", llama, text_file, **BLOCKS)
    done = call("distill", "--recipe", recipe, "--work", folder / "job")
    assert done.code == 0, done.err
    assert call("pack", "--work", folder / "job").code == 0
    return folder / "job"


def test_every_phase_is_reported(whole: Path) -> None:
    result = json.loads((whole / "distill" / "result.json").read_text())
    assert result["stopped"] == "budget"
    phases = [(phase["phase"], phase["what"], phase["steps"]) for phase in result["phases"]]
    assert phases == [(0, "initialise", 0), (0, "reconstruct", 8), (1, "scales", 2), (2, "all", 4), (3, "scales", 2)]
    assert len(result["block_errors"]) == 2
    lines = metrics(whole)
    where = [(line["phase"], line["what"], line["step"]) for line in lines]
    assert where == [
        (0, "initialise", 0),
        (0, "reconstruct", 0),
        (1, "scales", 2),
        (2, "all", 3),
        (2, "all", 6),
        (3, "scales", 8),
    ]
    ends = [line["kl"] for line in lines if line["step"] != 3]
    assert [phase["held_out"] for phase in result["phases"]] == ends
    assert result["best"] == min(line["kl"] for line in lines)


def test_what_the_last_phase_left_is_packed(whole: Path) -> None:
    digests = json.loads((whole / "distill" / "best" / "digests.json").read_text())
    packed.verify_digests(whole / "packed", digests)


@pytest.mark.parametrize("step", mostly_slow([1, 2, 3, 6, 7], 3))
def test_interrupted_in_any_phase_and_between_two_it_ends_the_same(
    run: Run, whole: Path, tmp_path: Path, llama: Path, text_file: Path, step: int
) -> None:
    recipe, job = write_phased(tmp_path / "recipe.yaml", llama, text_file, **BLOCKS), tmp_path / "job"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(step, patch)
        assert run("distill", "--recipe", recipe, "--work", job).code == 130
    resumed = run("distill", "--work", job)
    assert resumed.code == 0
    assert f"distill goes on from step {step}" in resumed.err
    assert_same(run, job, whole)
    assert reported(job) == reported(whole)


def reported(job: Path) -> list[dict[str, Any]]:
    """The phases of a result but for the time they took."""
    phases = json.loads((job / "distill" / "result.json").read_text())["phases"]
    return [{key: value for key, value in phase.items() if key != "seconds"} for phase in phases]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(
    run: Run, whole: Path, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    """SIGKILL while things are saved: before the first step, at the ends of phases, in the middle of them."""
    recipe, job = write_phased(tmp_path / "recipe.yaml", llama, text_file, **BLOCKS), tmp_path / "job"
    for moment in (12, 30, 33, 41, 37):
        died = spawn("distill", "--recipe", recipe, "--work", job, code=DEADLY.format(moment=moment))
        assert died.code == -signal.SIGKILL, died.err
    assert run("distill", "--work", job).code == 0
    assert_same(run, job, whole)
    assert reported(job) == reported(whole)


def test_the_next_phase_begins_with_exactly_what_the_last_one_made(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    """Formats mixed in blocks, shorter last groups: a phase of everything at no learning rate computes the same."""
    phases = [{"train": "scales", "learning_rate": 3e-2}, {"train": "all", "learning_rate": 1e-30}]
    settings = {"phases": phases, "steps": 4, "evaluate_every": 1, "weight_decay": 0.0}
    recipe = write_phased(tmp_path / "r.yaml", llama, text_file, {"granularity": "block"}, **settings)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == 0
    lines = metrics(tmp_path / "job")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0]["kl"] != lines[2]["kl"]
    assert lines[2]["kl"] == lines[3]["kl"] == lines[4]["kl"]
    assert lines[2]["cross_entropy"] == lines[3]["cross_entropy"]


def test_each_phase_has_its_schedule_and_its_optimizer(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear falls begin again; AdamW's first step, whose size is the learning rate, comes twice."""
    phases = [{"train": "all", "share": 0.5}, {"train": "all", "share": 0.5, "learning_rate": 4e-4}]
    settings = {"phases": phases, "warmup": 0.0, "schedule": "linear", "learning_rate": 2e-4}
    recipe = write_phased(tmp_path / "r.yaml", llama, text_file, **settings)
    rates: list[float] = []
    first: list[float] = []

    def note(optimizer: Any, rate: float) -> None:
        rates.append(rate)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        first.append(float(state["step"]) if state else 0.0)
        set_learning_rate(optimizer, rate)

    set_learning_rate = trainer_module.set_learning_rate
    monkeypatch.setattr(trainer_module, "set_learning_rate", note)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == 0
    fall = [1.0, 0.75, 0.5, 0.25]
    assert rates == pytest.approx([*(2e-4 * factor for factor in fall), *(4e-4 * factor for factor in fall)])
    assert first == [0, 1, 2, 3, 0, 1, 2, 3]


def test_data_go_on_from_phase_to_phase(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    """Two phases of the same kind see what one training sees."""
    step_tokens: list[list[int]] = []
    train_step = Trainer.step

    def note(trainer: Trainer, batches: Any) -> float:
        step_tokens.append([int(value) for batch in batches for value in batch["input_ids"].flatten()])
        return train_step(trainer, batches)

    settings: dict[str, Any] = {"steps": 4}
    for name, phases in (("one", []), ("two", [{"train": "scales"}, {"train": "all"}])):
        recipe = write_phased(tmp_path / f"{name}.yaml", llama, text_file, **settings, phases=phases)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "step", note)
            assert run("distill", "--recipe", recipe, "--work", tmp_path / name).code == 0
    assert step_tokens[:4] == step_tokens[4:]


@pytest.mark.slow
def test_two_processes_train_as_one(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    shared = {"steps": 4, "learning_rate": 2e-5, "phases": [{"train": "scales"}, {"train": "all"}]}
    whole = write_phased(tmp_path / "w.yaml", llama, text_file, **shared, batch_size=4)
    halves = write_phased(tmp_path / "h.yaml", llama, text_file, **shared, batch_size=2)
    assert run("distill", "--recipe", whole, "--work", tmp_path / "one").code == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = spawn("distill", "--recipe", halves, "--work", tmp_path / "two", launcher=torchrun)
    assert two.code == 0, two.err
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5


# The budget and the target ----------------------------------------------------------------------------------------


def test_the_clock_ends_phases(run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: Any) -> None:
    """A clock that makes every step a second long: 12 seconds are 3, 6 and 3 steps."""
    seconds = [0.0]
    train_step = Trainer.step

    def step(trainer: Trainer, batches: Any) -> float:
        seconds[0] += 1.0
        return train_step(trainer, batches)

    monkeypatch.setattr(trainer_module, "clock", lambda _: seconds[0])
    monkeypatch.setattr(Trainer, "step", step)
    recipe = write_phased(tmp_path / "r.yaml", llama, text_file, steps=None, max_time=12.0)
    done = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json")
    assert done.code == 0, done.err
    phases = [(phase["what"], phase["steps"], phase["seconds"]) for phase in done.json()["phases"]]
    assert phases == [("initialise", 0, 0.0), ("scales", 3, 3.0), ("all", 6, 6.0), ("scales", 3, 3.0)]


def test_a_phase_that_has_no_time_left_is_reported_as_such(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: Any
) -> None:
    seconds = [0.0]
    train_step = Trainer.step

    def step(trainer: Trainer, batches: Any) -> float:
        seconds[0] += 8.0 if trainer.progress.step == 0 else 1.0
        return train_step(trainer, batches)

    monkeypatch.setattr(trainer_module, "clock", lambda _: seconds[0])
    monkeypatch.setattr(Trainer, "step", step)
    phases = [{"train": "scales"}, {"train": "all", "learning_rate": 1e-5}, {"train": "all"}]
    recipe = write_phased(tmp_path / "r.yaml", llama, text_file, steps=None, max_time=10.0, phases=phases)
    done = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json").json()
    assert [(phase["phase"], phase["steps"]) for phase in done["phases"]] == [(0, 0), (1, 1), (2, 0), (3, 2)]


@pytest.mark.parametrize(("phase", "steps"), [(0, 0), (1, 2), (2, 3)])
def test_it_stops_at_the_target(
    run: Run, whole: Path, tmp_path: Path, llama: Path, text_file: Path, phase: int, steps: int
) -> None:
    """Before the first step, at the end of a phase and inside one; a second call has nothing left to do."""
    line = next(
        evaluation for evaluation in metrics(whole) if (evaluation["phase"], evaluation["step"]) == (phase, steps)
    )
    earlier = [evaluation["kl"] for evaluation in metrics(whole)[: metrics(whole).index(line)]]
    if line["kl"] >= min(earlier, default=float("inf")):
        pytest.skip("it was not better then")
    recipe = write_phased(tmp_path / "r.yaml", llama, text_file, **BLOCKS, target_kl=line["kl"])
    done = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json").json()
    assert (done["stopped"], done["steps"], done["best"]) == ("target", steps, line["kl"])
    assert done["phases"][-1]["phase"] == phase
    assert run("pack", "--work", tmp_path / "job").code == 0
    (tmp_path / "job" / "distill" / "result.json").unlink()
    again = run("distill", "--work", tmp_path / "job", "--json").json()
    assert (again["stopped"], again["steps"]) == ("target", steps)


def test_a_training_without_phases_has_a_target_too(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    """Also where no loss needs the teacher: it is loaded to measure with."""
    losses = [{"name": "ce"}]
    for target, stopped, steps in ((1e-6, "budget", 3), (1e3, "target", 0)):
        settings = {"steps": 3, "losses": losses, "target_kl": target}
        recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
        job = tmp_path / f"job{steps}"
        done = run("distill", "--recipe", recipe, "--work", job, "--json").json()
        assert (done["stopped"], done["steps"]) == (stopped, steps)
        assert done["measure"] == "held-out kl, nats per token"
        assert "phase" not in metrics(job)[0]


# Asked and refused ------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_phases_and_time(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_phased(tmp_path / "r.yaml", llama, text_file, **BLOCKS)
    estimate = run("distill", "--recipe", recipe, "--work", tmp_path / "dry", "--dry-run", "--json").json()
    steps = {name: phase["steps"] for name, phase in estimate["phases"].items()}
    assert steps == {"reconstruct": 8, "1 scales": 2, "2 all": 4, "3 scales": 2}
    assert estimate["seconds"] == pytest.approx(
        sum(phase["seconds"] for phase in estimate["phases"].values()), rel=0.02
    )
    shown = run("distill", "--recipe", recipe, "--work", tmp_path / "dry", "--dry-run").out
    assert "1 scales (steps 2, seconds " in " ".join(shown.split())
    timed = write_phased(tmp_path / "t.yaml", llama, text_file, steps=None, max_time=100.0)
    estimate = run("distill", "--recipe", timed, "--work", tmp_path / "dry", "--dry-run", "--json").json()
    assert [phase["seconds"] for phase in estimate["phases"].values()] == [25.0, 50.0, 25.0]
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("calibrate", "settings", "sentence"),
    [
        ({"scales": "computed"}, {}, "Phases train scales, which `calibrate.scales: computed` does not keep."),
        ({}, {"train": "scales"}, "each phase has a `train` of its own."),
        ({}, {"phases": [{"share": 0}]}, "`distill.phases.0.share` is 0; expected a number above 0."),
        ({}, {"phases": [{"train": "some"}]}, "`distill.phases.0.train` is 'some'; expected all or scales."),
        ({}, {"phases": [{"stride": 1}]}, "unknown field `distill.phases.0.stride`"),
        ({}, {"phases": [{"losses": [{"name": "eakdl"}]}]}, "called 'eakdl'"),
    ],
)
def test_impossible_phases_are_refused(
    run: Run,
    tmp_path: Path,
    llama: Path,
    text_file: Path,
    calibrate: dict[str, Any],
    settings: dict[str, Any],
    sentence: str,
) -> None:
    recipe = write_phased(tmp_path / "r.yaml", llama, text_file, calibrate, **settings)
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert refused.code == 2
    assert sentence in " ".join(refused.err.split())
    assert not (tmp_path / "job").exists()


def test_a_phase_without_a_step_is_refused(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_phased(tmp_path / "r.yaml", llama, text_file, steps=2)
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert refused.code == 1
    assert "2 steps leave none for phase 3 of 3." in refused.err


def test_other_phases_are_another_training(run: Run, whole: Path, tmp_path: Path, llama: Path, text_file: Path) -> None:
    shutil.copytree(whole, tmp_path / "job")
    other = write_phased(tmp_path / "r.yaml", llama, text_file, **BLOCKS, phases=PHASES[:2])
    refused = run("distill", "--recipe", other, "--work", tmp_path / "job")
    assert refused.code == 1
    words = " ".join(refused.err.split())
    assert "distill.phases was 1 scales, learning_rate 0.003, schedule linear; 2 all (1 forward_kl); 1 scales" in words
