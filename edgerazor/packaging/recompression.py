"""A packed folder made smaller for shipping, and back: `edgerazor pack FOLDER --compress` and `--no-compress`."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgerazor import packed
from edgerazor.console import Console
from edgerazor.errors import usage_error
from edgerazor.packaging import model_card
from edgerazor.packaging.pack_result import CompressResult
from edgerazor.packed import INDEX_FILE, PackedModel
from edgerazor.workdir import find_folder, job_of, replace_folder


def recompress(folder: Path, compress: bool, console: Console) -> CompressResult:
    """Write the weight files of a packed folder again, compressed or not; other files stay as they are.

    Raises:
        UserError: it is no packed folder, is damaged, is part of a job, or another process is writing it.
    """
    option = f"--{'' if compress else 'no-'}compress"
    job = job_of(folder)
    if job is not None:
        raise usage_error(
            f"{folder} is part of the job {job.path}, whose records name its files.",
            f"Tell the job: `edgerazor pack {option} --work {job.path}`.",
        )
    folder = find_folder(folder).resolve()
    if _is_compressed(folder) == compress:  # nothing will be written, so no lock is needed
        return _result(folder, compress, False, packed.size_table(PackedModel.open(folder)).bytes)
    with replace_folder(folder) as new:
        model = PackedModel.open(folder)  # opened under the lock: nobody else writes it now
        before = packed.size_table(model).bytes
        with console.track("compress" if compress else "decompress", len(model.header.matrices)) as tracker:
            _copy_others(folder, new, {file.name for file in model.files()} | {INDEX_FILE})
            packed.rewrite(model, new, compress=compress, done=tracker.advance)
            model_card.update_sizes(new)
            packed.verify_digests(new, {name: entry.digest for name, entry in model.header.matrices.items()})
    return _result(folder, compress, True, before)


def _is_compressed(folder: Path) -> bool:
    return PackedModel.open(folder).header.compression is not None


def _result(folder: Path, compress: bool, changed: bool, before: int) -> CompressResult:
    sizes = packed.size_table(PackedModel.open(folder))
    return CompressResult(
        folder=str(folder),
        compressed=compress,
        changed=changed,
        bytes_before=before,
        bytes=sizes.bytes,
        real_bits=round(sizes.real_bits, 4),
    )


def _copy_others(folder: Path, new: Path, weights: set[str]) -> None:
    """Everything but the weight files."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            shutil.copytree(path, new / path.name)
        elif path.name not in weights:
            shutil.copy2(path, new / path.name)
