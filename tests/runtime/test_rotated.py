"""Rotated models in the native engine: what transformers computes, in pieces or as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgerazor import formats, kernels, runtime
from edgerazor.formats import MatrixSpec
from edgerazor.kernels import native
from helpers.packed_folders import SETTINGS, suitable_model, write_packed
from helpers.tiny_models import VOCABULARY, ModelMaker, mostly_slow

#: Models are loaded: `make test-fast` leaves this file out.
pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(native.library() is None, reason="the native library is not built"),
]

IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
#: Rows of 96 in blocks of 32, rows of 128 in one block.
SHAPE: dict[str, Any] = {"intermediate_size": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("smollm2", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "norms of q and k": ("qwen3", {"head_dim": 20}),  # q of 120 columns in blocks of 8
    "norms behind": ("olmo2", {}),
    "a layer that is not rotated": ("mistral", {"intermediate_size": 101}),
}
EXACT, EIGHT, FOUR = (16, 16), (8, 8), (8, 4)


def rotated(path: str, rows: int, columns: int) -> MatrixSpec:
    """Ternary and int4 rows, rotated where columns allow it."""
    row_formats = (torch.arange(rows) % 3 == 0).to(torch.uint8)
    return MatrixSpec(("ternary", "int4"), 32, row_formats, rotation=formats.hadamard(columns))


@pytest.fixture
def write(make_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a packed model of `MODELS`; one of its inputs has a stored scale."""

    def written(name: str, bits: tuple[int, int]) -> Path:
        family, special = MODELS[name]
        monkeypatch.setitem(SETTINGS, "activation_bits", bits[0])
        monkeypatch.setitem(SETTINGS, "kv_bits", bits[1])
        model = suitable_model(make_model, tmp_path / "model", family, **{**SHAPE, **special})
        opened = write_packed(tmp_path / "packed", model, rotated)
        assert opened.header.version == 3
        assert opened.header.rotations["96"] == 32
        return tmp_path / "packed"

    return written


def relative(found: Tensor, expected: Tensor) -> float:
    """Distance in units of the length."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [EXACT, EIGHT, pytest.param(FOUR, marks=pytest.mark.slow)], ids=["16", "8", "kv4"])
@pytest.mark.parametrize("name", mostly_slow(MODELS, "tied", "biases"))
def test_both_engines_compute_the_same(write: Any, name: str, bits: tuple[int, int]) -> None:
    folder = write(name, bits)
    ours, theirs = (runtime.load(folder, threads=2, engine=engine) for engine in runtime.ENGINES)
    whole, most = ours.logits(IDS), {EXACT: 1e-4, EIGHT: 1e-2, FOUR: 3e-2}[bits]
    assert relative(whole, theirs.logits(IDS)) < most
    ids, session = IDS[0].tolist(), ours.session()
    for start, end in ((0, 3), (3, 19), *((each, each + 1) for each in range(19, 24))):  # pieces, then single tokens
        assert relative(session.feed(ids[start:end]), whole[0, end - 1]) < most / 10 if bits == EXACT else most
    if bits == EXACT:
        other = theirs.session()
        other.feed(ids)
        assert session.greedy(8) == other.greedy(8)


@pytest.mark.parametrize("isa", native.isas())
def test_every_instruction_set(write: Any, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, isa)
    folder = write("norms of q and k", EIGHT)
    ours, threaded, theirs = (runtime.load(folder, *how) for how in ((1, False), (3, True), (1, False, "transformers")))
    assert ours.kernel == isa
    logits = ours.logits(IDS)
    assert torch.equal(threaded.logits(IDS), logits)
    assert relative(logits, theirs.logits(IDS)) < 1e-2
