"""Which sequence a recorded one is: it is found again by what it says, in whatever order, batch or padding it comes.

Nothing of a sequence counts behind the last token that is to be predicted, so padding is no part of its key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from torch import Tensor

#: Bytes of a key.
KEY_BYTES = 16
#: Label of a position that no loss counts (the convention of PyTorch and transformers).
MASKED = -100


def sequence_key(input_ids: Tensor, labels: Tensor) -> bytes:
    """The key of a sequence, with or without padding, `KEY_BYTES` long.

    Args:
        input_ids: int64 `[T]`.
        labels: int64 `[T]`, -100 where nothing is to be predicted.
    """
    learned = (labels != MASKED).cpu().numpy()
    learned[:1] = False  # the first token is predicted from nothing
    length = int(np.flatnonzero(learned)[-1]) + 1 if learned.any() else 0
    ids = input_ids[:length].cpu().numpy().astype("<i4")
    return hashlib.blake2b(ids.tobytes() + np.packbits(learned[:length]).tobytes(), digest_size=KEY_BYTES).digest()


def order_digest(keys: Iterable[bytes]) -> str:
    """SHA-256, in hex, of sequences in their order."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key)
    return digest.hexdigest()


def random_numbers(key: bytes, seed: int, count: int) -> np.ndarray:
    """Numbers from 0 to below 1, one for each position of a sequence, float64 `[count]`; the same ones every time."""
    entropy = [seed, *np.frombuffer(key, dtype="<u4").tolist()]
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53)
