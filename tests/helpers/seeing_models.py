"""Tiny models that see, with random weights: a configuration for each family, and inputs with a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.tiny_models import VOCABULARY

IMAGE = 2  # token id of a picture's placeholder

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}

#: family -> fields of its configuration
SEEING: dict[str, dict[str, Any]] = {
    "idefics3": {
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "vision_config": SIGLIP,
        "text_config": {**TEXT, "model_type": "llama"},
    },
    "smolvlm": {
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "vision_config": SIGLIP,
        "text_config": {**TEXT, "model_type": "llama"},
    },
    "qwen2_5_vl": {
        "image_token_id": IMAGE,
        "vision_start_token_id": 3,
        "vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": 16},
        "text_config": {**TEXT, "rope_parameters": MROPE},
    },
    "qwen3_vl": {
        "image_token_id": IMAGE,
        "vision_start_token_id": 3,
        "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "text_config": {**TEXT, "rope_parameters": MROPE},
    },
    "gemma3": {
        "image_token_id": IMAGE,
        "mm_tokens_per_image": 4,
        "vision_config": SIGLIP,
        "text_config": {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    },
    "lfm2_vl": {
        "image_token_id": IMAGE,
        "downsample_factor": 2,
        "vision_config": {**SIGLIP, "num_patches": 16},
        "text_config": {**TEXT, "layer_types": ["conv", "full_attention"]},
    },
}


def seeing_model(family: str, tied: bool = True) -> PreTrainedModel:
    """A tiny model of a family with random weights of a fixed seed."""
    fields = SEEING[family]
    text = {**fields["text_config"], "tie_word_embeddings": tied}
    config = CONFIG_MAPPING[family](**{**fields, "text_config": text, "tie_word_embeddings": tied})
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def picture_inputs(family: str) -> dict[str, Tensor]:
    """Inputs of a sequence with one picture: four placeholders, and pixels as the family's processor gives them."""
    torch.manual_seed(1)
    ids = torch.tensor([[0, 3, *[IMAGE] * 4, 10, 11, 12, 13]])
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.startswith("qwen"):
        inputs |= {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    elif family == "gemma3":
        inputs |= {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == IMAGE).long()}
    elif family == "lfm2_vl":
        inputs |= {"pixel_values": torch.randn(1, 16, 3 * 4 * 4), "spatial_shapes": torch.tensor([[4, 4]])}
        inputs["pixel_attention_mask"] = torch.ones(1, 16, dtype=torch.long)
    else:
        inputs["pixel_values"] = torch.randn(1, 1, 3, 16, 16)
    return inputs
