"""The schema of a recipe: one strict, complete, printable description of a job.

A recipe is YAML with the five stages as its sections. Every field has a default, written here and nowhere
else, and a line of explanation (`edgerazor show recipe` prints them all). Unknown fields are refused.

What other files need to know of a field is marked on its type: `RecipePath` says that a text is a path (`load.anchor`
makes it absolute), `Flag` that its option on the command line has another name than the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from edgerazor.errors import MOST_THREADS

MINIMUM_BITS, MAXIMUM_BITS = 1.58, 8.0
#: A group size that no row exceeds: one scale per row, written `row`.
WHOLE_ROW = 65536
#: Bytes of the units of `target_size`.
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
#: Factors of the letters behind a number of tokens, and seconds of those behind a time.
COUNTS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
SECONDS = {"h": 3600, "m": 60, "s": 1}
#: Fields that a budget of tokens or time decides (`training/budget_defaults.py`) where nobody has set them.
CHOSEN_BY_BUDGET = {
    "data": ("generated_tokens", "sequence_length"),
    "calibrate": ("scales", "init", "sensitivity_tokens"),
    "distill": (
        "batch_size",
        "accumulation",
        "learning_rate",
        "scale_rate",
        "schedule",
        "warmup",
        "losses",
        "evaluate_every",
        "checkpoint_every",
    ),
}
#: Tokens whose second moments GPTQ takes, at least: of SmolLM2-135M at 2.4 real bits 4,096 leave KL 1.53, 16,384 leave
#: 1.39, and that distance stays in training (0.708 and 0.638 after 34,000 tokens).
GPTQ_TOKENS = 16_384
#: Fields that the model decides, and what is asked of it, where nobody sets them: section -> fields.
CHOSEN_BY_MODEL = {"calibrate": ("rotation",)}
#: Fields that were renamed, and their names now: recipes that still have the old ones are refused with the new one.
RETIRED_FIELDS = {"calibrate.start": "init", "distill.rungs": "phases"}
#: Likewise (field, value) -> the value's name now.
RETIRED_VALUES = {("calibrate.init", "rule"): "rtn"}


@dataclass(frozen=True)
class RecipePath:
    """Marks a text of a recipe as a path, relative to the folder that the recipe lies in.

    Args:
        or_hub_id: it may be an id of the Hugging Face hub instead; it is a path where there is such a file or folder.
        program: it is a program that edgerazor runs; the word `none` says that there is none.
    """

    or_hub_id: bool = False
    program: bool = False


@dataclass(frozen=True)
class Flag:
    """Marks a field whose option on the command line is not called like the field."""

    name: str


FilePath = Annotated[str, RecipePath()]
ModelPath = Annotated[str, RecipePath(or_hub_id=True)]
ProgramPath = Annotated[str, RecipePath(program=True)]


class Strict(BaseModel):
    """A frozen section of a recipe that refuses fields it does not know and numbers given as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    #: Fields of which at most one may be set; a later layer that sets one replaces the others.
    EXCLUSIVE: ClassVar[tuple[str, ...]] = ()


class Source(Strict):
    """One source of text or chat: a local file or a Hugging Face data set, one of the two."""

    file: FilePath | None = Field(None, description="a .txt, .json or .jsonl file, plain or .gz")
    dataset: str | None = Field(None, description="a data set id of the Hugging Face hub")
    config: str | None = Field(None, description="configuration of the data set")
    split: str = Field("train", description="split of the data set")
    column: str = Field("text", description="of a JSON file or data set; else `messages` or `conversations` is found")
    separator: str | None = Field(None, description="separates documents of a .txt file; found by itself when usual")
    streaming: bool = Field(False, description="read the data set as it is needed instead of downloading all of it")
    weight: float = Field(1.0, gt=0, description="share of this source in the mixture, relative to the others")

    @model_validator(mode="after")
    def _one_of_two(self) -> Source:
        if (self.file is None) == (self.dataset is None):
            raise ValueError("give either `file` or `dataset`")
        if self.streaming and self.dataset is None:
            raise ValueError("only a `dataset` can be streamed")
        return self


class Data(Strict):
    """Text to learn from, and text to measure on."""

    train: Annotated[tuple[Source, ...], Flag("--data")] = Field(
        (), description="mixture for calibrate and distill; empty: text of the teacher"
    )
    held_out: tuple[Source, ...] = Field((), description="text to measure on; empty: held_out_fraction of the mixture")
    generated_tokens: int = Field(65536, ge=512, description="about how many the teacher writes where train is empty")
    held_out_fraction: float = Field(
        0.05, gt=0, lt=0.5, description="share of each source kept for measuring, spread over it"
    )
    held_out_seed: int | None = Field(
        None, ge=0, description="of the choice of that share; absent: `seed`, so that each seed measures on other text"
    )
    held_out_rows: int = Field(
        256, ge=1, description="of a streamed source, which has no end, these first ones instead"
    )
    sequence_length: int = Field(1024, ge=8, description="tokens per sequence (at most what the model takes)")
    packing: Literal["stream", "document"] = Field(
        "stream", description="stream: full sequences across documents; document: one in each, padded to the longest"
    )
    bos: Literal["auto", "text"] = Field(
        "auto",
        description="auto: every sequence begins with BOS if the tokenizer adds one; text: only where a text begins",
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="what chat templates are given beside messages: {enable_thinking: false}"
    )


class Sampling(Strict):
    """How the teacher writes distilled data (`edgerazor data`). The first three are EdgeRazor's (arXiv 2605.04062)."""

    temperature: float = Field(0.7, ge=0, description="of the teacher's distribution; 0 takes the likeliest token")
    top_p: float = Field(0.95, gt=0, le=1, description="least probability that the tokens to draw from have together")
    top_k: int = Field(20, ge=0, description="tokens to draw from, the likeliest ones; 0 for all")
    answer_tokens: int = Field(1024, ge=1, description="most tokens of an answer or a text; longer answers are dropped")
    prompt_tokens: int = Field(64, ge=1, description="tokens of a text that the teacher goes on from")
    batch_size: int = Field(32, ge=1, description="prompts side by side")
    thinking: bool = Field(False, description="let the assistant think first, where its template can say so")


class Override(Strict):
    """A format for the matrices of some modules, whatever the rest of the section says."""

    match: str = Field(min_length=1, description="glob on module paths: *.down_proj, model.layers.0.*, lm_head")
    format: str = Field(description="a file of edgerazor/formats")


class Constraint(Strict):
    """A limit on the formats that a plan by sensitivity may give to the matrices of some modules."""

    match: str = Field(min_length=1, description="glob on module paths: *.o_proj")
    at_least: str | None = Field(None, description="the narrowest format allowed there")
    at_most: str | None = Field(None, description="the widest")

    @model_validator(mode="after")
    def _of_something(self) -> Constraint:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give `at_least`, `at_most` or both")
        return self


class Calibrate(Strict):
    """What the student will be: formats for every matrix, decided after looking at the teacher."""

    #: Each states how large the packed model may be, in its own way.
    EXCLUSIVE: ClassVar[tuple[str, ...]] = ("bits", "real_bits", "target_size")

    bits: float = Field(
        2.0, ge=MINIMUM_BITS, le=MAXIMUM_BITS, description="nominal average over the decoder's linear layers"
    )
    real_bits: float | None = Field(
        None, gt=0, le=32, description="instead of bits: 8 x bytes of the packed weight files / all weights, at most"
    )
    target_size: int | None = Field(
        None, ge=1, description="instead of bits: bytes of the packed weight files, at most: 200MB, 0.5GiB, 200000000"
    )
    formats: tuple[str, ...] = Field(
        (),
        description="to choose from; empty: ternary, int2, int3, int4 (above 4 bits int4, int5, int8); other plans "
        "than sensitivity mix two, narrower first; empty: ternary and int4 (int4 and int8)",
    )
    plan: Literal["sensitivity", "interleave", "variance", "first"] = Field(
        "sensitivity",
        description="what gets wider formats: units where they save most, spread evenly, of highest "
        "variance, or the first",
    )
    granularity: Literal["row", "tensor", "column", "block"] = Field(
        "row",
        description="such a unit: a row, a whole tensor (sensitivity alone), a group of columns in all rows, or a "
        "group of one row",
    )
    sensitivity: Literal["auto", "fisher", "integrated", "hessian", "direct"] = Field(
        "auto", description="how the damage of a format is estimated; auto: the best of three, by measured KL"
    )
    sensitivity_tokens: int | None = Field(
        None,
        ge=1,
        description="about how many tokens it is estimated from; absent: 2,048 to 16,384 (65,536 on a GPU) by the "
        "model's size",
    )
    sensitivity_points: int = Field(
        1, ge=1, description="for the estimate integrated, gradients taken on the way from the teacher to a format"
    )
    constraints: tuple[Constraint, ...] = Field(
        (), description="of a plan by sensitivity: {match: glob, at_least: format, at_most: format}"
    )
    group_size: int = Field(
        256, ge=8, le=WHOLE_ROW, description="consecutive weights of a row that share one scale; `row`: all of them"
    )
    embedding_format: str = Field("int4", description="format of the embedding, and of a head tied to it")
    head_format: str | None = Field(None, description="format of a head of its own; as the embedding when absent")
    overrides: tuple[Override, ...] = Field(
        (), description="{match: glob, format: name}, the first that matches; bits is the average of the other linears"
    )
    scales: Literal["computed", "learned"] = Field(
        "computed", description="scales of weights: as `init` says, or trained like weights (LSQ) from there"
    )
    init: Literal["least_error", "rtn", "clip", "gptq"] = Field(
        "least_error",
        description="scales to round and to begin with: of least squared error; rtn: each format's published rule "
        "(EdgeRazor's; LSQ's where scales are learned); clip: of least error by the size of inputs; gptq: and codes "
        "error-compensated",
    )
    rotation: Literal["hadamard"] | None = Field(
        None,
        description="none; hadamard: weights and inputs are multiplied by a signed block Hadamard matrix before they "
        "are rounded, which spreads outliers, and the only export is hf; absent: hadamard for models of 512 features "
        "and more, unless an export or `init: rtn` is asked for",
    )
    activation_bits: Literal[4, 5, 6, 7, 8, 16] = Field(8, description="inputs of quantized linear layers")
    activation_scales: Literal["dynamic", "static", "learned", "asymmetric"] = Field(
        "dynamic",
        description="per token and group; or one per input: from calibration text, trained from there, or trained with "
        "a zero point (EdgeQAT)",
    )
    kv_bits: Literal[4, 8, 16] = Field(8, description="keys and values: integers per token and head")
    query_bits: Literal[4, 8, 16] = Field(16, description="queries in attention, rounded like keys")
    probability_bits: Literal[4, 8, 16] = Field(16, description="attention probabilities, per token and head")
    adaptive_tokens: Literal["off", "causal", "ranked"] = Field(
        "off", description="4-bit activations for the half of the tokens that attends least to the first (EdgeQAT)"
    )
    towers: Literal["int8", "int4"] | None = Field(
        None,
        description="16: as they are; int8, int4: format of the linear layers that make features of pictures, in "
        "groups of 64 or 32 weights, the largest that divides their columns",
    )
    sequences: int = Field(
        16,
        ge=1,
        description="calibration sequences run through the teacher; absent: 16, or 16,384 tokens for gptq",
    )
    batch_size: int = Field(4, ge=1, description="sequences in one forward pass")

    @field_validator("towers", mode="before")
    @classmethod
    def _sixteen(cls, value: Any) -> Any:
        return None if value in (16, "16") else value

    @field_validator("rotation", mode="before")
    @classmethod
    def _no_rotation(cls, value: Any) -> Any:
        if value not in (None, "none", "hadamard"):
            raise ValueError(f"expected none or hadamard, got {repr(value)[:50]}")
        return None if value == "none" else value

    @field_validator("group_size", mode="before")
    @classmethod
    def _whole_row(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "row":
            raise ValueError(f"expected a whole number, or `row` for one scale per row, got {value!r}")
        return WHOLE_ROW if value == "row" else value

    @field_validator("target_size", mode="before")
    @classmethod
    def _size_in_bytes(cls, value: Any) -> Any:
        return size_in_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_budget(self) -> Calibrate:
        budgets = [name for name in self.EXCLUSIVE if name in self.model_fields_set and getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"`{budgets[0]}` and `{budgets[1]}` both say how large the model may be; give one of them")
        return self

    def init_sequences(self, length: int) -> int:
        """Calibration sequences of so many tokens that the initialization reads."""
        if self.init != "gptq" or "sequences" in self.model_fields_set:
            return self.sequences
        return max(self.sequences, math.ceil(GPTQ_TOKENS / length))

    def budget(self) -> tuple[str, float]:
        """Name and value of the field that limits the model's size."""
        if self.target_size is not None:
            return "target_size", self.target_size
        return ("bits", self.bits) if self.real_bits is None else ("real_bits", self.real_bits)

    @model_validator(mode="after")
    def _units_of_the_plan(self) -> Calibrate:
        measured = self.plan == "sensitivity"
        if self.granularity not in (("row", "tensor") if measured else ("row", "column", "block")):
            raise ValueError(f"`granularity: {self.granularity}` does not go with `plan: {self.plan}`")
        if self.constraints and not measured:
            raise ValueError(f"`constraints` do not go with `plan: {self.plan}`; use `overrides`")
        return self

    @model_validator(mode="after")
    def _scales_of_something(self) -> Calibrate:
        if self.activation_bits == 16 and self.activation_scales != "dynamic":
            raise ValueError(f"16-bit activations have no {self.activation_scales} scales; give `activation_bits`")
        if self.adaptive_tokens != "off" and self.activation_bits in (4, 16):
            raise ValueError("adaptive tokens need `activation_bits` from 5 to 8")
        if self.adaptive_tokens != "off" and self.init == "gptq":
            raise ValueError("`init: gptq` looks at one layer at a time, so it cannot have adaptive tokens; use clip")
        return self


def size_in_bytes(text: str) -> int:
    """Whole bytes of a size like `200MB` or `0.5 GiB`; a number without a unit is in bytes.

    Raises:
        ValueError: the text is no size; the message is a sentence without its full stop.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {name.lower(): size for name, size in UNITS.items()} | {"": 1}
    unit = units.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"expected a size like 200MB, in bytes or in one of {', '.join(UNITS)}, got {text!r}")
    return int(Decimal(match[1]) * unit)


def token_count(text: str) -> int:
    """Whole tokens of a count like `300k`, `20M` or `300000`.

    Raises:
        ValueError: the text is no count; the message is a sentence without its full stop.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgb]?)", text.strip().replace("_", "").lower())
    if match is None:
        raise ValueError(f"expected a number of tokens like 300000, 300k or 20M, got {text!r}")
    return int(Decimal(match[1]) * COUNTS.get(match[2], 1))


def seconds_of(text: str) -> float:
    """Seconds of a time like `90s`, `30m`, `1h30m`, or of a number of seconds.

    Raises:
        ValueError: the text is no time; the message is a sentence without its full stop.
    """
    plain = text.strip().lower().replace(" ", "")
    number = r"(\d+(?:\.\d+)?)"
    if re.fullmatch(number, plain):
        return float(plain)
    match = re.fullmatch("".join(f"(?:{number}{unit})?" for unit in SECONDS), plain)
    if match is None or not plain:
        raise ValueError(f"expected a time like 90s, 30m, 1h30m or a number of seconds, got {text!r}")
    return sum(float(part or 0) * length for part, length in zip(match.groups(), SECONDS.values(), strict=True))


class LossTerm(Strict):
    """One term of the objective."""

    name: str = Field(description="a file of edgerazor/losses")
    weight: float = Field(1.0, gt=0, description="factor of this term in the sum")
    temperature: float | None = Field(None, gt=0, description="softens both distributions, where the loss has one")
    options: dict[str, Any] = Field(default_factory=dict, description="further options of this loss (k, layers ...)")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="how the weight changes")
    start_factor: float = Field(1.0, ge=0, description="factor of the weight at the start, with a schedule")
    end_factor: float = Field(0.0, ge=0, description="factor of the weight at the end of the schedule and after it")
    schedule_share: float = Field(1.0, gt=0, le=1, description="share of the budget that the schedule takes")
    from_bits: float | None = Field(None, description="count this term only for students of so many nominal bits on")
    below_bits: float | None = Field(None, description="count this term only for students of fewer nominal bits")

    def counts_at(self, bits: float) -> bool:
        """Whether this term is part of the objective of a student of so many nominal bits."""
        return (self.from_bits is None or bits >= self.from_bits) and (
            self.below_bits is None or bits < self.below_bits
        )

    @model_validator(mode="after")
    def _temperature_once_and_schedule_where_needed(self) -> LossTerm:
        if self.temperature is not None and "temperature" in self.options:
            raise ValueError("`temperature` is given twice, among the options too")
        scheduled = {"start_factor", "end_factor", "schedule_share"} & self.model_fields_set
        if scheduled and self.schedule == "constant":
            raise ValueError(f"`{min(scheduled)}` needs `schedule: linear` or `schedule: cosine`")
        return self

    def weight_at(self, share: float) -> float:
        """The weight of this term when a share of the training budget, 0 to 1, is used up."""
        if self.schedule == "constant":
            return self.weight
        progress = min(share / self.schedule_share, 1.0)
        decay = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.weight * (self.end_factor + (self.start_factor - self.end_factor) * decay)


class Reconstruction(Strict):
    """Training each decoder layer by itself first, on what leaves the teacher's (EfficientQAT, arXiv 2407.11062)."""

    steps: int = Field(64, ge=1, description="optimizer steps of each layer")
    sequences: int = Field(64, ge=1, description="sequences to learn from, their hidden states kept in memory")
    learning_rate: float | None = Field(None, gt=0, description="peak; that of the whole training when absent")


class Phase(Strict):
    """A part of the training: its share of the budget, over which its warm-up and all schedules run.

    What is not given here is as in the rest of `distill`.
    """

    train: Literal["all", "scales"] = Field(
        "all", description="scales: codes stay; scales, norm gains, biases are trained"
    )
    share: float = Field(1.0, gt=0, description="of the budget left after reconstruction, relative to the other phases")
    losses: tuple[LossTerm, ...] | None = Field(None, min_length=1, description="another objective")
    learning_rate: float | None = Field(None, gt=0, description="another peak")
    schedule: Literal["constant", "linear", "cosine"] | None = Field(None, description="another one after warm-up")


class Distill(Strict):
    """Training the student. The loss weights are EdgeRazor's for Qwen3 (arXiv 2605.04062)."""

    steps: int | None = Field(None, ge=1, description="optimizer steps (no budget: 1000, or 16 passes over the data)")
    tokens: int | None = Field(
        None,
        ge=1,
        description="training tokens (300k, 20M); stops at the first budget reached. Without `steps`, tokens or time "
        "decide what is not set of batch, learning rate, schedule, losses, scales and init",
    )
    max_time: float | None = Field(
        None, gt=0, description="time of training (90s, 30m, 1h30m, or seconds), counted across resumes"
    )
    clock: Literal["wall", "cpu"] = Field(
        "wall",
        description="of max_time; cpu: CPU seconds of the process divided by its threads, which other programs on the "
        "machine do not use up",
    )
    train: Literal["all", "scales"] = Field(
        "all", description="scales: codes stay as they begin; scales, norm gains and biases are trained, in minutes"
    )
    reconstruct: Reconstruction | None = Field(
        None, description="train layer by layer before all of it: steps, sequences, learning_rate; absent: do not"
    )
    phases: tuple[Phase, ...] = Field(
        (), description="trainings one after the other: train, share, losses, learning_rate, schedule; empty: one"
    )
    recording: FilePath | None = Field(
        None, description="folder of `edgerazor record`, in the place of the teacher, which is then not loaded"
    )
    target_kl: float | None = Field(
        None, gt=0, description="stop when a measurement of held-out KL to the teacher is as low, in nats per token"
    )
    batch_size: int = Field(8, ge=1, description="sequences per process and forward pass")
    accumulation: int = Field(1, ge=1, description="forward passes per optimizer step")
    losses: tuple[LossTerm, ...] = Field(
        (
            LossTerm(name="ce", weight=0.1),
            LossTerm(name="eakld", weight=2.0),
            LossTerm(name="lafd", weight=0.1),
        ),
        min_length=1,
        description="the objective, a weighted sum: name, weight, temperature, options, schedule of each term",
    )
    teacher: ModelPath | None = Field(
        None, description="another model to learn from in the place of the recipe's own: larger, of the same tokenizer"
    )
    teacher_source: str = Field(
        "resident",
        description="where the teacher computes: resident (in memory), streamed (read from disk layer by layer in "
        "every step), or the address of an OpenAI-compatible server: http://host:8000/v1",
    )
    served_model: str | None = Field(
        None, min_length=1, description="name of the teacher on that server; absent: its only model"
    )
    teachers: tuple[ModelPath, ...] = Field(
        (), description="further teachers, whose next tokens are averaged with the model's own"
    )
    teacher_average: Literal["probabilities", "logits"] = Field(
        "probabilities", description="of several teachers: what of next tokens is averaged (EdgeQAT: logits)"
    )
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate of AdamW")
    scale_rate: float = Field(
        1.0, gt=0, le=100, description="learning rate of weights' scales, as a share of that of the weights beside them"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    final_learning_rate: float = Field(0.0, ge=0, le=1, description="end of linear and cosine, as a share of the peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates")
    weight_decay: float = Field(0.01, ge=0, description="on matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of matrix products; auto: bf16 if fast"
    )
    memory: int | Literal["auto"] | None = Field(
        None,
        description="most memory to use (16GB), or auto: what is free; cached rounding, whole activations, large "
        "batches and a teacher in memory are given up for it, in this order; absent: none is",
    )
    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw",
        description="adafactor: factored second moments, and weights change within the backward pass, so that neither "
        "moments nor all gradients are in memory; one process, one forward pass a step",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory, slower")
    cache_rounding: bool = Field(True, description="keep rounded weights for a whole step: faster, more memory")
    initialise: Literal["teacher", "random"] = Field("teacher", description="random is the control experiment")
    track: Literal["none", "tensorboard", "wandb"] = Field(
        "none", description="also show every step in TensorBoard (files under WORK/distill) or Weights & Biases"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    evaluate_every: int = Field(100, ge=1, description="steps between measurements on held-out text")
    evaluate_sequences: int = Field(32, ge=1, description="held-out sequences in such a measurement")

    def has_open_budget(self) -> bool:
        """Whether tokens or time limit the training, and not steps, so that the other settings are to fit them."""
        return self.steps is None and (self.tokens is not None or self.max_time is not None)

    @property
    def is_served(self) -> bool:
        """Whether a server computes the teacher."""
        return self.teacher_source.startswith(("http://", "https://"))

    @field_validator("teacher_source")
    @classmethod
    def _known_source(cls, value: str) -> str:
        if value not in ("resident", "streamed") and not value.startswith(("http://", "https://")):
            raise ValueError("it is resident, streamed, or an address that begins with http:// or https://")
        return value

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_in_bytes(cls, value: Any) -> Any:
        return size_in_bytes(value) if isinstance(value, str) and value != "auto" else value

    @field_validator("tokens", mode="before")
    @classmethod
    def _whole_tokens(cls, value: Any) -> Any:
        return token_count(value) if isinstance(value, str) else value

    @field_validator("max_time", mode="before")
    @classmethod
    def _in_seconds(cls, value: Any) -> Any:
        return seconds_of(value) if isinstance(value, str) else value


class Record(Strict):
    """Recording the teacher's outputs (`edgerazor record`), so that trainings can do without it."""

    method: Literal["sample", "top_k"] = Field(
        "sample", description="tokens of each distribution: an unbiased sample (arXiv 2503.16870), or the likeliest"
    )
    draws: int | None = Field(
        None,
        ge=1,
        le=32768,
        description="how many tokens of each distribution are kept; absent: as many as 150 bytes hold, 39 of a "
        "vocabulary of 49,152, 36 of one of 151,936",
    )
    power: float = Field(1.0, gt=0, le=4, description="t of a sample's proposal, p^t; 1: as often as they are likely")
    temperature: float = Field(1.0, gt=0, description="of the distributions, and of the losses that will read them")
    hidden_layers: tuple[int, ...] = Field(
        (), description="layers whose hidden states are kept, in 8 bits, for lafd: [3, 17]"
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="only the first tokens (300k, 20M) in the training order of `seed`; absent: all text, for any seed",
    )
    held_out_sequences: int = Field(32, ge=1, description="held-out sequences, which trainings are measured on")
    held_out_draws: int = Field(256, ge=1, le=32768, description="how many tokens of their distributions are kept")
    batch_size: int = Field(8, ge=1, description="sequences per forward pass")
    shard_bytes: int = Field(16_000_000, ge=1, description="about the bytes of a file; a killed run loses at most one")

    @field_validator("tokens", mode="before")
    @classmethod
    def _whole_tokens(cls, value: Any) -> Any:
        return token_count(value) if isinstance(value, str) else value

    @field_validator("hidden_layers")
    @classmethod
    def _layers(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        """Sorted, without duplicates."""
        if any(layer < 0 for layer in value):
            raise ValueError("layers are counted from 1, and 0 is the embedding's output")
        return tuple(sorted(set(value)))


class Pack(Strict):
    """Writing the packed model."""

    source: Literal["auto", "student", "teacher"] = Field(
        "auto", description="student: what distill made; teacher: round to nearest without training"
    )
    student: Literal["best", "last"] = Field("best", description="which of distill's two students")
    shard_bytes: int = Field(5_000_000_000, ge=1, description="largest weight file")
    compress: bool = Field(False, description="for shipping: zstd frames, decompressed into memory when it is loaded")
    export: tuple[str, ...] = Field((), description="other people's formats to write, too: gguf, gguf-f16 ...")
    allow_lossy: bool = Field(False, description="export also what changes weights, instead of refusing it")


class Eval(Strict):
    """What is measured of the packed model, against its teacher."""

    tasks: tuple[str, ...] = Field((), description="lm-eval tasks, ours, or groups: arc, hellaswag, world ...")
    task_data: FilePath | None = Field(None, description="folder of TASK.jsonl files to use instead of the hub's data")
    pictures: tuple[FilePath, ...] = Field(
        (), description="files of questions about pictures (image, question, choices, gold), or folders of them"
    )
    blind: bool = Field(False, description="ask these also without the features of pictures, as a control")
    limit: int | None = Field(None, ge=1, description="items per task; all when absent")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each item; the task's own when absent")
    apply_chat_template: bool = Field(False, description="wrap prompts in the tokenizer's chat template")
    batch_size: int = Field(32, ge=1, description="sequences in one forward pass of transformers")
    text_sequences: int = Field(64, ge=1, description="held-out sequences for perplexity, KL and agreement")
    against: ModelPath | None = Field(
        None, description="teacher of a model that is measured alone (`eval MODEL`), if any"
    )
    activation_bits: Literal[8, 16] = Field(16, description="of a 16-bit model measured alone: as in calibrate")
    kv_bits: Literal[8, 16] = Field(16, description="of a 16-bit model measured alone: as in calibrate")
    min_retention: float | None = Field(
        None, ge=0, description="least average retention above chance; below it the exit code is 3"
    )


class Bench(Strict):
    """How speed is measured."""

    prefill_tokens: int = Field(256, ge=1, description="prompt length of the prefill measurement")
    decode_tokens: int = Field(32, ge=1, description="tokens generated in the decode measurement")
    contexts: tuple[int, ...] = Field(
        (0, 1024, 4096), description="tokens already in the cache when decoding starts, as far as there are positions"
    )
    rounds: int = Field(3, ge=1, description="interleaved repetitions; the median counts")
    threads: tuple[int, ...] = Field((), description="numbers of CPU threads to measure with; `threads` when empty")
    mmap: bool = Field(False, description="measure also with weights read in place, from the mapped file")
    llama_bench: ProgramPath | None = Field(
        None, description="bench program of llama.cpp to measure beside it, or none; absent: llama-bench on the PATH"
    )
    ik_llama_bench: ProgramPath | None = Field(None, description="bench program of ik_llama.cpp to measure beside it")

    @field_validator("contexts", "threads")
    @classmethod
    def _counts(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        """Sorted, without duplicates."""
        least = 1 if info.field_name == "threads" else 0
        if any(count < least for count in value):
            raise ValueError(f"each of {', '.join(map(str, value))} must be at least {least}")
        if info.field_name == "threads" and any(count > MOST_THREADS for count in value):
            raise ValueError(f"each must be at most {MOST_THREADS}")
        return tuple(sorted(set(value)))


class Generate(Strict):
    """How a packed model writes text (`edgerazor generate`), with the meaning that these have in transformers."""

    max_tokens: int = Field(128, ge=1, description="most tokens of the text")
    temperature: float = Field(
        0.0, ge=0, description="of the distribution that tokens are drawn from; 0: the likeliest"
    )
    top_k: int = Field(0, ge=0, description="draw from so many of the likeliest tokens; 0 for all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw from the likeliest tokens that have this probability together"
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="draw from tokens of at least this share of the highest probability"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="logits of tokens that occurred are divided by it (negative ones multiplied); 1: off"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="taken from the logits of tokens that the text has already; the prompt's are free"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="likewise, for each time that the text has the token already"
    )
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, description="token id: what is added to its logit; 100 and -100 all but decide"
    )
    stop: tuple[str, ...] = Field((), description="the text ends before the first of these that comes up")
    chat: bool = Field(False, description="the prompt is a user's turn, as the tokenizer's chat template writes it")
    system: str | None = Field(None, description="of a chat: the system's message before it")

    @model_validator(mode="after")
    def _to_some_effect(self) -> Generate:
        if any(token < 0 for token in self.logit_bias):
            raise ValueError("`logit_bias` is by token ids, which are at least 0")
        if "" in self.stop:
            raise ValueError("`stop` is empty text, which comes up at once; leave it out")
        if self.system is not None and not self.chat:
            raise ValueError("`system` is a message of a chat; give `chat` too")
        sampling = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) != Generate.default(name)]
        if self.temperature == 0 and sampling:
            raise ValueError(f"`{sampling[0]}` draws tokens, and temperature 0 takes the likeliest; give `temperature`")
        return self

    @classmethod
    def default(cls, name: str) -> Any:
        """Default of a field."""
        return cls.model_fields[name].default


class Serve(Strict):
    """The HTTP server (`edgerazor serve`). The key that clients have to give is no field: it does not go into files."""

    host: str = Field("127.0.0.1", description="address to listen on; another than loopback needs a key")
    port: int = Field(8080, ge=0, le=65535, description="0: any free one, which is printed")
    name: str | None = Field(None, min_length=1, description="of the model in the interface; absent: of its teacher")
    max_sequences: int = Field(16, ge=1, le=256, description="texts written at a time")
    max_queue: int = Field(64, ge=0, le=4096, description="texts waiting; more are refused with status 429")
    prefill_tokens: int = Field(128, ge=1, description="tokens of prompts that are read between two steps of decoding")
    kv_tokens: int | None = Field(
        None, ge=16, description="tokens that the KV cache holds, of all texts together; absent: chosen from memory"
    )
    context: int | None = Field(
        None, ge=2, description="most tokens of a prompt and its answer; absent: as many as the model has positions"
    )
    max_tokens_per_request: int | None = Field(
        None, ge=1, description="most tokens of an answer that a request may ask for; absent: as far as the context"
    )
    max_body_bytes: int = Field(4_000_000, ge=1000, description="of a request; larger ones are refused with status 413")
    request_seconds: float = Field(600.0, gt=0, description="after which a text ends as at its most tokens")
    drain_seconds: float = Field(30.0, ge=0, description="that running requests have left after SIGTERM or Ctrl-C")
    cors_origins: tuple[str, ...] = Field(
        (), description="web pages of other origins that browsers let use the server: https://chat.example"
    )


class Recipe(Strict):
    """A whole job."""

    model: ModelPath = Field(
        "", description="the teacher: a local folder, a GGUF file or an id of the Hugging Face hub"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the hub model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    seed: int = Field(0, ge=0, description="of data order, initialisation and generated text")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, le=MOST_THREADS, description="CPU threads; all cores when absent")
    compare: dict[str, FilePath] = Field(
        default_factory=dict, description="other packed folders measured beside this one"
    )
    data: Data = Data()
    sampling: Sampling = Sampling()
    calibrate: Calibrate = Calibrate()
    record: Record = Record()
    distill: Distill = Distill()
    pack: Pack = Pack()
    eval: Eval = Eval()
    bench: Bench = Bench()
    generate: Generate = Generate()
    serve: Serve = Serve()


# Walking the schema -----------------------------------------------------------------------------------------------


def as_section(annotation: Any) -> type[Strict] | None:
    """The section that a field's type is: `Data` for `Data`, none for `tuple[Source, ...]`."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Strict) else None


def section_in(annotation: Any) -> type[Strict] | None:
    """The section that a field's type is or holds: `Data` for `Data`, `Source` for `tuple[Source, ...]`."""
    inside = (section for argument in get_args(annotation) if (section := section_in(argument)))
    return as_section(annotation) or next(inside, None)


def section_at(location: tuple[int | str, ...]) -> type[Strict]:
    """The innermost section on the way to a location of a recipe, as pydantic's errors give it."""
    section: type[Strict] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        section = (section_in(field.annotation) if field else None) or section
    return section


def option_at(location: tuple[int | str, ...]) -> str:
    """The command-line option that sets a location of a recipe.

    It is called like the innermost field outside of lists: there is one option for a list of sources, and none for the
    fields of each.
    """
    section: type[Strict] | None = Recipe
    flag = ""
    for part in location:
        if section is None:
            break
        field = section.model_fields.get(str(part))
        marks = [mark for mark in field.metadata if isinstance(mark, Flag)] if field else []
        flag = marks[0].name if marks else f"--{str(part).replace('_', '-')}"
        section = as_section(field.annotation) if field else None
    return flag


def fields_of(section: type[Strict] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`calibrate.bits`, its pydantic field) for every field that is no section, in the order of the schema."""
    for name, field in section.model_fields.items():
        if inner := as_section(field.annotation):
            yield from fields_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
