"""Builds the kernel library: one C++ compiler, object files for each instruction set, one shared library.

`pip install` runs this through setuptools (`setuptools_commands.py`). `python -m edgerazor.kernels.build` runs it by
hand, where there was no compiler at that time, or after a change of the sources. The library has a plain C interface,
so it does not depend on the version of Python or torch. Nothing fails without a compiler: then the reference kernels
are used.

Loading a library that is cut off or damaged can end the process. Therefore a library ends with a seal, the SHA-256 of
all bytes before it, which `native.py` checks first. (Programs that load an ELF file ignore what comes after its
sections. On macOS, a library has no seal, because a signature must end the file, and the system checks that.)

`python -m edgerazor.kernels.build PROGRAM SOURCE` links a program from a source file and the library (`make test-arm`).
The environment variable `CXX` names the compiler, and the machine that it compiles for decides what is built, so that a
cross compiler works, too. `CXXFLAGS` adds options.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "cpp"
LIBRARY = "libedgerazor.so"
COMPILERS = ("c++", "g++", "clang++")
#: Suffixes of the files in `SOURCES` that belong to the library.
SUFFIXES = (".cpp", ".hpp", ".h")
#: The first bytes of a file that gets a seal, and the text before the digest at its end.
ELF, SEAL = b"\x7fELF", b"\nedgerazor sha256 "
#: Nobody reads errno or the flags of floating point exceptions, which keep gcc from vectorizing loops with comparisons.
OPTIONS = "-std=c++17 -pthread -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math".split()


class Isa(NamedTuple):
    """An instruction set: the name of its source file, and the compiler options that allow its instructions."""

    name: str
    options: str


class Job(NamedTuple):
    """A compilation: the stem of the source file, its options, and the stem of the object file if it differs."""

    source: str
    options: list[str]
    output: str = ""


#: Compiled once, without options of an instruction set.
_COMMON = (
    "dispatch",
    "library",
    "packed_layout",
    "decoder",
    "decoder_attention",
    "decoder_recurrent",
    "decoder_experts",
    "decoder_inputs",
    "decoder_api",
)
#: Compiled once for each instruction set, with these options beside its own. The results of `float_kernels` need not be
#: equal on all machines, so the compiler may fuse products and sums there.
_FOR_EACH_ISA = {"float_kernels": "-O3 -ffp-contract=fast", "scale_search": "-O3", "fake_quantize": "-O3"}

_AVX2 = "-O3 -mavx2 -mfma -mf16c"
_ISAS = {
    "x86_64": (
        Isa("avx2", _AVX2),
        Isa("avx2vnni", f"{_AVX2} -mavxvnni"),
        Isa("avx512", f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512vbmi"),
    ),
    "aarch64": (Isa("neon", "-O3 -march=armv8.2-a+dotprod"), Isa("i8mm", "-O3 -march=armv8.2-a+dotprod+i8mm")),
}
_ISAS["arm64"] = _ISAS["aarch64"]


class BuildError(Exception):
    """The library cannot be built on this machine; the message says why."""


def compiler() -> list[str]:
    """The command of the C++ compiler.

    Raises:
        BuildError: there is no compiler.
    """
    given = _words("CXX")
    for command in [given] if given else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found ({os.environ.get('CXX') or ', '.join(COMPILERS)})")


def fingerprint() -> str:
    """SHA-256 of the sources. A library contains the fingerprint of the sources that it was built from."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in SUFFIXES and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def sealed(content: bytes) -> bytes:
    """The bytes of a library with a seal at their end, as `problem` checks it; bytes that are no ELF file unchanged."""
    return content + SEAL + hashlib.sha256(content).hexdigest().encode() if content.startswith(ELF) else content


def problem(content: bytes) -> str | None:
    """What is wrong with the bytes of a library, as the end of a sentence about it; None if nothing is known to be."""
    if not content:
        return "is an empty file"
    if not content.startswith(ELF):
        return "is no library" if sys.platform == "linux" else None
    body, _, digest = content.rpartition(SEAL)
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return "is cut off, or was changed since it was built"
    return None


def build(target: Path, main: Path | None = None) -> list[str]:
    """Builds the library as the file `target` or, with a source file `main`, a program that contains it.

    Returns:
        The instruction sets in it, beside plain C++. One whose options the compiler does not know is left out.

    Raises:
        BuildError: there is no compiler, or it fails, or a file cannot be read or written.
    """
    try:
        return _build(target, main)
    except OSError as error:
        raise BuildError(str(error)) from error


def _build(target: Path, main: Path | None) -> list[str]:
    command = [*compiler(), *OPTIONS]
    added = _words("CXXFLAGS")
    machine = _run([*compiler(), "-dumpmachine"]).strip().split("-")[0]
    with tempfile.TemporaryDirectory() as folder:
        isas = [isa for isa in _ISAS.get(machine, ()) if _accepts(command, isa, Path(folder))]
        jobs = _jobs(isas)
        objects = [Path(folder) / f"{job.output or job.source}.o" for job in jobs]
        _run_all(
            [
                [*command, *job.options, *added, "-c", str(SOURCES / f"{job.source}.cpp"), "-o", str(output)]
                for job, output in zip(jobs, objects, strict=True)
            ]
        )
        kind = ["-shared"] if main is None else ["-I", str(SOURCES), str(main)]
        output = Path(folder) / "output"
        _run([*command, *added, *kind, *map(str, objects), "-o", str(output)])
        target.parent.mkdir(parents=True, exist_ok=True)
        content = output.read_bytes()
        new = target.with_name(f".{target.name}.{os.getpid()}.new")  # two builds at a time do not disturb each other
        try:
            new.write_bytes(sealed(content) if main is None else content)
            new.chmod(0o755)
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)
    return [isa.name for isa in isas]


def _jobs(isas: Sequence[Isa]) -> list[Job]:
    """All compilations of the library, those that take longest first."""
    jobs = []
    for isa in (*reversed(isas), Isa("portable", "-O2")):
        options = isa.options.split()
        jobs.append(Job(isa.name, options))
        for source, added in _FOR_EACH_ISA.items():
            unit = f"-DEDGERAZOR_UNIT={isa.name}"
            jobs.append(Job(source, [*options, *added.split(), unit], f"{source}_{isa.name}"))
    defined = [f'-DEDGERAZOR_SOURCES="{fingerprint()}"', *(f"-DEDGERAZOR_HAVE_{isa.name.upper()}" for isa in isas)]
    return [*jobs, *(Job(source, ["-O2", *defined]) for source in _COMMON)]


def _words(variable: str) -> list[str]:
    """The words of an environment variable.

    Raises:
        BuildError: a quotation in it has no end.
    """
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable} is no command line: {error}") from None


def _accepts(command: list[str], isa: Isa, folder: Path) -> bool:
    """Whether the compiler knows the options of an instruction set."""
    empty = folder / "empty.cpp"
    empty.touch()
    try:
        _run([*command, *isa.options.split(), "-c", str(empty), "-o", str(folder / "empty.o")])
    except BuildError:
        return False
    return True


def _run_all(commands: Sequence[list[str]]) -> None:
    """Runs all commands, one for each core at a time; where the system has no more threads, fewer at a time.

    Raises:
        BuildError: a command failed; those that had not begun by then are not run.
    """
    waiting = iter(commands)
    errors: list[BuildError] = []

    def work() -> None:
        for command in waiting:  # the interpreter's lock hands each command to one thread
            if errors:
                return
            try:
                _run(command)
            except BuildError as error:
                errors.append(error)

    helpers = []
    for _ in range(min(_cores(), len(commands)) - 1):
        helper = threading.Thread(target=work)
        try:
            helper.start()
        except RuntimeError:  # the system has no more threads: those that there are compile everything
            break
        helpers.append(helper)
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: list[str]) -> str:
    """Runs a command and returns its output.

    Raises:
        BuildError: it cannot be run, or failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> int:
    """Builds the library beside this file, where `native.py` finds it; or PROGRAM from SOURCE, if they are given."""
    target, *source = [Path(argument) for argument in sys.argv[1:]] or [HERE / LIBRARY]
    if len(source) > 1:
        print("usage: python -m edgerazor.kernels.build [PROGRAM SOURCE]", file=sys.stderr)
        return 2
    try:
        isas = build(target, *source)
    except BuildError as error:
        print(f"the kernels were not built: {error}", file=sys.stderr)
        return 1
    print(f"{target}: portable {' '.join(isas)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
