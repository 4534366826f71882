"""The room of families: each file holds for the model that it is named after, and a new family is one new file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from edgerazor import families
from edgerazor.exporters.core.gguf_metadata import gguf_architecture
from edgerazor.exporters.core.gguf_names import gguf_name
from helpers.tiny_experts import MIXTURES
from helpers.tiny_models import FAMILIES

#: Llama under another name, in its one file.
RENAMED = """
from edgerazor.families.core.base import GGUF_ALL_BIASES, Family, GgufArchitecture, NativeArchitecture, attention_bias

FAMILY = Family(
    native=NativeArchitecture("RenamedRotaryEmbedding", qkv_bias=attention_bias),
    gguf=GgufArchitecture("llama", interleaved_rope=True, biases=GGUF_ALL_BIASES),
)
"""


#: What all released models of a type set, where the default of transformers is another.
USUAL: dict[str, dict[str, Any]] = {
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 32},
    "qwen3_moe": {"norm_topk_prob": True},
}


@pytest.mark.parametrize("model_type", families.available())
def test_facts_hold_for_the_configuration_of_transformers(model_type: str) -> None:
    """Names of classes and settings are those of transformers, for a model of the default configuration."""
    family = families.find(model_type)
    assert family is not None
    config = CONFIG_MAPPING[model_type](**USUAL.get(model_type, {}))
    if family.gguf is not None and family.gguf.exported:
        facts = config.to_dict() | {"model_type": model_type}
        assert gguf_architecture(facts) == (family.gguf.instead(facts) or family.gguf)
    if (native := family.native) is None:
        assert family.gguf is not None
        return
    modeling = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    assert hasattr(modeling, native.rotary_class)
    assert {type(bias(config)) for bias in (native.qkv_bias, native.o_bias, native.mlp_bias)} == {bool}
    assert native.unsupported(config) == ""
    assert isinstance(native.norm_epsilon, float) or getattr(config, native.norm_epsilon) > 0
    for layer in range(config.num_hidden_layers):
        assert isinstance(native.has_rope(config, layer), bool)
        window = native.window(config, layer)
        assert window is None or window > 0


def test_what_is_read_of_gguf_is_written_by_one_model_type() -> None:
    """Mistral's files are Llama's for llama.cpp, and are read as such."""
    assert families.from_gguf().items() >= {"llama": "llama", "gemma3": "gemma3_text", "qwen3": "qwen3"}.items()
    readable = [family.gguf.name for family in families.available().values() if family.gguf and family.gguf.configure]
    assert len(readable) == len(set(readable)) == len(families.from_gguf()) == 20


def test_a_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "renamed.py").write_text(RENAMED)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "edgerazor.families.renamed", raising=False)
    family = families.find("renamed")
    assert family is not None
    assert family.gguf is not None
    assert {"gemma3_text", "llama", "qwen3_moe", "smollm3", "renamed"} <= set(families.with_gguf())
    assert gguf_name(family.gguf, "model.layers.3.mlp.up_proj.bias") == "blk.3.ffn_up.bias"
    monkeypatch.delitem(sys.modules, "edgerazor.families.renamed")


def test_a_model_without_a_file_is_no_family() -> None:
    for model_type in ("gemma3", "core", "__init__", "", None, "../llama"):
        assert families.find(model_type) is None


def test_the_table_of_families_tells_the_truth() -> None:
    page = (Path(families.__file__).parent / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    told = {line[0].strip("`"): [not cell.startswith("no") for cell in line[2:]] for line in lines}
    assert len(told) == len(lines)
    chained = {kind for kind, _ in FAMILIES.values()} | MIXTURES.keys()
    for model_type, (chain, native, written, read) in told.items():
        family = families.find(model_type) or families.Family()
        assert model_type in CONFIG_MAPPING
        assert chain == (model_type in chained), model_type
        assert native == (family.native is not None), model_type
        assert written == bool(family.gguf and family.gguf.exported), model_type
        by_name = {"mistral": "llama", "olmo3": "olmo2"}.get(model_type, model_type)  # read as the other one is
        assert read == (by_name in families.from_gguf().values()), model_type
    assert families.available().keys() <= told.keys()
