"""llama.cpp and ik_llama.cpp beside ours: their own bench programs, on GGUF files of the same model.

A round starts their program anew, lets it load, warm up and measure once, and takes the nanoseconds that it says; its
load does not count. Both read and write alike, but for how a measurement behind a context is asked for: `-d` in
llama.cpp, `-gp` in ik_llama.cpp.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from edgerazor import exporters, models, untrusted
from edgerazor.benchmark.engines import Round, Speed, cached_numbers
from edgerazor.errors import UserError, usage_error
from edgerazor.exporters import Exporter, ExportPlan
from edgerazor.packed import PackedModel
from edgerazor.recipe import Bench
from edgerazor.workdir import make_folder, replace_folder, write_text

#: Not to look for a program at all.
NONE = "none"
LLAMA, IK = "llama.cpp", "ik_llama.cpp"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Program(_Record):
    """A bench program: of llama.cpp, or of ik_llama.cpp."""

    name: str
    path: Path


class GgufFile(_Record):
    """A model for them.

    Attributes:
        path: of the file.
        type: of most of its weights.
        bytes: of the file.
        bytes_per_token: read to decode a token, without the cache.
        cache_bytes_per_token: that a token adds to the cache, which is of 16 bits.
    """

    path: Path
    type: str
    bytes: int
    bytes_per_token: int
    cache_bytes_per_token: int


_FILES = TypeAdapter(list[GgufFile])


def programs(settings: Bench) -> list[Program]:
    """Those that the recipe names, and llama.cpp's where it is found on the PATH.

    Raises:
        UserError: there is no such file.
    """
    llama = settings.llama_bench or shutil.which("llama-bench") or NONE
    paths = {LLAMA: llama, IK: settings.ik_llama_bench or NONE}
    named = [Program(name=name, path=Path(path)) for name, path in paths.items() if path != NONE]
    for program in named:
        if not program.path.is_file():
            raise usage_error(
                f"There is no bench program of {program.name} at {program.path}.",
                "Give the path of a built llama-bench, or none.",
            )
    return named


# --- files -------------------------------------------------------------------------------------


def files(packed: Path, folder: Path, fingerprint: str) -> list[GgufFile]:
    """The packed model in the smallest exact types, and where that is TQ1_0 also in TQ2_0, which is faster.

    Args:
        packed: its folder.
        folder: where files are kept, to be found there the next time.
        fingerprint: of the packed model; files of another one are made again.

    Raises:
        UserError: llama.cpp does not know such a model, or its types do not hold it exactly.
    """
    record = folder / "files.json"
    try:
        stored = untrusted.load_json(record)
        if stored["packed"] == fingerprint:
            return _FILES.validate_python(stored["files"])
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    written = [_write(exporters.find("gguf"), packed, folder)]
    if written[0].type == "TQ1_0":
        written.append(_write(exporters.find("gguf-tq2"), packed, folder))
    make_folder(folder)
    write_text(record, json.dumps({"packed": fingerprint, "files": _FILES.dump_python(written, mode="json")}))
    return written


def _write(export: Exporter, packed: Path, folder: Path) -> GgufFile:
    export.check(packed)
    model = PackedModel.open(packed)
    plan = export.plan(model)
    exporters.refuse_lossy(plan)
    with replace_folder(folder / export.name) as temporary:
        written = export.write(model, temporary, plan).moved(temporary, folder / export.name)
    return GgufFile(
        path=Path(written.file),
        type=max(written.types["linear"].items(), key=lambda item: item[1])[0],
        bytes=written.bytes,
        bytes_per_token=_read_per_token(plan),
        cache_bytes_per_token=2 * cached_numbers(models.complete_config(packed)),
    )


def _read_per_token(plan: ExportPlan) -> int:
    """Bytes of all tensors; of an embedding that is not also the head a token reads one row."""
    kinds = {tensor.kind for tensor in plan.tensors}
    return sum(tensor.bytes for tensor in plan.tensors if tensor.kind != "embedding" or "head" not in kinds)


def describe(program: Program, file: GgufFile) -> dict[str, Any]:
    """What is known of a program with a file, as a bench result has it."""
    names = ("bytes_per_token", "cache_bytes_per_token")
    return {"kernel": program.name, "weight_bytes": file.bytes} | {name: getattr(file, name) for name in names}


# --- measuring ---------------------------------------------------------------------------------


def measure(program: Program, file: GgufFile, workload: Round) -> list[Speed]:
    """One round.

    Raises:
        UserError: the program fails, or says something else.
    """
    behind = [context for context in workload.contexts if context]
    first = ["-p", workload.prefill, "-n", workload.decode if 0 in workload.contexts else 0]
    speeds = speeds_of(_run(program, file, workload.threads, first))
    if behind and program.name == IK:
        pairs = [word for context in behind for word in ("-gp", f"{context},{workload.decode}")]
        speeds += speeds_of(_run(program, file, workload.threads, ["-p", 0, "-n", 0, *pairs]))
    elif behind:
        depths = ",".join(map(str, behind))
        speeds += speeds_of(_run(program, file, workload.threads, ["-p", 0, "-n", workload.decode, "-d", depths]))
    return speeds


def _run(program: Program, file: GgufFile, threads: int, words: Iterable[Any]) -> Any:
    """What the program prints, on the CPU."""
    # beside the file, because it takes a comma in a path for the end of a name
    always = ["-m", file.path.name, "-t", threads, "-ngl", 0, "-r", 1, "-o", "json"]
    command = [str(word) for word in (program.path.absolute(), *always, *words)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.path.parent)
    except OSError as error:
        raise UserError(f"{program.name} does not start: {error.strerror}.") from None
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        why = lines[-1].strip() if lines else "it says nothing"
        how = f"signal {-finished.returncode}" if finished.returncode < 0 else f"code {finished.returncode}"
        raise UserError(f"{program.name} ended with {how} on {file.type}: {why[:200].rstrip('.')}.")
    try:
        return untrusted.parse_json(finished.stdout)
    except ValueError:
        raise UserError(f"{program.name} printed no JSON on {file.type}.") from None


class _Test(BaseModel):
    """What is read of a program's account of a measurement."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    avg_ns: float


def speeds_of(printed: Any) -> list[Speed]:
    """Speeds by the JSON of either program.

    Raises:
        UserError: it is not theirs.
    """
    try:
        tests = TypeAdapter(list[_Test]).validate_python(printed)
    except ValidationError:
        raise UserError("The bench program printed other JSON than llama-bench does.") from None
    return [
        Speed("decode", test.n_depth or test.n_prompt, 1e9 * test.n_gen / test.avg_ns)
        if test.n_gen
        else Speed("prefill", test.n_depth, 1e9 * test.n_prompt / test.avg_ns)
        for test in tests
    ]
