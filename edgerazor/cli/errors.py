"""What becomes of exceptions: one sentence for people and an exit code; a bug of ours keeps its traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

from edgerazor import terminal
from edgerazor.cli.options import RunOptions
from edgerazor.errors import FAILED, INTERRUPTED, UserError, plain, usage_error

#: typer carries its own click in newer versions; its errors are those of the class that BadParameter descends from.
ClickException: Any = next(parent for parent in typer.BadParameter.__mro__ if parent.__name__ == "ClickException")


def exit_with_code(command: Callable[[], Any]) -> None:
    """Run the command line and end the process: with SystemExit, or with a bug's exception.

    Args:
        command: parses and runs; returns the exit code, or what is none for 0.
    """
    try:
        run_command(command)
    except KeyboardInterrupt:  # a second one, while the sentence on the first was being written
        terminal.end_interrupted()
    except MemoryError:  # not even enough for a sentence
        terminal.end_without_memory()


def run_command(command: Callable[[], Any]) -> None:
    """Run a command; every failure that people can act on becomes a sentence and an exit code."""
    try:
        refuse_removed_folder()
        code = command()
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
        explanation = explain_failure(error)
        if explanation is None:
            raise
        fail(explanation)


def refuse_removed_folder() -> None:
    """Refuse to work where there is no current folder: importing torch would end the process without a sentence."""
    try:
        os.getcwd()
    except OSError:
        raise usage_error("The current folder has been removed.", "Change into one that is there: `cd`.") from None


def show_usage(error: Any) -> None:
    """Print what click says of a command line; it quotes that line, which may hold control characters."""
    text = io.StringIO()
    error.show(file=text)
    RunOptions().open_console().tell(text.getvalue())


def fail(error: UserError) -> NoReturn:
    """Print the sentence and exit with its code."""
    from edgerazor.console import is_main_process

    try:
        is_main = is_main_process()
    except UserError as malformed:
        error, is_main = malformed, True
        os.environ["RANK"] = "0"
    if not is_main:
        # The main process most likely says the same; the launcher then ends this one while it waits.
        time.sleep(5)
    RunOptions().open_console().error(error)
    sys.exit(error.code)


# Failures of the machine --------------------------------------------------------------------------------------------

#: What is the machine's fault rather than the program's, when it comes with a file name.
MACHINE: tuple[int, ...] = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
    *(errno.ELOOP, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EBUSY, errno.ETXTBSY),
)
#: Packages that only some commands import -> the extras of pyproject.toml that bring them.
EXTRAS = {
    "accelerate": "train",
    "datasets": "train,eval",
    "fastapi": "serve",
    "gguf": "gguf",
    "llguidance": "serve",
    "lm_eval": "eval",
    "matplotlib": "plot",
    "pillow": "vision",
    "prometheus_client": "serve",
    "tensorboardx": "track",
    "uvicorn": "serve",
}
#: In errors of libraries that could allocate no memory.
NO_ROOM = ("DefaultCPUAllocator", "Cannot allocate memory", "failed to map segment", "bad allocation", "std::bad_alloc")


def explain_failure(error: BaseException) -> UserError | None:
    """A sentence for a failure of the machine rather than the program: a full disk, no rights, no memory.

    None for what is a bug.
    """
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
        return explain_os_error(error)
    if type(error).__name__ == "OutOfMemoryError" or any(phrase in text for phrase in NO_ROOM):
        return UserError(
            "There is not enough memory.", "Try a smaller --batch-size with more --accumulation, or --sequence-length."
        )
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(str(error.name).partition(".")[0])):
        return UserError(
            f"This needs the package {error.name}, which is not installed.",
            f"Install it: `pip install 'edgerazor-toolchain[{extra}]'`, or all of them with [all].",
        )
    return explain_library_failure(error)


def explain_os_error(error: OSError) -> UserError | None:
    """A sentence for an error of a file or folder; a file that is merely missing where it was expected is a bug."""
    if error.errno == errno.ENOMEM:
        return UserError("There is not enough memory.", "Close other programs, or raise the limit (`ulimit -v`).")
    if error.filename is None:
        disk_failed = error.errno in (errno.EIO, errno.ESTALE)
        return UserError(f"The disk failed: {error.strerror}.", "Try another one with --work.") if disk_failed else None
    if error.errno in MACHINE:
        return UserError(f"{error.filename}: {error.strerror}.", "Check the path and your rights to it.")
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and cannot_hold(Path(os.fsdecode(error.filename)).parent):
        return UserError(f"{error.filename} cannot be made: {error.strerror}.", "Name a folder that can hold it.")
    return None


def cannot_hold(folder: Path) -> bool:
    """Whether nothing can be made in a folder: it is no folder, or of a file system without room (/proc)."""
    try:
        return not folder.is_dir() or os.statvfs(folder).f_blocks == 0
    except OSError:
        return True


def explain_library_failure(error: BaseException) -> UserError | None:
    """A sentence for a panic of a library in Rust, or a tokenizer that cannot read a text."""
    panicked = type(error).__name__ == "PanicException"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    in_tokenizer = last and Path(last[0].filename).name.startswith(("tokenization_", "chat.py"))
    if panicked or (type(error) is Exception and in_tokenizer):
        return UserError(
            f"A library gave up on the model's files or the text: {plain(error, 200).rstrip('.')}.",
            "Most likely the model's tokenizer.json is damaged; copy or download it again.",
        )
    return None
