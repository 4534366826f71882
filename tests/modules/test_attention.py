"""Rounded queries and probabilities, and tokens with bits of their own (EdgeQAT)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor import formats, kernels, models, modules, packed, transformers_plugin
from edgerazor.allocate import make_plan
from edgerazor.errors import UserError
from edgerazor.formats import MatrixSpec
from edgerazor.modules import FakeQuantLinear, LazyMatrix, PackedLinear, Settings, SharedActivations, attention
from edgerazor.modules.attention import ImportantTokens
from edgerazor.recipe import Calibrate
from helpers.tiny_job import Run, move_zero_points, write_recipe
from helpers.tiny_models import GROUP_SIZE, VOCABULARY, ModelMaker, family_config, mostly_slow

IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def model_of(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """Random, with attention that is not uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# --- probabilities and queries -----------------------------------------------------------------


def test_probabilities_by_hand() -> None:
    p = torch.tensor([[0.6, 0.3, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]], requires_grad=True)
    rounded = formats.fake_quantize_probabilities(p, 4)
    codes = torch.tensor([[15.0, 8.0, 2.0, 0.0], [15.0, 0.0, 0.0, 0.0], [15.0] * 4])  # 7.5 is rounded to even
    torch.testing.assert_close(rounded, codes * torch.tensor([[0.6], [1.0], [0.25]]) / 15, rtol=1e-6, atol=0)
    assert torch.equal(formats.fake_quantize_probabilities(torch.zeros(2, 3), 8), torch.zeros(2, 3))
    upstream = torch.randn(3, 4)
    rounded.backward(upstream)
    assert torch.equal(p.grad, upstream)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        formats.fake_quantize_probabilities(p, 16)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "mistral"])
def test_only_queries_and_probabilities_are_changed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rounding that does nothing, the model computes what it did; with a real one, nearly."""
    model = model_of(family)
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    with torch.no_grad():
        before = model(input_ids=IDS, attention_mask=mask).logits[mask.bool()]
        with monkeypatch.context() as patch:
            for name in ("fake_quantize_kv", "fake_quantize_probabilities"):
                patch.setattr(formats, name, lambda x, bits: x)
            attention.quantize_attention(model, 8, 8, 8)
            same = model(input_ids=IDS, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(same, before, rtol=0, atol=1e-5 * float(before.abs().max()))
        rounded = model(input_ids=IDS, attention_mask=mask).logits[mask.bool()]
    assert 0 < float((rounded - before).norm() / before.norm()) < 0.1


# --- important tokens --------------------------------------------------------------------------


def test_importance_by_hand() -> None:
    probabilities = torch.zeros(2, 2, 3, 3)  # [batch, heads, tokens, keys]
    probabilities[0, 0] = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    probabilities[0, 1] = torch.tensor([[1.0, 0.0, 0.0], [0.1, 0.9, 0.0], [0.6, 0.3, 0.1]])
    probabilities[1] = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.0, 1.0, 0.0], [0.0, 0.25, 0.75]])  # padding, two tokens
    causal, ranked = ImportantTokens((0.4,)), ImportantTokens(None)
    for tokens in (causal, ranked):
        tokens.record(0, probabilities)
        expected = torch.tensor([[1.0, 0.3, 0.4], [1 / 3, 1.0, 0.25]])
        torch.testing.assert_close(tokens.importance[0], expected)
    assert causal.important(0).tolist() == [[True, False, True], [False, True, False]]
    assert ranked.important(0).tolist() == [[True, False, True], [True, True, False]]


def test_attention_decides_for_its_mlp_and_for_the_next_projections() -> None:
    layers = attention.deciding_layers(model_of())
    expected: dict[str, int] = {}
    for layer in (0, 1):
        expected |= {f"model.layers.{layer}.mlp.{name}_proj": layer for name in ("gate", "up", "down")}
    expected |= {f"model.layers.1.self_attn.{name}_proj": 0 for name in "qkv"}
    assert layers == expected
    assert attention.deciding_layers(model_of("phi3"))["model.layers.1.self_attn.qkv_proj"] == 0
    with pytest.raises(UserError, match="a sliding window forgets the first token"):
        attention.deciding_layers(model_of("mistral"))


def test_a_linear_layer_gives_each_token_its_bits() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(101, 33), torch.randn(2, 5, 101)
    important = torch.rand(2, 5) > 0.5
    spec = MatrixSpec(("int4",), GROUP_SIZE)
    encoded = formats.encode_matrix(linear.weight.detach(), spec)
    trained = FakeQuantLinear(linear.weight, linear.bias, spec, SharedActivations(8, GROUP_SIZE))
    stored = kernels.StoredMatrix(formats.pack_matrix(encoded, spec), spec, (33, 101)) if kernels.is_native() else None
    lazy = LazyMatrix(lambda: (encoded, spec), lambda: stored)
    ours = PackedLinear(lazy, linear.bias, (33, 101), 8, GROUP_SIZE)
    wide, narrow = (
        PackedLinear(lazy, linear.bias, (33, 101), bits, GROUP_SIZE)(x) for bits in (8, attention.UNIMPORTANT_BITS)
    )
    trained.important = ours.important = lambda: important
    expected = torch.where(important[..., None], wide, narrow)
    torch.testing.assert_close(ours(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(trained(x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(wide, narrow)


def prepared(adaptive: str, thresholds: tuple[float, ...] = ()) -> tuple[PreTrainedModel, ImportantTokens]:
    model = model_of()
    structure = models.structure(model)
    plan = make_plan(structure.targets, Calibrate(bits=4.0, plan="interleave", group_size=GROUP_SIZE))
    settings = Settings(8, 8, GROUP_SIZE, query_bits=8, adaptive_tokens=adaptive, thresholds=thresholds)
    modules.prepare_for_training(model, structure, plan.specs(), settings)
    return model, model.model.layers[0].self_attn.important_tokens


@torch.no_grad()
def test_later_tokens_change_no_earlier_bits() -> None:
    """The law of `causal`, which `ranked` breaks."""

    def bits(adaptive: str, length: int) -> list[Tensor]:
        model, tokens = prepared(adaptive, (0.15, 0.15))
        model(input_ids=IDS[:, :length], use_cache=False)
        return [tokens.important(layer)[:, :8] for layer in (0, 1)]

    causal = [bits("causal", length) for length in (8, 12, 24)]
    assert any(mask.any() and not mask.all() for mask in causal[0])
    for other in causal[1:]:
        assert all(torch.equal(one, two) for one, two in zip(causal[0], other, strict=True))
    ranked = [bits("ranked", length) for length in (8, 24)]
    assert any(not torch.equal(one, two) for one, two in zip(*ranked, strict=True))


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, _ = prepared("causal", (0.15, 0.15))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


# --- from calibrate to the packed model --------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "attention": {"query_bits": 8, "probability_bits": 8},
    "causal": {"adaptive_tokens": "causal", "query_bits": 8, "probability_bits": 4},
    "ranked": {"adaptive_tokens": "ranked", "kv_bits": 16},
    "causal, learned steps": {"adaptive_tokens": "causal", "activation_scales": "learned"},
    "causal, asymmetric steps": {"adaptive_tokens": "causal", "activation_scales": "asymmetric"},
    "causal, static steps": {"adaptive_tokens": "causal", "activation_scales": "static"},
}


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("case", mostly_slow(CASES, "causal, asymmetric steps"))
def test_packed_equals_trained(run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path, case: str) -> None:
    make_model(tmp_path / "model", "llama")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model", text_file, calibrate=CASES[case])
    job = tmp_path / "job"
    done = run("distill", "--recipe", recipe, "--work", job)
    assert done.code == 0, done.err
    trained = "learned" in case or "asymmetric" in case
    if "asymmetric" in case:
        move_zero_points(job)
    assert run("pack", "--work", job).code == 0
    model, _ = transformers_plugin.load(job / "packed")
    header = packed.PackedModel.open(job / "packed").header
    settings = Settings(**{name: header.settings[name] for name in packed.SETTINGS})  # type: ignore[arg-type]
    statistics = load_file(job / "calibrate" / "stats.safetensors")
    assert ("importance_threshold" in statistics) == ("causal" in case)
    steps = {name: float(value) for name, value in statistics.items() if name.endswith("input_scale")}
    if steps:  # layer 0's queries, keys and values, and the head, have the bits of all tokens
        low = {name.removesuffix(".low_input_scale") for name in steps if name.endswith(".low_input_scale")}
        assert low == set(attention.deciding_layers(models.load(tmp_path / "model")[0]))
        stored = packed.PackedModel.open(job / "packed").input_scales()
        zero_points = {name.replace("scale", "zero_point") for name in steps} if "asymmetric" in case else set()
        assert stored.keys() == steps.keys() | zero_points
        assert all((stored[name] != value) == trained for name, value in steps.items())
    settings = replace(settings, learned_inputs=trained, learned_zero_points="asymmetric" in case)
    student, _ = models.load(tmp_path / "model", dtype=torch.float32)
    structure = models.structure(student)
    plan = make_plan(structure.targets, Calibrate(bits=1.88, plan="interleave", group_size=GROUP_SIZE))
    modules.prepare_for_training(student, structure, plan.specs(), settings, input_scales=steps or None)
    student.load_state_dict(load_file(job / "distill" / "best" / "model.safetensors"), strict=False)
    with torch.no_grad():
        theirs, ours = (m.eval()(input_ids=IDS, use_cache=False).logits for m in (student, model))
    assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max()
    if case != "ranked":
        check_cache(model)
    if case == "causal":
        assert header.settings["thresholds"] == statistics["importance_threshold"].tolist()
        tokens = model.model.layers[0].self_attn.important_tokens
        teacher, _ = models.load(tmp_path / "model", dtype=torch.float32)
        attention.attach_important_tokens(teacher, tokens)
        attention.quantize_attention(teacher, 16)
        text = torch.randint(2, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(1))
        teacher(input_ids=text)
        share = torch.stack([tokens.important(layer) for layer in (0, 1)]).float().mean()
        assert 0.3 < share < 0.7  # about half of other tokens, too


@torch.no_grad()
def check_cache(model: PreTrainedModel) -> None:
    """`generate` with a cache computes what a whole forward pass computes."""
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    done = model.generate(IDS, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    whole = model(input_ids=done.sequences, use_cache=False).logits[:, 23:-1]
    close = (whole - torch.stack(done.logits, dim=1)).abs() <= 1e-4 * whole.abs().max()
    assert close.float().mean() > 0.9  # sums in another order may move a value by one step


def test_impossible_combinations_are_refused(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    for calibrate in (
        {"activation_bits": 16},
        {"activation_bits": 4},
    ):
        fields = {**calibrate, "adaptive_tokens": "causal"}
        recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate=fields)
        refused = run("calibrate", "--recipe", recipe, "--work", tmp_path / "job")
        assert refused.code == 2
        assert "adaptive tokens need" in refused.err


def test_a_sliding_window_is_refused_at_the_start(
    run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path
) -> None:
    make_model(tmp_path / "model", "mistral")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model", text_file, calibrate={"adaptive_tokens": "ranked"})
    refused = run("calibrate", "--recipe", recipe, "--work", tmp_path / "job")
    assert refused.code == 1
    assert "sliding window" in refused.err
    assert not (tmp_path / "job" / "calibrate").exists()
