"""Conversations with pictures -> tokens as the model's own processor expands them, and which of them are learned.

A chat template writes one placeholder for a picture; the processor then puts as many tokens in its place as the picture
has features, and marks around them. A mask that is counted before this expansion is wrong behind the first picture. So
the turns are found in the text as the template writes it, as for all conversations, and the mask is carried over to the
processor's ids: these are the template's own tokens, with an expansion in the place of each placeholder. No token of an
expansion is ever learned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgerazor.data import chat
from edgerazor.errors import UserError, plain
from edgerazor.untrusted.pictures import picture_of_part
from edgerazor.untrusted.tokenizer import reading

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True)
class PictureTokens:
    """A conversation with pictures, as a model takes it.

    Attributes:
        ids: `[N]` int32, expanded.
        learn: `[N]` bool: the assistant's words and the tokens that end its turns.
        expansions: begin and end in `ids` of what stands for each run of pictures without text in between.
        inputs: what the model takes beside ids, by name: pixels, sizes.
    """

    ids: np.ndarray
    learn: np.ndarray
    expansions: tuple[tuple[int, int], ...]
    inputs: dict[str, Any]


def encode_with_pictures(
    conversation: chat.Conversation, processor: ProcessorMixin, folder: Path | None = None, length: int | None = None
) -> PictureTokens:
    """Tokens and pixels of a conversation whose messages have parts `{type: image, path | base64}`.

    Args:
        conversation: the content of its messages is a list of parts, or text.
        processor: of the model, with tokenizer and chat template.
        folder: that paths of pictures start from; by default the conversation's.
        length: most tokens. A longer conversation is cut behind a token, but in front of a picture that does not fit.

    Raises:
        UserError: as `chat.encode`; a picture that cannot be read; the processor refuses the pictures or expands
            something else than their placeholders; nothing to learn is left within `length`.
    """
    pictures = _pictures_of(conversation, folder)
    tokenizer, bare = tokenizer_of(processor), _without_pictures(conversation)
    written, learn, ends, text = chat.encode_places(bare, tokenizer)
    marks = _marks(conversation.where, processor, written, len(pictures))
    ids, inputs = _expanded(conversation.where, processor, text, pictures)
    origin = _aligned(conversation, tokenizer, written, marks, ids)
    carried = np.where(origin >= 0, learn[origin], False)
    expansions = runs(origin < 0)
    if length is None or len(ids) <= length:
        return PictureTokens(ids, carried, expansions, inputs)
    end = next((begin for begin, stop in expansions if begin < length < stop), length)
    if not carried[:end].any():
        raise UserError(
            f"{conversation.where} has nothing to learn in its first {length} tokens, so many do its pictures take.",
            "Raise `data.sequence_length`, or let the processor make less of a picture.",
        )
    # The pictures that are left are given to the processor anew, with the text up to the cut.
    template_end = int(origin[end - 1]) + 1 if origin[end - 1] >= 0 else int(origin[end])
    count = int((marks < template_end).sum())
    shorter, inputs = _expanded(conversation.where, processor, text[: int(ends[template_end - 1])], pictures[:count])
    if not np.array_equal(shorter, ids[:end]):
        raise UserError(
            f"{conversation.where} cannot be cut to {length} tokens: the processor makes others of its beginning.",
            "Raise `data.sequence_length`.",
        )
    return PictureTokens(ids[:end], carried[:end], tuple(span for span in expansions if span[1] <= end), inputs)


def prompt_with_pictures(conversation: chat.Conversation, processor: ProcessorMixin) -> PictureTokens:
    """Tokens and pixels of a conversation up to where the assistant's next turn begins; nothing of it is learned.

    Args:
        conversation: the content of its messages is a list of parts.
        processor: of the model, with tokenizer and chat template.

    Raises:
        UserError: as `encode_with_pictures`.
    """
    pictures, tokenizer = _pictures_of(conversation, None), tokenizer_of(processor)
    text = chat.render(_without_pictures(conversation), tokenizer, prompt=True)
    with reading("the prompt"):
        written = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
    _marks(conversation.where, processor, written, len(pictures))
    ids, inputs = _expanded(conversation.where, processor, text, pictures)
    return PictureTokens(ids, np.zeros(len(ids), dtype=bool), (), inputs)


def text_with_pictures(
    where: str, text: str, pictures: list[Image], processor: ProcessorMixin, special: bool = False
) -> PictureTokens:
    """Tokens and pixels of a text that holds the processor's placeholder for each picture; nothing of it is learned.

    Args:
        where: it comes from, for error messages.
        text: as a chat template or `placeholder_in_text` wrote it.
        pictures: in the order of their placeholders.
        processor: of the model.
        special: add the tokens that the tokenizer begins texts with.

    Raises:
        UserError: there are more or fewer placeholders than pictures, or the processor refuses them.
    """
    with reading("the prompt"):
        written = np.array(processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    _marks(where, processor, written, len(pictures))
    ids, inputs = _expanded(where, processor, text, pictures, special)
    return PictureTokens(ids, np.zeros(len(ids), dtype=bool), (), inputs)


def placeholder_in_text(processor: Any) -> str:
    """What stands for a picture in the texts that a processor reads."""
    return str(getattr(processor, "boi_token", None) or processor.image_token)


def answer_tokens(conversation: chat.Conversation, text: str, processor: ProcessorMixin) -> list[int]:
    """The tokens of an answer to a conversation, from where its prompt ends to the token that ends the turn.

    Args:
        conversation: up to the user's turn.
        text: the answer.
        processor: of the model.

    Raises:
        UserError: as `chat.encode`.
    """
    tokenizer, bare = tokenizer_of(processor), _without_pictures(conversation)
    said = {"role": chat.ASSISTANT, "content": [{"type": "text", "text": text}]}
    written, learn, _, _ = chat.encode_places(replace(bare, messages=(*bare.messages, said)), tokenizer)
    with reading("the prompt"):
        prompt = tokenizer(chat.render(bare, tokenizer, prompt=True), add_special_tokens=False, verbose=False)
    learned = np.flatnonzero(learn)
    begin = len(prompt["input_ids"])
    if written[:begin].tolist() != list(prompt["input_ids"]):  # the template writes something between
        begin = int(learned[0])
    return [int(token) for token in written[begin : int(learned[-1]) + 1]]


def _pictures_of(conversation: chat.Conversation, folder: Path | None) -> list[Image]:
    """The pictures of a conversation in their order."""
    return [
        picture_of_part(f"{conversation.where}, message {number},", part, folder or conversation.folder)
        for number, message in enumerate(conversation.messages, 1)
        if isinstance(message["content"], list)
        for part in message["content"]
        if part.get("type") == "image"
    ]


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase:
    """The processor's tokenizer, with the chat template that only the processor may have."""
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    if not tokenizer.chat_template:
        tokenizer.chat_template = processor.chat_template
    return tokenizer


def _without_pictures(conversation: chat.Conversation) -> chat.Conversation:
    """The conversation as templates need it: a part says that there is a picture, not which."""
    messages = []
    for message in conversation.messages:
        content = message["content"]
        if isinstance(content, list):
            content = [{"type": "image"} if part.get("type") == "image" else part for part in content]
        messages.append({**message, "content": content})
    return replace(conversation, messages=tuple(messages))


def _marks(where: str, processor: Any, written: np.ndarray, count: int) -> np.ndarray:
    """Places of the placeholders in the template's tokens, one for each picture."""
    names = [getattr(processor, name, None) for name in ("image_token", "boi_token")]
    ids = {processor.tokenizer.convert_tokens_to_ids(name) for name in names if isinstance(name, str)}
    marks = np.flatnonzero(np.isin(written, sorted(identity for identity in ids if isinstance(identity, int))))
    if len(marks) != count:
        raise UserError(
            f"{where} has {count} pictures, but {len(marks)} placeholders for them.",
            "Text must not hold the placeholder of a picture.",
        )
    return marks


def _expanded(
    where: str, processor: Any, text: str, pictures: list[Image], special: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """The processor's ids `[N]` int32, and what else it gives the model."""
    if not getattr(processor.image_processor, "do_convert_rgb", False):
        pictures = [picture.convert("RGB") for picture in pictures]
    given = {"images": pictures} if pictures else {}
    try:
        made = dict(processor(text=[text], add_special_tokens=special, return_tensors="pt", **given))
    except Exception as error:  # processors are other people's programs; they fail in ways of their own
        reason = plain((str(error).strip().splitlines() or [type(error).__name__])[0].rstrip("."), 200)
        raise UserError(f"{where} is refused by the model's processor: {reason}.") from error
    ids = made.pop("input_ids")[0].numpy().astype(np.int32)
    made.pop("attention_mask", None)
    return ids, made


def _aligned(
    conversation: chat.Conversation, tokenizer: Any, written: np.ndarray, marks: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """For each of the processor's tokens, which of the template's it is: `[N]` int64, -1 in expansions.

    Blanks beside a placeholder belong to its expansion: they may be one token with the blanks that it begins with.
    """
    origin = np.full(len(ids), -1, dtype=np.int64)
    bounds = [-1, *marks.tolist(), len(written)]
    place = 0
    for number in range(len(bounds) - 1):
        begin, end = bounds[number] + 1, bounds[number + 1]
        first, last = number == 0, number == len(bounds) - 2
        while not first and begin < end and not tokenizer.decode(written[begin : begin + 1]).strip():
            begin += 1
        while not last and begin < end and not tokenizer.decode(written[end - 1 : end]).strip():
            end -= 1
        if begin == end:  # pictures in a row: one expansion holds them
            continue
        segment = written[begin:end]
        at = 0 if first else len(ids) - len(segment) if last else _find(ids, segment, place + 1)
        if at < place or not np.array_equal(ids[at : at + len(segment)], segment):
            raise UserError(
                f"{conversation.where} cannot be learned from: the model's processor changes more than the "
                "placeholders of pictures.",
                "Give a conversation without pictures, or another model.",
            )
        place = at + len(segment)
        origin[at:place] = np.arange(begin, end)
    return origin


def _find(ids: np.ndarray, segment: np.ndarray, place: int) -> int:
    """Where a segment stands next, at `place` or behind it; -1 where it does not."""
    for at in range(place, len(ids) - len(segment) + 1):
        if ids[at] == segment[0] and np.array_equal(ids[at : at + len(segment)], segment):
            return at
    return -1


def runs(inside: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Begin and end of each run of true values of `[N]` bool."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(np.int8)))
    return tuple((int(begin), int(end)) for begin, end in edges.reshape(-1, 2))
