"""Adafactor that changes weights within the backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgerazor import modules
from edgerazor.console import Console
from edgerazor.errors import INTERRUPTED, UserError
from edgerazor.formats import MatrixSpec
from edgerazor.recipe import Distill
from edgerazor.training import in_place, memory_choice
from edgerazor.training.in_place import InPlaceAdafactor
from edgerazor.training.optimizer import make_optimizer, set_learning_rate
from helpers.tiny_job import Run, sha256, write_recipe
from helpers.trainings import WEIGHTS, interrupt_at

CPU = torch.device("cpu")


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_weights_change_within_the_backward_pass_by_about_the_learning_rate() -> None:
    model = model_of()
    optimizer = make_optimizer(model, Distill(optimizer="adafactor", learning_rate=1e-3))
    assert isinstance(optimizer, InPlaceAdafactor)
    set_learning_rate(optimizer, 1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.before_backward(active=True)
    model(torch.randn(5, 8)).square().mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter, old in zip(model.parameters(), before, strict=True):
        change = (parameter - old).square().mean().sqrt()
        assert 1e-4 < change < 2e-3
    states = optimizer.state[model[0].weight]
    assert states["row_var"].numel() == 16
    assert states["col_var"].numel() == 8


@pytest.mark.parametrize("shape", [(24, 16), (7,), (3, 5, 8)])
def test_steps_are_those_of_torch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "BLOCK_ELEMENTS", 64)  # several blocks of rows
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizer = InPlaceAdafactor([ours], 1e-2, 0.1, {id(ours)})
    optimizer.before_backward(active=True)
    reference = torch.optim.Adafactor([theirs])
    for _ in range(4):
        gradient = torch.randn(shape)
        size = float(theirs.detach().square().mean().sqrt())
        # torch multiplies the rate with the weight's size, but not where it decays
        reference.param_groups[0].update(lr=1e-2 / size, weight_decay=0.1 * size)
        theirs.grad = gradient.clone()
        reference.step()
        (ours * gradient).sum().backward()
        assert ours.detach() == pytest.approx(theirs.detach(), abs=1e-6)


def test_a_tied_embedding_gives_the_rows_that_were_looked_up() -> None:
    """The gradient of a weight that is the head's, too, has both parts."""
    weight, ids = nn.Parameter(torch.randn(50, 8)), torch.tensor([[3, 7, 3]])
    spec = MatrixSpec(("int4",), 8)
    embedding = modules.FakeQuantEmbedding(weight, spec, scale=None)
    head = modules.FakeQuantLinear(weight, None, spec, modules.SharedActivations(16, 8))
    model = nn.ModuleList([embedding, head])

    def gradient() -> torch.Tensor:
        (embedding(ids).sum() + head(torch.ones(2, 8)).square().sum()).backward()
        assert weight.grad is not None
        taken, weight.grad = weight.grad, None
        return taken

    whole = gradient()
    optimizer = make_optimizer(model, Distill(optimizer="adafactor"))
    assert isinstance(optimizer, InPlaceAdafactor)
    of_head = gradient()
    assert embedding.row_gradients is not None
    ((found_ids, rows),) = embedding.row_gradients
    assert torch.equal(of_head.index_add(0, found_ids, rows), whole)
    optimizer.zero_grad()
    assert not embedding.row_gradients
    optimizer.remove_hooks()
    make_optimizer(model, Distill())
    assert torch.equal(gradient(), whole)


def test_gradients_add_up_until_the_last_micro_batch_and_one_that_is_not_finite_changes_nothing() -> None:
    model = model_of()
    optimizer = InPlaceAdafactor(list(model.parameters()), 1e-3, 0.0, set())
    optimizer.before_backward(active=False)
    model(torch.randn(5, 8)).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.before_backward(active=True)
    (model(torch.randn(5, 8)).mean() * float("nan")).backward()
    assert optimizer.not_finite
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_memory_gives_up_what_costs_least_first() -> None:
    settings = Distill(memory=100, batch_size=4)
    given = [values for _, values in memory_choice.candidates(settings)]
    assert given[0] == {}
    assert given[1] == {"cache_rounding": False}
    assert given[2] == {"cache_rounding": False, "gradient_checkpointing": True}
    assert given[4]["batch_size"] * given[4]["accumulation"] == 4
    assert given[-1]["teacher_source"] == "streamed"
    fitted = memory_choice.fit(
        settings, CPU, lambda one: 90 if one.gradient_checkpointing else 120, Console(quiet=True)
    )
    assert fitted.gradient_checkpointing
    assert fitted.batch_size == 4
    with pytest.raises(UserError, match=r"may take 0\.00 MB") as refused:
        memory_choice.fit(settings, CPU, lambda _: 101, Console(quiet=True))
    assert "Even with --optimizer adafactor --batch-size 1 --accumulation 1 and a recording" in str(refused.value.hint)
    with pytest.raises(UserError) as fitting:
        memory_choice.fit(settings, CPU, lambda one: 90 if one.recording else 101, Console(quiet=True))
    assert str(fitting.value.hint) == (
        "It fits with a recording of the teacher (`edgerazor record`) (0.00 MB) or "
        "--optimizer adafactor --batch-size 1 --accumulation 1 and a recording (0.00 MB)."
    )


def test_a_training_in_place_goes_on_from_its_checkpoint(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"optimizer": "adafactor", "steps": 4, "evaluate_every": 4, "gradient_checkpointing": True}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "whole").code == 0
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == INTERRUPTED
    resumed = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
    assert "distill goes on from step 2" in resumed.err
    assert sha256(tmp_path / "job" / WEIGHTS) == sha256(tmp_path / "whole" / WEIGHTS)


def test_a_limit_of_memory_is_kept_or_refused(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    words = ("distill", "--recipe", recipe, "--work", tmp_path / "job", "--dry-run", "--memory")
    assert run(*words, "64GB").code == 0
    refused = run(*words, "1MB")
    assert refused.code == 1
    assert "Traceback" not in refused.err
    assert "and may take 1.00 MB." in refused.err
    assert "and a recording it takes" in refused.err
