"""What was made: a job is a folder, and its stages meet only there.

    edgerazor-work/
      recipe.yaml      what was asked for, all commands together
      budget.json      what a budget of tokens or time chose of the settings that were not asked for
      calibrate/  distill/  packed/  eval/  bench/
        manifest.json  written last: what the stage read, asked, wrote, and how long it took
      exports/         the packed model in other people's formats, a folder each

A stage whose manifest names the same inputs as now is up to date. A folder without a manifest, or with a damaged one,
is unfinished business: only `distill` goes on from it. Only this module builds paths.

**Replacing.** A file or folder is written under a temporary name of its own, synced and renamed, so that a crash at any
moment leaves either the old one or the new one. A folder takes two renames, with the old one as `.NAME.old` between
them: whoever reads or writes next puts it back (`find_folder`, `alone`). Who replaces a folder, or a file outside a
job, holds `.NAME.lock` beside it, so two never write the same; a second one is refused in a sentence.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError

from edgerazor import __version__, locks, untrusted
from edgerazor.errors import UserError, usage_error

_T = TypeVar("_T")

DEFAULT = Path("edgerazor-work")
#: stage -> its folder
FOLDERS = {"calibrate": "calibrate", "distill": "distill", "pack": "packed", "eval": "eval", "bench": "bench"}
#: First line of the recipe in a working directory: it tells our folders from those of other people.
HEADER = "# What was asked for in this folder, all commands together; edgerazor writes it and reads it again."
#: The card of a packed folder, which tells people of it.
CARD = "README.md"
#: Files that say how a stage went, times included, or tell of it; they are no part of what it made.
REPORTS = ("result.json", "metrics.jsonl", CARD)


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
    """The folder of one job; `made` holds the folders of stages that are being made beside those that they replace."""

    def __init__(self, path: Path | str = DEFAULT, made: Mapping[str, Path] | None = None) -> None:
        self.path = Path(path)
        self._made = dict(made or {})

    def folder(self, stage: str) -> Path:
        return self._made.get(stage, self.path / FOLDERS[stage])

    @property
    def exports(self) -> Path:
        """Folder of the packed model in other people's formats."""
        return self.path / "exports"

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def budget_file(self) -> Path:
        """Settings that were chosen for the training's budget, and why."""
        return self.path / "budget.json"

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
    def pictures(self) -> Path:
        """Folder of what a tower made of pictures, for all stages; each of its files can be made again."""
        return self.path / "pictures"

    @property
    def metrics_file(self) -> Path:
        return self.folder("distill") / "metrics.jsonl"

    @property
    def report_file(self) -> Path:
        """The page that tells of the job."""
        return self.path / "report.html"

    @property
    def samples_file(self) -> Path:
        """Texts of teacher and student side by side, for the page."""
        return self.path / "samples.json"

    def checkpoint(self, name: str) -> Path:
        """Folder of the resumable state: `current`."""
        return self.folder("distill") / "checkpoints" / name

    def progress(self, stage: str, name: str) -> Path:
        """A file or folder of what a stage has done so far, to go on from when it is killed; no part of its result."""
        return self._progress(stage) / name

    def _progress(self, stage: str) -> Path:
        """It stays in its place while the stage's folder is made anew."""
        return self.path / FOLDERS[stage] / "checkpoints"

    def student(self, which: str) -> Path:
        """Folder of the `best` or `last` student: float32 master weights and digests."""
        return self.folder("distill") / which

    def result_file(self, stage: str) -> Path:
        return self.folder(stage) / "result.json"

    def manifest_file(self, stage: str) -> Path:
        return self.folder(stage) / "manifest.json"

    def manifest(self, stage: str) -> Manifest | None:
        """The record of a finished stage, or None when it is not finished (or its record cannot be read)."""
        find_folder(self.folder(stage))
        try:
            return untrusted.load_model(self.manifest_file(stage), Manifest)
        except (OSError, ValueError):
            return None

    def has_damaged_manifest(self, stage: str) -> bool:
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
        """Undo what a killed process left half done; by the holder of the lock."""
        for folder in self._replaced():
            recover_folder(folder)
        inside = (file for stage in FOLDERS for file in self.folder(stage).rglob(".*.tmp"))
        for leftover in (*self.path.glob(".*.tmp"), *inside):
            leftover.unlink(missing_ok=True)

    def find(self) -> None:
        """Before reading without the lock: put back the folders that a killed process took away."""
        for folder in self._replaced():
            find_folder(folder)

    def _replaced(self) -> list[Path]:
        """The folders that are replaced as a whole."""
        whole = [self.folder(stage) for stage in FOLDERS if stage != "distill"]
        return [*whole, self.student("best"), self.student("last"), self.checkpoint("current")]

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

    def discard(self, stage: str) -> None:
        """Throw away what a stage made, and what an interrupted one would have gone on from."""
        shutil.rmtree(self.folder(stage), ignore_errors=True)

    def forget_progress(self, stage: str) -> None:
        """Throw away what an interrupted stage would have gone on from."""
        shutil.rmtree(self._progress(stage), ignore_errors=True)

    @contextlib.contextmanager
    def replacing(self, stage: str, carry: Iterable[str] = (), keep_progress: bool = False) -> Iterator[WorkDir]:
        """This job with a new folder for a stage, which takes the place of the old one when all went well.

        Args:
            stage: that is done again, up to its manifest.
            carry: names of files that the new folder begins with, where the old one has them.
            keep_progress: what the stage goes on from stays behind it, too.

        Raises:
            UserError: as `replace_folder`.
        """
        with replace_folder(self.folder(stage)) as new:
            for name in carry:
                if (self.folder(stage) / name).is_file():
                    share(self.folder(stage) / name, new / name)
            yield WorkDir(self.path, {stage: new})
            if keep_progress and self._progress(stage).is_dir():
                os.replace(self._progress(stage), new / "checkpoints")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the job for this process.

        Raises:
            UserError: another process is working in this folder.
        """
        new = not self.path.exists()
        make_folder(self.path)
        path = self.path / ".lock"
        hint = "Wait for it, or give this run a folder of its own with --work."

        def begun() -> bool:
            return not new or any(not entry.name.startswith(path.name) for entry in self.path.iterdir())

        try:
            with locks.hold(path, f"is working in {self.path}", hint, keep=begun):
                yield
        finally:
            if new:
                with contextlib.suppress(OSError):  # it is not empty
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
            f"The folder {path} cannot be made: {error.strerror}.", "Name a folder you may write to (--work, --out)."
        ) from None


# --- replacing files and folders ---------------------------------------------------------------


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Be the only writer of a file or folder; what a killed one left is put right first.

    Raises:
        UserError: another process is writing it, or nothing can be written there.
    """
    make_folder(path.parent)
    with locks.hold(_beside(path, "lock"), f"is writing {path}", "Wait for it, or name another place."):
        sweep(path)
        yield


def sweep(path: Path) -> None:
    """Put back a folder that a killed process took away, and remove what it left; by the only writer."""
    old = _beside(path, "old")
    if os.path.lexists(old):
        if os.path.lexists(path):
            _remove_folder(old)
        else:
            os.replace(old, path)
    for leftover in _leftovers(path):
        _remove(leftover)


def recover_folder(path: Path) -> None:
    """`sweep`, unless somebody is writing there now."""
    if path.parent.is_dir() and (os.path.lexists(_beside(path, "old")) or _leftovers(path, "|lock")):
        with contextlib.suppress(locks.HeldError), alone(path):
            pass


def find_folder(path: Path) -> Path:
    """Where a folder can be read: in its place, where it is put back first if a killed process took it away.

    While a living one is between its two renames, that is where the old one lies.
    """
    old = _beside(path, "old")
    for _ in range(100):
        if os.path.lexists(path) or not os.path.lexists(old):
            return path
        with contextlib.suppress(UserError, OSError):  # where nothing can be written, the old one is read as it is
            recover_folder(path)
        if not os.path.lexists(path):
            time.sleep(0.005)
    return old


def read_whole(path: Path, read: Callable[[Path], _T]) -> _T:
    """What `read` makes of a folder that others may replace meanwhile: of the old one or of the new one, not of both.

    Raises:
        UserError, OSError: as `read` does of a folder that stays the same.
    """
    for _ in range(20):
        place = find_folder(path)
        before = _identity(place)
        try:
            content = read(place)
        except (UserError, OSError):
            if _identity(find_folder(path)) == before:
                raise
        else:
            if _identity(find_folder(path)) == before:
                return content
    return read(path)


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, and rename it to `path`.

    It gets the rights that the umask gives a new file, whatever `write` does.
    """
    make_folder(path.parent)
    temporary = _temporary(path, "tmp")
    with _named_failures(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            write(temporary)
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def share(source: Path, target: Path) -> None:
    """A second name for a file that is only ever replaced, never changed; a copy where the disk has no such names."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder that takes the place of `path` when all went well.

    At every moment `path` is the old folder or the new one, or, between two renames, `find_folder` finds the old one.

    Raises:
        UserError: another process is replacing it, or something else than a folder is in its place.
    """
    with alone(path), _named_failures(path):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{path} is in the way: it should be a folder.", "Move it, or name another place.")
        new = _temporary(path, "new")
        try:
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                sync(file)
            sync(new)
            _put_in_place(new, path)
        except BaseException:
            _remove(new)
            raise


def _put_in_place(new: Path, path: Path) -> None:
    old = _beside(path, "old")
    if not os.path.lexists(path):
        os.replace(new, path)
        sync(path.parent)
        return
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    sync(path.parent)
    _remove_folder(old)


def _remove_folder(old: Path) -> None:
    """Remove an old folder; one half removed is never taken for it."""
    gone = _temporary(old.with_name(old.name.removeprefix(".").removesuffix(".old")), "tmp")
    os.replace(old, gone)
    _remove(gone)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _beside(path: Path, what: str) -> Path:
    return path.parent / f".{path.name}.{what}"


def _temporary(path: Path, what: str) -> Path:
    """A name that no other process, on whatever host, has."""
    return _beside(path, f"{secrets.token_hex(4)}.{what}")


def _leftovers(path: Path, more: str = "") -> list[Path]:
    """What is there beside `path` under a temporary name of it."""
    name = re.compile(rf"\.{re.escape(path.name)}(\.[0-9a-f]{{8}})?\.(new|tmp{more})")
    with os.scandir(path.parent) as entries:
        return [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]


@contextlib.contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """Failures of the system say what they are about: those of an open file do not by themselves.

    safetensors says in words of its own that a disk is full: that becomes the system's error, too.
    """
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    with _named_failures(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sync_open(descriptor)
        finally:
            os.close(descriptor)


def sync_open(descriptor: int) -> None:
    """The same of an open one, except on file systems that cannot."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(path: Path, patterns: tuple[str, ...] = ("*",)) -> str:
    """SHA-256 over the names and contents of a folder's files (not of its sub-folders, nor of its card)."""
    files = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    return digest_json({file.name: hash_file(file) for file in files if file.name != CARD})


def digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    installed = {"edgerazor": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "lm_eval"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def machine() -> str:
    """The processor's name, cores, and operating system."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
