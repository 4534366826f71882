"""The option table: every argument and option of the command line, once.

A row says how an option is written, which field of the recipe it sets, what Typer parses it as, what `--help` says of
it and which commands have it. Everything else follows from the rows: the signatures of the commands (`signature`), how
parsed values become a recipe (`split`), the options that `edgerazor show recipe` and `show schema` name, the page
`OPTIONS.md` (`make options`) and the tests' list.

The order of the rows is the order in `--help`. Neither torch nor pydantic is imported here, so that `--help` comes at
once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgerazor.errors import usage_error

if TYPE_CHECKING:
    from edgerazor.console import Console

#: Default of an argument or option that has to be given.
REQUIRED: Any = inspect.Parameter.empty
#: The job's folder; `edgerazor.workdir.DEFAULT`.
DEFAULT_WORK = Path("edgerazor-work")
#: Where a recording goes.
DEFAULT_RECORDING = Path("edgerazor-recording")


@dataclass(frozen=True)
class RunOptions:
    """The options that say how to run a command rather than what to make."""

    work: Path | None = None
    recipe: Path | None = None
    json: bool = False
    quiet: bool = False
    force: bool = False
    dry_run: bool = False
    world_size: int | None = None
    gpu_memory: str | None = None

    def open_console(self) -> Console:
        """Where the command writes."""
        from edgerazor.console import Console

        return Console(self.json, self.quiet)


# What becomes of the words behind an option. A ValueError says what the option wants instead. -----------------------


def split_names(text: str) -> list[str]:
    """The names in `int2, int4`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_integers(text: str | list[str]) -> list[int]:
    """The numbers of `1,2`, or of several such texts."""
    text = text if isinstance(text, str) else ",".join(text)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"comma-separated whole numbers, and got {text!r}") from None


def parse_group_size(text: str) -> int | str:
    """`64` as a number; `row`, and what the recipe will refuse, as text."""
    return int(text) if text.removeprefix("-").isdecimal() else text


def parse_folders(pairs: list[str]) -> dict[str, str]:
    """Name -> folder of `NAME=FOLDER` pairs."""
    folders = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"NAME=FOLDER, and got {pair!r}")
        folders[name] = folder
    return folders


def file_sources(files: list[Path]) -> list[dict[str, str]]:
    """Text files as sources of `data`."""
    return [{"file": str(file)} for file in files]


def file_names(files: list[Path]) -> list[str]:
    """Files and folders by their names."""
    return [str(file) for file in files]


# The table ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A row of the table.

    Args:
        flag: as it is written: `--bits`, `--compress/--no-compress`, `--quiet -q`; without dashes an argument.
        field: of the recipe (`calibrate.bits`); empty for what says how to run, and for what only one command knows.
        type: what Typer parses the words as; a list for an option that may be repeated.
        commands: that have it, separated by spaces.
        help: the text in `--help`.
        metavar: what stands for the value in `--help`, unless the type does.
        default: None where the recipe decides, or `REQUIRED`.
        minimum: least number, where no field of the recipe says it.
        parse: makes the field's value of what Typer gives.
    """

    flag: str
    field: str
    type: Any
    commands: str
    help: str
    metavar: str | None = None
    default: Any = None
    minimum: int | None = None
    parse: Callable[[Any], Any] | None = None

    @property
    def is_argument(self) -> bool:
        return not self.flag.startswith("-")

    @property
    def long(self) -> str:
        """The long flag alone: `--compress`."""
        return self.flag.split()[0].split("/")[0]

    @property
    def name(self) -> str:
        """The name of the parameter: `target_size` of `--target-size`."""
        return self.long.lstrip("-").replace("-", "_")

    def parameter(self) -> inspect.Parameter:
        """The parameter of a command's function, as Typer reads it."""
        if self.is_argument:
            declaration = typer.Argument(help=self.help, metavar=self.metavar)
        else:
            declaration = typer.Option(*self.flag.split(), help=self.help, metavar=self.metavar, min=self.minimum)
        annotated: Any = Annotated  # subscripted with values, which a type checker takes for types
        annotation = annotated[self.type | None if self.default is None else self.type, declaration]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=annotation)

    def value(self, parsed: Any) -> Any:
        """The value for the recipe of what Typer parsed.

        Raises:
            UserError: the words are malformed.
        """
        try:
            return self.parse(parsed) if self.parse else parsed
        except ValueError as error:
            raise usage_error(f"{self.long} wants {error}.") from None


MODEL = "A local model folder, a GGUF file or a Hugging Face hub id."
PLANNING = "calibrate distill pack"

# fmt: off
OPTIONS = (
    # Arguments
    Option("model", "model", str, "calibrate record distill",
           f"{MODEL} Default: that of the working directory."),
    Option("model", "model", str, "pack",
           f"{MODEL} Given: round it to nearest, without training; a GGUF file without --bits is taken as it is."),
    Option("model", "", str, "eval",
           "Measure this model or packed folder alone, without a working directory."),
    Option("model", "model", str, "data",
           f"{MODEL} It writes.", default=REQUIRED),
    Option("prompt", "", str, "generate",
           "What to go on from; `-`, or nothing behind a pipe: standard input."),
    Option("folder", "", Path, "serve",
           "A packed folder; default: that of the working directory."),
    Option("recipe", "", Path, "run",
           "A YAML recipe, or the name of a shipped one.", default=REQUIRED),
    Option("jobs", "", list[Path], "report",
           "Working directories, side by side; default: that of --work.", metavar="JOB"),
    Option("folder", "", Path, "push",
           "A packed folder.", metavar="FOLDER", default=REQUIRED),
    Option("repo", "", str, "push",
           "A repository of the Hugging Face hub: NAME/MODEL.", metavar="REPO", default=REQUIRED),
    Option("what", "", str, "show",
           "A working directory, a packed folder, `plan`, `recipe`, `schema` or `format`."),
    # How large the packed model may be
    Option("--bits", "calibrate.bits", float, f"{PLANNING} run",
           "Nominal average of the decoder's linear layers, 1.58 to 8."),
    Option("--real-bits", "calibrate.real_bits", float, f"{PLANNING} run",
           "Instead of --bits: every byte of the weight files, per weight."),
    Option("--target-size", "calibrate.target_size", str, f"{PLANNING} run",
           "Instead of --bits: most bytes of the weight files.", metavar="200MB"),
    # What is learned from and measured on
    Option("--data", "data.train", list[Path], "calibrate record distill",
           "Text to learn from (.txt, .jsonl, .gz); repeatable.", metavar="FILE", parse=file_sources),
    Option("--held-out", "data.held_out", list[Path], "calibrate record distill",
           "Text to measure on; repeatable.", metavar="FILE", parse=file_sources),
    Option("--sequence-length", "data.sequence_length", int, "calibrate record distill",
           "Tokens per sequence."),
    Option("--sequences", "calibrate.sequences", int, "calibrate",
           "Calibration sequences."),
    # Recording
    Option("--out", "", Path, "record",
           "The folder to record into.", metavar="DIR", default=DEFAULT_RECORDING),
    Option("--method", "record.method", str, "record",
           "Tokens of each distribution: an unbiased sample, or top_k."),
    Option("--draws", "record.draws", int, "record",
           "How many tokens of each distribution are kept."),
    Option("--hidden-layers", "record.hidden_layers", str, "record",
           "Comma-separated layers whose hidden states are kept, for lafd.", parse=parse_integers),
    Option("--tokens", "record.tokens", str, "record",
           "Only so many tokens of the text (300k, 20M), for one seed.", metavar="300k"),
    Option("--batch-size", "record.batch_size", int, "record",
           "Sequences per forward pass."),
    # Training
    Option("--recording", "distill.recording", Path, "distill",
           "A folder of `edgerazor record`, in the place of the teacher.", metavar="DIR", parse=str),
    Option("--teacher", "distill.teacher", str, "distill",
           "Another model to learn from, of the same tokenizer.", metavar="MODEL"),
    Option("--teacher-source", "distill.teacher_source", str, "distill",
           "Where the teacher computes.", metavar="resident|streamed|URL"),
    Option("--steps", "distill.steps", int, "distill run",
           "Optimizer steps."),
    Option("--tokens", "distill.tokens", str, "distill",
           "Training tokens: 300k, 20M; what is not set is chosen to fit.", metavar="300k"),
    Option("--max-time", "distill.max_time", str, "distill",
           "Time of training, resumes included: 90s, 30m, 1h30m; likewise.", metavar="1h30m"),
    Option("--batch-size", "distill.batch_size", int, "distill",
           "Sequences per forward pass and process."),
    Option("--accumulation", "distill.accumulation", int, "distill",
           "Forward passes per optimizer step."),
    Option("--memory", "distill.memory", str, "distill",
           "Most memory of the training, or what is free; slower where it is little.", metavar="16GB|auto"),
    Option("--optimizer", "distill.optimizer", str, "distill",
           "adafactor takes next to no memory.", metavar="adamw|adafactor"),
    Option("--learning-rate", "distill.learning_rate", float, "distill",
           "Peak learning rate."),
    Option("--checkpoint-every", "distill.checkpoint_every", int, "distill",
           "Steps between checkpoints."),
    Option("--track", "distill.track", str, "distill",
           "Also show every step in TensorBoard or Weights & Biases.", metavar="tensorboard|wandb"),
    Option("--train", "distill.train", str, "distill",
           "all, or scales: rounded codes stay and only their scales are trained."),
    Option("--reconstruct", "distill.reconstruct.steps", int, "distill",
           "Train layer by layer first, each for so many steps."),
    # Packing
    Option("--student", "pack.student", str, "pack",
           "best or last."),
    Option("--compress/--no-compress", "pack.compress", bool, "pack",
           "Smaller, for shipping; of a packed folder: make it so, or undo it."),
    Option("--export", "pack.export", str, "pack",
           "Comma-separated formats to write, too: gguf, gguf-f16 ...", parse=split_names),
    Option("--allow-lossy", "pack.allow_lossy", bool, "pack",
           "Export also what changes weights."),
    # Which format where
    Option("--formats", "calibrate.formats", str, PLANNING,
           "To choose from: ternary,int2,int3,int4.", parse=split_names),
    Option("--group-size", "calibrate.group_size", str, PLANNING,
           "Weights of a row that share one scale; `row`: all.", metavar="N|row", parse=parse_group_size),
    Option("--plan", "calibrate.plan", str, PLANNING,
           "What gets wider formats: sensitivity, interleave, variance or first (units)."),
    Option("--granularity", "calibrate.granularity", str, PLANNING,
           "Unit that has a format: row, tensor, column or block."),
    Option("--sensitivity", "calibrate.sensitivity", str, PLANNING,
           "Estimate of damage: auto, fisher, integrated, hessian or direct."),
    Option("--kv-bits", "calibrate.kv_bits", int, PLANNING,
           "Keys and values: 4, 8 or 16."),
    Option("--activation-bits", "calibrate.activation_bits", int, PLANNING,
           "Inputs of linear layers: 4 to 8, or 16."),
    Option("--rotation", "calibrate.rotation", str, PLANNING,
           "Of weights and inputs before rounding.", metavar="none|hadamard"),
    Option("--init", "calibrate.init", str, PLANNING,
           "Scales and codes to begin with: least_error, rtn, clip or gptq."),
    # Measuring scores
    Option("--tasks", "eval.tasks", str, "eval",
           "Comma-separated: arc, hellaswag, world, any of lm-eval.", parse=split_names),
    Option("--task-data", "eval.task_data", Path, "eval",
           "Folder of TASK.jsonl files, for offline work.", metavar="DIR", parse=str),
    Option("--pictures", "eval.pictures", list[Path], "eval",
           "Questions about pictures: a .jsonl file, or a folder; repeatable.", metavar="PATH", parse=file_names),
    Option("--blind/--no-blind", "eval.blind", bool, "eval",
           "Ask these also without the features of pictures."),
    Option("--limit", "eval.limit", int, "eval",
           "Items per task."),
    Option("--num-fewshot", "eval.num_fewshot", int, "eval",
           "Examples before each item."),
    Option("--apply-chat-template", "eval.apply_chat_template", bool, "eval",
           "Prompts as chat."),
    Option("--data", "data.held_out", list[Path], "eval",
           "Held-out text to measure on; repeatable.", metavar="FILE", parse=file_sources),
    Option("--batch-size", "eval.batch_size", int, "eval",
           "Sequences per forward pass."),
    Option("--against", "eval.against", str, "eval",
           "The teacher that MODEL is compared with.", metavar="TEACHER"),
    Option("--activation-bits", "eval.activation_bits", int, "eval",
           "Inputs of linear layers: 4 to 8, or 16."),
    Option("--kv-bits", "eval.kv_bits", int, "eval",
           "Keys and values: 4, 8 or 16."),
    Option("--group-size", "calibrate.group_size", str, "eval",
           "Weights of a row that share one scale; `row`: all.", metavar="N|row", parse=parse_group_size),
    Option("--min-retention", "eval.min_retention", float, "eval",
           "Exit 3 when the average retention above chance is lower."),
    # Measuring speed
    Option("--prefill-tokens", "bench.prefill_tokens", int, "bench",
           "Prompt length."),
    Option("--decode-tokens", "bench.decode_tokens", int, "bench",
           "Tokens generated."),
    Option("--contexts", "bench.contexts", str, "bench",
           "Comma-separated tokens in the cache.", parse=parse_integers),
    Option("--rounds", "bench.rounds", int, "bench",
           "Interleaved repetitions."),
    Option("--mmap", "bench.mmap", bool, "bench",
           "Measure also with weights read in place."),
    Option("--llama-bench", "bench.llama_bench", str, "bench",
           "llama.cpp's, or none; default: where it is found on the PATH.", metavar="PATH"),
    Option("--ik-llama-bench", "bench.ik_llama_bench", str, "bench",
           "llama-bench of ik_llama.cpp.", metavar="PATH"),
    Option("--compare", "compare", list[str], "eval bench",
           "Another packed model to measure; repeatable.", metavar="NAME=FOLDER", parse=parse_folders),
    # Writing text
    Option("--model", "", Path, "generate",
           "A packed folder; default: that of the working directory.", metavar="FOLDER"),
    Option("--image", "", list[Path], "generate",
           "A picture that the prompt is about; repeatable, and then a chat.", metavar="FILE"),
    Option("--max-tokens", "generate.max_tokens", int, "generate",
           "Most tokens of the text."),
    Option("--temperature", "generate.temperature", float, "generate",
           "Of drawing; 0 takes the likeliest token."),
    Option("--top-k", "generate.top_k", int, "generate",
           "Draw from so many tokens; 0 for all."),
    Option("--top-p", "generate.top_p", float, "generate",
           "Draw from tokens that have this probability."),
    Option("--min-p", "generate.min_p", float, "generate",
           "Draw from tokens of this share of the highest probability."),
    Option("--repetition-penalty", "generate.repetition_penalty", float, "generate",
           "Above 1: tokens that occurred are less likely."),
    Option("--presence-penalty", "generate.presence_penalty", float, "generate",
           "Above 0: tokens of the text so far are less likely."),
    Option("--frequency-penalty", "generate.frequency_penalty", float, "generate",
           "Likewise, for each time that they occurred."),
    Option("--stop", "generate.stop", list[str], "generate",
           "End before this text; repeatable.", metavar="TEXT"),
    Option("--chat/--no-chat", "generate.chat", bool, "generate",
           "The prompt is a user's turn; without one: talk in the terminal."),
    Option("--system", "generate.system", str, "generate",
           "Of a chat: the system's message.", metavar="TEXT"),
    Option("--mmap", "", bool, "generate serve",
           "Read weights in place: less memory, slower.", default=False),
    # Serving
    Option("--model", "", Path, "serve",
           "The packed folder, as `generate` has it.", metavar="FOLDER"),
    Option("--host", "serve.host", str, "serve",
           "Address to listen on; another than loopback needs a key."),
    Option("--port", "serve.port", int, "serve",
           "0: any free one, which is printed."),
    Option("--api-key", "", str, "serve",
           "Clients have to give it; better in the environment: EDGERAZOR_API_KEY.", metavar="KEY"),
    Option("--name", "serve.name", str, "serve",
           "Of the model in the interface."),
    Option("--context", "serve.context", int, "serve",
           "Most tokens of a prompt and its answer."),
    Option("--max-sequences", "serve.max_sequences", int, "serve",
           "Texts written at a time."),
    Option("--max-queue", "serve.max_queue", int, "serve",
           "Texts waiting; more are refused with status 429."),
    Option("--prefill-tokens", "serve.prefill_tokens", int, "serve",
           "Tokens of prompts read between two steps of decoding."),
    Option("--kv-tokens", "serve.kv_tokens", int, "serve",
           "Tokens that the KV cache holds, of all texts together."),
    Option("--max-tokens-per-request", "serve.max_tokens_per_request", int, "serve",
           "Most tokens of an answer that a request may ask for."),
    Option("--max-body-bytes", "serve.max_body_bytes", int, "serve",
           "Of a request; larger ones are refused with status 413."),
    Option("--request-seconds", "serve.request_seconds", float, "serve",
           "After which a text ends as at its most tokens."),
    Option("--drain-seconds", "serve.drain_seconds", float, "serve",
           "That running requests have left after SIGTERM or Ctrl-C."),
    Option("--cors-origins", "serve.cors_origins", list[str], "serve",
           "A web page of another origin that may use the server; repeatable.", metavar="ORIGIN"),
    # Writing distilled data
    Option("--out", "", Path, "data",
           "The JSON lines file to write.", metavar="FILE", default=REQUIRED),
    Option("--prompts", "", Path, "data",
           "Conversations to answer anew, or texts to go on from.", metavar="FILE"),
    Option("--images", "", Path, "data",
           "Pictures to describe, or to ask the texts of --prompts about.", metavar="FOLDER"),
    Option("--tokens", "", int, "data",
           "Stop after so many; default: all prompts.", minimum=1),
    Option("--temperature", "sampling.temperature", float, "data",
           "0 takes the likeliest token."),
    Option("--top-p", "sampling.top_p", float, "data",
           "Draw from tokens that have this probability."),
    Option("--top-k", "sampling.top_k", int, "data",
           "Draw from so many tokens; 0 for all."),
    Option("--answer-tokens", "sampling.answer_tokens", int, "data",
           "Most tokens of an answer or a text."),
    Option("--prompt-tokens", "sampling.prompt_tokens", int, "data",
           "Tokens of a text to go on from."),
    Option("--batch-size", "sampling.batch_size", int, "data",
           "Prompts side by side."),
    Option("--thinking/--no-thinking", "sampling.thinking", bool, "data",
           "Think before an answer, if the template can say so."),
    # Telling of jobs
    Option("--out", "", Path, "report",
           "The file to write; default: report.html in the working directory.", metavar="FILE"),
    Option("--md", "", bool, "report",
           "Write Markdown instead of HTML.", default=False),
    Option("--samples/--no-samples", "", bool, "report",
           "Let teacher and student write side by side; kept for the next report.", default=True),
    # Publishing
    Option("--private", "", bool, "push",
           "Make it a private repository.", default=False),
    Option("--revision", "", str, "push",
           "The branch to push to, made if it is not there.", metavar="NAME"),
    # The model, and how to run
    Option("--revision", "revision", str, f"{PLANNING} record eval data",
           "Branch, tag or commit of a hub model."),
    Option("--trust-remote-code", "trust_remote_code", bool, f"{PLANNING} record eval data",
           "Run Python code that comes with the model."),
    Option("--recipe", "", Path, f"{PLANNING} record eval bench generate serve data",
           "A YAML recipe, or the name of a shipped one; see `edgerazor show recipe`.", metavar="FILE"),
    Option("--work", "", Path, f"{PLANNING} eval bench run",
           "The job's folder, where the stages meet.", metavar="DIR", default=DEFAULT_WORK),
    Option("--work", "", Path, "record",
           "A job's folder, whose recipe and text count.", metavar="DIR", default=DEFAULT_WORK),
    Option("--work", "", Path, "generate serve report",
           "The job's folder.", metavar="DIR"),
    Option("--work", "", Path, "show",
           "Of the plan: the job's folder.", metavar="DIR"),
    Option("--png", "", Path, "show",
           "Of the plan: draw it into this file too.", metavar="FILE"),
    Option("--verify", "", bool, "show",
           "Of a packed folder: check every checksum, code and digest.", default=False),
    Option("--against", "", Path, "show",
           "Another packed folder: tell what differs.", metavar="PACKED"),
    Option("--seed", "seed", int, "calibrate record distill generate data run",
           "Of data order, initialisation and generated text."),
    Option("--device", "device", str, "calibrate record distill eval data run",
           "auto, cpu, cuda or cuda:N."),
    Option("--threads", "threads", int, "calibrate record distill eval generate serve data run",
           "CPU threads; all cores by default."),
    Option("--threads", "bench.threads", list[str], "bench",
           "CPU threads, comma-separated or repeated; all cores by default.", metavar="N[,N...]", parse=parse_integers),
    Option("--json", "", bool, f"{PLANNING} record eval bench generate serve data run show report push",
           "Print the result as one JSON object on stdout.", default=False),
    Option("--quiet -q", "", bool, f"{PLANNING} record eval bench generate serve data run report push",
           "Nothing on stderr but errors.", default=False),
    Option("--force", "", bool, f"{PLANNING} record eval bench data run",
           "Do it again; throws away what is in the way.", default=False),
    Option("--dry-run", "", bool, f"{PLANNING} record eval bench push",
           "Say what would be done, how large and how long, and stop.", default=False),
    Option("--world-size", "", int, "distill",
           "With --dry-run: what each of so many processes would take.", metavar="N"),
    Option("--gpu-memory", "", str, "distill",
           "With --world-size: on GPUs with this memory, and not here.", metavar="80GB"),
)
# fmt: on


# What follows from it -----------------------------------------------------------------------------------------------


def options_of(command: str) -> list[Option]:
    """The rows of a command, in their order."""
    return [option for option in OPTIONS if command in option.commands.split()]


def signature(command: str) -> inspect.Signature:
    """The parameters of a command's function, as Typer reads them."""
    return inspect.Signature([option.parameter() for option in options_of(command)])


def split(command: str, parsed: dict[str, Any]) -> tuple[dict[str, Any], RunOptions, dict[str, Any]]:
    """What Typer parsed, in its three parts.

    Returns:
        the values of a recipe by section, only those that were given; how to run; by name, what this command alone has.

    Raises:
        UserError: the words behind an option are malformed.
    """
    values: dict[str, Any] = {}
    run: dict[str, Any] = {}
    own: dict[str, Any] = {}
    run_names = {field.name for field in fields(RunOptions)}
    for option in options_of(command):
        value = parsed[option.name]
        if not option.field:
            (run if option.name in run_names else own)[option.name] = value
        elif value is not None and value != []:
            *sections, name = option.field.split(".")
            section = values
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = option.value(value)
    return values, RunOptions(**run), own


def flags_by_command() -> dict[str, dict[str, str]]:
    """Command -> field of a recipe -> its option there."""
    commands = dict.fromkeys(name for option in OPTIONS for name in option.commands.split())
    return {
        name: {option.field: option.long for option in options_of(name) if option.field and not option.is_argument}
        for name in commands
    }


def flags_by_field() -> dict[str, str]:
    """Field of a recipe -> its option; the first of several."""
    flags: dict[str, str] = {}
    for option in OPTIONS:
        if option.field and not option.is_argument:
            flags.setdefault(option.field, option.long)
    return flags
