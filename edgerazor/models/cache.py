"""The KV cache of a model of transformers, under the name that the installed transformers has for it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def cache_name(model: nn.Module) -> str:
    """What a model's forward pass and its output call the KV cache.

    transformers 5.24 renamed `past_key_values` to `cache`; the old name works until 5.40, with a warning.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Arguments of a forward pass that goes on from a cache, or makes one where it is None."""
    return {cache_name(model): cache, "use_cache": True}
