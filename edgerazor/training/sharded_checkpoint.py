"""The tensors of a checkpoint of several processes: each writes its own parts, and reads those that it needs.

torch.distributed.checkpoint says which parts these are, for as many processes as wrote and for any number that read.
Its files are those of its writer for Hugging Face's format, safetensors with the place of each part in the metadata,
since its usual ones are pickled. That writer lists its files nowhere, so `state.json` does, with their SHA-256: a part
that is missing would leave what a tensor had before, and nobody would be told.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    TensorStorageMetadata,
)

from edgerazor import devices
from edgerazor.errors import UserError, plain
from edgerazor.workdir import hash_file


class UnreadableError(Exception):
    """Files of a checkpoint cannot be used."""


def write(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write what each process has of some tensors; all processes have to call.

    Args:
        folder: on a disk that all of them have.
        tensors: by name, the same names on all of them; of one that is not sharded, one process writes the whole.

    Returns:
        name of a file -> its SHA-256, of all processes.

    Raises:
        UserError: a process could not write, on all of them.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        distributed_checkpoint.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise UserError(f"The checkpoint could not be written: {_reason(error)}.", "Is the disk full?") from None
    own = sorted(folder.glob(f"shard-{devices.process_index() + 1:05d}-*.safetensors"))
    digests = [(path.name, hash_file(path)) for path in own]
    return dict(digest for ours in devices.all_values(digests) for digest in ours)


def verify(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare the files with their digests; of several processes each reads some of them.

    Args:
        folder: of the checkpoint.
        digests: as `write` returned them.

    Raises:
        UnreadableError: which file is missing, not one of them, or damaged; on all processes.
    """
    others = {path.name for path in folder.glob("*.safetensors")} ^ digests.keys()
    problems = [f"{name} is {'missing' if name in digests else 'of something else'}" for name in sorted(others)]
    if not problems:
        some = devices.share_of(sorted(digests))
        damaged = [name for name in some if hash_file(folder / name) != digests[name]]
        all_damaged = [name for names in devices.all_values(damaged) for name in names]
        problems = [f"the checksum of {name} does not match" for name in all_damaged]
    if problems:
        raise UnreadableError(problems[0])


@contextmanager
def opened(folder: Path) -> Iterator[Reader]:
    """The tensors of a checkpoint, of one process or of several.

    Raises:
        UnreadableError: they cannot be read, in the block, too.
    """
    try:
        yield Reader(folder)
    except CheckpointException as error:
        raise UnreadableError(_reason(error)) from None


class Reader:
    """What is in the files of a checkpoint.

    Args:
        folder: of it.
    """

    def __init__(self, folder: Path) -> None:
        self._storage = HuggingFaceStorageReader(str(folder))
        #: Name of each tensor -> its whole shape.
        self.shapes = {
            name: value.size
            for name, value in self._storage.read_metadata().state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite tensors, or what this process has of them; all processes have to ask for the same ones."""
        no_others = devices.process_count() == 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no others are meant
            distributed_checkpoint.load(dict(tensors), storage_reader=self._storage, no_dist=no_others)


def _reason(error: CheckpointException) -> str:
    failures = [failure for failure, _ in error.failures.values()]
    return plain(failures[0] if failures else error).split("\n")[0].rstrip(".")
