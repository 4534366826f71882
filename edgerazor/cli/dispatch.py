"""From a parsed command line to the one function that does the job: its recipe, the call, its result printed.

All calls of the pipeline and of the stages that take a recipe stand here; those on a model's folder are in `folders`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgerazor.cli.options import RunOptions, flags_by_command, flags_by_field
from edgerazor.errors import QUALITY, UserError, usage_error

if TYPE_CHECKING:
    from edgerazor.devices import Machines
    from edgerazor.recipe import Recipe


# The recipe ---------------------------------------------------------------------------------------------------------


def assemble(values: dict[str, Any], work: Path | None, recipe_file: Path | None) -> Recipe:
    """The recipe of a command (see `recipe/load.py` for what wins over what).

    Args:
        values: of the command line, by section.
        work: the job's folder, whose recipe counts where no other is named.
        recipe_file: of `--recipe`: a file, or the bare name of a shipped one.

    Raises:
        UserError: there is no such recipe, or something in it is wrong.
    """
    from edgerazor import recipe as recipes
    from edgerazor.workdir import WorkDir

    stored: dict[str, Any] = {}
    if recipe_file is None and work is not None and WorkDir(work).recipe_file.exists():
        recipe_file = WorkDir(work).recipe_file
    if recipe_file is not None:
        recipe_file = recipes.find(recipe_file)
        stored = recipes.load(recipe_file)
        code = recipes.foreign_code(recipes.build(stored, f"The recipe {recipe_file}"))
        if code:  # a stranger may have written it
            RunOptions().open_console().warn(f"The recipe {recipe_file} runs {', and '.join(code)}.")
    return recipes.build(recipes.merge(stored, recipes.anchor(values, Path.cwd())))


def require_model(recipe: Recipe, name: str, run: RunOptions) -> None:
    """Refuse a job without a model."""
    if recipe.model:
        return
    takes_model = name in ("calibrate", "record", "distill")
    if run.recipe is not None:
        hint = f", or name it: `edgerazor {name} MODEL --recipe {run.recipe}`" if takes_model else ""
        raise usage_error(
            f"The recipe {run.recipe} names no model.", f"Add the line `model: FOLDER-OR-HUB-ID` to it{hint}."
        )
    raise usage_error(
        f"{run.work} is not a working directory of edgerazor yet, and no model was named.",
        f"Begin with `edgerazor {name if takes_model else 'distill'} MODEL --bits 2`.",
    )


# Stages -------------------------------------------------------------------------------------------------------------


def run_stage(name: str, values: dict[str, Any], run: RunOptions) -> None:
    """Run one stage in a working directory and print its result."""
    recipe = assemble(values, run.work, run.recipe)
    require_model(recipe, name, run)
    console = run.open_console()
    from edgerazor import pipeline
    from edgerazor.console import describe
    from edgerazor.workdir import DEFAULT, WorkDir

    work = WorkDir(run.work or DEFAULT)
    machines = planned_machines(run)
    if run.dry_run:
        plan = pipeline.dry_run(name, recipe, work, console, run.force, machines)
        console.result(plan, *describe(plan))
        return
    result = pipeline.run(name, recipe, work, console, run.force)
    if result is not None and console.is_main:
        console.result(result, *pipeline.STAGES[name].show(result))
        check_gates(result)


def planned_machines(run: RunOptions) -> Machines | None:
    """The machines that a dry run is asked about; None for those that are here.

    Raises:
        UserError: one of the options without another that it belongs to, or no number or size.
    """
    if run.world_size is None and run.gpu_memory is None:
        return None
    if run.world_size is None or not run.dry_run:
        raise usage_error(
            "--world-size and --gpu-memory plan a training on other machines.",
            "Use them together with --dry-run: `--dry-run --world-size 8 --gpu-memory 80GB`.",
        )
    if run.world_size < 1:
        raise usage_error(f"--world-size is a number of processes, and was {run.world_size}.")
    from edgerazor.devices import Machines
    from edgerazor.recipe import size_in_bytes

    try:
        return Machines(run.world_size, None if run.gpu_memory is None else size_in_bytes(run.gpu_memory))
    except ValueError as error:
        raise usage_error(f"--gpu-memory: {error}.") from None


def run_all_stages(values: dict[str, Any], run: RunOptions) -> None:
    """Run all stages of a recipe, write the page that tells of them, and print one table of what came out."""
    recipe = assemble(values, None, run.recipe)
    require_model(recipe, "run", run)
    from edgerazor import pipeline
    from edgerazor.stages import report, show
    from edgerazor.workdir import DEFAULT, WorkDir

    console, work = run.open_console(), WorkDir(run.work or DEFAULT)
    pipeline.run_all(recipe, work, console, run.force)
    if console.is_main:
        try:
            page = report.run([(recipe, work)], None, False, True, console, flags_by_command())
            console.say(f"{page.file} tells all of it.")
        except UserError as error:  # what was measured is worth more than the page
            console.warn(f"There is no report: {error.message}")
        summary = show.summarize(work)
        console.result(summary, *show.show(summary))
        check_gates(summary)


def check_gates(result: Any) -> None:
    """Exit with 3 where a quality gate is not met."""
    failures = getattr(result, "failures", None)
    if failures:
        raise UserError(" ".join(failures), code=QUALITY)


# Text ---------------------------------------------------------------------------------------------------------------


def generate_text(
    values: dict[str, Any], run: RunOptions, prompt: str | None, model: Path | None, images: list[Path], mmap: bool
) -> None:
    """Let a packed model write: go on from a prompt, or talk, perhaps about pictures."""
    from edgerazor.workdir import DEFAULT, WorkDir

    work = WorkDir(run.work or DEFAULT)
    recipe = assemble(values, None if model else work.path, run.recipe)
    from edgerazor.stages import generate

    if sys.stdout is None:
        raise usage_error("Standard output is closed, and the text would go there.", "Leave out `>&-`.")
    console = run.open_console()
    folder = generate.packed_folder(model, work)
    text = generate.read_prompt(prompt)
    if text is not None:
        console.result(generate.run(folder, text, recipe, console, mmap, images))
    elif run.json or not recipe.generate.chat:
        raise usage_error("There is no prompt.", 'Give one: `edgerazor generate "Once upon"`; or talk: --chat.')
    else:
        generate.converse(folder, recipe, console, mmap, images)


def serve(values: dict[str, Any], run: RunOptions, model: Path | None, api_key: str | None, mmap: bool) -> None:
    """Let a packed model answer over HTTP."""
    from edgerazor.workdir import DEFAULT, WorkDir

    work = WorkDir(run.work or DEFAULT)
    recipe = assemble(values, None if model else work.path, run.recipe)
    from edgerazor.stages import generate
    from edgerazor.stages import serve as stage

    folder = generate.packed_folder(model, work)
    stage.run(folder, recipe, api_key, run.open_console(), mmap)


def write_data(
    values: dict[str, Any], run: RunOptions, out: Path, prompts: Path | None, images: Path | None, tokens: int | None
) -> None:
    """Let the teacher write distilled data into a file."""
    recipe = assemble(values, None, run.recipe)
    from edgerazor.stages import write_data as stage

    console = run.open_console()
    if console.is_main:
        result = stage.run(recipe, out, prompts, tokens, console, run.force, images)
        console.result(result, *stage.show(result))


def record(values: dict[str, Any], run: RunOptions, out: Path) -> None:
    """Record the teacher's outputs into a folder."""
    recipe = assemble(values, run.work, run.recipe)
    require_model(recipe, "record", run)
    from edgerazor.console import describe
    from edgerazor.job import JobContext
    from edgerazor.stages import record as stage
    from edgerazor.workdir import DEFAULT, WorkDir

    console = run.open_console()
    if run.dry_run and not console.is_main:
        return
    context = JobContext(recipe, WorkDir(run.work or DEFAULT), console)
    if run.dry_run:
        plan = stage.dry_run(context, out, run.force)
        console.result(plan, *describe(plan))
        return
    result = stage.run(context, out, run.force)
    if console.is_main:
        console.result(result, *stage.show(result))


# Publishing ---------------------------------------------------------------------------------------------------------


def push(run: RunOptions, folder: Path, repo: str, private: bool, revision: str | None) -> None:
    """Send a packed folder to the hub."""
    from edgerazor.stages import push as stage

    console = run.open_console()
    result = stage.run(folder, repo, private, revision, run.dry_run, console)
    console.result(result, *stage.show(result))


# What there is ------------------------------------------------------------------------------------------------------


def write_report(run: RunOptions, jobs: list[Path], out: Path | None, as_markdown: bool, samples: bool) -> None:
    """Write the page of one working directory or several."""
    from edgerazor.stages import report
    from edgerazor.workdir import DEFAULT, WorkDir

    if jobs and run.work is not None:
        raise usage_error("Working directories and --work both name jobs.", "Leave one of them out.")
    console = run.open_console()
    works = [WorkDir(job) for job in jobs or [run.work or DEFAULT]]
    told = [(assemble({}, work.path, None), work) for work in works]
    result = report.run(told, out, as_markdown, samples, console, flags_by_command())
    console.result(result, *report.show(result))


def print_reference(what: str, run: RunOptions) -> None:
    """Print the fields of a recipe, the JSON schemas of recipes and results, or the packed format."""
    if what == "recipe":
        from edgerazor.recipe import explain

        print(explain(flags_by_field()))
        return
    from edgerazor.stages import show

    if what == "schema":
        print(show.schema(flags_by_field()))
        return
    console = run.open_console()
    for part in show.show_format():
        console.out.print(part)


def show_plan(run: RunOptions, png: Path | None) -> None:
    """Show the plan of a working directory, and draw it into a file."""
    from edgerazor.stages import show
    from edgerazor.workdir import DEFAULT, WorkDir

    console = run.open_console()
    plan = show.draw_plan(WorkDir(run.work or DEFAULT), png)
    console.result(plan, *show.show(plan))


def show_folder(folder: Path | None, run: RunOptions, verify: bool, against: Path | None) -> None:
    """Show a working directory or a packed folder; by default the working directory of this folder."""
    from edgerazor.stages import show
    from edgerazor.workdir import DEFAULT

    console = run.open_console()
    contents = show.inspect(folder or DEFAULT, console, verify, against)
    console.result(contents, *show.show(contents))
