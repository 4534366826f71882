"""Conversations -> tokens, and which of them the assistant wrote.

A conversation is rendered with the tokenizer's own chat template, and the loss falls on what the model would have to
write itself: the assistant's words and the token that ends its turn, in every turn. System and user turns, and all
that the template puts around them, are there to be read. So is what the template puts before the assistant's words,
an empty thinking block included; thoughts that are not empty are words.

Templates that mark the assistant's words with `{% generation %}` say themselves where these are. For all others, the
conversation is rendered once more for each turn, with a placeholder in the place of the assistant's words: what stands
before and behind the placeholder is what the template writes, whatever it strips, adds, or drops from earlier turns.
Where a thinking block is not empty, the words begin where the prompt for generating that turn ends.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgerazor.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
#: Roles of messages in the form `{"from": ..., "value": ...}` -> what chat templates call them.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ASSISTANT = "assistant"
PLACEHOLDER = "PLACEHOLDER"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, and what else a template may want.

    Args:
        messages: in order, at least one.
        tools: JSON schemas of the tools that the assistant may call, or None.
        where: the record it comes from, for error messages.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None
    where: str = "The conversation"

    def assistant_turns(self) -> list[int]:
        """Which messages the assistant wrote."""
        return [index for index, message in enumerate(self.messages) if message["role"] == ASSISTANT]


# --- from a record -----------------------------------------------------------------------------


def conversation(where: str, value: list[Any], tools: object = None) -> Conversation:
    """A conversation from the list of messages of a record.

    Args:
        where: the record, for error messages.
        value: `[{"role": ..., "content": ...}, ...]`, or `[{"from": ..., "value": ...}, ...]`.
        tools: a list of JSON schemas, such a list as JSON, or None.

    Raises:
        UserError: a message is not of either form.
    """
    messages = tuple(_message(f"Message {index} of {_inside(where)}", each) for index, each in enumerate(value, 1))
    return Conversation(messages, _tools(where, tools), where)


def _inside(where: str) -> str:
    return where[0].lower() + where[1:]


def _message(where: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}; expected an object with role and content.")
    given = {key: each for key, each in value.items() if each is not None}  # data sets fill absent fields with None
    if "role" not in given and "from" in given:
        given["role"] = ROLES.get(given["from"], given["from"])
        given["content"] = given.pop("value", None)
        del given["from"]
    if not isinstance(given.get("role"), str):
        raise UserError(f"{where} has no role; expected role and content, or from and value.")
    content = given.get("content")
    if content is None and given.get("tool_calls"):
        return {**given, "content": ""}
    return {**given, "content": _content(where, content)}


def _content(where: str, content: object) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(content, list):
        if strange := [each for each in content if not (isinstance(each, dict) and isinstance(each.get("text"), str))]:
            kind = strange[0].get("type") if isinstance(strange[0], dict) else type(strange[0]).__name__
            raise UserError(f"{where} holds a part of type {kind!r}; expected text only.")
        content = "".join(each["text"] for each in content)
    if not isinstance(content, str):
        raise UserError(f"{where} has {type(content).__name__} as its content; expected text.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half of a surrogate pair in its content; expected valid text.") from error
    return content


def _tools(where: str, tools: object) -> tuple[Any, ...] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"{where} has tools that are not JSON; expected a list of JSON schemas.") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError(f"{where} has {type(tools).__name__} as its tools; expected a list of JSON schemas.")
    return tuple(tools)


# --- to text -----------------------------------------------------------------------------------


def render(
    asked: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message] | None = None,
    prompt: bool = False,
) -> str:
    """A conversation as its tokenizer's template writes it.

    Args:
        asked: the conversation.
        tokenizer: has the template.
        messages: to render instead of the conversation's own.
        prompt: end with what asks the assistant for its next turn.

    Raises:
        UserError: there is no template, or it refuses the conversation.
    """
    return str(_apply(asked, tokenizer, messages, tokenize=False, add_generation_prompt=prompt))


def _apply(
    asked: Conversation, tokenizer: PreTrainedTokenizerBase, messages: list[Message] | None, **options: Any
) -> Any:
    if not tokenizer.chat_template:
        raise UserError(
            f"{asked.where} is a conversation, but the model's tokenizer has no chat template.",
            "Give plain text (column: NAME in the recipe), or an instruction-tuned model.",
        )
    given = list(asked.messages) if messages is None else messages
    tools = list(asked.tools) if asked.tools else None
    try:
        return tokenizer.apply_chat_template(given, tools=tools, **options)
    except Exception as error:  # a template is a program of other people; it fails in ways of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{asked.where} is refused by the tokenizer's chat template: {reason}.") from error


# --- to tokens ---------------------------------------------------------------------------------


def encode(asked: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a conversation, and which of them are to be learned.

    Returns:
        `(ids [N] int32, learn [N] bool)`: true for the assistant's words and the tokens that end its turns.

    Raises:
        UserError: no template, a template that refuses the conversation or whose assistant turns cannot be found, a
            conversation without an assistant turn, or a tokenizer that cannot say where its tokens stand.
    """
    if not asked.assistant_turns():
        roles = ", ".join(repr(role) for role in dict.fromkeys(each["role"] for each in asked.messages)) or "none"
        raise UserError(f"{asked.where} has no assistant turn to learn from; its roles are {roles}.")
    text = render(asked, tokenizer)
    if not tokenizer.is_fast:
        raise UserError(
            f"{asked.where} is a conversation, but the model's tokenizer cannot say which characters a token stands "
            "for, so the assistant's turns cannot be found.",
            "Give plain text (column: NAME in the recipe).",
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    places = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)  # [N, 2]: begin, end
    learn = _marked(asked, tokenizer) if _marks_turns(asked, tokenizer) else _placed(asked, tokenizer, text, places)
    return ids, _with_turn_ends(learn, ids, places, text, ending_tokens(tokenizer))


def _marks_turns(asked: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has {% generation %} blocks."""
    tools = list(asked.tools) if asked.tools else None
    return bool(GENERATION.search(tokenizer.get_chat_template(tools=tools)))


def _marked(asked: Conversation, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The mask that a template with {% generation %} blocks gives."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    return np.array(_apply(asked, tokenizer, None, **options)["assistant_masks"], dtype=bool)


def _placed(asked: Conversation, tokenizer: PreTrainedTokenizerBase, text: str, places: np.ndarray) -> np.ndarray:
    """The mask `[N]` of tokens that hold any character of the assistant's words."""
    learn = np.zeros(len(places), dtype=bool)
    begins, ends = places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)  # trimmed blanks have no width
    for turn in asked.assistant_turns():
        begin, end = words_of_turn(asked, tokenizer, text, turn)
        learn |= (begins < end) & (ends > begin)
    return learn


def words_of_turn(asked: Conversation, tokenizer: PreTrainedTokenizerBase, text: str, turn: int) -> tuple[int, int]:
    """Where in the rendered conversation the words of an assistant turn begin and end.

    Args:
        asked: the conversation.
        tokenizer: has the template.
        text: the conversation as the template renders it.
        turn: number of the message.

    Raises:
        UserError: the turn cannot be found.
    """
    word = PLACEHOLDER
    while word in text:
        word += "0"
    messages: list[Message] = list(asked.messages)
    messages[turn] = {"role": ASSISTANT, "content": word}
    parts = render(asked, tokenizer, messages).split(word)
    if len(parts) == 2 and text.endswith(parts[1]):
        before, end = parts[0], len(text) - len(parts[1])
        if not text.startswith(before):
            before = render(asked, tokenizer, list(asked.messages[:turn]), prompt=True)
        if text.startswith(before) and len(before) <= end:
            return len(before), end
    raise UserError(
        f"{asked.where} cannot be learned from: in what the tokenizer's chat template makes of it, assistant turn "
        f"{asked.assistant_turns().index(turn) + 1} cannot be found again.",
        "Mark the assistant's words in the template with {% generation %}.",
    )


def ending_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that may end a turn: all that stand for themselves, but for the one that begins a text."""
    ids = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return ids if tokenizer.bos_token_id == tokenizer.eos_token_id else ids - {tokenizer.bos_token_id}


def _with_turn_ends(learn: np.ndarray, ids: np.ndarray, places: np.ndarray, text: str, ending: set[int]) -> np.ndarray:
    """The mask, with the ending token behind each run of words, and the blanks between, if there is one."""

    def blank(token: int) -> bool:
        return not text[slice(*places[token])].strip()

    result = learn.copy()
    for first in (np.flatnonzero(learn[:-1] & ~learn[1:]) + 1).tolist():  # where runs have just ended
        last, place = first - 1, first
        while last > 0 and blank(last):
            last -= 1
        while place < len(ids) and blank(place):
            place += 1
        if int(ids[last]) not in ending and place < len(ids) and int(ids[place]) in ending:
            result[first : place + 1] = True
    return result
