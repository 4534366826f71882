"""What several test files need: a tokenizer, a text, and tiny random models of every family."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import Run, make_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

torch.set_num_threads(1)  # tiny models are faster so

VOCABULARY = 300
#: Awkward on purpose: neither rows of 96 nor of 101 are whole groups of 40.
GROUP_SIZE = 40
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

#: family -> model type of transformers, and what is special about it beyond `SHAPE`
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),  # biases of q, k and v
    "qwen3": ("qwen3", {}),  # norms of q and k
    "mistral": ("mistral", {"sliding_window": 8}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),  # a layer without positions
    "gemma": ("gemma", {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),  # LayerNorm, biases everywhere, also of the head
    "phi3": ("phi3", {}),  # fused q, k, v and fused gate, up
    "olmo2": ("olmo2", {}),  # norms behind attention and MLP
}

ModelMaker = Callable[..., PreTrainedModel]


def sentences(count: int, seed: int = 0) -> str:
    """Lines of a small invented world, different for each seed."""
    draw = random.Random(seed)
    people, things = ["Nora", "Ben", "Ida", "Tom", "Mia"], ["ball", "lamp", "book", "coin", "rope"]
    places = ["mill", "barn", "cave", "tower", "garden"]
    lines = []
    for _ in range(count):
        person, other = draw.sample(people, 2)
        thing, place = draw.choice(things), draw.choice(places)
        lines.append(
            f"{person} took the {thing} to the {place}. Then {other} found {draw.randint(2, 9)} of them there."
        )
    return "\n".join(lines) + "\n"


def mostly_slow(values: Iterable[Any], *usual: Any) -> list[Any]:
    """Parameters of a test that takes seconds for each: `make test` runs the usual ones, `make test-all` the others."""
    return [value if value in usual else pytest.param(value, marks=pytest.mark.slow) for value in values]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs commands as a job, which `make test-fast` leaves out."""
    for item in items:
        if "run" in getattr(item, "fixturenames", ()):
            item.add_marker("job")


@pytest.fixture(autouse=True)
def ctrl_c() -> None:
    """Interrupts what a test starts, too, where the tests run in the background of a script, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the command line in this process."""
    return make_run(capsys, monkeypatch)


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed model multiplies exactly as training does: decoded weights, float32 sums."""
    monkeypatch.setenv("EDGERAZOR_ISA", "reference")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `VOCABULARY` entries, trained on `sentences`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    raw.train_from_iterator(sentences(200).splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate, train and measure on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sentences(300), encoding="utf-8")
    return path


def family_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of a family of `FAMILIES`."""
    model_type, special = FAMILIES[family]
    return CONFIG_MAPPING[model_type](**{**SHAPE, **special, **overrides})


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> ModelMaker:
    """`make_model(folder, config or family, dtype, **overrides)` writes a random model and its tokenizer there."""

    def make(
        folder: Path, config: PreTrainedConfig | str, dtype: torch.dtype = torch.float32, **overrides: Any
    ) -> PreTrainedModel:
        if isinstance(config, str):
            config = family_config(config, **overrides)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # everything matters: biases and norms are not left at 0 and 1
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
        model = model.to(dtype).eval()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model

    return make


@pytest.fixture(scope="session")
def llama(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama; read only."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    make_model(folder, "llama")
    return folder
