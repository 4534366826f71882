"""Layers of several kinds without native code: a packed model computes the same from its cache, in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgerazor import runtime
from edgerazor.calibrated import read_plan
from edgerazor.recipe import Calibrate
from edgerazor.workdir import WorkDir
from helpers.tiny_job import call
from helpers.tiny_models import ModelMaker

pytestmark = pytest.mark.job

FAMILIES = ("granite-hybrid", "gemma4")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_writes_from_its_cache(family: str, make_model: ModelMaker, tmp_path: Path) -> None:
    make_model(tmp_path / "model", family)
    words = ("--bits", 4, "--plan", "interleave", "--group-size", 40, "--work", tmp_path / "job")
    assert call("pack", tmp_path / "model", *words).code == 0
    model = runtime.load(tmp_path / "job" / "packed", threads=1, engine="transformers")
    ids = torch.randint(2, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    expected, session = model.logits(ids), model.session()
    for begin, end in ((0, 1), (1, 17), (17, 18), (18, 40)):  # beyond the window of 8
        torch.testing.assert_close(session.feed(ids[begin:end]), expected[end - 1], rtol=2e-2, atol=2e-2)


def test_mixed_layers_are_planned_and_measured(make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Where bytes are counted, a second table of embeddings is measured, and gets a format like any matrix."""
    make_model(tmp_path / "model", "gemma4")
    words = ("--data", text_file, "--group-size", 40, "--sequences", 2, "--sequence-length", 24)
    done = call("calibrate", tmp_path / "model", *words, "--real-bits", 5, "--work", tmp_path / "job", "--json")
    assert done.code == 0, done.err
    formats = {matrix.name: matrix.formats for matrix in read_plan(WorkDir(tmp_path / "job")).matrices}
    tables = [formats[f"model.{name}"] for name in ("embed_tokens", "embed_tokens_per_layer")]
    assert (Calibrate().embedding_format,) not in tables  # of which they had no more than they needed
