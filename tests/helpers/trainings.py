"""Trainings that are interrupted or killed, and what they leave compared."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from edgerazor.training.trainer import Trainer
from helpers.tiny_job import Run, metrics, sha256

#: The student of the last step in a working directory.
WEIGHTS = Path("distill", "last", "model.safetensors")


def assert_same(run: Run, job: Path, whole: Path) -> None:
    """The students, their packed model and the metrics are those of the uninterrupted training."""
    assert run("pack", "--work", job).code == 0
    for name in ("packed/model.safetensors", "distill/best/model.safetensors", "distill/last/model.safetensors"):
        assert sha256(job / name) == sha256(whole / name), name
    assert metrics(job) == metrics(whole)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when a step has been taken; in the middle of one it is left (`test_long_runs.py`)."""
    train_step = Trainer.step

    def interrupting(trainer: Trainer, batches: Any) -> float:
        loss = train_step(trainer, batches)
        if trainer.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(Trainer, "step", interrupting)


#: Kills its own process at the n-th rename or sync of distill: in the middle of a checkpoint, between two renames ...
DEADLY = """
import os, signal
from edgerazor.stages import distill
moment = {moment}
def deadly(function):
    def call(*args, **kwargs):
        global moment
        moment -= 1
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
run = distill.run
def dying(*args, **kwargs):
    os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
    return run(*args, **kwargs)
distill.run = dying
"""


def largest_difference(ours: Path, theirs: Path) -> float:
    first, second = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    assert set(first) == set(second)
    return max(float((first[name] - second[name]).abs().max()) for name in first)
