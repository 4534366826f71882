"""The files of a recording: what is kept of each position that a loss counts, sequence after sequence.

A shard is a safetensors file that is written at once and never changed. Its tensors, for `P` positions of `R`
sequences:

    ids             uint8 [P, ⌈n·b/8⌉]        the kept tokens, in `b` bits each, those that are kept for certain first
    log_probs       uint8 [P, ⌈10·n/8⌉]       their log-probabilities, as levels (below) in 10 bits each
    certain         uint16 [P]                how many of them are kept for certain
    tail            float32 [P]               probability of all tokens but these
    scale           float32 [P]               `c`: `c·p^t` of another kept token is its `π` (`sampling.py`)
    entropy         float32 [P]               of the teacher's own distribution, in nats
    target          float32 [P]               log-probability of the token of the text
    hidden.L        int8 [P, H]               hidden state of layer L
    hidden.L.scale  float32 [P, H / 64]       scales of its groups of 64 features
    keys            uint8 [R, 16]             which sequences they are (`keys.py`)
    ends            int64 [R]                 positions up to the end of each sequence
    checks          uint8 [R, 8]              BLAKE2b of the bytes of each sequence in all tensors above, by name

A token takes as many bits as the vocabulary needs. The level `l` of 0 to 1023 stands for the log-probability
`-32·(l/1023)²`: from one to the next a probability changes by 1 % where it is 1/e, and by 3 % where it is `e⁻⁹`. Which
of the two next to it a probability becomes is left to chance, so that it is what it was on average. Held-out sequences,
whose KL divergence is to be exact, have ids of uint16 or uint32 and log-probabilities of uint16, in steps of 1/2048 nat
below 0; so had training sequences in the first version of the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgerazor.errors import UserError, plain
from edgerazor.recording.keys import KEY_BYTES
from edgerazor.workdir import write_atomically

#: Steps of a nat in which log-probabilities are stored: half a step is 0.024 % of a probability.
STEPS = 2048
#: Bits of a level, the last level, and the nats below 0 that it stands for.
LEVEL_BITS, LAST_LEVEL, LOWEST = 10, 1023, 32.0
#: Features of a hidden state that share one scale.
GROUP = 64
CHECK_BYTES = 8

#: What a shard keeps of one sequence, by the names of its tensors; the first axis is positions.
Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """What is kept of a position.

    Attributes:
        vocab_size: of the teacher.
        tokens: `n`, kept of each distribution.
        hidden_layers: whose hidden states are kept.
        hidden_size: `H`.
        compact: ids in as many bits as they need, and levels of log-probabilities.
    """

    vocab_size: int
    tokens: int
    hidden_layers: tuple[int, ...] = ()
    hidden_size: int = 0
    compact: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of a token, where they are as few as the vocabulary needs."""
        return max(1, (self.vocab_size - 1).bit_length())

    def columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape behind the axis of positions."""
        narrow = self.vocab_size <= 1 << 16
        columns: dict[str, tuple[type, tuple[int, ...]]] = {
            "ids": (np.uint16 if narrow else np.uint32, (self.tokens,)),
            "log_probs": (np.uint16, (self.tokens,)),
            "certain": (np.uint16, ()),
            **dict.fromkeys(("tail", "scale", "entropy", "target"), (np.float32, ())),
        }
        if self.compact:
            widths = {"ids": self.id_bits, "log_probs": LEVEL_BITS}
            columns |= {name: (np.uint8, (-(-self.tokens * bits // 8),)) for name, bits in widths.items()}
        for layer in self.hidden_layers:
            columns[f"hidden.{layer}"] = (np.int8, (self.hidden_size,))
            columns[f"hidden.{layer}.scale"] = (np.float32, (-(-self.hidden_size // GROUP),))
        return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in columns.items()}

    @property
    def position_bytes(self) -> int:
        """Bytes of a position."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.columns().values())

    def encode(self, ids: np.ndarray, log_probs: np.ndarray, chance: np.ndarray) -> Fields:
        """The tokens of some positions as they are stored.

        Args:
            ids: integers `[P, n]`.
            log_probs: float `[P, n]`, theirs.
            chance: float64 `[P]`, from 0 to below 1, by which probabilities are rounded up or down.
        """
        if not self.compact:
            return {"ids": ids.astype(self.columns()["ids"][0]), "log_probs": encode_log_probs(log_probs)}
        levels = encode_levels(log_probs, chance)
        return {"ids": pack_bits(ids, self.id_bits), "log_probs": pack_bits(levels, LEVEL_BITS)}

    def ids(self, fields: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tokens of some positions, unsigned `[P, n]`, of what is stored."""
        return unpack_bits(fields["ids"], self.id_bits, self.tokens) if self.compact else fields["ids"]

    def log_probs(self, fields: Mapping[str, np.ndarray]) -> np.ndarray:
        """Their log-probabilities, float32 `[P, n]`, of what is stored."""
        stored = fields["log_probs"]
        if self.compact:
            return decode_levels(unpack_bits(stored, LEVEL_BITS, self.tokens))
        return decode_log_probs(stored)


def tokens_within(vocab_size: int, position_bytes: int) -> int:
    """How many tokens of each distribution a compact position of at most so many bytes holds, at least 1."""
    layout = Layout(vocab_size, 0, compact=True)
    # the bits of either may end in the middle of a byte
    tokens = (8 * (position_bytes - layout.position_bytes) - 14) // (layout.id_bits + LEVEL_BITS)
    return max(1, tokens)


def pack_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Integers `[P, n]` below `2^bits` as uint8 `[P, ⌈n·bits/8⌉]`, the highest bit first."""
    wide = numbers.astype(">u4").view(np.uint8).reshape(*numbers.shape, 4)
    return np.packbits(np.unpackbits(wide, axis=2)[:, :, 32 - bits :].reshape(len(numbers), -1), axis=1)


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The same as uint32 `[P, count]`."""
    wide = np.zeros((len(packed), count, 32), dtype=np.uint8)
    wide[:, :, 32 - bits :] = np.unpackbits(packed, axis=1, count=count * bits).reshape(-1, count, bits)
    return np.packbits(wide, axis=2).view(">u4")[:, :, 0].astype(np.uint32)


def encode_levels(log_probs: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Log-probabilities `[P, n]` as levels, uint16 `[P, n]`, so that the mean of a probability is what it was.

    Args:
        log_probs: float, never above 0 but for the last digit.
        chance: float64 `[P]`, from 0 to below 1; the tokens of a position get numbers of their own from its own.
    """
    nats = np.clip(-log_probs.astype(np.float64), 0, LOWEST)
    above = np.minimum(np.floor(LAST_LEVEL * np.sqrt(nats / LOWEST)), LAST_LEVEL - 1)
    high, low = (np.exp(-LOWEST * np.square(level / LAST_LEVEL)) for level in (above, above + 1))
    # multiples of the golden ratio lie as evenly as numbers can
    golden = np.arange(1, log_probs.shape[1] + 1) * ((1 + np.sqrt(5)) / 2)
    falls = (high - np.exp(-nats)) / (high - low) > (chance[:, None] + golden) % 1
    return (above + falls).astype(np.uint16)


def decode_levels(levels: np.ndarray) -> np.ndarray:
    """The same as float32 log-probabilities."""
    return np.float32(-LOWEST) * np.square(levels.astype(np.float32) / np.float32(LAST_LEVEL))


def encode_log_probs(log_probs: np.ndarray) -> np.ndarray:
    """Log-probabilities as they are stored: uint16, never above 0, never below -32 nats."""
    return np.rint(np.clip(log_probs.astype(np.float64), -65535 / STEPS, 0) * -STEPS).astype(np.uint16)


def decode_log_probs(stored: np.ndarray) -> np.ndarray:
    """The same as float32."""
    return stored.astype(np.float32) / np.float32(-STEPS)


def encode_states(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states float32 `[P, H]` as int8 `[P, H]` and scales float32 `[P, groups]`."""
    count, size = states.shape
    padded = np.zeros((count, -(-size // GROUP), GROUP), dtype=np.float32)
    padded.reshape(count, -1)[:, :size] = states
    scales = np.abs(padded).max(axis=2) / np.float32(127)
    levels = np.rint(padded / np.maximum(scales, np.finfo(np.float32).tiny)[:, :, None])
    return levels.astype(np.int8).reshape(count, -1)[:, :size], scales


def decode_states(levels: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int8 `[P, H]` and scales `[P, groups]` as float32 `[P, H]`."""
    return levels.astype(np.float32) * np.repeat(scales, GROUP, axis=1)[:, : levels.shape[1]]


def write_shard(path: Path, sequences: Sequence[tuple[bytes, Fields]], layout: Layout, identity: str) -> None:
    """Write a shard; the same bytes for the same arguments.

    Args:
        path: of the file.
        sequences: keys, and what is kept of each.
        layout: of all of them.
        identity: of the recording that it belongs to.
    """
    tensors = {name: np.concatenate([fields[name] for _, fields in sequences]) for name in layout.columns()}
    tensors["ends"] = np.cumsum([len(fields["tail"]) for _, fields in sequences], dtype=np.int64)
    tensors["keys"] = np.frombuffer(b"".join(key for key, _ in sequences), np.uint8).reshape(-1, KEY_BYTES)
    checks = b"".join(check_of(fields) for _, fields in sequences)
    tensors["checks"] = np.frombuffer(checks, np.uint8).reshape(-1, CHECK_BYTES)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"recording": identity}))


def check_of(fields: Mapping[str, np.ndarray]) -> bytes:
    """The checksum of what is kept of a sequence."""
    digest = hashlib.blake2b(digest_size=CHECK_BYTES)
    for name in sorted(fields):
        digest.update(np.ascontiguousarray(fields[name]).tobytes())
    return digest.digest()


class Shard:
    """An open shard, of which nothing but the index is read yet.

    Args:
        path: of the file.
        layout: of the recording.
        identity: of the recording.

    Raises:
        UserError: the file is missing, damaged, or of another recording.
    """

    def __init__(self, path: Path, layout: Layout, identity: str) -> None:
        self.path, self.layout = path, layout
        try:
            self._file = safe_open(path, framework="np")
            metadata = self._file.metadata() or {}
            shapes = {name: self._file.get_slice(name).get_shape() for name in self._file.keys()}  # noqa: SIM118
            self.keys, self.ends, self._checks = (self._file.get_tensor(name) for name in ("keys", "ends", "checks"))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise damaged(path, plain(" ".join(str(error).split()), 200)) from None
        if metadata.get("recording") != identity:
            raise damaged(path, "it is of another recording")
        self._check_index(shapes)

    def _check_index(self, shapes: Mapping[str, Sequence[int]]) -> None:
        count = len(self.ends)
        ascending = (
            count > 0 and self.ends.dtype == np.int64 and self.ends[0] > 0 and bool((np.diff(self.ends) > 0).all())
        )
        positions = int(self.ends[-1]) if ascending else 0
        expected = {name: [positions, *shape] for name, (_, shape) in self.layout.columns().items()}
        expected |= {"keys": [count, KEY_BYTES], "ends": [count], "checks": [count, CHECK_BYTES]}
        if not ascending or {name: list(shape) for name, shape in shapes.items()} != expected:
            raise damaged(self.path, "its tensors do not agree with each other")

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def positions(self) -> int:
        """Positions of all its sequences."""
        return int(self.ends[-1])

    def key(self, row: int) -> bytes:
        """Which sequence the `row`-th is."""
        return bytes(self.keys[row].tobytes())

    def sequence(self, row: int) -> Fields:
        """What is kept of a sequence.

        Raises:
            UserError: it is not what was written.
        """
        begin, end = int(self.ends[row - 1]) if row else 0, int(self.ends[row])
        try:
            fields = {name: self._file.get_slice(name)[begin:end] for name in self.layout.columns()}
        except (OSError, SafetensorError, ValueError) as error:
            raise damaged(self.path, plain(error, 200)) from None
        types = {name: dtype for name, (dtype, _) in self.layout.columns().items()}
        if any(values.dtype != types[name] for name, values in fields.items()):
            raise damaged(self.path, "its numbers are of other types")
        if check_of(fields) != self._checks[row].tobytes():
            raise damaged(self.path, f"the checksum of its sequence {row} does not match")
        if int(self.layout.ids(fields).max(initial=0)) >= self.layout.vocab_size:
            raise damaged(self.path, "it names tokens that the vocabulary does not have")
        return fields

    def verify(self) -> None:
        """Read everything.

        Raises:
            UserError: something is not what was written.
        """
        for row in range(len(self)):
            self.sequence(row)


def damaged(path: Path, reason: str) -> UserError:
    """The sentence on a shard that cannot be used."""
    return UserError(
        f"The recording {path.parent} is damaged at {path.name}: {reason.rstrip('.')}.",
        "The `edgerazor record` command that wrote it makes again what is damaged.",
    )
