"""The weight files of a folder while they are written: temporary names, all space reserved, a place for each tensor."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from edgerazor import workdir
from edgerazor.packed.container import WEIGHTS_FILE, File


class OutputFiles:
    """Files that are open under temporary names, and where each tensor goes in them."""

    def __init__(self, files: Sequence[File], descriptors: Mapping[str, int]) -> None:
        self.descriptors = descriptors
        self.header_sizes = {file.name: len(file.header_bytes) for file in files}
        self.offsets = {
            name: (descriptors[file.name], len(file.header_bytes) + offset)
            for file in files
            for name, offset in file.offsets.items()
        }

    def write(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Write the bytes of a tensor, given in pieces that follow one another; from any thread."""
        descriptor, offset = self.offsets[name]
        for piece in pieces:
            _write_at(descriptor, piece, offset)
            offset += len(piece)

    def add(self, name: str, file: str, offset: int) -> None:
        """Add a tensor whose data begin at that offset after the header of that file."""
        self.offsets[name] = (self.descriptors[file], self.header_sizes[file] + offset)

    def write_headers(self, files: Sequence[File]) -> None:
        """Write what stands before the tensors of each file."""
        for file in files:
            assert len(file.header_bytes) == self.header_sizes[file.name]
            _write_at(self.descriptors[file.name], memoryview(file.header_bytes), 0)


@contextlib.contextmanager
def open_output(folder: Path, files: Sequence[File]) -> Iterator[OutputFiles]:
    """Open temporary files of their full sizes; at the end they are synced and renamed, or removed after an error."""
    temporary = {file.name: folder / f".{file.name}.tmp" for file in files}
    descriptors: dict[str, int] = {}
    renamed: list[Path] = []
    with workdir.alone(folder / WEIGHTS_FILE):
        try:
            for file in files:
                descriptors[file.name] = os.open(temporary[file.name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                _reserve(descriptors[file.name], file.size)
            yield OutputFiles(files, descriptors)
            for descriptor in descriptors.values():
                os.fsync(descriptor)
            for name, path in temporary.items():
                os.replace(path, folder / name)
                renamed.append(folder / name)
            workdir.sync(folder)
        except BaseException as error:
            for path in (*temporary.values(), *renamed):
                path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(folder)  # the system does not know the file name of a descriptor
            raise
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _reserve(descriptor: int, size: int) -> None:
    """Take the space on the disk now, so that a full disk is noticed before hours of work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # the function is not there on every system
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, size)
