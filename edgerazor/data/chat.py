"""Conversations -> tokens, and which of them the assistant wrote.

A conversation is rendered with the tokenizer's own chat template, and the loss falls on what the model would have to
write itself: the assistant's words and the token that ends its turn, in every turn. System and user turns, and all
that the template puts around them, are there to be read. So is what the template puts before the assistant's words,
an empty thinking block included; thoughts that are not empty are words.

Templates that mark the assistant's words with `{% generation %}` say themselves where these are. For all others, the
conversation is rendered once more for each turn, with a placeholder in the place of the assistant's words: what stands
before and behind the placeholder is what the template writes, whatever it strips, adds, or drops from earlier turns.
Where a thinking block is not empty, the words begin where the prompt for generating that turn ends. A turn with tool
calls, which templates write in ways of their own, is what follows that prompt up to where the next message begins.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from tokenizers import Tokenizer, processors
from transformers.utils.chat_template_utils import render_jinja_template

from edgerazor import untrusted
from edgerazor.errors import UserError, plain, usage_error
from edgerazor.untrusted.tokenizer import bound_templates, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
#: Roles of messages in the form `{"from": ..., "value": ...}` -> what chat templates call them.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ASSISTANT = "assistant"
PLACEHOLDER = "PLACEHOLDER"
#: Fields of a part that is a picture; addresses are not fetched, but named in the message that refuses them.
PICTURE_FIELDS = ("type", "path", "base64", "url")
#: Templates that write today's date write this one, so that the same conversation is the same tokens tomorrow.
DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
#: What a template is given to switch thinking on or off, by family: Qwen3, SmolLM3 ...; Granite, DeepSeek.
THINKING = {"enable_thinking", "thinking"}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, and what else a template may want.

    Args:
        messages: in order, at least one.
        tools: JSON schemas of the tools that the assistant may call, or None.
        where: the record it comes from, for error messages.
        options: what the template is given beside messages and tools, such as `enable_thinking`.
        folder: that paths of pictures start from.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None
    where: str = "The conversation"
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def pictures(self) -> list[Message]:
        """The parts of its messages that are pictures: `{type: image, path | base64}`; then all content is in parts."""
        contents = (message.get("content") for message in self.messages)
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]

    def assistant_turns(self) -> list[int]:
        """Indices of the messages that the assistant wrote."""
        return [index for index, message in enumerate(self.messages) if message["role"] == ASSISTANT]


# --- from a record -----------------------------------------------------------------------------


def parse_conversation(
    where: str, value: Sequence[Any], tools: object = None, folder: Path | None = None
) -> Conversation:
    """A conversation from the list of messages of a record.

    Args:
        where: the record, for error messages.
        value: `[{"role": ..., "content": ...}, ...]`, or `[{"from": ..., "value": ...}, ...]`. Content is text, or
            parts `{type: text, text}` and `{type: image, path | base64}`.
        tools: a list of JSON schemas, such a list as JSON, or None.
        folder: that paths of pictures start from; None where there is none, as in a data set.

    Raises:
        UserError: a message is not of either form.
    """
    messages = tuple(
        _message(f"Message {index} of {_mid_sentence(where)}", message) for index, message in enumerate(value, 1)
    )
    conversation = Conversation(messages, _tools(where, tools), where, folder=folder or Path())
    return _in_parts(conversation) if conversation.pictures else conversation


def _in_parts(conversation: Conversation) -> Conversation:
    """The conversation with all content in parts, as templates for pictures read it."""
    messages = [
        message
        if isinstance(message["content"], list)
        else {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in conversation.messages
    ]
    return replace(conversation, messages=tuple(messages))


def _mid_sentence(where: str) -> str:
    return where[0].lower() + where[1:]


def _message(where: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}; expected an object with role and content.")
    given = {key: field for key, field in value.items() if field is not None}  # data sets fill absent fields with None
    if "role" not in given and "from" in given:
        given["role"] = ROLES.get(given["from"], given["from"]) if isinstance(given["from"], str) else None
        given["content"] = given.pop("value", None)
        del given["from"]
    if not isinstance(given.get("role"), str):
        raise UserError(f"{where} has no role; expected role and content, or from and value.")
    content = given.get("content")
    if content is None and given.get("tool_calls"):
        return {**given, "content": ""}
    return {**given, "content": _content(where, content)}


def _content(where: str, content: object) -> str | list[Message]:
    """The text of a message, which may come in parts; the parts where there are pictures among them."""
    if isinstance(content, list):
        parts = [_part(where, part) for part in content]
        if any(part["type"] == "image" for part in parts):
            return parts
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise UserError(f"{where} has {type(content).__name__} as its content; expected text.")
    check_encodable(where, "its content", content)
    return content


def _part(where: str, part: object) -> Message:
    """A part of a message: text, or a picture."""
    if isinstance(part, dict) and part.get("type") == "image":
        return {name: value for name, value in part.items() if name in PICTURE_FIELDS and value is not None}
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        check_encodable(where, "its content", part["text"])
        return {"type": "text", "text": part["text"]}
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UserError(f"{where} holds a part of type {plain(kind, 50)!r}; expected text or image.")


def check_encodable(where: str, what: str, text: str) -> None:
    """Refuse text that no tokenizer can read: JSON can hold halves of surrogate pairs.

    Raises:
        UserError: the text has one; `where` and `what` name its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half of a surrogate pair in {what}; expected valid text.") from error


def _tools(where: str, tools: object) -> tuple[Any, ...] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = untrusted.parse_json(tools)
        except ValueError as error:
            raise UserError(f"{where} has tools that are not JSON; expected a list of JSON schemas.") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError(f"{where} has {type(tools).__name__} as its tools; expected a list of JSON schemas.")
    return tuple(tools)


# --- to text -----------------------------------------------------------------------------------


def render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message] | None = None,
    prompt: bool = False,
) -> str:
    """A conversation as its tokenizer's template writes it.

    Args:
        conversation: to render.
        tokenizer: has the template.
        messages: to render instead of the conversation's own.
        prompt: end with what asks the assistant for its next turn.

    Raises:
        UserError: there is no template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{conversation.where} is a conversation, but the model's tokenizer has no chat template.",
            "Give plain text (column: NAME in the recipe), or an instruction-tuned model.",
        )
    given = list(conversation.messages) if messages is None else messages
    if any(len(part) > 1 for part in conversation.pictures):  # else they have been read, and a part says only where
        raise UserError(f"{conversation.where} holds pictures, which cannot be read here.", "Give text alone.")
    tools = list(conversation.tools) if conversation.tools else None
    bound_templates()
    try:
        text = str(
            tokenizer.apply_chat_template(
                given,
                tools=tools,
                chat_template=_template(conversation, tokenizer),
                tokenize=False,
                add_generation_prompt=prompt,
                **conversation.options,
            )
        )
    except Exception as error:  # a template is a program of other people; it fails in ways of its own
        reason = plain((str(error).strip().splitlines() or [type(error).__name__])[0].rstrip("."), 200)
        raise UserError(f"{conversation.where} is refused by the tokenizer's chat template: {reason}.") from error
    check_encodable(conversation.where, "what the tokenizer's chat template makes of it", text)
    return text


def _template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template for a conversation, with a date that stands still."""
    template = str(tokenizer.get_chat_template(tools=list(conversation.tools) if conversation.tools else None))
    if "strftime_now" not in template:
        return template
    date = "".join(f" | replace('{letter}', '{value}')" for letter, value in DATE.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{date} }}}}{{% endmacro %}}{template}"


def template_variables(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Variables of the tokenizer's chat templates, such as `enable_thinking`; names of attributes are not among them.

    Raises:
        UserError: a template is not Jinja.
    """
    templates = tokenizer.chat_template
    names = set()
    for template in templates.values() if isinstance(templates, dict) else [templates] if templates else []:
        before = ""
        try:
            for _, kind, word in jinja2.Environment().lex(str(template)):
                if kind == "name" and before != ".":
                    names.add(word)
                before = word if kind != "whitespace" else before
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"The tokenizer's chat template is not Jinja: {plain(error.message)}.") from error
    return names


def check_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Refuse options that the tokenizer's chat template does not ask for, or that are not the recipe's to give.

    Raises:
        UserError: with the option's name.
    """
    if not (options and tokenizer.chat_template):
        return
    known = template_variables(tokenizer)
    given = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in options:
        if name in given:
            raise usage_error(f"`data.template_kwargs` cannot set {name}, which every chat template is given.")
        if name not in known:
            raise usage_error(
                f"`data.template_kwargs` sets {plain(name)}, which the tokenizer's chat template does not know.",
                "Take it out, or spell it as the template does (chat_template.jinja or tokenizer_config.json).",
            )


def thinking_options(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> dict[str, bool]:
    """What switches the assistant's thinking on or off; nothing where the template has no such switch."""
    return dict.fromkeys(sorted(template_variables(tokenizer) & THINKING), thinking)


# --- to tokens ---------------------------------------------------------------------------------


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a conversation, and which of them are to be learned.

    Returns:
        `(ids [N] int32, learn [N] bool)`: true for the assistant's words and the tokens that end its turns.

    Raises:
        UserError: no template, a template that refuses the conversation or whose assistant turns cannot be found, a
            conversation without an assistant turn, or a tokenizer that cannot say where its tokens stand.
    """
    ids, learn, _, _ = encode_places(conversation, tokenizer)
    return ids, learn


def encode_places(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """As `encode`, also where each token ends in the text, `[N]` int64, and the text."""
    if not conversation.assistant_turns():
        roles = ", ".join(map(repr, dict.fromkeys(message["role"] for message in conversation.messages))) or "none"
        raise UserError(f"{conversation.where} has no assistant turn to learn from; its roles are {roles}.")
    text = render(conversation, tokenizer)
    with reading(_mid_sentence(conversation.where)):
        encoding = _engine_of(conversation, tokenizer).encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, dtype=np.int32)
    places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)  # [N, 2]: begin, end
    turns = _generation_blocks(conversation, tokenizer, text)
    if turns is None:
        turns = [span_of_turn(conversation, tokenizer, text, turn) for turn in conversation.assistant_turns()]
    learn = _with_turn_ends(_mask_of(turns, places), ids, places, text, ending_tokens(tokenizer))
    return ids, learn, places[:, 1], text


def _engine_of(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's engine, whose tokens say where they stand with their blanks."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{conversation.where} is a conversation, but the model's tokenizer cannot say which characters a token "
            "stands for, so the assistant's turns cannot be found.",
            "Give plain text (column: NAME in the recipe).",
        )
    return _untrimmed_engine(tokenizer)


@lru_cache(maxsize=2)
def _untrimmed_engine(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    engine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    engine.no_truncation()
    engine.no_padding()
    engine.post_processor = processors.Sequence([])  # it adds special tokens, which a template has, and trims blanks
    return engine


def _generation_blocks(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str
) -> list[tuple[int, int]] | None:
    """Begin and end of the {% generation %} blocks in the rendered conversation; None where a template has none.

    `apply_chat_template` would make a mask of them itself, but loses blocks that begin or end with a blank.
    """
    template = _template(conversation, tokenizer)
    if not GENERATION.search(template):
        return None
    rendered, blocks = render_jinja_template(
        conversations=[list(conversation.messages)],
        tools=list(conversation.tools) if conversation.tools else None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **conversation.options},
    )
    assert rendered == [text]
    return [(int(begin), int(end)) for begin, end in blocks[0]]


def _mask_of(turns: list[tuple[int, int]], places: np.ndarray) -> np.ndarray:
    """The mask `[N]` of tokens that hold any character of the turns."""
    learn = np.zeros(len(places), dtype=bool)
    for begin, end in turns:
        learn |= (places[:, 0] < end) & (places[:, 1] > begin)
    return learn


def span_of_turn(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str, turn: int
) -> tuple[int, int]:
    """Where in the rendered conversation the words of an assistant turn begin and end.

    Args:
        conversation: with that turn.
        tokenizer: has the template.
        text: the conversation as the template renders it.
        turn: number of the message.

    Raises:
        UserError: the turn cannot be found.
    """
    has_tool_calls = bool(conversation.messages[turn].get("tool_calls"))
    for way in (_after_prefix, _around_placeholder) if has_tool_calls else (_around_placeholder,):
        try:
            if span := way(conversation, tokenizer, text, turn):
                return span
        except UserError:  # the template rendered the conversation itself, but refuses the variant of it
            continue
    raise UserError(
        f"{conversation.where} cannot be learned from: in what the tokenizer's chat template makes of it, assistant "
        f"turn {conversation.assistant_turns().index(turn) + 1} cannot be found again.",
        "Mark the assistant's words in the template with {% generation %}.",
    )


def _around_placeholder(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str, turn: int
) -> tuple[int, int] | None:
    """The span that a placeholder takes in the rendering when it replaces the assistant's words."""
    word = PLACEHOLDER
    while word in text:
        word += "0"
    messages: list[Message] = list(conversation.messages)
    in_parts = isinstance(messages[turn].get("content"), list)  # templates for pictures read parts only
    messages[turn] = {"role": ASSISTANT, "content": [{"type": "text", "text": word}] if in_parts else word}
    parts = render(conversation, tokenizer, messages).split(word)
    if len(parts) != 2 or not text.endswith(parts[1]):
        return None
    before, end = parts[0], len(text) - len(parts[1])
    if not text.startswith(before):
        before = render(conversation, tokenizer, list(conversation.messages[:turn]), prompt=True)
    return (len(before), end) if text.startswith(before) and len(before) <= end else None


def _after_prefix(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str, turn: int
) -> tuple[int, int] | None:
    """The span that the turn adds to the conversation before it, whose rendering ends with the generation prompt."""
    before = render(conversation, tokenizer, list(conversation.messages[:turn]), prompt=True)
    up_to = render(conversation, tokenizer, list(conversation.messages[: turn + 1]))
    extends = text.startswith(up_to) and up_to.startswith(before) and len(before) < len(up_to)
    return (len(before), len(up_to)) if extends else None


def ending_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that may end a turn: all that stand for themselves, but for the one that begins a text."""
    ids = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return ids if tokenizer.bos_token_id == tokenizer.eos_token_id else ids - {tokenizer.bos_token_id}


def question_opening(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the template writes before the words of a conversation's first user turn, from which a model asks by itself.

    None where there is no template, it refuses the shortest of conversations, or it writes nothing there.
    """
    if not tokenizer.chat_template:
        return None
    try:
        text = render(Conversation(({"role": "user", "content": PLACEHOLDER},)), tokenizer)
    except UserError:
        return None
    return text.partition(PLACEHOLDER)[0] or None


def turn_ends(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens with which the template ends an assistant turn: at most one.

    Args:
        conversation: any conversation with a user turn.
        tokenizer: has the template.

    Raises:
        UserError: there is no template, or it refuses the shortest of conversations.
    """
    question = next(message for message in conversation.messages if message["role"] == "user")
    answer: str | list[dict[str, str]] = "yes"
    if conversation.pictures:  # whose templates take parts alone
        answer = [{"type": "text", "text": "yes"}]
        question = {**question, "content": answer}
    short = Conversation(
        (question, {"role": ASSISTANT, "content": answer}), None, conversation.where, conversation.options
    )
    ids, learn = encode(short, tokenizer)
    return set(ids[learn][-1:].tolist()) & ending_tokens(tokenizer)


def _with_turn_ends(learn: np.ndarray, ids: np.ndarray, places: np.ndarray, text: str, ending: set[int]) -> np.ndarray:
    """The mask, in which each run of words ends with the token that ends the turn, if there is one.

    That token, and blanks before it, are added where they are missing; blanks behind it are taken away.
    """

    def is_blank(token: int) -> bool:
        return not text[slice(*places[token])].strip()

    result = learn.copy()
    for stop in (np.flatnonzero(learn & ~np.append(learn[1:], False)) + 1).tolist():  # where runs have just ended
        last, place = stop - 1, stop
        while last > 0 and is_blank(last):
            last -= 1
        while place < len(ids) and is_blank(place):
            place += 1
        if learn[last] and int(ids[last]) in ending:
            result[last + 1 : stop] = False
        elif place < len(ids) and int(ids[place]) in ending:
            result[stop : place + 1] = True
    return result
