"""Model families: what an architecture has beyond the common decoder. Each file here is one model type of transformers.

The file is named after `model_type` in config.json and offers one `FAMILY`, which says what the native engine and the
GGUF files, read and written, need to know of the architecture; so a new family is one new file. `core/base.py` explains
what a family says. An architecture without a file here runs in transformers all the same, only more slowly.
"""

from edgerazor.families.core.base import (
    EMBEDDING,
    FINAL_NORM,
    GGUF_LONG_FACTORS,
    GGUF_SHORT_FACTORS,
    HEAD,
    LINEARS,
    Experts,
    Family,
    GgufArchitecture,
    GgufMetadata,
    GgufValue,
    KvHeads,
    LayerInputs,
    Mixer,
    NativeArchitecture,
    experts_per_token,
    head_size,
    head_width,
)
from edgerazor.families.core.lookup import available, find, from_gguf, with_gguf

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "GGUF_LONG_FACTORS",
    "GGUF_SHORT_FACTORS",
    "HEAD",
    "LINEARS",
    "Experts",
    "Family",
    "GgufArchitecture",
    "GgufMetadata",
    "GgufValue",
    "KvHeads",
    "LayerInputs",
    "Mixer",
    "NativeArchitecture",
    "available",
    "experts_per_token",
    "find",
    "from_gguf",
    "head_size",
    "head_width",
    "with_gguf",
]
