"""Tiny packed models with formats of the test's choice, and the floating model that each stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor import formats, models, packed
from edgerazor.formats import MatrixSpec
from edgerazor.packed import PackedMatrix, PackedModel
from helpers.tiny_models import ModelMaker

#: Of a tiny model whose rows and columns suit every export; 160 = 128 + 32 has a shorter last group.
SUITABLE: dict[str, Any] = {"vocab_size": 300, "hidden_size": 96, "intermediate_size": 160}
SETTINGS = {
    "activation_bits": 8,
    "kv_bits": 8,
    "group_size": 32,
    "query_bits": 16,
    "probability_bits": 16,
    "adaptive_tokens": "off",
    "thresholds": [],
}

#: Module path, rows and columns of a matrix -> its formats.
Choose = Callable[[str, int, int], MatrixSpec]


def write_packed(
    folder: Path,
    model: Path,
    choose: Choose,
    dtype: torch.dtype = torch.float32,
    settings: Mapping[str, Any] = SETTINGS,
    input_scale: bool = True,
) -> PackedModel:
    """Pack a model folder with formats of its own for each matrix; what is not quantized gets a dtype.

    `input_scale`: the inputs of one layer have a stored scale.
    """
    teacher, _ = models.load(model)
    structure = models.structure(teacher)
    state = teacher.state_dict()
    names = {target.name for target in structure.targets} | {structure.head_path}
    matrices = []
    for target in structure.targets:
        spec = choose(target.name, target.rows, target.columns)
        encoded = formats.encode_matrix(spec.rotate(state[f"{target.name}.weight"]), spec)
        matrices.append(PackedMatrix(target.name, target.kind, encoded, spec))
    others = {key: value.to(dtype) for key, value in state.items() if key.removesuffix(".weight") not in names}
    if input_scale:
        others["model.layers.0.mlp.down_proj.input_scale"] = torch.tensor(0.5)  # ours alone
    folder.mkdir(parents=True)
    tied = {} if structure.head else {structure.head_path: structure.embedding.name}
    packed.write(
        folder,
        [matrix.source() for matrix in matrices],
        others,
        tied=tied,
        settings=settings,
        provenance={"source": "teacher"},
    )
    models.copy_companions(model, folder)
    values = json.loads((model / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "edgerazor", "version": packed.VERSION, **settings}
    (folder / "config.json").write_text(json.dumps(values))
    return PackedModel.open(folder)


def decoded_model(model: Path, opened: PackedModel) -> PreTrainedModel:
    """The model of a folder with the weights of a packed one, in float32: nothing else is rounded."""
    floating = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        for name in opened.header.matrices:
            matrix = opened.matrix(name)
            decoded = formats.decode_matrix(matrix.encoded, matrix.spec)
            floating.get_submodule(name).weight.copy_(matrix.spec.rotate_back(decoded))
        state = floating.state_dict()
        for name, tensor in opened.others().items():
            if name in state:
                state[name].copy_(tensor)
    return floating


def all_of(name: str, group_size: int = 32) -> Choose:
    """One format for every matrix."""
    return lambda path, rows, columns: MatrixSpec((name,), group_size)


def mixed(group_size: int = 32) -> Choose:
    """Embedding and head int4; q has ternary and int4 rows, v is int8, down has formats by block, the rest vary."""

    def choose(path: str, rows: int, columns: int) -> MatrixSpec:
        last = path.rpartition(".")[2]
        if last == "q_proj":
            return MatrixSpec(("ternary", "int4"), group_size, (torch.arange(rows) % 8 == 0).to(torch.uint8))
        if last == "down_proj":
            groups = formats.group_count(columns, group_size)
            blocks = (torch.arange(rows * groups).view(rows, groups) % 3).to(torch.uint8)
            return MatrixSpec(("ternary", "int2", "int3"), group_size, block_formats=blocks)
        alone = {"v_proj": "int8", "o_proj": "int5", "gate_proj": "ternary", "up_proj": "int2z"}
        return MatrixSpec((alone.get(last, "int4"),), group_size)

    return choose


def suitable_model(make_model: ModelMaker, folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A tiny model of a family on the disk."""
    make_model(folder, family, **{**SUITABLE, **overrides})
    return folder
