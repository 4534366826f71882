"""Text from a packed model: a prompt becomes tokens, tokens follow one another, their text is given as it comes.

All of it stands on a session and a tokenizer, whichever engine computes. Where decoding is greedy, the session's own
loop generates several tokens at a time (in the native engine that is a loop in C++), about as many as fit into the time
between two refreshes of a terminal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgerazor import data, models, recipe, untrusted
from edgerazor.data import Conversation
from edgerazor.errors import UserError, usage_error
from edgerazor.models import PreTrainedTokenizerBase
from edgerazor.recipe import Generate
from edgerazor.runtime.detokenizer import TextAssembler
from edgerazor.runtime.picture_prompts import Picture, with_pictures
from edgerazor.runtime.sampling import Sampler
from edgerazor.untrusted import vocabulary
from edgerazor.untrusted.tokenizer import reading

if TYPE_CHECKING:
    from torch import Tensor

    from edgerazor.runtime.engine import Model, Session

#: Seconds of greedy decoding between two pieces of text, and tokens at most.
PIECE_SECONDS, PIECE_TOKENS = 0.05, 32

#: A text, or the messages of a chat: `[{"role": "user", "content": "Hello"}]`.
Prompt = str | Sequence[dict[str, Any]]
Reason = Literal["stop", "eos", "length", "context"]


@dataclass(frozen=True)
class Generation:
    """A generated text, and what it took.

    Args:
        text: behind the prompt, without the stop string that ended it.
        tokens: those written, of a stop string too, but without the end-of-text token.
        finish_reason: `stop`: a stop string came up; `eos`: the model ended the text; `length`: `max_tokens`;
            `context`: the model has no more positions; None: it is not finished.
        prompt_tokens: of the prompt, special ones included.
        cached_tokens: how many of those were in the cache already, from the turns of a chat before.
        prefill_seconds: to read the others.
        first_token_seconds: from the prompt to the first token; None where there is none yet.
        decode_seconds: from the first token on.
        tokens_per_second: in `decode_seconds`; None where nothing was decoded.
    """

    text: str
    tokens: list[int]
    finish_reason: Reason | None
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    first_token_seconds: float | None
    decode_seconds: float
    tokens_per_second: float | None


class Stream(Iterator[str]):
    """Pieces of text as they are generated: whole characters, never empty, and none is taken back.

    Time that passes between the pieces, with whoever asks for them, is not counted.

    Args:
        session: to write in. What it begins with in common with the prompt is not computed again.
        prompt: token ids, at least one.
        sampler: chooses the tokens.
        ends: tokens that end the text.
        alone: the text does not go on from the prompt, but is one of its own.
    """

    def __init__(
        self, session: Session, prompt: Sequence[int], sampler: Sampler, ends: frozenset[int], alone: bool
    ) -> None:
        self.session, self.prompt, self.sampler, self.ends = session, list(prompt), sampler, ends
        self.settings = sampler.settings
        self._assembler = TextAssembler(session.model.tokenizer, () if alone else self.prompt, self.settings.stop)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._chosen = 0  # tokens so far, with the one that ended the text
        self._reason: Reason | None = None
        self._cached = 0
        self._prefill = self._spent = 0.0
        self._first: float | None = None
        self._resumed: float | None = None
        self._pieces = self._write()

    @property
    def generation(self) -> Generation:
        """The result so far; complete once the iterator is exhausted."""
        decoding = self._elapsed() - self._first if self._first is not None else 0.0
        more = self._chosen - 1
        return Generation(
            text="".join(self._text),
            tokens=list(self._tokens),
            finish_reason=self._reason,
            prompt_tokens=len(self.prompt),
            cached_tokens=self._cached,
            prefill_seconds=self._prefill,
            first_token_seconds=self._first,
            decode_seconds=decoding,
            tokens_per_second=more / decoding if more > 0 and decoding > 0 else None,
        )

    def __next__(self) -> str:
        self._resumed = time.perf_counter()
        try:
            return next(self._pieces)
        finally:
            self._spent, self._resumed = self._elapsed(), None

    def _elapsed(self) -> float:
        """Seconds spent here so far, without the time between the pieces."""
        return self._spent + (time.perf_counter() - self._resumed if self._resumed is not None else 0.0)

    def _write(self) -> Iterator[str]:
        """Read the prompt, choose tokens, and give their text."""
        logits = self._read()
        self._prefill = self._elapsed()
        room = min(self.settings.max_tokens, self.session.model.max_positions - len(self.prompt))
        reason: Reason = "length" if room == self.settings.max_tokens else "context"
        for token in self._likeliest(room) if self.sampler.plain else self._sampled(logits, room):
            self._first = self._elapsed() if self._first is None else self._first
            self._chosen += 1
            if token in self.ends:
                reason = "eos"
                break
            self._tokens.append(token)
            yield from self._emit(self._assembler.push([token]))
            if self._assembler.matched:
                break
        rest = self._assembler.finish()
        self._reason = "stop" if self._assembler.matched else reason
        yield from self._emit(rest)

    def _read(self) -> Tensor:
        """The logits after the prompt; what the session's cache holds of it is not computed again."""
        self._cached = rewind_to(self.session, self.prompt)
        return self.session.feed(self.prompt[self._cached :])

    def _likeliest(self, room: int) -> Iterator[int]:
        """At most `room` tokens, each the likeliest, some at a time; one by one where there are stop strings."""
        count = 1
        while room:
            began = time.perf_counter()
            tokens = self.session.greedy(min(count, room), self.ends)
            seconds = (time.perf_counter() - began) / len(tokens)
            yield from tokens
            room -= len(tokens)
            fitting = int(PIECE_SECONDS / max(seconds, PIECE_SECONDS / PIECE_TOKENS))
            count = 1 if self.settings.stop else max(1, min(2 * count, fitting))

    def _sampled(self, logits: Tensor, room: int) -> Iterator[int]:
        """At most `room` tokens, chosen by the sampler."""
        self.sampler.see(self.prompt)
        for left in range(room, 0, -1):
            token = self.sampler.choose(logits)
            self.sampler.see([token])
            yield token
            if left > 1:
                logits = self.session.feed([token])

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self._text.append(text)
            yield text


class Chat:
    """A conversation: every question is answered in the light of those before, whose cache is kept.

    Args:
        model: answers.
        settings: how answers are written; the `system` message is the first.
        seed: of the sampling.

    Raises:
        UserError: there is no chat template.
    """

    def __init__(self, model: Model, settings: Generate, seed: int) -> None:
        check_template(model.tokenizer)
        self.model, self.settings = model, settings
        self.messages: list[dict[str, Any]] = []
        self.sampler = Sampler(settings, seed, model.vocabulary)
        self._session: Session | None = None
        self._latest: Stream | None = None

    def ask(self, question: str, images: Sequence[Picture] = ()) -> Stream:
        """Stream the answer to a question; an answer that is broken off stays as far as it was generated.

        Args:
            question: of the user.
            images: that come before it, as of `Model.generate`.

        Raises:
            UserError: the chat template refuses the conversation, or there is no room for an answer.
        """
        if self._latest is not None:
            answer = self._latest.generation
            self.messages.append({"role": "assistant", "content": answer.text})
            if answer.finish_reason is None:  # broken off perhaps within a token
                self._session = None
        self.messages.append({"role": "user", "content": with_pictures(question, images) if images else question})
        ids = encode(self.model, self.messages, self.settings)
        self._session = self._session or self.model.session()
        self.sampler.reset()
        ends = end_tokens(self.model) | turn_ends(self.model.tokenizer)
        self._latest = Stream(self._session, ids, self.sampler, ends, alone=True)
        return self._latest


def stream(model: Model, prompt: Prompt, settings: Generate, seed: int, images: Sequence[Picture] = ()) -> Stream:
    """Stream a text that goes on from a prompt, or answers it.

    Args:
        model: generates it.
        prompt: a text; for a chat the user's turn, or all messages so far.
        settings: how it is to be written.
        seed: of the sampling.
        images: that the user's turn begins with, in a chat.

    Raises:
        UserError: the prompt is too long, or no text; or there is no chat template, or it refuses the messages.
    """
    if images:
        if not isinstance(prompt, str):
            raise usage_error("Pictures come with a text; in messages they are parts of these.")
        prompt = [{"role": "user", "content": with_pictures(prompt, images)}]
    ids = encode(model, prompt, settings)
    ends = end_tokens(model) | (turn_ends(model.tokenizer) if settings.chat else frozenset())
    return Stream(model.session(), ids, Sampler(settings, seed, model.vocabulary), ends, alone=settings.chat)


def options(seed: int, **values: Any) -> tuple[Generate, int]:
    """Checked options of `Model.generate`: the fields of a recipe's `generate` section, and the seed.

    Raises:
        UserError: one of them is unknown, or has a value that it cannot have.
    """
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    built = recipe.build({"seed": seed, "generate": values}, "The options of generate")
    return built.generate, built.seed


def rewind_to(session: Session, prompt: Sequence[int]) -> int:
    """Drop what a session has beyond its beginning in common with a prompt; how many tokens of the prompt stay.

    At least the last one of the prompt is to be fed, for the logits after it.
    """
    known = 0
    for token, cached in zip(prompt[:-1], session.ids, strict=False):
        if token != cached:
            break
        known += 1
    session.rewind(known)
    return known


# --- from a prompt to tokens -------------------------------------------------------------------


def encode(model: Model, prompt: Prompt, settings: Generate) -> list[int]:
    """The tokens of a prompt, with those that the tokenizer or its chat template puts around them.

    A template that writes today's date writes the date that it wrote in training, see `data/chat.py`.

    Raises:
        UserError: as `stream`.
    """
    tokenizer = model.tokenizer
    if settings.chat and (conversation := seeing_conversation(prompt, settings)) is not None:
        if model.pictures is None:
            raise usage_error(f"{model.folder} is a model of text, which sees no pictures.", "Leave them out.")
        ids = model.pictures.prompt(conversation)
    elif settings.chat:
        ids = rendered_tokens(tokenizer, render(tokenizer, prompt, settings))
    elif isinstance(prompt, str):
        check_text(prompt)
        ids = text_tokens(tokenizer, prompt)
    else:
        raise usage_error("A prompt is text; messages are for a chat.", "Give `chat` too.")
    check_prompt(model, [token for token in ids if token not in models.PICTURES])
    if len(ids) >= model.max_positions:
        raise usage_error(
            f"The prompt has {len(ids):,} tokens, which leaves no room for an answer: the model has "
            f"{model.max_positions:,} positions.",
            "Give a shorter one.",
        )
    return ids


def seeing_conversation(prompt: Prompt, settings: Generate) -> Conversation | None:
    """The messages of a chat in which there are pictures, with the system message; None where there are none.

    Raises:
        UserError: a message is none.
    """
    if isinstance(prompt, str) or not any(isinstance(message.get("content"), list) for message in prompt):
        return None
    first = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    conversation = data.parse_conversation("The prompt", [*first, *prompt])
    return conversation if conversation.pictures else None


def check_prompt(model: Model, ids: Sequence[int]) -> None:
    """Make sure that a prompt has tokens, and that the model knows them.

    Raises:
        UserError: it has none, or one without a row in the embedding.
    """
    vocabulary.check(model.tokenizer, ids)
    if not ids:
        raise usage_error("The prompt has no tokens, and the tokenizer has none that begins a text.")


def rendered_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of what a chat template wrote, which holds the special ones already."""
    with reading("the prompt"):
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text to continue; of an empty one, the token that begins a text."""
    with reading("the prompt"):
        ids = list(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        return ids[:-1]
    if not ids:
        return [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    return ids


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, settings: Generate) -> str:
    """A chat as its template writes it, up to where the assistant's turn begins."""
    check_template(tokenizer)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise usage_error("There is no message to answer.")
    if settings.system is not None:
        messages = [{"role": "system", "content": settings.system}, *messages]
    for message in messages:
        check_text(message.get("content") if isinstance(message, dict) else None)
    return data.render(Conversation(tuple(messages), None, "The prompt"), tokenizer, prompt=True)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the tokenizer has a chat template.

    Raises:
        UserError: there is no template.
    """
    if not tokenizer.chat_template:
        raise usage_error("The model's tokenizer has no chat template.", "Leave out `chat`: it goes on from any text.")


def check_text(text: object) -> None:
    """Make sure that a tokenizer can read a prompt.

    Raises:
        UserError: it is no text, or has bytes of no text (which the shell gives as halves of surrogate pairs).
    """
    if not isinstance(text, str):
        raise usage_error(f"A prompt is text, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise usage_error("The prompt is not UTF-8 text.") from None


def end_tokens(model: Model) -> frozenset[int]:
    """The tokens that end a text, as the model's generation settings, its configuration and its tokenizer know them.

    Raises:
        UserError: one of the files is damaged.
    """
    ends = {model.tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = model.folder / name
        values = untrusted.read_json(path, hint="Copy or pack the model again.") if path.exists() else {}
        nested = values.get("text_config")
        for section in (values, nested if isinstance(nested, dict) else {}):
            own = section.get("eos_token_id")
            own = own if isinstance(own, list) else [own]
            ends |= {token for token in own if isinstance(token, int)}
    return frozenset(token for token in ends if token is not None)


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token that ends an assistant's turn, where the template has one and it can be found."""
    try:
        return frozenset(data.turn_ends(Conversation(({"role": "user", "content": "Yes?"},)), tokenizer))
    except UserError:  # a template that wants more than that; the model's own end tokens remain
        return frozenset()
