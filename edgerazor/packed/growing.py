"""Weight files whose compressed tensors have a size only when they come.

The place for the header is kept free, as large as it can become, and spaces fill what is left of it. Behind it stand
the tensors that are not compressed, and behind those the frames, matrix by matrix, the largest first: the order in
which matrices are worked on, whichever core is faster. So equal arguments give equal files, and a matrix that is done
waits for those before it, not for all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

from edgerazor.packed.container import ALIGNMENT, INDEX_FILE, File, TensorSpec, arrange, beginning, index_of, spec_bytes


class GrowingFiles:
    """Which tensor lies where.

    Args:
        known: specs of the tensors that are not compressed, by name.
        largest: most bytes of each frame, by name.
        shards: file name -> names of its tensors.
        about: metadata of the first file, as long as they will be.
    """

    def __init__(
        self,
        known: Mapping[str, TensorSpec],
        largest: Mapping[str, int],
        shards: Mapping[str, Sequence[str]],
        about: Mapping[str, str],
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
                beginning(
                    {name: known.get(name) or bounds[name] for name in names},
                    dict.fromkeys(names, self.total),  # no number will have more digits
                    self._about(file, about),
                )
            )
            for file, names in shards.items()
        }
        assert all(size % ALIGNMENT == 0 for size in self.sizes.values())

    def append(self, name: str, size: int) -> tuple[str, int]:
        """File of the next frame, and where its data begin behind the header of that."""
        file = self.file_of[name]
        self.offsets[file][name] = self.ends[file]
        self.specs[file][name] = ("U8", (size,))
        self.ends[file] += size
        return file, self.offsets[file][name]

    def files(self, about: Mapping[str, str]) -> list[File]:
        """What stands before the data, of the tensors that are there by now; always of the same size."""
        files = []
        for file, size in self.sizes.items():
            text = beginning(self.specs[file], self.offsets[file], self._about(file, about), size)
            files.append(File(file, text, dict(self.offsets[file]), self.ends[file]))
        if len(files) == 1:
            return files
        longest = len(index_of(self.shards, self.total))
        index = index_of(self.shards, sum(self.ends.values())).rstrip()
        return [*files, File(INDEX_FILE, index + b" " * (longest - len(index) - 1) + b"\n", {})]

    def _about(self, file: str, about: Mapping[str, str]) -> Mapping[str, str]:
        return about if file == next(iter(self.shards)) else {}


class Turns:
    """Tasks that begin in the order of their numbers, from 0 on, and take turns in that order."""

    def __init__(self) -> None:
        self.next = 0
        self.failed: int | None = None
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def task(self, number: int) -> Iterator[None]:
        """Work of a task: where it fails, those behind it do not wait for ever."""
        try:
            yield
        except BaseException:
            with self.changed:
                self.failed = number if self.failed is None else min(self.failed, number)
                self.changed.notify_all()
            raise

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait until all tasks before have had their turn, then have it.

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
