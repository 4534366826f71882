"""Packed models inside transformers: `AutoModelForCausalLM.from_pretrained(folder)`, without remote code.

`import edgerazor` makes transformers know the quantizer below (`transformers_registration.py`). transformers finds its
name in the `quantization_config` of the folder's config.json, builds the model without weights, and lets the quantizer
replace the quantized modules by packed ones. Those read their codes through `packed`, checked, at first use: on a CPU
with native kernels as they are stored, mapped from the file. All other tensors (norms, biases) are checked at once, and
transformers loads them itself.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from edgerazor import formats, modules, untrusted
from edgerazor.errors import UserError, plain
from edgerazor.formats import OF_INPUTS
from edgerazor.kernels import StoredMatrix
from edgerazor.models import (
    auto_class,
    auto_config,
    error_summary,
    let_see,
    load_tokenizer,
    quiet_transformers,
    separate_experts,
)
from edgerazor.packed import CHECKSUMS, SETTINGS, SIGNS, PackedModel
from edgerazor.untrusted import vocabulary
from edgerazor.workdir import find_folder, read_whole

#: The `quant_method` of our packed folders.
METHOD = "edgerazor"


class EdgeRazorConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed folder's config.json.

    Args:
        version: of the packed format.
        activation_bits: bits of the inputs of quantized layers, 4 to 8, or 16.
        kv_bits: bits of keys and values, 4, 8 or 16.
        group_size: number of consecutive activations that share a scale.
        query_bits: bits of queries, 4, 8 or 16.
        probability_bits: bits of attention probabilities, 4, 8 or 16.
        adaptive_tokens: off, causal or ranked (see `modules/attention.py`).
        thresholds: the least importance of an important token, by layer, for causal.
    """

    # More than eight parameters: transformers calls it with the fields of `quantization_config` as keywords.
    def __init__(
        self,
        version: int,
        activation_bits: int,
        kv_bits: int,
        group_size: int,
        query_bits: int,
        probability_bits: int,
        adaptive_tokens: str,
        thresholds: list[float],
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version = version
        self.activation_bits, self.kv_bits, self.group_size = activation_bits, kv_bits, group_size
        self.query_bits, self.probability_bits = query_bits, probability_bits
        self.adaptive_tokens, self.thresholds = adaptive_tokens, thresholds


class EdgeRazorQuantizer(HfQuantizer):
    """Loads packed models as a `HfQuantizer`. They can be neither trained nor saved: `edgerazor pack` makes them."""

    requires_calibration = True

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        self.dtype = dtype or torch.float32
        return self.dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError("a packed model is loaded from its folder, not from a state dict")
        with torch.device("cpu"):  # older transformers call this on the meta device, where tensors have no data
            self._replace_modules(model, PackedModel.open(Path(checkpoint_files[0]).parent))

    def _replace_modules(self, model: PreTrainedModel, packed: PackedModel) -> None:
        """Replace the quantized modules of a model without weights by packed ones."""
        separate_experts(model)
        matrices = {name: entry for name, entry in packed.header.matrices.items() if entry.kind != "tower"}
        self._packed = packed
        config = self.quantization_config
        check_settings(config, packed)

        def load(name: str) -> tuple[Any, Any]:
            matrix = packed.matrix(name)
            return matrix.encoded, matrix.spec

        modules.install_packed(
            model,
            {name: (entry.shape[0], entry.shape[1]) for name, entry in matrices.items()},
            packed.header.tied,
            load,
            modules.Settings(**{name: getattr(config, name) for name in SETTINGS}),
            self.dtype,
            packed.input_scales(),
            functools.partial(stored_matrix, packed),
            packed.rotation,
        )
        check_unquantized(model, packed)
        packed_names = "|".join(re.escape(name) for name in packed.header.matrices)
        unexpected = {rf"^({packed_names})\.weight\.", rf"\.({'|'.join(OF_INPUTS)})$", f"^{re.escape(CHECKSUMS)}$"}
        unexpected.add(f"^{re.escape(SIGNS)}")
        model._keys_to_ignore_on_load_unexpected = unexpected
        model._tied_weights_keys = model.all_tied_weights_keys = {}  # there is no weight left to tie

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Give towers their decoded matrices: they look at a picture once, and compute with floating weights."""
        with torch.no_grad():
            for name in towers_of(self._packed):
                matrix = self._packed.matrix(name)
                weight = model.get_submodule(name).weight
                weight.copy_(formats.decode_matrix(matrix.encoded, matrix.spec))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """None that makes one tensor of several: files hold the model's own tensors, and each expert's by itself."""
        return [conversion for conversion in weight_conversions if not isinstance(conversion, WeightConverter)]

    def is_serializable(self) -> bool:
        raise UserError(
            "A packed model is not saved from memory, where it has no weights to save.",
            "Copy its folder; that is the model.",
        )

    @property
    def is_trainable(self) -> bool:
        return False


def stored_matrix(packed: PackedModel, name: str) -> StoredMatrix | None:
    """A matrix as native kernels compute with it, its checksums and scales checked; None where they cannot.

    Raises:
        UserError: the matrix is damaged.
    """
    entry, spec = packed.header.matrices[name], packed.spec(name)
    if spec.native_problem():
        return None
    try:
        return StoredMatrix(packed.parts(name), spec, (entry.shape[0], entry.shape[1]))
    except ValueError as error:
        raise UserError(f"{packed.folder}: {name}: {error}.", "Copy or pack the model again.") from None


def check_settings(settings: Any, packed: PackedModel) -> None:
    """Check that config.json, which anyone may edit, says what the checked header of the weights says.

    Args:
        settings: an object that has the fields of `quantization_config` as attributes.
        packed: the packed model.

    Raises:
        UserError: they differ.
    """
    for name in SETTINGS:
        in_config, value = getattr(settings, name, None), packed.header.settings.get(name)
        if value is None:
            raise UserError(
                f"{packed.folder}: the weights do not say for which {name} they were made.", "Pack it again."
            )
        if in_config != value:
            raise UserError(
                f"{packed.folder}: config.json says {name} {plain(in_config, 50)}, but the weights were made for "
                f"{plain(value, 50)}.",
                "Undo the change, or pack the model again.",
            )


def check_layers(config: Any, packed: PackedModel) -> None:
    """Check that config.json has no more layers than there are weights of; building them could take forever.

    Raises:
        UserError: it has more, or there are thresholds for another number of layers.
    """
    count = config.get_text_config().num_hidden_layers
    linears = sum(entry.kind == "linear" for entry in packed.header.matrices.values())
    settings = packed.header.settings
    thresholds = settings.get("thresholds")
    causal = settings.get("adaptive_tokens") == "causal"
    if not isinstance(count, int) or count > linears or (causal and len(thresholds or []) != count):  # type: ignore[arg-type]
        raise UserError(
            f"{packed.folder}: config.json says num_hidden_layers {plain(count, 50)}, but there are not the weights "
            "or settings of so many.",
            "Undo the change, or pack the model again.",
        )


def towers_of(packed: PackedModel) -> list[str]:
    """Paths of the matrices of towers that are quantized."""
    return [name for name, entry in packed.header.matrices.items() if entry.kind == "tower"]


def check_unquantized(model: PreTrainedModel, packed: PackedModel) -> None:
    """Check the tensors that transformers loads itself, where it would fill in random numbers for missing ones.


    Raises:
        UserError: a tensor is missing or damaged.
    """
    missing = model.state_dict().keys() - packed.others().keys() - {f"{name}.weight" for name in towers_of(packed)}
    if missing:
        raise UserError(f"{packed.folder} lacks the tensor {min(missing)}.", "Pack the model again.")


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed model of ours, by its configuration.

    Raises:
        UserError: its config.json is damaged.
    """
    path = find_folder(folder) / "config.json"
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        raise UserError(f"{path} is not a file.", "Copy or pack the model again.")
    config = untrusted.read_json(path, None, hint="Copy or pack the model again.")
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def check_files(folder: Path) -> None:
    """Check that a folder holds only files and folders: a library could wait for a pipe, or follow a link to nowhere.

    Raises:
        UserError: it holds something else.
    """
    for path in sorted(folder.iterdir()):
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is no file, but a pipe, a device, or a link to nowhere.", "Remove it.")


def open_folder(folder: Path) -> tuple[PackedModel, Any]:
    """A packed model and its configuration, checked one against the other.

    While another process replaces the folder, both are of the old one or both of the new one.

    Raises:
        UserError: the folder is not a packed model, or damaged.
    """
    return read_whole(folder, _open_folder)


def _open_folder(folder: Path) -> tuple[PackedModel, Any]:
    if not is_packed(folder):
        raise UserError(f"{folder} is not a packed model.", "Make one with `edgerazor pack`.")
    check_files(folder)
    packed = PackedModel.open(folder)
    values = untrusted.read_configuration(folder, "Undo the change, or pack the model again.")
    try:
        EdgeRazorConfig(**values["quantization_config"])
    except TypeError as error:  # transformers would build the configuration likewise, and fail with this error
        raise UserError(
            f"{folder / 'config.json'} does not describe a packed model: {error_summary(error)}.",
            "Undo the change, or pack the model again.",
        ) from None
    shapes = [entry.shape for entry in packed.header.matrices.values()]
    untrusted.check_shapes(folder / "config.json", values, shapes)
    config = auto_config(folder)
    check_layers(config, packed)
    return packed, config


def load(
    folder: str | os.PathLike[str],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_decoded: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a packed model and its tokenizer.

    Args:
        folder: what `edgerazor pack` wrote.
        device: where the model computes.
        dtype: of activations between the quantized layers.
        cache_decoded: hold float32 weights in memory after their first use, 4 bytes a weight. That is faster in
            batches, and does nothing where native kernels are in use.

    Raises:
        UserError: the folder is not a packed model, or damaged.
    """
    folder = Path(folder)
    _, config = open_folder(folder)  # transformers would hide which file is damaged, and how
    tokenizer = load_tokenizer(folder)
    with quiet_transformers():
        try:
            model = auto_class(config).from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"The packed model {folder} cannot be loaded: {error_summary(error)}.") from None
    vocabulary.limit(tokenizer, model.get_input_embeddings().num_embeddings)
    modules.cache_decoded(model, cache_decoded)
    return let_see(model.to(device).eval()), tokenizer
