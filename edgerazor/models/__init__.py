"""Models of transformers: loading them, their structure, captures of their states, and the layer-by-layer pass.

Nothing here is written per family. A decoder is recognised by its structure: a causal language model of transformers
that holds one list of equal decoder layers, with `nn.Linear` inside, an input embedding and an output head. In a model
that sees, the decoder is the part that reads text; the tower that looks at pictures, and what projects its features
into the decoder, stand beside it.
"""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgerazor.models.attention_capture import (
    attention_base,
    attention_forward,
    capture_attention,
    check_attention_capture,
    enable_attention_capture,
    has_attention_interface,
    register_attention,
    set_attention,
)
from edgerazor.models.blocks import Blocks
from edgerazor.models.compatibility import cache_name, checkpoint_activations, with_cache
from edgerazor.models.experts import at_tokens, expert_of, separate_experts
from edgerazor.models.gguf_teacher import gguf_origin, is_gguf
from edgerazor.models.hidden_states import capture_hidden, final_states, logit_shape
from edgerazor.models.layerwise import LayerwisePass, WeightTransform
from edgerazor.models.loading import (
    auto_class,
    auto_config,
    caps_attention,
    complete_config,
    completed,
    copy_companions,
    decoder_config,
    describe_source,
    error_summary,
    fingerprint,
    generation_config,
    initialise,
    load,
    load_config,
    load_tokenizer,
    outline,
    quiet_transformers,
    resolve,
    sees,
    skeleton,
    stored_shapes,
    weight_size,
)
from edgerazor.models.observer import Observer
from edgerazor.models.onloading import drop_pages, freed_blocks_kept
from edgerazor.models.pictures import (
    BLIND,
    FIRST,
    PICTURES,
    PictureFeatures,
    PictureTable,
    features_of,
    has_pictures,
    input_names,
    let_see,
    own_positions,
    picture_mask,
    placeholder_of,
    split_pictures,
    tower_of,
)
from edgerazor.models.processors import has_processor, load_processor
from edgerazor.models.routing import capture_routing
from edgerazor.models.streaming import StreamedModel, StreamedStates
from edgerazor.models.structure import QuantTarget, Structure, embedding_scale, find_head, structure

__all__ = [
    "BLIND",
    "FIRST",
    "PICTURES",
    "Blocks",
    "LayerwisePass",
    "Observer",
    "PictureFeatures",
    "PictureTable",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "QuantTarget",
    "StreamedModel",
    "StreamedStates",
    "Structure",
    "WeightTransform",
    "at_tokens",
    "attention_base",
    "attention_forward",
    "auto_class",
    "auto_config",
    "cache_name",
    "caps_attention",
    "capture_attention",
    "capture_hidden",
    "capture_routing",
    "check_attention_capture",
    "checkpoint_activations",
    "complete_config",
    "completed",
    "copy_companions",
    "decoder_config",
    "describe_source",
    "drop_pages",
    "embedding_scale",
    "enable_attention_capture",
    "error_summary",
    "expert_of",
    "features_of",
    "final_states",
    "find_head",
    "fingerprint",
    "freed_blocks_kept",
    "generation_config",
    "gguf_origin",
    "has_attention_interface",
    "has_pictures",
    "has_processor",
    "initialise",
    "input_names",
    "is_gguf",
    "let_see",
    "load",
    "load_config",
    "load_processor",
    "load_tokenizer",
    "logit_shape",
    "outline",
    "own_positions",
    "picture_mask",
    "placeholder_of",
    "quiet_transformers",
    "register_attention",
    "resolve",
    "sees",
    "separate_experts",
    "set_attention",
    "skeleton",
    "split_pictures",
    "stored_shapes",
    "structure",
    "tower_of",
    "weight_size",
    "with_cache",
]
