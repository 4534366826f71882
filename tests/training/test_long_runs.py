"""What people see of a long training, and that it ends within a step when the machine is about to go away."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

from edgerazor.training import Trainer
from edgerazor.training.budget import Budget
from edgerazor.training.pace import Pace
from helpers.tiny_job import Run, metrics, write_recipe


def test_speed_time_left_and_trend() -> None:
    pace = Pace()
    assert pace.line(None, "kl", Budget(10, None), 0) == ""
    pace.steps.extend([(10.0, 1000), (12.0, 2000), (14.0, 3000)])
    pace.measured.append((2, 0.5))
    assert pace.line(1.25, "kl", Budget(10, None), 3) == (
        "loss 1.2500, held-out kl 0.5000 at step 2, 500 tokens/s, 14 s left"
    )
    pace.measured.append((3, 0.4))
    assert pace.trend("kl") == "held-out kl 0.4000 at step 3 (-20.0 % since step 2)"
    assert pace.seconds_left(Budget(None, 20.0), 3) == 6.0
    assert pace.seconds_left(Budget(4, 600.0), 3) == 2.0
    assert pace.seconds_left(Budget(None, 10.0), 3) == 0.0


def test_a_signal_leaves_the_step_and_nothing_changes(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM between two micro-batches: no optimizer step is taken, and the training goes on to the same weights."""
    settings = {"steps": 4, "accumulation": 2, "batch_size": 2, "evaluate_every": 2, "checkpoint_every": 4}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "whole").code == 0
    asked = [0]
    leave = Trainer.leave_step_if_interrupted

    def signalled(trainer: Trainer) -> None:
        asked[0] += 1
        if asked[0] == 2 * 4 + 4:  # two for the teacher and two for the student in a step; the last one of the third
            os.kill(os.getpid(), signal.SIGTERM)
        leave(trainer)

    monkeypatch.setattr(Trainer, "leave_step_if_interrupted", signalled)
    stopped = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert stopped.code == 130
    assert "Interrupted behind step 2; everything up to it is saved." in stopped.err
    monkeypatch.undo()
    resumed = run("distill", "--work", tmp_path / "job")
    assert resumed.code == 0, resumed.err
    assert "distill goes on from step 2" in resumed.err
    last = "distill/last/model.safetensors"
    weights, expected = (load_file(tmp_path / name / last) for name in ("job", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def events(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Steps and values of all event files in a folder, in the order in which they were written."""
    rows = []
    for file in sorted(folder.rglob("*tfevents*")):
        content, position = file.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)  # then its check sum, the event, and its own
            event = Event.FromString(content[position + 12 : position + 12 + length])
            rows.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
            position += 16 + length
    return rows


def test_tensorboard_gets_every_step_and_evaluation(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 3, "evaluate_every": 3, "losses": [{"name": "forward_kl"}]}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    tracked = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--track", "tensorboard")
    assert tracked.code == 0, tracked.err
    rows = events(tmp_path / "job" / "distill")
    losses = {step: values["loss"] for step, values in rows if "loss" in values}
    assert set(losses) == {1, 2, 3}
    evaluated = [(step, values["held_out/kl"]) for step, values in rows if "held_out/kl" in values]
    assert evaluated == [(3, pytest.approx(metrics(tmp_path / "job")[-1]["kl"]))]
    assert "up to date" in run("distill", "--work", tmp_path / "job", "--track", "none").err  # it changes no result


def test_a_tracker_that_is_not_installed_is_refused(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgerazor.training.tracking.find_spec", lambda _: None)
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--track", "wandb")
    assert (refused.code, refused.err.count("\n")) == (2, 2)
    assert "Weights & Biases is not installed." in refused.err
    assert not (tmp_path / "job" / "distill").exists()
