"""Model families: where the layers are, what they are for; loading teacher and student.

Nothing here is written per family. A decoder is recognised by its shape: a causal language model of transformers
that holds one list of equal decoder layers, with `nn.Linear` inside, an input embedding and an output head.
"""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgerazor.models.attention_capture import (
    attend,
    attention_base,
    capture_attention,
    check_attention,
    exchangeable_attention,
    open_attention,
    register_attention,
    use_attention,
)
from edgerazor.models.blocks import Blocks
from edgerazor.models.compatibility import cache_name, checkpoint_activations, with_cache
from edgerazor.models.hidden import capture_hidden, final_states, logit_shape
from edgerazor.models.layerwise import LayerwisePass, Observer, drop_pages
from edgerazor.models.loading import (
    auto_config,
    caps_attention,
    complete_config,
    completed,
    copy_companions,
    describe_source,
    fingerprint,
    generation_config,
    gguf_tokenizer,
    initialise,
    load,
    load_config,
    load_tokenizer,
    quiet_transformers,
    resolve,
    skeleton,
    stored_shapes,
)
from edgerazor.models.structure import QuantTarget, Structure, embedding_scale, find_head, structure

__all__ = [
    "Blocks",
    "LayerwisePass",
    "Observer",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "QuantTarget",
    "Structure",
    "attend",
    "attention_base",
    "auto_config",
    "cache_name",
    "caps_attention",
    "capture_attention",
    "capture_hidden",
    "check_attention",
    "checkpoint_activations",
    "complete_config",
    "completed",
    "copy_companions",
    "describe_source",
    "drop_pages",
    "embedding_scale",
    "exchangeable_attention",
    "final_states",
    "find_head",
    "fingerprint",
    "generation_config",
    "gguf_tokenizer",
    "initialise",
    "load",
    "load_config",
    "load_tokenizer",
    "logit_shape",
    "open_attention",
    "quiet_transformers",
    "register_attention",
    "resolve",
    "skeleton",
    "stored_shapes",
    "structure",
    "use_attention",
    "with_cache",
]
