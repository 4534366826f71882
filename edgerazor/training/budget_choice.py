"""Which settings of a recipe its budget chooses, and that a job keeps what was chosen once.

`budget_defaults.py` says what fits; here it is asked for the fields that neither recipe nor options set, and the answer
is kept in the working directory. A training that goes on, and every later stage, takes the kept settings: a speed that
is measured again would choose others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from edgerazor import devices, models, untrusted
from edgerazor import recipe as recipes
from edgerazor.allocate import affordable_tokens, measures, passes_of
from edgerazor.console import is_main_process
from edgerazor.job import JobContext
from edgerazor.recipe import CHOSEN_BY_BUDGET, Distill, Recipe
from edgerazor.training import budget_defaults
from edgerazor.training.budget_defaults import TrainingFacts
from edgerazor.training.speed import (
    PASSES,
    Speed,
    cost_of,
    forward_seconds,
    init_seconds,
    measure_machine,
    speed_of,
    step_seconds,
    weight_passes,
    writing_seconds,
)
from edgerazor.workdir import WorkDir, digest_json, write_json

#: Tokens of a step whose speed is estimated first, where the step is still to be chosen.
TYPICAL_STEP_TOKENS = 1024


class BudgetChoice(BaseModel):
    """What was chosen for a job.

    Attributes:
        request: digest of what decides the choice but the speed: model, bits, budget, and what was set.
        values: section -> field -> value, of what was not set.
        reasons: for people.
    """

    model_config = ConfigDict(extra="forbid")

    request: str
    values: dict[str, dict[str, Any]]
    reasons: list[str]


def choose(context: JobContext, stored_choice: BudgetChoice | None) -> BudgetChoice | None:
    """The settings that a job's budget chooses; None where nothing is left to choose.

    Args:
        context: of the job, its recipe as it was asked for.
        stored_choice: what was chosen before, which stays where the same is asked or a training has begun with it.

    Raises:
        UserError: the model cannot be read.
    """
    recipe = context.recipe
    fields = open_fields(recipe)
    if not fields:
        return None
    request = digest_of(context)
    if stored_choice is not None and (stored_choice.request == request or context.training):
        return stored_choice
    written: dict[str, dict[str, Any]] = {}
    if context.work.generated_text.exists():  # which took the teacher its time: it stays as long as it is
        before = stored(context.work)
        written = {"data": before.values["data"]} if before is not None and "data" in before.values else {}
        fields.pop("data", None)
    made = None
    if is_main_process():
        facts = facts_of(context, fields)
        if "data" in written:
            facts = replace(facts, sequence_length=written["data"].get("sequence_length", facts.sequence_length))
        fitting = budget_defaults.choose(facts, fields)
        made = BudgetChoice(request=request, values={**fitting.values, **written}, reasons=list(fitting.reasons))
    devices.join_processes(context.device)
    return devices.of_main_process(made)  # each process would measure another speed


def open_fields(recipe: Recipe) -> dict[str, set[str]]:
    """Section -> its fields that the budget chooses; nothing where steps are given, or nothing is trained."""
    if not recipe.distill.has_open_budget() or recipe.pack.source == "teacher":
        return {}
    fields = {
        section: set(names) - getattr(recipe, section).model_fields_set for section, names in CHOSEN_BY_BUDGET.items()
    }
    if not measures(recipe.calibrate):
        fields["calibrate"] -= {"sensitivity_tokens"}
    if recipe.data.train:  # there is text
        fields["data"] -= {"generated_tokens"}
    if recipe.distill.recording is not None:  # with sequences of its own
        fields["data"] = set()
    if has_batch(recipe.distill):
        fields["distill"] -= {"batch_size", "accumulation"}
    if "learning_rate" in recipe.distill.model_fields_set:  # that of scales, too, as published settings have it
        fields["distill"] -= {"scale_rate"}
    return {section: names for section, names in fields.items() if names}


def has_batch(settings: Distill) -> bool:
    """Whether the user says how large a step is: each of the two decides what the other would be."""
    return bool(settings.model_fields_set & {"batch_size", "accumulation"})


def apply(recipe: Recipe, choice: BudgetChoice) -> tuple[Recipe, dict[str, dict[str, Any]]]:
    """The recipe with what was chosen, where nobody has set it; and just these settings."""
    fields = open_fields(recipe)
    values = {
        section: {name: value for name, value in settings.items() if name in fields.get(section, ())}
        for section, settings in choice.values.items()
    }
    return recipes.with_values(recipe, values, "What was chosen for the budget"), values


def digest_of(context: JobContext) -> str:
    """Of everything that decides the choice, but for the speed of the machine."""
    recipe = context.recipe
    said = {
        section: getattr(recipe, section).model_dump(
            mode="json", include=getattr(recipe, section).model_fields_set & set(names), exclude_unset=True
        )
        for section, names in CHOSEN_BY_BUDGET.items()
    }
    distill = recipe.distill
    budget = [distill.tokens, distill.max_time, distill.evaluate_sequences, *recipe.calibrate.budget()]
    return digest_json([context.teacher_fingerprint, recipe.data.sequence_length, budget, said])


def stored(work: WorkDir) -> BudgetChoice | None:
    """What a working directory keeps; None where it keeps nothing that can be read."""
    try:
        return untrusted.load_model(work.budget_file, BudgetChoice)
    except (OSError, ValueError):
        return None


def store(choice: BudgetChoice, work: WorkDir) -> None:
    """Keep a choice for later commands."""
    if choice != stored(work):
        write_json(work.budget_file, choice.model_dump(mode="json"))


def facts_of(context: JobContext, fields: Mapping[str, Collection[str]]) -> TrainingFacts:
    """What the choice of fields depends on: from the model's configuration, and a second of measuring."""
    outline, settings = context.teacher_outline, context.recipe.distill
    length = context.sequence_length(outline.model)
    speed = speed_of(context)
    weights = sum(weight.numel() for weight in outline.model.parameters())
    head = outline.structure.head or outline.structure.embedding
    facts = TrainingFacts(
        width=outline.structure.embedding.columns,
        vocabulary=head.rows,
        sequence_length=length,
        tokens=settings.tokens,
        seconds=settings.max_time,
        tokens_per_second=speed.tokens_per_second or tokens_per_second(context, speed, length, TYPICAL_STEP_TOKENS),
        measured=speed.machine is None,
        evaluate_sequences=settings.evaluate_sequences,
        given_batch=settings.batch_size * settings.accumulation if has_batch(settings) else None,
        processes=devices.process_count(),
        device=context.device.type,
        long_sequences=bool(outline.structure.towers),
        sensitivity_seconds=sensitivity_seconds(context, length),
        sensitivity_tokens=affordable_tokens(weights, context.device),
        gptq_seconds=gptq_seconds(context, length),
        writing_seconds=0.0 if context.recipe.data.train else seconds_to_write(context),
        weight_size=models.weight_size(context.teacher_folder),
        bits=asked_bits(context.recipe, weights),
    )
    if facts.measured:
        return facts
    # small steps take longer for a token, so fewer tokens fit into the time, which may ask for smaller steps still
    if "sequence_length" in fields.get("data", ()):
        length = budget_defaults.sequence_length(facts)
    rows = facts.given_batch or math.prod(budget_defaults.batch(replace(facts, sequence_length=length)))
    return replace(facts, tokens_per_second=tokens_per_second(context, speed, length, rows * length))


def asked_bits(recipe: Recipe, weights: int) -> float:
    """Bits of a weight that a recipe asks for; those of a target size are real ones."""
    name, value = recipe.calibrate.budget()
    return 8 * value / weights if name == "target_size" else value


def seconds_to_write(context: JobContext) -> float:
    """Estimated seconds of the teacher for a token of its own text."""
    machine = measure_machine(context.device, devices.inference_dtype(context.device) or torch.bfloat16)
    return writing_seconds(cost_of(context.teacher_outline.structure, 1), machine, 1)


def sensitivity_seconds(context: JobContext, length: int) -> float:
    """Estimated seconds of the analysis of sensitivity for a token; 0 where the plan measures nothing."""
    settings, structure = context.recipe.calibrate, context.teacher_outline.structure
    if not measures(settings):
        return 0.0
    machine = measure_machine(context.device, devices.inference_dtype(context.device) or torch.bfloat16)
    return forward_seconds(cost_of(structure, length), machine, passes_of(settings, len(structure.linears)))


def gptq_seconds(context: JobContext, length: int) -> float | None:
    """Estimated seconds of finding GPTQ's codes; None where the student cannot begin with them, or memory is little."""
    calibrate, distill = context.recipe.calibrate, context.recipe.distill
    is_at_hand = distill.teacher_source == "resident" and distill.memory is None and distill.initialise == "teacher"
    if not is_at_hand or calibrate.adaptive_tokens != "off":
        return None
    machine = measure_machine(context.device, devices.inference_dtype(context.device) or torch.bfloat16)
    cost = cost_of(context.teacher_outline.structure, length)
    sequences = calibrate.model_copy(update={"init": "gptq"}).init_sequences(length)
    return init_seconds("gptq", cost, machine, sequences * length)


def tokens_per_second(context: JobContext, speed: Speed, length: int, step_tokens: int) -> float:
    """Estimated speed of a training over all processes, in sequences and in steps on each of so many tokens."""
    assert speed.machine is not None
    outline = context.teacher_outline
    tokens = max(length, step_tokens)
    passes = float(PASSES - (context.recipe.distill.recording is not None))
    calibrate = context.recipe.calibrate
    learned = calibrate.scales == "learned" or "scales" not in calibrate.model_fields_set  # which the budget chooses
    over_weights = weight_passes(learned, context.device)
    cost = cost_of(outline.structure, length)
    seconds = step_seconds(cost, speed.machine, tokens, passes=passes, over_weights=over_weights)
    return devices.process_count() * tokens / seconds
