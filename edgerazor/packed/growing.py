"""Weight files with compressed tensors, whose sizes are known only when they have been compressed.

The file begins with space for the largest possible header; spaces fill what the header leaves of it. Then come the
tensors that are not compressed, and then the frames, matrix by matrix, the largest first: the order in which matrices
are worked on, whichever core is faster. So equal arguments give equal files, and a finished matrix waits for those
before it, not for all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

from edgerazor.packed.container import (
    ALIGNMENT,
    INDEX_FILE,
    File,
    TensorSpec,
    arrange,
    index_bytes,
    safetensors_header,
    spec_bytes,
)


class GrowingFiles:
    """The places of tensors in such files.

    Args:
        known: specs of the tensors that are not compressed, by name.
        largest: most bytes of each frame, by name.
        shards: file name -> names of its tensors.
        metadata: of the first file, of the length that they will have.
    """

    def __init__(
        self,
        known: Mapping[str, TensorSpec],
        largest: Mapping[str, int],
        shards: Mapping[str, Sequence[str]],
        metadata: Mapping[str, str],
    ) -> None:
        self.shards = shards
        self.file_of = {name: file for file, names in shards.items() for name in names}
        self.known = {file: [name for name in names if name in known] for file, names in shards.items()}
        fixed = arrange(known, {}, self.known)
        self.offsets = {file.name: dict(file.offsets) for file in fixed if file.name in shards}
        self.ends = {file.name: file.data for file in fixed if file.name in shards}
        self.specs = {
            file: {name: known[name] for name in sorted(offsets, key=offsets.__getitem__)}
            for file, offsets in self.offsets.items()
        }
        self.total = sum(map(spec_bytes, known.values())) + sum(largest.values())
        bounds: dict[str, TensorSpec] = {name: ("U8", (size,)) for name, size in largest.items()}
        self.sizes = {
            file: len(
                safetensors_header(
                    {name: known.get(name) or bounds[name] for name in names},
                    dict.fromkeys(names, self.total),  # no number will have more digits
                    self._metadata_of(file, metadata),
                )
            )
            for file, names in shards.items()
        }
        assert all(size % ALIGNMENT == 0 for size in self.sizes.values())

    def append(self, name: str, size: int) -> tuple[str, int]:
        """Place a frame of that size: its file, and where its data begin after the header of that file."""
        file = self.file_of[name]
        self.offsets[file][name] = self.ends[file]
        self.specs[file][name] = ("U8", (size,))
        self.ends[file] += size
        return file, self.offsets[file][name]

    def files(self, metadata: Mapping[str, str]) -> list[File]:
        """The files, without their data, with the frames placed by now; what stands before the data keeps its size."""
        files = []
        for file, size in self.sizes.items():
            text = safetensors_header(self.specs[file], self.offsets[file], self._metadata_of(file, metadata), size)
            files.append(File(file, text, dict(self.offsets[file]), self.ends[file]))
        if len(files) == 1:
            return files
        longest = len(index_bytes(self.shards, self.total))
        index = index_bytes(self.shards, sum(self.ends.values())).rstrip()
        return [*files, File(INDEX_FILE, index + b" " * (longest - len(index) - 1) + b"\n", {})]

    def _metadata_of(self, file: str, metadata: Mapping[str, str]) -> Mapping[str, str]:
        return metadata if file == next(iter(self.shards)) else {}


class Turns:
    """Makes tasks that run at the same time take turns in the order of their numbers, from 0 on.

    Tasks must begin in that order, too.
    """

    def __init__(self) -> None:
        self.next = 0
        self.failed: int | None = None
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def task(self, number: int) -> Iterator[None]:
        """The work of a task. If it fails, the tasks after it are told, so that they do not wait for ever."""
        try:
            yield
        except BaseException:
            with self.changed:
                self.failed = number if self.failed is None else min(self.failed, number)
                self.changed.notify_all()
            raise

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait until all tasks before this one have had their turn, then have one.

        Raises:
            RuntimeError: one of them has failed.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.next == number or (self.failed is not None and self.failed < number))
            if self.next != number:
                raise RuntimeError(f"task {self.failed} has failed")
        yield
        with self.changed:
            self.next += 1
            self.changed.notify_all()
