"""The command line: parse, call one function, print. torch is imported only inside commands."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgerazor import __version__, terminal
from edgerazor.errors import FAILED, INTERRUPTED, QUALITY, UserError, plain, usage_error

if TYPE_CHECKING:
    from edgerazor.console import Console
    from edgerazor.recipe import Recipe

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

Option = typer.Option
MODEL_HELP = "A local model folder or a Hugging Face hub id."

ModelArgument = Annotated[str | None, typer.Argument(help=MODEL_HELP + " Default: that of the working directory.")]
Work = Annotated[Path, Option("--work", help="The job's folder, where the stages meet.", metavar="DIR")]
RecipeFile = Annotated[
    Path | None,
    Option(
        "--recipe", help="A YAML recipe, or the name of a shipped one; see `edgerazor show recipe`.", metavar="FILE"
    ),
]
Seed = Annotated[int | None, Option("--seed", help="Of data order, initialisation and generated text.")]
Device = Annotated[str | None, Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, Option("--threads", help="CPU threads; all cores by default.")]
Revision = Annotated[str | None, Option("--revision", help="Branch, tag or commit of a hub model.")]
Remote = Annotated[bool | None, Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Json = Annotated[bool, Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Nothing on stderr but errors.")]
Force = Annotated[bool, Option("--force", help="Do it again; throws away what is in the way.")]
DryRun = Annotated[bool, Option("--dry-run", help="Say what would be done, how large and how long, and stop.")]
DataFiles = Annotated[
    list[Path] | None, Option("--data", help="Text to learn from (.txt, .jsonl, .gz); repeatable.", metavar="FILE")
]
HeldOut = Annotated[list[Path] | None, Option("--held-out", help="Text to measure on; repeatable.", metavar="FILE")]
Length = Annotated[int | None, Option("--sequence-length", help="Tokens per sequence.")]
Bits = Annotated[float | None, Option("--bits", help="Nominal average of the decoder's linear layers, 1.58 to 8.")]
RealBits = Annotated[
    float | None, Option("--real-bits", help="Instead of --bits: every byte of the weight files, per weight.")
]
TargetSize = Annotated[
    str | None, Option("--target-size", help="Instead of --bits: most bytes of the weight files.", metavar="200MB")
]
Steps = Annotated[int | None, Option("--steps", help="Optimizer steps.")]
Formats = Annotated[str | None, Option("--formats", help="To choose from: ternary,int2,int3,int4.")]
GroupSize = Annotated[
    str | None, Option("--group-size", help="Weights of a row that share one scale; `row`: all.", metavar="N|row")
]
PlanName = Annotated[
    str | None, Option("--plan", help="What gets wider formats: sensitivity, interleave, variance or first (units).")
]
Granularity = Annotated[
    str | None, Option("--granularity", help="Unit that has a format: row, tensor, column or block.")
]
Sensitivity = Annotated[
    str | None, Option("--sensitivity", help="Estimate of damage: auto, fisher, integrated, hessian or direct.")
]
KvBits = Annotated[int | None, Option("--kv-bits", help="Keys and values: 4, 8 or 16.")]
InitName = Annotated[
    str | None, Option("--init", help="Scales and codes to begin with: least_error, rtn, clip or gptq.")
]
ActivationBits = Annotated[int | None, Option("--activation-bits", help="Inputs of linear layers: 4 to 8, or 16.")]
Compare = Annotated[
    list[str] | None,
    Option("--compare", help="Another packed model to measure; repeatable.", metavar="NAME=FOLDER"),
]


@app.command()
def calibrate(
    model: ModelArgument = None,
    bits: Bits = None,
    real_bits: RealBits = None,
    target_size: TargetSize = None,
    data: DataFiles = None,
    held_out: HeldOut = None,
    sequence_length: Length = None,
    sequences: Annotated[int | None, Option("--sequences", help="Calibration sequences.")] = None,
    formats: Formats = None,
    group_size: GroupSize = None,
    plan: PlanName = None,
    granularity: Granularity = None,
    sensitivity: Sensitivity = None,
    kv_bits: KvBits = None,
    activation_bits: ActivationBits = None,
    init: InitName = None,
    revision: Revision = None,
    trust_remote_code: Remote = None,
    recipe: RecipeFile = None,
    work: Work = Path("edgerazor-work"),
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Look at the teacher and plan a format for every row of every matrix.

    Example: edgerazor calibrate Qwen/Qwen3-0.6B --bits 1.88 --data text.jsonl

    Example: edgerazor calibrate Qwen/Qwen3-0.6B --target-size 200MB --data text.jsonl
    """
    values = general(model, revision, trust_remote_code, seed, device, threads)
    values |= {"data": data_section(data, held_out, sequence_length)}
    values |= {
        "calibrate": budget_section(bits, real_bits, target_size)
        | plan_section(formats, group_size, plan, granularity, sensitivity, kv_bits, activation_bits, sequences)
    }
    values["calibrate"] |= given(init=init)
    stage("calibrate", values, work, recipe, json, quiet, force, dry_run)


@app.command()
def distill(
    model: ModelArgument = None,
    bits: Bits = None,
    real_bits: RealBits = None,
    target_size: TargetSize = None,
    data: DataFiles = None,
    held_out: HeldOut = None,
    sequence_length: Length = None,
    steps: Steps = None,
    tokens: Annotated[int | None, Option("--tokens", help="Training tokens.")] = None,
    max_time: Annotated[float | None, Option("--max-time", help="Seconds of training, resumes included.")] = None,
    batch_size: Annotated[int | None, Option("--batch-size", help="Sequences per forward pass and process.")] = None,
    accumulation: Annotated[int | None, Option("--accumulation", help="Forward passes per optimizer step.")] = None,
    learning_rate: Annotated[float | None, Option("--learning-rate", help="Peak learning rate.")] = None,
    checkpoint_every: Annotated[int | None, Option("--checkpoint-every", help="Steps between checkpoints.")] = None,
    train: Annotated[
        str | None, Option("--train", help="all, or scales: rounded codes stay and only their scales are trained.")
    ] = None,
    reconstruct: Annotated[
        int | None, Option("--reconstruct", help="Train layer by layer first, each for so many steps.")
    ] = None,
    formats: Formats = None,
    group_size: GroupSize = None,
    plan: PlanName = None,
    granularity: Granularity = None,
    sensitivity: Sensitivity = None,
    kv_bits: KvBits = None,
    activation_bits: ActivationBits = None,
    init: InitName = None,
    revision: Revision = None,
    trust_remote_code: Remote = None,
    recipe: RecipeFile = None,
    work: Work = Path("edgerazor-work"),
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Train the student; calibrates first when needed, and goes on where it was interrupted.

    Example: edgerazor distill Qwen/Qwen3-0.6B --bits 2 --data text.jsonl --steps 2000
    """
    values = general(model, revision, trust_remote_code, seed, device, threads)
    values |= {
        "data": data_section(data, held_out, sequence_length),
        "calibrate": budget_section(bits, real_bits, target_size)
        | plan_section(formats, group_size, plan, granularity, sensitivity, kv_bits, activation_bits, None),
        "distill": given(
            steps=steps,
            tokens=tokens,
            max_time=max_time,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            checkpoint_every=checkpoint_every,
            train=train,
            reconstruct=None if reconstruct is None else {"steps": reconstruct},
        ),
    }
    values["calibrate"] |= given(init=init)
    stage("distill", values, work, recipe, json, quiet, force, dry_run)


@app.command()
def pack(
    model: Annotated[
        str | None, typer.Argument(help=MODEL_HELP + " Given: round it to nearest, without training.")
    ] = None,
    bits: Bits = None,
    real_bits: RealBits = None,
    target_size: TargetSize = None,
    student: Annotated[str | None, Option("--student", help="best or last.")] = None,
    compress: Annotated[
        bool | None,
        Option("--compress/--no-compress", help="Smaller, for shipping; of a packed folder: make it so, or undo it."),
    ] = None,
    export: Annotated[
        str | None, Option("--export", help="Comma-separated formats to write, too: gguf, gguf-f16 ...")
    ] = None,
    allow_lossy: Annotated[bool | None, Option("--allow-lossy", help="Export also what changes weights.")] = None,
    formats: Formats = None,
    group_size: GroupSize = None,
    plan: PlanName = None,
    granularity: Granularity = None,
    sensitivity: Sensitivity = None,
    kv_bits: KvBits = None,
    activation_bits: ActivationBits = None,
    init: InitName = None,
    revision: Revision = None,
    trust_remote_code: Remote = None,
    recipe: RecipeFile = None,
    work: Work = Path("edgerazor-work"),
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Write the packed model, and verify it against what training computed.

    Example: edgerazor pack

    Example: edgerazor pack Qwen/Qwen3-0.6B --bits 4

    Example: edgerazor pack --export gguf

    Example: edgerazor pack model.gguf --work imported

    Example: edgerazor pack FOLDER --compress
    """
    values = general(model, revision, trust_remote_code, None, None, None)
    section = budget_section(bits, real_bits, target_size)
    section |= plan_section(formats, group_size, plan, granularity, sensitivity, kv_bits, activation_bits, None)
    section |= given(init=init)
    if model is not None and is_packed_folder(model):
        options = section | given(student=student)
        if compress is not None:
            recompress_packed(model, options | given(export=export, dry_run=dry_run or None), compress, json, quiet)
            return
        export_packed(model, options, listed(export), bool(allow_lossy), json, quiet, dry_run)
        return
    if model is not None and is_foreign(model, bool(section.keys() - COMPUTING)):
        import_foreign(
            Path(model),
            section | given(student=student, compress=compress),
            listed(export),
            bool(allow_lossy),
            work,
            json,
            quiet,
            force,
            dry_run,
        )
        return
    refuse_settings_of_student(section, model, recipe)
    if export is not None:  # what was once allowed for another export is not for this one
        allow_lossy = bool(allow_lossy)
    asked = given(student=student, compress=compress, export=listed(export), allow_lossy=allow_lossy)
    if model is not None:
        asked["source"] = "teacher"
    elif recipe is None and not ((export is not None or compress is not None) and is_rounded(work)):
        asked["source"] = "auto"
    values |= {"calibrate": section, "pack": asked}
    stage("pack", values, work, recipe, json, quiet, force, dry_run)


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Measure this model or packed folder alone, without a working directory.")
    ] = None,
    tasks: Annotated[
        str | None, Option("--tasks", help="Comma-separated: arc, hellaswag, world, any of lm-eval.")
    ] = None,
    task_data: Annotated[
        Path | None, Option("--task-data", help="Folder of TASK.jsonl files, for offline work.", metavar="DIR")
    ] = None,
    limit: Annotated[int | None, Option("--limit", help="Items per task.")] = None,
    num_fewshot: Annotated[int | None, Option("--num-fewshot", help="Examples before each item.")] = None,
    apply_chat_template: Annotated[bool | None, Option("--apply-chat-template", help="Prompts as chat.")] = None,
    data: Annotated[
        list[Path] | None, Option("--data", help="Held-out text to measure on; repeatable.", metavar="FILE")
    ] = None,
    batch_size: Annotated[int | None, Option("--batch-size", help="Sequences per forward pass.")] = None,
    against: Annotated[
        str | None, Option("--against", help="The teacher that MODEL is compared with.", metavar="TEACHER")
    ] = None,
    activation_bits: ActivationBits = None,
    kv_bits: KvBits = None,
    group_size: GroupSize = None,
    min_retention: Annotated[
        float | None, Option("--min-retention", help="Exit 3 when the average retention above chance is lower.")
    ] = None,
    compare: Compare = None,
    revision: Revision = None,
    trust_remote_code: Remote = None,
    recipe: RecipeFile = None,
    work: Work = Path("edgerazor-work"),
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Measure the packed model against its teacher: tasks, perplexity, KL, agreement.

    Example: edgerazor eval --tasks arc,hellaswag

    Example: edgerazor eval MODEL --against TEACHER --tasks arc --activation-bits 8 --kv-bits 8
    """
    values = general(None, revision, trust_remote_code, None, device, threads)
    values |= {"compare": compare_section(compare)} if compare else {}
    values |= {
        "data": {"held_out": [{"file": str(file)} for file in data]} if data else {},
        "eval": given(
            tasks=listed(tasks),
            task_data=None if task_data is None else str(task_data),
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            batch_size=batch_size,
            min_retention=min_retention,
            against=against,
            activation_bits=activation_bits,
            kv_bits=kv_bits,
        ),
        "calibrate": given(group_size=number_or_word(group_size)),
    }
    if model is not None:
        measure_alone(model, values, recipe, json, quiet, dry_run)
        return
    for name in given(against=against, activation_bits=activation_bits, kv_bits=kv_bits, group_size=group_size):
        option = f"--{name.replace('_', '-')}"
        raise usage_error(f"{option} is for a model that is measured alone.", f"Name it: `eval MODEL {option} ...`.")
    stage("eval", values, work, recipe, json, quiet, force, dry_run)


@app.command()
def bench(
    prefill_tokens: Annotated[int | None, Option("--prefill-tokens", help="Prompt length.")] = None,
    decode_tokens: Annotated[int | None, Option("--decode-tokens", help="Tokens generated.")] = None,
    contexts: Annotated[str | None, Option("--contexts", help="Comma-separated tokens in the cache.")] = None,
    rounds: Annotated[int | None, Option("--rounds", help="Interleaved repetitions.")] = None,
    mmap: Annotated[bool | None, Option("--mmap", help="Measure also with weights read in place.")] = None,
    llama_bench: Annotated[
        str | None,
        Option("--llama-bench", help="llama.cpp's, or none; default: where it is found on the PATH.", metavar="PATH"),
    ] = None,
    ik_llama_bench: Annotated[
        str | None, Option("--ik-llama-bench", help="llama-bench of ik_llama.cpp.", metavar="PATH")
    ] = None,
    compare: Compare = None,
    recipe: RecipeFile = None,
    work: Work = Path("edgerazor-work"),
    threads: Annotated[
        list[str] | None,
        Option("--threads", help="CPU threads, comma-separated or repeated; all cores by default.", metavar="N[,N...]"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Measure size, load time, speed and memory of the packed model beside its teacher, and llama.cpp where it is.

    Example: edgerazor bench --threads 1,2 --llama-bench llama.cpp/build/bin/llama-bench
    """
    values: dict[str, Any] = {"compare": compare_section(compare)} if compare else {}
    values |= {
        "bench": given(
            prefill_tokens=prefill_tokens,
            decode_tokens=decode_tokens,
            contexts=None if contexts is None else integers("--contexts", contexts),
            rounds=rounds,
            threads=None if threads is None else integers("--threads", ",".join(threads)),
            mmap=mmap,
            llama_bench=llama_bench,
            ik_llama_bench=ik_llama_bench,
        )
    }
    stage("bench", values, work, recipe, json, quiet, force, dry_run)


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to go on from; `-`, or nothing behind a pipe: standard input.", show_default=False),
    ] = None,
    model: Annotated[
        Path | None,
        Option("--model", help="A packed folder; default: that of the working directory.", metavar="FOLDER"),
    ] = None,
    max_tokens: Annotated[int | None, Option("--max-tokens", help="Most tokens of the text.")] = None,
    temperature: Annotated[
        float | None, Option("--temperature", help="Of drawing; 0 takes the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, Option("--top-k", help="Draw from so many tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, Option("--top-p", help="Draw from tokens that have this probability.")] = None,
    min_p: Annotated[
        float | None, Option("--min-p", help="Draw from tokens of this share of the highest probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, Option("--repetition-penalty", help="Above 1: tokens that occurred are less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, Option("--stop", help="End before this text; repeatable.", metavar="TEXT")
    ] = None,
    chat: Annotated[
        bool | None,
        Option("--chat/--no-chat", help="The prompt is a user's turn; without one: talk in the terminal."),
    ] = None,
    system: Annotated[str | None, Option("--system", help="Of a chat: the system's message.", metavar="TEXT")] = None,
    mmap: Annotated[bool, Option("--mmap", help="Read weights in place: less memory, slower.")] = False,
    recipe: RecipeFile = None,
    work: Annotated[Path | None, Option("--work", help="The job's folder.", metavar="DIR")] = None,
    seed: Seed = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a packed model write; the text goes to stdout as it comes.

    Example: edgerazor generate "Once upon a time" --max-tokens 64

    Example: echo "Why is the sky blue?" | edgerazor generate --model FOLDER --chat --temperature 0.7 --top-p 0.9
    """
    if model is not None and work is not None:
        raise usage_error("--model and --work both name a packed model.", "Leave one of them out.")
    from edgerazor.workdir import DEFAULT, WorkDir

    values = general(None, None, None, seed, None, threads)
    values["generate"] = given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or None,
        chat=chat,
        system=system,
    )
    job = WorkDir(work or DEFAULT)
    asked = assemble(values, None if model else job.path, recipe)
    from edgerazor.stages import generate as stage_module

    refuse_closed_stdout()
    console = open_console(json, quiet)
    folder = stage_module.packed_folder(model, job)
    text = stage_module.read_prompt(prompt)
    if text is not None:
        result = stage_module.run(folder, text, asked, console, mmap)
        console.result(result)
    elif json or not asked.generate.chat:
        raise usage_error("There is no prompt.", 'Give one: `edgerazor generate "Once upon"`; or talk: --chat.')
    else:
        stage_module.converse(folder, asked, console, mmap)


@app.command(name="data")
def write_data(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + " It writes.")],
    out: Annotated[Path, Option("--out", help="The JSON lines file to write.", metavar="FILE")],
    prompts: Annotated[
        Path | None, Option("--prompts", help="Conversations to answer anew, or texts to go on from.", metavar="FILE")
    ] = None,
    tokens: Annotated[int | None, Option("--tokens", min=1, help="Stop after so many; default: all prompts.")] = None,
    temperature: Annotated[float | None, Option("--temperature", help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, Option("--top-p", help="Draw from tokens that have this probability.")] = None,
    top_k: Annotated[int | None, Option("--top-k", help="Draw from so many tokens; 0 for all.")] = None,
    answer_tokens: Annotated[int | None, Option("--answer-tokens", help="Most tokens of an answer or a text.")] = None,
    prompt_tokens: Annotated[int | None, Option("--prompt-tokens", help="Tokens of a text to go on from.")] = None,
    batch_size: Annotated[int | None, Option("--batch-size", help="Prompts side by side.")] = None,
    thinking: Annotated[
        bool | None, Option("--thinking/--no-thinking", help="Think before an answer, if the template can say so.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: Remote = None,
    recipe: RecipeFile = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Let the teacher write distilled data; goes on where it was interrupted.

    Example: edgerazor data Qwen/Qwen3-0.6B --prompts chat.jsonl --out own.jsonl
    """
    values = general(model, revision, trust_remote_code, seed, device, threads)
    values["sampling"] = given(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        answer_tokens=answer_tokens,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        thinking=thinking,
    )
    asked = assemble(values, None, recipe)
    from edgerazor.stages import write_data as stage_module

    console = open_console(json, quiet)
    if console.is_main:
        result = stage_module.run(asked, out, prompts, tokens, console, force)
        console.result(result, *stage_module.show(result))


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or the name of a shipped one.")],
    bits: Bits = None,
    real_bits: RealBits = None,
    target_size: TargetSize = None,
    steps: Steps = None,
    work: Work = Path("edgerazor-work"),
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """All five stages of a recipe, and one table of what came out.

    Example: edgerazor run recipes/quickstart.yaml

    Example: edgerazor run recipes/qwen3-0.6b.yaml --bits 4 --steps 2000
    """
    values = general(None, None, None, seed, device, threads)
    values["calibrate"] = budget_section(bits, real_bits, target_size)
    values["distill"] = given(steps=steps)
    asked = assemble(values, None, recipe)
    require_model(asked, "run", work, recipe)
    from edgerazor import pipeline
    from edgerazor.console import is_main_process
    from edgerazor.stages import show as show_stage
    from edgerazor.workdir import WorkDir

    console = open_console(json, quiet)
    job = WorkDir(work)
    pipeline.run_all(asked, job, console, force)
    if is_main_process():
        summary = show_stage.summarize(job)
        console.result(summary, *show_stage.show(summary))
        check_gates(summary)


@app.command()
def show(
    what: Annotated[
        str | None,
        typer.Argument(
            help="A working directory, a packed folder, `plan`, `recipe`, `schema` or `format`.", show_default=False
        ),
    ] = None,
    work: Annotated[Path | None, Option("--work", help="Of the plan: the job's folder.", metavar="DIR")] = None,
    png: Annotated[
        Path | None, Option("--png", help="Of the plan: draw it into this file too.", metavar="FILE")
    ] = None,
    verify: Annotated[
        bool, Option("--verify", help="Of a packed folder: check every checksum, code and digest.")
    ] = False,
    against: Annotated[
        Path | None, Option("--against", help="Another packed folder: tell what differs.", metavar="PACKED")
    ] = None,
    json: Json = False,
) -> None:
    """Inspect a job, its plan or a packed model; print the recipe's fields, the JSON schema of results or the format.

    Example: edgerazor show

    Example: edgerazor show plan --png plan.png

    Example: edgerazor show edgerazor-work/packed --verify

    Example: edgerazor show recipe > my.yaml
    """
    refuse_beside_plan(what, work, png)
    if what in ("plan", "recipe", "schema", "format") and (verify or against):
        raise usage_error(f"{'--verify' if verify else '--against'} is for packed models.", "Name one: its folder.")
    if what == "recipe":
        from edgerazor.recipe import explain

        print(explain())
        return
    from edgerazor.stages import show as show_stage

    console = open_console(json, False)
    if what == "schema":
        print(show_stage.schema())
        return
    if what == "format":
        for part in show_stage.show_format():
            console.out.print(part)
        return
    from edgerazor.workdir import DEFAULT, WorkDir

    found: Any = None
    if what == "plan":
        found = show_stage.draw_plan(WorkDir(work or DEFAULT), png)
    else:
        found = show_stage.inspect(Path(what) if what else work or DEFAULT, console, verify, against)
    console.result(found, *show_stage.show(found))


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(f"edgerazor {__version__}")
        raise typer.Exit


# --- from options to a recipe ------------------------------------------------------------------


def given(**values: Any) -> dict[str, Any]:
    """Only what the user gave."""
    return {name: value for name, value in values.items() if value is not None}


def general(
    model: str | None,
    revision: str | None,
    trust_remote_code: bool | None,
    seed: int | None,
    device: str | None,
    threads: int | None,
) -> dict[str, Any]:
    """The top-level fields of a recipe."""
    return given(
        model=model,
        revision=revision,
        trust_remote_code=trust_remote_code or None,
        seed=seed,
        device=device,
        threads=threads,
    )


def data_section(data: list[Path] | None, held_out: list[Path] | None, length: int | None) -> dict[str, Any]:
    return given(
        train=[{"file": str(file)} for file in data] if data else None,
        held_out=[{"file": str(file)} for file in held_out] if held_out else None,
        sequence_length=length,
    )


def listed(names: str | None) -> list[str] | None:
    """`a, b` as a list."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def number_or_word(value: str | None) -> int | str | None:
    """`64` as a number, `row` as it is."""
    return int(value) if value is not None and value.removeprefix("-").isdecimal() else value


def budget_section(bits: float | None, real_bits: float | None, target_size: str | None) -> dict[str, Any]:
    return given(bits=bits, real_bits=real_bits, target_size=target_size)


def plan_section(
    formats: str | None,
    group_size: str | None,
    plan: str | None,
    granularity: str | None,
    sensitivity: str | None,
    kv_bits: int | None,
    activation_bits: int | None,
    sequences: int | None,
) -> dict[str, Any]:
    return given(
        formats=listed(formats),
        group_size=number_or_word(group_size),
        plan=plan,
        granularity=granularity,
        sensitivity=sensitivity,
        kv_bits=kv_bits,
        activation_bits=activation_bits,
        sequences=sequences,
    )


def compare_section(pairs: list[str]) -> dict[str, str]:
    """`NAME=FOLDER` pairs."""
    result = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise usage_error(f"--compare wants NAME=FOLDER, and got {pair!r}.")
        result[name] = folder
    return result


def integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise usage_error(f"{option} wants comma-separated whole numbers, and got {text!r}.") from None


def assemble(values: dict[str, Any], work: Path | None, recipe_file: Path | None) -> Recipe:
    """The recipe that a command asks for (see `recipe.py` for what wins over what)."""
    from edgerazor import recipe as recipes
    from edgerazor.workdir import WorkDir

    stored: dict[str, Any] = {}
    if recipe_file is None and work is not None and WorkDir(work).recipe_file.exists():
        recipe_file = WorkDir(work).recipe_file
    if recipe_file is not None:
        recipe_file = recipes.find(recipe_file)
        stored = recipes.load(recipe_file)
        named = recipes.runs(recipes.build(stored, f"The recipe {recipe_file}"))
        if named:  # whoever wrote it may be a stranger
            open_console(False, False).warn(f"The recipe {recipe_file} runs {', and '.join(named)}.")
    return recipes.build(recipes.merge(stored, recipes.anchor(values, Path.cwd())))


def require_model(asked: Recipe, name: str, work: Path, recipe_file: Path | None) -> None:
    """Refuse a job without a model."""
    if asked.model:
        return
    if recipe_file is not None:
        named = (
            f", or name it: `edgerazor {name} MODEL --recipe {recipe_file}`" if name in ("calibrate", "distill") else ""
        )
        raise usage_error(
            f"The recipe {recipe_file} names no model.", f"Add the line `model: FOLDER-OR-HUB-ID` to it{named}."
        )
    raise usage_error(
        f"{work} is not a working directory of edgerazor yet, and no model was named.",
        f"Begin with `edgerazor {name if name in ('calibrate', 'distill') else 'distill'} MODEL --bits 2`.",
    )


def open_console(as_json: bool, quiet: bool) -> Console:
    from edgerazor.console import Console

    return Console(as_json, quiet)


def stage(
    name: str,
    values: dict[str, Any],
    work: Path,
    recipe_file: Path | None,
    as_json: bool,
    quiet: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """Run one stage and print its result."""
    asked = assemble(values, work, recipe_file)
    require_model(asked, name, work, recipe_file)
    console = open_console(as_json, quiet)
    from edgerazor import pipeline
    from edgerazor.console import describe
    from edgerazor.workdir import WorkDir

    job = WorkDir(work)
    if dry_run:
        plan = pipeline.dry_run(name, asked, job, console, force)
        console.result(plan, *describe(plan))
        return
    result = pipeline.run(name, asked, job, console, force)
    if result is not None and console.is_main:
        console.result(result, *pipeline.STAGES[name].show(result))
        check_gates(result)


def measure_alone(
    model: str, values: dict[str, Any], recipe: Path | None, json: bool, quiet: bool, dry_run: bool
) -> None:
    """`eval MODEL`: no working directory."""
    from edgerazor.stages import eval as stage_module

    if dry_run:
        raise usage_error("`eval MODEL` has no dry run; leave out the model for that of the working directory.")
    console = open_console(json, quiet)
    result = stage_module.evaluate_model(model, assemble(values, None, recipe), console)
    console.result(result, *stage_module.show(result))
    check_gates(result)


def is_rounded(work: Path) -> bool:
    """Whether a job's packed model was made without training, so that it can be made again without a student."""
    from edgerazor.stages import pack as stage_module
    from edgerazor.workdir import WorkDir

    return stage_module.stands_alone(WorkDir(work))


def refuse_settings_of_student(section: dict[str, Any], model: str | None, recipe: Path | None) -> None:
    """Options of `pack` that say how to round, where what is packed was trained."""
    if section and model is None and recipe is None:
        name = next(iter(section)).replace("_", "-")
        raise usage_error(
            f"The student's formats were decided before it was trained, so pack takes no --{name}.",
            "To round without training, name the model: `edgerazor pack MODEL --bits 4`.",
        )


def is_packed_folder(model: str) -> bool:
    """Whether a model that was named is a packed folder."""
    from edgerazor.workdir import find_folder

    if not find_folder(Path(model)).is_dir():
        return False
    from edgerazor.transformers_plugin import is_packed

    return is_packed(Path(model))


def export_packed(
    folder: str,
    options: dict[str, Any],
    names: list[str] | None,
    allow_lossy: bool,
    json: bool,
    quiet: bool,
    dry_run: bool,
) -> None:
    """`pack FOLDER --export NAME` of a packed folder: nothing is packed again."""
    if options:
        name = next(iter(options)).replace("_", "-")
        raise usage_error(f"{folder} is packed already, so --{name} cannot change it.", "Leave the option out.")
    if not names:
        raise usage_error(
            f"{folder} is packed already.",
            f"Export it: `edgerazor pack {folder} --export gguf`. Compress it: `edgerazor pack {folder} --compress`.",
        )
    from edgerazor.stages import pack as stage_module

    console = open_console(json, quiet)
    if dry_run:
        sizes = stage_module.export_dry_run(Path(folder), names, allow_lossy, console)
        console.result(sizes, *(f"{name}: {bits:.2f} real bits" for name, bits in sizes.real_bits.items()))
        return
    result = stage_module.export_folder(Path(folder), names, allow_lossy, console)
    console.result(result, *stage_module.export_lines(result.exports))


def recompress_packed(folder: str, options: dict[str, Any], compress: bool, json: bool, quiet: bool) -> None:
    """`pack FOLDER --compress` or `--no-compress`: its files are written again, its weights stay."""
    if options:
        name = next(iter(options)).replace("_", "-")
        asked = f"--{'' if compress else 'no-'}compress"
        raise usage_error(f"{folder} is packed already, and {asked} goes with no --{name}.", "Leave one of them out.")
    from edgerazor.stages import pack as stage_module

    console = open_console(json, quiet)
    result = stage_module.recompress(Path(folder), compress, console)
    console.result(result, *stage_module.compress_lines(result))


#: Options of pack that do not decide about weights.
COMPUTING = {"activation_bits", "kv_bits"}


def is_foreign(model: str, rounding: bool) -> bool:
    """Whether a model that was named is somebody else's quantized one, and not to be rounded."""
    if not Path(model).exists():
        return False
    from edgerazor.importers import importer_of

    importer = importer_of(Path(model))
    return importer is not None and (importer.only or not rounding)


def import_foreign(
    path: Path,
    options: dict[str, Any],
    names: list[str] | None,
    allow_lossy: bool,
    work: Path,
    json: bool,
    quiet: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """`pack FILE.gguf`, or a folder that others quantized: their codes become ours."""
    computing = {name: value for name, value in options.items() if name in COMPUTING}
    others = [name.replace("_", "-") for name in options if name not in computing]
    if others or dry_run:
        raise usage_error(
            f"{path} is quantized already, and its codes are taken as they are, so pack takes no "
            f"--{(others or ['dry-run'])[0]} with it.",
            "Leave it out, or name the original model.",
        )
    asked = assemble({"calibrate": computing, "pack": given(export=names, allow_lossy=allow_lossy)}, None, None)
    from edgerazor.stages import pack as stage_module
    from edgerazor.workdir import WorkDir

    console = open_console(json, quiet)
    result = stage_module.read_foreign(path, asked, WorkDir(work), console, force)
    console.result(result, *stage_module.foreign_tables(result))


def refuse_closed_stdout() -> None:
    """Nobody would see what a model writes."""
    if sys.stdout is None:
        raise usage_error("Standard output is closed, and the text would go there.", "Leave out `>&-`.")


def refuse_beside_plan(what: str | None, work: Path | None, png: Path | None) -> None:
    """Options of `show plan` with other words."""
    if png is not None and what != "plan":
        raise usage_error("--png draws a plan.", f"Say so: `edgerazor show plan --png {png}`.")
    if work is not None and what not in (None, "plan"):
        raise usage_error(f"show takes a folder or --work, and got {what} and {work}.", f"Use `edgerazor show {work}`.")


def check_gates(result: Any) -> None:
    """Exit with 3 when a quality gate is not met."""
    failures = getattr(result, "failures", None)
    if failures:
        raise UserError(" ".join(failures), code=QUALITY)


#: typer carries its own click in newer versions; its errors are those of the class that BadParameter descends from.
ClickException: Any = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")


# --- the way out -------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; every failure that people can act on is one sentence and an exit code."""
    try:
        run_command()
    except KeyboardInterrupt:  # a second one, while what had happened was being told
        terminal.end_interrupted()
    except MemoryError:  # not even for a sentence
        terminal.end_without_memory()


def run_command() -> None:
    """One command; ends with SystemExit, or with a bug's exception."""
    try:
        refuse_removed_folder()
        code = typer.main.get_command(app).main(prog_name="edgerazor", standalone_mode=False)
        if code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        fail(error)
    except ClickException as error:
        show_usage(error)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        terminal.leave()
        fail(UserError("Interrupted; finished stages and the last checkpoint are kept.", code=INTERRUPTED))
    except BrokenPipeError:  # whoever read our output has gone, as in `edgerazor show recipe | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except MemoryError:
        fail(UserError("There is not enough memory.", "Try a smaller --batch-size or --sequence-length."))
    except SystemExit:
        raise
    except BaseException as error:  # panics of libraries in Rust are no Exceptions
        known = explain_failure(error)
        if known is None:
            raise
        fail(known)


def refuse_removed_folder() -> None:
    """Where there is no current folder, importing torch ends the process without a word of ours."""
    try:
        os.getcwd()
    except OSError:
        raise usage_error("The current folder has been removed.", "Change into one that is there: `cd`.") from None


def show_usage(error: Any) -> None:
    """What click says of a command line, which quotes it."""
    said = io.StringIO()
    error.show(file=said)
    open_console(False, False).tell(said.getvalue())


def fail(error: UserError) -> None:
    """Print the sentence and exit with its code."""
    from edgerazor.console import is_main_process

    try:
        is_main = is_main_process()
    except UserError as wrong:
        error, is_main = wrong, True
        os.environ["RANK"] = "0"
    if not is_main:
        # The main process most likely says the same; the launcher then ends this one while it waits.
        time.sleep(5)
    open_console(False, False).error(error)
    sys.exit(error.code)


#: What is the machine's fault rather than the program's, when it comes with a file name.
MACHINE: tuple[int, ...] = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
    *(errno.ELOOP, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EBUSY, errno.ETXTBSY),
)
#: In errors of libraries that found no room for themselves.
NO_ROOM = ("DefaultCPUAllocator", "Cannot allocate memory", "failed to map segment", "bad allocation", "std::bad_alloc")


def explain_failure(error: BaseException) -> UserError | None:
    """A sentence for failures of the machine rather than the program: a full disk, no rights, no memory."""
    text = str(error)
    number = getattr(error, "errno", None)
    if terminal.interrupted and isinstance(error, ImportError | SystemError):  # in the C code of what was imported
        return UserError("Interrupted.", code=INTERRUPTED)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return UserError(
            "The disk is full; nothing finished was lost.", "Free some space and run the same command again."
        )
    if number == errno.EFBIG:
        return UserError(
            "A file would be larger than the file system, or `ulimit -f`, allows; nothing finished was lost.",
            "Use another disk (--work), or for pack a smaller `pack.shard_bytes`.",
        )
    if isinstance(error, OSError):
        return explain_file(error)
    if type(error).__name__ == "OutOfMemoryError" or any(each in text for each in NO_ROOM):
        return UserError(
            "There is not enough memory.", "Try a smaller --batch-size with more --accumulation, or --sequence-length."
        )
    return explain_tokenizer(error)


def explain_file(error: OSError) -> UserError | None:
    """The same for a file or folder; what is merely not there, where it was expected, is a bug."""
    if error.errno == errno.ENOMEM:
        return UserError("There is not enough memory.", "Close other programs, or raise the limit (`ulimit -v`).")
    if error.filename is None:
        known = error.errno in (errno.EIO, errno.ESTALE)
        return UserError(f"The disk failed: {error.strerror}.", "Try another one with --work.") if known else None
    if error.errno in MACHINE:
        return UserError(f"{error.filename}: {error.strerror}.", "Check the path and your rights to it.")
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and cannot_hold(Path(os.fsdecode(error.filename)).parent):
        return UserError(f"{error.filename} cannot be made: {error.strerror}.", "Name a folder that can hold it.")
    return None


def cannot_hold(folder: Path) -> bool:
    """Whether nothing can be made in a folder: it is none, or of a file system without room (/proc)."""
    try:
        return not folder.is_dir() or os.statvfs(folder).f_blocks == 0
    except OSError:
        return True


def explain_tokenizer(error: BaseException) -> UserError | None:
    """The same for what no border has caught of a library in Rust: a panic, or a tokenizer that cannot read a text."""
    panicked = type(error).__name__ == "PanicException"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    inside = last and Path(last[0].filename).name.startswith(("tokenization_", "chat.py"))
    if panicked or (type(error) is Exception and inside):
        return UserError(
            f"A library gave up on the model's files or the text: {plain(error, 200).rstrip('.')}.",
            "Most likely the model's tokenizer.json is damaged; copy or download it again.",
        )
    return None


if __name__ == "__main__":
    main()
