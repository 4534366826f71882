"""What was made: a job is a folder, and its stages meet only there.

    edgerazor-work/
      recipe.yaml      what was asked for, all commands together
      calibrate/  distill/  packed/  eval/  bench/
        manifest.json  written last: what the stage read, asked, wrote, and how long it took
      exports/         the packed model in other people's formats, a folder each

A stage whose manifest names the same inputs as now is up to date. A folder without a manifest, or with a damaged one,
is unfinished business: only `distill` goes on from it. Every file is written under a temporary name, synced and
renamed, so that a crash at any moment leaves either the old file or the new one. Only this module builds paths.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgerazor import __version__, untrusted
from edgerazor.errors import UserError, usage_error

DEFAULT = Path("edgerazor-work")
#: stage -> its folder
FOLDERS = {"calibrate": "calibrate", "distill": "distill", "pack": "packed", "eval": "eval", "bench": "bench"}
#: First line of the recipe in a working directory: it tells our folders from those of other people.
HEADER = "# What was asked for in this folder, all commands together; edgerazor writes it and reads it again."
#: Files that say how a stage went, times included; they are no part of what it made.
REPORTS = ("result.json", "metrics.jsonl")


class Manifest(BaseModel):
    """Record of one finished stage."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    inputs: dict[str, str]
    section: dict[str, Any]
    outputs: dict[str, str]
    result: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    machine: str

    def fingerprint(self) -> str:
        """Identity of what this stage made: of its inputs and its output files, not of time or place."""
        made = {name: digest for name, digest in self.outputs.items() if name not in REPORTS}
        return digest_json({"inputs": self.inputs, "outputs": made})


class WorkDir:
    """The folder of one job."""

    def __init__(self, path: Path | str = DEFAULT) -> None:
        self.path = Path(path)

    def folder(self, stage: str) -> Path:
        return self.path / FOLDERS[stage]

    @property
    def exports(self) -> Path:
        """Folder of the packed model in other people's formats."""
        return self.path / "exports"

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan_file(self) -> Path:
        return self.folder("calibrate") / "plan.json"

    @property
    def statistics_file(self) -> Path:
        return self.folder("calibrate") / "stats.safetensors"

    @property
    def sensitivity_file(self) -> Path:
        return self.folder("calibrate") / "sensitivity.json"

    @property
    def start_file(self) -> Path:
        """Scales and weights that training or rounding begins with, where the plain rule is not wanted."""
        return self.folder("calibrate") / "start.safetensors"

    @property
    def generated_text(self) -> Path:
        """Text the teacher wrote, where the user gave none."""
        return self.folder("calibrate") / "generated.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.folder("distill") / "metrics.jsonl"

    def checkpoint(self, name: str) -> Path:
        """Folder of the resumable state: `current`."""
        return self.folder("distill") / "checkpoints" / name

    def progress(self, stage: str, name: str) -> Path:
        """A file or folder of what a stage has done so far, to go on from when it is killed; no part of its result."""
        return self.folder(stage) / "checkpoints" / name

    def student(self, which: str) -> Path:
        """Folder of the `best` or `last` student: float32 master weights and digests."""
        return self.folder("distill") / which

    def result_file(self, stage: str) -> Path:
        return self.folder(stage) / "result.json"

    def manifest_file(self, stage: str) -> Path:
        return self.folder(stage) / "manifest.json"

    def manifest(self, stage: str) -> Manifest | None:
        """The record of a finished stage, or None when it is not finished (or its record cannot be read)."""
        try:
            return untrusted.load_model(self.manifest_file(stage), Manifest)
        except (OSError, ValueError):
            return None

    def damaged(self, stage: str) -> bool:
        """Whether there is a record that cannot be read."""
        return self.manifest_file(stage).exists() and self.manifest(stage) is None

    def claim(self) -> None:
        """Refuse to work in a folder that holds somebody else's files.

        Raises:
            UserError: there is a recipe, or a folder with the name of a stage, that is not ours.
        """
        recipe = self.recipe_file
        if recipe.exists():
            if recipe.read_text(encoding="utf-8", errors="replace").startswith(HEADER):
                return
            strange: Path | None = recipe
        else:
            folders = (self.folder(stage) for stage in FOLDERS)
            strange = next((f for f in folders if f.exists() and not (f.is_dir() and not any(f.iterdir()))), None)
        if strange is not None:
            raise usage_error(
                f"{self.path} holds {strange.name}, which edgerazor did not write and would overwrite.",
                "Give the job a folder of its own: --work NAME.",
            )

    def write_recipe(self, text: str) -> None:
        """Keep what was asked for."""
        text = f"{HEADER}\n{text}"
        if not (self.recipe_file.exists() and self.recipe_file.read_text(encoding="utf-8") == text):
            write_text(self.recipe_file, text)

    def recover(self) -> None:
        """Finish or undo what a killed process left half done."""
        for folder in (self.folder("pack"), self.student("best"), self.student("last"), self.checkpoint("current")):
            recover_folder(folder)
        for leftover in (*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")):
            leftover.unlink(missing_ok=True)

    def up_to_date(self, stage: str, inputs: dict[str, str]) -> bool:
        """Whether the stage is finished, was made from the same inputs, and its files are still there."""
        manifest = self.manifest(stage)
        if manifest is None or manifest.inputs != inputs:
            return False
        return all((self.folder(stage) / name).exists() for name in manifest.outputs)

    def finish(
        self, stage: str, inputs: dict[str, str], section: dict[str, Any], result: BaseModel, seconds: float
    ) -> None:
        """Write the manifest, last of all."""
        folder = self.folder(stage)
        names = ("manifest.json", "checkpoints")
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.relative_to(folder).parts[0] not in names]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
        manifest = Manifest(
            stage=stage,
            inputs=inputs,
            section=section,
            outputs={str(path.relative_to(folder)): hash_file(path) for path in files},
            result=result.model_dump(mode="json"),
            seconds=round(seconds, 3),
            versions=versions(),
            machine=machine(),
        )
        write_json(self.manifest_file(stage), manifest.model_dump(mode="json"))

    def size(self, stage: str) -> int:
        """Bytes that a stage's folder takes."""
        return sum(file.stat().st_size for file in self.folder(stage).rglob("*") if file.is_file())

    def discard(self, stage: str, keep_progress: bool = False) -> None:
        """Throw away what a stage made; `keep_progress` keeps what an interrupted one may go on from."""
        if not keep_progress:
            shutil.rmtree(self.folder(stage), ignore_errors=True)
        for path in self.folder(stage).glob("*"):
            if path.is_dir() and path.name != "checkpoints":
                shutil.rmtree(path, ignore_errors=True)
            elif not path.is_dir():
                path.unlink()

    def forget_progress(self, stage: str) -> None:
        """Throw away what an interrupted stage would have gone on from."""
        shutil.rmtree(self.folder(stage) / "checkpoints", ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the job for this process.

        Raises:
            UserError: another process is working in this folder.
        """
        new = not self.path.exists()
        make_folder(self.path)
        path = self.path / ".lock"
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"Another edgerazor (process {file.read().strip() or 'unknown'}) is working in {self.path}.",
                    "Wait for it, or give this run a folder of its own with --work.",
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                if new and [each.name for each in self.path.iterdir()] == [path.name]:  # refused before it began
                    path.unlink()
                    self.path.rmdir()


def exports_of(packed: Path) -> Path:
    """Where the exports of a packed folder go: into its working directory, or beside a folder that has none."""
    packed = Path(os.path.abspath(packed))
    if packed.name == FOLDERS["pack"]:
        return WorkDir(packed.parent).exports
    return packed.with_name(f"{packed.name}-exports")


def job_of(packed: Path) -> WorkDir | None:
    """The job whose packed folder this is."""
    packed = Path(os.path.abspath(packed))
    job = WorkDir(packed.parent)
    return job if packed.name == FOLDERS["pack"] and job.recipe_file.exists() else None


def record_of(path: Path) -> Path:
    """The file beside a written one that says how it was made."""
    return path.with_name(f"{path.name}.json")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {path} cannot be made: {error.strerror}.", "Give a folder you may write to with --work."
        ) from None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder that takes the place of `path` when all went well.

    At every moment `path` is the old folder or the new one, or, between two renames, `recover_folder` brings
    back the old one.
    """
    recover_folder(path)
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for file in new.rglob("*"):
            sync(file)
        sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Undo a `replace_folder` that was killed between its renames, and sweep away what one left behind."""
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(path: Path, patterns: tuple[str, ...] = ("*",)) -> str:
    """SHA-256 over the names and contents of a folder's files (not of its sub-folders)."""
    files = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    return digest_json({file.name: hash_file(file) for file in files})


def digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"edgerazor": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "lm_eval"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine() -> str:
    """The processor's name, cores, and operating system."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
