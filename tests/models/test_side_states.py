"""What flows between decoder layers beside hidden states: layers one at a time compute what the whole model does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgerazor import models
from edgerazor.models.blocks import Blocks
from edgerazor.models.side_states import SharedHeads, side_states
from helpers.tiny_models import VOCABULARY, family_config


@pytest.mark.parametrize("changes", [{}, {"num_kv_shared_layers": 0}], ids=str)
@torch.no_grad()
def test_layers_one_at_a_time_are_the_whole_model(changes: dict[str, int]) -> None:
    """Also for other token ids of the same shape, whose inputs of single layers are others."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config("gemma4", **changes)).eval()
    blocks = Blocks(model, models.structure(model))
    for seed in range(2):
        ids = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(seed))
        states = blocks.inputs(ids)
        for layer in range(blocks.structure.layer_count):
            states = blocks.forward_layer(layer, states)
        with models.final_states(model, blocks.structure.head_path) as expected:
            model(input_ids=ids, use_cache=False)
        assert torch.equal(blocks.final(states), expected[0])


def test_what_flows_beside_hidden_states() -> None:
    """Keys and values come into being where the last layer of a kind computes its own, and go with the last user."""
    side = side_states(family_config("gemma4"))
    assert side is not None
    full, sliding = SharedHeads("full_attention", 2, 32), SharedHeads("sliding_attention", 2, 16)
    assert side.shared == ((), (), (full,), (full, sliding), (full,), ())
    assert (side.hidden, side.inputs, full.features) == (96, 12, 128)
    for family in ("llama", "gemma3", "lfm2", "granite-hybrid"):
        assert side_states(family_config(family)) is None
