"""Damaged packed models, run: the runtime refuses them, or computes with what they say and no byte beyond it.

    make test-sanitizers                   3,000 folders (LOADS=...), the library built with sanitizers
    PYTHONPATH=tests python tests/fuzz/fuzz_loader.py --only 4711   one of them again, with a traceback

Where `fuzz_packed.py` ends, native code begins: it trusts sizes and pointers, so Python has to have checked them. Tiny
models of the native families lie in memory, with mixed rows, biases, windows, every kind of cache, compressed and in
shards; a worker damages one, most often so that all checksums fit again, its config.json or both, and loads it twice,
copied and mapped, for logits, greedy tokens and scores. *The law*: both ways give the same numbers, or `UserError`s of
one sentence with exit code 1; where neither config.json nor a checksum was changed, the numbers of the undamaged
model. Nothing may crash, hang, or take 1 GB of memory.

With the address sanitizer loaded, the library sees each tensor in memory of its own, so that a read beyond it is one
that the sanitizer knows of; mapped files and the arena of copied tensors would hide it. The limit of memory is then the
sanitizer's. Each damaged folder follows from its number alone.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_packed
import torch
from fuzz_packed import change_tree, dump, encoded, split
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgerazor import formats, kernels, models, packed, runtime
from edgerazor.errors import UserError
from edgerazor.formats import INPUT_SCALE, MatrixSpec
from edgerazor.kernels import native
from edgerazor.kernels.build import LIBRARY
from edgerazor.packed import PackedMatrix, PackedModel
from edgerazor.runtime import native_model, weight_memory
from helpers.fuzzing import MEMORY, Folder, Subject, check_sentence, main
from helpers.packed_folders import SETTINGS

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
CONFIG = "config.json"


# Models to damage -------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """A model: its type, what is special in its configuration and settings, and how it is written."""

    model_type: str
    special: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


SHAPE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
ROPES: list[dict[str, Any]] = [YARN, DYNAMIC, LLAMA3, LINEAR, LONGROPE, {"rope_type": "default", "rope_theta": 1e4}]

KINDS: dict[str, Kind] = {
    "llama": Kind("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": Kind("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, {"kv_bits": 4}),
    "qwen3": Kind("qwen3", {"tie_word_embeddings": True}, {"activation_bits": 16, "kv_bits": 16}),
    "mistral": Kind("mistral", {"sliding_window": 4, "rope_parameters": DYNAMIC}, {"group_size": 8}),
    "smollm3": Kind("smollm3", {"no_rope_layers": [1, 0]}, options={"compress": True}),
    "olmo2": Kind("olmo2", {"rope_parameters": YARN}, options={"shard_bytes": 3000}),
    "stablelm": Kind("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}, {"activation_bits": 4}),
}
#: End of a matrix's name -> formats of its rows in turn.
FORMATS = {"q_proj": ("ternary", "int4"), "k_proj": ("int5",), "v_proj": ("int8",), "o_proj": ("int3",)}
FORMATS |= {"gate_proj": ("ternary",), "up_proj": ("int2z",), "down_proj": ("int2", "int3", "ternary")}
FORMATS |= {"embed_tokens": ("int4", "int8"), "lm_head": ("int4",)}


class Pieces(NamedTuple):
    """What a folder is packed from."""

    matrices: dict[str, PackedMatrix]
    others: dict[str, Tensor]
    tied: dict[str, str]
    settings: dict[str, Any]
    config: dict[str, Any]
    companions: dict[str, bytes]


#: By kind: pieces of the models, their folders, and what they compute.
PIECES: dict[str, Pieces] = {}
UNDAMAGED: dict[str, Folder] = {}
NUMBERS: dict[str, list[Tensor]] = {}


def spec_of(names: Sequence[str], rows: int, group_size: int) -> MatrixSpec:
    """Rows with these formats in turn."""
    if len(names) == 1:
        return MatrixSpec(tuple(names), group_size)
    return MatrixSpec(tuple(names), group_size, (torch.arange(rows) * 5 % 7 % len(names)).to(torch.uint8))


def matrix_of(name: str, kind: str, weight: Tensor, spec: MatrixSpec) -> PackedMatrix:
    return PackedMatrix(name, kind, formats.encode_matrix(weight, spec), spec)  # type: ignore[arg-type]


def make_pieces(kind: Kind) -> Pieces:
    """A random model, its matrices encoded."""
    torch.manual_seed(1)
    config = CONFIG_MAPPING[kind.model_type](**{**SHAPE, **kind.special})
    model = AutoModelForCausalLM.from_config(config)
    structure, state = models.structure(model), model.state_dict()
    settings = {**SETTINGS, "group_size": 16, **kind.settings}
    matrices = {}
    for target in structure.targets:
        weight = state[f"{target.name}.weight"] + 0.1 * torch.randn(target.rows, target.columns)
        spec = spec_of(FORMATS[target.name.rpartition(".")[2]], target.rows, settings["group_size"])
        matrices[target.name] = matrix_of(target.name, target.kind, weight, spec)
    names = {f"{name}.weight" for name in (*matrices, structure.head_path)}
    others = {name: tensor + 0.1 for name, tensor in state.items() if name not in names}
    others[f"model.layers.0.mlp.down_proj.{INPUT_SCALE}"] = torch.tensor(0.01)
    tied = {} if structure.head else {structure.head_path: structure.embedding.name}
    return Pieces(matrices, others, tied, settings, json.loads(config.to_json_string(False)), companions())


def companions() -> dict[str, bytes]:
    """Files of a small tokenizer."""
    words = {"<s>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, SHAPE["vocab_size"])}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "</s>")), bos_token="<s>", eos_token="</s>"
    )
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        return {file.name: file.read_bytes() for file in Path(place).iterdir()}


def pack(kind: str, pieces: Pieces, place: Path) -> Folder:
    """A folder of pieces, in an empty place.

    Raises:
        ValueError: it cannot be packed.
    """
    header = packed.write(
        place,
        [matrix.source() for matrix in pieces.matrices.values()],
        pieces.others,
        tied=pieces.tied,
        settings=pieces.settings,
        provenance={},
        **{"shard_bytes": 10**9, **KINDS[kind].options},
    )
    quantization = {"quant_method": "edgerazor", "version": packed.VERSION, **pieces.settings}
    config = json.dumps({**pieces.config, "quantization_config": quantization}).encode()
    files = {file.name: file.read_bytes() for file in place.iterdir()}
    return Folder(kind, {**files, **pieces.companions, CONFIG: config}, header)


def make_folders(place: Path) -> list[Folder]:
    """One of each kind; what they compute is remembered."""
    guard_tensors()
    for kind in KINDS:
        folder = place / kind
        folder.mkdir()
        PIECES[kind] = make_pieces(KINDS[kind])
        UNDAMAGED[kind] = pack(kind, PIECES[kind], folder)
        for name, content in UNDAMAGED[kind].files.items():
            (folder / name).write_bytes(content)
        use_kernels(kind)
        model = runtime.load(folder, 1)
        assert model.note is None, model.note
        NUMBERS[kind] = numbers(model)
    return list(UNDAMAGED.values())


# Damage: each changes a folder in memory ---------------------------------------------------------------------------


NUMERIC = [*SHAPE, "rms_norm_eps", "layer_norm_eps", "sliding_window", "max_window_layers", "partial_rotary_factor"]
NUMERIC += ["no_rope_layer_interval", "num_labels", "num_local_experts", "pretraining_tp", "chunk_size_feed_forward"]
SIZES: list[Any] = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33, 37, 38, 64, 1000, 2**20, 2**31 - 1, 2**31]
SIZES += [2**32 + 8, 2**62, 2**63, 2**64 + 2, 10**30, -1, -8, -(2**31), -(2**63), None, True, False, "8", [8], {"a": 8}]
SIZES += [0.5, 8.0, 1e-300, 1e300, -0.0, math.nan, math.inf, -math.inf]
OTHERWISE: dict[str, list[Any]] = {
    "model_type": [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "smollm3",
        "olmo2",
        "olmo",
        "stablelm",
        "gemma",
        "phi3",
        "",
        1,
    ],
    "hidden_act": ["gelu", "silu", "x" * 5000, "a\nb", "", 1, None, ["silu"]],
    "layer_types": [
        None,
        [],
        ["full_attention"],
        ["sliding_attention"] * 2,
        ["sliding_attention"] * 9,
        ["x", "y"],
        "ab",
    ],
    "no_rope_layers": [None, [], [0], [1, 1], [0, 0, 0], ["a", "b"], [None, None], 1],
    "use_sliding_window": [True, False, 1, "yes"],
    "attention_bias": [True, False, 1, "no", None],
    "mlp_bias": [True, False],
    "use_qkv_bias": [True, False],
    "tie_word_embeddings": [True, False, None],
    "clip_qkv": [None, 1.0],
    "qk_layernorm": [True, False],
    "use_parallel_residual": [True, False],
    "quantization_config": [None, {}, [], {"quant_method": "edgerazor"}, {"quant_method": "gptq", "bits": 4}],
    "text_config": [{}, None, {"num_hidden_layers": 10**9}, {"model_type": "qwen3", "num_hidden_layers": 2**40}],
    "per_layer_config": [{}, {"0": {"hidden_size": 8}}, {"5": {}}, {"x": 1}, [1]],
    "dtype": ["float64", "float16", "bits", 5],
    "id2label": [{}, {"0": "a"}, {"x": "a"}, [1], "x"],
    "architectures": [[], ["GPT2LMHeadModel"], "x", [1]],
}


def change_config(draw: random.Random, folder: Folder) -> None:
    """Sizes, types, choices, positions, or anything at all in config.json."""
    config = json.loads(folder.files[CONFIG])
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        config = draw.choice([change_size, change_size, change_heads, change_choice, change_rope, change_tree])(
            draw, config
        )
        if not isinstance(config, dict):
            break
    folder.files[CONFIG] = encoded(draw, dump(config))


def change_size(draw: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    key = draw.choice(NUMERIC)
    old = config.get(key)
    near = [old + 1, old - 1, 2 * old, old // 2, -old, float(old), old + 2**32] if isinstance(old, int) else [1]
    return {**config, key: draw.choice(near if draw.random() < 0.4 else SIZES)}


def change_heads(draw: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """Other heads, whose matrices are as large as before."""
    dim = draw.choice([1, 2, 3, 4, 8, 16, 32])
    changed = {"num_attention_heads": 32 // dim, "num_key_value_heads": 16 // dim, "head_dim": dim}
    if draw.random() < 0.2:
        changed["head_dim"] = None
    return {**config, **changed}


def change_choice(draw: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    key = draw.choice(list(OTHERWISE))
    return {**config, key: copy.deepcopy(draw.choice(OTHERWISE[key]))}


def change_rope(draw: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """Positions of another kind, mostly with a number that is none."""
    rope: dict[str, Any] = copy.deepcopy(draw.choice(ROPES))
    if draw.random() < 0.8:
        key = draw.choice([*rope, "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow", "mscale"])
        rope[key] = draw.choice([*SIZES, "yarn", "longrope", [1.0], [0.0] * 4, [math.nan] * 4, ["a"] * 4])
    if draw.random() < 0.1:
        del rope[draw.choice(list(rope))]
    return {**config, draw.choice(["rope_parameters", "rope_parameters", "rope_scaling"]): rope}


def pack_again(draw: random.Random, folder: Folder) -> None:
    """Another model, whose checksums fit: its tensors, their names, what is shared, how it computes."""
    pieces = PIECES[folder.kind]
    pieces = pieces._replace(**{name: dict(getattr(pieces, name)) for name in pieces._fields})
    for _ in range(draw.choice([1, 1, 2])):
        draw.choice([change_other, change_other, change_matrix, change_matrix, change_tied, change_settings])(
            draw, pieces
        )
    if draw.random() < 0.3:
        pieces = pieces._replace(config=change_size(draw, change_heads(draw, pieces.config)))
    with tempfile.TemporaryDirectory() as place:
        try:
            made = pack(folder.kind, pieces, Path(place))
        except (ValueError, UserError):  # our own tool refuses to write such a thing
            return
    folder.files, folder.header, folder.lies = made.files, made.header, True


def change_other(draw: random.Random, pieces: Pieces) -> None:
    """A norm, a bias or a scale of another size, type, name or value, or none."""
    name = draw.choice(list(pieces.others))
    tensor = pieces.others.pop(name)
    size = tensor.numel()
    types = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.bool]
    number = draw.choice([0.0, -1.0, 1e30, -1e38, 1e-40, math.nan, math.inf])
    others = [
        torch.ones(draw.choice([0, 1, size - 1, size + 1, 2 * size, 4096])),
        tensor.reshape(draw.choice([(size, 1), (1, size), (1, 1, size)])),
        torch.tensor(0.5),
        tensor.to(draw.choice(types)),
        torch.full(tensor.shape, number, dtype=torch.float64).to(tensor.dtype),
    ]
    if draw.random() < 0.8:
        pieces.others[name if draw.random() < 0.9 else draw.choice(list(pieces.others))] = draw.choice(others)


def change_matrix(draw: random.Random, pieces: Pieces) -> None:
    """A matrix of another shape, format, group size, purpose or name, or none."""
    name = draw.choice(list(pieces.matrices))
    old = pieces.matrices.pop(name)
    rows, cols = old.encoded.codes.shape
    if draw.random() < 0.7:
        rows = max(1, draw.choice([1, rows - 1, rows + 1, rows + 16, 2 * rows, rows]))
        cols = max(1, draw.choice([1, cols - 1, cols + 1, cols + 16, 2 * cols, cols, cols]))
    names = draw.sample(formats.names(), draw.choice([1, 1, 2, 3]))
    group = draw.choice([1, 2, 7, 8, 16, 32, 64, 2**31, 2**33, 2**61])
    spec = spec_of(names, rows, group)
    if draw.random() < 0.1 and len(names) > 1:
        spec = MatrixSpec(tuple(names), 8, block_formats=torch.zeros(1, -(-cols // 8), dtype=torch.uint8))
    role = draw.choice([old.kind] * 5 + ["linear", "head", "embedding"])
    place = draw.choice([name] * 8 + [*pieces.matrices, f"{name}x", "model.layers.2.mlp.up_proj"])
    if draw.random() < 0.95:
        weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(draw.randrange(99)))
        pieces.matrices[place] = matrix_of(place, role, weight, spec)


def change_tied(draw: random.Random, pieces: Pieces) -> None:
    """Matrices that are shared with others."""
    if pieces.tied and draw.random() < 0.5:
        pieces.tied.clear()
        return
    names = list(pieces.matrices)
    alone = draw.choice([*names, "lm_head", "lm_head", "model.embed_tokens"])
    pieces.matrices.pop(alone, None)
    pieces.tied[alone] = draw.choice(["model.embed_tokens", *names])


def change_settings(draw: random.Random, pieces: Pieces) -> None:
    """Bits and groups of activations, keys and values; or one of them is not given."""
    name = draw.choice(list(pieces.settings))
    if draw.random() < 0.2:
        del pieces.settings[name]
        return
    groups = [1, 2, 3, 7, 8, 31, 32, 33, 2**31 - 1, 2**31, 2**32 + 1, 2**61]
    values = {
        "group_size": groups,
        "adaptive_tokens": ["off", "causal", "ranked"],
        "thresholds": [[], [0.5], [0.5] * 2],
    }
    bits = [4, 8, 16] if name != "activation_bits" else [4, 5, 6, 7, 8, 16]
    pieces.settings[name] = draw.choice(values.get(name, bits))


def move_tensors(draw: random.Random, folder: Folder) -> None:
    """A file's header without what fills it up: tensors then begin anywhere."""
    name = draw.choice(folder.weights())
    entries, data = split(folder.files[name])
    text = dump(entries).encode() + b" " * draw.randrange(64)
    folder.files[name] = struct.pack("<Q", len(text)) + text + data


#: damage -> how often
DAMAGES: dict[Callable[[random.Random, Folder], None], int] = {
    change_config: 35,
    pack_again: 30,
    fuzz_packed.change_data_and_checksum: 15,
    fuzz_packed.change_header: 6,
    fuzz_packed.change_entries: 3,
    fuzz_packed.flip_bits: 4,
    fuzz_packed.rewrite_bytes: 4,
    fuzz_packed.exchange_files: 2,
    fuzz_packed.replace_by_no_file: 1,
    move_tensors: 3,
}


# The law ----------------------------------------------------------------------------------------------------------


def check(path: Path, folder: Folder) -> str:
    """`refused`, `unharmed`, `other` for another model, or `transformers` where that would have to compute it.

    Raises:
        AssertionError: the law is broken.
    """
    use_kernels(folder.kind)
    copied, mapped = (outcome_of(path, folder, mmap) for mmap in (False, True))
    if isinstance(copied, str) or isinstance(mapped, str):
        assert copied == mapped, f"copied: {copied}, mapped: {mapped}"
        return str(copied)
    assert same(copied, mapped), "copied and mapped weights give other numbers"
    if same(copied, NUMBERS[folder.kind]):
        return "unharmed"
    before = UNDAMAGED[folder.kind]
    assert folder.lies or folder.files[CONFIG] != before.files[CONFIG], "nobody noticed"
    return "other"


def outcome_of(path: Path, folder: Folder, mmap: bool) -> str | list[Tensor]:
    """A word, or the numbers that the native engine computes."""
    try:
        model = runtime.load(path, 1 + list(KINDS).index(folder.kind) % 2, mmap)
        return numbers(model) if model.note is None else "transformers"
    except UserError as error:
        check_sentence(error)
        return "refused"


def numbers(model: runtime.Model) -> list[Tensor]:
    """Logits, scores and greedy tokens of some tokens, the first and the last among them."""
    count, most = model.vocabulary, model.max_positions
    ids = [0, count - 1, 1 % count, count // 2, count - 1, 0, 2 % count, count // 3, count - 1][:most]
    outputs = [model.logits(ids)]
    session = model.session()
    outputs += [session.feed(ids[:-1]), session.feed(ids[-1:])] if len(ids) > 1 else [session.feed(ids)]
    outputs.append(torch.tensor(session.greedy(3)))
    if len(ids) > 3:
        (scores,) = model.score([(ids[:2], [ids[2:], ids[3:], ids[2:3]])])
        outputs.append(torch.tensor([[score.log_probability, score.greedy] for score in scores]))
    return outputs


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether all numbers are equal, and what is no number is none in both."""
    return len(first) == len(second) and all(
        torch.equal(a.nan_to_num(-3.0), b.nan_to_num(-3.0)) for a, b in zip(first, second, strict=True)
    )


def use_kernels(kind: str) -> None:
    """Kinds take turns with the instruction sets of this machine."""
    isas = native.isas()
    os.environ[kernels.VARIABLE] = isas[-1 - list(KINDS).index(kind) % len(isas)]


def guard_tensors() -> None:
    """With the sanitizer loaded, memory of its own for what native code reads."""
    if not SANITIZED:
        return
    assert b"__asan_report" in Path(native.__file__).with_name(LIBRARY).read_bytes(), "a library without sanitizers"
    load = weight_memory.load_matrices

    def guarded(opened: PackedModel, names: Sequence[str], mapped: bool, expanded: bool) -> Mapping[str, native.Matrix]:
        loaded = load(opened, names, mapped, expanded)
        for matrix in loaded.values():
            matrix.parts = [alone(part) for part in matrix.parts]
        return loaded

    native_model.load_matrices = guarded  # type: ignore[assignment]
    weight_memory.huge_memory = lambda size: torch.zeros(size, dtype=torch.uint8)


def alone(part: native.FormatRows) -> native.FormatRows:
    rows = None if part.rows is None else at_end(part.rows)
    return dataclasses.replace(part, codes=at_end(part.codes), scales=at_end(part.scales), rows=rows)


def at_end(tensor: Tensor) -> Tensor:
    """A copy at the end of new memory, where a line of the cache begins as many bytes before it as in the old."""
    content = (
        tensor.contiguous().view(torch.uint8).flatten() if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    )
    place = torch.empty(tensor.data_ptr() % 64 + len(content), dtype=torch.uint8)[-len(content) or 64 :]
    return place.copy_(content).view(tensor.dtype).view(tensor.shape)


SUBJECT = Subject(__file__, make_folders, DAMAGES, check, memory=None if SANITIZED else MEMORY)

if __name__ == "__main__":
    main(SUBJECT, __doc__, 3000)
