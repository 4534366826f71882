"""One page that tells of a job, or of several: what it keeps of its teacher, what it takes, how it was made.

Everything comes from what the stages left in working directories; only the texts of teacher and student side by side
are computed here, once, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType

from edgerazor.console import Console
from edgerazor.errors import usage_error
from edgerazor.job import JobContext
from edgerazor.recipe import Recipe
from edgerazor.report import page
from edgerazor.report.commands import Flags
from edgerazor.report.job_report import Report, gather
from edgerazor.workdir import WorkDir, alone, write_text

#: The page of several jobs, in the current folder, where nobody names another.
SEVERAL = Path("edgerazor-report.html")
#: Jobs of one page.
MOST_JOBS = 32


def run(
    jobs: Sequence[tuple[Recipe, WorkDir]],
    out: Path | None,
    as_markdown: bool,
    samples: bool,
    console: Console,
    flags: Flags,
) -> Report:
    """Write the page.

    Args:
        jobs: recipe and working directory of each.
        out: the file to write; None for `report.html` in the working directory of a single job.
        as_markdown: Markdown instead of HTML.
        samples: let teacher and student write texts side by side, where that was not done yet.
        console: where progress is shown.
        flags: options of the command line, to name the commands that made the numbers.

    Raises:
        UserError: one of them is no working directory, or is there twice; the file cannot be written.
    """
    if len({work.path.resolve() for _, work in jobs}) < len(jobs) or len(jobs) > MOST_JOBS:
        raise usage_error(f"A report is of at most {MOST_JOBS} jobs, each named once.", "Leave some out.")
    for _, work in jobs:
        if not work.recipe_file.exists():
            raise usage_error(
                f"{work.path} is not a working directory of edgerazor yet.",
                "Begin with `edgerazor distill MODEL --bits 2`.",
            )
    file = out or (jobs[0][1].report_file if len(jobs) == 1 else SEVERAL)
    if out is None and as_markdown:
        file = file.with_suffix(".md")
    if file.is_dir():
        raise usage_error(f"--out wants the name of a file, but {file} is a folder.")
    contexts = [JobContext(recipe, work, console) for recipe, work in jobs]
    report = Report(file=str(file), jobs=[gather(context, flags, samples) for context in contexts])
    text = page.render_markdown(report) if as_markdown else page.render_html(report)
    with alone(file):
        write_text(file, text)
    return report


def show(report: Report) -> list[RenderableType]:
    """A line for each job, and where the page is."""
    return [*(job.sentence for job in report.jobs), f"{report.file} tells all of it."]
