"""The packed model folder, format versions 1 and 2.

**Container.** `model.safetensors`, or, when larger than the shard size, `model-00001-of-0000N.safetensors` ... with the
usual `model.safetensors.index.json` beside them. The safetensors format is 8 bytes of little-endian header length, a
JSON header with dtype, shape and place of every tensor, then the bytes of the tensors, row-major and little-endian,
without gaps. The JSON ends in spaces, so that the data begin on a multiple of 64 bytes; tensors that fill whole vectors
of 64 bytes come first, so that all codes begin on one, then those that fill half of one, and so on. Nothing is repacked
to compute with it.

**Matrices.** A quantized weight matrix [rows, cols] of the module at path P has for each of its formats one tensor
`P.weight.<format>`, U8 [bytes], that holds, one behind the other,

- codes, [row blocks, bytes of a block]: of its rows in that format, in row order, 16 rows to a block. A code is stored
  as `u = code - min_code`, unsigned: lowest is -1 in `ternary`, -2^(b-1) in b bits. A row is cut into quads of four
  columns (each group begins with a new one), a row's quads into chunks of 8, in `ternary` of 64. A chunk is some
  vectors of 64 bytes: byte `4 * r + j` of a vector belongs to row r of the block and to column j of some quads. In b
  bits, u is cut into fields of 8, or else of 4, 2 and 1 bits, low bits into the widest; all first fields of a chunk,
  then all second ones, fill vectors, 8 / width quads to a vector, the first in the lowest bits. In `ternary` five quads
  make a vector: with u of the five as t0 to t4 and r = t0 + 3 t1 + 9 t2 + 27 t3 the byte is `64 t4 + r` if r < 64, else
  `192 + 17 t4 + (r - 64)`; up to four quads that are left make one more, in fields of 2 bits.
- scales, F16 [row blocks, groups, 16]: of the same rows, finite, not negative. Group i is columns `i * group_size` to
  `(i + 1) * group_size - 1`; the last may be shorter;
- zeros, up to whole vectors (half of one, if any). How many row blocks there are follows from the length.

Rows that fill a block, columns that fill a quad, quads that fill a vector have code 0, rows that fill a block scale 0.
Where rows may differ, `P.weight.row_formats`, U8 [1, bytes], holds for each row an index into the matrix's list of
formats, in 1, 2 or 4 bits (the fewest that can count the list), low bits first. Where blocks (a group of a row) may,
`P.weight.block_formats`, U8 [rows, bytes], or [1, bytes] when all rows are alike, holds one for each group of a row;
then the tensors above hold whole groups in place of rows, row by row, and `P.weight.<format>.tail` the shorter last
ones. All these tensors are the *parts* of the matrix, called by what stands behind `P.weight.`.

A weight is `level(code) * scale` in float32; the level is the code, but `code + 1/2` in `int2`. Tensors of other kinds
(norms, biases) stand under their own names with their own dtypes. `P.input_scale`, F32 [], is the scale of all inputs
of the linear layer at P, and `P.low_input_scale` that of tokens with fewer bits; where one is missing, each group of
each such token has its own. `P.input_zero_point` and `P.low_input_zero_point`, F32 [], whole numbers no larger than the
largest code, are the zero points of these scales: a code q is worth `scale * (q - zero_point)`; it is 0 where there is
none. Where there are any the version is 2, else 1.

**Compression**, for shipping, leaves everything else as it is. Where the header has `compression` with the method
`zstd` and the filter 1, `NAME.zst`, U8 [bytes], stands in the place of each tensor NAME of codes and scales: one zstd
frame (RFC 8878) of known content size, without a dictionary, with a window of at most 2^17 bytes, not smaller than
1/256 of its content, nor than a byte for 1024 codes. The content is, without anything that pads,

- of the scales, row by row, d being the distance of the 16 bits of each, as an unsigned number, to the smallest: a byte
  m, 4, 6 or 8; the smallest, 2 bytes; the lowest m bits of every d, low bits first, without gaps; the next 8 bits of
  every d, a byte each; the bits above, likewise;
- behind them, of the codes, in one of two ways. Either a first byte k, 1 to 4, then `u`, row by row, as digits in the
  base that is the number of codes (3 in `ternary`, else 2^b), k to a byte, no more than fields of 2, 4 or 8 bits would
  be (4 in `ternary` and two bits, 2 in `int3` and `int4`, else 1), the first the lowest; each row begins with a new
  byte. Or a first byte 0, a second one n, then all codes, row by row, and one code 1 more: a byte 0 is n codes 0, a
  byte `1 + n * i + r` is r codes 0, r < n, and the i-th of 1, -1, 2, -2, ..., as far as the format has them.

That of codes has at most as many bytes as codes, and three. Checksums are those of the tensors that it stands for.
`NAME.zst` come behind all other tensors of a file, matrix by matrix, the largest first, beginning at any byte.

**Header.** The `__metadata__` of the first file holds `"edgerazor"`: a JSON object, fields as in `Description`, and
`"edgerazor_sha256"`: the SHA-256 of that text. It names every tensor of the folder, alike ones together: `matrices`,
with kind, formats, group size, shape and parts of those in `names`; `others`, with their dtype and shape. In names, a
piece `first-last` between points stands for each number from the first to the last (`model.layers.0-27.mlp.up_proj`),
so no real name may have one. `tied`: modules that use the matrix of another; `settings`: how to compute (`SETTINGS`);
`provenance`: what it was made from; `sha256`: that of the tensor `edgerazor.sha256`, U8 [n, 32], in any of the files.
That holds, matrix by matrix in the order of their names (by code points), the digest of codes and scales
(`formats.digest`) and the SHA-256 of each part in the order of `parts`; then that of every other tensor in the order of
their names. Nothing differs between two equal runs.

**Versions.** A program reads every version from 1 to its own, and refuses later ones by name. Whatever an older program
would misread raises the version; what it may ignore goes under `extras`, and the version stays. Another method or
filter of `compression` is one that an older program refuses by name, so the version stays then, too.

**Reading trusts nothing.** Opening checks names, dtypes, shapes and places of all tensors; a tensor's bytes, codes and
digest are checked when it is first read. Anything wrong is a `UserError` of one sentence. (Only a file that is cut
while it is mapped ends the process, as the system has it: replace files, never rewrite them.)
"""

from edgerazor.packed.container import (
    DTYPE_NAMES,
    DTYPES,
    INDEX_FILE,
    SHARD_BYTES,
    WEIGHTS_FILE,
    TensorSpec,
    tensor_spec,
)
from edgerazor.packed.entropy import ClassBits, bits_table, matrix_entropy_bytes
from edgerazor.packed.header import (
    ANY_SHA256,
    CHECKSUMS,
    SETTINGS,
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
    "has_zero_points",
    "in_parallel",
    "matrix_entropy_bytes",
    "part_name",
    "predict",
    "rewrite",
    "size_table",
    "tensor_spec",
    "verify_digests",
    "working_memory",
    "write",
]
