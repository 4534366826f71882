"""GGUF files as teachers: the weights that the package gguf dequantizes, the tokens of llama.cpp, made once."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from edgerazor import models
from edgerazor.errors import UserError
from edgerazor.models import gguf_teacher, gguf_weights
from edgerazor.models.gguf_patterns import PATTERNS, find_pre_tokenizer
from edgerazor.models.gguf_tokenizer import GgufTokenizer
from edgerazor.untrusted.gguf_file import TYPES, GgufFile
from helpers.gguf_files import add_value, quantized_model, write_gguf_of
from helpers.tiny_job import Run, write_recipe
from helpers.tiny_models import ModelMaker, mostly_slow

#: Rows of 32 weights and more; K-quants have blocks of 256.
WIDE: dict[str, Any] = {"intermediate_size": 160}
#: model type -> what its tiny model is like, and metadata beyond those of all.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"tie_word_embeddings": True}, {}),
    "qwen2": ({}, {}),
    "qwen3": ({"head_dim": 32}, {}),
    "gemma": ({"hidden_act": "gelu_pytorch_tanh"}, {}),
    "gemma2": (
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
        {"attention__sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": (
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
        {"attention__sliding_window": 8, "attention__sliding_window_pattern": [True, False]},
    ),
    "smollm3": ({"num_hidden_layers": 4}, {}),
    "olmo": ({"clip_qkv": 3.0}, {"attention__clamp_kqv": 3.0}),
    "olmo2": ({}, {}),
    "exaone4": ({"sliding_window": None, "layer_types": ["full_attention"] * 2}, {}),
    "stablelm": ({"use_qkv_bias": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, {}),
    "phi3": ({}, {}),
    "granite": (
        {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
        {"logit_scale": 2.0, "embedding_scale": 3.0, "residual_scale": 0.5, "attention__scale": 0.3},
    ),
}
TOKENS = torch.tensor([[5, 9, 33, 120, 7, 61, 250, 11, 90, 44, 3, 8, 200, 17]])
TEXTS = (
    "Nora took the ball.  12345 of them\n\n",
    " été cafe\u0301 \u65e5\u672c\u8a9e \U0001f680 \t x   y",
    "",
    "</s> <s>a",
    "def f(x):\n\treturn x+1  # we'LL",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(gguf_teacher.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "teachers"


def make_file(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, folder: Path, kind: str, model_type: str = "llama"
) -> tuple[Any, Path]:
    """A tiny model and its GGUF file."""
    special, metadata = FAMILIES[model_type]
    names = {"gemma3_text": "gemma3"}
    config = models.completed({**shape_of(names.get(model_type, model_type)), **special, "model_type": model_type})
    model = make_model(folder / "model", from_values(config))
    return model, write_gguf_of(model, tokenizer, folder / "model.gguf", kind, **metadata)


def shape_of(_family: str) -> dict[str, Any]:
    from helpers.tiny_models import SHAPE

    return {**SHAPE, **WIDE}


def from_values(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.float()(TOKENS).logits


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", mostly_slow(FAMILIES, "llama", "gemma3_text", "phi3"))
def test_every_family_computes_what_it_did(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str
) -> None:
    """F32 loses nothing: configuration, names, rows of q and k, gains of norms."""
    model, file = make_file(make_model, tokenizer, tmp_path, "F32", model_type)
    teacher, own = models.load(file)
    assert teacher.dtype == torch.float32
    assert teacher.config.model_type == model_type
    torch.testing.assert_close(logits(teacher), logits(model), rtol=1e-4, atol=1e-4)
    assert own("Nora took").input_ids == tokenizer("Nora took").input_ids


@pytest.mark.parametrize("kind", mostly_slow(("Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16"), "Q4_1", "F16"))
def test_quantized_weights_are_those_that_gguf_dequantizes(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    model, file = make_file(make_model, tokenizer, tmp_path, kind, "qwen2")
    teacher, _ = models.load(file)
    assert teacher.dtype == (torch.float16 if kind == "F16" else torch.bfloat16)
    quantized_model(model, kind, teacher.dtype)
    torch.testing.assert_close(logits(teacher), logits(model), rtol=1e-4, atol=1e-4)
    folder = models.resolve(str(file))
    assert models.gguf_origin(folder) == f"{'read' if kind == 'F16' else 'dequantized'} from {kind}"


@pytest.mark.parametrize("kind", sorted(kind.name for kind in gguf.quants._type_traits))
def test_every_type_is_dequantized_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Random blocks of every type of the package, in pieces of a few rows, as it dequantizes them at once."""
    [(number, (_, weights, size))] = [(number, entry) for number, entry in TYPES.items() if entry[0] == kind]
    octets = np.random.default_rng(0).integers(0, 256, (10, 512 // weights * size), dtype=np.uint8) & 0x3F
    file = write_blocks(tmp_path / "model.gguf", number, octets)
    monkeypatch.setattr(gguf_weights, "PIECE", 3 * 512)
    reader = object.__new__(gguf_weights.GgufWeights)
    reader.file, reader.sources, reader.shapes = GgufFile(file), {"x.weight": "x.weight"}, {"x.weight": (10, 512)}
    reader.model_type, reader.family = gguf_weights.find_family(reader.file)
    reader.config = {"model_type": reader.model_type}
    pieces = list(reader.pieces("x.weight"))
    assert [len(piece) for piece in pieces] == [3, 3, 3, 1]
    expected = gguf.quants.dequantize(octets, gguf.GGMLQuantizationType(number))
    assert np.array_equal(torch.cat(pieces).numpy(), expected)


def write_blocks(file: Path, number: int, octets: np.ndarray) -> Path:
    """A file with one tensor of any type."""
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_tensor("x.weight", octets, raw_dtype=gguf.GGMLQuantizationType(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# Tokenizers -----------------------------------------------------------------------------------------------------------


def test_byte_level_tokens_are_the_same(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _, file = make_file(make_model, tokenizer, tmp_path, "F32")
    back = models.load_tokenizer(models.resolve(str(file)))
    for text in TEXTS:
        assert back(text).input_ids == tokenizer(text).input_ids
        assert back.decode(back(text).input_ids) == text
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (0, 1, 1)


def test_names_of_patterns_are_found() -> None:
    """Each name that is written is read as the same pattern; others share it, and unknown ones are none."""
    for (steps, whole_words), name in PATTERNS.items():
        found = find_pre_tokenizer(name)
        assert found is not None
        assert (found.steps, found.whole_words) == (steps, whole_words)
    assert find_pre_tokenizer("starcoder") == find_pre_tokenizer("smollm")
    assert find_pre_tokenizer("glm4") is not None
    assert find_pre_tokenizer("glm4").whole_words  # type: ignore[union-attr]
    assert find_pre_tokenizer("kimi-k2") is None


def joined_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE as llama.cpp has it: the neighbours whose union scores highest, the first ones of them."""
    pieces = list(text)
    while True:
        unions = [(scores.get(a + b), -at) for at, (a, b) in enumerate(itertools.pairwise(pieces))]
        known = [(score, at) for score, at in unions if score is not None]
        if not known:
            return pieces
        at = -max(known)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_joins_by_score(tmp_path: Path, prefix: bool) -> None:
    """A random vocabulary: bytes for what it lacks, user-defined tokens before all, a space where the file says so."""
    draw = random.Random(3)
    letters = ["\u2581", *"abcd"]
    words = {"".join(draw.choices(letters, k=draw.randint(2, 5))) for _ in range(150)}
    pieces = [*letters, *sorted(words)]
    draw.shuffle(pieces)
    scores = {piece: -float(number) for number, piece in enumerate(pieces)}
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    tokens = ["<unk>", "<s>", "</s>", "  ", *octets, *pieces]
    types = [2, 3, 3, 4, *[6] * 256, *[1] * len(pieces)]
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 260 + [scores[piece] for piece in pieces])
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = GgufTokenizer(GgufFile(file)).tokenizer_json()
    ours = Tokenizer.from_str(json.dumps(content))
    numbers = {token: number for number, token in enumerate(tokens)}
    for _ in range(200):
        text = "".join(draw.choices([*"abcd", " ", "\u00e9", "  "], k=draw.randint(0, 12)))
        expected = [1]
        for index, part in enumerate(text.split("  ")):
            expected += [numbers["  "]] * (index > 0)
            marked = (" " * prefix + part if part else "").replace(" ", "\u2581")
            for piece in joined_by_score(marked, scores):
                if piece in numbers:
                    expected.append(numbers[piece])
                else:
                    expected += [numbers[f"<0x{octet:02X}>"] for octet in piece.encode()]
        assert ours.encode(text).ids == expected, text
        assert ours.decode(ours.encode(text).ids) == text or "  " in text


def test_ends_template_and_sampling_come_along(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    template = "{{ messages[0]['content'] }}<s>"
    model, _ = make_file(make_model, tokenizer, tmp_path, "F32")
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    own.chat_template = template
    file = write_gguf_of(model, own, tmp_path / "chat.gguf")
    content = extended(file, {"general.sampling.temp": 0.6, "tokenizer.ggml.eot_token_id": 7})
    folder = models.resolve(str(content))
    assert models.load_tokenizer(folder).chat_template == template
    settings = models.generation_config(folder)
    assert settings is not None
    assert settings.eos_token_id == [1, 7]
    assert settings.temperature == 0.6
    assert settings.do_sample


def extended(file: Path, values: dict[str, Any]) -> Path:
    """A copy of a file with further metadata."""
    reader = gguf.GGUFReader(file)
    target = file.with_name("extended.gguf")
    old = GgufFile(file)
    writer = gguf.GGUFWriter(target, old.metadata["general.architecture"])
    for key, value in {**old.metadata, **values}.items():
        if key != "general.architecture":
            add_value(writer, key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


# The folder -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quantized(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The GGUF file of a tiny Llama in Q4_0."""
    return make_file(make_model, tokenizer, tmp_path, "Q4_0")[1]


def test_a_file_is_dequantized_once(quantized: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.resolve(str(quantized))
    assert folder.parent == cache
    monkeypatch.setattr(gguf_teacher, "_folders", {})  # as another process
    monkeypatch.setattr(gguf_teacher, "_convert", None)
    assert models.resolve(str(quantized)) == folder
    monkeypatch.undo()


def test_who_was_killed_begins_again(quantized: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(gguf_weights.GgufWeights, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            models.resolve(str(quantized))
    assert not list(cache.glob("model-*"))
    folder = models.resolve(str(quantized))
    before = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    with (folder / "model.safetensors").open("r+b") as file:  # somebody's disk was full
        file.truncate(1000)
    assert models.resolve(str(quantized)) == folder
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_said_before_anything_is_written(
    quantized: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(quantized.parent))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 100, 100))
        with pytest.raises(UserError, match=r"takes [\d,]+ bytes when dequantized, and .* has 100 left"):
            gguf_teacher.folder_of_gguf(quantized)
    assert not list(cache.rglob("*.safetensors"))
    assert gguf_teacher.folder_of_gguf(quantized).is_dir()


def test_a_changed_file_is_another_teacher(quantized: Path) -> None:
    first = models.resolve(str(quantized))
    content = bytearray(quantized.read_bytes())
    content[-100] ^= 1
    quantized.write_bytes(content)
    second = models.resolve(str(quantized))
    assert first != second
    assert models.fingerprint(first) != models.fingerprint(second)


def refusal(file: Path) -> UserError:
    with pytest.raises(UserError) as refused:
        models.resolve(str(file))
    return refused.value


def test_what_cannot_be_a_teacher_is_refused(quantized: Path, cache: Path, tmp_path: Path) -> None:
    """In one sentence, and nothing is left behind."""
    content = quantized.read_bytes()
    file = tmp_path / "bad.gguf"
    for size in (0, 3, 100, len(content) // 2, len(content) - 500):
        file.write_bytes(content[:size])
        if not size:
            assert "is an empty file" in refusal(file).message
        elif size < 4:
            assert "is a file; a model is a folder" in refusal(file).message
        else:
            assert "is damaged or no GGUF file" in refusal(file).message
    name = struct.pack("<Q", 5)
    file.write_bytes(content.replace(name + b"llama", name + b"mamba"))
    assert "is of the architecture mamba, and only exaone4, gemma, " in refusal(file).message
    file.write_bytes(content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    assert "lacks blk.1.attn_q.weight" in refusal(file).message
    file.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_pu.weight"))
    assert "lacks blk.1.ffn_up.weight" in refusal(file).message
    for values, said in (
        ({"llama.expert_count": 4}, "llama.expert_count 4, which is not read here"),
        ({"llama.attention.head_count": [1, 2]}, "its llama.attention.head_count is [1, 2]"),
        ({"llama.rope.scaling.type": "dynamic"}, "in the way 'dynamic'"),
        ({"llama.feed_forward_length": 161}, "and its metadata say"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "by the pattern 'kimi-k2'"),
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of the kind 'bert'"),
        ({"tokenizer.ggml.merges": ["a qqq"]}, "its merge 'a qqq'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "the token 'a' twice"),
    ):
        assert said in refusal(extended(quantized, values)).message
    assert not list(cache.glob("*"))


def test_the_extra_is_named(run: Run, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package gguf: one sentence that says how to install it."""
    for name in ("edgerazor.models.gguf_weights", "edgerazor.models.gguf_tokenizer", "edgerazor.untrusted.gguf_file"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    said = run("pack", quantized, "--bits", 4, "--work", quantized.parent / "work")
    assert said.code == 1
    assert "gguf" in said.err
    assert len(said.err.strip().splitlines()) <= 3


# Commands -------------------------------------------------------------------------------------------------------------


def test_pack_rounds_a_file_or_takes_it_as_it_is(run: Run, quantized: Path, tmp_path: Path) -> None:
    """With --bits it is a teacher, which is said; without, its codes are taken."""
    rounded = run("pack", quantized, "--bits", 4, "--work", tmp_path / "rounded", "--json")
    assert rounded.code == 0, rounded.err
    assert rounded.json()["source"] == "teacher"
    assert rounded.err.count("teacher: dequantized from Q4_0") == 1
    taken = run("pack", quantized, "--work", tmp_path / "taken", "--json")
    assert taken.code == 0, taken.err
    assert taken.json()["importer"] == "gguf"
    alone = run("eval", quantized, "--held-out", tmp_path / "none.txt")
    assert alone.code != 0
    assert "Traceback" not in alone.err


@pytest.mark.slow
def test_a_whole_job_of_a_file(run: Run, quantized: Path, text_file: Path, tmp_path: Path) -> None:
    """Calibrate, distill, pack, eval, bench; a renewed command changes nothing."""
    recipe = write_recipe(tmp_path / "recipe.yaml", quantized, text_file)
    work = tmp_path / "work"
    done = run("run", recipe, "--work", work)
    assert done.code == 0, done.err
    assert done.err.count("teacher: dequantized from Q4_0") == 1
    again = run("distill", quantized, "--work", work)
    assert again.code == 0
    assert "up to date" in again.err
