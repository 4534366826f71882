"""The table of budgets: settings chosen by the budget beside a sweep of fixed ones, at equal tokens.

    python -m recipes.benchmarks.budget --real-data ../shared/data       all rows that are not there yet, then the table
    python -m recipes.benchmarks.budget --teachers world --tokens 300000 --kinds automatic
    python -m recipes.benchmarks.budget --table           only the table, from the stored rows

A row is a teacher, a budget of tokens and a way to spend it; all are students of 2 nominal bits with the plan by
sensitivity, int4 embedding and A8-KV8, trained by forward KL. *Fixed* rows are a sweep of peak learning rates and
tokens per step, with a warm-up of 5 % and a cosine to zero; *automatic* rows name the budget alone, and
`edgerazor.training.budget_defaults` chooses. *Other* rows change one thing of a fixed one: initial codes, trained
scales, the schedule, the objective. The number is the held-out KL after the last step, of the student as it would be
packed. A finished row is a JSON file, kept as in `methods.py`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from edgerazor import data, models, pipeline
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.job import JobContext
from edgerazor.recipe import Recipe
from edgerazor.training import DistillResult, budget_choice
from edgerazor.workdir import WorkDir, digest_json, machine, versions, write_json
from recipes.benchmarks import numerics
from recipes.benchmarks.folders import BUILD, RESULTS
from recipes.benchmarks.methods import Row, Setting, Teacher, Values, real_teachers, stored, world
from recipes.benchmarks.results import commit, markdown, publish

TOKENS = (30_000, 100_000, 300_000)
RATES = (2e-5, 1e-4, 3e-4, 1e-3)
STEP_TOKENS = (512, 1024, 4096)
BITS = 2.0
#: An automatic choice is at most so much worse than the best fixed setting.
BOUND = 1.05
#: The fixed settings but for learning rate and tokens of a step.
FIXED: Values = {
    "calibrate": {"scales": "learned", "init": "least_error"},
    "distill": {"accumulation": 1, "schedule": "cosine", "warmup": 0.05, "losses": [{"name": "forward_kl"}]},
}
PUBLISHED = [
    {"name": "ce", "weight": 0.1},
    {"name": "eakld", "weight": 2.0},
    {"name": "lafd", "weight": 0.1},
]
#: What other rows change of a fixed one.
OTHERS: dict[str, Values] = {
    "constant": {"distill": {"schedule": "constant"}},
    "gptq": {"calibrate": {"init": "gptq"}},
    "clip": {"calibrate": {"init": "clip"}},
    "computed": {"calibrate": {"scales": "computed"}},
    "published": {"distill": {"losses": PUBLISHED}},
    "phases": {"distill": {"phases": [{"train": "scales", "share": 0.15}, {"train": "all", "share": 0.85}]}},
    "seed": {"seed": 1},
}


def row_name(kind: str, rate: float, step_tokens: int) -> str:
    """`fixed_0.001_512`."""
    return f"{kind}_{rate:g}_{step_tokens}"


@dataclass(frozen=True)
class Case:
    """A row: a teacher, tokens to spend, and how; `changes` by section of the recipe."""

    teacher: Teacher
    tokens: int
    name: str
    changes: Values = field(default_factory=dict, hash=False)


def fixed_changes(teacher: Teacher, rate: float, step_tokens: int) -> Values:
    rows = max(1, step_tokens // teacher.recipe["data"]["sequence_length"])
    return recipes.merge(FIXED, {"distill": {"learning_rate": rate, "batch_size": rows}})


def recipe_of(case: Case) -> Recipe:
    """The whole recipe of a row; it is evaluated after its last step."""
    values = {
        "model": str(case.teacher.model),
        "data": case.teacher.recipe["data"],
        "calibrate": {
            **case.teacher.recipe.get("calibrate", {}),
            "bits": BITS,
            "sequences": 64,
            "sensitivity_tokens": 2048,
        },
        "distill": {
            "tokens": case.tokens,
            "evaluate_every": 1_000_000,
            "evaluate_sequences": 64,
            "checkpoint_every": 1_000_000,
        },
    }
    return recipes.build(recipes.merge(values, case.changes))


def fingerprint(recipe: Recipe) -> str:
    """Identity of everything that decides a row, places and times left out; of an automatic one what is chosen."""
    quiet = JobContext(recipe, WorkDir(BUILD / "none"), Console(quiet=True))
    if choice := budget_choice.choose(quiet, None):
        recipe, _ = budget_choice.apply(recipe, choice)
    settings = recipe.model_dump(mode="json", exclude={"model", "data", "bench", "compare"}, exclude_defaults=True)
    return digest_json(
        {
            "recipe": settings,
            "teacher": models.fingerprint(Path(recipe.model)),
            "text": [data.fingerprint(recipe.data.train), recipe.data.sequence_length],
            "versions": versions(),
            "code": {"formats": numerics.of_formats(), "loss": numerics.of_loss("forward_kl")},
        }
    )


def make_row(case: Case, recipe: Recipe, setting: Setting) -> Row:
    """Calibrate where no earlier row has, and distill."""
    start = digest_json(recipe.calibrate.model_dump(mode="json"))[:8]
    work = WorkDir(setting.build / "budget" / case.teacher.name / start)
    result = pipeline.run("distill", recipe, work, setting.console, force=True)
    assert isinstance(result, DistillResult)
    shutil.rmtree(work.folder("distill"), ignore_errors=True)
    settings = recipes.merge(recipe.model_dump(mode="json"), result.chosen)["distill"]
    return {
        "kl": result.best,
        "steps": result.steps,
        "seconds": result.seconds,
        "learning_rate": settings["learning_rate"],
        "step_tokens": settings["batch_size"] * settings["accumulation"] * recipe.data.sequence_length,
    }


def cases(
    teachers: Iterable[Teacher],
    budgets: Iterable[int],
    kinds: Iterable[str],
    rates: Iterable[float] = RATES,
    step_tokens: Iterable[int] = STEP_TOKENS,
) -> list[Case]:
    """All rows, in the order in which they are made."""
    rows = []
    for tokens in budgets:
        for teacher in teachers:
            for kind in kinds:
                if kind == "automatic":
                    rows.append(Case(teacher, tokens, "automatic"))
                elif kind == "fixed":
                    rows += [
                        Case(teacher, tokens, row_name("fixed", rate, step), fixed_changes(teacher, rate, step))
                        for rate in rates
                        for step in step_tokens
                    ]
                else:
                    name, rate, step = kind.split(":")
                    changes = recipes.merge(fixed_changes(teacher, float(rate), int(step)), OTHERS.get(name, {}))
                    rows.append(Case(teacher, tokens, row_name(name, float(rate), int(step)), changes))
    return rows


def make_rows(wanted: list[Case], setting: Setting) -> None:
    """All rows that are missing or stale, one after the other, each stored when it is finished."""
    for case in wanted:
        recipe = recipe_of(case)
        identity = fingerprint(recipe)
        path = setting.rows / case.teacher.name / f"{case.tokens}-{case.name}.json"
        if (existing := stored(path)) and existing["fingerprint"] == identity:
            continue
        row = make_row(case, recipe, setting)
        setting.console.say(f"{case.teacher.name}, {case.tokens:,} tokens, {case.name}: KL {row['kl']:.4f}")
        identification = {"teacher": case.teacher.name, "tokens": case.tokens, "name": case.name}
        where = {"machine": machine(), "versions": versions(), "commit": commit()}
        write_json(path, {**identification, **row, **where, "fingerprint": identity})


# --- the table ---------------------------------------------------------------------------------


def table(folder: Path) -> str:
    """Markdown of all stored rows: a summary, then the sweep of each teacher and budget."""
    groups: dict[tuple[str, int], dict[str, Row]] = {}
    for file in sorted(folder.glob("*/*.json")):
        if row := stored(file):
            groups.setdefault((row["teacher"], row["tokens"]), {})[row["name"]] = row
    head = ["teacher", "tokens", "best fixed setting", "KL", "automatic", "KL", "against the best"]
    parts = [markdown(head, [summary(*key, rows) for key, rows in sorted(groups.items())])]
    for (teacher, tokens), rows in sorted(groups.items()):
        parts.append(f"### {teacher}, {tokens:,} tokens\n\n{sweep_table(rows)}{others_list(rows)}")
    every = [row for rows in groups.values() for row in rows.values()]
    facts = [*sorted({row["machine"] for row in every})]
    facts += [f"commit {', '.join(sorted({row['commit'] for row in every if row['commit']}))}"]
    return f"{'; '.join(facts)}.\n\n" + "\n\n".join(parts)


def split_name(name: str) -> tuple[str, float, int]:
    """Kind, learning rate and tokens of a step of a row's name."""
    kind, rate, step = name.rsplit("_", 2)
    return kind, float(rate), int(step)


def fixed_rows(rows: dict[str, Row]) -> dict[tuple[float, int], Row]:
    return {split_name(name)[1:]: row for name, row in rows.items() if name.startswith("fixed_")}


def summary(teacher: str, tokens: int, rows: dict[str, Row]) -> list[str]:
    """The best fixed setting of a sweep beside what the budget chose."""
    sweep, automatic = fixed_rows(rows), rows.get("automatic")
    line = [teacher, f"{tokens:,}"]
    if sweep:
        (rate, step), best = min(sweep.items(), key=lambda item: item[1]["kl"])
        line += [f"{rate:g}, {step:,} tokens a step", f"{best['kl']:.4f}"]
    else:
        line += ["", ""]
    if automatic is None:
        return [*line, "", "", ""]
    line += [f"{automatic['learning_rate']:.2g}, {automatic['step_tokens']:,}", f"{automatic['kl']:.4f}"]
    return [*line, f"{100 * (automatic['kl'] / best['kl'] - 1):+.1f} %" if sweep else ""]


def sweep_table(rows: dict[str, Row]) -> str:
    """KL by learning rate and tokens of a step; empty cells were not made."""
    sweep = fixed_rows(rows)
    rates, steps = sorted({rate for rate, _ in sweep}), sorted({step for _, step in sweep})
    lines = [
        [f"{rate:g}", *(f"{sweep[rate, step]['kl']:.4f}" if (rate, step) in sweep else "" for step in steps)]
        for rate in rates
    ]
    return markdown(["learning rate", *(f"{step:,} tokens a step" for step in steps)], lines) if sweep else ""


def others_list(rows: dict[str, Row]) -> str:
    """What one change makes of a fixed setting."""
    lines = []
    for name, row in rows.items():
        if name == "automatic" or name.startswith("fixed_"):
            continue
        kind, rate, step = split_name(name)
        fixed = rows.get(row_name("fixed", rate, step))
        against = f", {100 * (row['kl'] / fixed['kl'] - 1):+.1f} % of the fixed row" if fixed else ""
        lines.append(f"- {kind} ({rate:g}, {step:,}): {row['kl']:.4f}{against}")
    return "".join(f"\n{line}" for line in ["", *lines]) if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", help="comma-separated; default: all that are there")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated budgets")
    parser.add_argument("--kinds", default="fixed,automatic", help="fixed, automatic, or others: gptq:1e-3:512")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="comma-separated learning rates")
    parser.add_argument("--step-tokens", default=",".join(map(str, STEP_TOKENS)), help="comma-separated")
    parser.add_argument("--real-data", type=Path, help="folder with `models` and `text` of real teachers")
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows-of-budget", help="folder of the finished rows")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of unfinished ones")
    parser.add_argument("--results", type=Path, default=RESULTS / "budget.md", help="where the table goes")
    parser.add_argument("--table", action="store_true", help="only the table")
    options = parser.parse_args()
    teachers = [world(), *(real_teachers(options.real_data) if options.real_data else [])]
    if options.teachers:
        teachers = [teacher for teacher in teachers if teacher.name in options.teachers.split(",")]
    setting = Setting(options.rows, options.build, None, None, Path())
    budgets = [int(tokens) for tokens in options.tokens.split(",")]
    rates = [float(rate) for rate in options.rates.split(",")]
    steps = [int(tokens) for tokens in options.step_tokens.split(",")]
    if not options.table:
        make_rows(cases(teachers, budgets, options.kinds.split(","), rates, steps), setting)
    publish("budget", table(options.rows), options.results)


if __name__ == "__main__":
    main()
