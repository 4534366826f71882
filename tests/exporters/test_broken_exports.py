"""Exports that a full disk, Ctrl-C or something in their way stops: one sentence, and the export from before stays."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgerazor import exporters
from edgerazor.exporters import gguf
from edgerazor.exporters.core import hf_folder
from edgerazor.packed import PackedModel
from helpers.packed_folders import SETTINGS, all_of, decoded_model, suitable_model, write_packed
from helpers.tiny_job import Run, snapshot
from helpers.tiny_models import VOCABULARY, ModelMaker

pytestmark = pytest.mark.job

IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
#: Names of exports of each kind.
KINDS = ("hf-f32", "compressed-tensors", "gptq", "gguf")


@pytest.fixture(scope="module")
def opened(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    model = suitable_model(make_model, tmp_path_factory.mktemp("model") / "llama")
    return write_packed(tmp_path_factory.mktemp("job") / "packed", model, all_of("int4"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may be larger: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", KINDS)
def test_a_full_disk_is_one_sentence(opened: PackedModel, run: Run, name: str) -> None:
    folder, exports = opened.folder, opened.folder.parent / "exports"
    assert run("pack", folder, "--export", name).code == 0
    before = snapshot(exports)
    for size in (0, 60_000):
        with largest_file(size):
            failed = run("pack", folder, "--export", name)
        assert (failed.code, failed.out) == (1, ""), failed.err
        assert failed.err.count("A file would be larger") == 1
        assert "Traceback" not in failed.err
        assert snapshot(exports) == before


@pytest.mark.parametrize("name", KINDS)
def test_ctrl_c_leaves_the_export_from_before(
    opened: PackedModel, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, exports = opened.folder, opened.folder.parent / "exports"
    assert run("pack", folder, "--export", name).code == 0
    before = snapshot(exports)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf if name == "gguf" else hf_folder, STOPPED[name], stop)
    stopped = run("pack", folder, "--export", name)
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert snapshot(exports) == before


#: What is called when some of the files are written.
STOPPED = {**dict.fromkeys(KINDS, "write_companions"), "gguf": "_tensor_bytes"}


def test_what_is_in_the_way_is_named(opened: PackedModel, run: Run) -> None:
    exports = opened.folder.parent / "exports"
    exports.mkdir(exist_ok=True)
    (exports / "compressed-tensors-a8").write_text("mine")
    model = opened.folder
    refused = run("pack", model, "--export", "compressed-tensors-a8")
    assert refused.code == 1  # a layer has a stored scale of inputs
    assert (exports / "compressed-tensors-a8").read_text() == "mine"
    (exports / "gguf-q2").write_text("mine")
    refused = run("pack", model, "--export", "gguf-q2")
    assert refused.code == 1
    assert "is in the way: it should be a folder" in " ".join(refused.err.split())
    assert (exports / "gguf-q2").read_text() == "mine"


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("group", [256, 32])
def test_awkward_columns(make_model: ModelMaker, tmp_path: Path, group: int, tied: bool) -> None:
    """172 columns divide by no usual group: whole rows under groups of 256, and floating under groups of 32."""
    shape = {"intermediate_size": 172, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": tied}
    model = suitable_model(make_model, tmp_path / "model", "llama", **shape)
    for name in ("ternary", "int5") if tied else ("int3",):
        settings = {**SETTINGS, "group_size": 256}
        packed = tmp_path / name
        opened = write_packed(packed, model, all_of(name, group), settings=settings, input_scale=False)
        expected = decoded_model(model, opened)(input_ids=IDS).logits
        for export in ("compressed-tensors", "compressed-tensors-a8"):
            plan = exporters.find(export).plan(opened)
            stored = {tensor.type for tensor in plan.tensors if "down_proj.weight" in tensor.target}
            if group == 32:
                assert stored <= {"F16", "BF16", "F32"}
                assert any("rows of 172 weights are no whole groups of 32" in cause for cause in plan.causes)
            folder = tmp_path / f"{name}-{export}"
            folder.mkdir()
            exporters.find(export).write(opened, folder, plan)
            logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=IDS).logits
            if export == "compressed-tensors":
                assert torch.equal(logits, expected), name
            else:
                assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
            described = json.loads((folder / "config.json").read_text())
            assert described["tie_word_embeddings"] is tied
            assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
