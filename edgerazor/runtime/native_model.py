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

from edgerazor import kernels, models, transformers_plugin
from edgerazor.errors import UserError, plain
from edgerazor.kernels import native
from edgerazor.kernels.decoder import (
    NO_STATE,
    Decoder,
    NotFiniteError,
    OtherProcessError,
    SequenceSpan,
    align_slot,
)
from edgerazor.models import load_tokenizer
from edgerazor.packed import PackedModel, decoder_of
from edgerazor.runtime.chosen_experts import unchosen_bytes
from edgerazor.runtime.engine import Model, Session
from edgerazor.runtime.network import NotNativeError, build_network, matrix_names, native_architecture, tables
from edgerazor.runtime.picture_prompts import AHEAD, PicturePositions, PicturePrefix
from edgerazor.runtime.rope import Rotary, max_positions
from edgerazor.runtime.scoring import Score, ScoreRequest, score_whole
from edgerazor.runtime.weight_memory import load_matrices, matrix_bytes
from edgerazor.untrusted import vocabulary

#: Tokens that are computed in one call, as many as the decoder takes through its layers at a time.
CALL_TOKENS = 512
#: Positions of a session whose states are kept to go back to.
KEPT_STATES = 4
#: Tokens that are decoded until a state is kept again; as many, at most, are computed again to go back.
KEPT_TOKENS = 64
#: State slots of a call that computes scores: of a prefix but for its last token, of the prefix, of a continuation.
_CALL_STATES = 3
#: Tokens that greedy decoding reserves KV slots for at a time.
GREEDY_TOKENS = 256
#: What to do where memory or threads do not suffice.
LESS = "Use shorter sequences, fewer threads, or a smaller model."


class _SharedDecoder:
    """The decoder that a process computes logits and scores with; its KV cache is of no use between two calls."""

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
        mapped: read the weights in place, from the mapped file.

    Raises:
        NotNativeError: the native engine does not compute it.
        UserError: the folder is damaged.
    """

    engine = "native"
    note = None

    def __init__(self, packed: PackedModel, config: Any, threads: int, mapped: bool) -> None:
        settings = getattr(config, "quantization_config", None) or {}
        transformers_plugin.check_settings(SimpleNamespace(**settings), packed)
        whole, config = config, config.get_text_config()
        packed = decoder_of(packed)
        with _configuration_errors(packed):
            if "token_type_ids" in models.input_names(whole):
                raise NotNativeError("the tokens of a picture see one another, for which there is no native code")
            architecture = native_architecture(config, packed)
            if whole is not config and architecture.layer_inputs(config) is not None:
                raise NotNativeError("pictures have no inputs of single layers in native code")
            names = matrix_names(config, architecture, packed)
            unread_tables = tables(config, architecture, packed)
        self.folder, self.threads = packed.folder, threads
        self._kernel = kernels.name()
        matrices = load_matrices(packed, names, mapped, self._kernel in kernels.EXPANDED)
        with _configuration_errors(packed):
            scaling = architecture.query_scaling(config) if architecture.query_scaling else None
            widths = [architecture.kv_heads(config, layer).width for layer in range(config.num_hidden_layers)]
            self.rotary = Rotary(config, architecture.rotary_class, architecture.rope_table, scaling, widths)
            self.network = build_network(config, architecture, packed, matrices, self.rotary)
            self.network.check()
            self.positions = PicturePositions(whole, self.rotary)
        self.tokenizer = load_tokenizer(packed.folder)
        vocabulary.limit(self.tokenizer, self.network.vocab_size)
        self.has_states = self.network.has_states
        self.vocabulary, self.max_positions = self.network.vocab_size, max_positions(config)
        self.cache_bytes_per_token = self.network.kv_slot_bytes()
        sizes = {name: matrix_bytes(matrix) for name, matrix in matrices.items()}
        others = sum(tensor.nbytes for tensor in packed.others().values())
        self.weight_bytes = sum(sizes.values()) + others
        unread = unchosen_bytes(sizes, config) + sum(sizes[name] for name in unread_tables)  # but for a row of each
        self.bytes_per_token = self.weight_bytes - unread
        self._shared = _SharedDecoder()

    @property
    def kernel(self) -> str:
        return self._kernel

    def session(self) -> NativeSession:
        return NativeSession(self)

    def decoder(self) -> Decoder:
        """A new decoder with a KV cache of its own; the weights are shared."""
        with self.errors_for_people():
            return Decoder(self.network, self.threads, native.isas().index(self._kernel))

    @contextlib.contextmanager
    def _shared_decoder(self) -> Iterator[Decoder]:
        """The decoder for logits and scores, for one thread at a time; its KV cache is of no use afterwards."""
        if self._shared.process != os.getpid():  # a forked child has neither the threads nor those that hold the lock
            self._shared = _SharedDecoder()
        shared = self._shared
        with shared.lock, self.errors_for_people():
            shared.decoder = shared.decoder or self.decoder()
            if self.has_states:
                shared.decoder.reserve_states(_CALL_STATES)
            yield shared.decoder

    def _logits(self, tokens: Tensor, last: int) -> Tensor:
        count, length = tokens.shape
        at_once = 1 if self.positions.differ(tokens) else max(1, CALL_TOKENS // length)
        with self._shared_decoder() as decoder:
            logits = torch.empty(count, last, self.vocabulary)
            prepare(decoder, self.rotary, 0, length, at_once * align_slot(length))
            for start in range(0, count, at_once):
                batch = tokens[start : start + at_once]
                if self.positions.differ(batch):
                    decoder.set_rope(*self.positions.tables(batch[0].tolist(), length))
                batch = with_features(decoder, batch, self.tower)
                spans = [SequenceSpan(0, 0, row * align_slot(length), 0, length) for row in range(len(batch))]
                output_positions = torch.arange(batch.numel()).view(batch.shape)[:, -last:].flatten()
                of_batch = decoder.logits(spans, batch.flatten(), output_positions)
                if not np.isfinite(of_batch.numpy()).all():  # NumPy's: torch's threads would spin beside ours
                    raise NotFiniteError("a logit is not finite")
                logits[start : start + at_once] = of_batch.view(len(batch), last, self.vocabulary)
        return logits

    def _score(self, requests: list[ScoreRequest]) -> list[list[Score]]:
        long = [self.rotary.varies(_length(request)) or _has_pictures(request) for request in requests]
        apart = [request for request, is_long in zip(requests, long, strict=True) if is_long]
        together = [request for request, is_long in zip(requests, long, strict=True) if not is_long]
        of_apart, of_together = iter(score_whole(apart, self._logits)), iter(self._score_shared_prefixes(together))
        return [next(of_apart if is_long else of_together) for is_long in long]

    def _score_shared_prefixes(self, requests: list[ScoreRequest]) -> list[list[Score]]:
        """Scores of requests whose frequencies depend on positions alone, so that continuations share prefixes."""
        scores: list[list[Score]] = []
        with self._shared_decoder() as decoder:
            for batch, prefix_is_cached in _calls(requests):
                call = _Call(batch, prefix_is_cached, self.has_states)
                prepare(decoder, self.rotary, 0, max(map(_length, batch)), call.slots)
                first, *others = call.scores(decoder)
                if prefix_is_cached:
                    scores[-1] += first
                else:
                    scores += [first, *others]
        return scores

    @contextlib.contextmanager
    def errors_for_people(self) -> Iterator[None]:
        """Turns exceptions of the kernels and of torch's allocator into a `UserError`."""
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
    """A sequence with a decoder, and so a KV cache, of its own."""

    model: NativeModel

    def __init__(self, model: NativeModel) -> None:
        super().__init__(model)
        self._decoder = model.decoder()
        self._pictures = PicturePrefix()
        self._rope: tuple[Tensor, ...] = ()  # of a sequence whose positions differ
        self._states = _SessionStates(self._decoder) if model.has_states else None

    def _compute(self, start: int, tokens: list[int]) -> Tensor:
        return self._feed(start, tokens, [len(tokens) - 1])[0]

    def _greedy(self, start: int, tokens: list[int], count: int, stops: Collection[int]) -> list[int]:
        last = start + len(tokens) - 1
        count = min(count, GREEDY_TOKENS)
        if self.model.rotary.varies(last + count):
            return super()._greedy(start, tokens, count, stops)
        if len(tokens) > 1 or (self._states and self._states.position(last) < last):
            self._feed(start, tokens[:-1], [])
        with self.model.errors_for_people():
            self._prepare(last, tokens[-1:], last + count)
            span = self._span(last, 1)
            written = self._decoder.greedy(span, tokens[-1], count, sorted(stops))
        if self._states:
            self._states.advance(last + len(written))
        return written

    def _feed(self, start: int, tokens: list[int], output_positions: list[int]) -> Tensor:
        end = start + len(tokens)
        if self._states and (known := self._states.position(start)) < start:  # the state after them is forgotten
            tokens = [*self.ids[known:start], *tokens]
            output_positions = [position + start - known for position in output_positions]
            start = known
        if not tokens:
            return torch.empty(0, self.model.vocabulary)
        with self.model.errors_for_people():
            self._prepare(start, tokens, end)
            given = with_features(self._decoder, torch.tensor(tokens), self.model.tower)
            logits = self._decoder.logits([self._span(start, len(tokens))], given, output_positions)
        if self._states:
            self._states.advance(end, keep=len(tokens) > 1)
        return logits

    def _prepare(self, start: int, tokens: list[int], length: int) -> None:
        """Make the decoder ready for tokens from `start` on, and text behind them, of a sequence of this length."""
        prepare(self._decoder, self.model.rotary, start, length, length)
        if not self.model.positions.depend_on_pictures:
            return
        if self._pictures.follow(self.ids, start, tokens):
            self._rope = ()
        if not self._pictures.ids:
            return
        if not self._rope or length > len(self._rope[0]):
            self._rope = self.model.positions.tables(self._pictures.ids, length + AHEAD)
        self._decoder.set_rope(*self._rope)

    def _span(self, start: int, count: int) -> SequenceSpan:
        """New tokens, from a position on whose state is known where there are states."""
        state = self._states.take(start) if self._states else NO_STATE
        return SequenceSpan(0, 0, 0, start, count, state, 0)


class _SessionStates:
    """The states of a session's sequence, in the state slots of its decoder.

    Slot 0 has the state after the newest token. A state cannot be cut off like keys and values: so that a sequence can
    go back, for a stop string or another turn of a chat, the states at the ends of the last pieces that were read are
    kept, too, and those of some positions in between. What is between such a position and the one that it goes back to
    is computed again.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        decoder.reserve_states(1 + KEPT_STATES)
        self._newest = 0  # the position after the tokens that slot 0 has seen
        self._kept: dict[int, int] = {}  # such positions -> state slot

    def position(self, start: int) -> int:
        """The last position, up to `start`, at which the state is known; tokens from `start` on are forgotten."""
        self._kept = {position: slot for position, slot in self._kept.items() if position <= start}
        return max(position for position in (0, *self._kept, self._newest) if position <= start)

    def take(self, position: int) -> int:
        """The slot of the state at a position that `position` gave; slot 0 is about to be overwritten."""
        known = NO_STATE if position == 0 else 0 if position == self._newest else self._kept[position]
        if position == self._newest and position >= max(self._kept, default=0) + KEPT_TOKENS:
            self._keep(position)
        self._newest = 0  # unknown until `advance`
        return known

    def advance(self, position: int, keep: bool = False) -> None:
        """Slot 0 has the state at this position now; `keep` it."""
        self._newest = position
        if keep:
            self._keep(position)

    def _keep(self, position: int) -> None:
        if position in self._kept:
            return
        free = set(range(1, 1 + KEPT_STATES)) - set(self._kept.values())
        slot = min(free) if free else self._kept.pop(min(self._kept))
        self._decoder.copy_state(0, slot)
        self._kept[position] = slot


def prepare(decoder: Decoder, rotary: Rotary, start: int, length: int, slots: int) -> None:
    """Make a decoder ready for a call with positions `start` to `length`, in so many KV slots."""
    decoder.set_rope(*rotary.tables(start, length))
    decoder.reserve(slots)


def with_features(decoder: Decoder, tokens: Tensor, tower: str = "") -> Tensor:
    """Tokens as the decoder takes them in its next call, with the features of those that are of pictures set."""
    if not models.has_pictures(tokens):
        return tokens
    mask = models.picture_mask(tokens)
    gathered = models.PICTURES.gather(tokens[mask], tower)
    decoder.set_features(gathered.rows, gathered.deep)
    first = decoder.network.vocab_size
    return tokens.masked_scatter(mask, torch.arange(first, first + len(gathered.rows), dtype=tokens.dtype))


# Scores -------------------------------------------------------------------------------------------------------------


def _has_pictures(request: ScoreRequest) -> bool:
    return any(token >= models.FIRST for tokens in (request.prefix, *request.continuations) for token in tokens)


def _length(request: ScoreRequest) -> int:
    """Tokens of the longest sequence that a request computes; the last ones of continuations are not read."""
    return len(request.prefix) + max((len(tokens) - 1 for tokens in request.continuations), default=0)


def _calls(requests: list[ScoreRequest]) -> Iterator[tuple[list[ScoreRequest], bool]]:
    """Requests that are computed in one call, as many as there is room for; one with no room alone, in pieces.

    Returns:
        requests of a call, and whether the KV slots of the call before hold the first one's prefix, but for its last
        token, as they do for the second and later pieces of a request.
    """
    batch: list[ScoreRequest] = []
    taken = 0
    for request in requests:
        pieces = list(_pieces(request))
        size = len(request.prefix) + _tokens(request.continuations)
        if batch and (len(pieces) > 1 or taken + size > CALL_TOKENS):
            yield batch, False
            batch, taken = [], 0
        if len(pieces) > 1:
            yield from (([piece], number > 0) for number, piece in enumerate(pieces))
        else:
            batch, taken = [*batch, request], taken + size
    if batch:
        yield batch, False


def _pieces(request: ScoreRequest) -> Iterator[ScoreRequest]:
    """Cut a request into several with some of its continuations each, at least one."""
    start, taken = 0, len(request.prefix)
    bodies: set[tuple[int, ...]] = set()
    for index, tokens in enumerate(request.continuations):
        body = tuple(tokens[:-1])
        new = 0 if body in bodies else len(body)
        if taken + new > CALL_TOKENS and index > start:
            yield ScoreRequest(request.prefix, request.continuations[start:index], request.counts[start:index])
            start, taken, new = index, 1, len(body)
            bodies = set()
        taken += new
        bodies.add(body)
    yield ScoreRequest(request.prefix, request.continuations[start:], request.counts[start:])


def _tokens(continuations: list[list[int]]) -> int:
    """Tokens that are computed: not the last ones, and once where all but the last are equal."""
    return sum(map(len, {tuple(tokens[:-1]) for tokens in continuations}))


class _Target(NamedTuple):
    """A token whose probability is computed.

    Attributes:
        output_position: number of the token of the call after which it comes.
        token: its id.
        request, continuation: to whose score it belongs.
    """

    output_position: int
    token: int
    request: int
    continuation: int


class _Call:
    """One call of the decoder: spans of prefixes, and behind each those of its continuations, which attend to it.

    Args:
        requests: of the call.
        prefix_is_cached: the first KV slots hold the first prefix already, but for its last token.
        has_states: layers keep states, which continuations begin with.

    Attributes:
        slots: KV slots that the call needs.

    The first token of a continuation follows the last one of the prefix, and nothing follows its own last token: a
    continuation of one token has no span, and those that differ in their last tokens alone share one.
    """

    def __init__(self, requests: list[ScoreRequest], prefix_is_cached: bool, has_states: bool) -> None:
        self.has_states = has_states
        self.spans: list[SequenceSpan] = []
        self.tokens: list[int] = []
        self.targets: list[_Target] = []
        self.slots = 0
        self.sizes = [len(request.continuations) for request in requests]
        for number, request in enumerate(requests):
            self._add_request(number, request, prefix_is_cached and number == 0)

    def _add_request(self, number: int, request: ScoreRequest, prefix_is_cached: bool) -> None:
        prefix, continuations, counts = request
        if not continuations:
            return
        prefix_slot = self._add_prefix(prefix, prefix_is_cached)
        last = len(self.tokens) - 1
        firsts: dict[tuple[int, ...], int] = {}  # tokens of a span -> its first token's number in the call
        for index, (tokens, count) in enumerate(zip(continuations, counts, strict=True)):
            body = tuple(tokens[:-1])
            if body and body not in firsts:
                firsts[body] = self._add_span(prefix_slot, len(prefix), tokens[:-1])[1]
            before = [last, *range(firsts[body], firsts[body] + len(body))] if body else [last]
            scored = list(zip(before, tokens, strict=True))[-count:]
            self.targets += [_Target(position, token, number, index) for position, token in scored]

    def _add_prefix(self, prefix: list[int], is_cached: bool) -> int:
        """Add the span of a prefix, or of its last token alone; its first KV slot."""
        if not self.has_states:
            return self._add_span(0, 0, prefix, len(prefix) - 1 if is_cached else 0)[0]
        # In two spans, so that the next call finds the state before the last token, too.
        slot, body, before_last = self.slots, prefix[:-1], NO_STATE
        if body:
            before_last = 0
            if not is_cached:
                self.spans.append(SequenceSpan(0, 0, slot, 0, len(body), NO_STATE, before_last))
                self.tokens += body
        self.spans.append(SequenceSpan(0, 0, slot, len(body), 1, before_last, 1))
        self.tokens += prefix[-1:]
        self.slots += align_slot(len(prefix))
        return slot

    def _add_span(self, prefix_slot: int, prefix: int, tokens: list[int], cached: int = 0) -> tuple[int, int]:
        """Add a sequence span; where there are states, one that begins with the state of the prefix.

        Args:
            prefix_slot: first KV slot of the prefix that it attends to.
            prefix: tokens of that prefix.
            tokens: of the span.
            cached: how many of these its KV slots hold already.

        Returns:
            its first KV slot, and the number of its first new token in the call.
        """
        slot, number = self.slots, len(self.tokens)
        self.spans.append(SequenceSpan(prefix_slot, prefix, slot, cached, len(tokens) - cached, 1, 2))
        self.tokens += tokens[cached:]
        self.slots += align_slot(len(tokens))
        return slot, number

    def scores(self, decoder: Decoder) -> list[list[Score]]:
        """Compute the call: a score by request and continuation."""
        scores = [[Score(0.0, True)] * count for count in self.sizes]
        if not self.targets:
            return scores
        output_positions, tokens = [target.output_position for target in self.targets], [t.token for t in self.targets]
        log_probabilities, best = decoder.scores(self.spans, self.tokens, output_positions, tokens)
        for target, log_probability, token in zip(self.targets, log_probabilities.tolist(), best.tolist(), strict=True):
            of_request = scores[target.request]
            before = of_request[target.continuation]
            greedy = before.greedy and token == target.token
            of_request[target.continuation] = Score(before.log_probability + log_probability, greedy)
        return scores


@contextlib.contextmanager
def _configuration_errors(packed: PackedModel) -> Iterator[None]:
    """Turns whatever a nonsensical configuration leads to into one sentence."""
    try:
        yield
    except (UserError, NotNativeError):
        raise
    except Exception as error:
        lines = str(error).strip().split("\n")
        reason = plain(lines[0].rstrip(".") or type(error).__name__)
        raise UserError(f"The packed model {packed.folder} cannot be loaded: {reason}.") from None
