"""What `generate` reports: the text, its tokens and timings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from edgerazor.console import duration
from edgerazor.runtime import Generation, Model


class GenerateResult(BaseModel):
    """What a packed model wrote."""

    model: str = Field(description="the packed folder")
    engine: Literal["native", "transformers"] = Field(description="what computed")
    kernel: str = Field(description="names of the kernels that multiplied")
    threads: int
    note: str | None = Field(description="why it was not the native engine")
    seed: int
    prompt: str
    text: str = Field(description="behind the prompt, without the stop string that ended it")
    tokens: list[int] = Field(description="those written, a stop string's too, but not the end-of-text token")
    finish_reason: Literal["stop", "eos", "length", "context", "interrupted"] = Field(
        description="a stop string, the model, max_tokens, the model's last position, or Ctrl-C"
    )
    prompt_tokens: int
    load_seconds: float
    prefill_seconds: float = Field(description="to read the prompt")
    first_token_seconds: float | None = Field(description="from the prompt to the first token")
    decode_seconds: float = Field(description="from the first token on")
    tokens_per_second: float | None = Field(description="in decode_seconds")


def result_fields(generation: Generation) -> dict[str, Any]:
    """The fields of a result that come from what was generated."""
    fields = {name: round(value, 6) if isinstance(value, float) else value for name, value in vars(generation).items()}
    del fields["cached_tokens"]  # a single prompt has none
    return fields | {"finish_reason": generation.finish_reason or "interrupted"}


def timings(generation: Generation, model: Model) -> str:
    """Tokens, seconds and speed, in one line."""
    new = generation.prompt_tokens - generation.cached_tokens
    cached = f" ({generation.cached_tokens:,} more known)" if generation.cached_tokens else ""
    parts = [f"{new:,} prompt tokens{cached} in {duration(generation.prefill_seconds)}"]
    speed = f", {generation.tokens_per_second:.1f} a second" if generation.tokens_per_second is not None else ""
    parts.append(f"{len(generation.tokens):,} tokens in {duration(generation.decode_seconds)}{speed}")
    if generation.first_token_seconds is not None:
        parts.append(f"the first after {duration(generation.first_token_seconds)}")
    threads = f"{model.threads} thread{'s' if model.threads > 1 else ''}"
    return f"{'; '.join(parts)}; {model.engine} engine, {model.kernel}, {threads}; {ending(generation)}"


def ending(generation: Generation) -> str:
    """Why the text ended."""
    reasons = {
        "stop": "ended by a stop string",
        "eos": "ended by the model",
        "length": "ended at --max-tokens",
        "context": "ended at the model's last position",
    }
    return reasons[generation.finish_reason] if generation.finish_reason else "interrupted"
