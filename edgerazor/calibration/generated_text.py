"""The teacher writes: text of its own, continuations of texts, and the assistant's turns of conversations.

The native engine computes it where there is one of the teacher (`packaging/native_teacher.py`), else transformers.
Conversations with pictures are answered one after the other, by transformers and the model's own processor.

What a batch becomes depends on its prompts, its number, the seed and the engine, and on nothing that was written before
it. So a run that was interrupted between two batches goes on to the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any

import numpy as np
import torch

from edgerazor import data
from edgerazor.calibration.batched_writing import Enough, NativeWriter, WritingRequest
from edgerazor.data import Conversation, PictureTokens
from edgerazor.errors import UserError
from edgerazor.models import PreTrainedModel, PreTrainedTokenizerBase
from edgerazor.recipe import Sampling
from edgerazor.runtime.native_model import NativeModel
from edgerazor.untrusted import vocabulary
from edgerazor.untrusted.tokenizer import reading

#: What to begin with: nothing, a text, or a conversation.
Prompt = str | Conversation | None
#: Share of the model's context that a prompt leaves for the answer, at least.
ROOM = 4
#: With the number of a batch, what decides how its own questions are drawn; turns of conversations count from 0.
OWN_QUESTIONS = 1 << 16
#: Temperature of answers to its own questions, relative to that of the questions.
ANSWER_TEMPERATURE = 0.7


@dataclass
class Row:
    """What came of one prompt.

    Args:
        record: for a JSON file: `text` or `messages`; None where nothing whole was written.
        tokens: how many the teacher wrote for it.
    """

    record: dict[str, Any] | None
    tokens: int


@dataclass(frozen=True)
class Answer:
    """Token ids that were written, and whether the teacher came to an end (whose token is not among them)."""

    ids: list[int]
    finished: bool


@dataclass(frozen=True)
class Writer:
    """A teacher that writes.

    Args:
        teacher: the model, in evaluation mode.
        tokenizer: its tokenizer.
        sampling: how each token is drawn, and how much is written.
        seed: of the drawing.
        context: most tokens that the model takes.
        options: what the chat template is given beside the messages.
        processor: of pictures; None where no conversation has any.
        native: writes in the teacher's place; None: transformers computes the teacher.
    """

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    seed: int
    context: int
    options: Mapping[str, Any] = field(default_factory=dict)
    processor: Any = None
    native: NativeWriter | None = None

    def batches(self, prompts: Iterator[Prompt], first: int = 0) -> Iterator[list[Row]]:
        """Rows for `batch_size` prompts at a time.

        Args:
            prompts: from the first one on, those before the first batch included.
            first: number of the first batch to write.

        Raises:
            UserError: a conversation is refused by the template, or cannot be answered anew.
        """
        size = self.sampling.batch_size
        prompts = islice(prompts, first * size, None)
        for number in count(first):
            some = list(islice(prompts, size))
            if not some:
                return
            yield self.write(some, number)

    def write(self, prompts: Sequence[Prompt], number: int, enough: Enough | None = None) -> list[Row]:
        """A row for each prompt of a batch, in order; `number` of the batch decides what is drawn.

        Texts end where they are once there are `enough` tokens of them; conversations do not.
        """
        talks = {
            place: Talk(replace(prompt, options=self.options))
            for place, prompt in enumerate(prompts)
            if isinstance(prompt, Conversation)
        }
        texts = {
            place: self._begin(prompt) for place, prompt in enumerate(prompts) if not isinstance(prompt, Conversation)
        }
        rows = dict(zip(texts, self._texts(list(texts.values()), number, enough), strict=True))
        self._converse(list(talks.values()), number)
        rows |= {place: talk.row() for place, talk in talks.items()}
        return [rows[place] for place in range(len(prompts))]

    def ask_and_answer(self, conversations: int, number: int) -> list[Row]:
        """So many conversations of one question and one answer, both of the teacher's own, as a batch of this number.

        From what its template writes before a user's words, a model that was tuned to answer goes on with a question
        (Magpie, Xu et al., arXiv 2406.08464). Answers are drawn at a lower temperature than questions, as people let a
        model answer. Where it comes to no end, or there is no template, there is no row.
        """
        opening = data.question_opening(self.tokenizer)
        if opening is None:
            return [Row(None, 0)] * conversations
        shortest = Conversation(({"role": "user", "content": "yes"},), options=self.options)
        begin = list(self.tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"])
        ends = data.turn_ends(shortest, self.tokenizer)
        questions = self.draw([begin] * conversations, (number, OWN_QUESTIONS), ends)
        texts = [self.tokenizer.decode(question.ids, skip_special_tokens=True).strip() for question in questions]
        talks = {
            place: Talk(Conversation(({"role": "user", "content": text},), options=self.options))
            for place, (question, text) in enumerate(zip(questions, texts, strict=True))
            if question.finished and text
        }
        cooler = self.sampling.model_copy(update={"temperature": self.sampling.temperature * ANSWER_TEMPERATURE})
        replace(self, sampling=cooler)._converse(list(talks.values()), number)
        answered = {place: talk.row() for place, talk in talks.items()}
        return [
            Row(row.record, len(question.ids) + row.tokens)
            for place, question in enumerate(questions)
            for row in [answered.get(place, Row(None, 0))]
        ]

    def _begin(self, text: str | None) -> list[int]:
        """The tokens that a text begins with."""
        if text is None:
            start = self.tokenizer.bos_token_id
            return [int((self.tokenizer.eos_token_id if start is None else start) or 0)]
        with reading("the text that is gone on with"):
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
        return list(ids[: min(self.sampling.prompt_tokens, self.context // 2)])

    def _texts(self, prompts: list[list[int]], number: int, enough: Enough | None) -> list[Row]:
        answers = self.draw(prompts, (number,), enough=enough) if prompts else []
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            text = self.tokenizer.decode([*prompt, *answer.ids], skip_special_tokens=True)
            rows.append(Row({"text": text} if text.strip() else None, len(answer.ids)))
        return rows

    def _converse(self, talks: list[Talk], number: int) -> None:
        """Let the teacher answer every user turn, those of all conversations side by side."""
        room = min(self.sampling.answer_tokens, self.context // ROOM)
        for turn in count():
            active = [talk for talk in talks if talk.next_question()]
            if not active:
                return
            questions = [(talk, self._question(talk)) for talk in active]
            questions = [(talk, prompt) for talk, prompt in questions if _length(prompt) + room <= self.context]
            fitting = [talk for talk, _ in questions]
            for talk in active:
                talk.closed = talk not in fitting
            if fitting:
                stops = data.turn_ends(talks[0].original, self.tokenizer)
                answers = self._answers([prompt for _, prompt in questions], (number, turn), stops)
                for talk, answer in zip(fitting, answers, strict=True):
                    talk.answer(answer, self.tokenizer.decode(answer.ids, skip_special_tokens=True))

    def _answers(
        self, prompts: Sequence[list[int] | PictureTokens], key: tuple[int, ...], stops: set[int]
    ) -> list[Answer]:
        """As `draw`; prompts with pictures one after the other."""
        places = [place for place, prompt in enumerate(prompts) if isinstance(prompt, list)]
        texts = self.draw([prompt for prompt in prompts if isinstance(prompt, list)], key, stops) if places else []
        answers = dict(zip(places, texts, strict=True))
        for place, prompt in enumerate(prompts):
            if not isinstance(prompt, list):
                ids, ends = prompt.ids.tolist(), self._text_ends() | stops
                row = self._generate([ids], [[1] * len(ids)], (*key, place), ends, None, pictures=prompt.inputs)[0]
                answers[place] = _until_end(row[len(ids) :].tolist(), ends)
        return [answers[place] for place in range(len(prompts))]

    def _question(self, talk: Talk) -> list[int] | PictureTokens:
        """The tokens of a conversation up to the teacher's next turn; with its pictures, where it has some."""
        if talk.original.pictures:
            if self.processor is None:
                raise UserError(f"{talk.original.where} has pictures, and the teacher sees none.", "Leave them out.")
            return data.prompt_with_pictures(replace(talk.original, messages=tuple(talk.messages)), self.processor)
        text = data.render(talk.original, self.tokenizer, talk.messages, prompt=True)
        with reading("the conversation that is written anew"):
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def draw(
        self,
        prompts: list[list[int]],
        key: tuple[int, ...],
        stops: set[int] | None = None,
        exactly: int | None = None,
        enough: Enough | None = None,
    ) -> list[Answer]:
        """What the teacher writes behind each prompt, all at once.

        Args:
            prompts: token ids, at least one each.
            key: numbers that decide, with the seed, what is drawn.
            stops: tokens that end a text, beside the model's own.
            exactly: write so many tokens, whatever they are.
            enough: whether so many tokens are enough, so that all texts end where they are; None: never.
        """
        for prompt in prompts:
            vocabulary.check(self.tokenizer, prompt)
        ends = self._text_ends() | (stops or set())
        if self.native is not None:
            requests = [
                WritingRequest(prompt, exactly or self._most(len(prompt)), self._seed_of((*key, place)))
                for place, prompt in enumerate(prompts)
            ]
            texts = self.native.write(requests, self.sampling, frozenset(ends), exactly is not None, enough)
            return [
                Answer(ids, len(ids) < request.most and enough is None)
                for ids, request in zip(texts, requests, strict=True)
            ]
        longest = max(map(len, prompts))
        filled = [[self._padding()] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        continuations = self._generate(filled, mask, key, ends, exactly, enough)[:, longest:].tolist()
        answers = []
        for ids in continuations:
            answer = _until_end(ids, ends)
            answers.append(replace(answer, ids=ids) if exactly else answer)
        return answers

    # Eight parameters: what is computed, how it is drawn, and when it ends.
    @torch.no_grad()
    def _generate(
        self,
        ids: list[list[int]],
        mask: list[list[int]],
        key: tuple[int, ...],
        ends: set[int],
        exactly: int | None,
        enough: Enough | None = None,
        pictures: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        device, sampling = self.teacher.device, self.sampling
        drawing: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawing = {"do_sample": True, "temperature": sampling.temperature}
            drawing |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        if enough is not None:
            drawing["stopping_criteria"] = [_Criterion(enough, len(ids[0]))]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed_of(key))
            return self.teacher.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                **{name: value.to(device) for name, value in (pictures or {}).items()},
                max_new_tokens=exactly or self._most(len(ids[0])),
                min_new_tokens=exactly,
                repetition_penalty=1.0,  # the model's own distribution, whatever its generation_config.json says
                eos_token_id=sorted(ends) or None,
                pad_token_id=self._padding(),
                **drawing,
            )

    def _most(self, length: int) -> int:
        """Tokens that may be written behind a prompt of so many."""
        return max(1, min(self.sampling.answer_tokens, self.context - length))

    def _seed_of(self, key: tuple[int, ...]) -> int:
        return int(np.random.SeedSequence((self.seed, *key)).generate_state(1)[0])

    def _padding(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def _text_ends(self) -> set[int]:
        """The tokens that end a text, as the model and its tokenizer know them."""
        own = self.teacher.generation_config.eos_token_id
        ids = own if isinstance(own, list) else [own]
        return {token for token in (*ids, self.tokenizer.eos_token_id) if token is not None}


def _length(prompt: list[int] | PictureTokens) -> int:
    """Tokens of a prompt."""
    return len(prompt if isinstance(prompt, list) else prompt.ids)


def _until_end(ids: list[int], ends: set[int]) -> Answer:
    """What was written, up to the first token that ends a text."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return Answer(ids[:stop], stop < len(ids))


@contextmanager
def written_with(writer: Writer, native: NativeModel | None) -> Iterator[Writer]:
    """The writer with the native engine in its teacher's place, where there is one."""
    if native is None:
        yield writer
        return
    batches = NativeWriter(native, writer.sampling.batch_size)
    try:
        yield replace(writer, native=batches)
    finally:
        batches.close()


@dataclass(frozen=True)
class _Criterion:
    """For transformers' `generate`: when all sequences end, by how many tokens there are behind `length` of each."""

    enough: Enough
    length: int

    def __call__(self, ids: torch.Tensor, _scores: Any, **_options: Any) -> torch.Tensor:
        ended = self.enough(len(ids) * (ids.shape[1] - self.length))
        return torch.full((len(ids),), ended, device=ids.device)


@dataclass(eq=False)
class Talk:
    """A conversation that is being written anew: all but the assistant's turns is taken from another one."""

    original: Conversation
    messages: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    closed: bool = False
    _read: int = 0

    def __post_init__(self) -> None:
        roles = [message["role"] for message in self.original.messages]
        if strange := [role for role in roles if role not in ("system", "developer", "user", "assistant")]:
            raise UserError(
                f"{self.original.where} has a message of the role {strange[0]!r}, whose place in a new conversation is "
                "not known; expected system, user and assistant."
            )
        if "user" not in roles:
            raise UserError(f"{self.original.where} has no user turn that could be answered.")

    def next_question(self) -> bool:
        """Read on to the next user turn; False where there is none."""
        while not self.closed and self._read < len(self.original.messages):
            message = self.original.messages[self._read]
            self._read += 1
            if message["role"] != "assistant":
                self.messages.append(message)
            if message["role"] == "user":
                return True
        return False

    def answer(self, answer: Answer, text: str) -> None:
        """Take an answer; one that was cut off or is blank ends the conversation before its question."""
        self.tokens += len(answer.ids)
        if answer.finished and text.strip():
            parts = [{"type": "text", "text": text}]  # as all content is, where there are pictures
            self.messages.append({"role": "assistant", "content": parts if self.original.pictures else text})
        else:
            self.closed = True

    def row(self) -> Row:
        """The conversation up to its last answer."""
        last = max((place for place, message in enumerate(self.messages) if message["role"] == "assistant"), default=-1)
        return Row({"messages": self.messages[: last + 1]} if last >= 0 else None, self.tokens)
