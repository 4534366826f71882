"""Recordings: samples without bias, losses from what was kept, files that give back what was written or a sentence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edgerazor import losses, recording
from edgerazor.errors import UserError
from edgerazor.losses.core.base import MASKED, Outputs, StepTotals, prediction_mask, step_counts
from edgerazor.losses.core.recorded import RecordedTokens
from edgerazor.recording import Layout, Shard
from edgerazor.recording.folder import RecordedPart
from edgerazor.workdir import hash_file

VOCABULARY = 700


def log_probs_of(count: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(count, VOCABULARY, generator=generator, dtype=torch.float64), 1)


def recorded_of(log_probs: Tensor, sample: recording.TokenSample, power: float = 1.0) -> RecordedTokens:
    by_chance = torch.arange(sample.ids.shape[1]) >= sample.certain[:, None]
    inclusion = (sample.scale[:, None] * (power * sample.log_probs).exp()).clamp(min=1e-300)
    weights = torch.where(by_chance, 1 / inclusion, 1.0)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    return RecordedTokens(
        sample.ids, sample.log_probs, weights, by_chance, sample.tail, entropy, log_probs[:, 0], log_probs.shape[1]
    )


# --- samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("count", [1, 12, 60])
def test_a_sample_has_no_bias(power: float, count: int) -> None:
    """Over all values of the random number, a token's weights sum up to its probability, and none is there twice."""
    log_probs = log_probs_of(1, seed=3)
    steps = 4000
    uniform = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    sample = recording.sample_tokens(log_probs.expand(steps, -1).contiguous(), count, power, uniform)
    assert all(len(set(ids)) == count for ids in sample.ids.tolist())
    recorded = recorded_of(log_probs, sample, power)
    counts = recorded.weights * recorded.log_probs.exp()
    mean = torch.zeros(VOCABULARY, dtype=torch.float64).index_add_(0, sample.ids.flatten(), counts.flatten()) / steps
    proposal = (power * log_probs[0]).exp()
    weight = (log_probs[0].exp() / (sample.scale[0] * proposal).clamp(max=1)).max()
    assert (mean - log_probs[0].exp()).abs().max() < 2 * weight / steps
    certain = int(sample.certain[0])
    assert sample.ids[0, :certain].tolist() == log_probs[0].topk(max(certain, 1)).indices.tolist()[:certain]
    tail = 1 - sample.log_probs[0, :certain].exp().sum()
    assert float(sample.tail[0]) == pytest.approx(float(tail), abs=1e-12)


def test_a_sure_teacher_leaves_no_tail() -> None:
    log_probs = torch.full((1, VOCABULARY), -math.inf, dtype=torch.float64)
    log_probs[0, :3] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    sample = recording.sample_tokens(log_probs, 5, 1.0, torch.tensor([0.4], dtype=torch.float64))
    assert sample.ids[0, :3].tolist() == [0, 1, 2]
    assert float(sample.tail[0]) == 0.0
    assert int(sample.certain[0]) == 5
    top = recording.top_tokens(log_probs_of(4, 1), 9)
    assert torch.equal(top.ids, log_probs_of(4, 1).topk(9).indices)


def test_chance_is_a_function_of_sequence_and_seed() -> None:
    first, again, other, seeded = (
        recording.random_numbers(key, seed, 5)
        for key, seed in ((b"a" * 16, 0), (b"a" * 16, 0), (b"b" * 16, 0), (b"a" * 16, 1))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, seeded)
    assert ((first >= 0) & (first < 1)).all()


def test_a_key_does_not_see_padding() -> None:
    ids, labels = torch.arange(10, 20), torch.arange(10, 20)
    labels = labels.where(torch.arange(10) < 7, torch.tensor(MASKED))
    padded_ids, padded = (
        torch.cat([tensor, torch.full((4,), value)]) for tensor, value in ((ids, 3), (labels, MASKED))
    )
    assert recording.sequence_key(ids, labels) == recording.sequence_key(padded_ids, padded)
    assert recording.sequence_key(ids[:7], labels[:7]) == recording.sequence_key(ids, labels)
    assert recording.sequence_key(ids, torch.arange(10, 20)) != recording.sequence_key(ids, labels)
    masked = labels.clone()
    masked[3] = MASKED
    assert recording.sequence_key(ids, masked) != recording.sequence_key(ids, labels)


# --- losses ------------------------------------------------------------------------------------

NAMES = ("forward_kl", "reverse_kl", "eakld", "cakld", "js")


def loss_and_gradient(name: str, student: Tensor, teacher: Outputs, labels: Tensor) -> tuple[float, Tensor]:
    loss = losses.make(name)
    samples, tokens = step_counts(labels)
    sums = loss.teacher_statistics(teacher, labels)
    totals = StepTotals(samples, tokens, {key: float(value) / samples for key, value in sums.items()})
    states = student.clone().requires_grad_()
    value = loss(Outputs(states), teacher, labels, totals)
    (gradient,) = torch.autograd.grad(value, states)
    return float(value.detach()), gradient


@dataclasses.dataclass
class Compared:
    """A student and a teacher at some positions, as logits `[B, T, V]`, and the labels `[B, T]`."""

    student: Tensor
    teacher: Tensor
    labels: Tensor

    def recorded(self, choose: Callable[[Tensor], recording.TokenSample]) -> Outputs:
        mask = prediction_mask(self.labels)
        log_probs = torch.log_softmax(self.teacher, -1)[mask]
        targets = self.labels.roll(-1, 1)[mask]
        tokens = recorded_of(log_probs, choose(log_probs))
        tokens = dataclasses.replace(tokens, target_log_probs=log_probs.gather(1, targets[:, None])[:, 0])
        return Outputs(torch.empty(*self.labels.shape, 0, dtype=torch.float64), recorded=tokens)


@pytest.fixture(scope="module")
def compared() -> Compared:
    generator = torch.Generator().manual_seed(1)
    teacher = 3 * torch.randn(2, 6, VOCABULARY, generator=generator, dtype=torch.float64)
    student = teacher + 0.4 * torch.randn(2, 6, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (2, 6), generator=generator)
    labels[0, 4:] = MASKED
    return Compared(student, teacher, labels)


@pytest.mark.parametrize("name", NAMES)
def test_with_all_tokens_a_recording_is_the_teacher(name: str, compared: Compared) -> None:
    everything = compared.recorded(lambda log_probs: recording.top_tokens(log_probs, VOCABULARY))
    value, gradient = loss_and_gradient(name, compared.student, everything, compared.labels)
    expected, reference = loss_and_gradient(name, compared.student, Outputs(compared.teacher), compared.labels)
    assert value == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_samples_agree_with_the_teacher_on_average(name: str, compared: Compared) -> None:
    """Value and gradient over many samples; near the teacher nothing is cut off, so that all losses have no bias."""
    expected, reference = loss_and_gradient(name, compared.student, Outputs(compared.teacher), compared.labels)
    generator = torch.Generator().manual_seed(2)
    values, gradients = [], []
    for _ in range(150):
        sampled = compared.recorded(
            lambda log_probs: recording.sample_tokens(
                log_probs, 30, 1.0, torch.rand(len(log_probs), generator=generator, dtype=torch.float64)
            )
        )
        value, gradient = loss_and_gradient(name, compared.student, sampled, compared.labels)
        values.append(value)
        gradients.append(gradient)
    spread = torch.tensor(values).std() / math.sqrt(len(values))
    assert abs(sum(values) / len(values) - expected) < 4 * spread + 1e-4
    mean, noise = torch.stack(gradients).mean(0), torch.stack(gradients).var(0).sum() / len(gradients)
    assert (mean - reference).square().sum() < 2.5 * noise + 1e-4 * reference.square().sum()
    top = compared.recorded(lambda log_probs: recording.top_tokens(log_probs, 30))
    _, biased = loss_and_gradient(name, compared.student, top, compared.labels)
    assert (biased - reference).norm() > (mean - reference).norm()


def test_the_gradient_of_an_equal_student_is_nearly_nothing(compared: Compared) -> None:
    """A plain sample (RSKD) leaves noise there; the control variate does not."""
    uniform = torch.full((8,), 0.3, dtype=torch.float64)
    sampled = compared.recorded(lambda log_probs: recording.sample_tokens(log_probs, 20, 1.0, uniform))
    for name in NAMES:
        value, gradient = loss_and_gradient(name, compared.teacher, sampled, compared.labels)
        assert abs(value) < 1e-12
        assert gradient.abs().max() < 1e-12


def test_every_loss_says_whether_a_recording_serves_it() -> None:
    for name in losses.names():
        assert losses.make(name).from_recording in ("", "unbiased", "approximate")
    assert losses.make("forward_kl").from_recording == "unbiased"
    assert losses.make("relation").from_recording == ""


# --- files -------------------------------------------------------------------------------------

LAYOUT = Layout(vocab_size=VOCABULARY, tokens=3, hidden_layers=(2,), hidden_size=70, compact=True)


def some_fields(count: int, seed: int) -> recording.Fields:
    random = np.random.default_rng(seed)
    levels, scales = recording.encode_states(random.normal(size=(count, 70)).astype(np.float32))
    ids = random.integers(0, VOCABULARY, (count, 3))
    values = {
        **LAYOUT.encode(ids, -20 * random.random((count, 3)), random.random(count)),
        "certain": random.integers(0, 4, count),
        "hidden.2": levels,
        "hidden.2.scale": scales,
        **{name: random.random(count) for name in ("tail", "scale", "entropy", "target")},
    }
    return {name: values[name].astype(dtype) for name, (dtype, _) in LAYOUT.columns().items()}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "training-00000.safetensors"
    recording.write_shard(path, [(bytes([n]) * 16, some_fields(4 + n, n)) for n in range(3)], LAYOUT, "mine")
    return path


def test_a_shard_gives_back_what_was_written(shard: Path) -> None:
    opened = Shard(shard, LAYOUT, "mine")
    assert len(opened) == 3
    assert opened.positions == 4 + 5 + 6
    for row in (2, 0, 1):
        assert opened.key(row) == bytes([row]) * 16
        fields, expected = opened.sequence(row), some_fields(4 + row, row)
        assert all(np.array_equal(fields[name], expected[name]) for name in expected)
    states = np.random.default_rng(5).normal(size=(9, 70)).astype(np.float32)
    error = np.abs(recording.decode_states(*recording.encode_states(states)) - states)
    assert error.max() <= np.abs(states).max() / 254 + 1e-6


@pytest.mark.parametrize("vocab_size", [2, 512, VOCABULARY, 4096, 49152, 151_936])
@pytest.mark.parametrize("compact", [False, True])
def test_tokens_come_back_from_what_is_stored(vocab_size: int, compact: bool) -> None:
    random = np.random.default_rng(vocab_size)
    ids, log_probs = random.integers(0, vocab_size, (50, 7)), -30 * random.random((50, 7)) ** 3
    layout = Layout(vocab_size, 7, compact=compact)
    stored = layout.encode(ids, log_probs, random.random(50))
    types = layout.columns()
    assert all((values.dtype, values.shape[1:]) == types[name] for name, values in stored.items())
    assert np.array_equal(layout.ids(stored), ids)
    error = np.abs(layout.log_probs(stored) - log_probs)
    assert (error <= (2 * np.sqrt(32 * -log_probs) / 1023 + 1e-4 if compact else 1 / 4000)).all()


def test_rounded_probabilities_have_no_bias() -> None:
    """Over all values of the random number each is what it was, whatever its place among the kept tokens is."""
    log_probs = np.array([[0.0, -1e-4, -0.02, -0.7, -1.0, -5.3, -15.0, -31.9, -32.0, -80.0]])
    layout, chance = Layout(VOCABULARY, 10, compact=True), (np.arange(4000) + 0.5) / 4000
    stored = layout.encode(np.zeros((4000, 10)), np.repeat(log_probs, 4000, 0), chance)
    means = np.exp(layout.log_probs(stored).astype(np.float64)).mean(0)
    assert means == pytest.approx(np.exp(np.maximum(log_probs[0], -32.0)), rel=1e-4)


def test_a_position_takes_at_most_its_bytes() -> None:
    for vocab_size, tokens in ((4096, 46), (49152, 39), (151_936, 36)):
        assert recording.tokens_within(vocab_size, 148) == tokens
        assert Layout(vocab_size, tokens, compact=True).position_bytes <= 148


def test_any_damage_is_one_sentence(shard: Path) -> None:
    whole = shard.read_bytes()
    for place in [*range(0, len(whole), 97), len(whole) - 1]:
        changed = bytearray(whole)
        changed[place] ^= 4
        shard.write_bytes(changed)
        try:
            opened = Shard(shard, LAYOUT, "mine")
            opened.verify()
        except UserError as error:
            assert "damaged" in error.message  # noqa: PT017 - a changed key is an unknown sequence, and no damage yet
        else:
            assert [opened.key(row) for row in range(3)] != [bytes([n]) * 16 for n in range(3)]
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            Shard(shard, LAYOUT, "mine").verify()
    shard.write_bytes(whole)
    with pytest.raises(UserError, match="another recording"):
        Shard(shard, LAYOUT, "yours")


def test_sequences_are_found_in_any_order(shard: Path) -> None:
    record = {"file": shard.name, "sequences": 3, "positions": 15, "bytes": shard.stat().st_size}
    part = {"tokens": 3, "temperature": 1.0, "power": 1.0, "method": "sample"}
    description = recording.Description(
        complete=True, covers="everything", inputs={}, vocab_size=VOCABULARY, hidden_size=70, versions={},
        held_out=recording.Part(**part),
        training=recording.Part(
            **part, hidden_layers=(2,), shards=(recording.ShardRecord(**record, sha256="0" * 64),)
        ),
    )  # fmt: skip
    with pytest.raises(UserError, match="checksum"):
        RecordedPart(shard.parent, description, recording.TRAINING)
    recording.write_shard(
        shard, [(bytes([n]) * 16, some_fields(4 + n, n)) for n in range(3)], LAYOUT, description.identity("training")
    )
    record = {**record, "bytes": shard.stat().st_size}
    shards = (recording.ShardRecord(**record, sha256=hash_file(shard)),)
    description = description.model_copy(
        update={"training": description.training.model_copy(update={"shards": shards})}
    )
    opened = RecordedPart(shard.parent, description, recording.TRAINING)
    for row in (1, 2, 0):
        fields = opened.sequence(bytes([row]) * 16)
        assert np.array_equal(opened.layout.ids(fields), LAYOUT.ids(some_fields(4 + row, row)))
    assert b"\x07" * 16 not in opened
    assert opened.missing([b"\x01" * 16, b"\x07" * 16]) == 1
    with pytest.raises(UserError, match="lacks a sequence"):
        opened.sequence(b"\x07" * 16)
