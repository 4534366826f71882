"""Models of random weights in published shapes, as each program of `bench_peers.py` takes them.

A model is written once in 16 bits, which transformers measures; `edgerazor pack` rounds it to ours, and llama.cpp's own
tool makes its files of the decoded ternary weights. Speed does not depend on what the weights are. Everything is kept
in a folder, so that an interrupted run finds it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from edgerazor import exporters, models, pipeline
from edgerazor import recipe as recipes
from edgerazor.benchmark.engines import cached_numbers
from edgerazor.benchmark.peers import GgufFile, Program
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.workdir import WorkDir, replace_folder
from recipes.benchmarks.folders import WORLD
from recipes.benchmarks.memory import SHAPE as QWEN3
from recipes.benchmarks.packing import random_weights

TOKENIZER = WORLD / "teacher"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
#: shape -> model type of transformers, and its configuration
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B": ("qwen3", {**QWEN3, "max_position_embeddings": 40960}),
    "Llama-3.2-1B": (
        "llama",
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "rope_parameters": LLAMA3,
            "tie_word_embeddings": True,
        },
    ),
    "SmolLM2-360M": (
        "llama",
        {
            "vocab_size": 49_152,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}
#: Qwen3-0.6B with rows that are no whole groups: 1000 is 3 x 256 + 232, 3000 is 11 x 256 + 184.
SHAPES["tails"] = ("qwen3", {**SHAPES["Qwen3-0.6B"][1], "hidden_size": 1000, "intermediate_size": 3000})

#: Ours: name -> what calibrate is asked for.
PACKED: dict[str, dict[str, Any]] = {
    "base 3": {"bits": 1.58},
    "1.88 bits": {"bits": 1.88},
    "int4": {"bits": 4.0},
    "group 64": {"bits": 1.58, "group_size": 64},
}
#: Types of llama-quantize for the embedding and head, where it is not to choose them itself.
HEAD4 = ("--token-embedding-type", "q4_0", "--output-tensor-type", "q4_0")


@dataclass(frozen=True)
class Place:
    """Where models lie, and how large they are.

    Attributes:
        folder: of all models.
        layers: most layers of a model; None for all.
        vocabulary: most entries; None for all.
    """

    folder: Path
    layers: int | None = None
    vocabulary: int | None = None

    def configuration(self, shape: str) -> Any:
        kind, values = SHAPES[shape]
        values = dict(values, bos_token_id=0, eos_token_id=1)
        for name, most in (("num_hidden_layers", self.layers), ("vocab_size", self.vocabulary)):
            values[name] = min(values[name], most or values[name])
        return CONFIG_MAPPING[kind](**values)


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """A folder that is filled by `make`, if it is not there yet."""
    if not path.exists():
        with replace_folder(path) as new:
            make(new)
    return path


def wide(place: Place, shape: str) -> Path:
    """The model in bfloat16, as transformers loads it."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        config = place.configuration(shape)
        config.dtype = torch.bfloat16
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tensors = {name: random_weights(parameter.shape) for name, parameter in model.named_parameters()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)

    return once(place.folder / shape / "bfloat16", make)


def packed(place: Place, shape: str, name: str) -> Path:
    """One of ours."""

    def make(folder: Path) -> None:
        calibrate = {"plan": "interleave", "rotation": "none", **PACKED[name]}  # GGUF, which is beside it, has none
        values = {"model": str(wide(place, shape)), "calibrate": calibrate, "pack": {"source": "teacher"}}
        work = WorkDir(folder / "work")
        pipeline.run("pack", recipes.build(values), work, Console(quiet=True))
        for file in work.folder("pack").iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(work.path)

    return once(place.folder / shape / name, make)


def gguf(place: Place, shape: str, kind: str, program: Program, head: bool = False) -> GgufFile:
    """A file of llama.cpp's own making: `BF16`, `Q4_0`, `TQ2_0` ...

    Args:
        place: where models lie.
        shape: of the model.
        kind: as llama-quantize calls it.
        program: whose llama-quantize lies beside it.
        head: the embedding, which is the head, in Q4_0, about as many bits as ours.

    Raises:
        UserError: the tool fails.
    """
    name = f"{kind}, 4-bit head" if head else kind

    def make(folder: Path) -> None:
        base = once(place.folder / shape / "gguf-f16", lambda new: _write_f16(packed(place, shape, "base 3"), new))
        quantize = program.path.with_name("llama-quantize")
        words = [quantize, *(HEAD4 if head else ()), base / "model.gguf", folder / "model.gguf", kind, "2"]
        try:
            subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
        except OSError as error:
            raise UserError(f"llama-quantize of {program.name} does not start: {error.strerror}.") from None
        except subprocess.CalledProcessError as error:
            why = error.stderr.strip().rpartition("\n")[2]
            raise UserError(f"llama-quantize of {program.name} makes no {kind}: {why}.") from None

    path = once(place.folder / shape / f"{program.name} {name}", make) / "model.gguf"
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    unread = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    cache = 2 * cached_numbers(models.complete_config(packed(place, shape, "base 3")))
    read = sum(sizes.values()) - unread
    return GgufFile(path=path, type=name, bytes=path.stat().st_size, bytes_per_token=read, cache_bytes_per_token=cache)


def _write_f16(packed_folder: Path, target: Path) -> None:
    (written,) = exporters.write_all(packed_folder, ["gguf-f16"], target / "exports", True, Console(quiet=True))
    Path(written.file).rename(target / "model.gguf")
    shutil.rmtree(target / "exports")


def bytes_of(folder: Path) -> int:
    """Of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
