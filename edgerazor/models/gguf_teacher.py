"""A GGUF file as a teacher: its tensors are dequantized once into an ordinary model folder, which every stage can use.

The folder lies in a cache, under the digest of the file, so that a second command finds it and a changed file gets
another. It takes its place when it is complete; whoever was killed before begins again.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from edgerazor import locks, untrusted
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.workdir import find_folder, hash_file, replace_folder, write_json

#: The first bytes of every file.
MAGIC = b"GGUF"
#: What became of a file, in the folder; it is part of the teacher's fingerprint.
RECORD = "gguf.json"
#: Of what is written; a folder of another one is written anew.
VERSION = 1
#: The environment variable that names the folder of the cache.
CACHE = "EDGERAZOR_CACHE"
#: Types that are no quantized ones.
FLOATS = ("F32", "F16", "BF16")
SECONDS_BETWEEN_TRIES = 0.5


def is_gguf(source: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    path = Path(source)
    try:
        if not path.is_file():  # a pipe would wait
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def folder_of_gguf(path: Path, console: Console | None = None) -> Path:
    """The model folder of a GGUF file, dequantized if there is none yet.

    Args:
        path: the file.
        console: where to show how far it is.

    Raises:
        UserError: it is damaged, of a family that is not known, or has a tensor that cannot be dequantized.
    """
    status = path.stat()
    return _folder_of(path.resolve(), (status.st_size, status.st_mtime_ns), console or Console(quiet=True))


def gguf_origin(folder: Path) -> str:
    """What a folder was made of, in words: "dequantized from Q4_K_M"; empty where it was not made of a GGUF file."""
    try:
        record = untrusted.load_json(folder / RECORD)
    except (OSError, ValueError):
        return ""
    verb = "read" if record.get("type") in FLOATS else "dequantized"
    return f"{verb} from {record.get('type')}"


def cache_folder() -> Path:
    """Where the folders of GGUF files lie."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named).expanduser().absolute() / "teachers"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "edgerazor" / "teachers"


_folders: dict[tuple[Path, tuple[int, int]], Path] = {}


def _folder_of(path: Path, state: tuple[int, int], console: Console) -> Path:
    """The same, remembered for this process as long as file and folder are there unchanged."""
    known = _folders.get((path, state))
    if known is not None and _is_whole(known):
        return known
    digest = hash_file(path)
    folder = cache_folder() / f"{path.stem}-{digest[:16]}"
    while not _is_whole(find_folder(folder), digest):
        try:
            _convert(path, digest, folder, console)
        except locks.HeldError:  # another process is making it
            time.sleep(SECONDS_BETWEEN_TRIES)
    _folders[path, state] = folder
    return folder


def _is_whole(folder: Path, digest: str | None = None) -> bool:
    """Whether a folder is there, of this version and file, with files of the sizes that were written."""
    try:
        record = untrusted.load_json(folder / RECORD)
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    same = digest is None or record.get("sha256") == digest
    return bool(same and record.get("version") == VERSION and sizes == record["files"])


def _convert(path: Path, digest: str, folder: Path, console: Console) -> None:
    from edgerazor.models.gguf_tokenizer import write_tokenizer  # these need the package gguf, of an extra
    from edgerazor.models.gguf_weights import GgufWeights
    from edgerazor.untrusted.gguf_file import GgufFile

    weights = GgufWeights(GgufFile(path))
    with replace_folder(folder) as new:
        free = shutil.disk_usage(new).free
        if free < weights.bytes():
            raise UserError(
                f"{path} takes {weights.bytes():,} bytes when dequantized, and {folder.parent} has {free:,} left.",
                f"Make room, or name another folder in the environment variable {CACHE}.",
            )
        write_json(new / "config.json", weights.config_json())
        write_tokenizer(weights.file, new)
        with console.track("dequantize", len(weights.sources)) as tracker:
            weights.write(new / "model.safetensors", tracker.advance)
        if hash_file(path) != digest:
            raise UserError(f"{path} was changed while it was read.", "Run the command again.")
        files = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
        write_json(
            new / RECORD,
            {"version": VERSION, "sha256": digest, "type": weights.type, "types": weights.types, "files": files},
        )
