"""Packed folders inside transformers, and what importing edgerazor costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from edgerazor import formats, kernels, models, modules, packed, pipeline, runtime, transformers_plugin
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.kernels import native, reference
from edgerazor.modules import PackedEmbedding, PackedLinear
from edgerazor.recipe import build
from edgerazor.workdir import WorkDir
from helpers.tiny_models import GROUP_SIZE, VOCABULARY, ModelMaker, mostly_slow

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


def pack(model: Path, work: Path) -> Path:
    """Round a model to nearest, without training."""
    calibrate = {"bits": 4.0, "group_size": GROUP_SIZE}
    recipe = build({"model": str(model), "device": "cpu", "calibrate": calibrate, "pack": {"source": "teacher"}})
    pipeline.run("pack", recipe, WorkDir(work), Console(quiet=True))
    return WorkDir(work).folder("pack")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with a tied head; Gemma 3 has an embedding class of its own."""
    place = tmp_path_factory.mktemp(request.param)
    make_model(place / "model", request.param, tie_word_embeddings=True)
    return pack(place / "model", place / "work")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "packed")


def python(code: str, *arguments: str | Path) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


# --- importing ---------------------------------------------------------------------------------

LIGHT = """
import sys, edgerazor
print([name for name in ("torch", "transformers", "pydantic", "numpy") if name in sys.modules])
"""


def test_importing_edgerazor_is_light() -> None:
    assert python(LIGHT) == "[]"


HELP = """
import sys
from edgerazor import cli
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", [name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_help_imports_no_torch() -> None:
    command = [sys.executable, "-c", HELP, "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().splitlines()[-1] == "loaded: []"
    assert "distill" in ran.stdout


FIRST = {
    "edgerazor_first": "import edgerazor; from transformers import AutoModelForCausalLM",
    "transformers_first": "from transformers import AutoModelForCausalLM; import edgerazor",
    "table_first": (
        "import transformers.quantizers.auto; import edgerazor; from transformers import AutoModelForCausalLM"
    ),
    # Asking where a module is must not use up what waits for its import.
    "asked_before": (
        "import edgerazor, importlib.util; importlib.util.find_spec('transformers.quantizers.auto'); "
        "from transformers import AutoModelForCausalLM"
    ),
}
LOADING = """
import sys, torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(2, 22)[None]
print(repr(float(model(input_ids=ids).logits.double().sum())))
"""


@pytest.mark.parametrize("order", mostly_slow(FIRST, *list(FIRST)[:1]))
def test_both_import_orders_work(order: str, llama: Path, tmp_path: Path) -> None:
    folder = pack(llama, tmp_path)
    model, _ = transformers_plugin.load(folder)
    with torch.no_grad():
        expected = float(model(input_ids=torch.arange(2, 22)[None]).logits.double().sum())
    # Sums run in another order with other numbers of threads.
    assert float(python(FIRST[order] + LOADING, folder)) == pytest.approx(expected, rel=1e-3)


# --- loading -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_packed_model_computes_with_its_decoded_weights(folder: Path) -> None:
    """Against the teacher's own modules with decoded weights; activations and cache are the only difference."""
    model, tokenizer = transformers_plugin.load(folder)
    matrices = [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    assert len(matrices) == 2 * 7 + 2
    assert model.get_input_embeddings().lazy is model.get_output_embeddings().lazy
    teacher, _ = models.load(folder.parent.parent / "model")
    opened = packed.PackedModel.open(folder)
    for name in opened.header.matrices:
        matrix = opened.matrix(name)
        teacher.get_submodule(name).weight.copy_(formats.decode_matrix(matrix.encoded, matrix.spec))
    expected, ours = teacher(input_ids=IDS).logits, model(input_ids=IDS).logits
    error = (ours - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert 0 < error < 0.05
    assert tokenizer.decode(tokenizer("Nora took the ball.").input_ids) == "Nora took the ball."


@torch.no_grad()
def test_auto_model_is_the_same_as_load(folder: Path) -> None:
    direct = AutoModelForCausalLM.from_pretrained(folder)
    ours, _ = transformers_plugin.load(str(folder))
    cached, _ = transformers_plugin.load(folder, cache_decoded=True)
    assert torch.equal(direct(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    torch.testing.assert_close(cached(input_ids=IDS).logits, ours(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert not direct.training
    assert AutoConfig.from_pretrained(folder).quantization_config["quant_method"] == "edgerazor"
    assert len(AutoTokenizer.from_pretrained(folder)) == VOCABULARY


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder: Path, dtype: torch.dtype) -> None:
    full = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    moved = AutoModelForCausalLM.from_pretrained(folder).to(dtype)
    for model in (loaded, moved):
        half = model(input_ids=IDS).logits
        assert half.dtype == dtype
        assert (half.float() - full).abs().max() <= 0.1 * full.abs().max()
        assert model.get_input_embeddings()(IDS).dtype == dtype


@torch.no_grad()
def test_moving_a_model_moves_no_codes(folder: Path) -> None:
    model, _ = transformers_plugin.load(folder)
    before = model(input_ids=IDS).logits
    assert torch.equal(model.to("cpu").to(torch.float32)(input_ids=IDS).logits, before)
    head = model.get_output_embeddings()
    assert head.lazy.encoded(torch.device("cpu"))[0].codes.dtype == torch.int8
    assert head.weight.dtype == torch.float32
    model.tie_weights()  # others call it; there is nothing to tie
    assert torch.equal(model(input_ids=IDS).logits, before)


def native_or_skip() -> None:
    if not kernels.is_native():
        pytest.skip("no native kernels")


@torch.no_grad()
def test_every_layer_computes_the_bits_of_the_definition(folder: Path) -> None:
    """Fed what it gets in the model: `reference.linear` to the bit, and decoded weights up to rounding."""
    native_or_skip()
    model, _ = transformers_plugin.load(folder)
    captured: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(
                lambda _, inputs, y, name=name: captured.__setitem__(name, (inputs[0].clone(), y.clone()))
            )
    before = model(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, before)
    opened = packed.PackedModel.open(folder)
    assert len(captured) == 2 * 7 + 1
    for name, (x, y) in captured.items():
        matrix, module = opened.matrix(opened.header.tied.get(name, name)), model.get_submodule(name)
        assert module.lazy._matrix is None, "codes were decoded"
        arguments = (matrix.encoded, matrix.spec, module.bias, 8, GROUP_SIZE)
        assert torch.equal(y, reference.linear(x, *arguments)), name
        alone = torch.stack([module(x[:, i : i + 1]) for i in range(x.shape[1])], dim=1).squeeze(2)
        assert torch.equal(alone, y), name
        decoded = reference.decoded_linear(x, formats.decode_matrix(matrix.encoded, matrix.spec), *arguments[2:])
        assert (y - decoded).abs().max() <= 1e-5 * y.abs().max(), name


@torch.no_grad()
def test_all_kernels_agree_on_a_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native ones to the bit, from a compressed folder too; others up to an activation's step now and then."""
    small = shutil.copytree(folder, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    packed.rewrite(packed.PackedModel.open(folder), small, compress=True)
    outputs = {}
    for name in kernels.names():
        monkeypatch.setenv("EDGERAZOR_ISA", name)
        for place in (folder, small):
            model, _ = transformers_plugin.load(place)
            outputs[name, place] = model(input_ids=IDS).logits
            assert modules.kernels_of(model) == name
    expected = outputs["integer", folder]
    for (name, _), logits in outputs.items():
        if name in (*native.isas(), "integer"):
            assert torch.equal(logits, expected), name
        assert (logits - expected).norm() <= 0.02 * expected.norm(), name


def rounded(llama: Path, work: WorkDir, **calibrate: Any) -> Path:
    """The packed folder of a teacher that is rounded without training."""
    settings = {"group_size": GROUP_SIZE, **calibrate}
    recipe = build({"model": str(llama), "device": "cpu", "calibrate": settings, "pack": {"source": "teacher"}})
    pipeline.run("pack", recipe, work, Console(quiet=True))
    return work.folder("pack")


@torch.no_grad()
def test_all_kernels_agree_with_activations_as_they_are(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = rounded(llama, WorkDir(tmp_path), bits=4.0, activation_bits=16, kv_bits=16)
    monkeypatch.setenv("EDGERAZOR_ISA", "reference")
    expected = transformers_plugin.load(folder)[0](input_ids=IDS).logits
    for name in kernels.names():
        monkeypatch.setenv("EDGERAZOR_ISA", name)
        model, _ = transformers_plugin.load(folder)
        assert (model(input_ids=IDS).logits - expected).norm() <= 1e-5 * expected.norm(), name
        assert modules.kernels_of(model) == name


@torch.no_grad()
def test_what_native_kernels_cannot_take_is_computed_by_the_reference(llama: Path, tmp_path: Path) -> None:
    native_or_skip()
    blocks = {"granularity": "block", "formats": ["int2", "int4"], "plan": "interleave"}
    model, _ = transformers_plugin.load(rounded(llama, WorkDir(tmp_path), bits=3.0, **blocks))
    assert model(input_ids=IDS).logits.isfinite().all()
    assert "reference" in modules.kernels_of(model)


def test_saving_from_memory_is_refused(folder: Path, tmp_path: Path) -> None:
    model, _ = transformers_plugin.load(folder)
    with pytest.raises(UserError, match="not saved from memory") as caught:
        model.save_pretrained(tmp_path / "saved")
    assert "Copy its folder" in caught.value.hint
    assert not list(tmp_path.glob("saved/*.safetensors"))


def test_a_packed_model_is_not_packed_again(folder: Path) -> None:
    with pytest.raises(UserError, match=r"already quantized \(edgerazor\)") as caught:
        models.load(folder)
    assert "edgerazor eval" in caught.value.hint


def test_a_teacher_is_no_packed_model(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a packed model"):
        transformers_plugin.load(llama)
    named = shutil.copytree(llama, tmp_path / "named")
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps({**config, "note": "edgerazor"}))
    assert not transformers_plugin.is_packed(named)
    assert not transformers_plugin.is_packed(tmp_path / "nowhere")


# --- damage ------------------------------------------------------------------------------------


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(("name", "value"), [("activation_bits", 16), ("kv_bits", 16), ("group_size", 64)])
def test_config_and_weights_must_agree(copy: Path, name: str, value: int) -> None:
    settings = json.loads((copy / "config.json").read_text())["quantization_config"]
    change_config(copy, quantization_config={**settings, name: value})
    for load in (transformers_plugin.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match=f"config.json says {name} {value}, but the weights were made for"):
            load(copy)


@pytest.mark.parametrize("missing", ["activation_bits", "version"])
def test_an_incomplete_config_is_one_sentence(copy: Path, missing: str) -> None:
    settings = json.loads((copy / "config.json").read_text())["quantization_config"]
    change_config(copy, quantization_config={key: value for key, value in settings.items() if key != missing})
    for load in (transformers_plugin.load, runtime.load):
        with pytest.raises(UserError, match=missing) as caught:
            load(copy)
        assert "\n" not in caught.value.message


def test_another_architecture_is_one_sentence(copy: Path) -> None:
    change_config(copy, intermediate_size=64)
    with pytest.raises(UserError, match="has no place in"):
        transformers_plugin.load(copy)
    change_config(copy, intermediate_size=101, num_hidden_layers=3, layer_types=None)
    with pytest.raises(UserError, match="lacks the tensor"):
        transformers_plugin.load(copy)


def test_damaged_norms_are_found_at_loading(copy: Path) -> None:
    """transformers loads these tensors itself and would not look at their checksums."""
    path = copy / "model.safetensors"
    weights = bytearray(path.read_bytes())
    norm = load_file(path)["model.norm.weight"].numpy().tobytes()
    place = weights.index(norm)
    weights[place] ^= 1
    path.write_bytes(weights)
    for load in (transformers_plugin.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match=r"model\.norm\.weight"):
            load(copy)


def test_damaged_codes_are_found_at_first_use(copy: Path) -> None:
    path = copy / "model.safetensors"
    weights = bytearray(path.read_bytes())
    codes = load_file(path)["model.layers.1.mlp.down_proj.weight.int4"].numpy().tobytes()
    weights[weights.index(codes)] ^= 1
    path.write_bytes(weights)
    model, _ = transformers_plugin.load(copy)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj"):
        model(input_ids=IDS)


def test_scales_that_are_none_are_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a file whose checksums were made to match."""
    read = packed.PackedModel.parts

    def parts(model: packed.PackedModel, name: str) -> dict[str, torch.Tensor]:
        return {part: -tensor if part.endswith(".scales") else tensor for part, tensor in read(model, name).items()}

    monkeypatch.setattr(packed.PackedModel, "parts", parts)
    for kernel in kernels.names():
        monkeypatch.setenv("EDGERAZOR_ISA", kernel)
        model, _ = transformers_plugin.load(folder)
        with pytest.raises(UserError, match=r"embed_tokens: a scale is negative or not finite"):
            model(input_ids=IDS)


def test_foreign_weights_are_refused(copy: Path) -> None:
    save_file({"model.norm.weight": torch.ones(96)}, copy / "model.safetensors", metadata={"format": "pt"})
    for load in (transformers_plugin.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError):
            load(copy)
