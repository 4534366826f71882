"""Building the library of kernels: one C++ compiler, one object file per instruction set, one shared library.

`pip install` runs this through setuptools (`BuildKernels` below); `python -m edgerazor.kernels.build` runs it by hand,
where there was no compiler at the time, or after a change of the sources. The library has a plain C interface, so it
does not depend on the version of Python or torch. Without a compiler nothing fails: the reference is used.

To load a library that was cut off, or changed on the way, can end the process; so a library ends with a seal, the
SHA-256 of all that is before it, which `native.py` checks first. (What is behind the sections of an ELF file is left
alone by those who load it. On macOS, where a signature ends the file, there is none, and the system checks instead.)

`python -m edgerazor.kernels.build PROGRAM SOURCE` makes a program of a source file and the library (`make test-arm`).
`CXX` names the compiler (its machine decides what is built, so a cross compiler works too) and `CXXFLAGS` adds options.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "cpp"
LIBRARY = "libedgerazor.so"
COMPILERS = ("c++", "g++", "clang++")
#: The kinds of files in `SOURCES` that are sources; whatever else lies there is none of ours.
SUFFIXES = (".cpp", ".hpp", ".h")
#: What a sealed file begins with, and the words before the digest at its end.
ELF, SEAL = b"\x7fELF", b"\nedgerazor sha256 "
OPTIONS = "-std=c++17 -pthread -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno".split()


class Unit(NamedTuple):
    """A source file that needs instructions of its own: the options that allow them."""

    name: str
    options: str


class Job(NamedTuple):
    """A compilation: the name of its source file, its options, and the name of the object file if it is another one."""

    source: str
    options: list[str]
    output: str = ""


#: `floats.cpp` and `scales.cpp` are compiled for each unit. Sums of the first have no order to keep to: products and
#: sums may be fused.
_FLOATS = "-O3 -ffp-contract=fast".split()

_AVX2 = "-O3 -mavx2 -mfma -mf16c"
_UNITS = {
    "x86_64": (
        Unit("avx2", _AVX2),
        Unit("avx2vnni", f"{_AVX2} -mavxvnni"),
        Unit("avx512", f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512vbmi"),
    ),
    "aarch64": (Unit("neon", "-O3 -march=armv8.2-a+dotprod"), Unit("i8mm", "-O3 -march=armv8.2-a+dotprod+i8mm")),
}
_UNITS["arm64"] = _UNITS["aarch64"]


class BuildError(Exception):
    """The library cannot be built here; the message says why."""


def compiler() -> list[str]:
    """The C++ compiler's command.

    Raises:
        BuildError: there is none.
    """
    given = _words("CXX")
    for command in [given] if given else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found ({os.environ.get('CXX') or ', '.join(COMPILERS)})")


def fingerprint() -> str:
    """SHA-256 of the sources; a library says which ones it was built from."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in SUFFIXES and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def sealed(content: bytes) -> bytes:
    """The bytes of a library with a seal at their end, which `problem` knows; those of no ELF file as they are."""
    return content + SEAL + hashlib.sha256(content).hexdigest().encode() if content.startswith(ELF) else content


def problem(content: bytes) -> str | None:
    """What is wrong with the bytes of a library, the end of a sentence about it; None: nothing, as far as is known."""
    if not content:
        return "is an empty file"
    if not content.startswith(ELF):
        return "is no library" if sys.platform == "linux" else None
    body, _, digest = content.rpartition(SEAL)
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return "is cut off, or was changed since it was built"
    return None


def build(target: Path, main: Path | None = None) -> list[str]:
    """Compiles the library to `target`, or, with a source file `main`, a program that contains it.

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
        units = [unit for unit in _UNITS.get(machine, ()) if _accepts(command, unit, Path(folder))]
        have = [f"-DEDGERAZOR_HAVE_{unit.name.upper()}" for unit in units]
        about = [*have, f'-DEDGERAZOR_SOURCES="{fingerprint()}"']
        jobs = [Job("library", ["-O2", *about]), Job("decoder", ["-O2"])]
        for name, options in (Unit("portable", "-O2"), *units):
            jobs.append(Job(name, options.split()))
            floats = [*options.split(), *_FLOATS, f"-DEDGERAZOR_UNIT={name}"]
            jobs.append(Job("floats", floats, f"floats_{name}"))
            scales = [*options.split(), "-O3", f"-DEDGERAZOR_UNIT={name}"]
            jobs.append(Job("scales", scales, f"scales_{name}"))
        objects = [Path(folder) / f"{job.output or job.source}.o" for job in jobs]
        commands = [
            [*command, *job.options, *added, "-c", str(SOURCES / f"{job.source}.cpp"), "-o", str(output)]
            for job, output in zip(jobs, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        kind = ["-shared"] if main is None else ["-I", str(SOURCES), str(main)]
        output = Path(folder) / "output"
        _run([*command, *added, *kind, *map(str, objects), "-o", str(output)])
        target.parent.mkdir(parents=True, exist_ok=True)
        content = output.read_bytes()
        new = target.with_name(f".{target.name}.{os.getpid()}.new")  # two builds at a time are no harm
        try:
            new.write_bytes(sealed(content) if main is None else content)
            new.chmod(0o755)
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)
    return [unit.name for unit in units]


def _words(variable: str) -> list[str]:
    """The words of an environment variable.

    Raises:
        BuildError: a quotation in it has no end.
    """
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable} is no command line: {error}") from None


def _accepts(command: list[str], unit: Unit, folder: Path) -> bool:
    """Whether the compiler knows the unit's options."""
    empty = folder / "empty.cpp"
    empty.touch()
    try:
        _run([*command, *unit.options.split(), "-c", str(empty), "-o", str(folder / "empty.o")])
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> int:
    """Builds the library beside this file, where `native.py` finds it; or PROGRAM from SOURCE, if they are given."""
    target, *source = [Path(each) for each in sys.argv[1:]] or [HERE / LIBRARY]
    if len(source) > 1:
        print("usage: python -m edgerazor.kernels.build [PROGRAM SOURCE]", file=sys.stderr)
        return 2
    try:
        found = build(target, *source)
    except BuildError as error:
        print(f"the kernels were not built: {error}", file=sys.stderr)
        return 1
    print(f"{target}: portable {' '.join(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
