"""Calibration that walks layer by layer: the numbers of the whole model, interrupted or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from edgerazor import formats, models
from edgerazor.calibration import measurement, observers, own_text
from edgerazor.calibration.measurement import Measurement
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.job import JobContext
from edgerazor.losses import METRICS, layer_metric
from edgerazor.modules import attention
from edgerazor.recipe import Recipe, build, load
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, sha256, write_recipe
from helpers.tiny_models import FAMILIES, ModelMaker, some_batches

STATISTICS = Path("calibrate", "stats.safetensors")


def whole_model(model: models.PreTrainedModel, batches: list[tuple[Tensor, Tensor]], recipe: Recipe) -> dict[str, Any]:
    """Second moments, metrics and input scales by passes of the whole model."""
    found = models.structure(model)
    sums: dict[str, Tensor] = {}
    ranges: dict[str, Tensor] = {}
    keep = torch.empty(0)

    def observing(name: str) -> Any:
        def hook(_module: Any, args: tuple) -> None:
            x = args[0][keep]
            sums[name] = sums.get(name, 0) + x.float().square().sum(0, dtype=torch.float64)
            ranges[name] = ranges.get(name, 0) + formats.magnitude_counts(x)

        return hook

    for name in (*(site.name for site in found.linears), found.head_path):
        model.get_submodule(name).register_forward_pre_hook(observing(name))
    measured = {metric: torch.zeros(found.layer_count, dtype=torch.float64) for metric in METRICS}
    with torch.no_grad():
        for ids, keep in batches:
            hidden = dict(enumerate(model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states))
            assert len(hidden) == found.layer_count + 1
            for metric, values in measured.items():
                values += layer_metric(metric, hidden, keep).double() * int(keep.sum())
    tokens = sum(int(counts.sum()) for _, counts in batches)
    result = {f"input_second_moment/{site.name}": (sums[site.name] / tokens).float() for site in found.linears}
    result |= {f"layer_{metric}": (values / tokens).float() for metric, values in measured.items()}
    bits = recipe.calibrate.activation_bits
    return result | {
        f"{name}.input_scale": torch.tensor(formats.calibrated_scale(counts, bits)) for name, counts in ranges.items()
    }


def whole_thresholds(model: models.PreTrainedModel, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Medians of importance by passes of the whole model."""
    tokens = attention.ImportantTokens(None)
    attention.attach_important_tokens(model, tokens)
    attention.quantize_attention(model, 16)
    seen: list[list[Tensor]] = [[] for _ in range(models.structure(model).layer_count)]
    for ids, counts in batches:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for layer, values in enumerate(seen):
            values.append(tokens.importance[layer][counts])
    return torch.stack([torch.cat(values).sort().values[sum(map(len, values)) // 2] for values in seen])


def job(folder: Path, model: Path, device: str = "cpu", **settings: Any) -> Measurement:
    path = write_recipe(folder / "r.yaml", model, None, calibrate=settings, device=device)
    context = JobContext(build(load(path), "the recipe"), WorkDir(folder / "job"), Console(quiet=True))
    return Measurement(context, context.load_teacher(torch.device("cpu")), 19)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_walk_gives_the_numbers_of_the_whole_model(
    make_model: ModelMaker, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    make_model(tmp_path / "model", family, dtype)
    made_of, batches = job(tmp_path, tmp_path / "model", activation_scales="static"), some_batches()
    walk = made_of.layerwise_pass("walk", batches)
    whole, _ = models.load(tmp_path / "model", dtype=walk.dtype)
    wanted = whole_model(whole, batches, made_of.context.recipe)
    made = measurement.observe(walk, made_of.settings)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_importance_is_that_of_the_whole_model(make_model: ModelMaker, tmp_path: Path, family: str) -> None:
    make_model(tmp_path / "model", family, sliding_window=None)
    whole, _ = models.load(tmp_path / "model")
    wanted = whole_thresholds(whole, some_batches())
    made_of = job(tmp_path, tmp_path / "model", adaptive_tokens="causal")
    assert torch.equal(measurement.importance_thresholds(made_of, some_batches()), wanted)


@pytest.mark.parametrize("after", [1, 16, 20])
def test_interrupted_it_goes_on_and_ends_the_same(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, after: int
) -> None:
    """Two layers of seven linear layers, twice: once for moments and ranges, once for importance."""
    settings = {"activation_scales": "static", "adaptive_tokens": "causal"}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate=settings)
    assert run("calibrate", "--recipe", recipe, "--work", tmp_path / "whole").code == 0
    seen: list[str] = []

    def interrupting(self: Any, name: str) -> None:
        seen.append(name)
        if len(seen) == after:
            raise KeyboardInterrupt

    class Moments(observers.SecondMoments):
        def linear(self, path: str, x: Tensor, weights: Tensor | None = None) -> None:
            interrupting(self, path)
            super().linear(path, x, weights)

    class Importance(observers.Importance):
        def layer(self, index: int, entering: Tensor, leaving: Tensor, counts: Tensor) -> None:
            for _ in range(5):
                interrupting(self, str(index))
            super().layer(index, entering, leaving, counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers, "SecondMoments", Moments)
        patch.setattr(observers, "Importance", Importance)
        stopped = run("calibrate", "--work", tmp_path / "job", "--recipe", recipe)
        assert stopped.code == 130
        assert "Interrupted; the layers that were finished are saved." in stopped.err
        assert (tmp_path / "job" / "calibrate" / "checkpoints").is_dir()
        before = len(seen)
        assert run("calibrate", "--work", tmp_path / "job").code == 0
    spared = {1: 0, 16: 14, 20: 19}[after]
    assert len(seen) - before == 14 + 10 - spared
    assert sha256(tmp_path / "job" / STATISTICS) == sha256(tmp_path / "whole" / STATISTICS)
    assert not (tmp_path / "job" / "calibrate" / "checkpoints").exists()


def test_what_the_teacher_wrote_before_an_interruption_is_kept(
    run: Run, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, None, data={"generated_tokens": 512})
    assert run("calibrate", "--recipe", recipe, "--work", tmp_path / "whole").code == 0

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    observe = measurement.observe
    monkeypatch.setattr(measurement, "observe", interrupted)
    assert run("calibrate", "--recipe", recipe, "--work", tmp_path / "job").code == 130
    monkeypatch.setattr(measurement, "observe", observe)
    monkeypatch.setattr(own_text, "write", interrupted)
    assert run("calibrate", "--work", tmp_path / "job").code == 0
    text = Path("calibrate", "generated.jsonl")
    for name in (text, STATISTICS):
        assert sha256(tmp_path / "job" / name) == sha256(tmp_path / "whole" / name)
    assert run("calibrate", "--work", tmp_path / "job", "--force").code == 130  # from the beginning


def test_a_full_disk_loses_no_finished_layer(tmp_path: Path, llama: Path) -> None:
    """Whatever ends a walk, what was finished is there for the next one."""
    made_of = job(tmp_path, llama)
    walk = made_of.layerwise_pass("walk", some_batches())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers.LayerMetrics, "layer", fail_in_the_second)
        with pytest.raises(UserError, match="full"):
            measurement.observe(walk, made_of.settings)
    assert (made_of.context.work.progress("calibrate", "walk") / "entering-1.raw").exists()
    assert load_file(made_of.context.work.progress("calibrate", "walk") / "forward.safetensors")


def fail_in_the_second(_self: Any, index: int, *_: Any) -> None:
    if index == 1:
        raise UserError("The disk is full.")


def test_a_dry_run_counts_a_layer_and_not_the_model(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    made = run("calibrate", "--recipe", recipe, "--work", tmp_path / "job", "--dry-run", "--json").json()
    outputs, inputs = 96 + 32 + 32 + 96 + 101 + 101 + 96, 6 * 96 + 101
    assert made["memory_bytes"] == 4 * 32 * (4 * (outputs + inputs + 4 * 96) + 8 * 101)  # 4 sequences of 32 tokens
    tensors = load_file(llama / "model.safetensors")
    assert made["mapped_bytes"] == sum(value.numel() * 4 for value in tensors.values())
    causal = write_recipe(tmp_path / "c.yaml", llama, text_file, calibrate={"adaptive_tokens": "causal"})
    shown = run("calibrate", "--recipe", causal, "--work", tmp_path / "job", "--dry-run", "--json").json()
    assert shown["memory_bytes"] - made["memory_bytes"] == 3 * 4 * 6 * 32 * 32 * 4  # scores of 6 heads, three times


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_only_the_layer_in_work_is_there(make_model: ModelMaker, tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama", num_hidden_layers=4)
    made = []
    for device in ("cpu", "cuda"):
        made_of = job(tmp_path, tmp_path / "model", device, activation_scales="static")
        walk = made_of.layerwise_pass("walk", some_batches())
        made.append(measurement.observe(walk, made_of.settings))
        walk.clear()
        layers = made_of.teacher.model.get_submodule(walk.structure.layers_path)
        assert {parameter.device.type for parameter in layers.parameters()} == {"cpu"}
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name].cpu(), value, rtol=1e-2, atol=1e-3)
