"""What a recording is worth: the bias and the noise of each loss's gradient, and students beside those of the teacher.

    python -m recipes.benchmarks.recording --real-data ../shared/data     all rows that are not there yet, then tables
    python -m recipes.benchmarks.recording --rows-of train --sources resident,sample-46
    python -m recipes.benchmarks.recording --teachers smollm2-135m     of `make real-models`; only where that is there
    python -m recipes.benchmarks.recording --table                        only the tables, from the stored rows

*Bias* rows compare gradients at one student (rounded to 2 bits, or trained from there): of the teacher in memory, and
of many recordings of it with different random numbers. A gradient is that of the head's weight for a step of some
sequences; *bias* is how far the mean of the recordings' is from the teacher's, *noise* how far a single one is from
their mean, both as a share of its length. *Train* rows are whole trainings of a 2-bit student, equal but for where the
teacher comes from; held-out KL is exact in all of them, because of held-out text the whole distribution is recorded.
For each seed the teacher is recorded once, and all budgets are trained from that.
Sources are `resident`, `sample-N` and `top_k-N` for N tokens of each distribution, and, of bias, `rskd-N`: N draws with
replacement (Random Sampling Knowledge Distillation, arXiv 2503.16870). A finished row is a JSON file.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from edgerazor import data, losses, pipeline, training
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.job import JobContext
from edgerazor.losses import Head, Outputs, RecordedTokens, StepTotals, prediction_mask, step_counts
from edgerazor.recipe import Recipe
from edgerazor.recording import Layout, Part
from edgerazor.stages import record
from edgerazor.training import Captures, DistillResult, Trainer, recorded_tokens
from edgerazor.workdir import WorkDir, digest_json, machine, versions, write_json
from recipes.benchmarks.folders import BUILD, RESULTS
from recipes.benchmarks.methods import Row, Teacher, real_teachers, stored
from recipes.benchmarks.results import commit, markdown, publish

BITS = 2.0
#: Tokens that the trainings of one recording are given, and those of the other comparisons.
BUDGETS, BUDGET = (15_000, 30_000, 60_000), 30_000
SEEDS = (0, 1, 2)
#: Teachers with one budget and one seed, of whose gradients there are no rows.
ONE_BUDGET = {"smollm2-135m": 16_000, "stories260K": 30_000}
#: Teachers whose trainings take so long that there are only two of them, and less held-out text.
SLOW = ("smollm2-135m",)
OBJECTIVES = ("forward_kl", "eakld")
SOURCES = ("resident", "sample", "sample-32", "top_k-32", "sample-20")
#: The recording that serves several budgets: of as many tokens as `edgerazor record` keeps where nobody says.
SERVING = "sample"
#: Held-out sequences, and tokens of each of their distributions.
HELD_OUT, HELD_OUT_TOKENS = 32, 32768
BIAS_SOURCES = ("rskd-50", "sample-12", "sample-32", "top_k-32")
LOSSES = ("forward_kl", "reverse_kl", "cakld", "js")
#: Students whose gradients are compared: as rounding leaves them, and after a training.
STUDENTS = ("rounded", "trained")
#: Recordings that are compared, and sequences of the step.
REPEATS, SEQUENCES = 6, 8


@dataclass(frozen=True)
class Case:
    """A training: of a teacher, with an objective, from a source, for so many tokens, in the order of a seed."""

    teacher: Teacher
    objective: str
    source: str
    tokens: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"train-{self.objective}-{self.source}-{self.tokens}" + (f"-seed{self.seed}" if self.seed else "")


@dataclass(frozen=True)
class Setting:
    """Where finished rows and unfinished work lie."""

    rows: Path
    build: Path
    console: Console


def recipe_of(case: Case, recording: Path | None) -> Recipe:
    """The whole recipe of a training; it is evaluated after its last step."""
    distillation = {
        "tokens": case.tokens,
        "losses": [{"name": case.objective}],
        "evaluate_every": 1_000_000,
        "evaluate_sequences": held_out(case),
        "checkpoint_every": 1_000_000,
        "recording": None if recording is None else str(recording),
    }
    values = {
        "model": str(case.teacher.model),
        "seed": case.seed,
        "data": {**case.teacher.recipe["data"], "held_out_seed": 0},
        "calibrate": {**case.teacher.recipe.get("calibrate", {}), "bits": BITS, "plan": "interleave", "sequences": 16},
        "distill": distillation,
        "record": record_settings(case),
    }
    return recipes.build(values)


def record_settings(case: Case) -> dict[str, object]:
    """What is recorded for a training: enough for the largest budget, and all of the held-out distributions."""
    if case.source == "resident":
        return {}
    method, _, draws = case.source.partition("-")
    return {
        "method": method,
        **({"draws": int(draws)} if draws else {}),
        "tokens": (max(budgets(case.teacher)) if case.source == SERVING else BUDGET) + 1000,
        "held_out_sequences": held_out(case),
        "held_out_draws": HELD_OUT_TOKENS,
    }


def budgets(teacher: Teacher) -> tuple[int, ...]:
    """Tokens of the trainings that one recording serves."""
    return (ONE_BUDGET[teacher.name],) if teacher.name in ONE_BUDGET else BUDGETS


def held_out(case: Case) -> int:
    """Sequences that a training is evaluated on."""
    return HELD_OUT // 4 if case.teacher.name in SLOW else HELD_OUT


def known_teachers(real_data: Path) -> list[Teacher]:
    """The teachers of real data, and of those of `make real-models` the first, if it is there."""
    teachers = real_teachers(real_data)
    model = BUILD / "real-models" / "smollm2-135m"
    if model.exists():
        text = {**teachers[0].recipe["data"], "train": [{"file": str(real_data / "text" / "wiki.txt")}]}
        teachers.append(Teacher(model.name, model, {"data": text}))
    return teachers


def identity_of(case: Case) -> str:
    """Of everything that decides a row but for places."""
    recipe = recipe_of(case, None)
    settings = recipe.model_dump(mode="json", exclude={"model", "data"}, exclude_defaults=True)
    return digest_json([case.teacher.name, data.fingerprint(recipe.data.train), settings, versions()])


def train(case: Case, setting: Setting) -> Row:
    """Record where no earlier row has, and distill."""
    base = setting.build / "recording" / case.teacher.name
    folder = None if case.source == "resident" else base / f"{case.source}-seed{case.seed}"
    recipe = recipe_of(case, folder)
    work = WorkDir(base / "jobs" / f"{case.name}")
    recorded: Row = {}
    if folder is not None:
        made = record.run(JobContext(recipe, work, setting.console), folder)
        recorded = {"draws": made.draws, "bytes_per_token": made.bytes_per_token}
        recorded["recording"] = made.fingerprint[:12]
    result = pipeline.run("distill", recipe, work, setting.console)
    assert isinstance(result, DistillResult)
    if not (case.source == "resident" and case.tokens == BUDGET):  # bias rows go on from this one
        shutil.rmtree(work.path, ignore_errors=True)
    return {"kl": result.best, "steps": result.steps, "tokens_per_second": result.tokens_per_second, **recorded}


# --- bias and noise ----------------------------------------------------------------------------


def bias(teacher: Teacher, student: str, setting: Setting) -> Row:
    """Bias and noise of every loss from every source, at a student."""
    case = Case(teacher, "forward_kl", "resident", BUDGET)
    base = setting.build / "recording" / teacher.name / "jobs" / case.name
    recipe = recipe_of(case, None)
    if not base.exists():
        train(case, setting)
    context, _ = pipeline.resolve(pipeline.STAGES["distill"], JobContext(recipe, WorkDir(base), setting.console), False)
    trainer = training.prepare(context, {}).trainer
    if student == "trained":
        trainer.resume(setting.console)
    compared = Compared.of(trainer)
    rows: Row = {"kl": compared.gradient("forward_kl", compared.teacher)[0]}
    for name in LOSSES:
        value, reference = compared.gradient(name, compared.teacher)
        for source in BIAS_SOURCES:
            if source.startswith("rskd") and name != "forward_kl":
                continue
            rows[f"{name} {source}"] = compare(compared, name, source, value, reference)
    return rows


@dataclass
class Compared:
    """A student and a teacher at some sequences.

    Attributes:
        states: last hidden states of the student, `[B, T, H]`.
        head: of the student.
        teacher: outputs of the teacher in memory.
        log_probs: of the teacher, `[N, V]`, at the positions that count.
        labels: `[B, T]`.
    """

    states: Tensor
    head: Head
    teacher: Outputs
    log_probs: Tensor
    labels: Tensor

    @classmethod
    def of(cls, trainer: Trainer) -> Compared:
        """At the first sequences that the trainer would read."""
        batch = trainer.rows.batch(step=0, batch_size=SEQUENCES)
        student = trainer.student.outputs(batch["input_ids"], Captures(), wrapped=False)
        teacher = trainer.teachers.outputs(batch, Captures())
        assert student.head is not None
        assert teacher is not None
        positions = prediction_mask(batch["labels"]).flatten().nonzero().flatten()
        log_probs = torch.log_softmax(teacher.logits(positions), 1)
        return cls(student.last_hidden_state.detach(), student.head, teacher, log_probs, batch["labels"])

    @property
    def targets(self) -> Tensor:
        return self.labels.roll(-1, 1)[prediction_mask(self.labels)]

    def gradient(self, name: str, teacher: Outputs) -> tuple[float, Tensor]:
        """Value of a loss, and its gradient with respect to the head's weight, `[V, H]`."""
        loss = losses.make(name)
        samples, tokens = step_counts(self.labels)
        sums = loss.teacher_statistics(teacher, self.labels)
        totals = StepTotals(samples, tokens, {key: float(value) / samples for key, value in sums.items()})
        weight = self.head.weight.detach()
        master = weight.clone().requires_grad_()
        head = Head(weight, self.head.bias, self.head.scale, self.head.cap, master)
        value = loss(Outputs(self.states, head=head), teacher, self.labels, totals)
        (gradient,) = torch.autograd.grad(value, master)
        return float(value.detach()), gradient

    def recorded(self, source: str, seed: int) -> Outputs:
        """What a recording would give, with these random numbers."""
        method, draws = source.split("-")
        generator = torch.Generator().manual_seed(seed)
        if method == "rskd":
            tokens = with_replacement(self.log_probs, int(draws), generator, self.targets)
        else:
            part = Part(tokens=int(draws), temperature=1.0, power=1.0, method=method)  # type: ignore[arg-type]
            uniform = torch.rand(len(self.log_probs), generator=generator, dtype=torch.float64)
            layout = Layout(self.log_probs.shape[1], part.tokens, compact=True)
            fields = record.token_fields(self.log_probs, self.targets, uniform, part, layout)
            tokens = recorded_tokens(part, layout, [fields], self.log_probs.device)
        return Outputs(torch.empty(*self.labels.shape, 0), recorded=tokens)


def with_replacement(log_probs: Tensor, draws: int, generator: torch.Generator, targets: Tensor) -> RecordedTokens:
    """The estimate of RSKD: each token's share of the draws, as if that were the teacher's distribution."""
    tokens = torch.multinomial(log_probs.exp(), draws, replacement=True, generator=generator)
    counts = torch.zeros_like(log_probs).scatter_add_(1, tokens, torch.ones(tokens.shape, dtype=log_probs.dtype))
    counts, ids = counts.topk(draws, dim=1)  # a token that was not drawn counts nothing
    return RecordedTokens(
        ids=ids,
        log_probs=(counts / draws).clamp(min=1e-30).log(),
        weights=torch.ones(ids.shape),
        by_chance=torch.zeros_like(ids, dtype=torch.bool),
        tail=torch.zeros(len(ids)),
        entropy=-(log_probs.exp() * log_probs).sum(1),
        target_log_probs=log_probs.gather(1, targets[:, None])[:, 0],
        vocab_size=log_probs.shape[1],
    )


def compare(compared: Compared, name: str, source: str, value: float, reference: Tensor) -> dict[str, float]:
    """Bias and noise of a loss from a source, as shares of the length of the teacher's gradient."""
    repeats = 1 if source.startswith("top_k") else REPEATS
    mean, squares, values = torch.zeros_like(reference), 0.0, 0.0
    for seed in range(repeats):
        recorded_value, gradient = compared.gradient(name, compared.recorded(source, seed))
        mean += gradient / repeats
        squares += float(gradient.square().sum()) / repeats
        values += recorded_value / repeats
    length = float(reference.norm())
    variance = (squares - float(mean.square().sum())) * repeats / (repeats - 1) if repeats > 1 else 0.0
    distance = float((mean - reference).square().sum()) - variance / repeats
    return {
        "bias": max(distance, 0.0) ** 0.5 / length,
        "noise": max(variance, 0.0) ** 0.5 / length,
        "value": values / value,
        "cosine": float((mean * reference).sum()) / (float(mean.norm()) * length),
    }


# --- rows --------------------------------------------------------------------------------------


def train_cases(teacher: Teacher, sources: Iterable[str], objectives: Iterable[str]) -> list[Case]:
    """All trainings, in the order in which they are made."""
    wanted_sources, wanted_objectives = set(sources), set(objectives)
    made = [
        Case(teacher, "forward_kl", source, tokens, seed)
        for seed in (SEEDS[:1] if teacher.name in ONE_BUDGET else SEEDS)
        for tokens in budgets(teacher)
        for source in ("resident", SERVING)
    ]
    if teacher.name not in SLOW:
        made += [Case(teacher, "eakld", source, BUDGET) for source in ("resident", SERVING)]
        made += [
            Case(teacher, "forward_kl", source, BUDGET) for source in SOURCES if source not in ("resident", SERVING)
        ]
    return [case for case in made if case.source in wanted_sources and case.objective in wanted_objectives]


def make_row(path: Path, identity: str, make: Callable[[], Row], setting: Setting) -> None:
    """A row that is missing or stale."""
    if (existing := stored(path)) and existing["fingerprint"] == identity:
        return
    began = time.monotonic()
    row = make()
    where = {"machine": machine(), "versions": versions(), "commit": commit()}
    write_json(path, {**row, **where, "seconds": round(time.monotonic() - began, 1), "fingerprint": identity})
    setting.console.say(f"{path.parent.name} {path.stem}: KL {row['kl']:.4f}")


# --- the tables --------------------------------------------------------------------------------


def tables(folder: Path) -> str:
    """Markdown of all stored rows."""
    parts = []
    for teacher in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []:
        rows = {path.stem: row for path in sorted(teacher.glob("*.json")) if (row := stored(path))}
        parts.append(f"### {teacher.name}\n\n{train_table(rows)}")
        parts += [spread_table(rows)] if any(f"-{SERVING}-" in name and "seed" in name for name in rows) else []
        parts += [bias_table(student, rows[f"bias-{student}"]) for student in STUDENTS if f"bias-{student}" in rows]
    return "\n\n".join(parts)


def train_table(rows: dict[str, Row]) -> str:
    """KL after each training, beside that of the resident teacher."""
    lines = []
    for name, row in rows.items():
        if not name.startswith("train-"):
            continue
        objective, source, tokens, seed = parts_of(name)
        other = rows.get(name.replace(f"-{source}-", "-resident-"))
        against = f"{100 * (row['kl'] / other['kl'] - 1):+.1f} %" if other and source != "resident" else ""
        size = f"{row['bytes_per_token']:.0f}" if "bytes_per_token" in row else ""
        shown = f"sample-{row['draws']}" if source == SERVING else source
        which = row.get("recording", "") if source == SERVING else ""
        line = [objective, f"{tokens:,}", str(seed), shown, f"{row['kl']:.4f}", against, size, which]
        lines.append((OBJECTIVES.index(objective), tokens, seed, SOURCES.index(source), line))
    head = ["loss", "tokens", "seed", "teacher", "held-out KL", "against resident", "bytes a token", "recording"]
    return markdown(head, [line for *_, line in sorted(lines)])


def spread_table(rows: dict[str, Row]) -> str:
    """KL of all seeds at each budget: means, and how much more a recording leaves, with its standard error."""
    by_budget: dict[int, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        if name.startswith(f"train-forward_kl-{SERVING}-") and (other := rows.get(name.replace(SERVING, "resident"))):
            tokens = parts_of(name)[2]
            by_budget.setdefault(tokens, []).append((other["kl"], row["kl"]))
    lines = []
    for tokens, pairs in sorted(by_budget.items()):
        more = [100 * (recorded / resident - 1) for resident, recorded in pairs]
        error = f" ± {statistics.stdev(more) / len(more) ** 0.5:.1f}" if len(more) > 1 else ""
        means = [f"{statistics.mean(values):.4f}" for values in zip(*pairs, strict=True)]
        lines.append([f"{tokens:,}", str(len(pairs)), *means, f"{statistics.mean(more):+.1f}{error} %"])
    head = ["tokens", "seeds", "resident", "recorded", "against resident, with its standard error"]
    return f"Forward KL, mean of the seeds:\n\n{markdown(head, lines)}"


def parts_of(name: str) -> tuple[str, str, int, int]:
    """Objective, source, tokens and seed of a training's name."""
    _, objective, *source, tokens = name.split("-seed")[0].split("-")
    return objective, "-".join(source), int(tokens), int(name.split("-seed")[1]) if "-seed" in name else 0


def bias_table(student: str, row: Row) -> str:
    """Bias and noise of each loss, in percent of the gradient's length."""
    lines = []
    for name in LOSSES:
        for source in BIAS_SOURCES:
            if (found_row := row.get(f"{name} {source}")) is not None:
                numbers = [f"{100 * found_row[key]:.1f} %" for key in ("bias", "noise")]
                lines.append([name, source, *numbers, f"{found_row['cosine']:.4f}", f"{found_row['value']:.3f}"])
    head = ["loss", "recording", "bias", "noise of a step", "cosine of the mean", "value, of the teacher's"]
    title = f"Gradients of the {student} student (KL {row['kl']:.3f}), {SEQUENCES} sequences a step:"
    return f"{title}\n\n{markdown(head, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-data", type=Path, help="folder with `models` and `text` of real teachers")
    parser.add_argument("--teachers", help="comma-separated; default: all that are there")
    parser.add_argument("--rows-of", default="train,bias", help="train, bias")
    parser.add_argument("--sources", default=",".join(SOURCES), help="comma-separated, of trainings")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES), help="comma-separated, of trainings")
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows-of-recordings", help="folder of the finished rows")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of unfinished ones")
    parser.add_argument("--results", type=Path, default=RESULTS / "training.md", help="where the tables go")
    parser.add_argument("--table", action="store_true", help="only the tables")
    options = parser.parse_args()
    setting = Setting(options.rows, options.build, Console())
    teachers = [] if options.table else known_teachers(options.real_data)
    for teacher in teachers:
        if options.teachers and teacher.name not in options.teachers.split(","):
            continue
        folder = setting.rows / teacher.name
        if "train" in options.rows_of:
            for case in train_cases(teacher, options.sources.split(","), options.objectives.split(",")):
                make_row(folder / f"{case.name}.json", identity_of(case), partial(train, case, setting), setting)
        if "bias" in options.rows_of and teacher.name not in ONE_BUDGET:
            for student in STUDENTS:
                identity = digest_json([teacher.name, student, REPEATS, SEQUENCES, versions()])
                make_row(folder / f"bias-{student}.json", identity, partial(bias, teacher, student, setting), setting)
    publish("recording", tables(options.rows), options.results)


if __name__ == "__main__":
    main()
