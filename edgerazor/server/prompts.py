"""From a request to jobs: templates and tokens of the prompt, settings of the sampler, limits.

What a request leaves out of the sampling comes from the model's `generation_config.json`, as its makers recommend it;
what that does not say is OpenAI's: temperature 1, and every token may be drawn.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from edgerazor import data, untrusted
from edgerazor.data import Conversation
from edgerazor.errors import UserError, plain
from edgerazor.recipe import Generate
from edgerazor.runtime import generation
from edgerazor.runtime.batching import SequenceRequest, TokenConstraint
from edgerazor.runtime.sampling import Sampler
from edgerazor.server import tool_calls
from edgerazor.server.engine import Engine, Job
from edgerazor.server.errors import ApiError
from edgerazor.server.grammar import Grammars
from edgerazor.server.protocol import (
    MOST_TEXTS,
    ChatRequest,
    ChosenTool,
    CompletionRequest,
    SamplingFields,
    TokenizeRequest,
    Tool,
)

#: Roles of messages.
ROLES = {"system", "developer", "user", "assistant", "tool"}
#: Most tokens of a completion that does not say how many, as OpenAI has it; an answer goes to the end of the context.
COMPLETION_TOKENS = 16
#: Fields of `generation_config.json` that are defaults of requests.
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Forced:
    """Where the answer has to be a call: what the prompt has begun of it already, and the JSON schema of the rest."""

    opening: str
    schema: dict[str, Any]


class Prompts:
    """Makes jobs of requests, in the thread that reads prompts.

    Args:
        engine: whose model is to write.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.model = engine, engine.model
        tokenizer = self.model.tokenizer
        self.turn_ends = engine.text_ends | (
            generation.turn_ends(tokenizer) if tokenizer.chat_template else frozenset()
        )
        self.grammars = Grammars(tokenizer, self.model.vocabulary, self.turn_ends)
        self.recommended = self._recommended()

    # Completions -----------------------------------------------------------------------------------------------------

    def of_completion(self, request: CompletionRequest) -> list[Job]:
        """Jobs of a completion: `n` of each prompt, one behind the other.

        Raises:
            ApiError: a prompt does not fit, or there are too many.
            UserError: the tokenizer cannot read one.
        """
        prompts = request.prompts
        if not prompts or len(prompts) * request.n > MOST_TEXTS:
            raise ApiError(400, f"A request has 1 to {MOST_TEXTS} texts, `n` of each prompt.", "prompt")
        jobs = []
        for prompt in prompts:
            ids = self._checked(self._text_tokens(prompt) if isinstance(prompt, str) else prompt, "prompt")
            room = self._room(ids, request.max_tokens, COMPLETION_TOKENS, "prompt", spare=request.echo)
            job = Job(
                SequenceRequest(
                    ids,
                    None,
                    max(1, room),
                    self.engine.text_ends,
                    request.logprobs,
                    prompt_logprobs=request.echo and request.logprobs is not None,
                ),
                request.stops,
                goes_on=True,
                empty=room == 0,
            )
            jobs += self._several(job, request)
        return jobs

    def _text_tokens(self, prompt: str) -> list[int]:
        generation.check_text(prompt)
        return generation.text_tokens(self.model.tokenizer, prompt)

    # Chats -----------------------------------------------------------------------------------------------------------

    def of_chat(self, request: ChatRequest) -> list[Job]:
        """The `n` jobs of a chat.

        Raises:
            ApiError: a message or field is wrong, or the chat does not fit.
            UserError: there is no chat template, or it refuses the chat; or a JSON schema cannot be followed.
        """
        forced = self.forced(request)
        text = self.render(request.messages, request.tools if request.calls_tools else [], request.chat_template_kwargs)
        if forced is not None:
            text += forced.opening
        ids = self._checked(generation.rendered_tokens(self.model.tokenizer, text), "messages")
        wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        room = self._room(ids, wanted, self.engine.context, "messages")
        job = Job(
            SequenceRequest(
                ids, None, max(1, room), self.turn_ends, request.top_logprobs if request.logprobs else None
            ),
            request.stops,
            shown=self.marks() if request.calls_tools else frozenset(),
            empty=room == 0,
        )
        return self._several(job, request, forced.schema if forced else self._schema(request))

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool], options: dict[str, Any]) -> str:
        """A chat as its template writes it, up to where the assistant's turn begins.

        Raises:
            ApiError: a message is none, or the template does not know a tool or an option.
            UserError: there is no template, or it refuses the chat.
        """
        tokenizer = self.model.tokenizer
        generation.check_template(tokenizer)
        schemas = [tool.model_dump(mode="json", exclude_none=True) for tool in tools]
        known = data.template_variables(tokenizer) if schemas or options else set()
        if schemas and "tools" not in known:
            raise ApiError(400, "The model's chat template knows no tools.", "tools", "unsupported_parameter")
        for name in options:
            if name not in known or name in ("messages", "tools", "add_generation_prompt"):
                raise ApiError(
                    400,
                    f"The model's chat template does not know {plain(name, 50)}.",
                    f"chat_template_kwargs.{plain(name, 50)}",
                )
        parsed = data.parse_conversation("the request", [self._message(message) for message in messages])
        conversation = Conversation(parsed.messages, tuple(schemas) or None, "The chat", options)
        return data.render(conversation, tokenizer, prompt=True)

    def marks(self) -> frozenset[int]:
        """Special tokens that open calls of tools, so that they are read as text."""
        tokenizer = self.model.tokenizer
        words = {*tool_calls.MARKS.values(), tool_calls.CLOSING, "[ARGS]", "[CALL_ID]"}
        return frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if str(token) in words)

    def call_kind(self) -> tool_calls.Kind:
        """How the model's template writes calls of tools."""
        templates = self.model.tokenizer.chat_template
        return tool_calls.kind_of(str(templates))

    def forced(self, request: ChatRequest) -> Forced | None:
        """How the answer begins and what it is, where it has to be a call."""
        choice = request.tool_choice
        if choice in (None, "none", "auto"):
            return None
        kind = self.call_kind()
        functions = [
            (tool.function.name, tool.function.parameters)
            for tool in request.tools
            if not isinstance(choice, ChosenTool) or tool.function.name == choice.function.name
        ]
        return Forced(tool_calls.FORCED[kind], tool_calls.forced_schema(kind, functions))

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as templates want it: arguments of calls as objects, `developer` as `system`."""
        role = message.get("role")
        if role not in ROLES:
            raise ApiError(
                400, f"There is no role {plain(role, 50)!r}; expected {', '.join(sorted(ROLES))}.", "messages"
            )
        result = {**message, "role": "system" if role == "developer" else role}
        calls = message.get("tool_calls")
        if calls is not None:
            if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
                raise ApiError(400, "The field `tool_calls` of a message is a list of calls.", "messages")
            result["tool_calls"] = [self._call(call) for call in calls]
        return result

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, "A call in `tool_calls` names no function.", "messages")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = untrusted.parse_json(arguments or "{}")
            except ValueError as error:
                raise ApiError(
                    400, f"The arguments of a call in `tool_calls` are no JSON: {error}.", "messages"
                ) from None
        return {**call, "function": {**function, "arguments": arguments}}

    def _schema(self, request: ChatRequest) -> dict[str, Any] | None:
        """The JSON schema of the answer, if it has one."""
        if request.response_format is None or not request.constrains:
            return None
        wanted = request.response_format.json_schema
        return {"type": "object"} if wanted is None else wanted.schema_

    # Tokens ----------------------------------------------------------------------------------------------------------

    def tokens(self, request: TokenizeRequest) -> list[int]:
        """The tokens of a text or a chat.

        Raises:
            ApiError, UserError: as `of_completion` and `of_chat`.
        """
        tokenizer = self.model.tokenizer
        if request.messages is not None:
            text = self.render(request.messages, request.tools, request.chat_template_kwargs)
            return generation.rendered_tokens(tokenizer, text)
        generation.check_text(request.prompt)
        if request.add_special_tokens:
            return [] if not request.prompt else generation.text_tokens(tokenizer, request.prompt)
        return generation.rendered_tokens(tokenizer, str(request.prompt))

    # Both ------------------------------------------------------------------------------------------------------------

    def _checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """The tokens of a prompt, if the model knows them."""
        try:
            self.model.check(ids[: self.model.max_positions])
            generation.check_prompt(self.model, ids)
        except UserError as error:
            raise ApiError(400, error.message, param) from None
        return tuple(ids)

    def _room(self, ids: Sequence[int], wanted: int | None, default: int, param: str, spare: bool = False) -> int:
        """Tokens that may be written behind a prompt.

        Args:
            ids: the prompt.
            wanted: how many at most; None for the default, as far as the server's limit allows.
            default: see there.
            param: the field of the prompt.
            spare: a prompt that fills the context is no mistake: its log-probabilities are wanted.
        """
        most = self.engine.settings.max_tokens_per_request
        if most is not None and wanted is not None and wanted > most:
            raise ApiError(400, f"The server writes at most {most:,} tokens for a request.", "max_tokens")
        if wanted is None:
            wanted = default if most is None else min(default, most)
        room = self.engine.context - len(ids)
        if room < 0 or (room == 0 and wanted > 0 and not spare):
            raise ApiError(
                400,
                f"The prompt has {len(ids):,} tokens, and the context holds {self.engine.context:,} with the answer.",
                param,
                "context_length_exceeded",
            )
        return min(wanted, room)

    def _several(self, job: Job, request: SamplingFields, schema: dict[str, Any] | None = None) -> list[Job]:
        """The job `n` times, each with a sampler and a constraint of its own."""
        settings = self._settings(request)
        seed = secrets.randbits(63) if request.seed is None else request.seed & ((1 << 63) - 1)
        jobs = []
        for number in range(request.n):
            try:
                sampler = Sampler(settings, seed + number, self.model.vocabulary)
            except UserError as error:
                raise ApiError(400, error.message, "logit_bias") from None
            constraint: TokenConstraint | None = None if schema is None else self.grammars.constraint(schema)
            filled = dataclasses.replace(job.request, sampler=sampler, constraint=constraint)
            jobs.append(dataclasses.replace(job, request=filled))
        return jobs

    def _settings(self, request: SamplingFields) -> Generate:
        """How tokens are chosen."""
        values: dict[str, Any] = dict(self.recommended)
        for name in RECOMMENDED:
            if (value := getattr(request, name)) is not None:
                values[name] = value
        values["top_k"] = max(0, values["top_k"])
        if values["top_p"] == 0 or values["temperature"] == 0:  # the likeliest alone
            values |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        values |= {name: getattr(request, name) for name in ("presence_penalty", "frequency_penalty")}
        values["logit_bias"] = {int(token): bias for token, bias in request.logit_bias.items()}
        return Generate(**values)

    def _recommended(self) -> dict[str, Any]:
        """Defaults of the sampling: the model's, where its generation_config.json has sensible ones, else OpenAI's."""
        values: dict[str, Any] = {**{name: Generate.default(name) for name in RECOMMENDED}, "temperature": 1.0}
        path = self.model.folder / "generation_config.json"
        stored = untrusted.read_json(path, hint="Copy or pack the model again.") if path.exists() else {}
        for name in RECOMMENDED:
            value = stored.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                number: Any = int(value) if name == "top_k" else float(value)
                try:
                    Generate(**{"temperature": 1.0, name: number})
                except ValidationError:
                    continue
                values[name] = number
        return values
