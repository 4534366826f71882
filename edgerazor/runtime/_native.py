"""A packed model in the decoder of the native library: no Python and no torch between the tokens."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgerazor import integration, kernels
from edgerazor.errors import UserError, plain
from edgerazor.kernels import native
from edgerazor.kernels.decoder import Decoder, NotFiniteError, OtherProcessError, SequenceSpan, align_slot
from edgerazor.models import load_tokenizer
from edgerazor.packed import PackedModel
from edgerazor.runtime._base import Asked, Model, Score, Session, score_whole
from edgerazor.runtime._families import EMBEDDING, HEAD, family_of, matrix_names, network
from edgerazor.runtime._positions import Rotary, max_positions
from edgerazor.runtime._weights import load_matrices, matrix_bytes
from edgerazor.untrusted import vocabulary

#: Tokens that are computed in one call, as many as the decoder takes through its layers at a time.
CALL_TOKENS = 512
#: Tokens that greedy decoding has cells for at a time.
GREEDY_TOKENS = 256


#: What to do where memory or threads do not suffice.
LESS = "Use shorter sequences, fewer threads, or a smaller model."


class _Scratch:
    """What a process computes logits and scores with."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.decoder: Decoder | None = None


class NativeModel(Model):
    """A packed model that the native decoder computes.

    Args:
        packed: of a folder.
        config: of transformers.
        threads: that compute.
        mapped: use the weights where the file is mapped.

    Raises:
        NotNativeError: it cannot be.
        UserError: the folder is damaged.
    """

    engine = "native"
    note = None

    def __init__(self, packed: PackedModel, config: Any, threads: int, mapped: bool) -> None:
        settings = getattr(config, "quantization_config", None) or {}
        integration.check_settings(SimpleNamespace(**settings), packed)
        family = family_of(config, packed)
        self.folder, self.threads = packed.folder, threads
        self._kernel = kernels.name()
        matrices = load_matrices(packed, matrix_names(config, packed), mapped, self._kernel in kernels.EXPANDED)
        with _plainly(packed):
            self.rotary = Rotary(config, family.rotary)
            self.network = network(config, family, packed, matrices, self.rotary.features)
            self.network.check()
        self.tokenizer = load_tokenizer(packed.folder)
        vocabulary.limit(self.tokenizer, self.network.vocab_size)
        self.vocabulary, self.max_positions = self.network.vocab_size, max_positions(config)
        self.cache_bytes_per_token = self.network.kv_slot_bytes()
        sizes = {name: matrix_bytes(matrix) for name, matrix in matrices.items()}
        others = sum(tensor.nbytes for tensor in packed.others().values())
        self.weight_bytes = sum(sizes.values()) + others
        self.bytes_per_token = self.weight_bytes - (0 if HEAD in packed.header.tied else sizes[EMBEDDING])
        self._own = _Scratch()

    @property
    def kernel(self) -> str:
        return self._kernel

    def session(self) -> NativeSession:
        return NativeSession(self)

    def decoder(self) -> Decoder:
        """A decoder with a cache of its own; the weights are shared."""
        with self.plainly():
            return Decoder(self.network, self.threads, native.isas().index(self._kernel))

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Decoder]:
        """What computes logits and scores, for one thread at a time; its cache is of no use afterwards."""
        if self._own.process != os.getpid():  # a child has neither the threads nor those that hold the lock
            self._own = _Scratch()
        own = self._own
        with own.lock, self.plainly():
            own.decoder = own.decoder or self.decoder()
            yield own.decoder

    def _logits(self, tokens: Tensor, last: int) -> Tensor:
        count, length = tokens.shape
        at_once = max(1, CALL_TOKENS // length)
        with self._scratch() as decoder:
            found = torch.empty(count, last, self.vocabulary)
            prepare(decoder, self.rotary, 0, length, at_once * align_slot(length))
            for start in range(0, count, at_once):
                some = tokens[start : start + at_once]
                runs = [SequenceSpan(0, 0, row * align_slot(length), 0, length) for row in range(len(some))]
                wanted = torch.arange(some.numel()).view(some.shape)[:, -last:].flatten()
                logits = decoder.logits(runs, some.flatten(), wanted)
                if not np.isfinite(logits.numpy()).all():  # NumPy's: torch's threads would spin beside ours
                    raise NotFiniteError("a logit is not finite")
                found[start : start + at_once] = logits.view(len(some), last, self.vocabulary)
        return found

    def _score(self, requests: list[Asked]) -> list[list[Score]]:
        long = [self.rotary.varies(_length(request)) for request in requests]
        whole = iter(score_whole([each for each, is_long in zip(requests, long, strict=True) if is_long], self._logits))
        packed = iter(self._score_packed([each for each, is_long in zip(requests, long, strict=True) if not is_long]))
        return [next(whole if is_long else packed) for is_long in long]

    def _score_packed(self, requests: list[Asked]) -> list[list[Score]]:
        """Scores of requests whose frequencies depend on positions alone, so that continuations share prefixes."""
        found: list[list[Score]] = []
        with self._scratch() as decoder:
            for some, kept in _calls(requests):
                call = _Call(some, kept)
                prepare(decoder, self.rotary, 0, max(map(_length, some)), call.cells)
                first, *others = call.scores(decoder)
                if kept:
                    found[-1] += first
                else:
                    found += [first, *others]
        return found

    @contextlib.contextmanager
    def plainly(self) -> Iterator[None]:
        """Turns what the kernels say into errors for people."""
        try:
            yield
        except NotFiniteError:
            raise UserError(
                f"{self.folder} computes numbers that are infinite or none at all.",
                "Its weights are of no use; distill it again with a lower learning rate.",
            ) from None
        except OtherProcessError:
            raise UserError(
                "A session belongs to the process that began it, and this is another one, a fork of it.",
                "Begin a new session in this process: `model.session()`.",
            ) from None
        except MemoryError as error:
            raise UserError(f"{plain(error)}.".capitalize(), LESS) from None
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):  # torch's MemoryError
                raise
            raise UserError("There is not enough memory for so many logits.", LESS) from None


class NativeSession(Session):
    """A sequence with a decoder, and so a cache, of its own."""

    model: NativeModel

    def __init__(self, model: NativeModel) -> None:
        super().__init__(model)
        self._decoder = model.decoder()

    def _compute(self, start: int, tokens: list[int]) -> Tensor:
        return self._feed(start, tokens, [len(tokens) - 1])[0]

    def _greedy(self, start: int, tokens: list[int], count: int, stops: Collection[int]) -> list[int]:
        last = start + len(tokens) - 1
        count = min(count, GREEDY_TOKENS)
        if self.model.rotary.varies(last + count):
            return super()._greedy(start, tokens, count, stops)
        if len(tokens) > 1:
            self._feed(start, tokens[:-1], [])
        with self.model.plainly():
            prepare(self._decoder, self.model.rotary, last, last + count, last + count)
            return self._decoder.greedy(SequenceSpan(0, 0, 0, last, 1), tokens[-1], count, sorted(stops))

    def _feed(self, start: int, tokens: list[int], wanted: list[int]) -> Tensor:
        end = start + len(tokens)
        with self.model.plainly():
            prepare(self._decoder, self.model.rotary, start, end, end)
            return self._decoder.logits([SequenceSpan(0, 0, 0, start, len(tokens))], tokens, wanted)


def prepare(decoder: Decoder, rotary: Rotary, start: int, length: int, cells: int) -> None:
    """Make a decoder ready for a call with positions `start` to `length`, in so many cells."""
    decoder.set_rope(*rotary.tables(start, length))
    decoder.reserve(cells)


# Scores -------------------------------------------------------------------------------------------------------------


def _length(request: Asked) -> int:
    """Tokens of the longest sequence that a request computes; the last ones of continuations are not read."""
    return len(request.prefix) + max((len(each) - 1 for each in request.continuations), default=0)


def _calls(requests: list[Asked]) -> Iterator[tuple[list[Asked], bool]]:
    """Requests that are computed together, as many as there is room for; those with no room alone in pieces.

    A piece says so when the cells of the call before hold its prefix, but for the last token.
    """
    some: list[Asked] = []
    taken = 0
    for request in requests:
        pieces = list(_pieces(request))
        size = len(request.prefix) + _tokens(request.continuations)
        if some and (len(pieces) > 1 or taken + size > CALL_TOKENS):
            yield some, False
            some, taken = [], 0
        if len(pieces) > 1:
            yield from (([piece], number > 0) for number, piece in enumerate(pieces))
        else:
            some, taken = [*some, request], taken + size
    if some:
        yield some, False


def _pieces(request: Asked) -> Iterator[Asked]:
    """A request with some of its continuations at a time, but at least one."""
    start, taken = 0, len(request.prefix)
    bodies: set[tuple[int, ...]] = set()
    for index, tokens in enumerate(request.continuations):
        body = tuple(tokens[:-1])
        new = 0 if body in bodies else len(body)
        if taken + new > CALL_TOKENS and index > start:
            yield Asked(request.prefix, request.continuations[start:index], request.counts[start:index])
            start, taken, new = index, 1, len(body)
            bodies = set()
        taken += new
        bodies.add(body)
    yield Asked(request.prefix, request.continuations[start:], request.counts[start:])


def _tokens(continuations: list[list[int]]) -> int:
    """That are computed: not the last ones, and once where all but the last are equal."""
    return sum(map(len, {tuple(each[:-1]) for each in continuations}))


class _Asked(NamedTuple):
    """After which token of a call which one is asked for, and for which continuation."""

    after: int
    target: int
    score: tuple[int, int]


class _Call:
    """One call of the decoder: prefixes, and behind each the runs of its continuations, which see it.

    Args:
        requests: of the call.
        kept: the first cells already hold the first prefix but for its last token, after which is asked.

    The first token of a continuation follows the last one of the prefix, and nothing follows its own last token: a
    continuation of one token has no run, and those that differ in their last tokens share one.
    """

    def __init__(self, requests: list[Asked], kept: bool) -> None:
        self.runs: list[SequenceSpan] = []
        self.tokens: list[int] = []
        self.asked: list[_Asked] = []
        self.cells = 0
        self.sizes = [len(request.continuations) for request in requests]
        for number, request in enumerate(requests):
            self._add(number, request, kept and number == 0)

    def _add(self, number: int, request: Asked, kept: bool) -> None:
        prefix, continuations, counts = request
        if not continuations:
            return
        cell, _ = self._run(0, 0, prefix, len(prefix) - 1 if kept else 0)
        last = len(self.tokens) - 1
        firsts: dict[tuple[int, ...], int] = {}  # tokens of a run -> its first token's number
        for index, (tokens, count) in enumerate(zip(continuations, counts, strict=True)):
            body = tuple(tokens[:-1])
            if body and body not in firsts:
                firsts[body] = self._run(cell, len(prefix), tokens[:-1])[1]
            places = [last, *range(firsts[body], firsts[body] + len(body))] if body else [last]
            asked = list(zip(places, tokens, strict=True))[-count:]
            self.asked += [_Asked(place, target, (number, index)) for place, target in asked]

    def _run(self, prefix_cell: int, prefix: int, tokens: list[int], own: int = 0) -> tuple[int, int]:
        """Adds a run of the tokens behind `own` that its cells hold; its cell, and the number of its first token."""
        place = self.cells, len(self.tokens)
        self.runs.append(SequenceSpan(prefix_cell, prefix, self.cells, own, len(tokens) - own))
        self.tokens += tokens[own:]
        self.cells += align_slot(len(tokens))
        return place

    def scores(self, decoder: Decoder) -> list[list[Score]]:
        """By request and continuation."""
        found = [[Score(0.0, True)] * count for count in self.sizes]
        if not self.asked:
            return found
        after, targets = [each.after for each in self.asked], [each.target for each in self.asked]
        chances, best = decoder.scores(self.runs, self.tokens, after, targets)
        for asked, chance, token in zip(self.asked, chances.tolist(), best.tolist(), strict=True):
            number, index = asked.score
            before = found[number][index]
            found[number][index] = Score(before.log_probability + chance, before.greedy and token == asked.target)
        return found


@contextlib.contextmanager
def _plainly(packed: PackedModel) -> Iterator[None]:
    """What a configuration that is not one leads to, in a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().split("\n")
        reason = plain(lines[0].rstrip(".") or type(error).__name__)
        raise UserError(f"The packed model {packed.folder} cannot be loaded: {reason}.") from None
