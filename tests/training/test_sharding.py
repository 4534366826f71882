"""Student and teacher spread over processes: losses and codes are those of one, and fewer can go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from edgerazor.errors import UserError
from edgerazor.recipe import Distill
from edgerazor.training import sharding
from edgerazor.training.checkpoint import restore
from helpers.places import ROOT
from helpers.processes import launch
from helpers.tiny_job import Run, metrics, write_recipe
from helpers.tiny_models import ModelMaker

#: Kills the last process in the middle of a step, or when it has written its part of the checkpoint after it.
KILLING = """
import os, signal
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from edgerazor.training import Trainer
last, count = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1), [0]
step, write_data = Trainer.step, HuggingFaceStorageWriter.write_data
def dying(trainer, batches):
    count[0] = trainer.progress.step + 1
    if last and count[0] == {step} and not {writing}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, batches)
def dying_writer(writer, plan, planner):
    written = write_data(writer, plan, planner)
    if last and count[0] == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return written
Trainer.step, HuggingFaceStorageWriter.write_data = dying, dying_writer
"""


def test_four_processes_then_two_then_one(run: Run, make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """One process is killed, one of four, and one of two while it writes; one ends as if nothing had happened."""
    make_model(tmp_path / "model", "smollm2")  # whose head is its embedding
    settings = {"steps": 4, "batch_size": 4, "checkpoint_every": 1, "evaluate_every": 1, "learning_rate": 2e-4}
    calibrate = {"scales": "learned", "init": "least_error"}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model", text_file, distill=settings, calibrate=calibrate)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "one").code == 0
    job = tmp_path / "job"
    assert run("calibrate", "--recipe", recipe, "--work", job).code == 0
    checkpoint = job / "distill" / "checkpoints" / "current"
    for processes, accumulation, step, writing in ((1, 4, 2, False), (4, 1, 3, False), (2, 2, 4, True)):
        words = ("distill", "--work", job, "--batch-size", 1, "--accumulation", accumulation)
        *others, killed = launch(processes, words, sharded=True, code=KILLING.format(step=step, writing=writing))
        assert killed.code == -signal.SIGKILL
        sizes = [path.stat().st_size for path in checkpoint.glob("*.safetensors")]
        assert len(sizes) == processes
        assert max(sizes) < 1.2 * sum(sizes) / processes  # none of them has the whole
        for other in others:
            assert other.code == 1
            assert "Another process of this training has ended, so this one ends, too." in other.err
            assert "Traceback" not in other.err
    assert_damage_is_named(checkpoint, tmp_path / "damaged")
    resumed = run("distill", "--work", job, "--batch-size", 2, "--accumulation", 2)
    assert resumed.code == 0
    assert "distill goes on from step 3" in resumed.err
    for ours, theirs in zip(metrics(job), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for student in ("best", "last"):
        folders = [path / "distill" / student for path in (job, tmp_path / "one")]
        ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
    assert run("pack", "--work", job).code == 0
    assert run("pack", "--work", tmp_path / "one").code == 0
    ours, theirs = (load_file(path / "packed" / "model.safetensors") for path in (job, tmp_path / "one"))
    # a weight that lies on the border of two codes may fall to either side
    different = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    assert different <= 1e-4 * sum(tensor.numel() for tensor in ours.values())


def assert_damage_is_named(checkpoint: Path, copy: Path) -> None:
    """A part of a checkpoint that is missing, cut off, changed or of something else."""
    files = json.loads((checkpoint / "state.json").read_text())["files"]
    first, last = sorted(files)
    whole = (checkpoint / last).read_bytes()
    for name, content, message in (
        (last, None, "is missing"),
        (last, whole[:-1], "checksum"),
        (last, whole[:-1] + bytes([whole[-1] ^ 1]), "checksum"),
        (first, whole, "checksum"),
        ("other.safetensors", whole, "something else"),
    ):
        shutil.copytree(checkpoint, copy)
        (copy / name).unlink(missing_ok=True)
        if content is not None:
            (copy / name).write_bytes(content)
        model = torch.nn.Linear(2, 2)
        with pytest.raises(UserError, match=f"is damaged and cannot be resumed .*{message}"):
            restore(copy, model, torch.optim.AdamW(model.parameters()))
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "settings", [{"train": "scales"}, {"teacher_source": "streamed"}, {"reconstruct": {"steps": 2}}]
)
def test_what_is_not_sharded_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="With FSDP"):
        sharding.check(Distill(**settings))


def test_a_launcher_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sharding.USE_FSDP, "true")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not sharding.is_wanted()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="version 1"):
        sharding.is_wanted()
    monkeypatch.setenv(sharding.FSDP_VERSION, "2")
    assert sharding.is_wanted()


@pytest.mark.parametrize(("name", "machines"), [("fsdp2", 1), ("fsdp2-2x8", 2)])
def test_launch_configurations(name: str, machines: int) -> None:
    """accelerate reads them, and asks for FSDP2 on so many processes."""
    from accelerate.commands.config.config_args import ClusterConfig

    path = ROOT / "recipes" / "launch" / f"{name}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = ClusterConfig.from_yaml_file(str(path))
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    assert config.fsdp_config["fsdp_version"] == 2
    assert values["distributed_type"] == "FSDP"


def test_accelerate_launches_it(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The command of the configuration for machines without GPUs, beside one process."""
    settings = {"steps": 2, "batch_size": 2, "evaluate_every": 1, "learning_rate": 2e-4}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "one").code == 0
    configuration = ROOT / "recipes" / "launch" / "fsdp2-cpu.yaml"
    words = ("-m", "edgerazor", "distill", "--recipe", recipe, "--work", tmp_path / "two", "--batch-size", 1)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)]
    done = subprocess.run(
        [*accelerate, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
