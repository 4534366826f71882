"""Several processes calibrate, record and evaluate as one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.processes import launch
from helpers.tiny_job import Run, sha256, write_recipe
from helpers.tiny_models import ModelMaker


@pytest.mark.parametrize(
    ("family", "processes", "calibrate"),
    [
        ("llama", 2, {"plan": "sensitivity", "activation_scales": "static"}),
        ("smollm2", 4, {"adaptive_tokens": "causal"}),
    ],
)
def test_processes_come_to_what_one_does(
    run: Run,
    make_model: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    family: str,
    processes: int,
    calibrate: dict[str, Any],
) -> None:
    make_model(tmp_path / "model", family)
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tmp_path / "model",
        text_file,
        calibrate={**calibrate, "sequences": 7, "batch_size": 1, "sensitivity_tokens": 160},
        record={"shard_bytes": 20_000, "held_out_sequences": 3, "tokens": 2000},
        eval={"tasks": ["world_recall"], "limit": 9, "text_sequences": 5, "batch_size": 1},
        pack={"source": "teacher"},
    )
    jobs = [tmp_path / "one", tmp_path / "several"]
    words = [
        [
            ("calibrate", "--recipe", recipe, "--work", job),
            ("record", "--recipe", recipe, "--work", job, "--out", job.with_suffix(".recording")),
            ("pack", tmp_path / "model", "--recipe", recipe, "--work", job),
            ("eval", "--work", job),
        ]
        for job in jobs
    ]
    for command in words[0]:
        done = run(*command)
        assert done.code in (0, 3), done.err
    launched = launch(processes, *words[1])
    assert [one.code for one in launched] == [done.code] * processes, launched[0].err
    assert [one.err.count(" at 1.88 bits") for one in launched] == [1] + [0] * (processes - 1)  # only one speaks
    ours, theirs = (load_file(job / "calibrate" / "stats.safetensors") for job in jobs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-9)
    assert (jobs[0] / "calibrate" / "plan.json").read_text() == (jobs[1] / "calibrate" / "plan.json").read_text()
    folders = [job.with_suffix(".recording") for job in jobs]
    recorded = {file.name: sha256(file) for file in folders[0].iterdir()}
    assert {file.name: sha256(file) for file in folders[1].iterdir()} == recorded
    assert len([name for name in recorded if name.startswith("training")]) > processes
    ours, theirs = (json.loads((job / "eval" / "result.json").read_text()) for job in jobs)
    assert theirs["tasks"] == ours["tasks"]
    compared = [{name: value for name, value in one["text"].items() if value is not None} for one in (ours, theirs)]
    assert compared[1] == pytest.approx(compared[0], rel=1e-5)
    assert theirs["failures"] == ours["failures"]
