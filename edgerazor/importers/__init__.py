"""Other people's quantized models, read into packed ones. Each file here whose name has no underscore is an import.

Nothing is rounded: weights become codes and scales that stand for exactly the same numbers, or the import is refused
and names the first tensor that has none. Read `_base.py` for what an import offers.
"""

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
from edgerazor.importers.core.base import Importer, Integers, MisfitError, Source, fitted
from edgerazor.packed import MatrixSource
from edgerazor.untrusted import weights

__all__ = ["ImportResult", "importer_of", "read"]

#: Consecutive inputs of a linear layer that share a scale, at most, where a model does not say.
ACTIVATION_GROUP = 256
#: Bits of what is not rounded.
UNROUNDED = 16


class ImportResult(BaseModel):
    """A packed model made of somebody else's."""

    folder: str = Field(description="the packed model")
    source: str = Field(description="the file or folder it was made of")
    importer: str = Field(description="format of the source")
    formats: dict[str, int] = Field(description="number format -> weights that got it; `floating` for the others")
    sizes: packed.SizeTable
    lossy: list[str] = Field(description="matrices of which some scale was rounded")
    notes: list[str] = Field(description="what could not be taken over")


def importer_of(path: Path) -> Importer | None:
    """The import that recognises a file or folder, or None."""
    for name in registry.names("importers"):
        found: Importer = registry.find("importers", name, "IMPORT")
        if found.recognises(path):
            return found
    return None


def read(
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
        path: a file or folder that an import recognises.
        target: the packed folder to write.
        console: where to say what is read.
        activation_bits, kv_bits: how the packed model computes; None for what the model was made for, which is 16 bits
            where its format does not round inputs, keys and values.
        lossy: round scales to float16 where they are none, instead of refusing them.

    Raises:
        UserError: it is damaged, not understood, or has weights that no format of ours holds exactly.
    """
    importer = importer_of(path)
    if importer is None:
        raise UserError(f"{path} is of no format that can be read.", "Give a GGUF file or a model folder.")
    source = importer.open(path)
    reading = _Reading(path, source, lossy)
    settings = _settings(source, activation_bits or source.activation_bits, kv_bits or UNROUNDED)
    with workdir.replace_folder(target) as folder:
        source.write_tokenizer(folder)
        header = packed.write(
            folder,
            reading.matrices(console),
            reading.others(),
            tied=reading.tied,
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
        formats=dict(sorted(reading.counts.items())),
        sizes=sizes,
        lossy=reading.rounded,
        notes=[*source.notes, *_computing(settings)],
    )


def _provenance(path: Path, importer: Importer) -> dict[str, Any]:
    return {
        "source": "import",
        "importer": importer.name,
        "teacher": {"name": path.resolve().name},
        "sha256": workdir.hash_file(path) if path.is_file() else models.fingerprint(path),
        "edgerazor": __version__,
    }


def _settings(source: Source, activation_bits: int, kv_bits: int) -> dict[str, Any]:
    """How the packed model computes, as JSON values."""
    said = {"activation_bits": activation_bits, "kv_bits": kv_bits, "adaptive_tokens": "off", "thresholds": []}
    said |= {"group_size": source.activation_group or ACTIVATION_GROUP, "query_bits": 16, "probability_bits": 16}
    return {name: said[name] for name in packed.SETTINGS}


def _computing(settings: dict[str, Any]) -> list[str]:
    """How many bits inputs and cache have, for people; what is not rounded can be, which is faster."""
    activations, cache = settings["activation_bits"], settings["kv_bits"]
    said = f"It computes with {activations}-bit inputs of linear layers and a {cache}-bit cache"
    whole = {"--activation-bits 8": activations, "--kv-bits 8": cache}
    faster = [option for option, bits in whole.items() if bits == UNROUNDED]
    return [f"{said}; {' '.join(faster)} is faster and rounds them." if faster else f"{said}."]


class _Reading:
    """A source, matrix by matrix.

    Attributes:
        tied: modules that use the packed matrix of another.
        counts: number format -> weights that have got it so far.
        rounded: matrices of which some scale was rounded.
    """

    def __init__(self, path: Path, source: Source, lossy: bool) -> None:
        model = models.skeleton(source.config)
        self.path, self.source, self.lossy = path, source, lossy
        self.found = models.structure(model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.counts: dict[str, int] = {}
        self.rounded: list[str] = []
        head, embedding = f"{self.found.head_path}.weight", f"{self.found.embedding.name}.weight"
        #: tensor -> the one whose numbers it has, where the head is tied to the embedding
        self.same = {} if self.found.head else {head: embedding}
        self._check_names()
        quantized = [site for site in self.found.targets if source.quantized(f"{site.name}.weight")]
        self.targets = quantized
        packed_names = {site.name for site in quantized}
        self.tied = (
            {}
            if self.found.head or embedding.removesuffix(".weight") not in packed_names
            else {self.found.head_path: self.found.embedding.name}
        )

    def _check_names(self) -> None:
        """The tensors are those of the model."""
        stored = {name for name in self.source.names() if not name.endswith("rotary_emb.inv_freq")}
        for name in sorted(self.shapes.keys() - stored - self.same.keys()):
            raise UserError(f"{self.path} lacks the tensor {name}.", "Its configuration may be that of another model.")
        for name in sorted(stored - self.shapes.keys()):
            raise UserError(f"{self.path} holds {name}, which its model has no place for.")

    def matrices(self, console: Console) -> list[MatrixSource]:
        """The quantized matrices: which formats hold them is found now, their codes when it is their turn."""
        found = []
        with console.track("reading", len(self.targets)) as tracker:
            for site in self.targets:
                encoded, spec = self._fitted(site.name)
                self.counts[spec.formats[0]] = self.counts.get(spec.formats[0], 0) + site.weights
                shape = (encoded.codes.shape[0], encoded.codes.shape[1])
                encode = functools.partial(self._encoded, site.name)
                found.append(MatrixSource(site.name, site.kind, spec, shape, encode))
                tracker.advance()
        return found

    def _encoded(self, name: str) -> Encoded:
        return self._fitted(name)[0]

    def _fitted(self, name: str) -> tuple[Encoded, MatrixSpec]:
        """Exactly, or with rounded scales where that is allowed."""
        stored = self._read(f"{name}.weight")
        assert isinstance(stored, Integers)
        for lossy in (False, True)[: 1 + self.lossy]:
            try:
                found = fitted(stored, lossy)
            except MisfitError as error:
                reason = error
            else:
                if lossy and name not in self.rounded:
                    self.rounded.append(name)
                return found
        raise self._refused(f"{name}.weight", reason)

    def others(self) -> dict[str, Tensor]:
        """What is not quantized, as it is stored."""
        skipped = {f"{name}.weight" for name in ({site.name for site in self.targets} | self.tied.keys())}
        found = {}
        for name in sorted(self.shapes.keys() - skipped):
            tensor = self._read(self.same.get(name, name))
            if isinstance(tensor, Integers):
                raise self._refused(name, MisfitError("it is quantized, but no linear layer or embedding"))
            weights.refuse_not_finite(self.path, [(name, tensor)])
            found[name] = tensor.contiguous().clone()
            self.counts["floating"] = self.counts.get("floating", 0) + tensor.numel()
        return found

    def _read(self, name: str) -> Integers | Tensor:
        try:
            stored = self.source.read(name)
        except MisfitError as error:
            raise self._refused(name, error) from None
        shape = tuple((stored.values if isinstance(stored, Integers) else stored).shape)
        if shape != self.shapes[name]:
            raise UserError(
                f"{self.path}: {name} is {list(shape)}, and its configuration says {list(self.shapes[name])}."
            )
        return stored

    def _refused(self, name: str, error: MisfitError) -> UserError:
        hint = "Round the original model instead: `edgerazor pack MODEL --bits 4`."
        if "scale is no float16" in str(error):
            hint = "Round the scales with --allow-lossy, or give another file."
        return UserError(f"{self.path} cannot be packed without loss: {name}: {error}.", hint)
