"""Text for the terminal: nothing in it is a command, nothing is endless; how the process begins and ends."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from edgerazor import terminal
from edgerazor.cli import dispatch, errors
from edgerazor.console import Console, table
from edgerazor.errors import UserError, harmless, plain
from edgerazor.terminal import Guarded
from helpers.tiny_job import Run, spawn
from helpers.tiny_models import mostly_slow

#: Escape sequences, C1, a bidirectional override, half of a surrogate pair, a carriage return.
EVIL = "a\x1b[31m\x9b2J\u202e\ud800\rz[/x]:bug:"
SHOWN = "a?[31m?2J???z[/x]:bug:"


class Answer(BaseModel):
    name: str


def strange(text: str) -> set[str]:
    return {character for character in text if not (character.isprintable() or character == "\n")}


def test_plain_and_harmless() -> None:
    assert plain(EVIL + "\n") == SHOWN + "?"
    assert plain("x" * 1000) == "x" * 400 + "..."
    assert harmless(f"{EVIL}\n{EVIL}\n") == f"{SHOWN}\n{SHOWN}\n"
    for text in ("x" * 5000, "é" * 5000, "語" * 5000, "x" * 5000 + "\n"):
        cut = harmless(text, 1000)
        assert 990 < len(cut.encode()) <= 1004
        assert cut.endswith("...\n" if text.endswith("\n") else "...")
    assert harmless("é" * 500, 1000) == "é" * 500


def test_nothing_that_is_said_commands_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say(EVIL)
    console.warn(EVIL)
    console.error(UserError(EVIL, hint=EVIL))
    with console.track(EVIL, 1) as tracker:
        tracker.note(EVIL)
        tracker.advance()
    console.result(Answer(name=EVIL), EVIL, table(EVIL, [EVIL, "n"], [[EVIL, EVIL]], EVIL))
    Console(as_json=True).result(Answer(name="\x7f\x1b\x9b"))
    printed = capsys.readouterr()
    assert strange(printed.out) | strange(printed.err) == set()
    assert printed.err.count("z[/x]:bug:") == 6
    assert "[/x]:bug:" in printed.out  # no markup, no pictures
    assert '"\\u007f\\u001b\\u009b"' in printed.out


def test_an_error_is_at_most_two_kilobytes(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(UserError("語" * 10**6, hint="é" * 10**6))
    assert len(capsys.readouterr().err.encode()) < 2100


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_libraries_write_is_guarded() -> None:
    pipe, screen = io.StringIO(), Screen()
    for stream in (pipe, screen):
        guarded = Guarded(stream)
        assert guarded.write(EVIL + "\n") == len(EVIL) + 1
        guarded.writelines(["x" * 10**6 + "\n", "\r 10%"])
        guarded.write("\n\x1b[A")
    assert strange(pipe.getvalue()) == set()
    assert strange(screen.getvalue()) == {"\r", "\x1b"}
    assert screen.getvalue().count("\x1b") == 1  # a bar finds its line
    assert len(pipe.getvalue()) < 1700


def test_loggers_and_warnings_of_libraries(tmp_path: Path) -> None:
    code = (
        "from edgerazor import terminal; terminal.prepare()\n"
        "import logging, warnings, sys\n"
        "logging.basicConfig()\n"
        "logging.warning('\\x1b[31m' + 'x' * 100000)\n"
        "warnings.warn('\\x9b' + 'y' * 100000)\n"
        "raise ValueError('\\x1b[2J')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert strange(done.stderr) == set()
    assert "ValueError: ?[2J" in done.stderr
    assert len(done.stderr) < 5000


def test_usage_errors_of_click(run: Run) -> None:
    done = run("show", "--\x1b[31m" + "x" * 9999)
    assert (done.code, strange(done.err)) == (2, set())
    assert "No such option" in done.err
    assert len(done.err) < 2000


# --- streams, environment, machine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", mostly_slow(["ascii", "latin-1"], "ascii"))
def test_terminals_without_our_letters(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = spawn("show", "format")
    assert (done.code, done.err) == (0, "")
    assert "Packed" in done.out or "packed" in done.out


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = ["sh", "-c", command.replace("edgerazor", f"{sys.executable} -m edgerazor")]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        pytest.param("edgerazor generate x >&-", 2, "Standard output is closed", marks=pytest.mark.slow),
        pytest.param("edgerazor show recipe >&-", 0, "", marks=pytest.mark.slow),
        ("RANK=abc edgerazor show", 2, "RANK=abc"),
        ("mkdir gone; cd gone; rmdir ../gone; edgerazor show", 2, "The current folder has been removed."),
    ],
)
def test_strange_surroundings(tmp_path: Path, command: str, code: int, sentence: str) -> None:
    done = shell(command, tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/at/all"), "cannot be made"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", f"{__file__}/x"), "cannot be made"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x"), "cannot be made"),
        (OSError(errno.EIO, "Input/output error"), "The disk failed: Input/output error."),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "not enough memory"),
        (type("PanicException", (BaseException,), {})("index out of \x1bbounds"), "index out of ?bounds"),
    ],
)
def test_failures_that_are_no_bugs(error: BaseException, sentence: str) -> None:
    known = errors.explain_failure(error)
    assert known is not None
    assert sentence in known.message


def test_bugs_stay_bugs(tmp_path: Path) -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "x"))
    for error in (missing, Exception("x"), RuntimeError("x"), OSError("x"), ImportError("x")):
        assert errors.explain_failure(error) is None


def test_no_memory_for_a_sentence(tmp_path: Path) -> None:
    code = "from edgerazor import cli\ncli.errors.run_command = lambda _: [0] * 10**18\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: There is not enough memory.\n")


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_imports(tmp_path: Path, name: str) -> None:
    (tmp_path / "typer.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom edgerazor.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "Error: Interrupted.\n")


def test_a_second_ctrl_c_while_the_first_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "leave", lambda: None)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dispatch, "assemble", interrupt)
    monkeypatch.setattr(errors, "fail", interrupt)
    done = run("calibrate", "x")
    assert done.code == 130
    assert "Interrupted" in done.err


def test_an_interrupted_import_of_c_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "interrupted", True)
    known = errors.explain_failure(ImportError("numpy._core.multiarray failed to import"))
    assert known is not None
    assert known.code == 130


def test_a_signal_to_end_is_told_as_ctrl_c_is(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom edgerazor import terminal\nterminal.prepare()\nfrom edgerazor import cli\n"
        "from edgerazor.cli import dispatch\n"
        "dispatch.assemble = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\ncli.main()"
    )
    command = [sys.executable, "-c", code, "calibrate", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        130, "Error: Interrupted; finished stages and the last checkpoint are kept.\n",
    )  # fmt: skip


def test_leaving_ignores_ctrl_c() -> None:
    terminal.leave()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_threads_sleep_early_unless_the_user_says_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    terminal.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == terminal.SPINS
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    terminal.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    terminal.limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_it_is_said_before_torch_is_there() -> None:
    assert (
        spawn("--version", code="import sys; from edgerazor import terminal; assert 'torch' not in sys.modules").code
        == 0
    )
