"""Block-by-block reconstruction: layers called alone compute what they do in the model, and each learns its part."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgerazor import models
from edgerazor.training import reconstruction
from helpers.tiny_job import Run, metrics, sha256, spawn, write_recipe
from helpers.tiny_models import FAMILIES, ModelMaker, mostly_slow

WEIGHTS = Path("distill", "last", "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_alone_computes_what_it_does_in_the_model(make_model: ModelMaker, tmp_path: Path, family: str) -> None:
    make_model(tmp_path, family)
    model, _ = models.load(tmp_path)
    structure = models.structure(model)
    for length in (9, 12, 9):  # masks and positions of one shape do for all batches of it
        ids = torch.randint(0, 60, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad(), models.capture_hidden(model, structure, range(structure.layer_count + 1)) as whole:
            model(input_ids=ids, use_cache=False)
        blocks = models.Blocks(model, structure)
        states = blocks.inputs(ids)
        again = models.Blocks(model, structure)
        again.inputs(ids + 1)
        assert torch.equal(again.inputs(ids), states)  # the second time nothing but the embedding is computed
        for index in range(structure.layer_count):
            assert torch.equal(blocks.hidden(states), whole[index])
            with torch.no_grad():
                states = blocks.forward_layer(index, states)
        assert torch.equal(states, whole[structure.layer_count])


@pytest.fixture
def recipe(tmp_path: Path, llama: Path, text_file: Path) -> Path:
    return reconstructing(tmp_path / "recipe.yaml", llama, text_file)


def reconstructing(path: Path, model: Path, text: Path, **distill: Any) -> Path:
    blocks = {"steps": 24, "sequences": 8, "learning_rate": 3e-3}
    return write_recipe(path, model, text, distill={"steps": 2, "reconstruct": blocks, **distill})


def test_reconstruction_lowers_the_error_of_every_layer(
    run: Run, recipe: Path, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    made = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json").json()
    assert len(made["block_errors"]) == 2
    assert all(after < 0.9 * before for before, after in made["block_errors"])
    plain = write_recipe(tmp_path / "plain.yaml", llama, text_file, distill={"steps": 2})
    assert run("distill", "--recipe", plain, "--work", tmp_path / "other").code == 0
    assert metrics(tmp_path / "job")[0]["kl"] < metrics(tmp_path / "other")[0]["kl"]
    shown = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert "Layers were reconstructed first" in shown.out
    for job, other in (("job", plain), ("other", recipe)):
        refused = run("distill", "--recipe", other, "--work", tmp_path / job)
        assert refused.code == 1
        assert "distill.reconstruct was" in refused.err


@pytest.mark.parametrize("step", mostly_slow([3, 30], 30))
def test_interrupted_in_a_layer_it_goes_on_and_ends_the_same(run: Run, recipe: Path, tmp_path: Path, step: int) -> None:
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "whole").code == 0
    rates: list[float] = []

    def interrupting(optimizer: Any, rate: float) -> None:
        rates.append(rate)
        if len(rates) == step:
            os.kill(os.getpid(), signal.SIGINT)
        set_learning_rate(optimizer, rate)

    set_learning_rate = reconstruction.set_learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "set_learning_rate", interrupting)
        stopped = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert stopped.code == 130
    assert f"Interrupted while layer {1 + step // 24} of 2 was reconstructed" in stopped.err
    assert run("distill", "--work", tmp_path / "job").code == 0
    for name in (WEIGHTS, Path("distill", "best", "model.safetensors")):
        assert sha256(tmp_path / "job" / name) == sha256(tmp_path / "whole" / name)
    assert metrics(tmp_path / "job") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_divided_equals_whole(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    """One process, accumulation, and two processes of which one has less text in the last step."""
    shared = {"steps": 1, "reconstruct": {"steps": 4, "sequences": 6, "learning_rate": 1e-5}, "learning_rate": 1e-5}
    whole = reconstructing(tmp_path / "whole.yaml", llama, text_file, **shared, batch_size=4)
    halves = reconstructing(tmp_path / "halves.yaml", llama, text_file, **shared, batch_size=2)
    assert run("distill", "--recipe", whole, "--work", tmp_path / "one").code == 0
    assert run("distill", "--recipe", halves, "--work", tmp_path / "parts", "--accumulation", 2).code == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = spawn("distill", "--recipe", halves, "--work", tmp_path / "two", launcher=torchrun)
    assert two.code == 0, two.err
    one = load_file(tmp_path / "one" / WEIGHTS)
    for other in ("parts", "two"):
        theirs = load_file(tmp_path / other / WEIGHTS)
        assert max(float((one[name] - theirs[name]).abs().max()) for name in one) < 1e-6, other


def test_it_needs_no_loss_that_compares(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = reconstructing(tmp_path / "r.yaml", llama, text_file, losses=[{"name": "ce"}])
    made = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json").json()
    assert len(made["block_errors"]) == 2
    assert run("pack", "--work", tmp_path / "job").code == 0


def test_what_is_trained_with_scales_is_reconstructed_with_scales(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    recipe = reconstructing(tmp_path / "r.yaml", llama, text_file, train="scales")
    made = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--json").json()
    assert all(after < before for before, after in made["block_errors"])


def test_tokens_of_other_bits_are_refused(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    values = {"reconstruct": {"steps": 2}}
    recipe = write_recipe(
        tmp_path / "r.yaml", llama, text_file, calibrate={"adaptive_tokens": "causal"}, distill=values
    )
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert refused.code == 2
    assert "cannot be reconstructed one by one" in refused.err


def test_no_steps_are_refused(run: Run, llama: Path, tmp_path: Path) -> None:
    refused = run("distill", llama, "--bits", 2, "--reconstruct", 0, "--work", tmp_path / "job")
    assert refused.code == 2
    assert "--reconstruct is 0; expected a whole number of at least 1." in refused.err


def test_a_dry_run_counts_it(
    run: Run, recipe: Path, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgerazor.devices.resident_memory", lambda: 0)
    plain = write_recipe(tmp_path / "plain.yaml", llama, text_file, distill={"steps": 2})
    memory = [
        run("distill", "--recipe", path, "--work", tmp_path / "dry", "--dry-run", "--json").json()["memory_bytes"]
        for path in (plain, recipe)
    ]
    assert memory[1] - memory[0] == 2 * 8 * 32 * 96 * 4  # twice 8 sequences of 32 tokens, 96 features, float32
