"""Building the library of kernels: one C++ compiler, one object file per instruction set, one shared library.

`pip install` runs this through setuptools (`BuildKernels` below); `python -m edgerazor.kernels.build` runs it by hand,
where there was no compiler at the time, or after a change of the sources. The library has a plain C interface, so it
does not depend on the version of Python or torch. Without a compiler nothing fails: the reference is used.

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


#: `floats.cpp` is compiled for each unit. Its sums have no order to keep to: products and sums may be fused.
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
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found ({os.environ.get('CXX') or ', '.join(COMPILERS)})")


def fingerprint() -> str:
    """SHA-256 of the sources; a library says which ones it was built from."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def build(target: Path, main: Path | None = None) -> list[str]:
    """Compiles the library to `target`, or, with a source file `main`, a program that contains it.

    Returns:
        The instruction sets in it, beside plain C++. One whose options the compiler does not know is left out.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    command = [*compiler(), *OPTIONS]
    added = shlex.split(os.environ.get("CXXFLAGS", ""))
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
        built = target.with_name(f".{target.name}.{os.getpid()}.new")  # two may build it at once
        shutil.copyfile(output, built)
        os.chmod(built, 0o755)
        os.replace(built, target)
    return [unit.name for unit in units]


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
    try:
        found = build(target, *source)
    except BuildError as error:
        print(f"the kernels were not built: {error}", file=sys.stderr)
        return 1
    print(f"{target}: portable {' '.join(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
