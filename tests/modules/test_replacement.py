"""Training and packed modules compute the same numbers, and the gradient is the straight-through one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from edgerazor import formats, models, modules
from edgerazor.allocate import make_plan
from edgerazor.errors import UserError
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.models import QuantTarget
from edgerazor.modules import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    LazyMatrix,
    PackedEmbedding,
    PackedLinear,
    Settings,
    SharedActivations,
)
from edgerazor.recipe import Calibrate
from helpers.tiny_models import FAMILIES, GROUP_SIZE, LAYERED, VOCABULARY, family_config

IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


def spec_for(rows: int, bits: float, group_size: int = GROUP_SIZE) -> MatrixSpec:
    target = QuantTarget("m", "linear", 0, rows, group_size)
    return make_plan([target], Calibrate(bits=bits, plan="interleave", group_size=group_size))["m"].spec()


def lazy_of(encoded: Encoded, spec: MatrixSpec) -> LazyMatrix:
    return LazyMatrix(lambda: (encoded, spec))


def model_of(family: str, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(family_config(family, **overrides)).eval()


def prepared(family: str = "llama", bits: float = 1.88, activation_bits: int = 8, **overrides: Any) -> PreTrainedModel:
    """A student whose matrices are fake-quantized."""
    model = model_of(family, **overrides)
    structure = models.structure(model)
    plan = make_plan(structure.targets, Calibrate(bits=bits, plan="interleave", group_size=GROUP_SIZE))
    modules.prepare_for_training(model, structure, plan.specs(), Settings(activation_bits, 8, GROUP_SIZE))
    return model


# --- shared activations ------------------------------------------------------------------------


def test_layers_that_share_an_input_share_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    original = formats.fake_quantize_activations

    def counting(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        return original(*args)

    monkeypatch.setattr(formats, "fake_quantize_activations", counting)
    model = prepared()
    model(input_ids=IDS, use_cache=False)
    # q, k and v share one; o; gate and up share one; down: four a layer instead of seven, and the head's.
    assert count == 2 * 4 + 1


def test_shared_gradients_equal_unshared_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[Tensor]:
        model = prepared()
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    shared = gradients()
    monkeypatch.setattr(
        SharedActivations,
        "__call__",
        lambda self, x, *_: formats.fake_quantize_activations(x, self.bits, self.group_size),
    )
    unshared = gradients()
    assert len(shared) == len(unshared) > 10
    for one, other in zip(shared, unshared, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


def test_nothing_stale_is_reused() -> None:
    share = SharedActivations(8, 32)

    def right(x: Tensor) -> bool:
        return torch.equal(share(x), formats.fake_quantize_activations(x, 8, 32))

    x = torch.randn(3, 64)
    first = share(x)
    assert share(x) is first
    x.mul_(2)  # changed in place
    assert right(x)
    x[0].add_(1)  # changed through a view
    assert right(x)
    assert all(right(torch.randn(3, 64)) for _ in range(20))  # freed and perhaps at the same address
    with torch.inference_mode():  # such tensors have no version
        y = torch.randn(3, 64)
        assert right(y)
        y.mul_(3)
        assert right(y)


def test_rounding_without_a_gradient_is_not_reused_with_one() -> None:
    share = SharedActivations(8, 32)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        assert not share(x).requires_grad
    assert share(x).requires_grad


def test_activations_are_let_go_with_their_input() -> None:
    share = SharedActivations(8, 32)
    x = torch.randn(3, 64, requires_grad=True)
    (share(x * 1).sum()).backward()
    gc.collect()
    assert share._output is None


def test_sixteen_bits_leave_activations_alone() -> None:
    x = torch.randn(3, 64)
    share = SharedActivations(16, 32)
    assert share(x) is x
    died = weakref.ref(x)
    del x
    assert died() is None  # and are not kept
    assert share(torch.randn(3, 64)) is not None


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gemma2"])
def test_activations_of_sixteen_bits_train(family: str) -> None:
    """Passes without gradients, where nothing else keeps a layer's input, and with them: as without our activations."""
    model, plain = prepared(family, activation_bits=16), prepared(family, activation_bits=16)
    for module in plain.modules():
        if isinstance(module, FakeQuantLinear):
            module.activations = lambda x, *_: x
    with torch.no_grad():
        for _ in range(2):
            logits, expected = (m(input_ids=IDS, use_cache=False).logits for m in (model, plain))
            assert torch.equal(logits, expected)
    for m in (model, plain):
        m(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    "config",
    [
        family_config("llama", attention_dropout=0.3),
        family_config("phi", attention_dropout=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=40,
            word_embed_proj_dim=40,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            dropout=0.3,
            attention_dropout=0.3,
            layerdrop=0.5,
        ),
    ],
    ids=["llama", "phi", "opt"],
)
def test_a_student_drops_nothing_out(config: Any) -> None:
    """Two passes in training are equal, and equal to one that is not, whatever the configuration says."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    before = [model(input_ids=IDS, use_cache=False).logits for _ in range(2)]
    assert not torch.equal(*before)
    modules.disable_dropout(model)
    seed = torch.get_rng_state()
    with torch.no_grad():
        one, other = (model(input_ids=IDS, use_cache=False).logits for _ in range(2))
        whole = model.eval()(input_ids=IDS, use_cache=False).logits
    assert torch.equal(one, other)
    torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-6)
    if not isinstance(config, OPTConfig):  # for layers to leave out, older transformers draw even where none is
        assert torch.equal(torch.get_rng_state(), seed)


# --- modules -----------------------------------------------------------------------------------

SIZES = [(1, 1), (3, 31), (33, 40), (17, 101), (64, 127)]


@pytest.mark.parametrize("bits", [1.58, 1.88, 3.0, 4.0, 5.0, 8.0])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_training_linear_equals_packed_linear(bits: float, activation_bits: int, bias: bool) -> None:
    for rows, columns in SIZES:
        torch.manual_seed(rows)
        linear, x = nn.Linear(columns, rows, bias=bias), torch.randn(2, 5, columns)
        spec = spec_for(rows, bits)
        trained = FakeQuantLinear(linear.weight, linear.bias, spec, SharedActivations(activation_bits, GROUP_SIZE))
        encoded = formats.encode_matrix(linear.weight.detach(), spec)
        lazy = lazy_of(encoded, spec)
        packed = PackedLinear(lazy, linear.bias, (rows, columns), activation_bits, GROUP_SIZE)
        for enabled in (False, True):
            lazy.cache_decoded = enabled
            torch.testing.assert_close(packed(x), trained(x), rtol=1e-5, atol=1e-6)
        trained.encode_once()
        assert trained.digest == formats.digest(encoded, spec)
        assert torch.equal(trained.decoded(torch.float32), formats.decode_matrix(encoded, spec))


def test_training_linear_has_the_straight_through_gradient() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(101, 33), torch.randn(7, 101, requires_grad=True)
    spec = spec_for(33, 1.88)
    module = FakeQuantLinear(linear.weight, linear.bias, spec, SharedActivations(8, GROUP_SIZE))
    upstream = torch.randn(7, 33)
    module(x).backward(upstream)
    weight = formats.decode_matrix(formats.encode_matrix(linear.weight.detach(), spec), spec)
    rounded = formats.fake_quantize_activations(x.detach(), 8, GROUP_SIZE)
    assert x.grad is not None
    torch.testing.assert_close(linear.weight.grad, upstream.T @ rounded)
    torch.testing.assert_close(linear.bias.grad, upstream.sum(0))
    torch.testing.assert_close(x.grad, upstream @ weight)


@pytest.mark.parametrize("scale", [None, 9.5])
def test_embeddings_look_up_decoded_rows(scale: float | None) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(33, 101)
    for spec in (spec_for(33, 4.0), spec_for(33, 1.88)):
        encoded = formats.encode_matrix(table.weight.detach(), spec)
        expected = formats.decode_matrix(encoded, spec)[IDS % 33] * (1.0 if scale is None else scale)
        trained = FakeQuantEmbedding(table.weight, spec, scale)
        lazy = lazy_of(encoded, spec)
        packed = PackedEmbedding(lazy, scale, (33, 101), torch.float32)
        assert torch.equal(trained(IDS % 33), expected)
        assert torch.equal(packed(IDS % 33), expected)
        trained.encode_once()
        assert torch.equal(trained(IDS % 33), expected)


def test_embedding_gradients_count_the_lookups() -> None:
    table = nn.Embedding(10, 16)
    module = FakeQuantEmbedding(table.weight, spec_for(10, 4.0), 2.0)
    module(torch.tensor([[3, 3, 7]])).sum().backward()
    expected = torch.zeros(10, 16)
    expected[3], expected[7] = 4.0, 2.0
    assert torch.equal(table.weight.grad, expected)


def test_bfloat16_inputs_keep_their_dtype() -> None:
    linear, x = nn.Linear(96, 33), torch.randn(4, 96)
    spec = spec_for(33, 4.0)
    encoded = formats.encode_matrix(linear.weight.detach(), spec)
    packed = PackedLinear(lazy_of(encoded, spec), linear.bias, (33, 96), 8, GROUP_SIZE)
    half = packed(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, packed(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)


def test_a_packed_matrix_is_read_once_when_first_needed() -> None:
    reads = []
    spec = spec_for(12, 4.0)
    encoded = formats.encode_matrix(torch.randn(12, 40), spec)

    def read() -> Any:
        reads.append(1)
        return encoded, spec

    lazy = LazyMatrix(read)
    head, table = PackedLinear(lazy, None, (12, 40), 8, 40), PackedEmbedding(lazy, None, (12, 40), torch.float32)
    assert reads == []
    table(torch.tensor([1])), head(torch.randn(1, 40)), table(torch.tensor([2]))
    assert reads == [1]
    assert list(head.state_dict()) == list(table.state_dict()) == []
    assert torch.equal(head.weight, formats.decode_matrix(encoded, spec))


# --- whole models ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_codes_encoded_once_are_those_of_the_master_weights(family: str, tied: bool) -> None:
    model = prepared(family, tie_word_embeddings=tied)
    matrices = modules.fake_quant_weights(model)
    assert ("lm_head" in matrices) == (not tied)
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
        with modules.encoded_once(model) as digests:
            cached = model(input_ids=IDS, use_cache=False).logits
            for module in matrices.values():
                module.weight.mul_(1.7)  # the cached codes stay
            again = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(before, cached)
    assert torch.equal(cached, again)
    assert digests.keys() == matrices.keys()
    assert all(module.decoded_cache is None for module in matrices.values())
    fresh = prepared(family, tie_word_embeddings=tied)
    for name, module in modules.fake_quant_weights(fresh).items():
        encoded = formats.encode_matrix(module.weight.detach(), module.spec)
        assert digests[name] == formats.digest(encoded, module.spec)


def test_the_cache_of_decoded_weights_is_dropped_after_an_error() -> None:
    model = prepared()
    with pytest.raises(RuntimeError), modules.encoded_once(model):
        raise RuntimeError
    assert all(module.decoded_cache is None for module in modules.fake_quant_weights(model).values())


def test_a_tied_weight_collects_the_gradients_of_both_uses() -> None:
    model = prepared(tie_word_embeddings=True)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.weight is head.weight
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    both = table.weight.grad.clone()
    assert (both.abs().sum(1) > 0).sum() == VOCABULARY - 1  # the head uses every row but that of padding, which is 0
    used = IDS.unique()
    model = prepared(tie_word_embeddings=True)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # untied, same numbers
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    table = model.get_input_embeddings()
    torch.testing.assert_close(both, table.weight.grad + head.weight.grad, rtol=1e-4, atol=1e-8)
    assert table.weight.grad.abs().sum(1).nonzero().flatten().tolist() == used.tolist()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = model_of("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        structure = models.structure(model)
        plan = make_plan(structure.targets, Calibrate(bits=2.0, plan="interleave", group_size=GROUP_SIZE))
        modules.prepare_for_training(model, structure, plan.specs(), Settings(8, 8, GROUP_SIZE))
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


# --- keys and values ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_only_keys_and_values_are_changed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rounding that does nothing, the model computes what it did: masks, windows, caps and scores are intact."""
    model = model_of(family)
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0  # padding on the left
    seen: list[tuple[int, ...]] = []

    def nothing(x: Tensor, bits: int) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    calls: list[Callable[[], Tensor]] = [
        lambda: model(input_ids=IDS).logits,
        lambda: model(input_ids=IDS, attention_mask=mask).logits[mask.bool()],
    ]
    with torch.no_grad():
        before = [call() for call in calls]
        rounding = formats.fake_quantize_kv
        monkeypatch.setattr(formats, "fake_quantize_kv", nothing)
        modules.quantize_attention(model, 8)
        for call, expected in zip(calls, before, strict=True):
            torch.testing.assert_close(call(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
        heads = model.config.num_key_value_heads
        assert set(seen) == {(2, heads, 20, width) for width in ((16, 32) if family == "gemma4" else (16,))}
        kinds = family_config(family).layer_types if family in LAYERED else ["full_attention"] * 2
        layers = sum(kind.endswith(("full_attention", "sliding_attention")) for kind in kinds)
        assert len(seen) == 2 * layers * 2  # calls, layers with attention, keys and values
        monkeypatch.setattr(formats, "fake_quantize_kv", rounding)
        rounded = calls[0]()
    change = float((rounded - before[0]).abs().max() / before[0].abs().max())
    assert 0 < change < (0.1 if family == "gemma4" else 0.05)  # whose scores are not divided by a root


def test_capped_scores_need_eager_attention() -> None:
    model = model_of("gemma2")
    model.config._attn_implementation = "sdpa"
    modules.quantize_attention(model, 8)
    assert model.config._attn_implementation == "edgerazor_kv8_eager"
    plain = model_of("llama")
    modules.quantize_attention(plain, 16)
    assert plain.config._attn_implementation == "sdpa"


def test_a_matrix_without_a_place_is_named() -> None:
    def load(name: str) -> Any:
        raise AssertionError

    for name, shape in (
        ("model.layers.9.mlp.up_proj", (101, 96)),
        ("model.layers.0.mlp.up_proj", (96, 101)),
        ("model.norm", (96, 1)),
    ):
        with pytest.raises(UserError, match=f"packed matrix {name} .* has no place in LlamaForCausalLM"):
            modules.install_packed(model_of("llama"), {name: shape}, {}, load, Settings(8, 8, 40), torch.float32)


def test_replace_puts_a_module_where_the_old_one_was(llama: Path) -> None:
    model, _ = models.load(llama)
    new = nn.Linear(96, 101, bias=False)
    modules.replace_module(model, "model.layers.1.mlp.up_proj", new)
    assert model.model.layers[1].mlp.up_proj is new
    assert "model.layers.1.mlp.up_proj.weight" in dict(model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_weights_rounded_once_give_the_same_gradients(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(tie_word_embeddings=tied).train()
    rounded: list[torch.Size] = []
    product = formats.quantize_dequantize

    def counted(w: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rounded.append(w.shape)
        return product(w, *args, **kwargs)

    monkeypatch.setattr(formats, "quantize_dequantize", counted)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        for ids in (IDS, IDS.flip(0)):  # two micro-batches
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    anew, count = gradients(), len(rounded)
    with modules.rounded_once(model):
        once = gradients()
    assert all(torch.equal(one, other) for one, other in zip(anew, once, strict=True))
    assert len(rounded) - count <= count / 4 + 1  # two passes of two micro-batches round each matrix once
    assert all(module.rounded is None for module in modules.fake_quant_weights(model).values())
