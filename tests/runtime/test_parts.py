"""Layers of other parts in the native engine: states that go back, batches, real shapes, a made-up family."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import modeling_llama

from edgerazor import families, pipeline, runtime
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.kernels import native
from edgerazor.packed import PackedModel
from edgerazor.recipe import build
from edgerazor.runtime.batching import BatchScheduler, BatchSettings, SequenceEvent, SequenceRequest
from edgerazor.runtime.native_model import KEPT_STATES, NativeModel
from edgerazor.runtime.sampling import Sampler
from edgerazor.runtime.sequential import SequentialScheduler
from edgerazor.server.engine import open_scheduler
from edgerazor.workdir import WorkDir
from helpers.tiny_models import FAMILIES, GROUP_SIZE, RECURRENT, SHAPE, VOCABULARY, ModelMaker

pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(native.library() is None, reason="the native library is not built"),
]

QUIET = Console(quiet=True)
IDS = torch.randint(2, VOCABULARY, (200,), generator=torch.Generator().manual_seed(0)).tolist()


def pack(model: Path, work: WorkDir, **calibrate: Any) -> Path:
    values = {"bits": 3.0, "group_size": GROUP_SIZE, "activation_bits": 16, "kv_bits": 16, **calibrate}
    recipe = build({"model": str(model), "device": "cpu", "calibrate": values, "pack": {"source": "teacher"}})
    pipeline.run("pack", recipe, work, QUIET)
    return work.folder("pack")


@pytest.fixture(scope="module")
def load(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NativeModel]:
    """Loads the tiny model of a family, which is packed once."""
    place = tmp_path_factory.mktemp("parts")

    @functools.cache
    def load_one(family: str) -> NativeModel:
        kind, special = FAMILIES[family]
        make_model(place / family, CONFIG_MAPPING[kind](**{**SHAPE, "max_position_embeddings": 400, **special}))
        model = runtime.load(pack(place / family, WorkDir(place / f"{family} job")), threads=2, engine="native")
        assert isinstance(model, NativeModel)
        return model

    return load_one


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) < 1e-4


# States ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RECURRENT)
def test_a_sequence_goes_back_to_where_its_state_is_and_is_not_kept(
    load: Callable[[str], NativeModel], family: str
) -> None:
    model = load(family)
    expected = model.logits(IDS)
    session = model.session()
    ends = [1, 2, 40, 41, 60, 61, 62, 130, 150, 200]
    for begin, end in zip([0, *ends], ends, strict=False):
        assert near(session.feed(IDS[begin:end]), expected[end - 1])
    for position in (199, 151, 140, 130, 41, 3, 1, 0):
        session.rewind(position)
        assert near(session.feed(IDS[position : position + 1]), expected[position])
    session.rewind(0)
    session.feed(IDS[:120])
    session.rewind(100)
    assert near(session.feed([7, *IDS[101:110]]), model.logits([*IDS[:100], 7, *IDS[101:110]])[-1])


@pytest.mark.parametrize("family", RECURRENT)
def test_greedy_text_with_rewinding(load: Callable[[str], NativeModel], family: str) -> None:
    model = load(family)
    expected = IDS[:20]
    for _ in range(100):  # the model repeats itself, but computes each token again
        expected = [*expected, int(model.logits(expected, last=1).argmax())]
    session = model.session()
    session.feed(IDS[:20])
    assert session.greedy(100) == expected[20:]
    for position in (119, 110, 60, 21, 20):
        session.rewind(position)
        count = min(10, len(expected) - position)
        assert session.greedy(count) == expected[position : position + count]
    session.rewind(20)
    session.greedy(90)
    session.rewind(70)
    stop = expected[75]
    found = session.greedy(50, [stop])
    assert found == expected[70 : 1 + expected.index(stop, 70)]
    assert session.greedy(5) == expected[70 + len(found) : 75 + len(found)]


@pytest.mark.parametrize("family", RECURRENT)
def test_states_cost_no_more_behind_a_long_text(load: Callable[[str], NativeModel], family: str) -> None:
    session = load(family).session()
    session.feed(IDS)
    decoder = session._decoder  # type: ignore[attr-defined]
    assert decoder.states == 1 + KEPT_STATES
    before = decoder.state_bytes()
    session.greedy(100)
    assert decoder.state_bytes() == before > 0
    assert decoder.network.kv_slot_bytes() == 2 * 4 * 16 * 2 * sum(
        layer.mixer is None for layer in decoder.network.layers
    )


@pytest.mark.parametrize("family", RECURRENT)
def test_scores_begin_with_the_state_of_the_prefix(
    load: Callable[[str], NativeModel], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(family)
    for at_once in (512, 16):  # in one call, and in pieces
        monkeypatch.setattr(runtime.native_model, "CALL_TOKENS", at_once)
        for prefix in (IDS[:9], IDS[:1]):
            continuations = [IDS[20:25], [3], [3, 4], IDS[30:41], IDS[50:53]]
            [scores] = model.score([(prefix, continuations)])
            for tokens, score in zip(continuations, scores, strict=True):
                chances = model.logits([*prefix, *tokens[:-1]], last=len(tokens)).log_softmax(-1)
                expected = sum(float(row[token]) for row, token in zip(chances, tokens, strict=True))
                assert score.log_probability == pytest.approx(expected, rel=1e-4, abs=1e-4)


# Tables of which a token reads a row ---------------------------------------------------------------------------------


def test_a_token_reads_one_row_of_a_second_table(load: Callable[[str], NativeModel]) -> None:
    model = load("gemma4")
    packed = PackedModel.open(model.folder)
    sizes = {name: packed.spec(name).packed_bytes(entry.shape) for name, entry in packed.header.matrices.items()}
    other = runtime.load(model.folder, threads=1, engine="transformers")
    for engine in (model, other):
        assert engine.weight_bytes > sum(sizes.values())
        unread = engine.weight_bytes - engine.bytes_per_token
        assert unread == pytest.approx(sizes["model.embed_tokens_per_layer"], rel=0.05)


# Batches --------------------------------------------------------------------------------------------------------------


def texts(scheduler: Any, model: NativeModel) -> list[list[int]]:
    """What three prompts with a common beginning are continued with."""
    written: list[list[int]] = [[], [], []]
    for number, tokens in enumerate(written):

        def add(event: SequenceEvent, tokens: list[int] = tokens) -> None:
            if event.token is not None:
                tokens.append(event.token)

        settings = build({"generate": {"temperature": 0.0}}).generate
        sampler = Sampler(settings, 0, model.vocabulary)
        prompt = [*IDS[:70], *IDS[80 : 81 + number]]
        scheduler.submit(SequenceRequest(prompt, sampler, 12, frozenset()), add)
    assert scheduler.drain(60)
    return written


def alone(model: NativeModel) -> list[list[int]]:
    found = []
    for number in range(3):
        session = model.session()
        session.feed([*IDS[:70], *IDS[80 : 81 + number]])
        found.append(session.greedy(12))
    return found


@pytest.fixture
def scheduler(load: Callable[[str], NativeModel], request: pytest.FixtureRequest) -> Iterator[Any]:
    opened = open_scheduler(load(request.param), BatchSettings(max_sequences=2, prefill_tokens=32))
    yield opened
    opened.close()


@pytest.mark.parametrize("scheduler", ["gemma3", "gemma2", "phi3", "gemma4"], indirect=True)
def test_sequences_in_batches(scheduler: BatchScheduler) -> None:
    assert isinstance(scheduler, BatchScheduler)
    assert texts(scheduler, scheduler.model) == alone(scheduler.model)


@pytest.mark.parametrize("scheduler", RECURRENT, indirect=True)
def test_models_with_states_write_one_text_after_the_other(scheduler: SequentialScheduler) -> None:
    assert isinstance(scheduler, SequentialScheduler)
    model = scheduler.model
    assert isinstance(model, NativeModel)
    assert texts(scheduler, model) == alone(model)
    with pytest.raises(UserError, match="layers keep states"):
        BatchScheduler(model, BatchSettings())


# Shapes of real models ------------------------------------------------------------------------------------------------

#: Heads and widths of real models, with few layers and a small vocabulary.
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 3 270M": (
        "gemma3_text",
        {
            **{"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1},
            **{"head_dim": 256, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
        },
    ),
    "Gemma 4 E2B": (
        "gemma4_text",
        {
            **{"hidden_size": 1536, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 1},
            **{"head_dim": 256, "global_head_dim": 512, "sliding_window": 512, "num_kv_shared_layers": 1},
            **{"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            **{"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": VOCABULARY},
            **{"use_double_wide_mlp": True, "final_logit_softcapping": 30.0},
        },
    ),
    "Gemma 2 2B": (
        "gemma2",
        {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    ),
    "Phi 4 mini": (
        "phi3",
        {
            **{"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 6, "num_key_value_heads": 2},
            **{"head_dim": 128, "partial_rotary_factor": 0.75},
        },
    ),
    "Granite 4 350M": (
        "granite",
        {
            **{"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4},
            **{"head_dim": 64, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0},
            **{"residual_multiplier": 0.246, "logits_scaling": 4.0},
        },
    ),
    "Granite 4 H 350M": (
        "granitemoehybrid",
        {
            **{"hidden_size": 768, "shared_intermediate_size": 2048, "num_attention_heads": 12, "head_dim": 64},
            **{"num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
            **{"mamba_n_heads": 48, "mamba_d_head": 32, "mamba_d_state": 128, "num_local_experts": 0},
            **{"attention_multiplier": 0.015625, "embedding_multiplier": 12.0},
            **{"residual_multiplier": 0.246, "logits_scaling": 3.0},
        },
    ),
    "Hunyuan 0.5B": (
        "hunyuan_v1_dense",
        {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128},
    ),
    "LFM 2 350M": (
        "lfm2",
        {
            **{"hidden_size": 1024, "intermediate_size": 6656, "num_attention_heads": 16, "num_key_value_heads": 8},
            **{"head_dim": 64, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
        },
    ),
    "Qwen 3.5 0.8B": (
        "qwen3_5_text",
        {
            **{"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2},
            **{"head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16},
            **{"layer_types": ["linear_attention", "full_attention"]},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", REAL)
def test_shapes_of_real_models(make_model: ModelMaker, tmp_path: Path, name: str, tied: bool) -> None:
    kind, special = REAL[name]
    config = CONFIG_MAPPING[kind](**{**SHAPE, **special, "tie_word_embeddings": tied})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if kind == "gemma4_text" and path.endswith("q_norm.weight"):  # nothing else makes its scores small
                parameter.mul_(parameter.numel() ** -0.5)
    make_model(tmp_path / "tokenizer", "llama")
    model.save_pretrained(tmp_path / "model")
    for each in (tmp_path / "tokenizer").glob("tokenizer*"):
        (tmp_path / "model" / each.name).write_bytes(each.read_bytes())
    for bits, most in ((16, 1e-4), (8, 5e-2)):
        settings = {"bits": 4.0, "activation_bits": bits, "kv_bits": bits, "group_size": 64}
        folder = pack(tmp_path / "model", WorkDir(tmp_path / str(bits)), **settings)
        ours, theirs = (runtime.load(folder, threads=2, engine=engine) for engine in ("native", "transformers"))
        tokens = IDS[:100]
        found, expected = ours.logits(tokens), theirs.logits(tokens)
        assert float((found - expected).norm() / expected.norm()) < most
        assert (
            float((found.log_softmax(-1).exp() * (found.log_softmax(-1) - expected.log_softmax(-1))).sum(-1).mean())
            < 1e-3
        )
        if bits == 16:
            session, other = ours.session(), theirs.session()
            assert near(session.feed(tokens[:40]), expected[39])
            other.feed(tokens[:40])
            assert session.greedy(8) == other.greedy(8)


# A family of known parts ----------------------------------------------------------------------------------------------

#: A mixture that no model has: fused q, k and v, norms around, a plain MLP, a factor of the residual stream and a cap.
MADE_UP = """
from edgerazor.families.core.base import NORMS_AROUND, Family, NativeArchitecture

FAMILY = Family(
    native=NativeArchitecture(
        "MadeUpRotaryEmbedding",
        linears={
            **{"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj"},
            **{"up": "mlp.up_proj", "down": "mlp.down_proj"},
        },
        norms=NORMS_AROUND,
        residual_scale=lambda config: config.residual_multiplier,
        logit_soft_cap=lambda config: config.cap,
    ),
)
"""


class MadeUpConfig(modeling_llama.LlamaConfig):
    """Of the made-up model."""

    model_type = "made_up"
    residual_multiplier: float = 0.6
    cap: float = 2.5


class MadeUpRotaryEmbedding(modeling_llama.LlamaRotaryEmbedding):
    """As Llama's."""


class MadeUpAttention(modeling_llama.LlamaAttention):
    """With one matrix for q, k and v."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv_proj = torch.nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.sizes = [config.num_attention_heads * self.head_dim, *[config.num_key_value_heads * self.head_dim] * 2]

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
        parts = self.qkv_proj(hidden_states).split(self.sizes, dim=-1)
        for name, part in zip("qkv", parts, strict=True):
            object.__setattr__(self, f"{name}_proj", lambda _, part=part: part)
        return super().forward(hidden_states, **options)


class MadeUpLayer(modeling_llama.LlamaDecoderLayer):
    """With norms around, and a plain MLP."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = MadeUpAttention(config, layer_idx)
        del self.mlp.gate_proj
        for name in ("pre", "post"):
            norm = modeling_llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.add_module(f"{name}_feedforward_layernorm", norm)
        self.scale = config.residual_multiplier

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **options)
        hidden_states = hidden_states + self.scale * self.post_attention_layernorm(mixed)
        inner = self.mlp.act_fn(self.mlp.up_proj(self.pre_feedforward_layernorm(hidden_states)))
        return hidden_states + self.scale * self.post_feedforward_layernorm(self.mlp.down_proj(inner))


class MadeUpForCausalLM(modeling_llama.LlamaForCausalLM):
    """With a cap of logits."""

    config_class = MadeUpConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers = [MadeUpLayer(config, layer) for layer in range(config.num_hidden_layers)]
        self.model.layers = torch.nn.ModuleList(layers)

    def forward(self, *args: Any, **options: Any) -> Any:
        out = super().forward(*args, **options)
        out.logits = self.config.cap * torch.tanh(out.logits / self.config.cap)
        return out


def test_a_family_of_known_parts_is_one_file(
    make_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up.py").write_text(MADE_UP)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "edgerazor.families.made_up", raising=False)
    AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)
    make_model(tmp_path / "model", MadeUpConfig(**{**SHAPE, "tie_word_embeddings": True}))
    folder = pack(tmp_path / "model", WorkDir(tmp_path / "job"))
    ours, theirs = (runtime.load(folder, threads=2, engine=engine) for engine in ("native", "transformers"))
    assert near(ours.logits(IDS[:40]), theirs.logits(IDS[:40]))
    session = ours.session()
    session.feed(IDS[:30])
    assert near(session.feed(IDS[30:31]), theirs.logits(IDS[:31])[-1])
    monkeypatch.delitem(sys.modules, "edgerazor.families.made_up")
