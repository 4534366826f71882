"""The choice of settings that fit a budget: a pure function of the size of a model, its budget and its speed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from edgerazor.recipe import CHOSEN_BY_BUDGET, build
from edgerazor.training import budget_defaults
from edgerazor.training.budget_defaults import (
    LEAST_RATE,
    MOST_RATE,
    MOST_STEP_TOKENS,
    TrainingFacts,
    choose,
    learning_rate,
)

#: SmolLM2-135M on two cores.
SMOLLM2 = TrainingFacts(
    width=576,
    vocabulary=49_152,
    sequence_length=1024,
    tokens=None,
    seconds=3600.0,
    tokens_per_second=127.0,
    sensitivity_seconds=0.25,
    sensitivity_tokens=9000,
    writing_seconds=0.03,
)
#: stories260K with 256 tokens in a sequence.
STORIES = TrainingFacts(
    width=64,
    vocabulary=512,
    sequence_length=256,
    tokens=30_000,
    seconds=None,
    tokens_per_second=2000.0,
    sensitivity_seconds=0.001,
    sensitivity_tokens=16_384,
    writing_seconds=0.001,
)


def step_tokens(facts: TrainingFacts) -> int:
    settings = choose(facts).values["distill"]
    return int(settings["batch_size"] * settings["accumulation"] * facts.processes * facts.sequence_length)


def test_what_is_chosen_is_a_recipe_and_just_what_may_be_chosen() -> None:
    for facts in (SMOLLM2, STORIES):
        chosen = choose(facts)
        assert {name: set(section) for name, section in chosen.values.items()} == {
            name: set(fields) for name, fields in CHOSEN_BY_BUDGET.items()
        }
        distill = build(chosen.values).distill
        assert distill.schedule == "cosine"
        assert [term.name for term in distill.losses] == ["forward_kl"]


def test_the_reasons_are_three_lines_with_the_numbers() -> None:
    reasons = choose(SMOLLM2).reasons
    assert len(reasons) == 3
    assert all("\n" not in reason for reason in reasons)
    rate = choose(SMOLLM2).values["distill"]["learning_rate"]
    assert "457,200 tokens, about 60.0 min at 127 tokens/s, an estimate" in reasons[0]
    assert f"learning rate {rate:g}" in reasons[1]
    assert "scales at 0.25 of it" in reasons[1]
    assert "scales are trained" in reasons[2]
    assert ", measured" in choose(dataclasses.replace(SMOLLM2, measured=True)).reasons[0]


def test_what_is_given_is_neither_chosen_nor_explained() -> None:
    given = dataclasses.replace(SMOLLM2, given_batch=2)
    chosen = choose(given, {"distill": {"warmup", "evaluate_every"}})
    assert {name: set(values) for name, values in chosen.values.items()} == {"distill": {"warmup", "evaluate_every"}}
    spent, training, start = chosen.reasons
    assert "224 steps of about 2,042 tokens, since the batch is given" in spent
    assert training == "Training: warm-up 5 %."
    assert start == "Start: as given; what is given stays."


def test_time_is_tokens_at_the_speed_and_the_smaller_budget_counts() -> None:
    assert SMOLLM2.budget_tokens == 457_200
    assert dataclasses.replace(SMOLLM2, tokens=1000).budget_tokens == 1000
    assert dataclasses.replace(SMOLLM2, tokens=10**9).budget_tokens == 457_200
    assert dataclasses.replace(SMOLLM2, tokens_per_second=1e-6).budget_tokens == 1


def test_the_teacher_writes_for_a_share_of_the_training() -> None:
    def written(facts: TrainingFacts) -> int:
        return int(choose(facts).values["data"]["generated_tokens"])

    assert written(SMOLLM2) == 457_200  # all that is trained: writing ends after its time
    assert "up to 457,200 tokens of text that the teacher writes in at most 15.0 min" in choose(SMOLLM2).reasons[2]
    assert written(dataclasses.replace(SMOLLM2, seconds=1.0)) == budget_defaults.FEWEST_WRITTEN
    assert written(dataclasses.replace(SMOLLM2, seconds=1e6)) == budget_defaults.MOST_WRITTEN
    by_tokens = dataclasses.replace(SMOLLM2, seconds=None, tokens=457_200)
    assert written(by_tokens) == 30_000  # of which 15 minutes are a quarter of the training
    assert "30,000 tokens of text that the teacher writes, about 15.0 min" in choose(by_tokens).reasons[2]
    assert written(dataclasses.replace(STORIES, writing_seconds=1e-9)) == STORIES.tokens  # nothing is read but once
    assert choose(dataclasses.replace(SMOLLM2, writing_seconds=0.0)).values["data"] == {"sequence_length": 512}


def test_sequences_are_no_longer_than_a_step() -> None:
    def length(**changes: Any) -> int:
        return int(choose(dataclasses.replace(SMOLLM2, **changes)).values["data"]["sequence_length"])

    assert length() == 512  # of 457,200 tokens
    assert [length(tokens=tokens, seconds=None) for tokens in (1000, 100_000, 10_000_000)] == [256, 256, 1024]
    assert length(sequence_length=128) == 128  # no longer than the model takes, or as long as was said
    assert length(long_sequences=True) == length(device="cuda") == 1024
    assert "sequences of 512 tokens" in choose(SMOLLM2).reasons[1]
    given = choose(SMOLLM2, {"distill": {"batch_size"}})
    assert given.values == {"distill": {"batch_size": 1}}
    assert "sequences" not in given.reasons[1]


def test_a_step_grows_with_the_budget_up_to_the_published_batch() -> None:
    budgets = (1, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9, 10**12)
    steps = [step_tokens(dataclasses.replace(SMOLLM2, tokens=tokens, seconds=None)) for tokens in budgets]
    assert steps == sorted(steps)
    assert steps[0] == SMOLLM2.sequence_length  # no less than one sequence
    assert steps[-1] == MOST_STEP_TOKENS


def test_time_on_a_gpu_is_spent_in_larger_steps() -> None:
    on_gpu = dataclasses.replace(SMOLLM2, device="cuda")
    assert step_tokens(on_gpu) == budget_defaults.LEAST_GPU_STEP_TOKENS > step_tokens(SMOLLM2)
    by_tokens = dataclasses.replace(on_gpu, tokens=457_200, seconds=None)
    assert step_tokens(by_tokens) == step_tokens(SMOLLM2)


def test_the_learning_rate_falls_with_width_and_budget_within_bounds() -> None:
    by_width = [learning_rate(width, 10**5) for width in (8, 64, 256, 576, 2048, 8192, 10**6)]
    assert by_width == sorted(by_width, reverse=True)
    assert (by_width[0], by_width[-1]) == (MOST_RATE, LEAST_RATE)
    by_tokens = [learning_rate(576, tokens) for tokens in (1, 10**5, 10**6, 10**8, 10**9)]
    assert by_tokens == sorted(by_tokens, reverse=True)
    assert 2e-5 <= learning_rate(1024, 10**9) <= 6e-5  # EdgeRazor's and others' published settings


def test_the_learning_rate_goes_with_small_weights_and_falls_above_three_bits() -> None:
    """Gemma-3-270M lost by 1.2e-4 at 4 bits and gained by 2e-5; the teachers of the sweep keep their rates."""
    assert learning_rate(640, 10**5) == 1.2e-4
    assert learning_rate(640, 10**5, 0.0408, 4.0) == 2.9e-5
    assert learning_rate(640, 10**5, 0.0408, 8.0) == 2.9e-5
    assert learning_rate(640, 10**5, 0.0408, 2.0) == learning_rate(640, 10**5, 0.0408, 3.0) == 8.3e-5
    for width, size in ((64, 0.309), (256, 0.104), (256, 0.0601), (576, 0.136)):
        assert learning_rate(width, 10**5, size, 2.0) == learning_rate(width, 10**5)


def test_a_forward_pass_holds_no_more_logits_than_fit() -> None:
    many = dataclasses.replace(SMOLLM2, tokens=10**9, seconds=None, vocabulary=262_144)
    settings = choose(many).values["distill"]
    assert settings["batch_size"] == 1
    assert settings["accumulation"] == MOST_STEP_TOKENS // 1024
    on_a_gpu = choose(dataclasses.replace(many, device="cuda")).values["distill"]
    assert on_a_gpu["batch_size"] > 1
    assert on_a_gpu["batch_size"] * on_a_gpu["accumulation"] >= MOST_STEP_TOKENS // 1024


def test_processes_share_a_step() -> None:
    facts = dataclasses.replace(SMOLLM2, tokens=10**9, seconds=None)
    assert step_tokens(dataclasses.replace(facts, processes=4)) == step_tokens(facts)


@pytest.mark.parametrize("tokens", [1, 30_000, 10**6, 10**9])
def test_evaluations_take_a_small_part_of_the_budget(tokens: int) -> None:
    facts = dataclasses.replace(SMOLLM2, tokens=tokens, seconds=None)
    settings = choose(facts).values["distill"]
    steps = -(-tokens // step_tokens(facts))
    evaluations = steps // settings["evaluate_every"]
    cost = evaluations * facts.evaluate_sequences * facts.sequence_length / 2
    assert evaluations <= 1 or cost <= 1.01 * budget_defaults.EVALUATION_SHARE * tokens
    assert 1 <= settings["checkpoint_every"] <= 100


@pytest.mark.parametrize(("seconds", "tokens"), [(600.0, 2048), (3600.0, 3600), (86_400.0, 9000)])
def test_sensitivity_takes_a_quarter_of_the_trainings_time_within_its_bounds(seconds: float, tokens: int) -> None:
    chosen = choose(dataclasses.replace(SMOLLM2, seconds=seconds))
    assert chosen.values["calibrate"]["sensitivity_tokens"] == pytest.approx(tokens, abs=1)
    assert "bits by sensitivity from " in chosen.reasons[2]


def test_a_plan_that_measures_nothing_costs_nothing() -> None:
    chosen = choose(dataclasses.replace(SMOLLM2, sensitivity_seconds=0.0))
    assert "sensitivity_tokens" not in chosen.values["calibrate"]
    assert "sensitivity" not in chosen.reasons[2]


def test_the_student_begins_with_gptqs_codes_where_they_take_a_quarter_of_the_training() -> None:
    def start(facts: TrainingFacts) -> tuple[str, str]:
        chosen = choose(facts)
        return chosen.values["calibrate"]["init"], chosen.reasons[2]

    assert start(SMOLLM2)[0] == "least_error"  # nobody knows what they take
    init, why = start(dataclasses.replace(SMOLLM2, gptq_seconds=200.0))
    assert init == "gptq"
    assert "from those of GPTQ with its codes, about 3.3 min beforehand" in why
    narrow = dataclasses.replace(SMOLLM2, gptq_seconds=200.0, width=256)  # the embedded teacher's: it would lose
    assert start(narrow)[0] == "least_error"
    init, why = start(dataclasses.replace(SMOLLM2, gptq_seconds=901.0))
    assert init == "least_error"
    assert "from those of least error" in why
