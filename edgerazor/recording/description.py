"""What a recording says of itself: `recording.json`, and whether it fits a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from edgerazor import untrusted
from edgerazor.errors import UserError, usage_error
from edgerazor.recording.shards import Layout
from edgerazor.workdir import digest_json

FILE = "recording.json"
#: The two parts of a recording, by the beginnings of the names of their files.
TRAINING, HELD_OUT = "training", "held-out"
#: What a recording covers that has each sequence of the text once.
EVERYTHING = "everything"
#: Most tokens of a distribution that can be kept: their number is stored in 16 bits.
MOST_TOKENS = 1 << 15
#: What has to be the same in a training, in the order in which it is looked at -> what a sentence calls it.
FITTING = {
    "tokenizer": "the tokenizer",
    "model": "the teacher",
    "teachers": "the further teachers",
    "data": "the text",
    "held_out": "the held-out text",
    "held_out_seed": "the seed that decides what is held out",
    "data.sequence_length": "the sequence length",
    "data.packing": "the packing of sequences",
    "data.bos": "where sequences begin with BOS",
    "data.template_kwargs": "what chat templates are given",
}


class ShardRecord(BaseModel):
    """A file of a recording: its sequences, their positions, its size and SHA-256."""

    model_config = ConfigDict(extra="forbid")

    file: str = Field(pattern=r"^(training|held-out)-[0-9]{5,}\.safetensors$")
    sequences: int = Field(ge=1)
    positions: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Part(BaseModel):
    """The training or the held-out sequences.

    Attributes:
        tokens: kept of each distribution.
        temperature: of these distributions.
        power: of the teacher's probabilities that the proposal of `sample` is proportional to.
        method: how tokens were chosen.
        hidden_layers: layers whose hidden states are kept.
        order: SHA-256 of all sequences in their order.
        shards: in the order of the sequences.
    """

    model_config = ConfigDict(extra="forbid")

    tokens: int = Field(ge=1, le=MOST_TOKENS)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    power: float = Field(gt=0, allow_inf_nan=False)
    method: Literal["sample", "top_k"]
    hidden_layers: tuple[int, ...] = ()
    order: str = ""
    shards: tuple[ShardRecord, ...] = ()

    @property
    def sequences(self) -> int:
        return sum(shard.sequences for shard in self.shards)

    @property
    def positions(self) -> int:
        return sum(shard.positions for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


class Description(BaseModel):
    """A whole recording; equal for equal teachers, texts and settings.

    Attributes:
        format: of the files; since the second version those of training sequences are compact.
        complete: everything that was asked for is there.
        covers: "everything", each sequence of the text once; or "seed N", the first tokens in the training order of
            that seed.
        inputs: what it depends on, as readable words and fingerprints.
        vocab_size: entries of the teacher's distributions.
        hidden_size: features of its hidden states.
        training, held_out: its parts.
        versions: of the programs that made it.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1, 2] = 2
    complete: bool
    covers: str
    inputs: dict[str, str]
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    training: Part
    held_out: Part
    versions: dict[str, str]

    def part(self, name: str) -> Part:
        """The part of a name."""
        return self.training if name == TRAINING else self.held_out

    def layout(self, name: str) -> Layout:
        """What the files of a part keep of a position."""
        part = self.part(name)
        compact = self.format > 1 and name == TRAINING
        return Layout(self.vocab_size, part.tokens, part.hidden_layers, self.hidden_size, compact)

    def identity(self, name: str) -> str:
        """What a file of a part has to agree with: all that decides its bytes."""
        settings = self.part(name).model_dump(mode="json", exclude={"order", "shards"})
        return digest_json([self.format, self.inputs, settings, self.vocab_size, self.hidden_size])

    def fingerprint(self) -> str:
        """Identity of the recording, every byte of it included."""
        return digest_json(self.model_dump(mode="json"))


def read_description(folder: Path) -> Description:
    """What the recording in a folder says of itself.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (folder / FILE).is_file():
        raise usage_error(f"{folder} is not a recording.", "Make one with `edgerazor record MODEL --data FILE`.")
    try:
        return untrusted.load_model(folder / FILE, Description)
    except (OSError, ValueError):
        raise UserError(f"{folder / FILE} is damaged.", "Record again into another folder.") from None


def check_fit(description: Description, folder: Path, inputs: Mapping[str, str], remake: str) -> None:
    """Refuse a recording of another teacher, tokenizer or text than a training has.

    Args:
        description: of the recording.
        folder: where it lies, for the message.
        inputs: of the training, by the names of `FITTING`.
        remake: the command that makes one that fits.

    Raises:
        UserError: it names the first thing that differs.
    """
    if not description.complete:
        raise usage_error(f"The recording {folder} is not finished.", "The same `edgerazor record` goes on with it.")
    for name, words in FITTING.items():
        then, now = description.inputs.get(name, "as usual"), inputs.get(name, "as usual")
        if then != now:
            raise usage_error(
                f"The recording {folder} does not fit: {words} was {shortened(then)} when it was made, and is "
                f"{shortened(now)} here.",
                f"Ask for the same here, or record what is wanted: `{remake}`.",
            )


def shortened(value: str) -> str:
    """A value for a sentence: hashes by their beginning."""
    text = " ".join(word[:12] if len(word.rstrip(",")) == 64 else word for word in value.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def counts(parts: Sequence[Part]) -> tuple[int, int]:
    """Positions and bytes of some parts."""
    return sum(part.positions for part in parts), sum(part.bytes for part in parts)
