"""From a name to a model in memory: local folders and the Hugging Face hub, one clear sentence when it fails."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from edgerazor import untrusted
from edgerazor.console import Console
from edgerazor.errors import UserError, plain, usage_error
from edgerazor.models.experts import separate_experts
from edgerazor.models.gguf_teacher import folder_of_gguf, gguf_origin, is_gguf
from edgerazor.models.onloading import drop_pages
from edgerazor.models.pictures import let_see
from edgerazor.untrusted import links, vocabulary, weights
from edgerazor.untrusted.tokenizer import open_tokenizer
from edgerazor.untrusted.weight_places import all_places
from edgerazor.workdir import digest_json, hash_file

#: Most rows of a matrix that its size is taken from.
SAMPLED_ROWS = 4096
#: Files that make up a model: what is fetched from the hub, and what identifies a teacher.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
#: Files beside config.json and weights that make a folder usable on its own: tokenizer, chat template, generation,
#: and what a model that sees makes of pictures.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
#: Fetched with a model of the hub, and no part of what identifies it: its card, and the texts of its licence.
CARDS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
VOCABULARIES = ("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def resolve(source: str, revision: str | None = None, console: Console | None = None) -> Path:
    """The local folder of a model: itself, what a GGUF file becomes, or the snapshot of a hub id.

    A GGUF file is dequantized and a model of the hub downloaded on first use.

    Args:
        source: folder, GGUF file or hub id.
        revision: of the hub model.
        console: where to show how far it is.

    Raises:
        UserError: no such folder and no such model on the hub, no network, or a file that is no teacher.
    """
    if not source:
        raise usage_error("No model was named.", "Name one: `edgerazor distill MODEL --bits 2`.")
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{source} is a folder without a config.json, so it is not a Hugging Face model.")
        return path
    if is_gguf(source):
        return folder_of_gguf(path, console)
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{source} is an empty file; a model is a folder or a GGUF file.", "Download it again.")
    if path.exists():
        raise UserError(
            f"{source} is a file; a model is a folder with config.json and safetensors weights, or a GGUF file."
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise usage_error(f"There is no folder {source}.", "Give a local model folder or a Hugging Face hub id.")
    return _snapshot(source, revision)


def _snapshot(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[*FILES, *CARDS]))
    except RevisionNotFoundError:
        raise UserError(f"The hub model {source} has no revision {revision}.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{source} is neither a local folder nor a model of the Hugging Face hub that you may read.",
            "Check the spelling; for a gated model log in with `hf auth login`.",
        ) from None
    except OSError:  # no network, offline mode, or no valid answer
        which = f"{source} (revision {revision})" if revision else source
        raise UserError(
            f"{which} is not a local folder, and the Hugging Face hub could not be reached to fetch it.",
            "Connect to the network, or give the path of a downloaded model folder.",
        ) from None


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings from one model folder into another.

    Fields that name Python code stay behind: it is not copied, and no packed model may ask for any.

    Raises:
        UserError: one of them is a link that leaves the folder, or a file that may have such fields cannot be read.
    """
    for file in companions(source):
        if not file.is_file():
            continue
        values = untrusted.read_json(file, None) if file.name in untrusted.CODE_FILES else None
        if any(untrusted.code_fields(values)):
            text = json.dumps(untrusted.without_code(values), indent=2, ensure_ascii=False) + "\n"
            (folder / file.name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(file, folder / file.name)


def companions(folder: Path) -> list[Path]:
    """Tokenizer, chat template and generation settings of a model folder.

    Raises:
        UserError: one of them is a link that leaves the folder.
    """
    files = sorted({file for pattern in COMPANIONS for file in folder.glob(pattern)})
    links.refuse_leaving(folder, files)
    return files


def fingerprint(folder: Path) -> str:
    """SHA-256 over the config, tokenizer and weight files of a model folder."""
    files = sorted({file for pattern in FILES for file in folder.glob(pattern) if file.is_file()})
    skipped = {"training.json", "generation_config.json"}
    return digest_json({file.name: hash_file(file) for file in files if file.name not in skipped})


def describe_source(source: str, folder: Path) -> dict[str, str]:
    """Provenance of a teacher that does not depend on where it lies: its name, and the hub's commit if any."""
    path = Path(source)
    described = {"name": source if not path.exists() else path.name if path.is_file() else folder.resolve().name}
    if origin := gguf_origin(folder):
        described["origin"] = origin
    if folder.parent.name == "snapshots":
        described["revision"] = folder.name
    return described


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a 16-bit causal language model.

    Raises:
        UserError: unreadable, unknown architecture, already quantized, or not a causal language model.
    """
    raw = untrusted.read_json(folder / "config.json", hint="Download the model again.")
    if raw.get("quantization_config"):
        settings = raw["quantization_config"]
        method = plain(settings.get("quant_method", "some method"), 50) if isinstance(settings, dict) else "some method"
        raise UserError(
            f"{folder} is already quantized ({method}); a 16- or 32-bit checkpoint is needed.",
            "Give the original model. To measure a packed model, use `edgerazor eval FOLDER --tasks arc`.",
        )
    if raw.get("is_encoder_decoder"):
        raise UserError(
            f"{folder} is an encoder-decoder model; only decoder-only causal language models are supported."
        )
    if not trust_remote_code:
        untrusted.refuse_code(folder, "If you trust it, add --trust-remote-code.")
    untrusted.check_configuration(folder / "config.json", raw)
    untrusted.check_shapes(folder / "config.json", raw, stored_shapes(folder))
    config = auto_config(folder, trust_remote_code)
    if not _is_causal(config, raw, trust_remote_code):
        what = ", ".join(raw.get("architectures") or [type(config).__name__])
        raise UserError(f"{folder} ({what}) is not a causal language model, so there is nothing to distil.")
    return config


def auto_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a model folder of any kind. Without trust no code of the folder is run or offered.

    Raises:
        UserError: transformers cannot read it.
    """
    untrusted.read_configuration(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"transformers cannot read the configuration of {folder}: {error_summary(error)}.") from None


def generation_config(folder: Path) -> GenerationConfig | None:
    """The generation settings of a model folder; None where it has none.

    Raises:
        UserError: transformers cannot read it.
    """
    path = folder / GENERATION_CONFIG_NAME
    if not path.exists():
        return None
    check_generation_config(path)
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"transformers cannot read {path}: {error_summary(error)}.") from None


def check_generation_config(path: Path) -> None:
    """Check a file of generation settings.

    Raises:
        UserError: it cannot be read, or names as token ids what are none.
    """
    untrusted.check_configuration(path, untrusted.read_json(path, hint="Copy the model again."))


def complete_config(folder: Path) -> dict[str, Any]:
    """Every field of a model's or packed model's configuration, those at their defaults included.

    Raises:
        UserError: it cannot be read.
    """
    config: dict[str, Any] = auto_config(folder).to_dict()
    return config


def decoder_config(folder: Path) -> dict[str, Any]:
    """The same of the decoder alone, where the model sees.

    Raises:
        UserError: it cannot be read.
    """
    config = auto_config(folder)
    text: dict[str, Any] = config.get_text_config().to_dict()
    return {**text, "tie_word_embeddings": config.tie_word_embeddings} if sees(config) else config.to_dict()


def stored_shapes(folder: Path) -> list[tuple[int, ...]]:
    """Shapes of all tensors in the weight files of a folder; none where a file is missing or damaged."""
    try:
        return [place.shape for place in all_places(folder)]
    except UserError:
        return []


def weight_size(folder: Path) -> float | None:
    """Root mean square of the largest matrix in the weight files of a folder, from some rows all over it.

    None where no matrix is in 16- or 32-bit numbers, or a file is missing or damaged.
    """
    try:
        matrices = [place for place in all_places(folder) if len(place.shape) == 2 and place.dtype is not None]
        rows = max(matrices, key=lambda place: math.prod(place.shape)).some_rows(SAMPLED_ROWS)
    except (UserError, ValueError):  # ValueError: there is none
        return None
    size = float(rows.float().square().mean().sqrt())
    return size if size > 0 and math.isfinite(size) else None


def sees(config: Any) -> bool:
    """Whether a configuration is of a model that is given pictures beside text."""
    return getattr(config, "vision_config", None) is not None


def auto_class(config: Any) -> Any:
    """transformers' class of automatic models for a configuration: those that see have one of their own."""
    if sees(config) and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _is_causal(config: Any, raw: dict, trust_remote_code: bool) -> bool:
    """Whether transformers has a causal head for it; encoders that also have one (BERT) are told by architecture."""
    architectures = raw.get("architectures") or []
    if architectures and not any(
        "CausalLM" in name or "LMHead" in name or name.endswith("ForConditionalGeneration") for name in architectures
    ):
        return False
    return trust_remote_code or type(config) in auto_class(config)._model_mapping


def caps_attention(config: Any) -> bool:
    """Whether attention scores are capped (Gemma 2): torch's fused attention would leave the cap out."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    if not any(folder.glob("tokenizer*")) and not any((folder / name).exists() for name in VOCABULARIES):
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.json or tokenizer.model).",
            "Copy the tokenizer files of the original model into the folder.",
        )
    companions(folder)
    try:
        return open_tokenizer(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"transformers cannot load the tokenizer of {folder}: {error_summary(error)}.") from None


def load(
    source: str | Path,
    revision: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a 16-bit causal language model and its tokenizer, in evaluation mode.

    Args:
        source: local folder or hub id.
        revision: of the hub model.
        device: where the weights go.
        dtype: of the weights in memory; None keeps the checkpoint's own.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: one sentence saying why the model cannot be loaded.
    """
    folder = resolve(str(source), revision)
    config = load_config(folder, trust_remote_code)
    if (folder / GENERATION_CONFIG_NAME).exists():
        check_generation_config(folder / GENERATION_CONFIG_NAME)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    stored = weights.open_tensors(folder)
    weights.refuse_encoded(folder, stored)
    with quiet_transformers():
        try:
            model, report = auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with the names
                attn_implementation="eager" if caps_attention(config) else None,
            )
        except Exception as error:
            raise UserError(f"The weights of {folder} cannot be loaded: {error_summary(error)}.") from None
    _restore_tied_embedding(model, report, stored)
    _refuse_incomplete(report, folder)
    weights.refuse_not_finite(folder, _named_tensors(model))
    _declare_untied(model)
    vocabulary.limit(tokenizer, model.get_input_embeddings().num_embeddings)
    return let_see(separate_experts(model).to(device).eval()), tokenizer


def initialise(
    source: str | Path, revision: str | None = None, seed: int = 0, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A float32 model of a source's architecture with random weights, as its authors initialise them.

    Args:
        source: local folder or hub id; only its configuration is used.
        revision: of the hub model.
        seed: of the weights.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: as `load`, about the configuration.
    """
    config = load_config(resolve(str(source), revision), trust_remote_code)
    torch.manual_seed(seed)
    model = auto_class(config).from_config(
        config,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        attn_implementation="eager" if caps_attention(config) else None,
    )
    return let_see(separate_experts(model))


def outline(source: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The modules of a model without its weights (on the meta device), in the dtype of its configuration.

    Args:
        source: local folder or hub id; only its configuration is used.
        revision: of the hub model.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: as `load`, about the configuration.
    """
    config = load_config(resolve(str(source), revision), trust_remote_code)
    dtype = config.get_text_config().dtype or config.dtype or torch.float32
    try:
        with torch.device("meta"), quiet_transformers():
            model = auto_class(config).from_config(
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation="eager" if caps_attention(config) else None,
            )
    except Exception as error:
        raise UserError(f"transformers cannot build the model of {source}: {error_summary(error)}.") from None
    return separate_experts(model).eval()


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with every field, those at their defaults included.

    Args:
        values: some of its fields, `model_type` among them.

    Raises:
        UserError: transformers knows no such configuration.
    """
    fields = {name: value for name, value in values.items() if name != "model_type"}
    untrusted.check_configuration(Path("config.json"), values)
    try:
        config: dict[str, Any] = AutoConfig.for_model(str(values.get("model_type")), **fields).to_dict()
    except Exception as error:
        raise UserError(f"transformers knows no such configuration: {error_summary(error)}.") from None
    return config


def skeleton(values: dict[str, Any]) -> PreTrainedModel:
    """The modules of a configuration's causal language model, without weights (on the meta device).

    Raises:
        UserError: transformers has no such model.
    """
    try:
        config = AutoConfig.for_model(**values)
        with torch.device("meta"):
            return auto_class(config).from_config(config, dtype=torch.float32)
    except Exception as error:
        raise UserError(f"transformers has no causal language model for it: {error_summary(error)}.") from None


def _refuse_incomplete(report: dict, folder: Path) -> None:
    """Refuse weights of which transformers would fill in some at random."""
    for name, stored, expected in sorted(report.get("mismatched_keys") or ()):
        raise UserError(
            f"The weights of {folder} do not fit its config.json: {name} is {list(stored)}, not {list(expected)}."
        )
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"The weights of {folder} lack the tensor {missing[0]}{more}.")


def _restore_tied_embedding(model: PreTrainedModel, report: dict, tensors: Mapping[str, Any]) -> None:
    """Give the embedding the head's weight: some checkpoints of tied models store only `lm_head.weight`."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not model.config.get_text_config().tie_word_embeddings or head is None:
        return
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    embedding_name, head_name = names[id(embedding)], names[id(head)]
    missing, unexpected = set(report.get("missing_keys") or ()), set(report.get("unexpected_keys") or ())
    if embedding_name not in missing and head_name not in missing:
        return
    stored_name = next((name for name in (embedding_name, head_name) if name in tensors), None)
    if stored_name is None:
        return
    stored = tensors[stored_name].get_tensor(stored_name)
    with torch.no_grad():
        embedding.weight.copy_(stored.to(embedding.weight.dtype))
    head.weight = embedding.weight
    report["missing_keys"] = missing - {embedding_name, head_name}
    report["unexpected_keys"] = unexpected - {head_name}


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each parameter and stored buffer; mapped ones leave the memory again after their use."""
    for name, tensor in model.state_dict().items():
        yield name, tensor
        drop_pages(tensor)


def _declare_untied(model: PreTrainedModel) -> None:
    """Set `tie_word_embeddings` to false where head and embedding are stored apart with different numbers, in place.

    transformers then ties neither to the other, whatever the configuration says; other programs obey the configuration.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


class quiet_transformers:  # noqa: N801 - used as a context manager, like those of contextlib
    """Keep transformers' progress bars and advice out of our output."""

    def __enter__(self) -> None:
        self.level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    def __exit__(self, *exception: object) -> None:
        transformers_logging.set_verbosity(self.level)


def error_summary(error: BaseException) -> str:
    """An error's message, shortened to its first line, or two where the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        lines.insert(0, type(error).__name__)
    summary = " ".join(lines[: 2 if lines[0].endswith(":") or isinstance(error, KeyError) else 1])
    return plain(summary).rstrip(".:")
