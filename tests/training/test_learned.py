"""Trained scales: LSQ's gradients, and that what is packed is what was trained."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor import formats, losses, models, modules, packed, transformers_plugin
from edgerazor.allocate import make_plan
from edgerazor.formats import MatrixSpec
from edgerazor.losses import Head, Outputs, StepTotals, step_counts
from edgerazor.modules import FakeQuantEmbedding, FakeQuantLinear, Settings, SharedActivations
from edgerazor.recipe import Calibrate, Distill
from edgerazor.training.in_place import InPlaceAdafactor
from edgerazor.training.optimizer import make_optimizer, set_learning_rate
from helpers.tiny_job import Run, metrics, sha256, spawn, write_recipe
from helpers.tiny_models import GROUP_SIZE, VOCABULARY, ModelMaker, family_config, mostly_slow
from helpers.trainings import interrupt_at, largest_difference

ALL = formats.names()
IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_scales(w: Tensor, spec: MatrixSpec, factor: float = 0.8) -> Tensor:
    """Scales that fp16 holds exactly, small enough that some weights lie out of range."""
    return (factor * formats.initial_scales(w, spec)).half().double()


def mixed_spec(rows: int, group_size: int) -> MatrixSpec:
    return MatrixSpec(tuple(ALL), group_size, (torch.arange(rows) * 3 % len(ALL)).to(torch.uint8))


def formats_of(spec: MatrixSpec, rows: int) -> list[formats.Format]:
    digits = [0] * rows if spec.row_formats is None else spec.row_formats.tolist()
    return [formats.get(spec.formats[digit]) for digit in digits]


def top_level(number_format: formats.Format) -> float:
    return number_format.max_code + (0.5 if number_format.name == "int2" else 0.0)


# The step ---------------------------------------------------------------------------------------------------------


def plain_step(w: Tensor, scales: Tensor, spec: MatrixSpec) -> Tensor:
    """LSQ as its paper writes it (arXiv 1902.08153, appendix A), by autograd, group by group."""
    decoded = []
    for row, number_format in enumerate(formats_of(spec, len(w))):
        parts = []
        for index, part in enumerate(w[row].split(spec.group_size)):
            factor = 1 / math.sqrt(len(part) * top_level(number_format))
            s = scales[row, index] * factor + (scales[row, index] * (1 - factor)).detach()
            low, high = number_format.min_code, number_format.max_code + (1 if number_format.name == "int2" else 0)
            ratio = (part / s).clamp(low, high)
            level = (part / s).detach().floor() if number_format.name == "int2" else (part / s).detach().round()
            level = level.clamp(low, number_format.max_code) + (0.5 if number_format.name == "int2" else 0)
            parts.append((ratio + (level - ratio).detach()) * s)
        decoded.append(torch.cat(parts))
    return torch.stack(decoded)


def learned(w: Tensor, scales: Tensor, spec: MatrixSpec) -> Tensor:
    """The same through the house's functions."""
    inlet = formats.ste_target(w, scales, spec)
    return formats.straight_through(inlet, lambda _: formats.learned_weight(w, scales, spec, torch.float64))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 31), (17, 101), (9, 127)])
@pytest.mark.parametrize("group_size", [5, 40, 1000])
def test_the_gradient_is_lsqs(rows: int, cols: int, group_size: int) -> None:
    for spec in (mixed_spec(rows, group_size), *(MatrixSpec((name,), group_size) for name in ALL)):
        w = weights(rows, cols).requires_grad_()
        scales = half_scales(w, spec).requires_grad_()
        upstream = weights(rows, cols, seed=1)
        ours, plain = learned(w, scales, spec), plain_step(w, scales, spec)
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-9)  # the values are computed in float32
        gradients, expected = (torch.autograd.grad(output, (w, scales), upstream) for output in (ours, plain))
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_out_of_range_the_gradient_is_the_true_slope(name: str) -> None:
    """There the decoded weight is the outer level times the scale; LSQ divides by sqrt(N Qp)."""
    number_format, spec = formats.get(name), MatrixSpec((name,), 4)
    w = torch.tensor([[-500.0, 500.0, 900.0, -900.0]], dtype=torch.float64)
    upstream, h = weights(1, 4, seed=2), 2.0**-6

    def value(s: float) -> float:
        decoded = formats.learned_weight(w.float(), torch.tensor([[s]]), spec)
        return float((decoded.double() * upstream).sum())

    scales = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(learned(w, scales, spec), scales, upstream)
    slope = (value(1 + h) - value(1 - h)) / (2 * h)
    assert float(gradient) * math.sqrt(4 * top_level(number_format)) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_frozen_codes_have_the_true_gradient(name: str) -> None:
    """`s * level` is differentiable, so central differences agree with the gradient of any function of it."""
    spec = MatrixSpec((name,), 5)
    w = weights(3, 13)
    codes, start = formats.encode_matrix(w, spec)
    ones = torch.ones_like(start)
    levels = formats.decode_matrix(formats.Encoded(codes, ones), spec).double()

    def decoded(scales: Tensor) -> Tensor:
        spread = scales.repeat_interleave(5, dim=1)[:, :13]
        return formats.straight_through(formats.ste_target(codes, scales, spec), lambda _: levels * spread)

    scales = start.double().requires_grad_()
    torch.testing.assert_close(decoded(scales).float(), formats.learned_weight(codes, scales, spec), rtol=1e-7, atol=0)
    assert torch.autograd.gradcheck(lambda s: decoded(s).sin(), scales)


def test_the_published_start() -> None:
    w = torch.tensor([[1.0, -3.0, 2.0, -2.0, 4.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    for name, top in (("ternary", 1), ("int2", 1.5), ("int2z", 1), ("int3", 3), ("int4", 7), ("int8", 127)):
        scales = formats.initial_scales(w, MatrixSpec((name,), 4, published=True))
        expected = torch.tensor([[4 / math.sqrt(top), 8 / math.sqrt(top)], [2.0**-24, 2.0**-24]])
        torch.testing.assert_close(scales, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_a_given_scale_uses_every_code_and_comes_back_from_its_bytes(name: str) -> None:
    number_format, spec = formats.get(name), MatrixSpec((name,), 8)
    expected = {"ternary": -1, "int2": -2, "int2z": -2}.get(name, -(2 ** (int(number_format.nominal_bits) - 1)))
    assert number_format.min_code == expected
    w = torch.arange(-150.0, 150.0).reshape(1, -1)
    encoded = formats.encode_matrix(w, spec, torch.ones(1, 38))
    assert encoded.codes.unique().tolist() == list(range(number_format.min_code, number_format.max_code + 1))
    by_rule = formats.encode_matrix(w, replace(spec, published=True))
    assert by_rule.codes.min() >= number_format.min_rule_code
    parts = formats.pack_matrix(encoded, spec)
    again, _ = formats.unpack_matrix(parts, spec.formats, 8, (1, 300))
    assert torch.equal(again.codes, encoded.codes)


def test_scales_stay_positive() -> None:
    spec = MatrixSpec(("int4",), 4)
    scales = torch.tensor([[-1.0], [0.0], [1e9]])
    stored = formats.stored_scales(scales)
    assert stored.flatten().tolist() == [2.0**-24, 2.0**-24, 65504.0]
    assert torch.isfinite(formats.learned_weight(torch.ones(3, 4), scales, spec)).all()


# Modules ----------------------------------------------------------------------------------------------------------


def learned_linear(rows: int = 33, columns: int = 101) -> FakeQuantLinear:
    torch.manual_seed(0)
    linear, spec = nn.Linear(columns, rows), mixed_spec(rows, GROUP_SIZE)
    scales = nn.Parameter(0.8 * formats.initial_scales(linear.weight, spec))
    return FakeQuantLinear(linear.weight, linear.bias, spec, SharedActivations(8, GROUP_SIZE), scales)


def gradients_by_autograd(module: modules.FakeQuantWeight, upstream: Tensor) -> tuple[Tensor, ...]:
    """Of weight and scales, for a gradient of the decoded weight, through the plain formulation."""
    assert module.scales is not None
    w = module.weight.detach().double().requires_grad_()
    s = module.scales.detach().half().double().requires_grad_()
    return torch.autograd.grad(plain_step(w, s, module.spec), (w, s), upstream.double())


def assert_gradients(module: modules.FakeQuantWeight, upstream: Tensor) -> None:
    assert module.scales is not None
    expected = gradients_by_autograd(module, upstream)
    for parameter, gradient in zip((module.weight, module.scales), expected, strict=True):
        assert parameter.grad is not None
        largest = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient.float(), rtol=1e-4, atol=1e-5 * largest)


def test_a_linear_layer_trains_weights_and_scales() -> None:
    module, x = learned_linear(), torch.randn(7, 101, requires_grad=True)
    upstream = torch.randn(7, 33)
    module(x).backward(upstream)
    rounded = formats.fake_quantize_activations(x.detach(), 8, GROUP_SIZE)
    assert_gradients(module, upstream.T @ rounded)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ module.decoded(torch.float32))
    encoded = formats.encode_matrix(module.weight, module.spec, module.scales)
    assert torch.equal(module.decoded(torch.float32), formats.decode_matrix(encoded, module.spec))
    module.encode_once()
    assert module.digest == formats.digest(encoded, module.spec)
    assert module.decoded_cache is not None
    assert torch.equal(module.decoded_cache, formats.decode_matrix(encoded, module.spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_trains_weights_and_scales_chunk_by_chunk(dtype: torch.dtype) -> None:
    module, states = learned_linear(), torch.randn(2, 9, 101)
    labels = torch.randint(0, 33, (2, 9), generator=torch.Generator().manual_seed(1))
    totals = StepTotals(*step_counts(labels))
    x, matrix = module.as_head(states.to(dtype))
    losses.make("ce")(Outputs(x, head=Head(**matrix)), None, labels, totals).backward()  # type: ignore[arg-type]
    weight = module.decoded(dtype).requires_grad_()
    logits = nn.functional.linear(x.detach()[:, :-1], weight, module.bias.detach().to(dtype)).float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    (upstream,) = torch.autograd.grad(loss, weight)
    if dtype == torch.float32:
        assert_gradients(module, upstream)
    else:  # products are in bfloat16, the gradients arrive in float32
        assert module.scales is not None
        assert module.scales.grad is not None
        assert module.scales.grad.dtype == module.weight.grad.dtype == torch.float32
        expected = gradients_by_autograd(module, upstream)[1].float()
        assert float(torch.cosine_similarity(module.scales.grad.flatten(), expected.flatten(), dim=0)) > 0.99


def test_an_embedding_trains_the_rows_it_looks_up() -> None:
    torch.manual_seed(0)
    table, spec = nn.Embedding(33, 101), mixed_spec(33, GROUP_SIZE)
    scales = nn.Parameter(0.8 * formats.initial_scales(table.weight, spec))
    module = FakeQuantEmbedding(table.weight, spec, 2.0, scales)
    ids = torch.tensor([[3, 3, 7], [9, 32, 3]])
    expected = formats.decode_matrix(formats.encode_matrix(table.weight, spec, scales), spec)
    assert torch.equal(module(ids), 2 * expected[ids])
    upstream = torch.randn(2, 3, 101)
    module(ids).backward(upstream)
    dense = torch.zeros(33, 101).index_add_(0, ids.flatten(), 2 * upstream.flatten(0, 1))
    assert_gradients(module, dense)
    module.encode_once()
    assert torch.equal(module(ids), 2 * expected[ids])


def student(tied: bool = True, scales_only: bool = False, learned: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config("llama", tie_word_embeddings=tied)).eval()
    structure = models.structure(model)
    plan = make_plan(structure.targets, Calibrate(bits=1.88, plan="interleave", group_size=GROUP_SIZE))
    settings = Settings(8, 8, GROUP_SIZE, learned)
    modules.prepare_for_training(model, structure, plan.specs(), settings, scales_only)
    return model


def test_a_tied_head_shares_its_scales() -> None:
    model = student()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.weight is head.weight
    assert table.scales is head.scales
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    assert (table.scales.grad.abs().sum(1) > 0).sum() >= VOCABULARY - 1


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_training_scales_leaves_codes_alone(learned: bool, tied: bool) -> None:
    """Norm gains (and biases) are trained with the scales."""
    model = student(tied, scales_only=True, learned=learned)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = {
        f"model.layers.{layer}.{which}_layernorm.weight" for layer in (0, 1) for which in ("input", "post_attention")
    }
    scales = {f"{name}.scales" for name in modules.fake_quant_weights(model)}
    assert trained == scales | norms | {"model.norm.weight"}
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    for name, module in modules.fake_quant_weights(model).items():
        assert module.scales is not None
        assert module.scales.grad is not None, name
        assert module.weight.dtype == torch.int8
        with torch.no_grad():
            module.scales.mul_(1.3)
        encoded = module.encoded()
        assert torch.equal(encoded.codes, module.weight)  # codes stay when scales change
        assert torch.equal(module.decoded(torch.float32), formats.decode_matrix(encoded, module.spec))


def test_without_learned_start_scales_alone_begin_with_the_rounded_teacher() -> None:
    ruled, alone = student(learned=False), student(scales_only=True, learned=False)
    with torch.no_grad():
        expected, logits = (model(input_ids=IDS, use_cache=False).logits for model in (ruled, alone))
    assert torch.equal(logits, expected)


def test_scales_do_not_decay() -> None:
    model = student()
    optimizer = make_optimizer(model, Distill(weight_decay=0.5))
    decaying, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        scales = name.endswith(".scales")
        assert (id(parameter) in others) == (scales or parameter.ndim == 1), name
        assert (id(parameter) in decaying) != (id(parameter) in others)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_scales_learn_at_their_share_of_the_learning_rate(optimizer: str) -> None:
    settings = Distill(optimizer=optimizer, scale_rate=0.25, weight_decay=0.0, learning_rate=1e-3)
    moved = {}
    for share in (1.0, 0.25):
        model = student()
        made = make_optimizer(model, settings.model_copy(update={"scale_rate": share}))
        set_learning_rate(made, 1e-3)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if isinstance(made, InPlaceAdafactor):
            made.before_backward(active=True)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        made.step()
        moved[share] = {name: (p.detach() - before[name]).norm() for name, p in model.named_parameters()}
    for name, distance in moved[1.0].items():
        factor = 0.25 if name.endswith(".scales") else 1.0
        assert float(moved[0.25][name]) == pytest.approx(factor * float(distance), rel=2e-2), name


def test_scales_that_learn_alone_learn_at_the_whole_rate() -> None:
    optimizer = make_optimizer(student(scales_only=True), Distill(scale_rate=0.25))
    set_learning_rate(optimizer, 1e-3)
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3}


# From distill to the packed model ---------------------------------------------------------------------------------

LEARNED, ALONE = {"calibrate": {"scales": "learned"}}, {"distill": {"train": "scales"}}
#: A family (Gemma scales embeddings, Phi has biases everywhere, Phi 3 fused layers) and how its scales are trained.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("llama", LEARNED),
    "learned, biases": ("phi", LEARNED),
    "learned, fused": ("phi3", LEARNED),
    "scales": ("llama", ALONE),
    "scales, scaled embedding": ("gemma3", ALONE),
    "learned scales": ("qwen3", {**LEARNED, **ALONE}),
    "learned scales, caps": ("gemma2", {**LEARNED, **ALONE}),
}


@pytest.mark.parametrize("kind", mostly_slow(KINDS, *list(KINDS)[:2]))
@pytest.mark.parametrize("tied", mostly_slow([True, False], False))
def test_packed_equals_trained_and_resumed_equals_uninterrupted(
    run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path, kind: str, tied: bool
) -> None:
    family, sections = KINDS[kind]
    make_model(tmp_path / "model", family, tie_word_embeddings=tied)
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", text_file, **sections)
    job = tmp_path / "job"
    assert run("distill", "--recipe", recipe, "--work", job).code == 0
    done = run("pack", "--work", job, "--json")
    assert done.code == 0, done.err
    assert done.json()["verified"]
    stored = load_file(job / "distill" / "best" / "model.safetensors")
    folder = packed.PackedModel.open(job / "packed")
    for name in folder.header.matrices:
        assert (stored[f"{name}.weight"].dtype == torch.int8) == ("distill" in sections)
        assert torch.equal(folder.matrix(name).encoded.scales, formats.stored_scales(stored[f"{name}.scales"]))
    assert not any(each.endswith(".scales") for each in folder.others())
    digests = json.loads((job / "distill" / "best" / "digests.json").read_text())
    packed.verify_digests(job / "packed", digests)
    model, _ = transformers_plugin.load(job / "packed")
    assert torch.isfinite(model(input_ids=IDS).logits).all()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        assert run("distill", "--recipe", recipe, "--work", tmp_path / "again").code == 130
    assert run("distill", "--work", tmp_path / "again").code == 0
    assert metrics(tmp_path / "again") == metrics(job)
    for student_name in ("best", "last"):
        file = Path("distill", student_name, "model.safetensors")
        assert sha256(tmp_path / "again" / file) == sha256(job / file)


@pytest.mark.slow
def test_divided_equals_whole(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    """Two processes with half of the sequences each train the same weights, scales and input scales."""
    shared = {"steps": 3, "learning_rate": 2e-5}
    calibrate = {"scales": "learned", "activation_scales": "learned"}
    whole = write_recipe(
        tmp_path / "w.yaml", llama, text_file, calibrate=calibrate, distill={**shared, "batch_size": 4}
    )
    half = write_recipe(tmp_path / "h.yaml", llama, text_file, calibrate=calibrate, distill={**shared, "batch_size": 2})
    assert run("distill", "--recipe", whole, "--work", tmp_path / "one").code == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = spawn("distill", "--recipe", half, "--work", tmp_path / "two", launcher=torchrun)
    assert two.code == 0, two.err
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = student().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-9)


def test_training_scales_lowers_the_divergence(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill={"train": "scales", "steps": 20})
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == 0
    lines = metrics(tmp_path / "job")
    assert lines[-1]["kl"] < 0.9 * lines[0]["kl"]


def test_rounding_without_training_has_no_learned_scales(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate={"scales": "learned"})
    refused = run("pack", llama, "--recipe", recipe, "--work", tmp_path / "job")
    assert refused.code == 2
    assert "needs a training" in refused.err


def test_codes_without_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="codes without scales"):
        modules.encode_trained(torch.zeros(2, 4, dtype=torch.int8), None, MatrixSpec(("int4",), 4))
