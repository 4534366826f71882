"""A packed model writes: what follows a prompt, an answer, or one side of a chat.

The text goes to stdout as it comes, and nothing else does, so that the command works between two pipes; what it took
goes to stderr. It ends with a line end, as texts do.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from edgerazor import runtime, transformers_plugin
from edgerazor.console import Console
from edgerazor.errors import INTERRUPTED, UserError, usage_error
from edgerazor.recipe import Recipe
from edgerazor.report.generate_result import GenerateResult, result_fields, timings
from edgerazor.runtime import Model, Stream
from edgerazor.workdir import WorkDir, find_folder

#: What a terminal would take as a command, if a model wrote it; a carriage return before a line end is left out.
CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "?") | {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def run(
    folder: Path, prompt: str, recipe: Recipe, console: Console, mmap: bool = False, images: Sequence[Path] = ()
) -> GenerateResult:
    """Write what follows a prompt; on the way to stdout, unless the result is to be JSON.

    Args:
        folder: packed.
        prompt: a text, or where the recipe asks for a chat the user's turn.
        recipe: how, with how many threads, and the seed.
        console: where timings go.
        mmap: read weights in place.
        images: that the prompt is about.

    Raises:
        UserError: as `runtime.load` and `Model.generate`; or it was interrupted, with what was written shown.
    """
    try:
        began = time.perf_counter()
        model = load(folder, recipe, console, mmap)
        seconds = time.perf_counter() - began
        stream = model.stream(prompt, recipe.seed, images, **recipe.generate.model_dump())
        finished = follow(stream, silent=console.as_json)
        result = GenerateResult(
            model=str(folder),
            engine=model.engine,
            kernel=model.kernel,
            threads=model.threads,
            note=model.note,
            seed=recipe.seed,
            prompt=prompt,
            load_seconds=round(seconds, 6),
            **result_fields(stream.generation),
        )
        console.say(timings(stream.generation, model))
        if finished:
            return result
        console.result(result)
    except KeyboardInterrupt:
        pass
    raise UserError("Interrupted.", code=INTERRUPTED)


def converse(folder: Path, recipe: Recipe, console: Console, mmap: bool = False, images: Sequence[Path] = ()) -> None:
    """A chat in the terminal, until the end of its input; the first question is about the images.

    Raises:
        UserError: as `run`; or it was interrupted between two answers.
    """
    try:
        model = load(folder, recipe, console, mmap)
        chat = model.chat(recipe.seed, **recipe.generate.model_dump(exclude={"chat"}))
        console.say("Ctrl-C breaks off an answer, Ctrl-D ends the chat.")
        while (question := ask()) is not None:
            if question.strip():
                stream = chat.ask(question, images)
                images = ()
                follow(stream)
                console.say(timings(stream.generation, model))
    except KeyboardInterrupt:
        raise UserError("Interrupted.", code=INTERRUPTED) from None


def load(folder: Path, recipe: Recipe, console: Console, mmap: bool) -> Model:
    """The model; says so where it is slower than it could be."""
    model = runtime.load(folder, threads=recipe.threads, mmap=mmap)
    if model.note:
        console.say(model.note)
    return model


def follow(stream: Stream, silent: bool = False) -> bool:
    """Show a text as it comes; false where Ctrl-C broke it off."""
    finished = True
    try:
        for piece in stream:
            if not silent:
                write(piece)
    except KeyboardInterrupt:
        finished = False
    if not silent and not stream.generation.text.endswith("\n"):
        write("\n")
    return finished


def write(text: str) -> None:
    """A piece of text to stdout, at once; a terminal gets no command out of it."""
    if sys.stdout.isatty():
        text = text.translate(CONTROL)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


# --- what goes in ------------------------------------------------------------------------------


def packed_folder(named: Path | None, work: WorkDir) -> Path:
    """The packed model that is meant: the one that is named, or that of a working directory.

    Raises:
        UserError: there is none.
    """
    folder = named or work.folder("pack")
    find_folder(folder)
    if named is None and not folder.exists():
        raise usage_error(
            f"{work.path} holds no packed model.",
            "Make one with `edgerazor pack`."
            if work.recipe_file.exists()
            else "Name one with --model FOLDER, or make one: `edgerazor pack MODEL --bits 4`.",
        )
    if not folder.is_dir():
        raise usage_error(f"There is no folder {folder}.", "Give --model the folder that `edgerazor pack` wrote.")
    if not transformers_plugin.is_packed(folder):
        inside = WorkDir(folder).folder("pack")
        raise usage_error(
            f"{folder} is not a packed model.",
            f"Name the one in it: --work {folder}."
            if inside.is_dir()
            else f"Make one of it: `edgerazor pack {folder} --bits 4`, and then leave out --model.",
        )
    return folder


def read_prompt(word: str | None) -> str | None:
    """The prompt: the word of the command line, or for `-`, or where there is none, what a pipe gives.

    The line end behind it is not part of it. None where there is no word, and nobody but a terminal to ask.

    Raises:
        UserError: what the pipe gives is empty, or no text.
    """
    if word not in (None, "-"):
        return word
    if sys.stdin is None or (word is None and sys.stdin.isatty()):
        return None
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise usage_error("What comes in by standard input is not UTF-8 text.") from None
    except KeyboardInterrupt:
        raise UserError("Interrupted.", code=INTERRUPTED) from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise usage_error("There is no prompt: standard input is empty.", 'Give one: `edgerazor generate "Once upon"`.')
    return text


def ask() -> str | None:
    """What the user says in a chat; None at the end of the input."""
    if sys.stdin is None:
        return None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return next_line(sys.stdin.readline())
    write("> ")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:  # a Ctrl-C just before the waiting begins ends it, too
        select.select([sys.stdin, reader], [], [])
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
    return next_line(sys.stdin.readline())


def next_line(line: str) -> str | None:
    """A line without its end; at the end of the input, None and a new line on the terminal."""
    if not line:
        write("\n")
        return None
    return line.removesuffix("\n")
