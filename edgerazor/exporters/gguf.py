"""GGUF, for llama.cpp: every tensor in the smallest GGML type that holds its codes exactly.

`gguf` writes blocks from codes and scales (`core/gguf_blocks.py`); no quantizer of GGML ever sees the weights. One
tensor has one type, so a matrix whose rows are ternary and int4 takes what the int4 ones need, and types of few bits
share an fp16 number among 256 weights, so smaller groups need a type of blocks of 32. Both cost size, never exactness,
and are said before anything is written. `gguf-tq2` has ternary matrices in TQ2_0 (2.06 bits, unpacked faster than
TQ1_0's 1.69). `gguf-q2` has ternary and int2z matrices in Q2_0 (2.25 bits, a scale for 64 weights), which llama.cpp
reads since June 2026 (its pull request 24448). `gguf-f16` and `gguf-f32` write decoded weights,
for comparison: fp16 rounds what has more than 11 bits, int4 times an fp16 scale for instance, and is refused then;
float32 never rounds.

Activation and cache bits are no part of a GGUF file: llama.cpp rounds inputs to 8 bits in a way of its own.

A model that sees becomes two files, as llama.cpp wants it: its decoder, and its tower with what its processor does
(`core/gguf_tower.py`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import gguf
import numpy as np
import torch
from torch import Tensor

from edgerazor import __version__, models, untrusted, workdir
from edgerazor.errors import UserError, plain
from edgerazor.exporters.core import gguf_blocks as blocks
from edgerazor.exporters.core.base import Exporter, ExportPlan, ExportResult, PlannedTensor, refuse_lossy
from edgerazor.exporters.core.gguf_blocks import GgmlType, InexactError, NewType
from edgerazor.exporters.core.gguf_metadata import add_metadata, context_length, gguf_architecture, rope_factors
from edgerazor.exporters.core.gguf_names import FLOAT32, expert_stack, file_order, gguf_name, half_names
from edgerazor.exporters.core.gguf_size_causes import size_causes
from edgerazor.exporters.core.gguf_tower import FLOAT32 as TOWER_FLOAT32
from edgerazor.exporters.core.gguf_tower import PREFIX, GgufTower, check_tower
from edgerazor.exporters.core.gguf_vocabulary import Vocabulary, build_vocabulary
from edgerazor.families import GgufArchitecture
from edgerazor.formats import INPUT_SCALE, OF_INPUTS, Encoded
from edgerazor.models.gguf_values import column_order, row_order, to_gguf
from edgerazor.packed import PackedModel, TensorClass, decoder_of, has_zero_points

FILE = "model.gguf"
LARGEST_FLOAT32 = float(torch.finfo(torch.float32).max)
#: Why an export of decoded weights is large.
DECODED = "It holds decoded weights; `gguf` holds codes."
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_T = gguf.GGMLQuantizationType
#: Names of file types that are not those of tensors, and the numbers of those that version 0.19 of gguf does not name.
FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S"}
NEW_FILE_TYPES = {"Q2_0": 41}


@dataclass(frozen=True)
class GgufModel:
    """A packed model and what llama.cpp must know about it.

    Attributes:
        model: the packed model; of one that sees, its decoder.
        config: its whole configuration.
        architecture: what llama.cpp makes of it.
        vocabulary: its tokenizer.
        others: tensors that are not quantized.
        rope_factors: what divides the frequencies of its rotary positions, under llama.cpp's names.
        tower: what makes features of pictures; None of a model of text.
    """

    model: PackedModel
    config: dict[str, Any]
    architecture: GgufArchitecture
    vocabulary: Vocabulary
    others: dict[str, Tensor]
    rope_factors: dict[str, Tensor]
    tower: GgufTower | None

    @classmethod
    def of(cls, model: PackedModel) -> GgufModel:
        """Read what llama.cpp must know.

        Raises:
            UserError: llama.cpp does not know such a model.
        """
        config = models.decoder_config(model.folder)
        architecture = gguf_architecture(config)
        decoder, tower = decoder_of(model), GgufTower.of(model)
        others = {name: to_gguf(architecture, name, tensor) for name, tensor in decoder.others().items()}
        factors = rope_factors(architecture, config)
        return cls(decoder, config, architecture, _vocabulary(model.folder, config), others, factors, tower)

    @property
    def files(self) -> tuple[Contents, ...]:
        """What becomes a file each: the model and, where it sees, its tower."""
        return (self,) if self.tower is None else (self, self.tower)

    def values(self, name: str, target: str, half: int | None = None) -> Tensor:
        """A tensor that is not quantized, by its name, or by llama.cpp's alone where it has no other; or half of it."""
        values = self.others[name] if name else self.rope_factors[target]
        return values if half is None else values.chunk(2)[half]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the packed model and what becomes of it.

    Attributes:
        name: of the weight, as in the packed model's state; empty for the factors of rotary frequencies.
        target: llama.cpp's name.
        matrix: path of the quantized matrix, or None for other tensors.
        order, columns: which row, and which column, stands at each place, or None.
        half: 0 or 1 where the upper or the lower rows of the tensor are one of their own.
        experts: paths of the matrices of all experts of a layer, whose blocks lie one after the other in it; none of
            other tensors.
    """

    name: str
    target: str
    matrix: str | None
    order: Tensor | None = None
    columns: Tensor | None = None
    half: int | None = None
    experts: tuple[str, ...] = ()

    @property
    def matrices(self) -> tuple[str, ...]:
        """Paths of all quantized matrices in it."""
        return self.experts or (() if self.matrix is None else (self.matrix,))


#: What a file is made of.
Contents: TypeAlias = GgufModel | GgufTower


class Gguf(Exporter):
    """An exporter of GGUF files.

    Args:
        name: as in `--export`.
        describe: what it is for.
        quantized: types of blocks to choose from, the smallest first; none to write decoded weights.
        floats: floating types to choose from where no block fits, the smallest first.
    """

    def __init__(self, name: str, describe: str, quantized: Sequence[blocks.Block], floats: Sequence[GgmlType]) -> None:
        self.name, self.describe = name, describe
        self.blocks, self.floats = tuple(quantized), tuple(floats)

    def variants(self) -> Sequence[Exporter]:
        return VARIANTS

    def check(self, folder: Path) -> None:
        """Check family and tokenizer."""
        config = models.decoder_config(folder)
        gguf_architecture(config)
        check_tower(folder)
        _vocabulary(folder, config)

    def plan(self, model: PackedModel) -> ExportPlan:
        """Choose types by the codes themselves: every matrix is read once."""
        gguf_model = GgufModel.of(model)
        tensors: tuple[PlannedTensor, ...] = ()
        metadata = 0
        for contents in gguf_model.files:
            planned = tuple(self._planned(contents, source) for source in _sources_of(contents))
            metadata += _metadata_bytes(contents, planned)
            tensors += planned
        return ExportPlan(
            export=self.name,
            tensors=tensors,
            bytes=metadata + sum(_padded(tensor.bytes) for tensor in tensors),
            packed_bytes=sum(file.stat().st_size for file in model.files()),
            weights=sum(tensor.weights for tensor in tensors if tensor.name),
            causes=tuple(size_causes(model, tensors, metadata) if self.blocks else (DECODED,)),
            notes=tuple(_notes(gguf_model)),
        )

    def write(self, model: PackedModel, folder: Path, plan: ExportPlan) -> ExportResult:
        """Write `model.gguf` into that folder."""
        return self.write_file(model, folder / FILE, plan)

    def write_file(self, model: PackedModel, file: Path, plan: ExportPlan) -> ExportResult:
        """Write the export as one file of that name, and the tower of a model that sees beside it."""
        size = 0
        for contents in GgufModel.of(model).files:
            written = file.with_name(f"{PREFIX}{file.name}") if isinstance(contents, GgufTower) else file
            workdir.write_atomically(written, functools.partial(self._fill, contents, plan))
            size += written.stat().st_size
        return ExportResult.of(plan, file, size)

    def _fill(self, contents: Contents, plan: ExportPlan, path: Path) -> None:
        by_target = {source.target: source for source in _sources_of(contents)}
        tensors = [tensor for tensor in plan.tensors if tensor.target in by_target]
        writer = _begin(path, contents, tensors)
        try:
            assert writer.fout is not None
            [output] = writer.fout
            writer.write_padding(output, output.tell())
            for tensor in tensors:
                # Not by `write_tensor_data`: numpy does not say why the system refused to write.
                octets = np.ascontiguousarray(_tensor_bytes(contents, by_target[tensor.target], tensor))
                output.write(octets.data)
                writer.write_padding(output, octets.nbytes)
        finally:
            writer.close()

    def _planned(self, contents: Contents, source: SourceTensor) -> PlannedTensor:
        """The type of one tensor."""
        kind: TensorClass = "other"
        bits = 0.0
        if source.matrices:
            kind = contents.model.matrix(source.matrices[0]).kind
            matrices = list(_matrices(contents, source))
            count = sum(math.prod(matrix.shape) for matrix in matrices)
            for matrix in matrices:
                own = math.prod(matrix.shape)
                bits += (matrix.spec.nominal_bits(matrix.shape) * own + 16 * matrix.encoded.scales.numel()) / count
            tests: Tests = [
                (block.type, functools.partial(_check_all, functools.partial(blocks.check_blocks, block), matrices))
                for block in self.blocks
            ]
            tests += [
                (type_, functools.partial(_check_all, functools.partial(blocks.check_floats, type_), matrices))
                for type_ in self.floats
            ]
        else:
            values = contents.values(source.name, source.target, source.half)
            count = values.numel()
            # llama.cpp wants norms and biases so, and some others
            in_float32 = values.dim() < 2 or source.target.removesuffix(".weight").endswith((*FLOAT32, *TOWER_FLOAT32))
            floats = (_T.F32,) if in_float32 else self.floats
            tests = [(type_, functools.partial(blocks.float_bytes, type_, values)) for type_ in floats]
        chosen, reason = _smallest(tests)
        size, width = blocks.SIZES[chosen]
        return PlannedTensor(
            name=source.name,
            target=source.target,
            kind=kind,
            type=chosen.name,
            weights=count,
            bytes=count // size * width,
            packed_bits=bits,
            reason=reason,
        )


#: Types, the smallest first, each with a function that raises InexactError where it is not exact.
Tests: TypeAlias = list[tuple[GgmlType, Callable[[], object]]]


def _check_all(check: Callable[[blocks.BlockMatrix], None], matrices: Sequence[blocks.BlockMatrix]) -> None:
    """Check all matrices of a tensor, which has one type."""
    for matrix in matrices:
        check(matrix)


def _smallest(tests: Tests) -> tuple[GgmlType, str]:
    """The first type that is exact, or the last one and why it is not."""
    reason = ""
    for chosen, test in tests:
        try:
            test()
        except InexactError as error:
            reason = str(error)
        else:
            return chosen, ""
    return tests[-1][0], reason


def export(
    folder: Path,
    target: Path,
    *,
    quantized: bool = True,
    allow_lossy: bool = False,
    report: Callable[[ExportPlan], None] = lambda plan: None,
) -> ExportResult:
    """Write a packed model as one GGUF file.

    Args:
        folder: the packed model.
        target: the file to write.
        quantized: blocks from codes (`gguf`); else decoded weights as fp16 (`gguf-f16`).
        allow_lossy: write tensors that change, too.
        report: is told what will be written, before it is.

    Raises:
        UserError: llama.cpp does not know the family or the tokenizer, weights would change, or the folder is damaged.
    """
    chosen = EXPORTER if quantized else F16
    chosen.check(folder)
    model = PackedModel.open(folder)
    plan = chosen.plan(model)
    report(plan)
    if not allow_lossy:
        refuse_lossy(plan)
    return chosen.write_file(model, target, plan)


# What is in the file ----------------------------------------------------------------------------------------------


def _sources(gguf_model: GgufModel) -> list[SourceTensor]:
    """All tensors of the file, in its order."""
    stacks = expert_stacks(gguf_model.model)
    matrices = {f"{name}.weight": name for name in gguf_model.model.header.matrices if expert_stack(name) is None}
    sources = [
        SourceTensor(name, gguf_name(gguf_model.architecture, name), None, experts=paths)
        for name, paths in stacks.items()
    ]
    others = [name for name in gguf_model.others if name.rpartition(".")[2] not in OF_INPUTS]
    for name in (*matrices, *others):
        if halves := half_names(gguf_model.architecture, name):
            sources += [SourceTensor(name, target, matrices.get(name), half=half) for half, target in enumerate(halves)]
            continue
        target = gguf_name(gguf_model.architecture, name)
        of = gguf_model.architecture, gguf_model.config, target
        sources.append(SourceTensor(name, target, matrices.get(name), row_order(*of), column_order(*of)))
    sources += [SourceTensor("", target, None) for target in gguf_model.rope_factors]
    return sorted(sources, key=lambda source: file_order(source.target))


def _matrices(contents: Contents, source: SourceTensor) -> Iterator[blocks.BlockMatrix]:
    """The quantized matrices of a tensor."""
    for name in source.matrices:
        packed = contents.model.matrix(name)
        encoded, spec = packed.encoded, packed.spec
        if source.half is not None:
            rows = torch.arange(len(encoded.codes)).chunk(2)[source.half]
            encoded, spec = Encoded(encoded.codes[rows], encoded.scales[rows]), spec.take(rows)
        yield blocks.BlockMatrix(encoded, spec, source.order, source.columns)


def _sources_of(contents: Contents) -> list[SourceTensor]:
    """All tensors of a file, in its order."""
    return _tower_sources(contents) if isinstance(contents, GgufTower) else _sources(contents)


def _tower_sources(tower: GgufTower) -> list[SourceTensor]:
    """All tensors of a tower's file, in its order."""
    matrices = [name for name, entry in tower.model.header.matrices.items() if entry.kind == "tower"]
    return [
        *(SourceTensor(name, tower.target(name), None) for name in tower.others),
        *(SourceTensor(f"{name}.weight", tower.target(f"{name}.weight"), name) for name in matrices),
    ]


def expert_stacks(model: PackedModel) -> dict[str, tuple[str, ...]]:
    """Name of each tensor of all experts of a layer -> the paths of their matrices, in the order of the experts.

    Raises:
        UserError: an expert is missing.
    """
    numbered: dict[str, dict[int, str]] = {}
    for path in model.header.matrices:
        if place := expert_stack(path):
            numbered.setdefault(f"{place[0]}.weight", {})[place[1]] = path
    for name, experts in numbered.items():
        if sorted(experts) != list(range(len(experts))):
            raise UserError(f"{model.folder} lacks some of the experts of {name}.", "Pack the model again.")
    return {name: tuple(experts[number] for number in sorted(experts)) for name, experts in numbered.items()}


def _tensor_bytes(contents: Contents, source: SourceTensor, planned: PlannedTensor) -> blocks.Bytes:
    """The data of one tensor, as planned."""
    chosen, lossy = blocks.ggml_type(planned.type), not planned.exact
    if source.matrices:
        parts = []
        for matrix in _matrices(contents, source):
            if chosen in blocks.FLOATS:
                parts.append(blocks.write_floats(chosen, matrix, lossy))
            else:
                block = next(block for block in blocks.BLOCKS if block.type == chosen)
                parts.append(blocks.write_blocks(block, matrix))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    values = contents.values(source.name, source.target, source.half)
    if source.order is not None:
        values = values[source.order]
    if source.columns is not None:
        values = values[:, source.columns]
    return blocks.float_bytes(chosen, values, lossy)


def _begin(path: Path, contents: Contents, tensors: Sequence[PlannedTensor]) -> gguf.GGUFWriter:
    """A new file with everything but the data of the tensors."""
    architecture = "clip" if isinstance(contents, GgufTower) else contents.architecture.name
    writer = gguf.GGUFWriter(path, architecture)
    teacher = contents.model.header.provenance.get("teacher")
    name = teacher.get("name") if isinstance(teacher, dict) else None
    writer.add_name(str(name or "model").rstrip("/").split("/")[-1])
    writer.add_description(f"written by edgerazor {__version__} from codes and scales")
    writer.add_file_type(_file_type(tensors))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if isinstance(contents, GgufTower):
        contents.add_metadata(writer)
    else:
        add_metadata(writer, contents.architecture, contents.config)
        contents.vocabulary.add_to(writer)
    _check_metadata(writer)
    sources = {source.target: source for source in _sources_of(contents)}
    for tensor in tensors:
        # Told the numbers of weights, the writer looks up no size of a type, which it may not know.
        type_ = cast(gguf.GGMLQuantizationType, blocks.ggml_type(tensor.type))
        shape = _shape(contents, sources[tensor.target])
        writer.add_tensor_info(tensor.target, shape, _FLOAT32, tensor.bytes, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


_FLOAT32 = torch.empty(0).numpy().dtype


def _shape(contents: Contents, source: SourceTensor) -> tuple[int, ...]:
    """Shape of a tensor, rows first."""
    if not source.matrices:
        return tuple(contents.values(source.name, source.target, source.half).shape)
    rows, columns = contents.model.header.matrices[source.matrices[0]].shape
    rows = rows if source.half is None else rows // 2
    return (len(source.experts), rows, columns) if source.experts else (rows, columns)


def _file_type(tensors: Sequence[PlannedTensor]) -> int:
    """The file type, named after the type that most weights of linear layers have, or all weights of a tower."""
    counts: dict[str, int] = {}
    for tensor in [tensor for tensor in tensors if tensor.kind == "linear"] or tensors:
        counts[tensor.type] = counts.get(tensor.type, 0) + tensor.weights
    name = max(counts, key=lambda type_: counts[type_])
    if name in NEW_FILE_TYPES:
        return NEW_FILE_TYPES[name]
    return int(gguf.LlamaFileType[FILE_TYPES.get(name, f"MOSTLY_{name}")])


def _vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    """The tokenizer of a folder, as llama.cpp's."""
    ends: Any = None
    with contextlib.suppress(OSError, ValueError):  # it may be missing
        ends = untrusted.load_json(folder / "generation_config.json").get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    numbers = [number for number in listed if isinstance(number, int)]
    return build_vocabulary(models.load_tokenizer(folder), config["vocab_size"], numbers)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _check_metadata(writer: gguf.GGUFWriter) -> None:
    """Make sure that every number fits its type, as configurations may hold any.

    Raises:
        UserError: one does not.
    """
    ranges = {gguf.GGUFValueType.UINT32: (0, 2**32 - 1), gguf.GGUFValueType.INT32: (-(2**31), 2**31 - 1)}
    for name, entry in (pair for shard in writer.kv_data for pair in shard.items()):
        value = entry.value
        if entry.type in ranges:
            least, most = ranges[entry.type]
            fits = isinstance(value, int) and least <= value <= most
        elif entry.type == gguf.GGUFValueType.FLOAT32:
            fits = isinstance(value, int | float) and abs(value) <= LARGEST_FLOAT32
        else:
            fits = entry.type != gguf.GGUFValueType.STRING or isinstance(value, str)
        if not fits:
            raise UserError(f"The model gives {plain(value, 40)} as {name}, which GGUF cannot hold.")


def _metadata_bytes(contents: Contents, tensors: Sequence[PlannedTensor]) -> int:
    """Bytes before the data of the first tensor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        _begin(path, contents, tensors).close()
        return _padded(path.stat().st_size)


def _notes(gguf_model: GgufModel) -> Iterator[str]:
    """What the file cannot say about the model."""
    settings = gguf_model.model.header.settings
    bits = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
        if name.endswith("_bits") and value != 16
    )
    if bits:
        yield (
            f"The packed model computes with {bits}; GGUF has no place for that: llama.cpp rounds inputs of quantized "
            "matrices to 8 bits in its own way, and the cache as its options --cache-type-k and --cache-type-v say."
        )
    if any(name.endswith(INPUT_SCALE) for name in gguf_model.others):
        what = "scales and zero points" if has_zero_points(gguf_model.others) else "scales"
        yield f"Stored {what} of inputs are left out: llama.cpp finds a scale for each block of inputs itself."
    architecture, config = gguf_model.architecture, gguf_model.config
    yield from filter(None, [context_length(architecture, config)[1], architecture.note(config)])
    if gguf_model.tower is not None:
        yield f"Pictures are read with the file beside it, whose name begins with {PREFIX} (llama.cpp's --mmproj)."
        yield from filter(None, [gguf_model.tower.note])
    yield from gguf_model.vocabulary.notes


def _variant(name: str, describe: str, *left_out: GgmlType) -> Gguf:
    """An exporter of blocks of all types but some."""
    return Gguf(name, describe, [block for block in blocks.BLOCKS if block.type not in left_out], _FLOATS)


_FLOATS = (_T.F16, _T.BF16, _T.F32)
EXPORTER = _variant("gguf", "llama.cpp: the smallest types that hold the codes exactly", _T.TQ2_0, NewType.Q2_0)
TQ2 = _variant("gguf-tq2", "llama.cpp: the same, with ternary matrices in TQ2_0", _T.TQ1_0, NewType.Q2_0)
Q2 = _variant("gguf-q2", "llama.cpp since June 2026: the same, with ternary and int2z in Q2_0", _T.TQ1_0, _T.TQ2_0)
F16 = Gguf("gguf-f16", "llama.cpp: decoded weights in fp16", (), (_T.F16,))
F32 = Gguf("gguf-f32", "llama.cpp: decoded weights in float32", (), (_T.F32,))
VARIANTS = (EXPORTER, TQ2, Q2, F16, F32)
