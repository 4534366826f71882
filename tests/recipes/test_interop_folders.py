"""The comparison with packages that read our folders: what it reads, and what it calls a failure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgerazor import exporters
from edgerazor import recipe as recipes
from edgerazor.console import Console
from helpers.packed_folders import mixed, suitable_model, write_packed
from helpers.tiny_models import ModelMaker
from recipes.benchmarks import interop_folders
from recipes.benchmarks.interop import Case

ROW = interop_folders.Row(
    Case("m", "int4", recipes.Recipe()), "compressed-tensors", "W4 g128", (4.1, 5.0), 29, 29, 0.0, 0.0, 64
)


@pytest.mark.job
@pytest.mark.parametrize("name", ["compressed-tensors", "hf-f32"])
def test_other_peoples_decoders_find_every_matrix(make_model: ModelMaker, tmp_path: Path, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    model = suitable_model(make_model, tmp_path / "model", "llama")
    opened = write_packed(tmp_path / "packed", model, mixed())
    [written] = exporters.write_all(opened.folder, [name], tmp_path / "out", False, Console(quiet=True))
    found = interop_folders.decoded(Path(written.file))
    assert interop_folders.exact_matrices(opened, found) == len(opened.header.matrices)
    layer = "model.layers.1.mlp.up_proj"
    found[layer] = found[layer].nextafter(torch.tensor(torch.inf))
    del found["lm_head"]
    assert interop_folders.exact_matrices(opened, found) == len(opened.header.matrices) - 2
    described = interop_folders.described_layouts(exporters.find(name).plan(opened))
    assert described in ("F32", "W8 g32, W2 g32, W3 g32, W5 g32", "W8 g32, W2 g32, W5 g32, W3 g32")


def test_every_bound_is_a_failure_of_its_own() -> None:
    assert ROW.failures() == []
    for broken, sentence in (
        (replace(ROW, exact=28), "1 matrices differ"),
        (replace(ROW, largest=0.01), "logits are up to 1.0e-02"),
        (replace(ROW, largest=float("nan")), "logits are up to nan"),
        (replace(ROW, greedy=63), "63 tokens the same"),
        (replace(ROW, export="compressed-tensors-a8", kl=0.02), "2.0e-02 nats"),
        (replace(ROW, export="compressed-tensors-a8", kl=float("nan")), "nan nats"),
    ):
        [failure] = broken.failures()
        assert sentence in failure
    rounded = replace(ROW, export="compressed-tensors-a8", largest=0.4, kl=1e-3, greedy=3)
    assert rounded.failures() == []
    assert len(rounded.cells()) == len(interop_folders.HEAD)
    assert rounded.cells()[-4:] == ["29 of 29", "4.0e-01", "1.0e-03", "3/64"]
