"""What replaces nn.Linear, nn.Embedding and the inputs of attention, and the functions that put it in."""

from edgerazor.modules.attention import quantize_attention
from edgerazor.modules.dropout import disable_dropout
from edgerazor.modules.fake_quant import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    FakeQuantWeight,
    FrozenMaster,
    RowGradients,
    encode_trained,
    encoded_once,
    fake_quant_weights,
    freeze_codes,
    gather_row_gradients,
    rounded_once,
    unfreeze_codes,
)
from edgerazor.modules.packed_linear import (
    LazyMatrix,
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    cache_decoded,
    kernels_of,
)
from edgerazor.modules.replacement import (
    InitialWeight,
    install_packed,
    prepare_for_training,
    quantize_inputs,
    replace_module,
)
from edgerazor.modules.settings import Settings
from edgerazor.modules.shared_activations import InputScales, SharedActivations, TokenMask, matmul_dtype

__all__ = [
    "FakeQuantEmbedding",
    "FakeQuantLinear",
    "FakeQuantWeight",
    "FrozenMaster",
    "InitialWeight",
    "InputScales",
    "LazyMatrix",
    "PackedEmbedding",
    "PackedLinear",
    "PackedWeight",
    "RowGradients",
    "Settings",
    "SharedActivations",
    "TokenMask",
    "cache_decoded",
    "disable_dropout",
    "encode_trained",
    "encoded_once",
    "fake_quant_weights",
    "freeze_codes",
    "gather_row_gradients",
    "install_packed",
    "kernels_of",
    "matmul_dtype",
    "prepare_for_training",
    "quantize_attention",
    "quantize_inputs",
    "replace_module",
    "rounded_once",
    "unfreeze_codes",
]
