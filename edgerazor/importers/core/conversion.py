"""A packed model made of somebody else's quantized one, tensor by tensor."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from torch import Tensor

from edgerazor import __version__, models, packed, registry, workdir
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.importers.core.base import Importer, IntegerMatrix, SourceModel, UnrepresentableError, encode_exactly
from edgerazor.packed import MatrixSource
from edgerazor.untrusted import weights

#: Consecutive inputs of a linear layer that share a scale, at most, where a model does not say.
ACTIVATION_GROUP = 256
#: Bits of what is not rounded.
UNROUNDED = 16


class ImportResult(BaseModel):
    """A packed model made of somebody else's model."""

    folder: str = Field(description="the packed model")
    source: str = Field(description="the file or folder it was made of")
    importer: str = Field(description="format of the source")
    formats: dict[str, int] = Field(description="number format -> weights that got it; `floating` for the others")
    sizes: packed.SizeTable
    lossy: list[str] = Field(description="matrices of which some scale was rounded")
    notes: list[str] = Field(description="what could not be taken over")


def find_importer(path: Path) -> Importer | None:
    """The importer that recognises a file or folder, or None."""
    for name in registry.names("importers"):
        importer: Importer = registry.find("importers", name, "IMPORTER")
        if importer.recognises(path):
            return importer
    return None


def import_model(
    path: Path,
    target: Path,
    console: Console,
    *,
    activation_bits: int | None = None,
    kv_bits: int | None = None,
    lossy: bool = False,
) -> ImportResult:
    """Read a model into a packed folder.

    Args:
        path: a file or folder that an importer recognises.
        target: the packed folder to write.
        console: where to say what is read.
        activation_bits, kv_bits: how the packed model computes; None for what the model was made for, which is 16 bits
            where its format does not round inputs, keys and values.
        lossy: round scales to float16 where they are none, instead of refusing them.

    Raises:
        UserError: it is damaged, not understood, or has weights that no format of ours holds exactly.
    """
    importer = find_importer(path)
    if importer is None:
        raise UserError(f"{path} is of no format that can be read.", "Give a GGUF file or a model folder.")
    source = importer.open(path)
    conversion = _Conversion(path, source, lossy)
    settings = _settings(source, activation_bits or source.activation_bits, kv_bits or UNROUNDED)
    with workdir.replace_folder(target) as folder:
        source.write_tokenizer(folder)
        header = packed.write(
            folder,
            conversion.matrices(console),
            conversion.others(),
            tied=conversion.tied,
            settings=settings,
            provenance=_provenance(path, importer),
        )
        values = {**source.config, "dtype": "float32"}
        values["quantization_config"] = {"quant_method": "edgerazor", "version": header.version, **settings}
        workdir.write_json(folder / "config.json", dict(sorted(values.items())))
        opened = packed.PackedModel.open(folder)
        packed.verify_digests(folder, {name: entry.digest for name, entry in header.matrices.items()})
        sizes = packed.size_table(opened)
    return ImportResult(
        folder=str(target),
        source=str(path),
        importer=importer.name,
        formats=dict(sorted(conversion.counts.items())),
        sizes=sizes,
        lossy=conversion.rounded,
        notes=[*source.notes, *_precision_notes(settings)],
    )


def _provenance(path: Path, importer: Importer) -> dict[str, Any]:
    return {
        "source": "import",
        "importer": importer.name,
        "teacher": {"name": path.resolve().name},
        "sha256": workdir.hash_file(path) if path.is_file() else models.fingerprint(path),
        "edgerazor": __version__,
    }


def _settings(source: SourceModel, activation_bits: int, kv_bits: int) -> dict[str, Any]:
    """How the packed model computes, as JSON values."""
    values = {"activation_bits": activation_bits, "kv_bits": kv_bits, "adaptive_tokens": "off", "thresholds": []}
    values |= {"group_size": source.activation_group or ACTIVATION_GROUP, "query_bits": 16, "probability_bits": 16}
    return {name: values[name] for name in packed.SETTINGS}


def _precision_notes(settings: dict[str, Any]) -> list[str]:
    """How many bits inputs and cache have, for people; what is not rounded can be, which is faster."""
    activations, cache = settings["activation_bits"], settings["kv_bits"]
    note = f"It computes with {activations}-bit inputs of linear layers and a {cache}-bit cache"
    options = {"--activation-bits 8": activations, "--kv-bits 8": cache}
    faster = [option for option, bits in options.items() if bits == UNROUNDED]
    return [f"{note}; {' '.join(faster)} is faster and rounds them." if faster else f"{note}."]


class _Conversion:
    """Reads a source tensor by tensor.

    Attributes:
        tied: modules that use the packed matrix of another.
        counts: number format -> weights that have got it so far.
        rounded: matrices of which some scale was rounded.
    """

    def __init__(self, path: Path, source: SourceModel, lossy: bool) -> None:
        model = models.skeleton(source.config)
        self.path, self.source, self.lossy = path, source, lossy
        self.structure = models.structure(model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.counts: dict[str, int] = {}
        self.rounded: list[str] = []
        head, embedding = f"{self.structure.head_path}.weight", f"{self.structure.embedding.name}.weight"
        #: tensor -> the one that it shares its numbers with, where the head is tied to the embedding
        self.tied_tensors = {} if self.structure.head else {head: embedding}
        self._check_names()
        self.targets = [target for target in self.structure.targets if source.quantized(f"{target.name}.weight")]
        packed_names = {target.name for target in self.targets}
        self.tied = (
            {}
            if self.structure.head or embedding.removesuffix(".weight") not in packed_names
            else {self.structure.head_path: self.structure.embedding.name}
        )

    def _check_names(self) -> None:
        """Make sure that the stored tensors are those of the model."""
        stored = {name for name in self.source.names() if not name.endswith("rotary_emb.inv_freq")}
        for name in sorted(self.shapes.keys() - stored - self.tied_tensors.keys()):
            raise UserError(f"{self.path} lacks the tensor {name}.", "Its configuration may be that of another model.")
        for name in sorted(stored - self.shapes.keys()):
            raise UserError(f"{self.path} holds {name}, which its model has no place for.")

    def matrices(self, console: Console) -> list[MatrixSource]:
        """The quantized matrices: their formats are determined now, their codes when it is their turn to be written."""
        sources = []
        with console.track("reading", len(self.targets)) as tracker:
            for target in self.targets:
                encoded, spec = self._fitted(target.name)
                self.counts[spec.formats[0]] = self.counts.get(spec.formats[0], 0) + target.weights
                shape = (encoded.codes.shape[0], encoded.codes.shape[1])
                encode = functools.partial(self._encoded, target.name)
                sources.append(MatrixSource(target.name, target.kind, spec, shape, encode))
                tracker.advance()
        return sources

    def _encoded(self, name: str) -> Encoded:
        return self._fitted(name)[0]

    def _fitted(self, name: str) -> tuple[Encoded, MatrixSpec]:
        """Encode a matrix exactly, or with rounded scales where that is allowed."""
        stored = self._read(f"{name}.weight")
        assert isinstance(stored, IntegerMatrix)
        for lossy in (False, True)[: 1 + self.lossy]:
            try:
                encoded, spec = encode_exactly(stored, lossy)
            except UnrepresentableError as error:
                reason = error
            else:
                if lossy and name not in self.rounded:
                    self.rounded.append(name)
                return encoded, spec
        raise self._refused(f"{name}.weight", reason)

    def others(self) -> dict[str, Tensor]:
        """The tensors that are not quantized, as they are stored."""
        skipped = {f"{name}.weight" for name in ({target.name for target in self.targets} | self.tied.keys())}
        tensors = {}
        for name in sorted(self.shapes.keys() - skipped):
            tensor = self._read(self.tied_tensors.get(name, name))
            if isinstance(tensor, IntegerMatrix):
                raise self._refused(name, UnrepresentableError("it is quantized, but no linear layer or embedding"))
            weights.refuse_not_finite(self.path, [(name, tensor)])
            tensors[name] = tensor.contiguous().clone()
            self.counts["floating"] = self.counts.get("floating", 0) + tensor.numel()
        return tensors

    def _read(self, name: str) -> IntegerMatrix | Tensor:
        try:
            stored = self.source.read(name)
        except UnrepresentableError as error:
            raise self._refused(name, error) from None
        shape = tuple((stored.values if isinstance(stored, IntegerMatrix) else stored).shape)
        if shape != self.shapes[name]:
            raise UserError(
                f"{self.path}: {name} is {list(shape)}, and its configuration says {list(self.shapes[name])}."
            )
        return stored

    def _refused(self, name: str, error: UnrepresentableError) -> UserError:
        anew = f"Dequantize it and round it anew: `edgerazor pack {self.path} --bits 4`."
        hint = anew if self.path.is_file() else "Round the original model instead: `edgerazor pack MODEL --bits 4`."
        if "scale is no float16" in str(error):
            hint = "Round the scales with --allow-lossy, or give another file."
        return UserError(f"{self.path} cannot be packed without loss: {name}: {error}.", hint)
