"""Engines under measurement: each loads its model in a process of its own and answers on a connection.

So load time and peak memory are an engine's alone, and the threads of one never meet those of another: an engine
computes only while it is asked, and one is asked at a time.
"""

from __future__ import annotations

import base64
import functools
import io
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edgerazor import data, kernels, models, runtime, transformers_plugin
from edgerazor.data import PictureTokens
from edgerazor.errors import UserError
from edgerazor.pictures import PictureReader
from edgerazor.recipe import Bench
from edgerazor.runtime import Model, Session, TransformersModel, max_positions

#: `tower`: from pixels to features, in tokens that a picture takes; `picture prefill`: a prompt with a picture.
Phase = Literal["prefill", "decode", "tower", "picture prefill"]
#: Pixels of each side of the picture that is measured with.
PICTURE = 448


class Speed(NamedTuple):
    """Tokens per second of one round; `context` tokens were in the cache before."""

    phase: Phase
    context: int
    rate: float


@dataclass(frozen=True)
class EngineConfig:
    """What a process loads.

    Attributes:
        folder: a packed model, or one in 16 bits.
        threads: to load and to compute with.
        mmap: read weights in place.
        isa: the kernels' instruction set; None for the one that would be chosen anyway.
    """

    folder: Path
    threads: int
    mmap: bool = False
    isa: str | None = None


@dataclass(frozen=True)
class Round:
    """What is measured: a prompt of `prefill` tokens, then `decode` tokens behind each of `contexts` tokens."""

    threads: int
    prefill: int
    decode: int
    contexts: tuple[int, ...]

    @classmethod
    def of(cls, settings: Bench, threads: int, limit: int) -> Round:
        """The recipe's, as far as a sequence may have `limit` tokens."""
        contexts = tuple(context for context in settings.contexts if max(context, 1) + settings.decode_tokens < limit)
        return cls(threads, min(settings.prefill_tokens, limit), settings.decode_tokens, contexts)


# --- the process that asks ---------------------------------------------------------------------


@contextmanager
def worker(config: EngineConfig) -> Iterator[Connection]:
    """A process that has loaded a model; ask it for a `Round`, or to `describe` itself."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, config), daemon=True)
    process.start()
    there.close()
    try:
        ask(here, "load")
        yield here
    finally:
        here.close()
        process.join(timeout=5)
        if process.is_alive():
            process.terminate()


def ask(link: Connection, request: Any) -> Any:
    """Send a request and wait for the answer.

    Raises:
        UserError: the engine failed, with its reason.
    """
    try:
        link.send(request)
        answer = link.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise UserError("A benchmark process ended by itself; it probably ran out of memory.") from None
    if isinstance(answer, UserError):
        raise answer
    if isinstance(answer, Exception):
        raise UserError(f"A benchmark process failed: {type(answer).__name__}: {answer}.")
    return answer


# --- the process that answers ------------------------------------------------------------------


def serve(link: Connection, config: EngineConfig) -> None:
    """Load, then measure and describe when asked."""
    if config.isa is not None:
        os.environ[kernels.VARIABLE] = config.isa
    served: Served | None = None
    while True:
        try:
            request = link.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if request == "load":
                served = Served(config)
                link.send("loaded")
                continue
            assert served is not None
            link.send(served.describe() if request == "describe" else served.measure(request))
        except Exception as error:  # becomes one sentence in the process that asked
            link.send(error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}"))


class UnpackedModel(TransformersModel):
    """A model that is not packed, in transformers and in the dtype of its files."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads, self.note = folder, threads, None
        self.model, self.tokenizer = models.load(folder)
        config = self.model.config.get_text_config()
        self.vocabulary, self.max_positions = config.vocab_size, max_positions(config)
        self.weight_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        tied = embedding.weight is head.weight
        self.bytes_per_token = self.weight_bytes - (0 if tied else embedding.weight.nbytes) - self._unchosen_bytes()
        self.cache_bytes_per_token = cached_numbers(config.to_dict()) * self.model.dtype.itemsize

    def _unchosen_bytes(self) -> int:
        """Bytes of experts that a token is not sent to; of a mixture that is not understood, all of it is read."""
        try:
            linears = models.structure(self.model).linears
        except UserError:
            return 0
        sizes = ((1 - linear.token_share) * linear.weights for linear in linears)
        return round(sum(sizes) * self.model.dtype.itemsize)

    @functools.cached_property
    def pictures(self) -> PictureReader | None:
        if not models.sees(self.config):
            return None
        return PictureReader(self.folder, lambda: self.model, str(self.folder))

    @property
    def kernel(self) -> str:
        return f"transformers {str(self.model.dtype).removeprefix('torch.')}"


def cached_numbers(config: Mapping[str, Any]) -> int:
    """Numbers that a token adds to the keys and values of all layers, by a text model's configuration."""
    heads = config["num_attention_heads"]
    width: int = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads: int = config.get("num_key_value_heads") or heads
    return 2 * int(config["num_hidden_layers"]) * kv_heads * width


class Served:
    """A loaded model and its measurements; sequences of long contexts are kept from round to round."""

    def __init__(self, config: EngineConfig) -> None:
        self.start_memory = peak_memory()
        self.contexts: dict[int, Session] = {}
        began = time.perf_counter()
        self.model: Model
        if transformers_plugin.is_packed(config.folder):
            self.model = runtime.load(config.folder, config.threads, config.mmap)
        else:
            self.model = UnpackedModel(config.folder, config.threads)
        self.prompt = self.model.session()
        self.prompt.feed([0])  # what is read at its first use counts
        self.load_seconds = time.perf_counter() - began
        self.folder = config.folder
        self.warm = False

    def describe(self) -> dict[str, Any]:
        """What is known of the model, and what it took."""
        model = self.model
        return {
            "engine": model.engine,
            "kernel": model.kernel,
            "note": model.note,
            "max_positions": model.max_positions,
            "weight_bytes": sum(file.stat().st_size for file in self.folder.glob("*.safetensors")),
            "bytes_per_token": model.bytes_per_token,
            "cache_bytes_per_token": model.cache_bytes_per_token,
            "load_seconds": round(self.load_seconds, 3),
            "peak_memory_bytes": peak_memory(),
            "start_memory_bytes": self.start_memory,
        }

    def measure(self, workload: Round) -> list[Speed]:
        """One round; a packed model computes with the threads that it was loaded with."""
        if self.model.engine != "native":
            self.model.threads = workload.threads
        if not self.warm:
            self._prefill(workload.prefill)
            self.warm = True
        speeds = [Speed("prefill", 0, self._prefill(workload.prefill)), *self._seeing()]
        return speeds + [
            Speed("decode", context, self._decode(context, workload.decode)) for context in workload.contexts
        ]

    def _prefill(self, count: int) -> float:
        """Tokens of a prompt per second."""
        self.prompt.rewind(0)
        began = time.perf_counter()
        self.prompt.feed(self._ids(0, count))
        return count / (time.perf_counter() - began)

    def _seeing(self) -> list[Speed]:
        """The speeds of tower and prefill with a picture; none of a model that sees none, or has no processor here."""
        if self.picture is None:
            return []
        made, reader = self.picture, self.model.pictures
        assert reader is not None
        began = time.perf_counter()
        count = len(models.features_of(reader.model, made.inputs).rows)
        looked = time.perf_counter() - began
        ids = reader.tokens(made)
        if len(ids) >= self.model.max_positions:
            return [Speed("tower", 0, count / looked)]
        self.prompt.rewind(0)
        began = time.perf_counter()
        self.prompt.feed(ids)
        return [
            Speed("tower", 0, count / looked),
            Speed("picture prefill", 0, len(ids) / (time.perf_counter() - began)),
        ]

    @functools.cached_property
    def picture(self) -> PictureTokens | None:
        """A prompt with a grey picture, as the model's processor makes it."""
        if self.model.pictures is None or not models.has_processor(self.folder):
            return None
        file = io.BytesIO()
        from PIL import Image  # of an extra that only those need who have such models

        Image.new("RGB", (PICTURE, PICTURE), (128, 128, 128)).save(file, "PNG")
        part = {"type": "image", "base64": base64.b64encode(file.getvalue()).decode()}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is in the picture?"}]}]
        conversation = data.parse_conversation("The prompt", messages)
        return data.prompt_with_pictures(conversation, self.model.pictures.processor)

    def _decode(self, context: int, count: int) -> float:
        """Tokens per second when `context` tokens are in the cache (one, where 0 is asked: something must start)."""
        if context not in self.contexts:
            self.contexts[context] = self.model.session()
        session, context = self.contexts[context], max(context, 1)
        session.rewind(min(session.position, context - 1))
        session.feed(self._ids(session.position, context))
        began = time.perf_counter()
        session.greedy(count + 1)  # the first of them is known
        return count / (time.perf_counter() - began)

    def _ids(self, start: int, end: int) -> list[int]:
        return [place * 7919 % self.model.vocabulary for place in range(start, end)]


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux's getrusage counts what the parent held before the process was started, so its own mark is read instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
