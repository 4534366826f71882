"""Recordings of a teacher: what the losses need of its outputs, kept in a folder, so that trainings do without it.

A recording is a folder of shards (`shards.py`) and `recording.json`, which says what it is of (`description.py`). It
knows sequences by what they say (`keys.py`) and not by the step that they come in, so that one recording serves every
budget, batch and seed that the same sequences are trained on with.
"""

from edgerazor.recording.description import (
    EVERYTHING,
    FILE,
    HELD_OUT,
    TRAINING,
    Description,
    Part,
    ShardRecord,
    check_fit,
    counts,
    read_description,
    shortened,
)
from edgerazor.recording.folder import RecordedPart, Recording
from edgerazor.recording.keys import order_digest, random_numbers, sequence_key
from edgerazor.recording.sampling import TokenSample, sample_tokens, top_tokens
from edgerazor.recording.shards import (
    Fields,
    Layout,
    Shard,
    decode_states,
    encode_states,
    tokens_within,
    write_shard,
)

__all__ = [
    "EVERYTHING",
    "FILE",
    "HELD_OUT",
    "TRAINING",
    "Description",
    "Fields",
    "Layout",
    "Part",
    "RecordedPart",
    "Recording",
    "Shard",
    "ShardRecord",
    "TokenSample",
    "check_fit",
    "counts",
    "decode_states",
    "encode_states",
    "order_digest",
    "random_numbers",
    "read_description",
    "sample_tokens",
    "sequence_key",
    "shortened",
    "tokens_within",
    "top_tokens",
    "write_shard",
]
