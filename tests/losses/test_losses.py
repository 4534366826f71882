"""The laws every loss obeys, and for each loss the number its definition gives."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from edgerazor import losses, registry
from edgerazor import recipe as recipes
from edgerazor.errors import UserError
from edgerazor.losses.core import attention_maps, base, divergences, logit_losses
from edgerazor.losses.core.base import (
    MASKED,
    Attention,
    Head,
    Loss,
    Outputs,
    Routing,
    StepTotals,
    prediction_mask,
    sample_weights,
    step_counts,
)
from edgerazor.losses.core.layer_selection import layer_metric
from edgerazor.losses.eakld import EntropyAwareKL
from edgerazor.losses.lafd import LayerAdaptiveFeatureDistillation, least_similar
from edgerazor.training import objective
from helpers.places import ROOT

DEPTH, HIDDEN, VOCABULARY = 4, 6, 37
HEADS, KEY_HEADS, FEATURES, VALUES = 4, 2, 5, 3
EXPERTS, CHOSEN = 7, 2
#: What calibrate might have measured; the losses make their choices by it.
MEASURED = {"cosine": [0.9, 0.2, 0.8, 0.3], "l2": [1.0, 2.0, 5.0, 4.0], "variance": [4.0, 3.0, 2.0, 1.0]}
OPTIONS: dict[str, dict[str, object]] = {"lafd": {"layers": (1, 3)}}
VARIANTS = [
    *((name, OPTIONS.get(name, {})) for name in registry.names("losses")),
    ("eakld", {"temperature": 2.0, "k": 40.0}),
    ("eakld", {"gate": "token"}),
    ("cakld", {"temperature": 2.0}),
    ("js", {"beta": 0.2, "temperature": 3.0}),
    ("forward_kl", {"temperature": 3.0}),
    ("forward_kl", {"temperature": 2.0, "reduction": "sum"}),
    ("reverse_kl", {"temperature": 0.5}),
    ("lafd", {"layers": (1, 2, 3, 4), "select": "batch", "count": 2}),
    ("lafd", {"metric": "l2", "count": 2}),
    ("lafd", {"metric": "variance", "select": "batch", "count": 2}),
    ("lafd", {"metric": "l2", "select": "batch", "layers": ["low", "mid", "high"], "count": 1}),
    ("attention_kl", {"temperature": 2.0, "layers": "last"}),
    ("attention_cosine", {"layers": (2, 3)}),
    ("relation", {"of": "both", "temperature": 0.5}),
    ("relation", {"of": "query", "layers": ("low", 3)}),
    ("qk_entropy", {"beta": 2.0, "layers": 2}),
]
LOGIT_VARIANTS = [(n, o) for n, o in VARIANTS if issubclass(registry.find("losses", n, "LOSS"), losses.LogitLoss)]
#: Losses that compare with nothing; the entropy guidance may be negative.
ALONE = {"ce", "qk_entropy", "router_balance", "router_z"}
every_logit_loss = pytest.mark.parametrize(
    ("name", "options"), LOGIT_VARIANTS, ids=[f"{n}-{o}" for n, o in LOGIT_VARIANTS]
)
every_loss = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}-{o}" for n, o in VARIANTS])


def make(name: str, options: Mapping[str, object]) -> Loss:
    """A loss as the training loop makes it."""
    loss = losses.make(name, **options)
    loss.choose_layers(DEPTH, MEASURED)
    return loss


def outputs(batch: int, length: int, seed: int, dtype: torch.dtype = torch.float64, gradient: bool = False) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        state = 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return state.to(dtype).requires_grad_(gradient)

    def attention(layer: int) -> Attention:
        query = random(batch, HEADS, length, FEATURES)
        key, value = (random(batch, KEY_HEADS, length, size) for size in (FEATURES, VALUES))
        return Attention(query, key, value, 0.3, cap=4.0 if layer == 2 else None, mask=window(length, layer))

    return Outputs(
        random(batch, length, VOCABULARY),
        {layer: random(batch, length, HIDDEN) for layer in range(DEPTH + 1)},
        attention={layer: attention(layer) for layer in range(1, DEPTH + 1)},
        routing={layer: routed(random(batch, length, EXPERTS)) for layer in (2, 4)},
    )


def routed(logits: Tensor) -> Routing:
    """The routing of a mixture of experts that follows from logits [B, T, experts]."""
    return Routing(logits, logits.detach().topk(CHOSEN, dim=-1).indices)


def window(length: int, layer: int) -> Tensor | None:
    """Odd layers see everything before them, even ones a few tokens."""
    if layer % 2:
        return None
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return ((distance >= 0) & (distance < 4))[None, None]


def each_tensor(change: Any, outputs: Outputs, *others: Outputs) -> Outputs:
    """Outputs whose every tensor with a batch axis is what `change(name, tensor, ...)` makes of it."""
    attention = {}
    routings = outputs.routing.items()
    for layer, inputs in outputs.attention.items():
        parts = {}
        for name in ("query", "key", "value"):
            tensors = [getattr(o.attention[layer], name) for o in (outputs, *others)]
            parts[name] = None if tensors[0] is None else change(name, *tensors)
        length = next(part.shape[2] for part in parts.values() if part is not None)
        attention[layer] = dataclasses.replace(inputs, **parts, mask=window(length, layer))
    return Outputs(
        change("states", outputs.last_hidden_state, *(o.last_hidden_state for o in others)),
        {k: change("hidden", v, *(o.hidden_states[k] for o in others)) for k, v in outputs.hidden_states.items()},
        attention=attention,
        routing={k: routed(change("logits", v.logits, *(o.routing[k].logits for o in others))) for k, v in routings},
    )


def labels_for(batch: int, length: int, seed: int = 5) -> Tensor:
    """Random labels in which every sample has another number of masked positions, and sample 1 has nothing else."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    for row in range(batch):
        labels[row, : row % 3] = MASKED
        labels[row, length - row % 4 :] = MASKED
    if batch > 1:
        labels[1] = MASKED
    return labels


def totals_of(loss: Loss, parts: list[tuple[Outputs, Tensor]]) -> StepTotals:
    """What the training loop does before the student's first backward pass."""
    samples = sum(step_counts(labels)[0] for _, labels in parts)
    tokens = sum(step_counts(labels)[1] for _, labels in parts)
    sums: dict[str, float] = {}
    for teacher, labels in parts:
        for key, value in loss.teacher_statistics(teacher, labels).items():
            sums[key] = sums.get(key, 0.0) + float(value)
    return StepTotals(samples, tokens, {key: value / max(samples, 1) for key, value in sums.items()})


def step_loss(loss: Loss, parts: list[tuple[Outputs, Outputs, Tensor]]) -> Tensor:
    totals = totals_of(loss, [(teacher, labels) for _, teacher, labels in parts])
    return torch.stack([loss(student, teacher, labels, totals) for student, teacher, labels in parts]).sum()


def cut(whole: Outputs, rows: slice) -> Outputs:
    return each_tensor(lambda name, tensor: tensor[rows], whole)


def leaves(student: Outputs) -> list[Tensor]:
    attention_inputs = [[a.query, a.key, a.value] for a in student.attention.values()]
    return [
        student.last_hidden_state,
        *student.hidden_states.values(),
        *(tensor for three in attention_inputs for tensor in three if tensor is not None),
        *(routing.logits for routing in student.routing.values()),
    ]


def plain(loss: Any, name: str, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
    """The definitions of methods.md, one sample after the other, for autograd to differentiate."""
    rows = [row for row in range(len(labels)) if (labels[row, 1:] != MASKED).any()]
    keep = {row: (labels[row, 1:] != MASKED).nonzero().flatten() for row in rows}
    if name == "ce":
        log_p = torch.log_softmax(student.last_hidden_state, -1)
        return torch.cat([-log_p[row, keep[row], labels[row, keep[row] + 1]] for row in rows]).mean()
    if name == "lafd":
        layers = loss.compared_layers(totals_of(loss, [(teacher, labels)]))
        errors = [student.hidden_states[layer] - teacher.hidden_states[layer] for layer in layers]
        return torch.cat([error[row, keep[row]].square() for error in errors for row in rows]).mean()
    if name in ("attention_kl", "attention_cosine", "relation", "qk_entropy"):
        return plain_attention(loss, name, student, teacher, keep)
    if name.startswith("router_"):
        return plain_router(name, student, teacher, keep)
    temperature = loss.temperature
    log_s = torch.log_softmax(student.last_hidden_state / temperature, -1)
    log_t = torch.log_softmax(teacher.last_hidden_state / temperature, -1)
    forward = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)
    reverse = temperature**2 * (log_s.exp() * (log_s - log_t)).sum(-1)
    gamma: Any = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(name)
    if name == "js":
        beta = loss.beta
        log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
        parts = beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_s.exp() * (log_s - log_m)
        divergence = temperature**2 * parts.sum(-1)
        return torch.stack([divergence[r, keep[r]].mean() for r in rows]).mean()
    if name == "cakld":
        p = torch.softmax(teacher.last_hidden_state, -1)
        gamma = torch.stack([p[r, keep[r], labels[r, keep[r] + 1]].mean() for r in rows]).mean()
    if name == "eakld" and loss.gate == "token":
        p = torch.softmax(teacher.last_hidden_state, -1)
        gamma = (1 + (p * p.log()).sum(-1) / math.log(loss.k)).clamp(0, 1)
    if gamma is None:
        p = torch.softmax(teacher.last_hidden_state, -1)
        entropy = torch.stack([-(p * p.log()).sum(-1)[r, keep[r]].mean() for r in rows]).mean()
        gamma = float((1 - entropy / math.log(loss.k)).clamp(0, 1))
    mixed = gamma * reverse + (1 - gamma) * forward
    if getattr(loss, "reduction", "mean") == "sum":
        return torch.stack([mixed[r, keep[r]].sum() for r in rows]).mean()
    return torch.stack([mixed[r, keep[r]].mean() for r in rows]).mean()


def plain_router(name: str, student: Outputs, teacher: Outputs, keep: dict[int, Tensor]) -> Tensor:
    """The losses of routers, one sample and layer after the other."""
    parts = []
    for row, positions in keep.items():
        for layer, routing in student.routing.items():
            z = routing.logits[row, positions]
            if name == "router_z":
                parts.append(z.exp().sum(-1).log().square().mean())
            elif name == "router_kl":
                p, q = (torch.softmax(x, -1) for x in (teacher.routing[layer].logits[row, positions], z))
                parts.append((p * (p / q).log()).sum(-1).mean())
            else:
                sent = [
                    (routing.chosen[row, positions] == expert).double().sum() / len(positions)
                    for expert in range(EXPERTS)
                ]
                shares = torch.stack(sent).to(z)
                parts.append(EXPERTS * (shares * torch.softmax(z, -1).mean(0)).sum())
    return torch.stack(parts).mean()


def plain_attention(loss: Any, name: str, student: Outputs, teacher: Outputs, keep: dict[int, Tensor]) -> Tensor:
    """The losses of attention, one sample, layer and head after the other."""
    sample_losses = []
    for row, positions in keep.items():
        parts = []
        for layer in loss.layers:
            ours, theirs = student.attention[layer], teacher.attention[layer]
            if name == "qk_entropy":
                parts += [(1 + x[row][:, positions].var(-1)).log().mean() for x in (ours.query, ours.key)]
                continue
            for left, right in loss.pairs:
                for head in range(getattr(ours, left).shape[1]):
                    maps = [
                        plain_map(loss, name, model_attention, row, head, (left, right), layer)
                        for model_attention in (ours, theirs)
                    ]
                    a, b = (model_attention[positions] for model_attention in maps)
                    if name == "attention_cosine":
                        parts.append(1 - torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
                    else:
                        visible = b > 0
                        divergence = (b[visible] * (b[visible].log() - a[visible].log())).sum() / len(b)
                        parts.append(loss.temperature**2 * divergence)
        sample_losses.append(
            -loss.beta * torch.stack(parts).sum().log() if name == "qk_entropy" else torch.stack(parts).mean()
        )
    return torch.stack(sample_losses).mean()


def plain_map(loss: Any, name: str, attention: Any, row: int, head: int, pair: tuple[str, str], layer: int) -> Tensor:
    """One head's map `[T, T]` of one sample."""
    left, right = (getattr(attention, part)[row] for part in pair)
    scores = left[head] @ right[head * len(right) // len(left)].T
    scores = scores / math.sqrt(left.shape[-1]) if name == "relation" else scores * attention.scale
    if attention.cap is not None and name != "relation":
        scores = attention.cap * torch.tanh(scores / attention.cap)
    visible = window(len(scores), layer)
    visible = torch.ones_like(scores).tril().bool() if visible is None else visible[0, 0]
    return torch.softmax((scores / getattr(loss, "temperature", 1.0)).masked_fill(~visible, -math.inf), -1)


def confident(teacher: Outputs) -> Outputs:
    """Sharper logits, so that EAKLD's gate is strictly between 0 and 1."""
    return dataclasses.replace(teacher, last_hidden_state=teacher.last_hidden_state.detach() * 1.2)


@every_loss
def test_value_and_gradient_are_those_of_the_definition(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    labels = labels_for(5, 9)
    teacher = confident(outputs(5, 9, seed=1))
    student = outputs(5, 9, seed=2, gradient=True)
    expected = plain(loss, name, student, teacher, labels)
    value = step_loss(loss, [(student, teacher, labels)])
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    ours = torch.autograd.grad(value, leaves(student), allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves(student), allow_unused=True)
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), [variant for variant in VARIANTS if variant[0] not in ALONE])
def test_zero_at_equality(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    student = outputs(4, 7, seed=3, gradient=True)
    value = step_loss(loss, [(student, outputs(4, 7, seed=3), labels_for(4, 7))])
    value.backward()
    assert value.item() == 0.0
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves(student))


@pytest.mark.parametrize(("name", "options"), [variant for variant in VARIANTS if variant[0] != "qk_entropy"])
def test_positive_elsewhere(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    for seed in range(5):
        parts = [(outputs(3, 6, seed), confident(outputs(3, 6, seed + 100)), labels_for(3, 6))]
        assert step_loss(loss, parts).item() > 0.01


@every_loss
def test_micro_batches_add_up(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    labels, teacher = labels_for(4, 9), confident(outputs(4, 9, seed=1))
    gradients = []
    for cuts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)], [slice(0, 1), slice(1, 2), slice(2, 4)]):
        student = outputs(4, 9, seed=2, gradient=True)
        value = step_loss(loss, [(cut(student, rows), cut(teacher, rows), labels[rows]) for rows in cuts])
        used = torch.autograd.grad(value, leaves(student), allow_unused=True)
        gradients.append([value, *(grad for grad in used if grad is not None)])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-12, atol=1e-14)


@every_loss
def test_padding_changes_nothing(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    labels, student, teacher = labels_for(3, 6), outputs(3, 6, seed=1), confident(outputs(3, 6, seed=2))

    def padded(short: Outputs, seed: int) -> Outputs:
        return each_tensor(lambda name, one, other: torch.cat([one, other], -2), short, outputs(3, 5, seed))

    longer = torch.cat([labels, torch.full((3, 5), MASKED)], dim=1)
    value = step_loss(loss, [(student, teacher, labels)])
    wide = step_loss(loss, [(padded(student, 8), padded(teacher, 9), longer)])
    assert wide.item() == pytest.approx(value.item(), rel=1e-13)


@every_loss
def test_nothing_to_predict_is_zero_not_nan(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    student = outputs(2, 5, seed=1, gradient=True)
    labels = torch.full((2, 5), MASKED)
    labels[0, 0] = 3  # the first token is predicted by nobody
    value = step_loss(loss, [(student, outputs(2, 5, seed=2), labels)])
    value.backward()
    assert value.item() == 0.0
    assert any(leaf.grad is not None for leaf in leaves(student))
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves(student))


@every_loss
def test_bfloat16_is_computed_in_float32(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    labels = labels_for(4, 9)
    short = [outputs(4, 9, seed, torch.bfloat16) for seed in (1, 2)]
    same = [each_tensor(lambda name, tensor: tensor.float(), model_outputs) for model_outputs in short]
    value = step_loss(loss, [(short[0], short[1], labels)])
    assert value.dtype == torch.float32
    assert value.item() == step_loss(loss, [(same[0], same[1], labels)]).item()


@every_loss
def test_only_the_student_learns(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    student, teacher = outputs(3, 6, 1, gradient=True), outputs(3, 6, 2, gradient=True)
    step_loss(loss, [(student, teacher, labels_for(3, 6))]).backward()
    assert all(leaf.grad is None for leaf in leaves(teacher))
    assert any(leaf.grad is not None for leaf in leaves(student))


@every_loss
def test_missing_teacher_is_an_error(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    labels = labels_for(3, 6)
    totals = totals_of(loss, [(outputs(3, 6, 2), labels)])
    if loss.needs_teacher:
        with pytest.raises(ValueError, match="teacher"):
            loss(outputs(3, 6, 1), None, labels, totals)
    else:
        assert loss(outputs(3, 6, 1), None, labels, totals).item() != 0


@every_loss
def test_the_layers_and_parts_it_names_are_all_it_needs(name: str, options: dict[str, object]) -> None:
    loss = make(name, options)
    full = [outputs(3, 6, 1), outputs(3, 6, 2)]
    unused = dict.fromkeys({"query", "key", "value"} - set(loss.attention_parts))
    bare = [
        Outputs(
            o.last_hidden_state,
            {layer: o.hidden_states[layer] for layer in loss.hidden_layers()},
            attention={k: dataclasses.replace(o.attention[k], **unused) for k in loss.attention_layers()},
            routing=o.routing if loss.needs_routing else {},
        )
        for o in full
    ]
    labels = labels_for(3, 6)
    assert step_loss(loss, [(bare[0], bare[1], labels)]) == step_loss(loss, [(full[0], full[1], labels)])


class Mixed(losses.LogitLoss):
    """The mixture of both KLs with a gate of one's choice."""

    def __init__(self, gamma: float, temperature: float = 1.0) -> None:
        self.gamma, self.temperature = gamma, temperature

    def value_and_grad(self, logits: losses.TokenLogits, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        return divergences.mixed_kl(logits, self.gamma, self.temperature)


def on_logits(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of a loss over positions of logits [n, V]; all but an appended last position count."""
    whole = [torch.nn.functional.pad(logits, (0, 0, 0, 1)).unsqueeze(0) for logits in (student, teacher)]
    labels = torch.zeros(whole[0].shape[:2], dtype=torch.int64)
    return step_loss(loss, [(Outputs(whole[0]), Outputs(whole[1]), labels)])


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_mixed_kl_gradcheck(gamma: float, temperature: float) -> None:
    student, teacher = (outputs(1, 4, seed).last_hidden_state[0, :, :5].clone() for seed in (1, 2))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: on_logits(Mixed(gamma, temperature), logits, teacher), student)


def test_kl_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2)."""
    teacher, student = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = torch.tensor([0.625, 0.375])
    halves = [0.75 * math.log(0.75 / middle[0]) + 0.25 * math.log(0.25 / middle[1])]
    halves += [0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1])]
    expected = {
        Mixed(0.0): forward,
        Mixed(1.0): reverse,
        Mixed(0.25): 0.25 * reverse + 0.75 * forward,
        losses.make("js"): sum(halves) / 2,
    }
    for loss, value in expected.items():
        assert on_logits(loss, student, teacher).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("loss", [Mixed(0.0), Mixed(0.6), Mixed(1.0), losses.make("js", beta=0.3)])
def test_temperature_scales_logits_and_multiplies_by_its_square(loss: Any) -> None:
    student, teacher = outputs(1, 5, 1).last_hidden_state[0], outputs(1, 5, 2).last_hidden_state[0]
    hot = copy.copy(loss)
    hot.temperature = 4.0
    expected = 16 * on_logits(loss, student / 4, teacher / 4).item()
    assert on_logits(hot, student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [Mixed(0.5), losses.make("js")])
def test_probabilities_that_underflow_give_finite_values(loss: Loss) -> None:
    student = torch.tensor([[0.0, 300.0, -300.0]], requires_grad=True)
    value = on_logits(loss, student, torch.tensor([[0.0, -300.0, 300.0]]))
    value.backward()
    assert value.item() == pytest.approx(600.0 if isinstance(loss, Mixed) else math.log(2))
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("extra", [(0, 5), (5, 0)])
@every_logit_loss
def test_only_the_common_vocabulary_counts(name: str, options: dict[str, object], extra: tuple[int, int]) -> None:
    loss = losses.make(name, **options)
    student, teacher = outputs(1, 6, 1).last_hidden_state[0], outputs(1, 6, 2).last_hidden_state[0]
    wide = [torch.nn.functional.pad(logits, (0, more), value=-900.0) for logits, more in zip((student, teacher), extra)]  # noqa: B905
    wide[0].requires_grad_()
    value = on_logits(loss, wide[0], wide[1])
    assert value.item() == pytest.approx(on_logits(loss, student, teacher).item(), rel=1e-13)
    (gradient,) = torch.autograd.grad(value, wide[0])
    assert not gradient[..., VOCABULARY:].any()


@pytest.mark.parametrize("name", ["attention_kl", "attention_cosine", "relation"])
def test_blocks_of_maps_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, teacher, results = labels_for(4, 11), outputs(4, 11, 2), []
    for elements in (1 << 18, 1, 250):
        monkeypatch.setitem(attention_maps.BLOCK_ELEMENTS, "cpu", elements)
        student = outputs(4, 11, 1, gradient=True)
        value = 3 * step_loss(make(name, {}), [(student, teacher, labels)])
        gradients = torch.autograd.grad(value, leaves(student), allow_unused=True)
        results.append([value, *(gradient for gradient in gradients if gradient is not None)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["attention_kl", "attention_cosine", "relation"])
def test_no_map_is_kept_for_backward(name: str) -> None:
    """What stays of 30 x 30 maps is as large as queries, keys and values."""
    sizes: list[int] = []
    student, teacher = outputs(1, 30, 1, gradient=True), outputs(1, 30, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x):
        step_loss(make(name, {}), [(student, teacher, torch.ones(1, 30, dtype=torch.int64))]).backward()
    assert 0 < max(sizes) <= HEADS * 30 * FEATURES < KEY_HEADS * 30 * 30


def test_attention_by_hand() -> None:
    """Two tokens: the second row of the map is (3/4, 1/4) for the teacher and (1/2, 1/2) for the student."""

    def outputs_with_score(score: float) -> Outputs:
        query = torch.tensor([[[[1.0], [1.0], [1.0]]]], dtype=torch.float64)
        key = torch.tensor([[[[score], [0.0], [0.0]]]], dtype=torch.float64)
        return Outputs(torch.zeros(1, 3, 4), attention={1: Attention(query, key, key)})

    labels = torch.tensor([[1, MASKED, 2]])  # only the second token counts
    student, teacher = outputs_with_score(0.0), outputs_with_score(math.log(3))
    expected = {
        "attention_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "attention_cosine": 1 - 1 / math.sqrt(2 * 10 / 16),
    }
    for name, value in expected.items():
        loss = losses.make(name, layers=1)
        assert step_loss(loss, [(student, teacher, labels)]).item() == pytest.approx(value, rel=1e-9)


def test_entropy_guidance_by_hand() -> None:
    """Queries of variance e - 1, keys of variance e² - 1: the sum of logarithms is 3 in each of two layers."""
    vectors = [torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * math.sqrt(math.exp(n) - 1) for n in (1, 2)]
    query, key = (vector.expand(1, heads, 4, 3) for vector, heads in zip(vectors, (4, 2), strict=True))
    student = Outputs(torch.zeros(1, 4, 5), attention={layer: Attention(query, key) for layer in (1, 2)})
    labels = torch.ones(1, 4, dtype=torch.int64)
    loss = losses.make("qk_entropy", layers=(1, 2), beta=0.25)
    assert step_loss(loss, [(student, student, labels)]).item() == pytest.approx(-0.25 * math.log(6), rel=1e-12)


def test_maps_that_cannot_be_compared_are_an_error() -> None:
    labels = labels_for(2, 5)
    loss = losses.make("attention_kl", layers=1)
    other = outputs(2, 5, 2)
    other.attention[1].query = torch.zeros(2, 8, 5, FEATURES)
    with pytest.raises(ValueError, match="cannot be compared"):
        loss(outputs(2, 5, 1), other, labels, StepTotals(2, 8))
    with pytest.raises(ValueError, match="layer 7 is missing"):
        losses.make("attention_kl", layers=7)(other, other, labels, StepTotals(2, 8))
    with pytest.raises(ValueError, match="how many layers"):
        losses.make("attention_kl")(other, other, labels, StepTotals(2, 8))


# --- several teachers ----------------------------------------------------------------------------


@every_logit_loss
def test_several_teachers_are_one_with_the_mean_probabilities(name: str, options: dict[str, object]) -> None:
    """Through heads of their own, and with vocabularies that are padded differently."""
    loss, labels = make(name, options), labels_for(4, 9)
    sizes = ((6, VOCABULARY), (10, VOCABULARY + 3), (4, VOCABULARY + 1))
    made = [through_head(4, 9, seed, size, words) for seed, (size, words) in enumerate(sizes)]
    with torch.no_grad():
        mean = torch.stack([torch.softmax(logits[..., :VOCABULARY], -1) for _, logits in made]).mean(0)
    teacher = dataclasses.replace(made[0][0], others=tuple(further for further, _ in made[1:]))
    assert teacher.vocab_size == VOCABULARY
    expected = step_loss(loss, [(outputs(4, 9, 7), Outputs(mean.log()), labels)])
    assert step_loss(loss, [(outputs(4, 9, 7), teacher, labels)]).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_gate_of_each_token_asks_for_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor makes logits for them."""
    monkeypatch.setattr(Outputs, "logits", lambda *_: pytest.fail("logits were made"))
    teacher, labels = outputs(4, 9, 3), labels_for(4, 9)
    for loss in (make("eakld", {"gate": "token"}), make("forward_kl", {}), make("ce", {})):
        assert not loss.statistics_need_logits()
        assert loss.teacher_statistics(teacher, labels) == {}
    assert make("eakld", {}).statistics_need_logits()
    assert make("cakld", {}).statistics_need_logits()


@every_logit_loss
def test_several_teachers_are_one_with_the_mean_logits(name: str, options: dict[str, object]) -> None:
    """As EdgeQAT's code averages them, `softmax(mean(z) / T)`."""
    loss, labels = make(name, options), labels_for(4, 9)
    made = [through_head(4, 9, seed, size, VOCABULARY) for seed, size in enumerate((6, 10, 4))]
    mean = torch.stack([logits.detach() for _, logits in made]).mean(0)
    teacher = dataclasses.replace(made[0][0], others=tuple(further for further, _ in made[1:]), averaging="logits")
    expected = step_loss(loss, [(outputs(4, 9, 7), Outputs(mean), labels)])
    assert step_loss(loss, [(outputs(4, 9, 7), teacher, labels)]).item() == pytest.approx(expected.item(), rel=1e-12)


def test_edgeqat_weighs_its_losses_as_published() -> None:
    """Half of the cross entropy, half of PyTorch's `batchmean` divergence at T = 2, times T²; teachers' mean logits."""
    generator = torch.Generator().manual_seed(3)
    student, *teachers = (torch.randn(4, 129, VOCABULARY, dtype=torch.float64, generator=generator) for _ in range(3))
    labels = torch.randint(0, VOCABULARY, (4, 129), generator=generator)
    flat, words = student[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    divergence = torch.nn.KLDivLoss(reduction="batchmean")(
        torch.log_softmax(student[:, :-1] / 2, -1), torch.softmax(torch.stack(teachers).mean(0)[:, :-1] / 2, -1)
    )
    published = 0.5 * torch.nn.functional.cross_entropy(flat, words) + 0.5 * divergence * 4
    recipe = recipes.build(recipes.load(ROOT / "recipes" / "edgeqat-w4a8.yaml"))
    assert recipe.distill.teacher_average == "logits"
    terms = [term for term in recipe.distill.losses if term.name in ("ce", "forward_kl")]
    weighted: Any = [(term.weight, losses.make(term.name, **objective.loss_options(term))) for term in terms]
    teacher = Outputs(teachers[0], others=(Outputs(teachers[1]),), averaging="logits")
    ours = losses.total_loss(weighted, Outputs(student), teacher, labels, StepTotals(4, 4 * 128))
    assert ours.item() == pytest.approx(published.item(), rel=1e-12)


def test_cached_logits_are_those_that_would_be_computed() -> None:
    labels = labels_for(4, 9)
    teacher, _ = through_head(4, 9, 3, 6, VOCABULARY)
    caching, positions = dataclasses.replace(teacher), prediction_mask(labels).flatten().nonzero().flatten()
    caching.cache_logits(positions, len(positions) * VOCABULARY - 1)
    assert caching._logits_cache is None  # too many
    caching.cache_logits(positions, len(positions) * VOCABULARY)
    torch.testing.assert_close(caching.logits(positions[3:5]), teacher.logits(positions[3:5]), rtol=1e-12, atol=1e-12)
    caching.last_hidden_state = torch.full_like(caching.last_hidden_state, math.nan)  # not read again
    loss, student = make("eakld", {}), outputs(4, 9, 7)
    expected = step_loss(loss, [(student, teacher, labels)])
    torch.testing.assert_close(step_loss(loss, [(student, caching, labels)]), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_never_rounded_to_sixteen_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16-bit factors, summed in float32: the same as in float64 but for float32's own rounding."""
    monkeypatch.setattr(base, "WIDENED_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((VOCABULARY, 300), (5, 300)))
    bias = torch.randn(VOCABULARY, generator=generator)
    logits = Head(weight, bias).logits(states)
    assert logits.dtype == torch.float32
    exact = states.double() @ weight.double().T + bias.double()
    assert (logits - exact).abs().max() < 1e-4 < (logits - logits.to(dtype).float()).abs().max()


def test_shapes_that_disagree_are_refused() -> None:
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not agree"):
        losses.make("forward_kl")(outputs(2, 3, 1), outputs(2, 4, 1), labels, StepTotals(2, 4))
    with pytest.raises(ValueError, match="do not agree"):
        losses.make("ce")(outputs(2, 4, 1), None, labels, StepTotals(2, 4))


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [50.0, 50.0, 0.0, 0.0]])
    entropies = divergences.entropy(logits.log_softmax(-1))
    torch.testing.assert_close(entropies, torch.tensor([math.log(4), 0.0, math.log(2)]))


# --- from hidden states --------------------------------------------------------------------------


def through_head(
    batch: int, length: int, seed: int, size: int, vocabulary: int, **shape: Any
) -> tuple[Outputs, Tensor]:
    """Random final states and a head, and the whole logits that they make, for autograd to differentiate."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).requires_grad_()

    states, weight, bias = random(batch, length, size), random(vocabulary, size), random(vocabulary)
    head = Head(weight.detach(), bias, master=weight, **shape)
    logits = (states @ weight.T + bias) * head.scale
    return Outputs(states, head=head), logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


@pytest.mark.parametrize("shape", [{}, {"scale": 0.5}, {"cap": 3.0}])
@every_logit_loss
def test_the_chunked_objective_is_the_plain_one(name: str, options: dict[str, object], shape: dict[str, Any]) -> None:
    """Value, and gradients for states, head and bias, with a teacher of another hidden size."""
    loss, labels = losses.make(name, **options), labels_for(4, 9)
    student, logits = through_head(4, 9, 1, 6, VOCABULARY, **shape)
    teacher, target = through_head(4, 9, 2, 10, VOCABULARY, scale=0.7)
    expected = plain(loss, name, Outputs(logits), Outputs(target.detach()), labels)
    value = step_loss(loss, [(student, teacher, labels)])
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert student.head is not None
    inputs = (student.last_hidden_state, student.head.master, student.head.bias)
    ours, theirs = torch.autograd.grad(3 * value, inputs), torch.autograd.grad(3 * expected, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("elements", [1, 40, 100])
def test_chunks_and_blocks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = [(0.3, losses.make("ce")), (2.0, losses.make("eakld")), (0.7, losses.make("js"))]
    labels = labels_for(3, 31)
    results = []
    for sizes in (None, (elements, elements), (10 * elements, elements)):
        if sizes:
            monkeypatch.setattr(logit_losses, "CHUNK_ELEMENTS", sizes[0])
            monkeypatch.setattr(logit_losses, "HEAD_ROWS", 5)
            monkeypatch.setattr(logit_losses, "BLOCK_POSITIONS", 1)
            monkeypatch.setitem(logit_losses.BLOCK_ELEMENTS, "cpu", sizes[1])
        student, _ = through_head(3, 31, 1, 6, VOCABULARY, cap=4.0)
        teacher, _ = through_head(3, 31, 2, 6, VOCABULARY)
        assert student.head is not None
        totals = totals_of(terms[1][1], [(teacher, labels)])
        value = losses.total_loss(terms, student, teacher, labels, totals)
        results.append(
            [value, *torch.autograd.grad(value, (student.last_hidden_state, student.head.master, student.head.bias))]
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-15)


def test_an_objective_is_the_sum_of_its_terms() -> None:
    labels, student, teacher = labels_for(3, 6), outputs(3, 6, 1), confident(outputs(3, 6, 2))
    terms = [(0.1, losses.make("ce")), (2.0, losses.make("eakld")), (0.5, losses.make("lafd", layers=(1, 3)))]
    totals = totals_of(terms[1][1], [(teacher, labels)])
    whole = losses.total_loss(terms, student, teacher, labels, totals)
    assert whole.item() == pytest.approx(sum(w * loss(student, teacher, labels, totals).item() for w, loss in terms))


def test_gate_by_hand() -> None:
    gate = EntropyAwareKL().gamma
    values = [gate(math.log(words)) for words in (1, 2, 4, 16, 1000)]
    assert values == pytest.approx([1.0, 0.75, 0.5, 0.0, 0.0], abs=1e-12)
    assert EntropyAwareKL(k=4).gamma(math.log(2)) == pytest.approx(0.5)


@pytest.mark.parametrize(("entropy", "name"), [(math.log(16), "forward_kl"), (99.0, "forward_kl"), (0.0, "reverse_kl")])
def test_eakld_is_forward_kl_at_gamma_0_and_reverse_kl_at_1(entropy: float, name: str) -> None:
    student, teacher, labels = outputs(4, 7, 1), outputs(4, 7, 2), labels_for(4, 7)
    totals = StepTotals(*step_counts(labels), {"teacher_entropy": entropy})
    value = losses.make("eakld", temperature=2.0)(student, teacher, labels, totals)
    assert value.item() == losses.make(name, temperature=2.0)(student, teacher, labels, totals).item()


def test_eakld_without_its_statistic_is_an_error() -> None:
    with pytest.raises(ValueError, match="teacher_entropy"):
        losses.make("eakld")(outputs(1, 4, 1), outputs(1, 4, 2), labels_for(1, 4), StepTotals(1, 3))


def test_mask_and_weights_by_hand() -> None:
    labels = torch.tensor([[1, 2, MASKED, 4], [MASKED, MASKED, MASKED, 5], [7, MASKED, MASKED, MASKED]])
    assert prediction_mask(labels).tolist() == [[True, False, True, False], [False, False, True, False], [False] * 4]
    assert step_counts(labels) == (2, 3)
    assert sample_weights(labels, 2).tolist() == [[0.25, 0, 0.25, 0], [0, 0, 0.5, 0], [0, 0, 0, 0]]


def test_layer_similarity_by_hand() -> None:
    start = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    turned = torch.tensor([[[0.0, 3.0], [0.0, 2.0], [-1.0, -1.0]]])  # cosines 0, 1 and, masked, -1
    mask = torch.tensor([[1, 1, 0]])
    similarity = layer_metric("cosine", {0: start, 1: turned, 2: -turned, 3: -2 * turned}, mask)
    torch.testing.assert_close(similarity, torch.tensor([0.5, -1.0, 1.0]))
    with pytest.raises(ValueError, match="Hidden states"):
        layer_metric("cosine", {0: start, 2: turned}, mask)
    with pytest.raises(ValueError, match="No position"):
        layer_metric("cosine", {0: start, 1: turned}, torch.zeros(1, 3))


def test_norm_and_variance_by_hand() -> None:
    """Two samples; the last position of the second does not count."""
    state = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], [[1.0, 0.0], [3.0, 0.0], [99.0, 99.0]]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    hidden = {0: torch.zeros_like(state), 1: state, 2: 2 * state}
    norms = (5 + 0 + 10 + 1 + 3) / 5
    torch.testing.assert_close(layer_metric("l2", hidden, mask), torch.tensor([norms, 2 * norms]))
    first, second = (9 + 16) / 2, 2 / 2  # mean over features of the variances over positions
    spread = (3 * first + 2 * second) / 5
    torch.testing.assert_close(layer_metric("variance", hidden, mask), torch.tensor([spread, 4 * spread]))


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, (2, 3, 4)),
        ({"count": 2}, (2, 4)),
        ({"metric": "l2", "count": 2}, (3, 4)),
        ({"metric": "variance", "count": 2}, (1, 2)),
        ({"layers": "low"}, (1,)),
        ({"layers": ["high", "mid", 1]}, (1, 2, 4)),
        ({"select": "batch"}, (1, 2, 3, 4)),
    ],
)
def test_lafd_takes_the_layers_that_it_is_asked_for(options: dict[str, object], layers: tuple[int, ...]) -> None:
    loss = make("lafd", options)
    assert isinstance(loss, LayerAdaptiveFeatureDistillation)
    assert loss.layers == layers


@pytest.mark.parametrize("metric", ["l2", "variance"])
def test_lafd_chooses_the_largest_of_the_step(metric: str) -> None:
    loss = make("lafd", {"metric": metric, "select": "batch", "count": 1})
    assert isinstance(loss, LayerAdaptiveFeatureDistillation)
    teacher, labels = outputs(4, 9, 1), labels_for(4, 9)
    teacher.hidden_states[3] = teacher.hidden_states[3] * 1.5
    assert loss.compared_layers(totals_of(loss, [(teacher, labels)])) == (3,)
    with pytest.raises(ValueError, match=f"lack the {metric} of layers"):
        loss.compared_layers(StepTotals(3, 9))


def test_least_similar_by_hand() -> None:
    assert least_similar([0.9, 0.1, 0.5, 0.1, 0.7], 3) == (2, 3, 4)
    assert least_similar([0.5, 0.5, 0.5], 2) == (1, 2)
    assert least_similar([0.5, 0.2], 3) == (1, 2)
    for similarities, k in (([0.5], 0), ([], 1), ([0.5, float("nan")], 1)):
        with pytest.raises(ValueError, match="layer"):
            least_similar(similarities, k)


def test_lafd_by_hand() -> None:
    """Two layers differ by 1 and 3 in every feature: the mean of 1 and 9 is 5."""
    logits, states = torch.zeros(2, 4, 3), torch.randn(2, 4, 8)
    teacher = Outputs(logits, {1: states, 2: states})
    student = Outputs(logits, {1: states + 1, 2: states - 3})
    loss = LayerAdaptiveFeatureDistillation(layers=(2, 1))
    assert step_loss(loss, [(student, teacher, torch.ones(2, 4, dtype=torch.int64))]).item() == pytest.approx(
        5, rel=1e-5
    )
    with pytest.raises(ValueError, match="layer 2 is missing"):
        loss(Outputs(logits, {1: states}), teacher, torch.ones(2, 4, dtype=torch.int64), StepTotals(2, 6))


def test_lafd_matches_what_pictures_take() -> None:
    """By an option: the mean over words and pictures together, however the step is divided."""
    labels = labels_for(3, 6)
    pictures = torch.zeros(3, 6, dtype=torch.bool)
    pictures[0, 1:4] = pictures[1, 2] = True
    student, teacher = outputs(3, 6, 1), dataclasses.replace(outputs(3, 6, 2), pictures=pictures)
    squares = (student.hidden_states[2] - teacher.hidden_states[2]).square().mean(-1)
    for option in (False, True):
        loss = make("lafd", {"layers": (2,), "pictures": option})
        mask = losses.prediction_mask(labels) | (pictures if option else False)
        totals = totals_of(loss, [(teacher, labels)])
        torch.testing.assert_close(loss(student, teacher, labels, totals), squares[mask].mean())
        parts = []
        for rows in (slice(0, 2), slice(2, 3)):
            halves = [each_tensor(lambda _, tensor, rows=rows: tensor[rows], side) for side in (student, teacher)]
            halves[1].pictures = pictures[rows] if pictures[rows].any() else None
            parts.append((*halves, labels[rows]))
        totals = totals_of(loss, [(part[1], part[2]) for part in parts])
        torch.testing.assert_close(sum(loss(*part, totals) for part in parts), squares[mask].mean())


def test_lafd_chooses_by_the_samples_of_the_whole_step() -> None:
    loss = LayerAdaptiveFeatureDistillation(layers=(1, 2, 3, 4), select="batch", count=2)
    teacher, labels = outputs(4, 9, 1), torch.ones(4, 9, dtype=torch.int64)
    whole = layer_metric("cosine", {k: v[:, :-1] for k, v in teacher.hidden_states.items()}, labels[:, :-1]).tolist()
    assert loss.compared_layers(totals_of(loss, [(teacher, labels)])) == least_similar(whole, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eakl", {}, "no losse? called 'eakl'"),
        ("ce", {"temperature": 1.0}, "no option called 'temperature'; it has none"),
        ("eakld", {"tau": 1.0}, "no option called 'tau'; its options are temperature, k"),
        ("forward_kl", {"temperature": 0.0}, "temperature is 0.0; it must be a number greater than 0"),
        ("reverse_kl", {"temperature": "hot"}, "temperature is 'hot'"),
        ("eakld", {"k": 1}, "k is 1; it must be a number greater than 1"),
        ("lafd", {"layers": ()}, "layers is \\(\\)"),
        ("lafd", {"layers": (0, 1)}, "counted from 1"),
        ("lafd", {"layers": (1, "top")}, "called low, mid, high, last"),
        ("lafd", {"metric": "l1"}, "metric is 'l1'; it must be one of cosine, l2, variance"),
        ("relation", {"of": "values"}, "of is 'values'; it must be one of query, key, value, both"),
        ("attention_kl", {"layers": 1.5}, "layers is 1.5"),
        ("attention_kl", {"temperature": 0}, "temperature is 0"),
        ("attention_cosine", {"temperature": 1.0}, "no option called 'temperature'; its options are layers"),
        ("qk_entropy", {"beta": 0}, "beta is 0"),
        ("lafd", {"layers": (1,), "count": 0}, "count is 0"),
        ("lafd", {"pictures": 1}, "pictures is 1; it must be true or false"),
        ("lafd", {"layers": (1,), "select": "best"}, "'calibrated' or 'batch'"),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        losses.make(name, **options)
    assert caught.value.code == 2
