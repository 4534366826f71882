"""Packed models, running: logits, scores of continuations, sequences with a KV cache, text.

Two engines compute the same. `native` is a decoder in C++ from the embedding to the head; it knows the architectures
that have a file in `edgerazor/families`. `transformers` knows every model and every setting; `Model.note` then says why
the native engine does not run it.
"""

from edgerazor.runtime.engine import Model, Session
from edgerazor.runtime.generation import Chat, Generation, Stream
from edgerazor.runtime.native_model import NativeModel
from edgerazor.runtime.rope import max_positions
from edgerazor.runtime.scoring import Score, ScoreRequest, score_whole
from edgerazor.runtime.select_engine import ENGINES, load
from edgerazor.runtime.transformers_model import TransformersModel

__all__ = [
    "ENGINES",
    "Chat",
    "Generation",
    "Model",
    "NativeModel",
    "Score",
    "ScoreRequest",
    "Session",
    "Stream",
    "TransformersModel",
    "load",
    "max_positions",
    "score_whole",
]
