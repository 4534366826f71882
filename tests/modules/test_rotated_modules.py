"""Rotated students: master weights, inputs and embedding rows in the right basis, trained as they are packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor import formats, kernels, models, modules, packed, runtime, transformers_plugin
from edgerazor.allocate import make_plan
from edgerazor.formats import MatrixSpec
from edgerazor.modules import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    LazyMatrix,
    PackedEmbedding,
    PackedLinear,
    Settings,
    SharedActivations,
)
from edgerazor.recipe import Calibrate
from helpers.tiny_job import Run, write_recipe
from helpers.tiny_models import GROUP_SIZE, VOCABULARY, family_config, mostly_slow

IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


def spec_for(rows: int, columns: int, **fields: Any) -> MatrixSpec:
    settings = Calibrate(bits=1.88, plan="interleave", group_size=GROUP_SIZE, rotation="hadamard")
    target = models.QuantTarget("m", "linear", 0, rows, columns)
    return make_plan([target], settings)["m"].spec()


def prepared(precise: bool, family: str = "llama", **overrides: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher and its rotated student; `precise`: int8 weights, and nothing else is rounded."""
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(family_config(family, **overrides)).eval()
    student = AutoModelForCausalLM.from_config(family_config(family, **overrides)).eval()
    student.load_state_dict(teacher.state_dict())
    structure = models.structure(student)
    settings = Calibrate(bits=1.88, plan="interleave", group_size=GROUP_SIZE, rotation="hadamard")
    plan = make_plan(structure.targets, settings)
    assert plan.rotation == "hadamard"
    specs, how = plan.specs(), Settings(8, 8, GROUP_SIZE)
    if precise:
        specs = {name: MatrixSpec(("int8",), GROUP_SIZE, rotation=spec.rotation) for name, spec in specs.items()}
        how = Settings(16, 16, GROUP_SIZE)
    modules.prepare_for_training(student, structure, specs, how)
    return teacher, student


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("columns", [12, 96, 101])
def test_training_modules_equal_packed_ones(activation_bits: int, columns: int) -> None:
    torch.manual_seed(0)
    linear, x, ids = nn.Linear(columns, 33), torch.randn(2, 5, columns), IDS % 33
    spec = spec_for(33, columns)
    assert (spec.rotation is None) == (columns == 101)
    weight = nn.Parameter(spec.rotate(linear.weight.detach()))
    encoded = formats.encode_matrix(weight.detach(), spec)
    lazy = LazyMatrix(lambda: (encoded, spec))
    trained = FakeQuantLinear(weight, linear.bias, spec, SharedActivations(activation_bits, GROUP_SIZE))
    shape = (33, columns)
    ours = PackedLinear(lazy, linear.bias, shape, activation_bits, GROUP_SIZE, rotation=spec.rotation)
    torch.testing.assert_close(ours(x), trained(x), rtol=1e-5, atol=1e-6)
    assert ours(x.bfloat16()).dtype == torch.bfloat16
    turned_back = formats.rounded_weight(linear.weight.detach(), spec)
    assert torch.equal(ours.weight, turned_back)
    if activation_bits == 16:
        torch.testing.assert_close(ours(x), nn.functional.linear(x, turned_back, linear.bias), rtol=1e-4, atol=1e-5)
    table = FakeQuantEmbedding(weight, spec, 2.0)
    packed_table = PackedEmbedding(lazy, 2.0, shape, torch.float32, spec.rotation)
    assert torch.equal(table(ids), packed_table(ids))
    assert torch.equal(table(ids), 2 * turned_back[ids])


@pytest.mark.parametrize("family", ["llama", "smollm2", "phi", "gemma2"])
def test_a_rotated_student_computes_what_the_teacher_does(family: str) -> None:
    """With int8 weights and nothing else rounded: biases, factors of embeddings and tied heads are in their places."""
    teacher, student = prepared(True, family)
    with torch.no_grad():
        expected, logits = (model(input_ids=IDS, use_cache=False).logits for model in (teacher, student))
    assert float((logits - expected).norm() / expected.norm()) < 0.02


def test_layers_that_share_an_input_share_its_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    _, student = prepared(False)
    rotated: list[tuple[int, ...]] = []
    original = formats.Rotation.rotate

    def counting(self: formats.Rotation, x: Tensor) -> Tensor:
        rotated.append(tuple(x.shape))
        return original(self, x)

    monkeypatch.setattr(formats.Rotation, "rotate", counting)
    student(input_ids=IDS, use_cache=False)
    # q, k and v share one; o; gate and up share one; the head's. Down has 101 columns and is not rotated.
    assert rotated == [(2, 20, 96)] * (2 * 3 + 1)


def test_the_gradient_is_that_of_the_rotated_weight() -> None:
    _, student = prepared(False, tie_word_embeddings=True)
    student(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    table, head = student.get_input_embeddings(), student.get_output_embeddings()
    assert table.weight is head.weight
    assert all(parameter.grad is not None for parameter in student.parameters())
    linear, x = student.get_submodule("model.layers.0.self_attn.q_proj"), torch.randn(7, 96, requires_grad=True)
    assert isinstance(linear, FakeQuantLinear)
    upstream, linear.weight.grad = torch.randn(7, 96), None
    linear(x).backward(upstream)
    torch.testing.assert_close(linear.weight.grad, upstream.T @ linear.quantized_input(x.detach()))
    expected = linear.spec.rotate_back(upstream @ linear.decoded(torch.float32))
    torch.testing.assert_close(x.grad, expected)


JOBS: dict[str, dict[str, Any]] = {
    "computed": {},
    "learned": {"calibrate": {"scales": "learned", "activation_scales": "learned", "adaptive_tokens": "causal"}},
    "phases": {
        "calibrate": {"scales": "learned", "activation_scales": "asymmetric", "group_size": "row"},
        "distill": {"train": "scales"},
    },
    "gptq": {"calibrate": {"init": "gptq", "activation_scales": "static"}},
    "clip": {"calibrate": {"init": "clip"}, "distill": {"reconstruct": {"sequences": 2, "steps": 1}}},
}


@pytest.mark.parametrize("case", mostly_slow(JOBS, "computed", "learned"))
@pytest.mark.usefixtures("reference_kernels")
def test_what_is_trained_is_what_is_packed(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pack` compares digests; here the logits, too: those of the packed folder and of the student's modules."""
    sections = {"calibrate": {}, "distill": {}, **JOBS[case]}
    sections["calibrate"] = {"rotation": "hadamard", **sections["calibrate"]}
    recipe, job = write_recipe(tmp_path / "r.yaml", llama, text_file, **sections), tmp_path / "job"
    students: list[PreTrainedModel] = []
    prepare = modules.prepare_for_training
    monkeypatch.setattr(
        modules,
        "prepare_for_training",
        lambda model, *args, **names: (
            students.append(model),
            prepare(model, *args, **names),
        ),
    )
    assert run("distill", "--recipe", recipe, "--work", job).code == 0
    predicted = run("pack", "--work", job, "--student", "last", "--dry-run", "--json").json()["bytes"]
    done = run("pack", "--work", job, "--student", "last", "--json")
    assert done.code == 0, done.err
    assert done.json()["bytes"] == predicted
    opened = packed.PackedModel.open(job / "packed")
    assert (opened.header.version, opened.header.rotations) == (3, {"96": 32})
    model, _ = transformers_plugin.load(job / "packed")
    with torch.no_grad(), modules.encoded_once(students[-1].eval()):
        expected = students[-1](input_ids=IDS, use_cache=False).logits
        logits = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    if case == "computed":
        monkeypatch.delenv("EDGERAZOR_ISA")
        if kernels.is_native():
            native_logits = runtime.load(job / "packed", engine="native").logits(IDS)
            assert float((native_logits - logits).norm() / logits.norm()) < 1e-2
        assert run("generate", "Nora took", "--model", job / "packed", "--max-tokens", 2).code == 0


@pytest.mark.slow
def test_what_was_calibrated_for_another_rotation_is_not_packed(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    """Neither a plan by sensitivity nor scales of inputs, nor what was measured."""
    rotated, job = {"plan": "sensitivity", "sensitivity": "hessian", "rotation": "hadamard"}, tmp_path / "job"
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate=rotated)
    assert run("calibrate", "--recipe", recipe, "--work", job).code == 0
    measured = load_file(job / "calibrate" / "stats.safetensors")
    assert run("pack", llama, "--recipe", recipe, "--work", job, "--rotation", "none").code == 0
    assert packed.PackedModel.open(job / "packed").header.rotations == {}
    assert run("pack", llama, "--recipe", recipe, "--work", job).code == 0
    assert packed.PackedModel.open(job / "packed").header.rotations == {"96": 32}
    static = write_recipe(tmp_path / "s.yaml", llama, text_file, calibrate={**rotated, "activation_scales": "static"})
    other = tmp_path / "other"
    assert run("calibrate", "--recipe", static, "--work", other).code == 0
    refused = run("pack", llama, "--recipe", static, "--work", other, "--rotation", "none")
    assert refused.code == 1
    assert "are not for inputs with the rotation none" in refused.err
    assert run("calibrate", "--recipe", recipe, "--work", job, "--rotation", "none").code == 0
    again = load_file(job / "calibrate" / "stats.safetensors")
    name = "input_second_moment/model.layers.0.self_attn.q_proj"
    assert not torch.equal(measured[name], again[name])
