"""The packed model folder: writing, reading, sizes and compression. `FORMAT.md` is its specification."""

from edgerazor.packed.container import (
    DTYPE_NAMES,
    DTYPES,
    INDEX_FILE,
    SHARD_BYTES,
    WEIGHTS_FILE,
    TensorSpec,
    tensor_spec,
)
from edgerazor.packed.decoder_view import decoder_of, tower_tensors
from edgerazor.packed.entropy import ClassBits, bits_table, matrix_entropy_bytes
from edgerazor.packed.header import (
    ANY_SHA256,
    CHECKSUMS,
    SETTINGS,
    SIGNS,
    VERSION,
    Header,
    Kind,
    MatrixEntry,
    TensorEntry,
    has_zero_points,
    part_name,
)
from edgerazor.packed.reading import PackedMatrix, PackedModel, verify_digests
from edgerazor.packed.rewriting import rewrite
from edgerazor.packed.sizes import ClassSize, SizeTable, TensorClass, size_table
from edgerazor.packed.specification import specification
from edgerazor.packed.threads import cores, in_parallel
from edgerazor.packed.writing import FolderSize, MatrixSource, predict, working_memory, write

__all__ = [
    "ANY_SHA256",
    "CHECKSUMS",
    "DTYPES",
    "DTYPE_NAMES",
    "INDEX_FILE",
    "SETTINGS",
    "SHARD_BYTES",
    "SIGNS",
    "VERSION",
    "WEIGHTS_FILE",
    "ClassBits",
    "ClassSize",
    "FolderSize",
    "Header",
    "Kind",
    "MatrixEntry",
    "MatrixSource",
    "PackedMatrix",
    "PackedModel",
    "SizeTable",
    "TensorClass",
    "TensorEntry",
    "TensorSpec",
    "bits_table",
    "cores",
    "decoder_of",
    "has_zero_points",
    "in_parallel",
    "matrix_entropy_bytes",
    "part_name",
    "predict",
    "rewrite",
    "size_table",
    "specification",
    "tensor_spec",
    "tower_tensors",
    "verify_digests",
    "working_memory",
    "write",
]
