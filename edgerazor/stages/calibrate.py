"""Look at the teacher, then decide what the student will be.

Runs calibration text through the teacher and keeps, in `stats.safetensors`,

* `input_second_moment/<module>`, float32 [in]: mean of x squared over tokens, for the input of every linear layer
  (the diagonal of the Hessian of its squared output error; GPTQ's and imatrix's quantity);
* `layer_cosine`, float32 [layers]: mean cosine similarity of each decoder layer's output and input;
* `layer_l2` and `layer_variance`, float32 [layers]: mean norm of its output, and its variance over positions;
* `<module>.input_scale`, float32 [], where activations have stored scales: the one with the least squared error for
  the input of a linear layer or the head, and `<module>.low_input_scale` at the bits of unimportant tokens;
* `importance_threshold`, float32 [layers], where tokens have bits of their own: see `attention.py`;

and writes the plan: a format for every row or block of every matrix (`allocate.py`). Where training is to start from
better codes than the formats' rules give, they are made then (`_start.py`).
"""

from __future__ import annotations

import json
import time
from itertools import repeat
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import RenderableType
from safetensors.torch import save_file

from edgerazor import attention, data, formats, models
from edgerazor.allocate import Plan
from edgerazor.console import Console, duration, megabytes, table
from edgerazor.errors import UserError
from edgerazor.losses import METRICS, layer_metric
from edgerazor.models import PreTrainedModel, PreTrainedTokenizerBase
from edgerazor.recipe import Recipe, Sampling
from edgerazor.stages import _shared, _start, _writing
from edgerazor.workdir import WorkDir, make_folder, write_atomically, write_json, write_text

NAME = "calibrate"

#: Steps of generation that an estimate of its time is taken from.
GENERATE_PROBE = 8


class CalibrateResult(BaseModel):
    """What calibrate decided."""

    model: str
    notation: str
    nominal_bits: float
    real_bits: float
    bytes: int
    formats: dict[str, int]
    tokens: int
    layer_similarity: list[float]
    text: str


class CalibrateDryRun(BaseModel):
    """What calibrate would do."""

    notation: str
    nominal_bits: float
    real_bits: float
    bytes: int
    tokens: int
    generated_tokens: int
    memory_bytes: int
    disk_bytes: int
    seconds: float | None


def inputs(recipe: Recipe, work: WorkDir) -> dict[str, str]:
    """Everything the result depends on."""
    return {
        "model": _shared.teacher_fingerprint(recipe),
        "data": _shared.data_fingerprint(recipe),
        "data.sequence_length": str(recipe.data.sequence_length),
        "data.packing": recipe.data.packing,
        "seed": str(recipe.seed),
        **_shared.settings("calibrate", recipe.calibrate, skip=("batch_size",)),
    }


def run(recipe: Recipe, work: WorkDir, console: Console) -> CalibrateResult:
    """Write statistics and plan into the working directory."""
    device = _shared.device_of(recipe)
    teacher, tokenizer = _shared.load_teacher(recipe, device, _shared.reading_dtype(device))
    found = models.structure(teacher)
    _shared.check_attention(teacher, recipe.calibrate)
    plan = _shared.new_plan(recipe, teacher, found.sites)
    length = _shared.sequence_length(recipe, teacher)
    make_folder(work.folder(NAME))
    text = "the recipe's data"
    if not recipe.data.train:
        text = "written by the teacher, since no --data was given"
        console.say(f"No --data was given, so the teacher writes {recipe.data.generated_tokens:,} tokens itself.")
        write_own_text(recipe, work, teacher, tokenizer, length, console)
    rows, _ = _shared.open_text(recipe, work, tokenizer, length)
    moments, measured, tokens = observe(recipe, teacher, found, rows, console)
    tensors = {f"input_second_moment/{name}": value for name, value in moments.items()}
    tensors |= {f"layer_{metric}": values for metric, values in measured.items()}
    if plan.activation_scales != "dynamic":
        tensors |= find_input_scales(recipe, teacher, found, rows, console)
    if plan.adaptive_tokens == "causal":
        tensors["importance_threshold"] = find_thresholds(recipe, teacher, found, rows, console)
    write_atomically(work.statistics_file, lambda path: save_file(tensors, path))
    write_text(work.plan_file, plan.model_dump_json(indent=1) + "\n")
    if recipe.calibrate.start != "rule":
        del teacher  # the start is made with a float32 copy
        _start.write(recipe, work, plan, rows, console)
    result = CalibrateResult(
        model=recipe.model,
        notation=plan.notation(),
        nominal_bits=round(plan.nominal_bits(), 4),
        real_bits=round(8 * plan.bytes() / plan.weights(), 4),
        bytes=plan.bytes(),
        formats=weights_by_format(plan),
        tokens=tokens,
        layer_similarity=[round(float(value), 5) for value in measured["cosine"]],
        text=text,
    )
    write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


def observe(
    recipe: Recipe,
    teacher: PreTrainedModel,
    found: models.Structure,
    rows: data.TokenRows,
    console: Console,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Second moments of linear inputs (float32 [in]), metrics of layers (float32 [layers]), tokens seen."""
    sums: dict[str, torch.Tensor] = {}
    weights = {"tokens": 0}
    keep = torch.empty(0)

    def observing(name: str) -> Any:
        def hook(_module: Any, args: tuple) -> None:
            x = args[0].detach()[keep].float()  # [valid tokens, in]
            sums[name] = sums.get(name, 0) + x.square().sum(0, dtype=torch.float64)

        return hook

    handles = [teacher.get_submodule(s.name).register_forward_pre_hook(observing(s.name)) for s in found.linears]
    measured = {metric: torch.zeros(found.layer_count, dtype=torch.float64) for metric in METRICS}
    batches = list(data.sample_batches(rows, recipe.calibrate.sequences, recipe.calibrate.batch_size))
    layers = range(found.layer_count + 1)
    try:
        with (
            torch.no_grad(),
            console.track("calibrate", len(batches)) as tracker,
            models.capture_hidden(teacher, found, layers) as hidden,
        ):
            for batch in batches:
                keep = (batch["labels"] != -100).to(teacher.device)
                teacher(input_ids=batch["input_ids"].to(teacher.device), use_cache=False)
                count = int(keep.sum())
                for metric, values in measured.items():
                    values += layer_metric(metric, dict(hidden), keep).double().cpu() * count
                weights["tokens"] += count
                tracker.advance()
    finally:
        for handle in handles:
            handle.remove()
    tokens = weights["tokens"]
    moments = {name: (value / tokens).float().cpu() for name, value in sums.items()}
    return moments, {metric: (values / tokens).float() for metric, values in measured.items()}, tokens


@torch.no_grad()
def find_input_scales(
    recipe: Recipe,
    teacher: PreTrainedModel,
    found: models.Structure,
    rows: data.TokenRows,
    console: Console,
) -> dict[str, torch.Tensor]:
    """The stored scales of inputs, float32 [], from the calibration text."""
    counts: dict[str, torch.Tensor] = {}
    keep = torch.empty(0)

    def observing(name: str) -> Any:
        def hook(_module: Any, args: tuple) -> None:
            counts[name] = counts.get(name, 0) + formats.magnitude_counts(args[0][keep])

        return hook

    wanted = _shared.stored_input_scales(recipe.calibrate, teacher, found)
    names = {name for name, _ in wanted.values()}
    handles = [teacher.get_submodule(name).register_forward_pre_hook(observing(name)) for name in names]
    batches = list(data.sample_batches(rows, recipe.calibrate.sequences, recipe.calibrate.batch_size))
    try:
        with console.track("ranges of activations", len(batches)) as tracker:
            for batch in batches:
                keep = (batch["labels"] != -100).to(teacher.device)
                teacher(input_ids=batch["input_ids"].to(teacher.device), use_cache=False)
                tracker.advance()
    finally:
        for handle in handles:
            handle.remove()
    return {scale: torch.tensor(formats.calibrated_scale(counts[name], bits)) for scale, (name, bits) in wanted.items()}


@torch.no_grad()
def find_thresholds(
    recipe: Recipe,
    teacher: PreTrainedModel,
    found: models.Structure,
    rows: data.TokenRows,
    console: Console,
) -> torch.Tensor:
    """The importance that the unimportant share of calibration tokens lies below, float32 [layers]."""
    attention.decided_by(teacher)
    tokens = attention.ImportantTokens(None)
    attention.watch_tokens(teacher, tokens)
    attention.quantize_cache(teacher, 16)
    seen: list[list[torch.Tensor]] = [[] for _ in range(found.layer_count)]
    batches = list(data.sample_batches(rows, recipe.calibrate.sequences, recipe.calibrate.batch_size))
    with console.track("importance of tokens", len(batches)) as tracker:
        for batch in batches:
            teacher(input_ids=batch["input_ids"].to(teacher.device), use_cache=False)
            for layer, values in enumerate(seen):
                values.append(tokens.importance[layer][(batch["labels"] != -100).to(teacher.device)].cpu())
            tracker.advance()
    share = attention.UNIMPORTANT_SHARE
    return torch.stack([torch.cat(values).sort().values[int(share * sum(map(len, values)))] for values in seen])


def write_own_text(
    recipe: Recipe,
    work: WorkDir,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    console: Console,
) -> None:
    """Let the teacher write about `data.generated_tokens` tokens, in documents of at most `length`.

    Plain sampling at temperature 1 keeps the teacher's own distribution (data-free distillation as in LLM-QAT, arXiv
    2305.17888, section 2). A document ends where the teacher ends it.

    Raises:
        UserError: the teacher ends nearly every text at once.
    """
    writer = own_writer(recipe, teacher, tokenizer, length)
    wanted = recipe.data.generated_tokens
    lines: list[str] = []
    written, rounds = 0, 0
    began = time.monotonic()
    with console.track("the teacher writes", wanted) as tracker:
        for batch in writer.batches(repeat(None)):
            lines += [json.dumps(row.record) for row in batch if row.record]
            now = sum(row.tokens for row in batch)
            written, rounds = written + now, rounds + 1
            if written < 2 * rounds * writer.sampling.batch_size:
                raise UserError(f"{recipe.model} writes no text by itself.", "Give text to learn from: --data FILE.")
            tracker.advance(min(now, wanted - written + now))
            left = (time.monotonic() - began) * max(wanted - written, 0) / written
            if rounds == 1 and left > 60:
                console.say(f"That will take about {duration(left)}; with --data FILE it would not be needed.")
            if written >= wanted:
                break
    write_text(work.generated_text, "\n".join(lines) + "\n")


def own_writer(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int
) -> _writing.Writer:
    """The teacher writing texts of at most `length` tokens, as it is."""
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, answer_tokens=length - 1)
    return _writing.Writer(teacher, tokenizer, sampling, recipe.seed, length)


def weights_by_format(plan: Plan) -> dict[str, int]:
    """Format -> weights of the decoder's linear layers that have it."""
    counts: dict[str, int] = {}
    for matrix in plan.matrices:
        if matrix.kind == "linear":
            for name, count in matrix.spec().weights_by_format((matrix.rows, matrix.columns)).items():
                counts[name] = counts.get(name, 0) + count
    return counts


def dry_run(recipe: Recipe, work: WorkDir, console: Console) -> CalibrateDryRun:
    """What would be decided, and about how long it would take (from one forward pass and a few generated tokens)."""
    device = _shared.device_of(recipe)
    teacher, tokenizer = _shared.load_teacher(recipe, device, _shared.reading_dtype(device))
    plan = _shared.new_plan(recipe, teacher, models.structure(teacher).sites)
    length = _shared.sequence_length(recipe, teacher)
    batch = min(recipe.calibrate.batch_size, recipe.calibrate.sequences)
    ids = torch.zeros((batch, length), dtype=torch.int64, device=teacher.device)
    began = time.monotonic()
    with torch.no_grad():
        teacher(input_ids=ids, use_cache=False)
    seconds = (time.monotonic() - began) * recipe.calibrate.sequences / batch
    seconds *= 1 + _start.PASSES[recipe.calibrate.start]
    tokens = recipe.calibrate.sequences * length
    own = 0 if recipe.data.train else recipe.data.generated_tokens
    if own:
        began = time.monotonic()
        writer = own_writer(recipe, teacher, tokenizer, length)
        writer.draw([[0]] * writer.sampling.batch_size, (0,), exactly=GENERATE_PROBE)
        seconds += (time.monotonic() - began) / (writer.sampling.batch_size * GENERATE_PROBE) * own
    size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    logits = batch * length * teacher.config.get_text_config().vocab_size * 4
    return CalibrateDryRun(
        notation=plan.notation(),
        nominal_bits=round(plan.nominal_bits(), 4),
        real_bits=round(8 * plan.bytes() / plan.weights(), 4),
        bytes=plan.bytes(),
        tokens=tokens,
        generated_tokens=own,
        memory_bytes=max(size + logits, _start.memory_bytes(recipe, teacher, tokens)),
        disk_bytes=sum(m.columns * 4 for m in plan.matrices)
        + 2 * sum(m.rows for m in plan.matrices)
        + 5 * own
        + _start.file_bytes(recipe.calibrate.start, plan),
        seconds=float(f"{seconds:.3g}"),
    )


def show(result: CalibrateResult) -> list[RenderableType]:
    """The plan, for people."""
    rows = [[name, f"{count:,}"] for name, count in result.formats.items()]
    least = min(range(len(result.layer_similarity)), key=lambda i: result.layer_similarity[i])
    return [
        table(
            f"Plan {result.notation}: {result.nominal_bits:.3g} nominal bits, {result.real_bits:.3g} with scales, "
            f"embeddings and head, {megabytes(result.bytes)}",
            ["format of decoder linear layers", "weights"],
            rows,
            caption=f"{result.tokens:,} calibration tokens; layer {least + 1} changes its input most",
        )
    ]
