"""Student spread over processes by DeepSpeed, where it is installed: losses and students are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgerazor import devices
from edgerazor.errors import UserError
from edgerazor.training import zero3
from helpers.processes import launch
from helpers.tiny_job import Run, metrics, write_recipe
from helpers.tiny_models import ModelMaker


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.USE_DEEPSPEED, "true")
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="which is not installed") as refused:
        devices.join_processes(torch.device("cpu"))
    assert "fsdp2.yaml" in str(refused.value.hint)


def test_other_stages_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(devices.USE_DEEPSPEED, "true")
    monkeypatch.setenv(zero3.STAGE, "2")
    with pytest.raises(UserError, match="ZeRO-3"):
        zero3.is_wanted()
    monkeypatch.setenv(zero3.STAGE, "3")
    assert zero3.is_wanted()
    monkeypatch.setenv(zero3.OFFLOADED[0], "cpu")
    with pytest.raises(UserError, match="without offloading"):
        zero3.is_wanted()


def test_two_processes_then_one_then_two(run: Run, make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """With micro-batches and scales that are trained; every checkpoint goes on with another number of processes."""
    pytest.importorskip("deepspeed")
    make_model(tmp_path / "model", "smollm2")  # whose head is its embedding
    settings = {"steps": 5, "batch_size": 4, "checkpoint_every": 1, "evaluate_every": 1, "learning_rate": 2e-4}
    calibrate = {"scales": "learned", "init": "least_error"}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model", text_file, distill=settings, calibrate=calibrate)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "one").code == 0
    job = tmp_path / "job"
    assert run("calibrate", "--recipe", recipe, "--work", job).code == 0
    environment = {devices.USE_DEEPSPEED: "true", zero3.STAGE: "3"}
    for processes, accumulation, steps in ((2, 2, 2), (1, 4, 3), (2, 2, 5)):
        words = ("--batch-size", 1, "--accumulation", accumulation)
        stop = f"""
import os, signal
from edgerazor.training import Trainer
evaluate = Trainer.evaluate_and_save
def stopping(trainer):
    if trainer.progress.step == {steps} < 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(trainer)
Trainer.evaluate_and_save = stopping
"""
        done = launch(processes, ("distill", "--work", job, *words), environment=environment, code=stop)
        assert {one.code for one in done} == {0 if steps == 5 else 130}, done[0].err
    for ours, theirs in zip(metrics(job), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for student in ("best", "last"):
        ours, theirs = (load_file(path / "distill" / student / "model.safetensors") for path in (job, tmp_path / "one"))
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
