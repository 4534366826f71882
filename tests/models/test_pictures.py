"""Pictures as tokens of their own: a model that is given them computes what it computes of pixels, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgerazor import data, models
from edgerazor.errors import UserError
from edgerazor.models import Blocks, LayerwisePass, PictureFeatures, PictureTable
from helpers.seeing_models import IMAGE, SEEING, picture_inputs, seeing_model
from helpers.tiny_models import family_config


def picture_tokens(model, inputs: dict[str, Tensor]) -> Tensor:
    """The ids of inputs with pixels, the pictures in them as tokens of their own."""
    features = models.features_of(model, inputs)
    counts = [end - begin for begin, end in data.runs((inputs["input_ids"][0] == IMAGE).numpy())]
    parts = models.split_pictures(features, counts, inputs.get("image_grid_thw"))
    ids = inputs["input_ids"].clone()
    tokens = np.concatenate([models.PICTURES.add(part) for part in parts])
    ids[ids == IMAGE] = torch.from_numpy(tokens).long()
    return ids


@pytest.mark.parametrize("family", SEEING)
def test_tokens_are_pixels_to_the_bit(family):
    model, inputs = seeing_model(family), picture_inputs(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        ids = picture_tokens(model, inputs)
        models.let_see(model)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        text = torch.arange(3, 13)[None]
        assert torch.equal(model(input_ids=text).logits, seeing_model(family)(input_ids=text).logits)


@pytest.mark.parametrize("family", SEEING)
def test_layers_one_by_one_see_what_the_model_sees(family, tmp_path):
    """Positions, masks and what is added behind a layer are captured, also where another picture has its shape."""
    model, inputs = seeing_model(family), picture_inputs(family)
    ids = picture_tokens(model, inputs)
    longer = torch.cat([ids[:, :2], torch.full((1, 1), 9), ids[:, 2:-1]], dim=1)  # the picture one place later
    models.let_see(model)
    batches = [ids, longer, torch.arange(3, 13)[None]]
    with torch.no_grad():
        expected = [model(input_ids=batch, use_cache=False).logits for batch in batches]
    structure = models.structure(model)
    blocks = Blocks(model, structure)
    inputs_of = [blocks.inputs(batch) for batch in batches]
    head = model.get_output_embeddings()
    for batch, states, logits in zip(batches, inputs_of, expected, strict=True):
        for index in range(structure.layer_count):
            states = blocks.forward_layer(index, states, batch)
        assert torch.allclose(head(blocks.final(states)), logits, atol=1e-6)
    whole = LayerwisePass(model, structure, [(batch, batch >= 0) for batch in batches], tmp_path / "pass")
    whole.forward()
    for states, logits in zip(whole.outputs(), expected, strict=True):
        assert torch.allclose(head(whole.final(states)), logits, atol=1e-5)


def test_a_picture_has_the_same_tokens_again():
    table = PictureTable()
    first, second = PictureFeatures(torch.randn(3, 8)), PictureFeatures(torch.randn(2, 8))
    ids = table.add(first)
    other = table.add(second)
    assert ids.tolist() == [models.FIRST, models.FIRST + 1, models.FIRST + 2]
    assert other.tolist() == [models.FIRST + 3, models.FIRST + 4]
    assert table.add(PictureFeatures(first.rows.clone())).tolist() == ids.tolist()
    mixed = torch.tensor([*ids[1:], *other, *ids])
    assert torch.equal(table.gather(mixed).rows, torch.cat([first.rows[1:], second.rows, first.rows]))
    with pytest.raises(UserError, match="no picture token"):
        table.gather(torch.tensor([models.FIRST + 5]))


def test_grids_are_one_for_each_picture():
    """Two equal pictures side by side are two, and one that another tower sees is the same picture."""
    table = PictureTable()
    ids = table.add(PictureFeatures(torch.randn(2, 8), torch.randn(1, 2, 8), (1, 2, 4)))
    twice = table.gather(torch.tensor([*ids, *ids]))
    assert twice.grids.tolist() == [[1, 2, 4], [1, 2, 4]]
    assert twice.deep.shape == (1, 4, 8)
    assert not table.gather(torch.tensor(ids.tolist()), models.BLIND).rows.any()
    view = PictureFeatures(torch.ones(2, 8), torch.ones(1, 2, 8), (1, 2, 4))
    table.add_view("int8", ids, view)
    assert torch.equal(table.gather(torch.tensor(ids.tolist()), "int8").rows, view.rows)


def test_a_model_of_text_is_left_as_it_is():
    model = AutoModelForCausalLM.from_config(family_config("llama"))
    models.let_see(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[models.FIRST]]))
