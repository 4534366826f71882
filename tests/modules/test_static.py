"""Activations with stored or trained scales, and int4 keys and values: the same numbers everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor import formats, kernels, models, modules, packed, runtime, transformers_plugin
from edgerazor import recipe as recipes
from edgerazor.allocate import Plan
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.formats import MatrixSpec
from edgerazor.job import JobContext
from edgerazor.kernels import reference
from edgerazor.modules import FakeQuantLinear, InputScales, SharedActivations
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, metrics, move_zero_points, sha256, write_recipe
from helpers.tiny_models import GROUP_SIZE, VOCABULARY, ModelMaker, family_config, mostly_slow
from helpers.trainings import interrupt_at

IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The step ---------------------------------------------------------------------------------------------------------


def test_codes_by_hand() -> None:
    x = torch.tensor([[0.0, 0.4, -0.6, 0.5, 1.5, 9.0, -9.0]])
    codes, scales = formats.quantize_static(x, 4, 0.5)
    assert codes.tolist() == [[0, 1, -1, 1, 3, 7, -7]]
    assert scales.tolist() == [[0.5]]
    assert torch.equal(formats.fake_quantize_static(x, 4, 0.5), codes * 0.5)
    assert torch.equal(formats.fake_quantize_static(x.bfloat16(), 4, 0.5), (codes * 0.5).bfloat16())
    assert formats.fake_quantize_static(torch.tensor([torch.nan]), 8, 1.0).isnan().all()
    for bits in (1, 9, 16):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            formats.fake_quantize_static(x, bits, 0.5)
    with pytest.raises(ValueError, match="not finite"):
        formats.quantize_static(torch.tensor([[torch.inf]]), 8, 1.0)
    smallest = formats.fake_quantize_static(x, 8, nn.Parameter(torch.tensor(-1.0)))  # a step never reaches zero
    assert torch.equal(smallest, formats.fake_quantize_static(x, 8, 2.0**-24))


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 101), (3, 127)])
def test_the_gradient_is_lsqs(bits: int, shape: tuple[int, ...]) -> None:
    """Against the paper's formulation by autograd (arXiv 1902.08153, appendix A), in float64."""
    x = weights(*shape).double().requires_grad_()
    scale = torch.tensor(1.2 / 2 ** (bits - 1), dtype=torch.float64, requires_grad=True)
    upstream, largest = weights(*shape, seed=1).double(), 2 ** (bits - 1) - 1
    factor = (shape[-1] * largest) ** -0.5
    s = scale * factor + (scale * (1 - factor)).detach()
    ratio = (x / s).clamp(-largest, largest)
    plain = (ratio + (ratio.round() - ratio).detach()) * s
    ours = formats.fake_quantize_static(x, bits, scale)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients, expected = (torch.autograd.grad(each, (x, scale), upstream) for each in (ours, plain))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    if x.numel() > 1:
        assert (gradients[0] == 0).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [0.0, 1.4, -3.6, 200.0])
def test_the_gradient_of_a_zero_point_is_edgeqats(bits: int, zero: float) -> None:
    """Against the quantizer of EdgeQAT's code (arXiv 2402.10787) by autograd, in float64, where its codes reach from
    -2^(b-1) to 2^(b-1)-1 and ours are symmetric: `x' = (round(clamp(x/s + z)) - z)*s`, z a rounded parameter."""
    largest = 2 ** (bits - 1) - 1
    x = (weights(3, 127) + 0.3).double().requires_grad_()
    scale = torch.tensor(2.0 / largest, dtype=torch.float64, requires_grad=True)
    point = torch.tensor(zero, dtype=torch.float64, requires_grad=True)
    upstream, factor = weights(3, 127, seed=1).double(), (127 * largest) ** -0.5
    s, z = (each * factor + (each * (1 - factor)).detach() for each in (scale, point))
    z = z + (z.round().clamp(-largest, largest) - z).detach()
    code = (x / s + z).clamp(-largest, largest)
    plain = (code + (code.round() - code).detach() - z) * s
    ours = formats.fake_quantize_static(x, bits, scale, point)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients, expected = (torch.autograd.grad(each, (x, scale, point), upstream) for each in (ours, plain))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert (gradients[0] == 0).any()
    assert gradients[2] != 0


def test_zero_points_by_hand() -> None:
    """Codes of 4 bits, -7 to 7, with zero point 2, stand for -9 to 5 steps, and 0 stays exact."""
    x = torch.tensor([[0.0, 0.4, -0.6, 9.0, -4.4, -9.0]])
    expected = torch.tensor([[0.0, 0.5, -0.5, 2.5, -4.5, -4.5]])
    for zero in (2.0, 1.6, torch.tensor(2.3)):
        assert torch.equal(formats.fake_quantize_static(x, 4, 0.5, zero), expected)
    assert torch.equal(formats.fake_quantize_static(x, 4, 0.5, 0.2), formats.fake_quantize_static(x, 4, 0.5))
    rounded = [float(formats.whole_zero_point(torch.tensor(each), 4)) for each in (2.5, -0.6, 9.0, -1e9)]
    assert rounded == [2, -1, 7, -7]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_the_calibrated_scale_has_nearly_the_least_error(bits: int, outlier: float) -> None:
    x = weights(64, 512)
    x[:, 7] *= outlier
    counts = formats.magnitude_counts(x[:20]) + formats.magnitude_counts(x[20:].bfloat16().float())
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == x.numel()

    def error(scale: float) -> float:
        return float((formats.fake_quantize_static(x, bits, scale) - x).double().square().mean())

    largest = float(x.abs().max()) / (2 ** (bits - 1) - 1)
    least = min(error(largest * share / 200) for share in range(2, 201))
    assert error(formats.calibrated_scale(counts, bits)) <= 1.03 * least


def test_silent_inputs_have_the_smallest_scale() -> None:
    counts = formats.magnitude_counts(torch.zeros(3, 4))
    assert formats.calibrated_scale(counts, 8) == 2.0**-24
    assert formats.calibrated_scale(formats.magnitude_counts(torch.full((9,), 1e30)), 8) < 2**24


# Products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3, 33, 127, 960])
@pytest.mark.parametrize("bits", [4, 8])
def test_all_kernels_take_a_stored_scale(columns: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, bias = weights(2, 3, columns), weights(9, columns, seed=1), weights(9, seed=2)
    names = tuple(formats.names())
    spec = MatrixSpec(names, 64, (torch.arange(9) % len(names)).to(torch.uint8))
    encoded, scale = formats.encode_matrix(w, spec), 0.11
    codes, _ = formats.quantize_static(x.flatten(0, 1), bits, scale)
    expected = (codes.double() * scale) @ formats.decode_matrix(encoded, spec).double().T + bias
    expected = expected.float().view(2, 3, 9)
    largest = float(expected.abs().max())
    outputs = {"definition": reference.linear(x, encoded, spec, bias, bits, 40, scale)}
    for name in kernels.names():
        monkeypatch.setenv("EDGERAZOR_ISA", name)
        outputs[name] = kernels.linear(x, encoded, spec, bias, bits, 40, scale)
    for name, y in outputs.items():
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * largest, msg=name)


def test_equal_scales_share_a_rounding_and_trained_ones_do_not() -> None:
    share, x = SharedActivations(8, 32), torch.randn(3, 64)
    assert share(x, InputScales(0.1)) is share(x, InputScales(0.1))
    assert torch.equal(share(x, InputScales(0.2)), formats.fake_quantize_static(x, 8, 0.2))
    assert torch.equal(share(x), formats.fake_quantize_activations(x, 8, 32))
    one, other = (nn.Parameter(torch.tensor(value)) for value in (0.1, 0.3))
    assert torch.equal(share(x, InputScales(one)), share(x, InputScales(0.1)))
    assert torch.equal(share(x, InputScales(other)), formats.fake_quantize_static(x, 8, 0.3))
    before = share(x, InputScales(other))
    assert share(x, InputScales(other)) is before
    with torch.no_grad():
        other.mul_(2)
    assert torch.equal(share(x, InputScales(other)), formats.fake_quantize_static(x, 8, 0.6000000238418579))


def test_a_linear_layer_trains_the_scale_of_its_input() -> None:
    linear, x, upstream = nn.Linear(101, 33), weights(7, 101), weights(7, 33, seed=1)
    scale = nn.Parameter(torch.tensor(0.2))
    spec = MatrixSpec(("int4",), GROUP_SIZE)
    module = FakeQuantLinear(
        linear.weight, linear.bias, spec, SharedActivations(4, GROUP_SIZE), None, InputScales(scale)
    )
    module(x).backward(upstream)
    again = torch.tensor(0.2, requires_grad=True)
    quantized = formats.fake_quantize_static(x, 4, again)
    quantized.backward(upstream @ module.decoded(torch.float32))
    torch.testing.assert_close(scale.grad, again.grad)
    torch.testing.assert_close(linear.weight.grad, upstream.T @ quantized.detach())
    states, _ = module.as_head(x)
    assert torch.equal(states, quantized)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_layer_takes_a_zero_point(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, bias = weights(2, 3, 127) + 0.4, weights(9, 127, seed=1), nn.Parameter(weights(9, seed=2))
    spec = MatrixSpec(("int4",), 64)
    encoded = formats.encode_matrix(w, spec)
    parts = formats.pack_matrix(encoded, spec)
    quantized = formats.fake_quantize_static(x, bits, 0.11, -5.0)
    expected = quantized.double() @ formats.decode_matrix(encoded, spec).double().T + bias
    for name in kernels.names():
        monkeypatch.setenv("EDGERAZOR_ISA", name)
        for enabled in (False, True):
            lazy = modules.LazyMatrix(lambda: (encoded, spec), lambda: kernels.StoredMatrix(parts, spec, (9, 127)))
            lazy.cache_decoded = enabled
            layer = modules.PackedLinear(lazy, bias, (9, 127), bits, 40, InputScales(0.11, zero_point=-5.0))
            torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-4, msg=name)


# From calibrate to the packed model -------------------------------------------------------------------------------


def student_of(teacher: Path, job: Path) -> PreTrainedModel:
    """The training modules over what distill saved."""
    work = WorkDir(job)
    plan = Plan.model_validate_json(work.plan_file.read_text())
    model, _ = models.load(teacher, dtype=torch.float32)
    structure = models.structure(model)
    statistics = load_file(work.statistics_file)
    scales = {name: float(value) for name, value in statistics.items() if name.endswith("input_scale")}
    settings = JobContext(recipes.build({}), work, Console(quiet=True)).student_settings(plan, structure)
    modules.prepare_for_training(model, structure, plan.specs(), settings, input_scales=scales or None)
    _, unexpected = model.load_state_dict(load_file(work.student("best") / "model.safetensors"), strict=False)
    assert unexpected == []
    return model.eval()


CASES: list[tuple[str, int, int, bool]] = [
    ("static", 8, 8, True),
    ("static", 4, 4, False),
    ("learned", 4, 8, True),
    ("learned", 8, 4, False),
    ("asymmetric", 8, 8, True),
    ("asymmetric", 4, 16, False),
    ("dynamic", 4, 4, True),
    ("dynamic", 6, 16, False),
]


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("case", mostly_slow(CASES, CASES[4]), ids=str)
def test_packed_equals_trained(
    run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path, case: tuple[str, int, int, bool]
) -> None:
    scales, bits, kv_bits, tied = case
    make_model(tmp_path / "model", "llama", tie_word_embeddings=tied)
    calibrate = {"activation_scales": scales, "activation_bits": bits, "kv_bits": kv_bits}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", text_file, calibrate=calibrate)
    job = tmp_path / "job"
    assert run("distill", "--recipe", recipe, "--work", job).code == 0
    if scales == "asymmetric":
        shutil.copytree(job, tmp_path / "uninterrupted")
        move_zero_points(job)
    assert run("pack", "--work", job).code == 0
    everything = packed.PackedModel.open(job / "packed").input_scales()
    stored = {name: value for name, value in everything.items() if name.endswith("scale")}
    model, _ = transformers_plugin.load(job / "packed")
    linears = {name for name, module in model.named_modules() if isinstance(module, modules.PackedLinear)}
    assert stored.keys() == (set() if scales == "dynamic" else {f"{name}.input_scale" for name in linears})
    zero_points = {f"{name}.input_zero_point" for name in linears} if scales == "asymmetric" else set()
    assert everything.keys() - stored.keys() == zero_points
    assert {everything[name] for name in zero_points} == ({2, -3, 0, 90 if bits == 8 else 7} if zero_points else set())
    assert packed.PackedModel.open(job / "packed").header.version == (2 if zero_points else 1)
    assert "lm_head" in linears
    calibrated = load_file(job / "calibrate" / "stats.safetensors")
    moved = [name for name, value in stored.items() if value != float(calibrated[name])]
    assert len(moved) == (len(stored) if scales in ("learned", "asymmetric") else 0)
    student = student_of(tmp_path / "model", job)
    with torch.no_grad():
        trained = student(input_ids=IDS, use_cache=False).logits
        ours = model(input_ids=IDS, use_cache=False).logits
        assert (trained - ours).abs().max() <= 1e-5 * trained.abs().max()
        half, _ = transformers_plugin.load(job / "packed", dtype=torch.bfloat16)
        for name in stored:
            assert (
                half.get_submodule(name.rpartition(".")[0]).input_scales.scale == stored[name]
            )  # no number is lost with the dtype
        check_cache(model)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        assert run("distill", "--recipe", recipe, "--work", tmp_path / "again").code == 130
    assert run("distill", "--work", tmp_path / "again").code == 0
    assert metrics(tmp_path / "again") == metrics(job)
    file = Path("distill", "last", "model.safetensors")
    job = tmp_path / "uninterrupted" if scales == "asymmetric" else job
    assert sha256(tmp_path / "again" / file) == sha256(job / file)


def check_cache(model: PreTrainedModel) -> None:
    """transformers' `generate`, with a cache, computes what a whole forward pass computes."""
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    done = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), output_logits=True, return_dict_in_generate=True, **options
    )
    whole = model(input_ids=done.sequences, use_cache=False).logits[:, 23:-1]
    stepwise = torch.stack(done.logits, dim=1)
    # Sums in another order may move an activation by one step, and never by more.
    assert (whole - stepwise).abs().max() <= 0.05 * whole.abs().max()
    assert ((whole - stepwise).abs() <= 1e-4 * whole.abs().max()).float().mean() > 0.9


@pytest.mark.parametrize("bits", [4, 8])
def test_keys_and_values_are_rounded_to_their_bits(bits: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config("llama")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        plain = model(input_ids=IDS).logits
        modules.quantize_attention(model, bits)
        rounded = model(input_ids=IDS).logits
    change = float((rounded - plain).norm() / plain.norm())
    assert 0.3 < change * (2 ** (bits - 1) - 1) < 3  # about half a step of each value, whatever the bits


def test_rounding_with_stored_scales_needs_a_calibration_for_them(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    job, calibrate = tmp_path / "job", {"activation_scales": "static", "activation_bits": 4}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate=calibrate)
    missing = run("pack", llama, "--recipe", recipe, "--work", job)
    assert missing.code == 1
    assert "edgerazor calibrate" in missing.err
    assert run("calibrate", "--recipe", recipe, "--work", job).code == 0
    assert run("pack", llama, "--recipe", recipe, "--work", job).code == 0
    assert len(packed.PackedModel.open(job / "packed").input_scales()) == 15
    other = run("pack", llama, "--recipe", recipe, "--work", job, "--activation-bits", 8)
    assert other.code == 1
    assert "are not for 8-bit activations" in other.err
    for how in ("learned", "asymmetric"):
        recipe = write_recipe(tmp_path / "l.yaml", llama, text_file, calibrate={**calibrate, "activation_scales": how})
        refused = run("pack", llama, "--recipe", recipe, "--work", tmp_path / "other")
        assert refused.code == 2
        assert f"activation_scales: {how}` needs a training" in refused.err


def test_sixteen_bits_have_no_stored_scales(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", llama, text_file, calibrate={"activation_scales": "static", "activation_bits": 16}
    )
    refused = run("calibrate", "--recipe", recipe, "--work", tmp_path / "job")
    assert refused.code == 2
    assert "16-bit activations have no static scales" in refused.err


def test_a_dry_run_needs_no_calibration(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate={"activation_scales": "learned"})
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--dry-run").code == 0


def test_an_impossible_stored_scale_is_refused(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate={"activation_scales": "static"})
    assert run("calibrate", "--recipe", recipe, "--work", tmp_path / "job").code == 0
    assert run("pack", llama, "--recipe", recipe, "--work", tmp_path / "job").code == 0
    source = packed.PackedModel.open(tmp_path / "job" / "packed")
    matrices = [source.matrix(name).source() for name in source.header.matrices]
    for bad in (torch.tensor(0.0), torch.tensor(torch.inf), torch.ones(1), torch.tensor(1.0, dtype=torch.float16)):
        folder = shutil.copytree(source.folder, tmp_path / "bad", dirs_exist_ok=True)
        others = {**source.others(), "lm_head.input_scale": bad}
        (folder / "model.safetensors").unlink()
        packed.write(folder, matrices, others, tied=source.header.tied, settings=source.header.settings, provenance={})
        with pytest.raises(UserError, match=r"lm_head\.input_scale: it is not a positive float32 number"):
            transformers_plugin.load(folder)
    for bad in (torch.tensor(0.5), torch.tensor(128.0), torch.tensor(torch.inf), torch.ones(1), torch.tensor(1)):
        folder = shutil.copytree(source.folder, tmp_path / "bad", dirs_exist_ok=True)
        others = {**source.others(), "lm_head.input_zero_point": bad}
        (folder / "model.safetensors").unlink()
        packed.write(folder, matrices, others, tied=source.header.tied, settings=source.header.settings, provenance={})
        with pytest.raises(UserError, match=r"lm_head\.input_zero_point: it is not a whole float32 number"):
            transformers_plugin.load(folder)
    if kernels.is_native():
        (folder / "model.safetensors").unlink()
        others["lm_head.input_zero_point"] = torch.tensor(3.0)
        packed.write(folder, matrices, others, tied=source.header.tied, settings=source.header.settings, provenance={})
        with pytest.raises(UserError, match="there is no native code for activations with zero points"):
            runtime.load(folder, engine="native")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "edgerazor"
