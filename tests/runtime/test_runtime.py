"""Running packed models: both engines compute what transformers computes, in pieces or as a whole."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import edgerazor
from edgerazor import families, formats, kernels, packed, pipeline, runtime, transformers_plugin
from edgerazor.console import Console
from edgerazor.errors import FAILED, USAGE, UserError
from edgerazor.formats import MatrixSpec
from edgerazor.kernels import native
from edgerazor.kernels.decoder import SequenceSpan
from edgerazor.kernels.memory import HUGE_PAGE
from edgerazor.recipe import build
from edgerazor.runtime import network, weight_memory
from edgerazor.runtime.native_model import NativeModel
from edgerazor.workdir import WorkDir
from helpers.packed_folders import SETTINGS, all_of, suitable_model, write_packed
from helpers.places import ROOT
from helpers.tiny_models import (
    FAMILIES,
    GEMMA4,
    GRANITE,
    GRANITE_HYBRID,
    GROUP_SIZE,
    LFM2,
    QWEN3_5,
    SHAPE,
    VOCABULARY,
    ModelMaker,
    mostly_slow,
)

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

RECIPES = ROOT / "recipes"
QUIET = Console(quiet=True)
IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))

needs_native = pytest.mark.skipif(native.library() is None, reason="the native library is not built")

ROPE = {"rope_theta": 1e4, "factor": 4.0}
OF_ROPE: dict[str, dict[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {"original_max_position_embeddings": 32},
    "llama3": {"original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.5 + 0.5 * i for i in range(8)],
    },
}
#: Granite 4 without Mamba-2.
NANO: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
#: name -> model type, and what is special about it beyond `SHAPE`.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "mistral", "smollm2", "smollm3", "olmo2")},
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, a key head for each": ("llama", {"num_key_value_heads": 6, "head_dim": 20}),
    **{
        f"llama, {name}": ("llama", {"rope_parameters": {"rope_type": name, **ROPE, **more}})
        for name, more in OF_ROPE.items()
    },
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3, bias, window": ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "smollm3, biases, window": (
        "smollm3",
        {
            "no_rope_layers": [0, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "olmo2, bias": ("olmo2", {"attention_bias": True, "num_key_value_heads": 3}),
    "olmo": ("olmo", {}),
    **{name: FAMILIES[name] for name in ("gemma", "gemma2", "gemma3", "phi3")},
    "gemma2, no caps, untied": (
        "gemma2",
        {
            **{"sliding_window": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
            **{"query_pre_attn_scalar": 30, "tie_word_embeddings": False, "attention_bias": True},
        },
    ),
    "gemma3, one kind of layer": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
    "phi3, partial, longrope": (
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "sliding_window": 7,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0 + 0.1 * i for i in range(4)],
                "long_factor": [1.5 + 0.5 * i for i in range(4)],
            },
        },
    ),
    "granite": FAMILIES["granite"],
    "granite 4, attention alone": ("granitemoehybrid", {**GRANITE_HYBRID, **NANO, "position_embedding_type": "rope"}),
    "granite-hybrid": FAMILIES["granite-hybrid"],
    "granite 4, experts, bounds": (
        "granitemoehybrid",
        {
            **{**GRANITE_HYBRID, "mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_n_groups": 1},
            **{"num_local_experts": 5, "num_experts_per_tok": 2, "position_embedding_type": "rope"},
            **{"time_step_limit": (0.3, 1.2), "intermediate_size": 53, "tie_word_embeddings": True},
        },
    ),
    "granite 4, no positions": ("granitemoehybrid", {**GRANITE_HYBRID, **NANO, "attention_bias": True}),
    "exaone4, no windows": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    **{
        name: FAMILIES[name]
        for name in ("exaone4", "hunyuan", "olmo3", "ministral3", "starcoder2", "lfm2", "lfm3", "qwen3.5")
    },
    "hunyuan, alpha": (
        "hunyuan_v1_dense",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}},
    ),
    "lfm2, bias": ("lfm2", {**LFM2, "conv_bias": True, "tie_word_embeddings": False, "conv_L_cache": 5}),
    "qwen3.5, tied": (
        "qwen3_5_text",
        {
            **QWEN3_5,
            "linear_num_key_heads": 3,
            "tie_word_embeddings": True,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "linear_attention"],
        },
    ),
    "olmoe": ("olmoe", EXPERTS),
    "olmoe, normalized": ("olmoe", {**EXPERTS, "norm_topk_prob": True, "num_experts": 20, "num_experts_per_tok": 7}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 53}),
    "qwen3_moe, normalized, a dense layer": (
        "qwen3_moe",
        {**EXPERTS, "moe_intermediate_size": 40, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "granitemoe": ("granitemoe", {**GRANITE, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "lfm2_moe": ("lfm2_moe", {**LFM2, **EXPERTS, "moe_intermediate_size": 53, "num_dense_layers": 1}),
    "lfm2_moe, no bias": (
        "lfm2_moe",
        {
            **{**LFM2, **EXPERTS, "moe_intermediate_size": 40, "num_dense_layers": 0, "use_expert_bias": False},
            **{"norm_topk_prob": False, "routed_scaling_factor": 1.7},
        },
    ),
    "gemma4": FAMILIES["gemma4"],
    "gemma4, no inputs, values are keys": (
        "gemma4_text",
        {
            **{**GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
            **{"num_kv_shared_layers": 0, "tie_word_embeddings": False, "final_logit_softcapping": None},
        },
    ),
    "gemma4, experts beside an MLP": (
        "gemma4_text",
        {**GEMMA4, "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 53},
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
}
#: Their parts are those of others, or checked by other tests, too.
RARER = {
    *("gemma", "gemma2, no caps, untied", "gemma3, one kind of layer", "hunyuan, alpha", "lfm2, bias"),
    *(
        "granite 4, no positions",
        "ministral3",
        "olmo3",
        "phi3, partial, longrope",
        "qwen3.5, tied",
        "starcoder2",
        "granite",
    ),
    *("lfm2_moe, no bias", "olmoe, normalized", "qwen3_moe, normalized, a dense layer"),
}
NAMES = mostly_slow(VARIANTS, *(VARIANTS.keys() - RARER))
EXACT, EIGHT, FOUR = (16, 16), (8, 8), (8, 4)


@dataclass
class Packer:
    """Makes packed folders of tiny random models, each once."""

    make_model: ModelMaker
    place: Path

    def __call__(self, name: str, bits: tuple[int, int] = EIGHT, **calibrate: Any) -> Path:
        """The variant of that name, with so many bits of activations and cache."""
        kind, special = VARIANTS[name]
        work = WorkDir(self.place / f"{name} {bits} {sorted(calibrate.items())}")
        if not work.folder("pack").exists():
            self.make_model(self.place / name, CONFIG_MAPPING[kind](**{**SHAPE, **special}))
            settings = {"activation_bits": bits[0], "kv_bits": bits[1], "group_size": GROUP_SIZE, **calibrate}
            pack(self.place / name, work, {"bits": 2.5, **settings})
        return work.folder("pack")


def pack(model: Path, work: WorkDir, calibrate: dict[str, Any]) -> None:
    """Round a model to nearest, without training."""
    recipe = build({"model": str(model), "device": "cpu", "calibrate": calibrate, "pack": {"source": "teacher"}})
    pipeline.run("pack", recipe, work, QUIET)


@pytest.fixture(scope="module")
def packer(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Packer:
    return Packer(make_model, tmp_path_factory.mktemp("runtime"))


def both(folder: Path) -> tuple[NativeModel, runtime.Model]:
    """The same model in both engines."""
    native_one = runtime.load(folder, threads=1, engine="native")
    assert isinstance(native_one, NativeModel)
    return native_one, runtime.load(folder, threads=1, engine="transformers")


def relative(found: Tensor, expected: Tensor) -> float:
    """Distance in units of the length."""
    return float((found - expected).norm() / expected.norm())


# --- what every engine does -------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, packer: Packer) -> Path:
    return packer(request.param, bits=EIGHT)


@pytest.fixture(scope="module", params=["transformers", pytest.param("native", marks=needs_native)])
def model(request: pytest.FixtureRequest, folder: Path) -> runtime.Model:
    return runtime.load(folder, threads=2, engine=request.param)


@torch.no_grad()
def test_logits_are_those_of_transformers(folder: Path, model: runtime.Model) -> None:
    expected = transformers_plugin.load(folder)[0](input_ids=IDS, use_cache=False).logits
    assert relative(model.logits(IDS), expected) < 1e-2
    assert relative(model.logits(IDS[0].tolist(), last=3), expected[0, -3:]) < 1e-2
    assert model.logits(IDS[0].tolist(), last=3).shape == (3, VOCABULARY)


def test_a_sequence_in_pieces(model: runtime.Model) -> None:
    ids = IDS[0].tolist()
    expected = model.logits(ids)
    session = model.session()
    for start, end in ((0, 1), (1, 9), (9, 10), (10, 24)):
        assert relative(session.feed(ids[start:end]), expected[end - 1]) < 1e-2
        assert session.position == end
    for position in (20, 7, 0):
        session.rewind(position)
        assert session.position == position
        assert relative(session.feed(ids[position:]), expected[-1]) < 1e-2


def by_argmax(model: runtime.Model, ids: list[int], count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        found.append(int(model.logits([*ids, *found], last=1).argmax()))
    return found


def test_greedy_is_a_loop_of_argmax(model: runtime.Model) -> None:
    ids = IDS[0].tolist()
    expected = by_argmax(model, ids, 12)
    session = model.session()
    session.feed(ids)
    assert session.greedy(5) == expected[:5]
    assert session.greedy(0) == []
    assert session.greedy(7) == expected[5:]
    assert session.ids == ids + expected
    session.rewind(26)
    assert session.greedy(4) == expected[2:6]
    session.rewind(25)
    session.feed(expected[1:3])
    stop = expected[5]
    assert session.greedy(12, [stop, VOCABULARY - 1, -1, 10**10]) == expected[3 : 1 + expected.index(stop, 3)]


def check_scores(
    model: runtime.Model, requests: list[tuple[list[int], list[list[int]]]], tolerance: float
) -> list[list[runtime.Score]]:
    """Scores against the softmax of whole sequences."""
    scores = model.score(requests)
    assert [len(each) for each in scores] == [len(continuations) for _, continuations in requests]
    for (prefix, continuations), found in zip(requests, scores, strict=True):
        for continuation, score in zip(continuations, found, strict=True):
            chances = model.logits([*prefix, *continuation[:-1]], last=len(continuation)).log_softmax(-1)
            expected = sum(float(chance[token]) for chance, token in zip(chances, continuation, strict=True))
            assert score.log_probability == pytest.approx(expected, rel=tolerance, abs=tolerance)
            assert score.greedy == (chances.argmax(-1).tolist() == continuation)
    return scores


def requests_for(model: runtime.Model) -> list[tuple[list[int], list[list[int]]]]:
    ids = IDS[0].tolist()
    best = by_argmax(model, ids[:9], 3)
    other = [best[0], best[1], (best[2] + 1) % VOCABULARY]
    several = [(ids[:count], [ids[count:], ids[:3]]) for count in (17, 20, 22)]
    if model.engine == "native":
        several *= 9  # more than one call of the decoder
    return [(ids[:9], [ids[9:12], best, other, [7], [8], best[:1]]), (ids[:1], [ids[1:9]]), (ids[:5], []), *several]


def test_scores_are_log_probabilities(model: runtime.Model) -> None:
    scores = check_scores(model, requests_for(model), 2e-2)
    assert [each.greedy for each in scores[0]] == [False, True, False, False, False, True]
    assert model.score([]) == []


def test_what_is_asked_wrongly(model: runtime.Model) -> None:
    most = model.max_positions
    assert most == SHAPE["max_position_embeddings"]
    assert model.vocabulary == VOCABULARY
    session = model.session()
    asked: list[tuple[Callable[[], Any], str]] = [
        (lambda: model.logits([]), "at least 1"),
        (lambda: model.logits([VOCABULARY]), f"no token {VOCABULARY}"),
        (lambda: model.logits([-1]), "no token -1"),
        (lambda: model.logits([2] * (most + 1)), "too long"),
        (lambda: model.logits([2, 3], last=3), "last 3 of 2"),
        (lambda: model.score([([], [[2]])]), "at least one token"),
        (lambda: model.score([([2], [[]])]), "at least one token"),
        (lambda: model.score([([2], [[VOCABULARY]])]), "no token"),
        (lambda: session.feed([]), "no token to feed"),
        (lambda: session.greedy(1), "nothing to continue"),
        (lambda: session.rewind(1), "cannot go back"),
        (lambda: session.feed([[2, 3]]), "whole numbers"),  # type: ignore[list-item]
    ]
    for ask, about in asked:
        with pytest.raises(UserError, match=about) as caught:
            ask()
        assert caught.value.code == USAGE
    session.feed([2] * (most - 1))
    assert len(session.greedy(5)) == 1
    with pytest.raises(UserError, match="too long"):
        session.feed([2])


def test_loading_is_asked_wrongly(folder: Path, llama: Path) -> None:
    asked: list[tuple[Callable[[], Any], str]] = [
        (lambda: edgerazor.load(folder, engine="fast"), "no engine called 'fast'"),
        (lambda: edgerazor.load(folder, threads=0), "1 to 1024 threads, not 0"),
        (lambda: edgerazor.load(llama), "not a packed model"),
    ]
    for ask, about in asked:
        with pytest.raises(UserError, match=about):
            ask()


def test_sizes(folder: Path, model: runtime.Model) -> None:
    assert edgerazor.load(folder).folder == folder
    if model.engine == "native" and model.kernel not in kernels.EXPANDED:
        opened = packed.PackedModel.open(folder)
        held = {
            name: sum(part.nbytes for key, part in opened.parts(name).items() if key != formats.ROW_FORMATS)
            for name in opened.header.matrices
        }
        assert model.weight_bytes - model.bytes_per_token == held["model.embed_tokens"]
        rest = model.weight_bytes - sum(held.values()) - sum(each.nbytes for each in opened.others().values())
        assert rest == 4 * sum(  # the places of rows
            opened.header.matrices[name].shape[0] for name in held if opened.spec(name).row_formats is not None
        )
    assert 0 < model.bytes_per_token < model.weight_bytes
    # 2 layers, 2 heads of 16 features: keys and values of 8 bits with a float32 scale, or float32.
    assert model.cache_bytes_per_token == 2 * 2 * 2 * (16 + 4 if model.engine == "native" else 64)
    assert model.kernel == kernels.name()
    assert model.tokenizer.decode(model.tokenizer("Nora took the ball.").input_ids) == "Nora took the ball."


# --- the native engine against transformers ----------------------------------------------------


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_with_16_bits(packer: Packer, name: str) -> None:
    ours, theirs = both(packer(name, bits=EXACT))
    assert ours.note is None
    assert relative(ours.logits(IDS), theirs.logits(IDS)) < 1e-4


@needs_native
@pytest.mark.parametrize("bits", [EIGHT, FOUR], ids=["kv8", "kv4"])
@pytest.mark.parametrize("name", NAMES)
def test_with_rounded_activations_and_cache(packer: Packer, name: str, bits: tuple[int, int]) -> None:
    """A number at the boundary between two codes may go either way, and then all that follows differs a little.

    More where codes are of 4 bits, of which one is a seventh of the largest number.
    """
    ours, theirs = both(packer(name, bits=bits))
    found, expected = ours.logits(IDS), theirs.logits(IDS)
    assert relative(found, expected) < (1e-2 if bits == EIGHT else 3e-2)
    chances, of_ours = expected.log_softmax(-1), found.log_softmax(-1)
    assert float((chances.exp() * (chances - of_ours)).sum(-1).mean()) < 1e-3


def layers_of(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What enters and leaves the layers of a model of transformers, [B, T, hidden]."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@needs_native
@pytest.mark.parametrize("bits", [EXACT, EIGHT, FOUR], ids=["16", "kv8", "kv4"])
@pytest.mark.parametrize("name", NAMES)
def test_each_layer_alone(packer: Packer, name: str, bits: tuple[int, int]) -> None:
    folder = packer(name, bits=bits)
    if name in ("gemma4", "gemma4, experts beside an MLP"):
        pytest.skip("its layers have inputs beside hidden states")
    ours = runtime.load(folder, threads=2, engine="native")
    assert isinstance(ours, NativeModel)
    decoder = ours.decoder()
    decoder.set_rope(*ours.rotary.tables(0, 24))
    decoder.reserve(64)
    decoder.reserve_states(1)
    spans = [SequenceSpan(0, 0, 0, 0, 24), SequenceSpan(0, 0, 32, 0, 24)]
    for index, (before, expected) in enumerate(layers_of(transformers_plugin.load(folder)[0], IDS)):
        found = decoder.layer(index, spans, before.flatten(0, 1)).view(expected.shape)
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)  # [B, T]
        # A code that goes the other way shows in its token, and in those that see it.
        assert float((errors < 1e-5).float().mean()) >= (1 if bits == EXACT else 0.8)
        assert float(errors.max()) < 5e-2


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_sequences_in_pieces_with_16_bits(packer: Packer, name: str) -> None:
    """Pieces, prefixes and steps see the same cache. (LongRoPE and dynamic frequencies have a test of their own.)"""
    ours = runtime.load(packer(name, bits=EXACT), threads=1, engine="native")
    ids = IDS[0].tolist()
    if not ours.rotary.varies(len(ids)):  # type: ignore[attr-defined]
        whole, session = ours.logits(ids), ours.session()
        for start, end in ((0, 3), (3, 19), (19, 20), (20, 24)):
            assert relative(session.feed(ids[start:end]), whole[end - 1]) < 1e-5
        session.rewind(18)
        assert relative(session.feed(ids[18:]), whole[-1]) < 1e-5
    check_scores(ours, requests_for(ours)[:5], 1e-4)


@needs_native
@pytest.mark.parametrize("name", ["llama, dynamic", "llama, longrope"])
def test_frequencies_that_depend_on_the_length(packer: Packer, name: str, tmp_path: Path) -> None:
    """Beyond the positions of training both engines turn later tokens otherwise than earlier ones."""
    folder = shutil.copytree(packer(name, bits=EXACT), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    ours, theirs = both(folder)
    ids = IDS.flatten().tolist()
    assert theirs.max_positions == ours.max_positions == (64 if "dynamic" in name else 16)
    if "longrope" in name:
        ours.max_positions = theirs.max_positions = 64
    for count in (15, 16, 17, 40):
        assert relative(ours.logits(ids[:count]), theirs.logits(ids[:count])) < 1e-4
    sessions = ours.session(), theirs.session()
    for start, end in ((0, 12), (12, 16), (16, 17), (17, 18), (18, 30)):
        found, expected = (session.feed(ids[start:end]) for session in sessions)
        assert relative(found, expected) < 1e-4
    assert sessions[0].greedy(6) == sessions[1].greedy(6)
    check_scores(ours, [(ids[:10], [ids[10:14], ids[10:20]]), (ids[:6], [ids[6:9]])], 1e-4)


@needs_native
@pytest.mark.parametrize("isa", native.isas())
def test_every_instruction_set(packer: Packer, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, isa)
    for bits, most in ((EXACT, 1e-4), (EIGHT, 1e-2)):
        folder = packer("qwen3", bits=bits)
        ours, theirs = both(folder)
        assert ours.kernel == isa
        logits = ours.logits(IDS)
        assert relative(logits, theirs.logits(IDS)) < most
        for mapped in (True, False):
            for threads in (1, 3):
                again = runtime.load(folder, threads, mapped, "native")
                assert torch.equal(again.logits(IDS), logits)
                assert again.weight_bytes == ours.weight_bytes


def every_format(path: str, rows: int, columns: int) -> MatrixSpec:
    """Rows of all formats in turn."""
    names = tuple(formats.names())
    return MatrixSpec(names, 32, (torch.arange(rows) % len(names)).to(torch.uint8))


@needs_native
@pytest.mark.parametrize("bits", [EIGHT, EXACT], ids=["8", "16"])
def test_every_format_and_stored_scales_of_inputs(
    make_model: ModelMaker, tmp_path: Path, bits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "activation_bits", bits[0])
    monkeypatch.setitem(SETTINGS, "kv_bits", bits[1])
    for name in ("", *formats.names()):
        folder, model = tmp_path / f"packed {name}", tmp_path / f"model {name}"
        suitable_model(make_model, model, "llama", tie_word_embeddings=name == "ternary")
        write_packed(folder, model, all_of(name) if name else every_format)
        ours, theirs = both(folder)
        assert relative(ours.logits(IDS), theirs.logits(IDS)) < (1e-4 if bits == EXACT else 1e-2)


@needs_native
@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_greedy_text_of_the_worlds_student(tmp_path: Path, bits: float) -> None:
    """A model that has learned something writes the same text in both engines, up to a choice between equals."""
    work = WorkDir(tmp_path)
    pack(RECIPES / "world" / "teacher", work, {"bits": bits})
    ours, theirs = both(work.folder("pack"))
    for prompt in ("The basket of Felix", "Old people say", "It was July, so", "Dan Park showed the", "A gray horse"):
        ids, texts = ours.tokenizer(prompt).input_ids, []
        for model in (ours, theirs):
            session = model.session()
            session.feed(ids)
            texts.append(session.greedy(40))
        parted = next((place for place, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]), None)
        if parted is not None:
            best, second = theirs.logits(torch.tensor([ids + texts[0][:parted]]), 1).flatten().topk(2).values
            assert best - second < 0.03, [ours.tokenizer.decode(text) for text in texts]


# --- weights in memory -------------------------------------------------------------------------


@needs_native
def test_matrices_lie_in_the_order_of_their_use(packer: Packer) -> None:
    opened, config = transformers_plugin.open_folder(packer("qwen3"))
    family = families.find(config.model_type)
    assert family is not None
    assert family.native is not None
    names = network.matrix_names(config, family.native, opened)
    matrices = weight_memory.load_matrices(opened, names, mapped=False, expanded=False)
    places = [each.data_ptr() for name in names for part in matrices[name].parts for each in (part.codes, part.scales)]
    assert places == sorted(places)
    assert all(place % 64 == 0 for place in places)
    assert places[0] % HUGE_PAGE == 0
    mapped = weight_memory.load_matrices(opened, names, mapped=True, expanded=False)
    expanded = weight_memory.load_matrices(opened, names, mapped=False, expanded=True)
    x = torch.randn(3, 96)
    for name in names[:3]:
        assert torch.equal(matrices[name].linear(x), mapped[name].linear(x))
        assert torch.equal(matrices[name].linear(x), expanded[name].linear(x))


@needs_native
@pytest.mark.parametrize("mapped", [True, False])
def test_damage_is_found_at_loading(packer: Packer, tmp_path: Path, mapped: bool) -> None:
    folder = shutil.copytree(packer("llama"), tmp_path / "packed")
    path = folder / "model.safetensors"
    weights = bytearray(path.read_bytes())
    name = next(each for each in load_file(path) if "layers.1.mlp.down_proj.weight" in each and "scales" not in each)
    weights[weights.index(load_file(path)[name].numpy().tobytes())] ^= 1
    path.write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj") as caught:
        runtime.load(folder, 1, mapped, "native")
    assert caught.value.code == FAILED


@needs_native
@pytest.mark.parametrize("mapped", [True, False])
def test_a_compressed_model_computes_the_same(packer: Packer, tmp_path: Path, mapped: bool) -> None:
    pytest.importorskip("zstandard")
    folder = packer("llama")
    shutil.copytree(folder, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    packed.rewrite(packed.PackedModel.open(folder), tmp_path / "small", compress=True)
    ours, small = (runtime.load(each, 1, mapped, "native") for each in (folder, tmp_path / "small"))
    assert torch.equal(small.logits(IDS), ours.logits(IDS))
    assert small.weight_bytes == ours.weight_bytes


@needs_native
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_numbers_that_begin_anywhere_in_a_file(packer: Packer, tmp_path: Path, mapped: bool, start: int) -> None:
    """Native code reads those that a processor may read: tensors of a file that another program wrote are copied."""
    folder = shutil.copytree(packer("llama"), tmp_path / "packed")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    path.write_bytes(
        (length + start).to_bytes(8, "little") + content[8 : 8 + length] + b" " * start + content[8 + length :]
    )
    ours, moved = (runtime.load(each, 1, mapped, "native") for each in (packer("llama"), folder))
    assert isinstance(moved, NativeModel)
    layer = moved.network.layers[0]
    assert layer.q is not None
    assert layer.before_mlp is not None
    assert layer.before_mlp.weight is not None
    assert layer.before_mlp.weight.data_ptr() % 4 == 0
    assert all(part.scales.data_ptr() % 2 == 0 for part in (*layer.q.matrix.parts, *layer.down.matrix.parts))
    assert torch.equal(moved.logits(IDS), ours.logits(IDS))


@needs_native
@pytest.mark.parametrize("name", packed.SETTINGS)
def test_settings_that_are_not_said(packer: Packer, tmp_path: Path, name: str) -> None:
    model = packed.PackedModel.open(packer("llama"))
    header = model.header.model_copy(update={"settings": {**model.header.settings}})
    config = transformers_plugin.open_folder(packer("llama"))[1]
    del header.settings[name], config.quantization_config[name]
    model.header = header
    with pytest.raises(UserError, match=rf"do not say for which {name} they were made\.$") as caught:
        NativeModel(model, config, 1, False)
    assert caught.value.code == FAILED


@pytest.mark.parametrize("most", [1.5, -1, "many", [8]])
@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 2.0}], ids=["default", "linear"])
def test_positions_that_are_no_number(most: Any, rope: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="how many positions there are"):
        runtime.max_positions(SimpleNamespace(max_position_embeddings=most, rope_parameters=rope))
    assert runtime.max_positions(SimpleNamespace(max_position_embeddings=8, rope_parameters=rope)) == (
        16 if rope else 8
    )


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), "a", [2]])
def test_factors_of_positions_that_are_no_number(factor: Any) -> None:
    rope = {"rope_type": "yarn", "factor": factor}
    with pytest.raises(UserError, match="how many positions there are"):
        runtime.max_positions(SimpleNamespace(max_position_embeddings=8, rope_parameters=rope))


@needs_native
@pytest.mark.parametrize("change", [{"head_dim": 1 << 33}, {"partial": 1e9}], ids=["heads", "partial"])
def test_heads_that_would_fill_the_memory(packer: Packer, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(packer("llama"), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    if "partial" in change:
        config["rope_parameters"]["partial_rotary_factor"] = change["partial"]
    else:
        config |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"a head cannot have so many features\.$|says head_dim 8589934592; expected at most"
    ):
        runtime.load(folder, 1)


@needs_native
def test_scales_that_are_none_are_refused_by_name(packer: Packer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a file whose checksums were made to match."""
    copy = packed.PackedModel.copy_parts

    def wrong(model: packed.PackedModel, name: str, places: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = copy(model, name, places)
        next(scales for part, scales in parts.items() if part.endswith(".scales"))[0, 0, 0] = -1
        return parts

    monkeypatch.setattr(packed.PackedModel, "copy_parts", wrong)
    with pytest.raises(UserError, match=r"a scale is negative or not finite"):
        runtime.load(packer("llama"), 1, engine="native")


# --- what is not native ------------------------------------------------------------------------


def noted(folder: Path, about: str) -> None:
    """transformers computes it and says why; asked for, the native engine refuses with the same reason."""
    model = runtime.load(folder, threads=1)
    assert model.engine == "transformers"
    assert model.note is not None
    assert about in model.note
    assert model.logits(IDS[0], last=1).isfinite().all()
    with pytest.raises(UserError) as caught:
        runtime.load(folder, threads=1, engine="native")
    assert about in f"{caught.value.message} {caught.value.hint}"


@needs_native
@pytest.mark.parametrize(
    ("family", "overrides", "about"),
    [
        ("phi", {}, "models of type phi"),
        ("gemma2", {"hidden_activation": "gelu"}, "activation function gelu"),
        ("llama", {"hidden_act": "gelu"}, "activation function gelu"),
        ("olmo", {"clip_qkv": 2.0}, "cut off"),
    ],
)
def test_other_architectures(
    make_model: ModelMaker, tmp_path: Path, family: str, overrides: dict[str, Any], about: str
) -> None:
    kind, special = FAMILIES.get(family, (family, {}))
    make_model(tmp_path / "model", CONFIG_MAPPING[kind](**{**SHAPE, **special, **overrides}))
    pack(tmp_path / "model", WorkDir(tmp_path / "work"), {"bits": 4.0, "group_size": GROUP_SIZE})
    noted(WorkDir(tmp_path / "work").folder("pack"), about)


@needs_native
@pytest.mark.parametrize(
    ("calibrate", "about"),
    [
        ({"query_bits": 8}, "queries in 8 bits"),
        ({"probability_bits": 8}, "attention probabilities in 8 bits"),
        ({"adaptive_tokens": "ranked"}, "tokens with bits of their own"),
    ],
)
def test_other_settings(packer: Packer, calibrate: dict[str, Any], about: str) -> None:
    noted(packer("llama", **calibrate), about)


@needs_native
def test_formats_of_blocks(make_model: ModelMaker, tmp_path: Path) -> None:
    suitable_model(make_model, tmp_path / "model", "llama")

    def blocks(path: str, rows: int, columns: int) -> MatrixSpec:
        choice = (torch.arange(rows * -(-columns // 32)) % 2).to(torch.uint8).view(rows, -1)
        return MatrixSpec(("ternary", "int4"), 32, block_formats=choice)

    write_packed(tmp_path / "packed", tmp_path / "model", blocks)
    noted(tmp_path / "packed", "formats of blocks")


@pytest.mark.parametrize("kernel", kernels.NOT_NATIVE)
def test_other_kernels(packer: Packer, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packer("llama")
    monkeypatch.setenv(kernels.VARIABLE, kernel)
    if native.library() is not None:
        noted(folder, f"{kernels.VARIABLE} asks for the kernels {kernel}")
    monkeypatch.delenv(kernels.VARIABLE)
    monkeypatch.setattr(native, "library", lambda: None)
    native.isas.cache_clear()
    try:
        noted(folder, "the native library is not built. Build it (again) with")
    finally:
        native.isas.cache_clear()


@needs_native
def test_numbers_that_are_none(packer: Packer, make_model: ModelMaker, tmp_path: Path) -> None:
    """A norm that is too large for float32 is a sentence, not a crash."""
    kind, special = VARIANTS["llama"]
    model = make_model(tmp_path / "model", CONFIG_MAPPING[kind](**{**SHAPE, **special}))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    pack(tmp_path / "model", WorkDir(tmp_path / "work"), {"bits": 4.0, "group_size": GROUP_SIZE})
    ours = runtime.load(WorkDir(tmp_path / "work").folder("pack"), threads=2, engine="native")
    for ask in (lambda: ours.logits(IDS), lambda: ours.session().feed([3]), lambda: ours.score([([2], [[3]])])):
        with pytest.raises(UserError, match="infinite or none at all"):
            ask()


# What must neither hang nor end the process --------------------------------------------------------------------------


def in_child(work: Callable[[], bool]) -> int:
    """The exit code of a fork that does this: 0 where it is so, 1 where not, 2 for an error; killed if it hangs."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(120)
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_native
def test_a_fork_computes_with_threads_of_its_own_and_refuses_sessions_of_its_parent(packer: Packer) -> None:
    ours = runtime.load(packer("llama"), threads=3, engine="native")
    tokens = IDS[0].tolist()
    expected = ours.logits(tokens)
    scores = ours.score([(tokens[:5], [tokens[5:9]])])
    session = ours.session()
    last = session.feed(tokens)

    def refused(call: Callable[[], Any]) -> bool:
        try:
            call()
        except UserError as error:
            return "belongs to the process that began it" in error.message
        return False

    def child() -> bool:
        well = refused(lambda: session.feed([3])) and refused(lambda: session.greedy(2))
        well &= torch.equal(ours.logits(tokens), expected)
        well &= ours.score([(tokens[:5], [tokens[5:9]])]) == scores
        own = ours.session()
        well &= torch.equal(own.feed(tokens), last)
        session._decoder = own._decoder  # type: ignore[attr-defined]  # the last reference to the parent's goes
        gc.collect()
        return well

    assert in_child(child) == 0
    assert torch.equal(ours.logits(tokens), expected)
    assert len(session.greedy(2)) == 2


def regions_of(tensor: Tensor) -> str:
    """What the system says of the memory that a tensor begins in: the mapped file's name, where it is one."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= tensor.data_ptr() < int(end, 16):
            return line
    return ""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to tell where memory is from")
@pytest.mark.parametrize("mmap", [False, True])
def test_norms_and_biases_are_not_read_from_the_file_again(packer: Packer, tmp_path: Path, mmap: bool) -> None:
    """A copied model needs nothing of its file; a mapped one reads matrices alone from it."""
    shutil.copytree(packer("llama, biases"), tmp_path / "packed")
    ours = runtime.load(tmp_path / "packed", threads=2, mmap=mmap, engine="native")
    expected, text = ours.logits(IDS), ours.session()
    if not mmap:
        for path in (tmp_path / "packed").glob("*.safetensors"):
            os.truncate(path, 0)
        assert torch.equal(ours.logits(IDS), expected)
        assert text.feed(IDS[0]).isfinite().all()
        assert ours.generate("Nora took", max_tokens=3).tokens
    else:
        kept = ours.network.layers[0]  # type: ignore[attr-defined]
        mapped = packed.PackedModel.open(tmp_path / "packed").others()
        assert torch.equal(kept.q.bias, mapped["model.layers.0.self_attn.q_proj.bias"])
        assert "packed" not in regions_of(kept.q.bias)
        assert "packed" not in regions_of(kept.before_mlp.weight)


@needs_native
@pytest.mark.parametrize("threads", [0, -1, 1_000_000, 10**20, 2.0, True, "2"])
def test_absurd_numbers_of_threads(packer: Packer, threads: Any) -> None:
    with pytest.raises(UserError, match="runs on 1 to 1024 threads") as caught:
        runtime.load(packer("llama"), threads=threads)
    assert caught.value.code == USAGE


@pytest.mark.parametrize("threads", [0, 1025, 1_000_000, 10**20])
def test_absurd_numbers_of_threads_in_a_recipe(threads: int) -> None:
    for values in ({"threads": threads}, {"bench": {"threads": [threads]}}):
        with pytest.raises(UserError) as caught:
            build(values, "The recipe")
        assert caught.value.code == USAGE


@pytest.mark.parametrize("engine", runtime.ENGINES)
def test_what_is_no_token_is_refused(packer: Packer, engine: str) -> None:
    if engine == "native" and native.library() is None:
        pytest.skip("the native library is not built")
    ours = runtime.load(packer("llama"), threads=1, engine=engine)
    session = ours.session()
    session.feed([2, 3])
    wrong: list[Any] = [
        *([0, 2**64], [0, 2**63], [-1], [-(2**64)], [VOCABULARY], [1.0], [True], ["1"], [None], [], 3, None, "12"),
        *(torch.tensor([1.5]), torch.tensor([True]), torch.tensor(3), [[1, 2], [3]], [[[1]]], [[1], 2], [float("nan")]),
    ]
    for ids in wrong:
        for call in (ours.logits, session.feed, lambda ids: ours.score([(ids, [[1]])])):
            with pytest.raises(UserError) as caught:
                call(ids)
            assert caught.value.code == USAGE
            assert len(caught.value.message) < 300
    for last in (0, 3, -1, 1.0, True, "1"):
        with pytest.raises(UserError, match="no logits of the last"):
            ours.logits([1, 2], last=last)  # type: ignore[arg-type]
    for call in (lambda: session.greedy(-1), lambda: session.greedy(1.5), lambda: session.rewind(0.5)):  # type: ignore
        with pytest.raises(UserError):
            call()
    nan = float("nan")
    for options in ({"temperature": nan}, {"temperature": float("inf")}, {"temperature": 1.0, "top_p": nan}):
        with pytest.raises(UserError):
            ours.generate("Nora", **options)
    for options in ({"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": 1.5}, {"repetition_penalty": nan}):
        with pytest.raises(UserError):
            ours.generate("Nora", **options)
    assert session.ids == [2, 3]
    assert ours.logits(np.array([2, 3])).shape == (2, VOCABULARY)


@needs_native
def test_logits_that_are_not_finite_at_sixteen_bits(packer: Packer, make_model: ModelMaker, tmp_path: Path) -> None:
    kind, special = VARIANTS["llama"]
    model = make_model(tmp_path / "model", CONFIG_MAPPING[kind](**{**SHAPE, **special}))
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    settings = {"bits": 4.0, "group_size": GROUP_SIZE, "activation_bits": 16, "kv_bits": 16}
    pack(tmp_path / "model", WorkDir(tmp_path / "work"), settings)
    ours = runtime.load(WorkDir(tmp_path / "work").folder("pack"), threads=2, engine="native")
    session = ours.session()
    session.ids = [2]
    calls: list[Callable[[], Any]] = [
        lambda: ours.logits([2, 3]),
        lambda: ours.score([([2, 3], [[4]])]),
        lambda: ours.session().feed([2, 3]),
        lambda: session.greedy(3),
        lambda: ours.generate("Nora took", max_tokens=2),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"infinite or none|not finite"):
            call()
