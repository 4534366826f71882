"""The command line: parse, call one function, print. torch is imported only inside commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from edgerazor import __version__
from edgerazor.cli import dispatch, errors, folders, options
from edgerazor.cli.options import RunOptions
from edgerazor.errors import usage_error

app = typer.Typer(
    name="edgerazor",
    help="Compress a Hugging Face causal language model to 1.58-4 bits by quantization-aware distillation, "
    "and measure what it cost.",
    epilog="A whole job: edgerazor distill MODEL --bits 2 --data text.jsonl && edgerazor pack "
    "&& edgerazor eval --tasks arc,hellaswag && edgerazor bench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

#: The values of a recipe that the command line gives, by section.
Values = dict[str, Any]


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command, with the arguments and options that the table of options gives it.

    The function is called with the values of a recipe, the `RunOptions`, and by name what it alone has.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def parsed(**parameters: Any) -> None:
            values, run, own = options.split(name, parameters)
            function(values, run, **own)

        signature = options.signature(name)
        parsed.__doc__ = function.__doc__
        parsed.__signature__ = signature  # type: ignore[attr-defined]
        parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
        app.command(name)(parsed)
        return function

    return register


@command("calibrate")
def calibrate(values: Values, run: RunOptions) -> None:
    """Look at the teacher and plan a format for every row of every matrix.

    Example: edgerazor calibrate Qwen/Qwen3-0.6B --bits 1.88 --data text.jsonl

    Example: edgerazor calibrate Qwen/Qwen3-0.6B --target-size 200MB --data text.jsonl
    """
    dispatch.run_stage("calibrate", values, run)


@command("record")
def record(values: Values, run: RunOptions, out: Path) -> None:
    """Record what the losses need of the teacher, for trainings without it; goes on where it was interrupted.

    Example: edgerazor record Qwen/Qwen3-0.6B --data text.jsonl --out recording

    Example: edgerazor distill Qwen/Qwen3-0.6B --data text.jsonl --recording recording --tokens 20M
    """
    dispatch.record(values, run, out)


@command("distill")
def distill(values: Values, run: RunOptions) -> None:
    """Train the student; calibrates first when needed, and goes on where it was interrupted.

    Example: edgerazor distill Qwen/Qwen3-0.6B --bits 2 --data text.jsonl --steps 2000
    """
    dispatch.run_stage("distill", values, run)


@command("pack")
def pack(values: Values, run: RunOptions) -> None:
    """Write the packed model, and verify it against what training computed.

    Example: edgerazor pack

    Example: edgerazor pack Qwen/Qwen3-0.6B --bits 4

    Example: edgerazor pack --export gguf

    Example: edgerazor pack model.gguf --work imported

    Example: edgerazor pack FOLDER --compress
    """
    if folders.is_packed_folder(values):
        folders.rewrite_packed(values, run)
    elif folders.is_foreign(values):
        folders.import_foreign(values, run)
    else:
        dispatch.run_stage("pack", folders.choose_source(values, run), run)


@command("eval")
def evaluate(values: Values, run: RunOptions, model: str | None) -> None:
    """Measure the packed model against its teacher: tasks, perplexity, KL, agreement.

    Example: edgerazor eval --tasks arc,hellaswag

    Example: edgerazor eval MODEL --against TEACHER --tasks arc --activation-bits 8 --kv-bits 8
    """
    if model is not None:
        folders.evaluate_alone(model, values, run)
    else:
        folders.refuse_settings_of_model_alone(values)
        dispatch.run_stage("eval", values, run)


@command("bench")
def bench(values: Values, run: RunOptions) -> None:
    """Measure size, load time, speed and memory of the packed model beside its teacher, and llama.cpp where it is.

    Example: edgerazor bench --threads 1,2 --llama-bench llama.cpp/build/bin/llama-bench
    """
    dispatch.run_stage("bench", values, run)


@command("generate")
def generate(
    values: Values,
    run: RunOptions,
    prompt: str | None,
    model: Path | None,
    image: list[Path] | None,
    mmap: bool,
) -> None:
    """Let a packed model write; the text goes to stdout as it comes.

    Example: edgerazor generate "Once upon a time" --max-tokens 64

    Example: edgerazor generate "What is in the picture?" --image cat.png

    Example: echo "Why is the sky blue?" | edgerazor generate --model FOLDER --chat --temperature 0.7 --top-p 0.9
    """
    if model is not None and run.work is not None:
        raise usage_error("--model and --work both name a packed model.", "Leave one of them out.")
    dispatch.generate_text(values, run, prompt, model, image or [], mmap)


@command("serve")
def serve(
    values: Values, run: RunOptions, folder: Path | None, model: Path | None, api_key: str | None, mmap: bool
) -> None:
    """Serve a packed model: OpenAI's HTTP interface under /v1, and a page to chat with it.

    Example: edgerazor serve --port 8080

    Example: EDGERAZOR_API_KEY=secret edgerazor serve FOLDER --host 0.0.0.0
    """
    named = [given for given in (folder, model, run.work) if given is not None]
    if len(named) > 1:
        raise usage_error(f"{named[0]} and {named[1]} both name a packed model.", "Leave one of them out.")
    dispatch.serve(values, run, folder or model, api_key, mmap)


@command("data")
def data(
    values: Values, run: RunOptions, out: Path, prompts: Path | None, images: Path | None, tokens: int | None
) -> None:
    """Let the teacher write distilled data; goes on where it was interrupted.

    Example: edgerazor data Qwen/Qwen3-0.6B --prompts chat.jsonl --out own.jsonl

    Example: edgerazor data HuggingFaceTB/SmolVLM-256M-Instruct --images pictures --out own.jsonl
    """
    dispatch.write_data(values, run, out, prompts, images, tokens)


@command("run")
def run_all(values: Values, run: RunOptions) -> None:
    """All five stages of a recipe, and one table of what came out.

    Example: edgerazor run recipes/quickstart.yaml

    Example: edgerazor run recipes/qwen3-0.6b.yaml --bits 4 --steps 2000
    """
    dispatch.run_all_stages(values, run)


@command("show")
def show(
    values: Values, run: RunOptions, what: str | None, png: Path | None, verify: bool, against: Path | None
) -> None:
    """Inspect a job, its plan or a packed model; print the recipe's fields, the JSON schema of results or the format.

    Example: edgerazor show

    Example: edgerazor show plan --png plan.png

    Example: edgerazor show edgerazor-work/packed --verify

    Example: edgerazor show recipe > my.yaml
    """
    if png is not None and what != "plan":
        raise usage_error("--png draws a plan.", f"Say so: `edgerazor show plan --png {png}`.")
    if run.work is not None and what not in (None, "plan"):
        raise usage_error(
            f"show takes a folder or --work, and got {what} and {run.work}.", f"Use `edgerazor show {run.work}`."
        )
    if what in ("plan", "recipe", "schema", "format") and (verify or against):
        raise usage_error(f"{'--verify' if verify else '--against'} is for packed models.", "Name one: its folder.")
    if what in ("recipe", "schema", "format"):
        dispatch.print_reference(what, run)
    elif what == "plan":
        dispatch.show_plan(run, png)
    else:
        dispatch.show_folder(Path(what) if what else run.work, run, verify, against)


@command("report")
def report(values: Values, run: RunOptions, jobs: list[Path] | None, out: Path | None, md: bool, samples: bool) -> None:
    """Write one page that tells of a job, or of several side by side: HTML that needs nothing else, or Markdown.

    Example: edgerazor report

    Example: edgerazor report job-a job-b --out both.html
    """
    dispatch.write_report(run, jobs or [], out, md, samples)


@command("push")
def push(values: Values, run: RunOptions, folder: Path, repo: str, private: bool, revision: str | None) -> None:
    """Send a packed folder to the Hugging Face hub, once every byte of it is verified.

    Example: edgerazor push edgerazor-work/packed me/my-model --dry-run

    Example: edgerazor push edgerazor-work/packed me/my-model --private
    """
    dispatch.push(run, folder, repo, private, revision)


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(f"edgerazor {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; every failure that people can act on is one sentence and an exit code."""
    errors.exit_with_code(lambda: typer.main.get_command(app).main(prog_name="edgerazor", standalone_mode=False))
