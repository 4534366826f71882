"""Models that see: their decoder is found, their towers stay as they are, and packing leaves pictures a meaning."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgerazor import formats, models, transformers_plugin
from helpers.packed_folders import SETTINGS, all_of, write_packed
from helpers.seeing_models import SEEING, picture_inputs, seeing_model
from helpers.tiny_models import family_config, mostly_slow, tiny_tokenizer

#: Neither activations nor keys and values are rounded.
UNROUNDED = {**SETTINGS, "activation_bits": 16, "kv_bits": 16}
TOWERS = {
    "idefics3": ("model.vision_model", "model.connector"),
    "smolvlm": ("model.vision_model", "model.connector"),
    "qwen2_5_vl": ("model.visual",),
    "qwen3_vl": ("model.visual",),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "lfm2_vl": ("model.vision_tower", "model.multi_modal_projector"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SEEING)
def test_the_decoder_is_found_and_the_towers_are_beside_it(family, tied):
    model = seeing_model(family, tied)
    structure = models.structure(model)
    assert structure.towers == TOWERS[family]
    assert structure.layer_count == 2
    assert (structure.head is None) == tied
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    assert all(id(model.get_submodule(target.name)) in inside for target in structure.linears)
    assert model.get_submodule(structure.embedding.name) is model.get_input_embeddings()
    # Every matrix is either quantized, or of a tower, or the taps of a convolution.
    names = {f"{target.name}.weight" for target in structure.targets} | {f"{structure.head_path}.weight"}
    rest = [name for name, p in model.named_parameters() if p.ndim > 1 and name not in names]
    assert all(name.startswith(structure.towers) or name.endswith("conv.conv.weight") for name in rest)


def test_a_model_of_text_has_no_towers():
    model = AutoModelForCausalLM.from_config(family_config("llama"))
    assert models.structure(model).towers == ()
    assert models.auto_class(model.config) is AutoModelForCausalLM


@pytest.mark.parametrize("family", mostly_slow(SEEING, "idefics3", "qwen3_vl"))
def test_a_packed_model_sees_with_its_tower_as_it_was(tmp_path, family):
    """Logits of a picture are those of the decoded weights; towers are the same bits; processor files travel."""
    teacher = tmp_path / "teacher"
    seeing_model(family).save_pretrained(teacher)
    tiny_tokenizer().save_pretrained(teacher)
    (teacher / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))
    model, _ = models.load(teacher, dtype=torch.float32)
    structure = models.structure(model)
    opened = write_packed(tmp_path / "packed", teacher, all_of("int4"), input_scale=False, settings=UNROUNDED)
    packed, _ = transformers_plugin.load(tmp_path / "packed")
    state = packed.state_dict()
    towers = {name: value for name, value in model.state_dict().items() if name.startswith(structure.towers)}
    assert towers
    assert all(torch.equal(state[name], value) for name, value in towers.items())
    assert (tmp_path / "packed" / "preprocessor_config.json").exists()
    with torch.no_grad():
        for name in opened.header.matrices:
            matrix = opened.matrix(name)
            model.get_submodule(name).weight.copy_(formats.decode_matrix(matrix.encoded, matrix.spec))
        inputs = picture_inputs(family)
        expected, computed = model(**inputs).logits, packed(**inputs).logits
        assert torch.allclose(expected, computed, atol=1e-4)
        blind = packed(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert not torch.allclose(computed, blind, atol=1e-3)
