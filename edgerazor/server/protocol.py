"""The requests: which fields there are, what they may hold, and one sentence for what they may not.

Nothing is left out silently: a field that is not known here is refused by name. Those that clients send as a matter of
course and that change nothing here are known, and without effect (`NO_EFFECT`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgerazor import untrusted
from edgerazor.errors import plain
from edgerazor.server.errors import ApiError

#: Texts that one request may ask for, and prompts; stop strings; tokens beside each that come with their probability.
MOST_TEXTS, MOST_STOPS, MOST_TOP = 128, 4, 20
#: Lists and objects of a body, with what is in them; a token of a prompt is one.
MOST_ENTRIES = 1 << 20

Text = Annotated[str, Field(max_length=4_000_000)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class Strict(BaseModel):
    """An object that has these fields alone, with the types of JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream has beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingFields(Strict):
    """What both kinds of requests have.

    The fields without effect: names of users and caches, storing, tiers of service.
    """

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=1024
    )
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
    n: int = Field(1, ge=1, le=MOST_TEXTS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none of them empty."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(stop for stop in stops if stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: goes with `stream` alone")
        return self


class CompletionRequest(SamplingFields):
    """A body of `/v1/completions`."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    return_tokens_as_token_ids: bool = False
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _best_of_all(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: is not supported; leave it out, or give as many as `n`")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and (not prompt or isinstance(prompt[0], str | list))
        return prompt if several else [prompt]


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(Strict):
    """A tool, which is a function."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    """The name of a function."""

    name: str


class ChosenTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Strict):
    """A JSON schema for the answer."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: goes with the type json_schema, and only with it")
        return self


class ChatRequest(SamplingFields):
    """A body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP)
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    modalities: list[Literal["text"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: goes with `logprobs` alone")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice: there are no `tools`")
        if isinstance(self.tool_choice, ChosenTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice: names a function that is not among the `tools`")
        if self.constrains and self.calls_tools:
            raise ValueError("response_format: does not go with `tools`, unless `tool_choice` is none")
        return self

    @property
    def constrains(self) -> bool:
        """Whether the answer has to be JSON."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may be a call of a tool."""
        return bool(self.tools) and self.tool_choice != "none"


class TokenizeRequest(Strict):
    """A body of `/tokenize`: a text, or a chat."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either a prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """A body of `/detokenize`."""

    model: str | None = None
    tokens: list[Token]


Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], body: bytes) -> Request:
    """A checked request.

    Raises:
        ApiError: the body is no JSON, or a field of it is unknown or wrong; the error names the field.
    """
    try:
        values = untrusted.parse_json(body, dict, most_entries=MOST_ENTRIES)
    except ValueError as error:
        raise ApiError(400, f"The body of the request cannot be read: {error}.") from None
    values = {name: value for name, value in values.items() if value is not None}  # null is absent
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first_mistake(error) from None
    except RecursionError:
        raise ApiError(400, "The body of the request is nested too deeply.") from None


def _first_mistake(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints as one sentence that names the field."""
    mistake = error.errors(include_url=False, include_input=False)[0]
    fields = [str(part) for part in mistake["loc"] if not _is_variant(part)]
    field = plain(".".join(fields) or "the body", 100)
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        return ApiError(400, f"The field `{field}` is unknown or not supported.", field, "unsupported_parameter")
    if mistake["type"] == "missing":
        return ApiError(400, f"The field `{field}` is missing.", field, "missing_required_parameter")
    if mistake["type"] == "value_error":
        name, _, rest = message.partition(": ")
        field = ".".join([*fields, name])
        return ApiError(400, f"The field `{field}` {rest}.", field, "invalid_value")
    return ApiError(400, f"The field `{field}` is wrong: {plain(message, 200)}.", field, "invalid_value")


def _is_variant(part: int | str) -> bool:
    """Whether a part of a location is pydantic's name of a type among several, rather than a field."""
    return isinstance(part, str) and (
        "[" in part or part in ("str", "constrained-str") or (part[:1].isupper() and part.isalnum())
    )
