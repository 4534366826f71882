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
from edgerazor.recipe import Recipe
from edgerazor.training import DistillResult
from edgerazor.workdir import WorkDir, digest_json, machine, versions, write_json
from recipes.benchmarks import numerics
from recipes.benchmarks.folders import BUILD, RESULTS
from recipes.benchmarks.methods import Row, Setting, Teacher, Values, real_teachers, stored, world
from recipes.benchmarks.results import commit

TOKENS = (30_000, 100_000, 300_000)
RATES = (2e-5, 1e-4, 3e-4, 1e-3)
STEP_TOKENS = (512, 1024, 4096)
BITS = 2.0
#: An automatic choice is at most so much worse than the best fixed setting.
BOUND = 1.05
#: The fixed settings but for learning rate and tokens of a step.
FIXED: Values = {
    "calibrate": {"scales": "learned"},
    "distill": {"schedule": "cosine", "warmup": 0.05, "losses": [{"name": "forward_kl"}]},
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
    "reconstruct": {"distill": {"reconstruct": {"steps": 32, "sequences": 64, "learning_rate": 3e-4}}},
}


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
    """Identity of everything that decides a row, places and times left out."""
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
    return {"kl": result.best, "steps": result.steps, "seconds": result.seconds}


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
                        Case(teacher, tokens, f"fixed-{rate:g}-{step}", fixed_changes(teacher, rate, step))
                        for rate in rates
                        for step in step_tokens
                    ]
                else:
                    name, rate, step = kind.split(":")
                    changes = recipes.merge(fixed_changes(teacher, float(rate), int(step)), OTHERS.get(name, {}))
                    rows.append(Case(teacher, tokens, f"{name}-{float(rate):g}-{step}", changes))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", help="comma-separated; default: all that are there")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated budgets")
    parser.add_argument("--kinds", default="fixed,automatic", help="comma-separated")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="comma-separated learning rates")
    parser.add_argument("--step-tokens", default=",".join(map(str, STEP_TOKENS)), help="comma-separated")
    parser.add_argument("--real-data", type=Path, help="folder with `models` and `text` of real teachers")
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows-of-budget", help="folder of the finished rows")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of unfinished ones")
    options = parser.parse_args()
    teachers = [world(), *(real_teachers(options.real_data) if options.real_data else [])]
    if options.teachers:
        teachers = [teacher for teacher in teachers if teacher.name in options.teachers.split(",")]
    setting = Setting(options.rows, options.build, None, None, Path())
    budgets = [int(tokens) for tokens in options.tokens.split(",")]
    rates = [float(rate) for rate in options.rates.split(",")]
    steps = [int(tokens) for tokens in options.step_tokens.split(",")]
    make_rows(cases(teachers, budgets, options.kinds.split(","), rates, steps), setting)


if __name__ == "__main__":
    main()
