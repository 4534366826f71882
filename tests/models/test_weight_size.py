"""How large a model's weights are, which bounds the learning rate."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from edgerazor import models
from edgerazor.untrusted.weight_places import all_places
from edgerazor.untrusted.weights import WEIGHTS


def test_the_size_of_weights_is_that_of_the_largest_matrix(tmp_path: Path) -> None:
    big, small = torch.full((9000, 8), 0.5, dtype=torch.bfloat16), torch.full((4, 8), 100.0)
    save_file({"norm.weight": torch.ones(10**5), "big.weight": big, "small.weight": small}, tmp_path / WEIGHTS)
    assert models.weight_size(tmp_path) == 0.5
    (place,) = [place for place in all_places(tmp_path) if place.name == "big.weight"]
    assert torch.equal(place.some_rows(100), big[::90])
    for damaged in (torch.full((3, 3), torch.nan), torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.int32)):
        save_file({"a.weight": damaged}, tmp_path / WEIGHTS)
        assert models.weight_size(tmp_path) is None
    (tmp_path / WEIGHTS).write_bytes(b"x")
    assert models.weight_size(tmp_path) is None
