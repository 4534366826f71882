"""Mixtures of experts in GGUF: the experts of a layer are one tensor, written and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from edgerazor import exporters, formats, models
from edgerazor.errors import UserError
from edgerazor.exporters.core.gguf_metadata import gguf_architecture
from edgerazor.exporters.core.gguf_names import gguf_name
from edgerazor.packed import PackedModel
from helpers.tiny_experts import CHOSEN, EXPERTS, MIXTURES, write_mixture
from helpers.tiny_job import call
from helpers.tiny_models import mostly_slow

pytestmark = pytest.mark.job

#: Rows that GGML's blocks divide.
SHAPE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
WIDTHS = {
    "olmoe": {"intermediate_size": 32},
    "qwen3_moe": {"moe_intermediate_size": 32, "intermediate_size": 96},
    "granitemoe": {"intermediate_size": 32, "attention_multiplier": 0.3},
    "granitemoehybrid": {
        **{"intermediate_size": 32, "shared_intermediate_size": 96, "mamba_n_heads": 8, "mamba_d_head": 16},
        "attention_multiplier": 0.3,
    },
    "lfm2_moe": {"intermediate_size": 96, "moe_intermediate_size": 32, "num_dense_layers": 0},
}
#: Those that are read as teachers.
READ = ("olmoe", "qwen3_moe")
#: Where the experts of a layer are; elsewhere in `mlp`.
BLOCKS = {
    **{"granitemoe": "block_sparse_moe", "granitehybrid": "block_sparse_moe"},
    "lfm2moe": "feed_forward",
}
PARTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


@pytest.fixture(scope="module", params=mostly_slow(WIDTHS, "qwen3_moe"))
def packed(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A packed mixture: rows of ternary and int4."""
    folder = tmp_path_factory.mktemp(request.param)
    write_mixture(tokenizer, folder / "model", request.param, **{**SHAPE, **WIDTHS[request.param]})
    words = ("--plan", "interleave", "--group-size", 32, "--bits", 2.79, "--work", folder / "job")
    done = call("pack", folder / "model", *words)
    assert done.code == 0, done.err
    return folder / "job" / "packed"


def test_experts_are_stacked_and_exact(packed: Path, tmp_path: Path) -> None:
    model, export = PackedModel.open(packed), exporters.find("gguf")
    plan = export.plan(model)
    result = export.write(model, tmp_path, plan)
    assert Path(result.file).stat().st_size == plan.bytes
    reader = gguf.GGUFReader(result.file)
    config = models.complete_config(packed)
    architecture = gguf_architecture(config)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for layer in range(2):
        for part, name in PARTS.items():
            block = BLOCKS.get(architecture.name, "mlp")
            stack = by_name[f"blk.{layer}.{name}.weight"]
            values = gguf.quants.dequantize(stack.data, stack.tensor_type)
            assert values.shape[0] == EXPERTS
            for number in range(EXPERTS):
                matrix = model.matrix(f"model.layers.{layer}.{block}.experts.{number}.{part}")
                assert (values[number] == formats.decode_matrix(matrix.encoded, matrix.spec).numpy()).all()
    routers = [name for name in model.others() if gguf_name(architecture, name).endswith("ffn_gate_inp.weight")]
    assert len(routers) == 2
    for name in routers:
        tensor = by_name[gguf_name(architecture, name)]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert torch.equal(torch.from_numpy(tensor.data.copy()), model.others()[name].float())
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    assert metadata[f"{architecture.name}.expert_count"] == EXPERTS
    assert metadata[f"{architecture.name}.expert_used_count"] == CHOSEN
    if architecture.name.startswith("granite"):
        assert metadata[f"{architecture.name}.attention.scale"] == pytest.approx(0.3)
        assert metadata[f"{architecture.name}.logit_scale"] == pytest.approx(2.0)
    halves = 0
    if architecture.name == "granitehybrid":  # the MLP beside the experts: gate above up
        halves = 2
        for layer in range(halves):
            matrix = model.matrix(f"model.layers.{layer}.shared_mlp.input_linear")
            both = [by_name[f"blk.{layer}.ffn_{part}_shexp.weight"] for part in ("gate", "up")]
            values = np.concatenate([gguf.quants.dequantize(half.data, half.tensor_type) for half in both])
            assert (values == formats.decode_matrix(matrix.encoded, matrix.spec).numpy()).all()
        assert metadata["granitehybrid.expert_shared_feed_forward_length"] == 96
    if architecture.name == "lfm2moe":
        bias = model.others()["model.layers.1.feed_forward.expert_bias"]
        assert (by_name["blk.1.exp_probs_b.bias"].data == bias.numpy()).all()
        assert metadata["lfm2moe.expert_gating_func"] == 2
    expected = set(model.header.matrices) | set(model.others())
    assert len(by_name) == len(expected) - 2 * 3 * (EXPERTS - 1) + halves


def test_a_file_of_ours_is_a_teacher(packed: Path, tmp_path: Path) -> None:
    model = PackedModel.open(packed)
    export = exporters.find("gguf-f32")
    result = export.write(model, tmp_path, export.plan(model))
    if models.complete_config(packed)["model_type"] not in READ:
        with pytest.raises(UserError, match="is of the architecture "):
            models.load(result.file)
        return
    teacher, _ = models.load(result.file)
    weights = teacher.state_dict()
    for name in model.header.matrices:
        matrix = model.matrix(name)
        assert torch.equal(weights[f"{name}.weight"], formats.decode_matrix(matrix.encoded, matrix.spec)), name


@pytest.mark.parametrize(
    ("model_type", "setting", "words"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("olmoe", {"num_key_value_heads": 2}, "as many heads of keys as of queries"),
        ("lfm2_moe", {"use_expert_bias": False}, "without a bias"),
        ("lfm2_moe", {"routed_scaling_factor": 2.0}, "gives them no factor"),
        ("granitemoehybrid", {"layer_types": ["full_attention"] * 32}, "has no positions"),
        ("granitemoehybrid", {"mamba_n_groups": 2}, "in groups"),
        ("granitemoehybrid", {"mamba_conv_bias": False}, "or none of convolutions"),
        ("granitemoehybrid", {"time_step_limit": [0.1, 2.0]}, "time steps have bounds"),
        ("granitemoehybrid", {"mamba_expand": 3, "mamba_n_heads": 96, "mamba_d_head": 128}, "not twice as wide"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "have no experts"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(model_type: str, setting: dict[str, Any], words: str) -> None:
    config = models.completed({"model_type": model_type, **setting})
    with pytest.raises(UserError, match=words):
        gguf_architecture(config)


@pytest.mark.parametrize("model_type", mostly_slow(MIXTURES, "lfm2_moe"))
def test_hugging_face_folders_have_the_names_of_checkpoints(
    model_type: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_mixture(tokenizer, tmp_path / "model", model_type)
    words = ("--bits", 4, "--plan", "interleave", "--group-size", 16, "--work", tmp_path / "job")
    done = call("pack", tmp_path / "model", *words, "--export", "hf-f32")
    assert done.code == 0, done.err
    exported = tmp_path / "job" / "exports" / "hf-f32"
    ours, theirs = (weight_names(folder) for folder in (exported, tmp_path / "model"))
    if model_type not in ("granitemoe", "granitemoehybrid"):  # whose names only transformers' conversion writes
        assert ours == theirs
    model, loaded = PackedModel.open(tmp_path / "job" / "packed"), models.load(exported)[0].state_dict()
    for name in model.header.matrices:
        matrix = model.matrix(name)
        assert torch.equal(loaded[f"{name}.weight"], formats.decode_matrix(matrix.encoded, matrix.spec)), name


def weight_names(folder: Path) -> set[str]:
    """Names of all stored tensors of a folder."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}
