"""Number formats: weights <-> codes <-> bytes. Each file of this folder is a format; `core` has what they share.

Read `core/base.py` first (what a format is), then `ternary.py` (a whole one), `core/matrix.py` (rows or blocks of
different formats), `core/rotation.py` (what may come before rounding), `core/least_error.py`, `core/clip.py` and
`core/gptq.py` (better scales and codes), `core/lsq.py` (scales that are trained), and `core/activations.py`.
"""

from edgerazor.formats.core.activations import (
    fake_quantize_activations,
    fake_quantize_kv,
    fake_quantize_probabilities,
    quantize_activations,
)
from edgerazor.formats.core.base import Encoded, Format, group_count, straight_through
from edgerazor.formats.core.clip import search_scales
from edgerazor.formats.core.gptq import gptq_quantize
from edgerazor.formats.core.indices import index_row_bytes
from edgerazor.formats.core.layout import ROWS
from edgerazor.formats.core.least_error import ScaleGrid, absmax_units, use_scale_search
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
    names,
    pack_matrix,
    part_shapes,
    quantize_dequantize,
    rounded_weight,
    stored_shapes,
    tensor_bytes,
    unpack_matrix,
    unpack_spec,
)
from edgerazor.formats.core.rotation import (
    Rotation,
    block_problem,
    find_rotation,
    hadamard,
    pack_signs,
    sign_bytes,
    unpack_signs,
    use_rotation_product,
)
from edgerazor.formats.core.serialization import deserialize_part, serialize_parts, stored_row_blocks
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
    "Rotation",
    "ScaleGrid",
    "Streams",
    "absmax_units",
    "block_problem",
    "calibrated_scale",
    "code_parts",
    "decode_matrix",
    "deserialize_part",
    "digest",
    "encode_matrix",
    "encoded_parts",
    "fake_quantize_activations",
    "fake_quantize_kv",
    "fake_quantize_matrix",
    "fake_quantize_probabilities",
    "fake_quantize_static",
    "find_rotation",
    "from_streams",
    "get",
    "gptq_quantize",
    "group_count",
    "hadamard",
    "index_row_bytes",
    "initial_scales",
    "learned_weight",
    "magnitude_counts",
    "names",
    "pack_matrix",
    "pack_signs",
    "part_shapes",
    "quantize_activations",
    "quantize_dequantize",
    "quantize_static",
    "rebase_weight",
    "rounded_weight",
    "scale_stream_bytes",
    "search_scales",
    "serialize_parts",
    "sign_bytes",
    "ste_target",
    "stored_row_blocks",
    "stored_scales",
    "stored_shapes",
    "straight_through",
    "stream_bytes",
    "tensor_bytes",
    "to_streams",
    "unpack_matrix",
    "unpack_signs",
    "unpack_spec",
    "use_rotation_product",
    "use_scale_search",
    "whole_zero_point",
]
