"""Number formats: weights <-> codes <-> bytes. Each file here whose name has no underscore is a format.

Read `_base.py` first (what a format is), then `ternary.py` (the shortest real one), `_matrix.py` (rows or blocks of
different formats), `_learned.py` (scales that are trained), `_start.py` (better ones to begin with) and
`_activations.py`.
"""

from edgerazor import registry
from edgerazor.formats.core.activations import (
    fake_quantize_activations,
    fake_quantize_kv,
    fake_quantize_probabilities,
    quantize_activations,
)
from edgerazor.formats.core.base import Encoded, Format, group_count, straight_through
from edgerazor.formats.core.gptq import gptq_quantize, search_scales
from edgerazor.formats.core.indices import index_columns
from edgerazor.formats.core.joined import joined, joined_blocks, separated
from edgerazor.formats.core.layout import ROWS
from edgerazor.formats.core.least_error import reaching_units, search_with
from edgerazor.formats.core.lsq import initial_scales, learned_weight, rebase_weight, ste_target, stored_scales
from edgerazor.formats.core.matrix import (
    BLOCK_FORMATS,
    ROW_FORMATS,
    SCALES,
    TAIL,
    MatrixSpec,
    code_parts,
    decode_matrix,
    digest,
    encode_matrix,
    encoded_parts,
    fake_quantize_matrix,
    get,
    joined_bytes,
    pack_matrix,
    part_shapes,
    quantize_dequantize,
    stored_shapes,
    tensor_bytes,
    unpack_matrix,
    unpack_spec,
)
from edgerazor.formats.core.static import (
    INPUT_SCALE,
    INPUT_ZERO_POINT,
    LOW_INPUT_SCALE,
    LOW_INPUT_ZERO_POINT,
    OF_INPUTS,
    SMALLEST,
    calibrated_scale,
    fake_quantize_static,
    magnitude_counts,
    quantize_static,
    whole_zero_point,
)
from edgerazor.formats.core.streams import Streams, from_streams, scale_stream_bytes, stream_bytes, to_streams

__all__ = [
    "BLOCK_FORMATS",
    "INPUT_SCALE",
    "INPUT_ZERO_POINT",
    "LOW_INPUT_SCALE",
    "LOW_INPUT_ZERO_POINT",
    "OF_INPUTS",
    "ROWS",
    "ROW_FORMATS",
    "SCALES",
    "SMALLEST",
    "TAIL",
    "Encoded",
    "Format",
    "MatrixSpec",
    "Streams",
    "calibrated_scale",
    "code_parts",
    "decode_matrix",
    "digest",
    "encode_matrix",
    "encoded_parts",
    "fake_quantize_activations",
    "fake_quantize_kv",
    "fake_quantize_matrix",
    "fake_quantize_probabilities",
    "fake_quantize_static",
    "from_streams",
    "get",
    "gptq_quantize",
    "group_count",
    "index_columns",
    "initial_scales",
    "joined",
    "joined_blocks",
    "joined_bytes",
    "learned_weight",
    "magnitude_counts",
    "names",
    "pack_matrix",
    "part_shapes",
    "quantize_activations",
    "quantize_dequantize",
    "quantize_static",
    "reaching_units",
    "rebase_weight",
    "scale_stream_bytes",
    "search_scales",
    "search_with",
    "separated",
    "ste_target",
    "stored_scales",
    "stored_shapes",
    "straight_through",
    "stream_bytes",
    "tensor_bytes",
    "to_streams",
    "unpack_matrix",
    "unpack_spec",
    "whole_zero_point",
]


def names() -> list[str]:
    """Names of the number formats, sorted."""
    return registry.names("formats")
