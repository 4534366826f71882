"""Model families: where the layers are, what they are for; loading teacher and student.

Nothing here is written per family. A decoder is recognised by its shape: a causal language model of transformers
that holds one list of equal decoder layers, with `nn.Linear` inside, an input embedding and an output head.
"""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgerazor.models.hidden import capture_hidden, final_states, logit_shape
from edgerazor.models.loading import (
    caps_attention,
    describe_source,
    fingerprint,
    initialise,
    load,
    load_config,
    load_tokenizer,
    quiet_transformers,
    resolve,
)
from edgerazor.models.structure import Site, Structure, embedding_scale, structure

__all__ = [
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "Site",
    "Structure",
    "caps_attention",
    "capture_hidden",
    "describe_source",
    "embedding_scale",
    "final_states",
    "fingerprint",
    "initialise",
    "load",
    "load_config",
    "load_tokenizer",
    "logit_shape",
    "quiet_transformers",
    "resolve",
    "structure",
]
