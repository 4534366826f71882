"""What razoring cost: the packed model against its 16-bit teacher.

The packed model is loaded from its folder, as a user would load it, and asked the same as the teacher. On a CPU the
runtime computes it, natively where it can; the teacher, and packed models on other devices, transformers does.

* *tasks*: the score of each, and how much of the teacher's score is left. Raw retention, score / teacher, flatters
  where guessing already scores much; *retention above chance*, (score - chance) / (teacher - chance), does not.
  Where the teacher itself is within two standard errors of chance there is nothing to retain, and it is null.
* *text*: on held-out text, the perplexity of both, the mean KL divergence KL(teacher ‖ model) per token in nats, and
  how often both find the same token most probable. These see damage long before task scores do.
* *a sample*: greedy text. A model that repeats one token has collapsed, whatever its scores say, and fails the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from torch import Tensor
from torch.nn.functional import log_softmax

from edgerazor import data, job, kernels, models, modules, runtime, tasks, transformers_plugin
from edgerazor.console import Console, table
from edgerazor.errors import UserError, usage_error
from edgerazor.recipe import Recipe, Source
from edgerazor.workdir import WorkDir, hash_folder, write_json

NAME = "eval"
#: Standard errors above chance from which a teacher's score counts as knowledge.
ABOVE_CHANCE = 2.0
PROMPT_TOKENS, SAMPLE_TOKENS = 16, 48
#: Share of one token in a greedy text from which it has collapsed.
COLLAPSED = 0.8
#: Largest number of logits of one forward pass, and of one chunk of rows, on held-out text.
BATCH_LOGITS, CHUNK_LOGITS = 1 << 26, 1 << 22

#: What changes the greedy text that transformers writes, and the values that do not.
PLAIN_GREEDY = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "watermarking_config", "stop_strings")),
}
#: Settings of `evaluate_model` alone.
ALONE = ("against", "activation_bits", "kv_bits")

Batch = dict[str, Tensor]


class Result(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskResult(Result):
    """One task. Scores are shares from 0 to 1 where the metric is an accuracy."""

    score: float
    stderr: float | None
    chance: float | None
    teacher_score: float | None
    teacher_stderr: float | None
    retention: float | None
    retention_above_chance: float | None
    metric: str
    items: int
    data: str
    full_set: bool | None
    prompt_note: str | None


class Average(Result):
    """Over the tasks that have a chance level."""

    score: float
    teacher_score: float | None
    retention_above_chance: float | None


class TextResult(Result):
    """On held-out text; KL(teacher ‖ model) in nats per token. Null where there is no teacher, or not finite."""

    perplexity: float | None
    teacher_perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    tokens: int


class Measured(Result):
    """What was measured of one model."""

    tasks: dict[str, TaskResult] = {}
    average: Average | None = None
    text: TextResult | None = None


class EvalResult(Measured):
    """The packed model's measurements, those of the folders beside it, and what failed a gate.

    `engine` (native or transformers) computed the packed model, with the products of `kernel`; both are null where the
    model is not packed.
    """

    engine: str | None = None
    kernel: str | None = None
    compared: dict[str, Measured] = {}
    sample: str | None = None
    notes: list[str] = []
    failures: list[str] = []


class DryTask(Result):
    items: int | None
    tokens: int | None


class DryRun(Result):
    """What `run` would do; tokens are an estimate, null where items would have to be fetched first."""

    tasks: dict[str, DryTask]
    models: int
    text_sequences: int
    forward_tokens: int | None
    packed_bytes: int
    teacher_bytes: int
    seconds: float | None


@dataclass
class Subject:
    """A model in memory: of transformers, or of the runtime."""

    title: str
    model: Any
    tokenizer: Any


# --- the stage -------------------------------------------------------------------------------


def inputs(recipe: Recipe, work: WorkDir) -> dict[str, str]:
    """Fingerprints of everything the result depends on.

    Raises:
        UserError: a compared folder, a text or a file of items is missing.
    """
    packed = work.manifest("pack")
    found = {
        "pack": packed.fingerprint() if packed else "missing",
        "model": job.teacher_fingerprint(recipe),
        "seed": str(recipe.seed),
        "device": recipe.device,
        "kernel": kernels.name(),
        **job.settings(NAME, recipe.eval, skip=("batch_size", "task_data", *ALONE)),
    }
    found |= {f"compare {name}": hash_folder(folder) for name, folder in _compared(recipe).items()}
    found |= {f"task {name}": digest for name, digest in tasks.fingerprint(_request(recipe)).items()}
    if sources := _text_sources(recipe, work):
        found["text"] = data.fingerprint(sources)
        found["text.held_out_fraction"] = "all" if recipe.data.held_out else f"{recipe.data.held_out_fraction}, spread"
        found["text.sequence_length"] = str(recipe.data.sequence_length)
        found["text.packing"] = recipe.data.packing
        found |= job.text_settings(recipe)
        if any(source.streaming for source in sources):
            found["text.held_out_rows"] = str(recipe.data.held_out_rows)
    return found


def run(recipe: Recipe, work: WorkDir, console: Console) -> EvalResult:
    """Measure the packed model, and the folders of `recipe.compare`, against the teacher.

    Returns:
        the result, also written to the stage's folder. `failures` that are not empty mean exit code 3.

    Raises:
        UserError: nothing to measure, unknown tasks, items that are missing, a model that cannot be loaded.
    """
    request = _request(recipe)
    folders = {"packed": work.folder("pack"), **_compared(recipe)}
    if not transformers_plugin.is_packed(folders["packed"]):
        raise UserError(f"{folders['packed']} is not a packed model.", "Make one with `edgerazor pack`.")
    loaded = tasks.load(request) if request.names else []
    if not loaded and not _text_sources(recipe, work):
        raise _nothing_to_measure()
    device = job.device_of(recipe)
    teacher = Subject("teacher", *job.load_teacher(recipe, device, _dtype(device)))
    text = _held_out(recipe, _text_sources(recipe, work), teacher)
    result = EvalResult()
    result.notes += _notes_on_data(loaded, text is not None)
    if text is not None and not (recipe.data.held_out or recipe.data.train):
        result.notes.append("The held-out text was written by the teacher.")
    teacher_scores, notes = _scores(recipe, request, loaded, teacher, console)
    result.notes += notes
    for name, folder in folders.items():
        subject, notes = _load_packed(name, folder, recipe, device, loaded)
        result.notes += [f"{name}: {note}" for note in notes] if name != "packed" else notes
        measured = result if name == "packed" else Measured()
        result.notes += _measure(measured, recipe, request, loaded, subject, teacher, teacher_scores, text, console)
        if name == "packed":
            _note_kernels(result, subject)
            _check_sample(result, subject, teacher, text)
        else:
            result.compared[name] = measured
        del subject
    _check_retention(result, recipe.eval.min_retention)
    write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


def evaluate_model(model: str, recipe: Recipe, console: Console) -> EvalResult:
    """Measure one model outside any working directory, against a teacher if `eval.against` names one.

    Args:
        model: a packed folder, a 16-bit model folder, or a hub id. Inputs of linear layers, keys and values of a 16-bit
            model are rounded as `eval.activation_bits` and `eval.kv_bits` say, in groups of `calibrate.group_size`.
        recipe: its `eval`, `data` and general sections.
        console: shows the progress.

    Raises:
        UserError: as `run`; a least retention was asked for without a teacher; or other bits for a packed model.
    """
    against = recipe.eval.against
    if recipe.eval.min_retention is not None and against is None:
        raise usage_error("--min-retention compares with a teacher.", "Name it: `eval MODEL --against TEACHER`.")
    request = _request(recipe)
    loaded = tasks.load(request) if request.names else []
    if not loaded and not _text_sources(recipe):
        raise _nothing_to_measure()
    device = job.device_of(recipe)
    packed = transformers_plugin.is_packed(Path(model))
    if packed and (recipe.eval.activation_bits, recipe.eval.kv_bits) != (16, 16):
        raise usage_error(
            f"{model} is packed, so the bits of its activations and cache are decided.", "Leave them out."
        )
    result = EvalResult()
    if packed:
        subject, result.notes = _load_packed("packed", Path(model), recipe, device, loaded)
    else:
        subject = _plain(model, recipe, device)
    teacher = _named(against, recipe, device, "teacher") if against else None
    text = _held_out(recipe, _text_sources(recipe), teacher or subject)
    result.notes += _notes_on_data(loaded, text is not None)
    scores, notes = _scores(recipe, request, loaded, teacher, console) if teacher else ({}, [])
    result.notes += notes
    result.notes += _measure(result, recipe, request, loaded, subject, teacher, scores, text, console)
    if packed:
        _note_kernels(result, subject)
    _check_sample(result, subject, teacher, text, gate=packed)
    _check_retention(result, recipe.eval.min_retention)
    return result


def _named(model: str, recipe: Recipe, device: torch.device, title: str) -> Subject:
    """A 16-bit model by its name."""
    named = recipe.model_copy(update={"model": model})
    return Subject(title, *job.load_teacher(named, device, _dtype(device)))


def _plain(model: str, recipe: Recipe, device: torch.device) -> Subject:
    """A 16-bit model, its activations and cache rounded as asked for."""
    subject = _named(model, recipe, device, "model")
    asked = recipe.eval
    if (asked.activation_bits, asked.kv_bits) != (16, 16):
        settings = modules.Settings(asked.activation_bits, asked.kv_bits, recipe.calibrate.group_size)
        modules.quantize_inputs(subject.model, models.structure(subject.model), settings)
    return subject


def _request(recipe: Recipe) -> tasks.TaskRequest:
    asked = recipe.eval
    return tasks.TaskRequest(
        asked.tasks, asked.task_data, asked.limit, asked.num_fewshot, asked.apply_chat_template, recipe.seed
    )


def _compared(recipe: Recipe) -> dict[str, Path]:
    folders = {name: Path(folder) for name, folder in recipe.compare.items()}
    for name, folder in folders.items():
        if name == "packed" or not transformers_plugin.is_packed(folder):
            what = "needs another name" if name == "packed" else f"is not a packed model: {folder}"
            raise usage_error(f"`compare.{name}` {what}.", "Give name: folder, as made by `edgerazor pack`.")
    return folders


def _dtype(device: torch.device) -> torch.dtype | None:
    """float32 on a CPU, where 16-bit arithmetic is slow or rounds more; else the checkpoint's own."""
    return torch.float32 if device.type == "cpu" else None


def _load_packed(
    title: str, folder: Path, recipe: Recipe, device: torch.device, loaded: list[tasks.LoadedTask]
) -> tuple[Subject, list[str]]:
    """A packed model, natively if that is possible here; else with the reason."""
    if device.type == "cpu":
        model = runtime.load(folder, threads=recipe.threads)
        note = model.note
        if model.engine == "native":
            note = _beyond_greedy(model, loaded)
            if note is None:
                return Subject(title, model, model.tokenizer), []
        del model
        notes = [note] if note else []
        return Subject(title, *transformers_plugin.load(folder, dtype=torch.float32, cache_decoded=True)), notes
    return Subject(title, *transformers_plugin.load(folder, str(device), torch.bfloat16, cache_decoded=True)), []


def _beyond_greedy(model: runtime.Model, loaded: list[tasks.LoadedTask]) -> str | None:
    """Why the tasks need transformers' `generate`, if they do."""
    if names := tasks.non_greedy(loaded):
        return f"transformers computes the packed model: the answers of {', '.join(names)} are not greedy text."
    own = model.generation_config
    changed = [name for name, plain in PLAIN_GREEDY.items() if getattr(own, name, None) not in (None, plain)]
    if changed and any(map(tasks.is_generative, loaded)):
        return f"transformers computes the packed model: its generation_config.json sets {changed[0]}."
    return None


def _note_kernels(result: EvalResult, subject: Subject) -> None:
    native = isinstance(subject.model, runtime.Model)
    result.engine = "native" if native else "transformers"
    result.kernel = subject.model.kernel if native else modules.kernels_of(subject.model)
    if (note := kernels.note(result.kernel)) and note not in result.notes:
        result.notes.append(note)


def _nothing_to_measure() -> UserError:
    return usage_error(
        "There is nothing to measure: no task was named and there is no held-out text.",
        "Name tasks (--tasks arc,hellaswag) or text (--data FILE).",
    )


def _notes_on_data(loaded: list[tasks.LoadedTask], has_text: bool) -> list[str]:
    notes = []
    for entry in loaded:
        if entry.full_set is False:
            notes.append(f"{entry.name}: {entry.items} items of {entry.data}, not the full set.")
        elif entry.full_set is None:
            notes.append(f"{entry.name}: {entry.items} items of {entry.data}; the size of the full set is not known.")
    if not has_text:
        notes.append("No held-out text was given, so there are no text metrics (--data FILE).")
    return notes


def _measure(
    measured: Measured,
    recipe: Recipe,
    request: tasks.TaskRequest,
    loaded: list[tasks.LoadedTask],
    subject: Subject,
    teacher: Subject | None,
    teacher_scores: dict[str, tasks.TaskScore],
    text: data.TokenRows | None,
    console: Console,
) -> list[str]:
    """Fill in one model's scores and text metrics; returns notes."""
    scores, notes = _scores(recipe, request, loaded, subject, console)
    for entry in loaded:
        measured.tasks[entry.name] = compare(entry, scores[entry.name], teacher_scores.get(entry.name))
    measured.average, more = average(measured.tasks)
    notes += [f"{subject.title}: {note}" for note in more]
    if text is None:
        return notes
    if teacher is not None and subject.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        return [*notes, f"{subject.title}: another tokenizer than the teacher's, so no text metrics."]
    batches = _batches(text, recipe, subject)
    measured.text = text_metrics(subject, teacher, batches, console)
    if measured.text.perplexity is None and isinstance(measured, EvalResult):
        measured.failures.append("The model's probabilities on held-out text are not finite numbers.")
    return notes


def _scores(
    recipe: Recipe, request: tasks.TaskRequest, loaded: list[tasks.LoadedTask], subject: Subject, console: Console
) -> tuple[dict[str, tasks.TaskScore], list[str]]:
    if not loaded:
        return {}, []
    size = recipe.eval.batch_size
    return tasks.evaluate(subject.model, subject.tokenizer, loaded, request, size, console, subject.title)


# --- scores against the teacher's ------------------------------------------------------------


def compare(entry: tasks.LoadedTask, score: tasks.TaskScore, teacher: tasks.TaskScore | None) -> TaskResult:
    """One task's result; `teacher` is the teacher's score on the same items."""
    chance = entry.chance if score.metric in ("acc", "acc_norm") else None
    raw = above = None
    if teacher is not None and score.higher_is_better:
        raw = score.value / teacher.value if teacher.value > 0 else None
        if chance is not None and _knows(teacher.value - chance, teacher.stderr):
            above = (score.value - chance) / (teacher.value - chance)
    return TaskResult(
        score=score.value,
        stderr=score.stderr,
        chance=chance,
        teacher_score=teacher.value if teacher else None,
        teacher_stderr=teacher.stderr if teacher else None,
        retention=raw,
        retention_above_chance=above,
        metric=score.metric,
        items=entry.items,
        data=entry.data,
        full_set=entry.full_set,
        prompt_note=entry.note or None,
    )


def _knows(above_chance: float, stderr: float | None) -> bool:
    """Whether a score is so far above chance that it is not luck."""
    return stderr is not None and above_chance > ABOVE_CHANCE * stderr


def average(results: dict[str, TaskResult]) -> tuple[Average | None, list[str]]:
    """Means over the tasks with a chance level, with Σ(score - chance) / Σ(teacher - chance); notes on what is null."""
    counted = {name: result for name, result in results.items() if result.chance is not None}
    notes = []
    if len(counted) < len(results):
        notes.append("tasks without a chance level are not part of the average.")
    if not counted:
        return None, notes
    chance = _sum(result.chance for result in counted.values())
    score = _sum(result.score for result in counted.values())
    if any(result.teacher_score is None for result in counted.values()):
        return Average(score=score / len(counted), teacher_score=None, retention_above_chance=None), notes
    for name, result in counted.items():
        if result.retention_above_chance is None:
            notes.append(f"{name}: the teacher is within two standard errors of chance, so there is nothing to retain.")
    taught = _sum(result.teacher_score for result in counted.values())
    errors = [result.teacher_stderr for result in counted.values()]
    stderr = None if None in errors else math.sqrt(_sum(error**2 for error in errors if error is not None))
    above = (score - chance) / (taught - chance) if _knows(taught - chance, stderr) else None
    if above is None and len(counted) > 1:
        notes.append("over all tasks the teacher is within two standard errors of chance.")
    means = Average(score=score / len(counted), teacher_score=taught / len(counted), retention_above_chance=above)
    return means, notes


def _sum(values: Iterable[float | None]) -> float:
    return math.fsum(value for value in values if value is not None)


def _check_retention(result: EvalResult, least: float | None) -> None:
    """The gate of `--min-retention`."""
    if least is None:
        return
    found = result.average.retention_above_chance if result.average else None
    if found is None:
        why = "no task with a chance level was run" if result.average is None else "the teacher is too near to chance"
        result.failures.append(f"At least {_percent(least)} retention was asked for, but there is none: {why}.")
    elif found < least:
        result.failures.append(f"Retention above chance is {_percent(found)}, below the {_percent(least)} asked for.")


# --- held-out text ---------------------------------------------------------------------------


def _text_sources(recipe: Recipe, work: WorkDir | None = None) -> tuple[Source, ...]:
    """The held-out sources, else the training mixture, else what the teacher wrote for it, else nothing."""
    if recipe.data.held_out or recipe.data.train:
        return recipe.data.held_out or recipe.data.train
    if work is not None and work.generated_text.exists():
        return (Source.model_validate({"file": str(work.generated_text)}),)
    return ()


def _held_out(recipe: Recipe, sources: tuple[Source, ...], subject: Subject) -> data.TokenRows | None:
    """Rows of held-out text; of a training mixture only the share that is kept for it."""
    if not sources:
        return None
    fraction = 0.0 if recipe.data.held_out else recipe.data.held_out_fraction
    length = job.sequence_length(recipe, subject.model)
    asked = recipe.data
    rows, held_out = data.open_rows(
        sources,
        subject.tokenizer,
        data.RowSettings(
            length, recipe.seed, fraction, asked.packing, asked.held_out_rows, asked.template_kwargs, bos=asked.bos
        ),
    )
    return held_out if fraction else rows


def _context(subject: Subject) -> int:
    return int(getattr(subject.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _batches(text: data.TokenRows, recipe: Recipe, subject: Subject) -> Iterator[Batch]:
    """The first `text_sequences` rows, so many at once that their logits fit."""
    length = job.sequence_length(recipe, subject.model)
    fitting = BATCH_LOGITS // (length * subject.model.config.get_text_config().vocab_size)
    return data.sample_batches(text, recipe.eval.text_sequences, max(1, min(recipe.eval.batch_size, fitting)))


def text_metrics(subject: Subject, teacher: Subject | None, batches: Iterator[Batch], console: Console) -> TextResult:
    """Perplexity, and KL divergence and agreement with the teacher, over the tokens that are predicted.

    Args:
        subject: the model that is measured.
        teacher: the reference, or None.
        batches: `input_ids` and `labels` int64 [B, T]; labels are -100 where there is no text.
        console: shows the progress.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # model's and teacher's negative log-likelihood, KL, agreements
    tokens = 0
    parts = list(batches)
    with console.track(f"Held-out text, {subject.title}", len(parts)) as tracker, torch.inference_mode():
        for batch in parts:
            labels = batch["labels"][:, 1:]  # [B, T - 1]: position t predicts token t + 1
            wanted = labels != -100
            tokens += int(wanted.sum())
            logits = [_logits(one, batch["input_ids"], wanted) for one in (subject, teacher) if one is not None]
            sums += _sums(logits, labels[wanted])
            tracker.advance()
    mean = [_finite(value / max(tokens, 1)) for value in sums.tolist()]
    compared = teacher is not None
    return TextResult(
        perplexity=_perplexity(mean[0]),
        teacher_perplexity=_perplexity(mean[1]) if compared else None,
        kl=mean[2] if compared else None,
        top1_agreement=mean[3] if compared else None,
        tokens=tokens,
    )


def _logits(subject: Subject, input_ids: Tensor, wanted: Tensor) -> Tensor:
    """Logits [N, V] at the N positions [B, T - 1] that predict a token."""
    if isinstance(subject.model, runtime.Model):
        rows = zip(input_ids, wanted, strict=True)
        return torch.cat([_logits_of_row(subject.model, ids, predicting) for ids, predicting in rows])
    device = subject.model.device
    logits = subject.model(input_ids.to(device), use_cache=False).logits  # [B, T, V]
    return logits[:, :-1][wanted.to(device)]


def _logits_of_row(model: runtime.Model, ids: Tensor, predicting: Tensor) -> Tensor:
    """Logits [N, V] of a sequence [T] at the N positions [T - 1] that predict a token, from the first to the last."""
    positions = predicting.nonzero().flatten()
    if not len(positions):
        return torch.empty(0, model.vocabulary)
    first, end = int(positions[0]), int(positions[-1]) + 1
    logits = model.logits(ids[:end], last=end - first)
    return logits if len(positions) == end - first else logits[positions - first]


def _sums(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Sums [4] over rows; `logits` are the model's [N, V] and perhaps the teacher's, `targets` int64 [N]."""
    entries = min(part.shape[-1] for part in logits)  # models of a family pad their vocabularies differently
    sums = torch.zeros(4, dtype=torch.float64)
    targets = targets.to(logits[0].device)
    for rows in torch.arange(len(targets), device=targets.device).split(max(1, CHUNK_LOGITS // entries)):
        wanted = targets[rows, None]  # [n, 1]
        chunks = [log_softmax(part[rows, :entries].float(), dim=-1) for part in logits]  # each [n, V]
        for index, chunk in enumerate(chunks):
            sums[index] -= chunk.gather(1, wanted).double().sum().cpu()
        if len(chunks) == 2:
            model, teacher = chunks
            probability = teacher.exp()
            terms = torch.where(probability > 0, probability * (teacher - model), 0.0)
            sums[2] += terms.sum(-1).double().sum().cpu()
            sums[3] += (model.argmax(-1) == teacher.argmax(-1)).sum().cpu()
    return sums


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(mean: float | None) -> float | None:
    return None if mean is None or mean > 700 else math.exp(mean)


# --- a sample of greedy text -----------------------------------------------------------------


def _check_sample(
    result: EvalResult, subject: Subject, teacher: Subject | None, text: data.TokenRows | None, gate: bool = True
) -> None:
    """Write a greedy text into the result; one that has collapsed, unlike the teacher's, is a failure."""
    prompt = _prompt(subject, text)
    try:
        written = greedy(subject, prompt)
    except UserError as error:  # logits that are no numbers
        result.failures.append(error.message)
        return
    result.sample = subject.tokenizer.decode(prompt + written, skip_special_tokens=True)
    if not collapsed(written):
        return
    token = subject.tokenizer.decode([max(set(written), key=written.count)])
    what = f"The model's greedy text has collapsed: it repeats {token!r}"
    if teacher is not None and collapsed(greedy(teacher, prompt)):
        result.notes.append(f"{what}, and so does the teacher's for the same prompt.")
    elif gate:
        result.failures.append(f"{what}.")
    else:
        result.notes.append(f"{what}.")


def _prompt(subject: Subject, text: data.TokenRows | None) -> list[int]:
    """The first tokens of the held-out text, else the token that texts begin with."""
    if text is not None:
        return next(iter(data.sample_batches(text, 1, 1)))["input_ids"][0, :PROMPT_TOKENS].tolist()
    first = subject.tokenizer.bos_token_id
    if first is None:
        first = subject.tokenizer.eos_token_id
    return [first or 0]


def greedy(subject: Subject, prompt: list[int]) -> list[int]:
    """The most probable continuation of a prompt, token by token.

    It does not end early: end-of-text tokens are passed over, so that a model that ends at once can be told from one
    that has nothing else to say.
    """
    ends = {subject.tokenizer.eos_token_id}
    configured = getattr(subject.model.generation_config, "eos_token_id", None)
    ends |= set(configured) if isinstance(configured, list) else {configured}
    vocabulary = subject.model.config.get_text_config().vocab_size
    forbidden = sorted(end for end in ends if end is not None and end < vocabulary)
    native = isinstance(subject.model, runtime.Model)
    feed = subject.model.session().feed if native else _Fed(subject.model)
    tokens = prompt
    written: list[int] = []
    while len(written) < min(SAMPLE_TOKENS, _context(subject) - len(prompt)):
        logits = feed(tokens).clone()  # [V]
        logits[forbidden] = -torch.inf
        tokens = [int(logits.argmax())]
        written += tokens
    return written


class _Fed:
    """A sequence that a model of transformers is given piece by piece."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> Tensor:
        """Logits float32 [V] after the last of the next tokens."""
        tokens = torch.tensor([ids], device=self.model.device)
        output = self.model(tokens, **models.with_cache(self.model, self.cache))
        self.cache = output[models.cache_name(self.model)]
        return output.logits[0, -1].float()


def collapsed(tokens: list[int]) -> bool:
    """Whether more than four fifths of a text are one token."""
    return len(tokens) > 1 and max(map(tokens.count, set(tokens))) > COLLAPSED * len(tokens)


# --- before and after ------------------------------------------------------------------------


def dry_run(recipe: Recipe, work: WorkDir, console: Console) -> DryRun:
    """What `run` would do, and about how long it would take (from one forward pass of the teacher); fetches no items.

    Raises:
        UserError: unknown tasks or files that are missing.
    """
    counts = tasks.estimate(_request(recipe)) if recipe.eval.tasks else {}
    runs = 2 + len(_compared(recipe))
    sequences = recipe.eval.text_sequences if _text_sources(recipe, work) else 0
    known = [tokens for _, tokens in counts.values() if tokens is not None]
    total = None
    if len(known) == len(counts):
        # On text the teacher runs beside each other model.
        total = sum(known) * runs + sequences * recipe.data.sequence_length * 2 * (runs - 1)
    teacher = models.resolve(recipe.model, recipe.revision)
    return DryRun(
        tasks={name: DryTask(items=items, tokens=tokens) for name, (items, tokens) in counts.items()},
        models=runs,
        text_sequences=sequences,
        forward_tokens=total,
        packed_bytes=_weight_bytes(work.folder("pack")),
        teacher_bytes=_weight_bytes(teacher),
        seconds=None if total is None else float(f"{total * _seconds_per_token(recipe):.3g}"),
    )


def _seconds_per_token(recipe: Recipe) -> float:
    """Of one measured forward pass of the teacher over a batch."""
    device = job.device_of(recipe)
    subject = Subject("teacher", *job.load_teacher(recipe, device, _dtype(device)))
    ids = torch.zeros((recipe.eval.batch_size, min(_context(subject), 128)), dtype=torch.int64, device=device)
    with torch.inference_mode():
        subject.model(ids[:1], logits_to_keep=1, use_cache=False)
        began = time.monotonic()
        subject.model(ids, logits_to_keep=1, use_cache=False)
    return (time.monotonic() - began) / ids.numel()


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def show(result: EvalResult) -> list[RenderableType]:
    """The result as tables and notes."""
    shown: list[RenderableType] = []
    everyone = {"packed": result, **result.compared}
    if result.tasks:
        shown.append(_task_table(everyone))
    if any(measured.text for measured in everyone.values()):
        shown.append(_text_table(everyone))
    if result.kernel:
        shown.append(f"Engine: {result.engine}, kernels: {result.kernel}")
    shown += [f"Note: {note}" for note in result.notes]
    shown += [f"Failed: {failure}" for failure in result.failures]
    return shown


def _task_table(everyone: dict[str, Measured]) -> RenderableType:
    """A row for each task and model, and one for the average."""
    rows = []
    for name, measured in everyone.items():
        label = "" if len(everyone) == 1 else f" ({name})"
        for task, one in measured.tasks.items():
            part = {True: "", False: ", part", None: ""}[one.full_set]
            rows.append(
                [
                    f"{task}{label}",
                    f"{one.metric}, {one.items}{part}",
                    _percent(one.teacher_score),
                    _percent(one.score),
                    _percent(one.stderr),
                    _percent(one.chance),
                    _percent(one.retention),
                    _percent(one.retention_above_chance),
                ]
            )
        if measured.average and len(measured.tasks) > 1:
            mean = measured.average
            above = _percent(mean.retention_above_chance)
            rows.append([f"average{label}", "", _percent(mean.teacher_score), _percent(mean.score), "", "", "", above])
    columns = ["task", "metric, items", "teacher", "score", "± stderr", "chance", "retention", "above chance"]
    return table("Tasks", columns, rows)


def _text_table(everyone: dict[str, Measured]) -> RenderableType:
    rows = []
    for name, measured in everyone.items():
        if (text := measured.text) is not None:
            numbers = (text.teacher_perplexity, text.perplexity, text.kl)
            shown = ["" if value is None else f"{value:.4g}" for value in numbers]
            rows.append([name, *shown, _percent(text.top1_agreement), str(text.tokens)])
    columns = ["held-out text", "teacher's perplexity", "perplexity", "KL, nats/token", "top-1 agreement", "tokens"]
    return table("Text", columns, rows)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
