"""Sampling: the distributions of transformers' processors, drawn reproducibly from float32 logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgerazor.errors import UserError
from edgerazor.recipe import Generate
from edgerazor.runtime.sampling import BLOCK, Sampler, draw, highest_of, nucleus

TEMPERATURES, TOP_K, TOP_P = (0.3, 1.0, 2.5), (0, 1, 7, 5000), (1.0, 0.999, 0.9, 0.35, 1e-6)
MIN_P, PENALTIES = (0.0, 0.02, 1.0), (1.0, 1.3, 0.8)


def drawn_logits(size: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


def by_transformers(asked: Generate, logits: np.ndarray, seen: list[int]) -> np.ndarray:
    """The distribution after transformers' processors, in float64."""
    found = LogitsProcessorList()
    if asked.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(asked.repetition_penalty))
    found.append(TemperatureLogitsWarper(asked.temperature))
    if asked.top_k:
        found.append(TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1:
        found.append(TopPLogitsWarper(asked.top_p))
    if asked.min_p:
        found.append(MinPLogitsWarper(asked.min_p))
    scores = found(torch.tensor([seen]), torch.tensor(logits[None], dtype=torch.float64))
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("size", [1, 3, 300, 5003])
def test_every_combination_has_the_distribution_of_transformers(size: int) -> None:
    for number, values in enumerate(itertools.product(TEMPERATURES, TOP_K, TOP_P, MIN_P, PENALTIES)):
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        asked = Generate(**dict(zip(names, values, strict=True)))
        logits = drawn_logits(size, number)
        seen = np.random.default_rng(number).integers(0, size, 40).tolist()
        sampler = Sampler(asked, 0, size)
        sampler.see(seen)
        found, expected = sampler.distribution(logits), by_transformers(asked, logits, seen)
        assert ((found > 0) == (expected > 0)).all(), values
        assert np.abs(found - expected).max() < 2e-6, values


def test_order_and_meaning_are_those_of_generate(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).double().eval()
    prompt = torch.tensor([[5, 9, 9, 40, 77]])
    values: dict[str, Any] = {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.4}
    with torch.no_grad():
        out = model.generate(
            prompt,
            do_sample=True,
            max_new_tokens=1,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
            **values,
        )
    sampler = Sampler(Generate(**values), 0, 300)
    sampler.see(prompt[0].tolist())
    expected = out.scores[0].softmax(-1)[0].numpy()
    found = sampler.distribution(out.logits[0][0].numpy())
    assert 1 < (expected > 0).sum() < 40
    assert ((found > 0) == (expected > 0)).all()
    assert np.abs(found - expected).max() < 1e-6


def test_tokens_are_drawn_as_often_as_the_distribution_says() -> None:
    logits = drawn_logits(3000, spread=1.5)
    sampler = Sampler(Generate(temperature=1.3, top_p=0.97), 7, 3000)
    chances = sampler.distribution(logits)
    counts = np.bincount([sampler.choose(logits) for _ in range(20_000)], minlength=3000)
    assert counts[chances == 0].sum() == 0
    likely = chances > 5e-4
    expected = 20_000 * chances[likely]
    # chi-squared of n cells: n +- sqrt(2n)
    squares = ((counts[likely] - expected) ** 2 / expected).sum()
    assert abs(squares - likely.sum()) < 5 * np.sqrt(2 * likely.sum())


def test_a_weight_of_zero_is_never_drawn_and_borders_belong_to_the_next() -> None:
    weights = np.zeros(2 * BLOCK + 3, dtype=np.float32)
    weights[[0, 5, BLOCK, 2 * BLOCK + 1]] = 1
    drawn = [draw(weights, share) for share in (0.0, 0.2499, 0.25, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53)]
    assert drawn == [0, 0, 5, 5, BLOCK, BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 1]


def test_a_seed_gives_the_same_tokens_and_every_token_takes_one_number() -> None:
    logits = [drawn_logits(500, seed) for seed in range(30)]
    asked = Generate(temperature=1.0, top_p=0.9)
    first, second = ([s.choose(each) for each in logits] for s in (Sampler(asked, 5, 500), Sampler(asked, 5, 500)))
    assert first == second
    assert first != [Sampler(asked, 6, 500).choose(each) for each in logits]
    one, other = Sampler(Generate(temperature=1e-3), 5, 500), Sampler(asked, 5, 500)
    one.choose(logits[0])  # certain
    other.choose(logits[0])
    assert one.random.random() == other.random.random()


def test_logits_stay_as_they_are() -> None:
    logits = drawn_logits(300)
    before = logits.copy()
    for asked in (Generate(repetition_penalty=2.0), Generate(temperature=0.5, top_k=3, repetition_penalty=2.0)):
        sampler = Sampler(asked, 0, 300)
        sampler.see([1, 2, 3, 999])  # a token that has no logit
        sampler.choose(logits)
        sampler.choose(torch.from_numpy(logits))
    assert (logits == before).all()


def test_without_temperature_it_is_the_likeliest_token_the_first_of_equal_ones() -> None:
    logits = np.array([1, 4, 4, -2, 3], dtype=np.float32)
    sampler = Sampler(Generate(), 0, 5)
    assert sampler.plain
    assert sampler.choose(logits) == 1
    penalized = Sampler(Generate(repetition_penalty=1.5), 0, 5)
    assert not penalized.plain
    penalized.see([1, 2])  # 4 / 1.5 < 3
    assert penalized.choose(logits) == 4
    below = Sampler(Generate(repetition_penalty=2.0), 0, 2)
    below.see([0])  # -1 * 2 < -1.5
    assert below.choose(np.array([-1, -1.5], dtype=np.float32)) == 1
    assert below.distribution(np.array([-1, -1.5], dtype=np.float32)).tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_low_temperature_is_greedy_in_the_end(temperature: float) -> None:
    for options in ({}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}):
        sampler = Sampler(Generate(temperature=temperature, **options), 0, 400)
        for seed in range(5):
            logits = drawn_logits(400, seed)
            assert sampler.choose(logits) == logits.argmax()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("kind", ["normal", "equal", "steps", "one", "two far"])
def test_the_nucleus_is_that_of_a_sorted_vocabulary(kind: str, share: float) -> None:
    size = 20_000
    scores = {
        "normal": drawn_logits(size),
        "equal": np.zeros(size, dtype=np.float32),
        "steps": np.round(drawn_logits(size)),
        "one": np.where(np.arange(size) == 77, 60, drawn_logits(size)),
        "two far": np.where(np.arange(size) % 2, np.float32(0), np.float32(-1e30)),
    }[kind].astype(np.float32)
    scores -= scores.max()
    weights = np.exp(scores)
    order = np.argsort(-scores, kind="stable")
    reached = np.cumsum(weights[order].astype(np.float64))
    before = np.append(0, reached[:-1])
    expected = np.sort(order[before < share * reached[-1]])
    found = nucleus(scores, weights, share)
    border = np.abs(before - share * reached[-1]).min() < 1e-9 * reached[-1]  # a matter of rounding
    assert found.tolist() == expected.tolist() or (border and abs(len(found) - len(expected)) <= 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_one_sentence(value: float) -> None:
    logits = drawn_logits(300)
    logits[7] = value
    for asked in (Generate(), Generate(temperature=1.0)):
        with pytest.raises(UserError, match="not finite"):
            Sampler(asked, 0, 300).choose(logits)


def test_penalties_of_openai_count_what_was_written() -> None:
    """The prompt is free; the order is bias, repetition, then frequency and presence."""
    settings = Generate(
        temperature=1.0,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={0: 3.0, 4: -100.0},
    )
    sampler = Sampler(settings, 0, 6)
    assert not sampler.plain
    sampler.see([1, 1, 2])
    sampler.see([2])
    sampler.see([3])
    sampler.see([3])
    logits = np.array([1.0, 2.0, 2.0, 2.0, 2.0, 2.0], dtype=np.float32)
    expected = np.array([4.0, 1.0, 1.0 - 0.25 - 0.5, 1.0 - 0.5 - 0.5, -98.0, 2.0])
    weights = np.exp(expected - expected.max())
    assert sampler.distribution(logits) == pytest.approx(weights / weights.sum(), abs=1e-6)
    assert logits.tolist() == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    sampler.reset()
    assert sampler.distribution(logits)[1] == pytest.approx(sampler.distribution(logits)[5])


def test_a_bias_of_an_unknown_token_is_refused() -> None:
    with pytest.raises(UserError, match="`logit_bias` names token 6"):
        Sampler(Generate(logit_bias={6: 1.0}), 0, 6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_a_grammar_forbids_is_never_drawn(temperature: float) -> None:
    logits = drawn_logits(5003)
    allowed = np.zeros(5003, dtype=bool)
    allowed[[17, 4000]] = True
    more = {"top_p": 0.9, "top_k": 50, "min_p": 0.01} if temperature else {}
    sampler = Sampler(Generate(temperature=temperature, **more), 0, 5003)
    masked = np.where(allowed, logits, np.float32(-np.inf))
    assert {sampler.choose(masked) for _ in range(200)} <= {17, 4000}
    assert draw(np.array([0, 1, 0, 0], dtype=np.float32), np.nextafter(1.0, 0.0)) == 1


@pytest.mark.parametrize("count", [1, 2, 39, 40, 500, 999])
def test_the_highest_scores_are_found_without_sorting_them(count: int) -> None:
    draw = np.random.default_rng(count)
    ties = draw.integers(0, 300, 1000).astype(np.float32)
    for scores in (draw.normal(size=1000).astype(np.float32), ties, np.zeros(1000, np.float32)):
        expected = np.flatnonzero(scores >= np.sort(scores)[-count])
        assert highest_of(scores, count).tolist() == expected.tolist()
    with_none = np.where(ties > 290, ties, -np.inf).astype(np.float32)
    assert highest_of(with_none, count).tolist() == np.flatnonzero(with_none >= np.sort(with_none)[-count]).tolist()
