"""A recording that is read: its sequences by their keys, in any order, a few at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edgerazor.errors import UserError
from edgerazor.recording.description import HELD_OUT, TRAINING, Description, Part, read_description
from edgerazor.recording.keys import KEY_BYTES
from edgerazor.recording.shards import Fields, Layout, Shard, damaged
from edgerazor.workdir import hash_file

#: Open files at a time.
OPEN_SHARDS = 64
#: A part of at most so many bytes is read once and compared with its digests before it is used; of a larger one each
#: sequence is, when it is read.
VERIFIED_BYTES = 4_000_000_000


class RecordedPart:
    """The training or the held-out sequences of a recording.

    Args:
        folder: of the recording.
        description: of it.
        name: `TRAINING` or `HELD_OUT`.

    Raises:
        UserError: a file is missing, of another size, or damaged.
    """

    def __init__(self, folder: Path, description: Description, name: str) -> None:
        self.folder, self.name = folder, name
        self.settings: Part = description.part(name)
        self.layout: Layout = description.layout(name)
        self._identity = description.identity(name)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._check_files()
        keys, places = [], []
        for number, record in enumerate(self.settings.shards):
            shard = self._shard(number)
            if (len(shard), shard.positions) != (record.sequences, record.positions):
                raise damaged(shard.path, "it holds another number of sequences")
            keys.append(np.ascontiguousarray(shard.keys).view("<u8").reshape(-1, KEY_BYTES // 8))
            places.append(np.stack([np.full(len(shard), number), np.arange(len(shard))], axis=1))
        all_keys = np.concatenate(keys) if keys else np.empty((0, KEY_BYTES // 8), dtype="<u8")
        order = np.lexsort(all_keys.T[::-1])
        self._keys = all_keys[order]
        self._places = np.concatenate(places)[order] if places else np.empty((0, 2), dtype=np.int64)

    def _check_files(self) -> None:
        for record in self.settings.shards:
            path = self.folder / record.file
            if not path.is_file():
                raise damaged(path, "it is missing")
            if path.stat().st_size != record.bytes:
                raise damaged(path, f"it has {path.stat().st_size:,} bytes, not {record.bytes:,}")
            if self.settings.bytes <= VERIFIED_BYTES and hash_file(path) != record.sha256:
                raise damaged(path, "its checksum does not match")

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return self._place(key) is not None

    def sequence(self, key: bytes) -> Fields:
        """What is kept of a sequence.

        Raises:
            UserError: it is not there, or damaged.
        """
        place = self._place(key)
        if place is None:
            raise UserError(f"The recording {self.folder} lacks a sequence of the {self.name} text.")
        return self._shard(place[0]).sequence(place[1])

    def missing(self, keys: Iterable[bytes]) -> int:
        """How many of these sequences are not there."""
        return sum(key not in self for key in keys)

    def verify(self) -> None:
        """Read everything.

        Raises:
            UserError: something is not what was written.
        """
        for number, record in enumerate(self.settings.shards):
            if hash_file(self.folder / record.file) != record.sha256:
                raise damaged(self.folder / record.file, "its checksum does not match")
            self._shard(number).verify()

    def _place(self, key: bytes) -> tuple[int, int] | None:
        """Shard and row of a sequence."""
        first, second = np.frombuffer(key, dtype="<u8")
        place = int(np.searchsorted(self._keys[:, 0], first))
        while place < len(self._keys) and self._keys[place, 0] == first:
            if self._keys[place, 1] == second:
                return int(self._places[place, 0]), int(self._places[place, 1])
            place += 1
        return None

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            path = self.folder / self.settings.shards[number].file
            self._open[number] = Shard(path, self.layout, self._identity)
        self._open.move_to_end(number)
        return self._open[number]


class Recording:
    """A recording, opened to be read.

    Args:
        folder: of it.

    Raises:
        UserError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = read_description(folder)
        self.training = RecordedPart(folder, self.description, TRAINING)
        self.held_out = RecordedPart(folder, self.description, HELD_OUT)
