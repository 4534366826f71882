"""Steps whose loss cannot be right are skipped at a lower rate, and a training that goes on so is stopped."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgerazor.training import Trainer, stability
from helpers.tiny_job import Run, metrics, write_recipe


@pytest.mark.parametrize(
    ("loss", "norm", "earlier", "words"),
    [
        (1.0, 1.0, [], ""),
        (float("nan"), 1.0, [], "its loss is not finite"),
        (1.0, float("inf"), [], "its gradient is not finite"),
        (9.0, 1.0, [2.0] * 15, ""),  # too few to know
        (8.0, 1.0, [2.0] * 16, ""),
        (8.1, 1.0, [*[1.0] * 16, 2.0], "more than 4 times the largest of the 17 steps"),
    ],
)
def test_what_is_a_problem(loss: float, norm: float, earlier: list[float], words: str) -> None:
    problem = stability.problem(loss, norm, earlier)
    assert words in problem
    assert bool(words) == bool(problem)


def spoil(steps: Collection[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gradients of some steps be NaN."""
    backward = Trainer.backward

    def spoiling(trainer: Trainer, *args: Any) -> torch.Tensor:
        loss = backward(trainer, *args)
        if trainer.progress.step + 1 in steps:
            for parameter in trainer.student.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "backward", spoiling)


def test_a_bad_step_is_skipped_and_many_stop_the_training(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 8, "evaluate_every": 1, "checkpoint_every": 1, "losses": [{"name": "forward_kl"}]}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    job = tmp_path / "job"
    spoil({2, 5, 6, 7}, monkeypatch)
    stopped = run("distill", "--recipe", recipe, "--work", job)
    assert stopped.code == 1
    assert "Step 2 was skipped, because its gradient is not finite; the learning rate is 0.0005" in stopped.err
    assert "3 steps up to step 7 were skipped one after the other" in stopped.err
    lines = metrics(job)
    assert lines[1]["kl"] == lines[0]["kl"]  # nothing was changed
    assert lines[2]["kl"] != lines[1]["kl"]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(job / "distill/last/model.safetensors").values())
    monkeypatch.undo()
    resumed = run("distill", "--work", job)
    assert resumed.code == 0, resumed.err
    assert "distill goes on from step 6" in resumed.err
