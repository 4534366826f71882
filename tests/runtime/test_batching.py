"""Continuous batching: every sequence gets what it would get alone, whatever happens beside it."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgerazor import recipe, runtime
from edgerazor.errors import UserError
from edgerazor.kernels import native
from edgerazor.kernels.decoder import PAGE_SLOTS, Decoder, NotFiniteError
from edgerazor.runtime import batching
from edgerazor.runtime.batching import (
    BatchScheduler,
    BatchSettings,
    QueueFullError,
    SchedulerClosedError,
    SequenceEvent,
    SequenceRequest,
)
from edgerazor.runtime.kv_pages import PagePool, SequencePages, common_length
from edgerazor.runtime.native_model import NativeModel
from edgerazor.runtime.sampling import Sampler
from helpers.packed_folders import all_of, suitable_model, write_packed
from helpers.tiny_models import ModelMaker

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library is not built")

POSITIONS = 1024
#: Far more than any test takes: it only keeps a test that fails from running forever.
SECONDS = 120.0


def packed_folder(make_model: ModelMaker, place: Path, **overrides: Any) -> Path:
    values: dict[str, Any] = {"max_position_embeddings": POSITIONS, **overrides}
    model = suitable_model(make_model, place / "model", "qwen3" if not overrides else "llama", **values)
    write_packed(place / "packed", model, all_of("int4"))
    return place / "packed"


@pytest.fixture(scope="module")
def folder(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_folder(make_model, tmp_path_factory.mktemp("batching"))


@pytest.fixture(scope="module")
def model(folder: Path) -> NativeModel:
    loaded = runtime.load(folder, threads=2, engine="native")
    assert isinstance(loaded, NativeModel)
    return loaded


Start = Callable[..., BatchScheduler]


@pytest.fixture
def start(model: NativeModel) -> Iterator[Start]:
    """Starts schedulers, which are closed at the end."""
    schedulers: list[BatchScheduler] = []

    def start_one(of: NativeModel = model, **settings: int) -> BatchScheduler:
        schedulers.append(BatchScheduler(of, BatchSettings(**settings)))
        return schedulers[-1]

    yield start_one
    for scheduler in schedulers:
        scheduler.close()


@dataclass
class Text:
    """What a sequence has been told.

    Attributes:
        gate: closed, it holds the scheduler at the next event.
    """

    events: list[SequenceEvent] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def __call__(self, event: SequenceEvent) -> None:
        assert not self.ended.is_set()
        self.events.append(event)
        self.begun.set()
        if event.finish_reason is not None:
            self.ended.set()
        assert self.gate.wait(SECONDS)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]

    @property
    def reason(self) -> str | None:
        assert self.ended.wait(SECONDS)
        return self.events[-1].finish_reason

    @property
    def whole(self) -> tuple[list[int], str | None]:
        reason = self.reason
        return self.tokens, reason


def sampler(model: NativeModel, seed: int | None, **settings: Any) -> Sampler:
    """A greedy one where there is no seed."""
    values = {"temperature": 0.0} if seed is None else {"temperature": 0.9, "top_p": 0.95, **settings}
    built = recipe.build({"seed": seed or 0, "generate": {**values, **settings}})
    return Sampler(built.generate, seed or 0, model.vocabulary)


@dataclass(frozen=True)
class Wish:
    """A sequence to write, of which a request can be made again and again."""

    prompt: Sequence[int]
    seed: int | None = None
    max_tokens: int = 12
    ends: frozenset[int] = frozenset()
    settings: tuple[tuple[str, Any], ...] = ()

    def request(self, model: NativeModel, **more: Any) -> SequenceRequest:
        chooses = sampler(model, self.seed, **dict(self.settings))
        return SequenceRequest(self.prompt, chooses, self.max_tokens, self.ends, **more)

    def alone(self, model: NativeModel) -> tuple[list[int], str]:
        """What a session writes."""
        request, session = self.request(model), model.session()
        request.sampler.see(self.prompt)
        logits, tokens = session.feed(list(self.prompt)), []
        room = min(self.max_tokens, model.max_positions - len(self.prompt))
        while len(tokens) < room:
            token = request.sampler.choose(logits)
            request.sampler.see([token])
            if token in self.ends:
                return tokens, "eos"
            tokens.append(token)
            if len(tokens) < room:
                logits = session.feed([token])
        return tokens, "length" if room == self.max_tokens else "context"


def ids(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(2, 300) for _ in range(count)]


def wishes(count: int, seed: int, longest: int = 200) -> list[Wish]:
    """Prompts of many lengths, some of which begin alike, greedy and sampled."""
    draw = random.Random(seed)
    system = ids(150, seed)
    made = []
    for number in range(count):
        own = ids(draw.randint(1, 60), 1000 * seed + number)
        shared = system[: draw.choice([0, 0, 20, 64, 100, 150])]
        kind = draw.choice([None, None, number])
        settings = draw.choice([(), (("repetition_penalty", 1.3),), (("top_k", 20),)])
        ends = frozenset(ids(draw.choice([0, 0, 12]), number))
        prompt = (shared + own)[:longest]
        made.append(Wish(prompt, kind, draw.randint(1, 30), ends, settings if kind is not None else ()))
    return made


def submit_all(scheduler: BatchScheduler, model: NativeModel, made: Sequence[Wish]) -> list[Text]:
    texts = [Text() for _ in made]
    for wish, text in zip(made, texts, strict=True):
        scheduler.submit(wish.request(model), text)
    return texts


def idle(scheduler: BatchScheduler) -> bool:
    """Whether it has become so, and all memory has been given back."""
    with scheduler._condition:
        done = scheduler._condition.wait_for(lambda: not (scheduler._running or scheduler._waiting), SECONDS)
    return done and scheduler.statistics()["kv_tokens_used"] == 0


@pytest.mark.parametrize("prefill_tokens", [7, 128])
def test_every_text_is_as_if_it_were_alone(model: NativeModel, start: Start, prefill_tokens: int) -> None:
    made = wishes(14, seed=1)
    scheduler = start(max_sequences=6, prefill_tokens=prefill_tokens)
    texts = submit_all(scheduler, model, made)
    for wish, text in zip(made, texts, strict=True):
        assert text.whole == wish.alone(model)
    assert idle(scheduler)
    statistics = scheduler.statistics()
    assert statistics["finished"] == len(made)
    assert statistics["generated_tokens"] == sum(len(text.tokens) for text in texts)
    assert statistics["prompt_tokens"] == sum(len(wish.prompt) for wish in made)
    again = submit_all(scheduler, model, made)  # now nearly all is in the cache
    assert [text.whole for text in again] == [text.whole for text in texts]
    assert all(text.events[0].cached_tokens >= len(wish.prompt) - 4 for wish, text in zip(made, again, strict=True))


def test_one_thread_and_models_generate(folder: Path, start: Start) -> None:
    one = runtime.load(folder, threads=1, engine="native")
    assert isinstance(one, NativeModel)
    made = one.generate("Nora took the", max_tokens=20, temperature=0)
    prompt = one.tokenizer("Nora took the")["input_ids"]
    wish = Wish(prompt, None, 20, frozenset({1}))
    texts = submit_all(start(one, max_sequences=3), one, [wish] * 3)
    assert [text.whole for text in texts] == [(made.tokens, made.finish_reason)] * 3


def test_copies_of_a_prompt_are_computed_once(model: NativeModel, start: Start) -> None:
    prompt = ids(150, 5)
    scheduler = start(max_sequences=8, prefill_tokens=32)
    made = [Wish(prompt, seed, 5) for seed in range(8)]
    texts = submit_all(scheduler, model, made)
    assert [text.whole for text in texts] == [wish.alone(model) for wish in made]
    cached = sorted(text.events[0].cached_tokens for text in texts)
    assert cached == [0] + [149] * 7
    assert scheduler.statistics()["cached_tokens"] == 7 * 149


def test_turns_of_a_chat_and_what_other_requests_share(model: NativeModel, start: Start) -> None:
    scheduler = start()
    prompt = ids(70, 8)
    for _ in range(3):
        (text,) = submit_all(scheduler, model, [Wish(prompt, None, 10)])
        assert text.whole == Wish(prompt, None, 10).alone(model)
        assert text.events[0].cached_tokens == (0 if len(prompt) == 70 else len(prompt) - 13 - 1)
        prompt = prompt + text.tokens + ids(13, len(prompt))
    (other,) = submit_all(scheduler, model, [Wish(prompt[:40] + ids(10, 9), None, 3)])
    assert other.reason == "length"
    assert other.events[0].cached_tokens == 40  # a part of a page, copied


@pytest.mark.parametrize("pages", [3, 5])
def test_little_memory(model: NativeModel, start: Start, pages: int) -> None:
    """Sequences wait for one another or give their pages back; none is stuck, none is wrong, all memory comes back."""
    made = wishes(12, seed=2, longest=100) + [Wish(ids(60, 70 + n), None, 120) for n in range(3)]
    scheduler = start(kv_tokens=pages * PAGE_SLOTS, max_sequences=8, prefill_tokens=50)
    texts = submit_all(scheduler, model, made)
    for wish, text in zip(made, texts, strict=True):
        tokens, reason = text.whole
        expected, expected_reason = wish.alone(model)
        assert tokens == expected[: pages * PAGE_SLOTS - len(wish.prompt)]
        assert reason == (expected_reason if tokens == expected else "context")
    assert idle(scheduler)
    statistics = scheduler.statistics()
    assert statistics["kv_tokens"] == pages * PAGE_SLOTS
    assert statistics["preempted"] > 0
    with pytest.raises(UserError, match="room for"):
        scheduler.submit(Wish(ids(pages * PAGE_SLOTS + 1, 1)).request(model), Text())


def test_a_bounded_queue_in_the_order_of_arrival(model: NativeModel, start: Start) -> None:
    scheduler = start(max_sequences=1, max_queue=2)
    running, first, second = Text(), Text(), Text()
    running.gate.clear()
    scheduler.submit(Wish(ids(5, 1), None, 30).request(model), running)
    assert running.begun.wait(SECONDS)
    for text in (first, second):
        scheduler.submit(Wish(ids(5, 2)).request(model), text)
    with pytest.raises(QueueFullError) as full:
        scheduler.submit(Wish(ids(5, 3)).request(model), Text())
    assert 1 <= full.value.retry_after <= 600
    statistics = scheduler.statistics()
    assert (statistics["running"], statistics["waiting"]) == (1, 2)
    second.gate.clear()
    running.gate.set()
    assert second.begun.wait(SECONDS)
    assert first.ended.is_set()
    second.gate.set()
    assert second.reason == "length"


def test_cancelled(model: NativeModel, start: Start) -> None:
    scheduler = start(max_sequences=2)
    long, other, waiting = Text(), Text(), Text()
    long.gate.clear()
    handle = scheduler.submit(Wish(ids(100, 1), None, 800).request(model), long)
    assert long.begun.wait(SECONDS)
    wish = Wish(ids(90, 2), 3, 20)
    scheduler.submit(wish.request(model), other)
    third = scheduler.submit(Wish(ids(90, 3)).request(model), waiting)
    third.cancel()
    handle.cancel()
    handle.cancel()
    long.gate.set()
    assert long.reason == waiting.reason == "cancelled"
    assert waiting.tokens == []
    assert len(long.tokens) <= 2
    assert other.whole == wish.alone(model)
    handle.cancel()
    assert idle(scheduler)
    assert scheduler.statistics()["cancelled"] == 2


def test_log_probabilities(model: NativeModel, start: Start) -> None:
    scheduler = start(prefill_tokens=40)
    wish = Wish(ids(75, 4), 1, 6)
    neighbours = submit_all(scheduler, model, [Wish(ids(75, 4)[:70], None, 20), Wish(ids(3, 1), 5, 20)])
    text, no_text, echo = Text(), Text(), Text()
    scheduler.submit(wish.request(model, top_logprobs=3, prompt_logprobs=True), text)
    scheduler.submit(wish.request(model, top_logprobs=0), no_text)
    scheduler.submit(replace(wish, max_tokens=0).request(model, prompt_logprobs=True), echo)
    assert text.whole == no_text.whole == wish.alone(model)
    assert echo.whole == ([], "length")
    assert all(neighbour.reason == "length" for neighbour in neighbours)
    whole = [*wish.prompt, *text.tokens]
    expected = model.logits(whole).double().log_softmax(-1).numpy()
    of_prompt = text.events[0].prompt_logprobs
    assert of_prompt is not None
    assert of_prompt[0] is None
    assert len(of_prompt) == 75
    assert text.events[0].cached_tokens == 0
    assert all(event.prompt_logprobs is None for event in text.events[1:])
    for position, given in enumerate([*of_prompt[1:], *(event.logprob for event in text.events)]):
        assert given is not None
        assert given.token == whole[position + 1]
        assert given.logprob == pytest.approx(expected[position, given.token], abs=1e-4)
        likeliest = np.argsort(-expected[position], kind="stable")[:3]
        assert [token for token, _ in given.top] == likeliest.tolist()
        assert [value for _, value in given.top] == pytest.approx(expected[position, likeliest].tolist(), abs=1e-4)
    assert echo.events[0].prompt_logprobs is not None
    assert [given and given.logprob for given in echo.events[0].prompt_logprobs] == [
        given and given.logprob for given in of_prompt
    ]
    assert all(event.logprob is not None and event.logprob.top == () for event in no_text.events)


class Even:
    """Even tokens alone may follow."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self) -> NDArray[np.bool_] | None:
        return np.arange(300) % 2 == 0

    def accept(self, token: int) -> None:
        self.accepted.append(token)


class Broken(Even):
    def mask(self) -> NDArray[np.bool_] | None:
        raise RuntimeError("no grammar")


class Nothing(Even):
    def mask(self) -> NDArray[np.bool_] | None:
        return np.zeros(300, dtype=bool)


def test_constraints_and_their_errors(model: NativeModel, start: Start) -> None:
    scheduler = start()
    wish, sampled, constraint = Wish(ids(9, 1)), Wish(ids(9, 2), 4), Even()
    texts = [Text() for _ in range(5)]
    scheduler.submit(wish.request(model, constraint=constraint), texts[0])
    scheduler.submit(sampled.request(model, constraint=Even()), texts[1])
    scheduler.submit(wish.request(model, constraint=Broken()), texts[2])
    scheduler.submit(wish.request(model, constraint=Nothing()), texts[3])
    scheduler.submit(wish.request(model), texts[4])
    assert texts[0].reason == texts[1].reason == "length"
    assert all(token % 2 == 0 for text in texts[:2] for token in text.tokens)
    assert constraint.accepted == texts[0].tokens
    assert texts[2].reason == texts[3].reason == "error"
    assert "no grammar" in str(texts[2].events[-1].error)
    assert "No token may follow" in str(texts[3].events[-1].error)
    assert texts[4].whole == wish.alone(model)
    assert idle(scheduler)


def test_numbers_that_are_not_finite_end_the_sequence_concerned(
    model: NativeModel, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Decoder.step
    bad = ids(3, 1)[1]

    def step(self: Decoder, spans: Any, tokens: list[int], *more: Any) -> Any:
        if bad in tokens:
            whole(self, spans, tokens, *more)
            raise NotFiniteError
        return whole(self, spans, tokens, *more)

    made = [Wish([token for token in ids(40, seed) if token != bad], None, 8) for seed in (2, 3, 4)]
    expected = [wish.alone(model) for wish in made]
    made = [wish for wish, (tokens, _) in zip(made, expected, strict=True) if bad not in tokens]
    monkeypatch.setattr(Decoder, "step", step)
    scheduler = start()
    texts = submit_all(scheduler, model, [*made, Wish(ids(3, 1)), *made])
    failed = texts.pop(len(made))
    assert failed.reason == "error"
    assert "infinite" in str(failed.events[-1].error)
    for wish, text in zip([*made, *made], texts, strict=True):
        assert text.whole == wish.alone(model)
    assert idle(scheduler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_of_the_scheduler_ends_every_sequence(
    model: NativeModel, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = start(max_sequences=1)
    running, waiting = Text(), Text()
    running.gate.clear()
    scheduler.submit(Wish(ids(3, 1), None, 500).request(model), running)
    assert running.begun.wait(SECONDS)
    scheduler.submit(Wish(ids(3, 2)).request(model), waiting)

    def fails(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(batching.BatchScheduler, "_step", fails)
    running.gate.set()
    assert running.reason == waiting.reason == "error"
    scheduler._thread.join(SECONDS)
    assert not scheduler.alive
    with pytest.raises(SchedulerClosedError):
        scheduler.submit(Wish(ids(3, 2)).request(model), Text())


class Calls:
    """Counts the loops in C++ of a scheduler's decoder, and their steps."""

    def __init__(self, scheduler: BatchScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loops: list[tuple[int, int]] = []  # sequences and steps
        greedy = scheduler._decoder.greedy_together

        def counted(spans: Any, *arguments: Any) -> Any:
            steps = greedy(spans, *arguments)
            self.loops.append((len(spans), len(steps)))
            return steps

        monkeypatch.setattr(scheduler._decoder, "greedy_together", counted)


def test_greedy_sequences_are_decoded_in_steps_without_python(
    model: NativeModel, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "GREEDY_SECONDS", 10.0)
    scheduler = start(max_sequences=4)
    calls = Calls(scheduler, monkeypatch)
    made = [Wish(ids(length, length), None, 40) for length in (3, 70, 66, 3)]
    texts = submit_all(scheduler, model, made)
    assert [text.whole for text in texts] == [wish.alone(model) for wish in made]
    assert (4, batching.GREEDY_STEPS) in calls.loops
    assert idle(scheduler)
    again = submit_all(scheduler, model, made)  # the pages that they left are those of their texts
    assert [text.whole for text in again] == [text.whole for text in texts]
    assert again[1].events[0].cached_tokens > 64


def test_who_comes_and_who_goes_ends_the_loop(
    model: NativeModel, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "GREEDY_SECONDS", 10.0)
    scheduler = start()
    assert scheduler._interrupt.tolist() == [0]
    first, second = Text(), Text()
    first.gate.clear()
    scheduler.submit(Wish(ids(3, 1), None, 400).request(model), first)
    assert first.begun.wait(SECONDS)
    scheduler.submit(Wish(ids(3, 2), None, 5).request(model), second)
    assert scheduler._interrupt.tolist() == [1]
    first.gate.set()
    assert second.whole == Wish(ids(3, 2), None, 5).alone(model)
    assert first.reason == "length"
    third = Text()
    third.gate.clear()
    handle = scheduler.submit(Wish(ids(3, 3), None, 400).request(model), third)
    assert third.begun.wait(SECONDS)
    handle.cancel()
    assert scheduler._interrupt.tolist() == [1]
    third.gate.set()
    assert third.reason == "cancelled"
    assert idle(scheduler)


def test_a_sequence_whose_numbers_are_none_leaves_the_loop(
    model: NativeModel, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = start()

    def fails(*_: Any) -> Any:
        raise NotFiniteError("a number is not finite")

    monkeypatch.setattr(scheduler._decoder, "greedy_together", fails)
    made = [Wish(ids(5, number), None, 12) for number in range(3)]
    texts = submit_all(scheduler, model, made)
    assert [text.whole for text in texts] == [wish.alone(model) for wish in made]


def test_who_listens_may_fail(model: NativeModel, start: Start) -> None:
    scheduler = start()
    events: list[SequenceEvent] = []

    def fails(event: SequenceEvent) -> None:
        events.append(event)
        raise OSError("gone")

    scheduler.submit(Wish(ids(3, 1), None, 500).request(model), fails)
    wish = Wish(ids(3, 2))
    (text,) = submit_all(scheduler, model, [wish])
    assert text.whole == wish.alone(model)
    assert idle(scheduler)
    assert [event.finish_reason for event in events] == [None, "cancelled"]


def test_drain_and_close(model: NativeModel, start: Start) -> None:
    scheduler = start()
    text = Text()
    text.gate.clear()
    scheduler.submit(Wish(ids(3, 1)).request(model), text)
    assert text.begun.wait(SECONDS)
    assert not scheduler.drain(0.01)
    with pytest.raises(SchedulerClosedError):
        scheduler.submit(Wish(ids(3, 2)).request(model), Text())
    text.gate.set()
    assert scheduler.drain(SECONDS)
    assert text.reason == "length"
    assert scheduler.alive
    scheduler.close()
    scheduler.close()
    assert not scheduler.alive
    other = start()
    texts = submit_all(other, model, [Wish(ids(3, n), None, 1000) for n in range(3)])
    other.close()
    assert all(text.reason in ("cancelled", "length") for text in texts)


def test_what_is_asked_wrongly(model: NativeModel, start: Start) -> None:
    scheduler = start()
    for prompt, words in (([], "at least one"), ([300], "no token 300"), ([2] * (POSITIONS + 1), "too long")):
        with pytest.raises(UserError, match=words):
            scheduler.submit(Wish(prompt).request(model), Text())
    with pytest.raises(UserError, match="at least 0"):
        scheduler.submit(replace(Wish([2]), max_tokens=-1).request(model), Text())
    for name in ("max_sequences", "prefill_tokens"):
        with pytest.raises(UserError, match=name):
            BatchScheduler(model, BatchSettings(**{name: 0}))
    with pytest.raises(UserError, match="native engine"):
        BatchScheduler(object(), BatchSettings())
    full = Wish(ids(POSITIONS, 1), None, 5)
    (text,) = submit_all(scheduler, model, [full])
    assert text.whole == ([], "context")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length(make_model: ModelMaker, tmp_path: Path, start: Start, kind: str) -> None:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.5 * i for i in range(8)]}
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 80, **factors}
    made = packed_folder(make_model, tmp_path, max_position_embeddings=80, rope_parameters=rope)
    if kind == "longrope":
        path = made / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 320}))
    long = runtime.load(made, threads=2, engine="native")
    assert isinstance(long, NativeModel)
    assert long.max_positions == 320
    assert long.rotary.varies_beyond == 80
    prompt = ids(200, 1)
    asked = [Wish(prompt[:count], seed, 12) for count in (60, 75, 78, 80, 81, 150) for seed in (None, 1)]
    scheduler = start(long, max_sequences=5, prefill_tokens=40, kv_tokens=8 * PAGE_SLOTS)
    texts = submit_all(scheduler, long, asked)
    for wish, text in zip(asked, texts, strict=True):
        assert text.whole == wish.alone(long)
    assert idle(scheduler)


def test_random_joins_and_cancels(model: NativeModel, start: Start) -> None:
    """Bounded by numbers of sequences, not by time."""
    draw = random.Random(7)
    scheduler = start(max_sequences=5, max_queue=100, prefill_tokens=24, kv_tokens=9 * PAGE_SLOTS)
    made = wishes(40, seed=3)
    texts: list[Text] = []
    cancelled = set()
    for number, wish in enumerate(made):
        texts.append(Text())
        handle = scheduler.submit(wish.request(model), texts[-1])
        if draw.random() < 0.3:
            cancelled.add(number)
            threading.Timer(draw.random() * 0.05, handle.cancel).start()
        if draw.random() < 0.3:
            assert texts[draw.randrange(len(texts))].ended.wait(SECONDS)
    for number, (wish, text) in enumerate(zip(made, texts, strict=True)):
        tokens, reason = text.whole
        expected = wish.alone(model)
        if number in cancelled and reason == "cancelled":
            assert tokens == expected[0][: len(tokens)]
        else:
            assert (tokens, reason) == expected
    assert idle(scheduler)
    pool = scheduler._pool
    assert pool.available == pool.capacity


# Pages --------------------------------------------------------------------------------------------------------------


class Cache:
    """Stands for a decoder: it notes which pages were copied."""

    def __init__(self, most: int = 1 << 20) -> None:
        self.most = most
        self.copies: list[tuple[int, int]] = []

    def reserve(self, slots: int) -> None:
        if slots > self.most:
            raise MemoryError

    def copy_page(self, source: int, target: int) -> None:
        self.copies.append((source, target))


def pool_of(capacity: int, most: int = 1 << 20) -> PagePool:
    cache: Any = Cache(most)
    return PagePool(cache, capacity)


def filled(pool: PagePool, tokens: Sequence[int]) -> SequencePages:
    """A sequence whose tokens are all computed but for what the cache had."""
    pages = SequencePages(pool)
    done = pages.begin(tokens, len(tokens) - 1)
    assert pages.grow(len(tokens))
    pages.append(tokens[done:])
    return pages


def test_common_length() -> None:
    assert common_length([], [1]) == 0
    for count in range(20):
        for equal in range(count + 1):
            other = [*range(equal), *([-1] * (count - equal))]
            assert common_length(list(range(count)), other) == equal


def test_pages_are_shared_copied_taken_over_and_evicted() -> None:
    pool = pool_of(6)
    text = list(range(200))
    first = filled(pool, text)  # 3 full pages and 8 tokens
    assert (len(first), pool.used, pool.available) == (4, 4, 2)
    second = SequencePages(pool)
    assert second.begin(text, 197) == 197
    assert second.table.numbers.tolist()[:3] == first.table.numbers.tolist()[:3]
    assert second.table[3] != first.table[3]  # being written by the first
    assert pool.decoder.copies == [(first.table[3], second.table[3])]  # type: ignore[attr-defined]
    second.release()
    last = first.table[3]
    first.release()
    assert (pool.used, pool.idle, pool.available) == (0, 5, 6)
    third = SequencePages(pool)
    assert third.begin([*text, 500], 200) == 200
    assert third.table[3] == last  # nobody has it: it is taken over
    third.release()
    other = filled(pool, list(range(1000, 1300)))  # 5 pages: one is left, the root of the text's
    assert (pool.used, pool.idle, pool.available) == (5, 1, 1)
    fourth = SequencePages(pool)
    assert fourth.begin(text, 199) == 64
    assert not fourth.grow(65)
    other.release()
    assert fourth.grow(128)
    fourth.release()
    assert pool.available == 6


def test_equal_pages_that_two_sequences_computed_become_one() -> None:
    pool = pool_of(8)
    text = list(range(70))
    first, second = SequencePages(pool), SequencePages(pool)
    for pages in (first, second):
        assert pages.begin(text, 69) == 0
        assert pages.grow(70)
    for pages in (first, second):
        pages.append(text)
    assert pool.used == 3
    assert first.table[0] == second.table[0]
    assert first.table[1] != second.table[1]
    apart = SequencePages(pool)
    assert apart.grow(70)
    apart.append(text, shared=False)
    assert pool.used == 5
    apart.release()
    assert (pool.used, pool.idle) == (3, 0)


def test_memory_that_ends_before_the_capacity() -> None:
    pool = pool_of(100, most=4 * PAGE_SLOTS)
    pages = SequencePages(pool)
    assert not pages.grow(5 * PAGE_SLOTS)
    assert (len(pages), pool.capacity, pool.available) == (4, 4, 0)
