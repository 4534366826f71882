"""The estimate of a training's speed, and the dry run that reads no weight and takes no step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from edgerazor import kernels, models
from edgerazor.training import speed
from edgerazor.training.speed import MachineSpeed, cost_of, measure_machine, step_seconds
from helpers.tiny_job import Run, write_recipe


def test_a_machine_is_measured_in_a_moment() -> None:
    machine = measure_machine(torch.device("cpu"), torch.float32)
    assert machine.operations > 1e8
    assert machine.elements > 1e6
    assert machine.calls > 1e3


def test_the_cost_of_a_model_counts_its_matrices(llama: Path) -> None:
    outline = models.outline(llama)
    assert outline.device.type == "meta"
    structure = models.structure(outline)
    loaded, _ = models.load(llama)
    assert structure == models.structure(loaded)
    assert outline.dtype == loaded.dtype
    cost = cost_of(structure, 32)
    head = structure.head or structure.embedding
    assert cost.multiplied == sum(t.rows * t.columns for t in structure.linears) + head.rows * head.columns
    assert cost.linears == len(structure.linears)
    assert cost_of(structure, 64).attended == 2 * cost.attended


def test_a_step_takes_longer_with_more_to_do(llama: Path) -> None:
    cost, machine = cost_of(models.structure(models.outline(llama)), 32), MachineSpeed(1e9, 1e8, 1e5)
    one = step_seconds(cost, machine, 1000)
    assert step_seconds(cost, machine, 2000) > 1.1 * one
    assert step_seconds(cost, MachineSpeed(1e8, 1e8, 1e5), 1000) > 1.1 * one
    assert step_seconds(cost, machine, 1000, micro_batches=4) > one
    assert step_seconds(cost, machine, 1000, passes=3.0) < one
    assert step_seconds(cost, machine, 1000, over_weights=9) < one


def test_a_start_takes_longer_with_more_text_and_by_the_columns_of_gptq(llama: Path) -> None:
    cost, machine = cost_of(models.structure(models.outline(llama)), 32), MachineSpeed(1e9, 1e8, 1e5)
    assert speed.init_seconds("least_error", cost, machine, 1000) == 0
    assert 0 < speed.init_seconds("clip", cost, machine, 1000) < speed.init_seconds("gptq", cost, machine, 1000)
    rounding = speed.init_seconds("gptq", cost, machine, 0)
    assert rounding > cost.columns * speed.GPTQ_CALLS / machine.calls
    assert speed.init_seconds("gptq", cost, machine, 1000) > rounding


def test_weights_take_fewer_passes_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(kernels, "is_native", lambda: True)
    assert speed.weight_passes(True, cpu) < speed.weight_passes(False, cpu)
    assert speed.weight_passes(True, torch.device("cuda")) == speed.WEIGHT_PASSES
    monkeypatch.setattr(kernels, "is_native", lambda: False)
    assert speed.weight_passes(True, cpu) == speed.WEIGHT_PASSES


def test_a_dry_run_loads_no_weight(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a dry run loaded a model")

    monkeypatch.setattr(models, "load", fail)
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    for name in ("calibrate", "distill"):
        done = run(name, "--recipe", recipe, "--work", tmp_path / "job", "--dry-run", "--json")
        assert done.code == 0, done.err
        assert done.json()["seconds"] > 0
    assert "estimated from matrix products" in done.json()["speed"]
    assert "calibrate would run first and take about" in done.err


def test_a_measured_speed_is_taken_where_there_is_one(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe, job = write_recipe(tmp_path / "r.yaml", llama, text_file), tmp_path / "job"
    assert run("distill", "--recipe", recipe, "--work", job).code == 0
    file = job / "distill" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["result"]["tokens_per_second"] = 32.0
    file.write_text(json.dumps(manifest))
    dry = run("distill", "--work", job, "--dry-run", "--json").json()
    assert "measured by the training" in dry["speed"]
    assert (dry["tokens_per_second"], dry["seconds"]) == (32.0, 10.0)  # 5 steps of 64 tokens


def test_the_outline_of_a_model_without_weights(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    assert models.structure(models.outline(folder)).layer_count == models.structure(models.load(llama)[0]).layer_count


def test_the_precision_of_a_training() -> None:
    from edgerazor.recipe import Distill

    cpu = torch.device("cpu")
    assert speed.training_dtype(Distill(precision="bfloat16"), cpu) == torch.bfloat16
    assert speed.training_dtype(Distill(precision="float32"), cpu) == torch.float32
