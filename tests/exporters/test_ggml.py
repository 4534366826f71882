"""GGUF exports through llama.cpp's own reader and dequantizers, where `make llamacpp` has built them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgerazor import exporters, formats, models
from edgerazor.console import Console
from edgerazor.exporters.core import gguf_blocks as blocks
from edgerazor.exporters.core.gguf_metadata import gguf_architecture
from edgerazor.exporters.core.gguf_names import gguf_name
from edgerazor.formats import MatrixSpec
from edgerazor.models.gguf_values import row_order
from helpers import ggml
from helpers.packed_folders import all_of, mixed, suitable_model, write_packed
from helpers.tiny_models import ModelMaker

pytestmark = [pytest.mark.job, ggml.needs_ggml]

#: Rows that blocks of 256 divide.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}


@pytest.mark.parametrize("block", blocks.BLOCKS, ids=lambda block: str(block.type.name))
def test_llama_cpp_decodes_every_type(block: blocks.Block) -> None:
    assert ggml.type_sizes(int(block.type))[1:] == blocks.SIZES[block.type]
    found = 0
    for seed, name in enumerate(formats.names()):
        for group in (64, 128, 256, 512):
            spec = MatrixSpec((name,), group)
            weights = torch.randn(6, 512, generator=torch.Generator().manual_seed(seed)) * 0.1
            weights[2] = 0
            encoded = formats.encode_matrix(weights, spec)
            matrix = blocks.BlockMatrix(encoded, spec)
            try:
                written = blocks.write_blocks(block, matrix)
            except blocks.InexactError:
                continue
            found += 1
            decoded = ggml.dequantized(written, int(block.type))
            assert (decoded == formats.decode_matrix(encoded, spec).numpy().reshape(-1)).all(), (name, group)
    assert found


@pytest.mark.parametrize("variant", ["gguf", "gguf-tq2", "gguf-q2"])
@pytest.mark.parametrize("group", [64, 256])
@pytest.mark.parametrize("number_format", ["ternary", "int2z", "mixed"])
def test_llama_cpp_reads_every_file(
    make_model: ModelMaker, tmp_path: Path, number_format: str, group: int, variant: str
) -> None:
    model = suitable_model(make_model, tmp_path / "model", "llama", **WIDE)
    choose = mixed(group) if number_format == "mixed" else all_of(number_format, group)
    opened = write_packed(tmp_path / "packed", model, choose)
    [written] = exporters.write_all(opened.folder, [variant], tmp_path / "out", False, Console(quiet=True))
    config = models.complete_config(opened.folder)
    architecture = gguf_architecture(config)
    tensors = ggml.read(Path(written.file))
    for name in opened.header.matrices:
        matrix = opened.matrix(name)
        expected = formats.decode_matrix(matrix.encoded, matrix.spec)
        target = gguf_name(architecture, f"{name}.weight")
        order = row_order(architecture, config, target)
        if order is not None:
            expected = expected[order]
        number, decoded = tensors.pop(target)
        assert (decoded == expected.numpy().reshape(-1)).all(), name
        if variant == "gguf-q2" and number_format in ("ternary", "int2z"):
            assert number == blocks.NewType.Q2_0, name
    assert {number for number, _ in tensors.values()} == {0}  # norms
