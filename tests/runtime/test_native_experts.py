"""Mixtures of experts in the native engine: which experts compute what, in batches, in pieces, and at what cost."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgerazor import pipeline, runtime
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.kernels import native
from edgerazor.kernels.decoder import PAGE_SLOTS, Decoder, PagedSpan, PageTable, SequenceSpan
from edgerazor.packed import PackedModel
from edgerazor.recipe import build
from edgerazor.runtime.batching import BatchScheduler, BatchSettings, SequenceEvent, SequenceRequest
from edgerazor.runtime.native_model import NativeModel
from edgerazor.runtime.sampling import Sampler
from edgerazor.runtime.weight_memory import matrix_bytes
from edgerazor.server.engine import open_scheduler
from edgerazor.workdir import WorkDir
from helpers.packed_folders import all_of, write_packed
from helpers.tiny_experts import CHOSEN, EXPERTS, MIXTURES, write_mixture
from helpers.tiny_models import VOCABULARY

pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(native.library() is None, reason="the native library is not built"),
]

IDS = torch.randint(2, VOCABULARY, (90,), generator=torch.Generator().manual_seed(3)).tolist()
NEVER = 2
#: Those whose sequences share calls; some layers of the others keep states.
BATCHED = [name for name in MIXTURES if name not in ("lfm2_moe", "granitemoehybrid")]

Load = Callable[..., NativeModel]


@pytest.fixture(scope="module")
def folder_of(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Packs the tiny mixture of a model type, one of whose experts no token reaches, once for each number of bits."""
    place = tmp_path_factory.mktemp("experts")

    @functools.cache
    def pack(model_type: str, bits: int = 16) -> Path:
        folder = place / model_type
        if not folder.exists():
            write_mixture(tokenizer, folder, model_type, never=NEVER)
            if model_type == "lfm2_moe":  # a bias that decides
                weights = load_file(folder / "model.safetensors")
                bias = weights["model.layers.1.feed_forward.expert_bias"]
                bias += torch.tensor([0.3, -0.4, -9.0, 0.0, 0.2, 0.1])
                save_file(weights, folder / "model.safetensors", {"format": "pt"})
        settings = {"bits": 3.0, "group_size": 16, "activation_bits": bits, "kv_bits": bits}
        recipe = build({"model": str(folder), "device": "cpu", "calibrate": settings, "pack": {"source": "teacher"}})
        work = WorkDir(place / f"{model_type} {bits}")
        pipeline.run("pack", recipe, work, Console(quiet=True))
        return work.folder("pack")

    return pack


@pytest.fixture(scope="module")
def load(folder_of: Callable[..., Path]) -> Load:
    @functools.cache
    def load_one(model_type: str, bits: int = 16) -> NativeModel:
        model = runtime.load(folder_of(model_type, bits), threads=2, engine="native")
        assert isinstance(model, NativeModel)
        return model

    return load_one


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("model_type", MIXTURES)
def test_whole_in_pieces_and_token_by_token(load: Load, folder_of: Callable[..., Path], model_type: str) -> None:
    ours, theirs = load(model_type), runtime.load(folder_of(model_type), threads=1, engine="transformers")
    expected = theirs.logits(IDS)
    found = ours.logits(IDS)
    assert relative(found, expected) < 1e-4
    logs, of_ours = expected.log_softmax(-1), found.log_softmax(-1)
    assert float((logs.exp() * (logs - of_ours)).sum(-1).mean()) < 1e-6
    for ends in ([40, 41, 77, 90], list(range(1, 91))):
        session = ours.session()
        for begin, end in zip([0, *ends], ends, strict=False):
            assert relative(session.feed(IDS[begin:end]), found[end - 1]) < 1e-5
        for position in (88, 41, 3):
            session.rewind(position)
            assert relative(session.feed(IDS[position : position + 1]), found[position]) < 1e-5
    session, other = ours.session(), theirs.session()
    session.feed(IDS[:20])
    other.feed(IDS[:20])
    assert session.greedy(30) == other.greedy(30)
    prefix, continuations = IDS[:9], [IDS[20:25], [3], [3, 4], IDS[30:41]]
    for of_ours_score, of_theirs in zip(ours.score([(prefix, continuations)])[0],
                                        theirs.score([(prefix, continuations)])[0], strict=True):  # fmt: skip
        assert of_ours_score.log_probability == pytest.approx(of_theirs.log_probability, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_rounded_activations_give_the_same_bits_in_pieces(load: Load, model_type: str) -> None:
    """Experts get a token's own codes, so it does not matter how many tokens they compute at a time."""
    model = load(model_type, 8)
    session = model.session()
    session.feed(IDS[:1])
    for number in range(1, 30):
        of_token = session.feed(IDS[number : number + 1])
    other = model.session()
    assert torch.equal(other.feed(IDS[:30]), of_token)


@pytest.mark.parametrize("model_type", BATCHED)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_batch_changes_no_bit(load: Load, model_type: str, bits: int) -> None:
    """Neighbours send their tokens to other experts; nothing of a sequence depends on it, to the bit with codes."""
    model = load(model_type, bits)
    lengths = (1, 17, 5, 40)
    alone = [step(model, [IDS[number : number + length]])[0] for number, length in enumerate(lengths)]
    together = step(model, [IDS[number : number + length] for number, length in enumerate(lengths)])
    for found, expected in zip(together, alone, strict=True):
        if bits == 8:
            assert np.array_equal(found, expected)
        else:
            assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)


def step(model: NativeModel, sequences: list[list[int]]) -> np.ndarray:
    """Logits after each of some sequences that are computed in one call."""
    decoder = model.decoder()
    decoder.set_rope(*model.rotary.tables(0, 64))
    decoder.reserve(len(sequences) * PAGE_SLOTS)
    spans = []
    for page, tokens in enumerate(sequences):
        table = PageTable()
        table.append(page)
        spans.append(PagedSpan(table, 0, len(tokens)))
    outputs = (np.cumsum([len(tokens) for tokens in sequences]) - 1).tolist()
    logits = np.empty((len(sequences), model.vocabulary), dtype=np.float32)
    decoder.step(spans, [token for tokens in sequences for token in tokens], outputs, [False] * len(outputs), logits)
    return logits


@pytest.mark.parametrize("model_type", BATCHED)
def test_continuous_batching(load: Load, model_type: str) -> None:
    model = load(model_type, 8)
    scheduler = open_scheduler(model, BatchSettings(max_sequences=3, prefill_tokens=16))
    assert isinstance(scheduler, BatchScheduler)
    prompts = [IDS[:50], IDS[:47] + IDS[60:62], IDS[70:75], IDS[5:6]]
    written: list[list[int]] = [[] for _ in prompts]
    try:
        for prompt, tokens in zip(prompts, written, strict=True):

            def add(event: SequenceEvent, tokens: list[int] = tokens) -> None:
                if event.token is not None:
                    tokens.append(event.token)

            sampler = Sampler(build({"generate": {"temperature": 0.0}}).generate, 0, model.vocabulary)
            scheduler.submit(SequenceRequest(prompt, sampler, 12, frozenset()), add)
        assert scheduler.drain(60)
    finally:
        scheduler.close()
    for prompt, tokens in zip(prompts, written, strict=True):
        session = model.session()
        session.feed(prompt)
        assert tokens == session.greedy(12)


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(folder_of: Callable[..., Path], load: Load, model_type: str, threads: int) -> None:
    model = runtime.load(folder_of(model_type, 8), threads=threads, engine="native")
    assert torch.equal(model.logits(IDS), load(model_type, 8).logits(IDS))
    assert torch.equal(model.logits(IDS[:1]), load(model_type, 8).logits(IDS[:1]))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_an_expert_that_is_never_chosen_changes_nothing(load: Load, model_type: str) -> None:
    """Its weights are overwritten, and nothing else comes out; those of another expert change what comes out."""
    model = load(model_type)
    before = model.logits(IDS)
    mixture = model.network.layers[-1].experts
    assert mixture is not None
    assert len(mixture.experts) == EXPERTS
    for number, changes in ((NEVER, False), (NEVER + 1, True)):
        parts = [part for linear in mixture.experts[number].linears for part in linear.matrix.parts]
        scales = [part.scales.clone() for part in parts]
        for part in parts:
            part.scales.fill_(60000.0)
        assert torch.equal(model.logits(IDS), before) is not changes
        for part, earlier in zip(parts, scales, strict=True):
            part.scales.copy_(earlier)
    assert torch.equal(model.logits(IDS), before)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_bytes_per_token_are_those_of_the_chosen_experts(load: Load, model_type: str) -> None:
    model = load(model_type, 8)
    experts = sum(
        matrix_bytes(linear.matrix)
        for layer in model.network.layers
        if layer.experts is not None
        for expert in layer.experts.experts
        for linear in expert.linears
    )
    head = model.network.embedding.matrix
    table = 0 if model.network.head.matrix is head else matrix_bytes(head)
    unread = model.weight_bytes - model.bytes_per_token
    assert unread == pytest.approx(experts * (1 - CHOSEN / EXPERTS) + table, rel=1e-3)


def test_stored_scales_of_inputs_differ_from_expert_to_expert(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mixture(tokenizer, tmp_path / "model", "olmoe")
    packed = write_packed(tmp_path / "packed", tmp_path / "model", all_of("int4", 16), input_scale=False)
    names = [name for name in packed.header.matrices if ".experts." in name]
    scales = {f"{name}.input_scale": 0.02 + 0.0005 * number for number, name in enumerate(names)}
    monkeypatch.setattr(PackedModel, "input_scales", lambda self: scales)
    ours, theirs = (
        runtime.load(tmp_path / "packed", threads=2, engine=engine) for engine in ("native", "transformers")
    )
    assert isinstance(ours, NativeModel)
    mixture = ours.network.layers[0].experts
    assert mixture is not None
    assert len({linear.scale for one in mixture.experts for linear in one.linears}) == 18
    whole, session = ours.logits(IDS), ours.session()
    assert relative(whole, theirs.logits(IDS)) < 2e-2
    for number in range(20):
        of_token = session.feed(IDS[number : number + 1])
    assert torch.equal(of_token, whole[19])


def test_what_does_not_fit_is_refused(load: Load) -> None:
    network = load("olmoe").network
    layer = network.layers[0]
    assert layer.experts is not None
    first, second, *others = layer.experts.experts
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"chosen": 0}, "0 of 6 experts"),
        ({"chosen": 7}, "7 of 6 experts"),
        ({"router": layer.experts.router[1:]}, "a router must be"),
        ({"router": layer.experts.router.double()}, "a router must be"),
        ({"choice_bias": torch.zeros(5)}, "choice_bias"),
        ({"scale": float("nan")}, "impossible weights"),
        ({"epsilon": -1.0}, "impossible weights"),
        ({"experts": [first, dataclasses.replace(second, down=second.up), *others]}, "down of an expert must be"),
        (
            {"experts": [first, dataclasses.replace(second, up=dataclasses.replace(second.up, scale=0.1)), *others]},
            "the same groups",
        ),
        (
            {
                "experts": [
                    dataclasses.replace(first, up=dataclasses.replace(first.up, bias=torch.zeros(32))),
                    second,
                    *others,
                ]
            },
            "has a bias",
        ),
    ]
    for change, message in wrong:
        changed = dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, **change))
        with pytest.raises(ValueError, match=message):
            Decoder(dataclasses.replace(network, layers=[changed]))
    with pytest.raises(ValueError, match="an MLP needs gate or up"):  # the one beside the experts
        Decoder(dataclasses.replace(network, layers=[dataclasses.replace(layer, down=first.down)]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 16000, "16000 experts"),
        ("num_experts", 7, "lacks the tensor"),
        ("num_experts_per_tok", 7, "7 of 6 experts"),
        ("moe_intermediate_size", 31, "no place in the architecture"),
        ("decoder_sparse_step", 0, "cannot be loaded"),
        ("decoder_sparse_step", 2, "no place in the architecture|lacks the tensor"),
    ],
)
def test_configurations_of_other_mixtures_are_refused_in_a_sentence(
    folder_of: Callable[..., Path], tmp_path: Path, field: str, value: int, message: str
) -> None:
    folder = shutil.copytree(folder_of("qwen3_moe"), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    names = ("num_experts", "num_local_experts") if field == "num_experts" else (field,)
    (folder / "config.json").write_text(json.dumps({**config, **dict.fromkeys(names, value)}))
    with pytest.raises(UserError, match=message):
        runtime.load(folder, threads=1, engine="native")


def test_one_layer_alone(load: Load) -> None:
    """As the self-tests of real layers do: all tokens, then one."""
    model = load("olmoe", 8)
    decoder = model.decoder()
    decoder.set_rope(*model.rotary.tables(0, 24))
    decoder.reserve(64)
    states = torch.randn(24, model.network.hidden_size, generator=torch.Generator().manual_seed(0))
    found = decoder.layer(1, [SequenceSpan(0, 0, 0, 0, 24)], states)
    assert torch.equal(decoder.layer(1, [SequenceSpan(0, 0, 32, 0, 1)], states[:1]), found[:1])
