"""A stranger's weight files: which of them are a model's, that each tensor is there once, and that all are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from edgerazor.errors import UserError, plain
from edgerazor.untrusted.documents import load_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Most bytes of an index; those of the largest models have about ten million.
MOST_INDEX_BYTES = 1 << 26
AGAIN = "Download the model again."
LESS_MEMORY = "Of a teacher, `--teacher-source streamed` has one layer in memory at a time."
#: What a safetensors file calls the dtypes that weights may have where nothing says how they were quantized.
FLOATING = ("F64", "F32", "F16", "BF16")
#: Numbers that are looked at together: a few megabytes.
PIECE = 1 << 22


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's model, those that transformers reads: the single one, else those of the index.

    A folder without either gives all of its safetensors files. Others beside them, such as a copy in another layout,
    are not part of the model.

    Raises:
        UserError: there is none, one that the index names is missing, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(read_index(folder).values()))
        for name in names:
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} lacks the weight file {plain(name)}, which its index names.", "Download it again."
                )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise UserError(
            f"{folder} holds no safetensors weights; pickled weights (.bin) are not read, because loading them runs "
            "code.",
            "Convert them once: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER).",
        )
    raise UserError(
        f"{folder} holds no safetensors weights.", "Download the model again, with its *.safetensors files."
    )


def read_index(folder: Path) -> dict[str, str]:
    """Read a folder's index: tensor -> file.

    Raises:
        UserError: it is damaged, or names a file that is not one of the folder.
    """
    path = folder / INDEX
    try:
        entries = load_json(path, most_bytes=MOST_INDEX_BYTES)["weight_map"].items()
        index = {name: file for name, file in entries if file and file == Path(file).name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged.", AGAIN) from None
    if len(index) < len(entries) or not index:
        raise UserError(f"{path} is damaged: it names no files, or some outside of its folder.", AGAIN)
    return index


def open_files(files: Iterable[Path]) -> dict[Path, Any]:
    """Open safetensors files, mapped.

    Raises:
        UserError: one of them is damaged, or there is no memory to map it.
    """
    opened = {}
    for file in files:
        try:
            opened[file] = safe_open(file, framework="pt")
        except Exception as error:  # the library raises its own, the system's and decoding errors
            reason = plain(" ".join(str(error).split()).rstrip("."))
            if "Cannot allocate memory" in reason:
                raise UserError(f"There is not enough memory for the weight file {file}.", LESS_MEMORY) from None
            raise UserError(f"The weight file {file} is damaged: {reason}.", AGAIN) from None
    return opened


def open_tensors(folder: Path) -> dict[str, Any]:
    """Open a folder's model: every tensor -> the open file that holds it.

    Raises:
        UserError: a file is missing or damaged, or a tensor is stored twice with different numbers.
    """
    files = open_files(weight_files(folder))
    holder: dict[str, Path] = {}
    for file, opened in files.items():
        for name in opened.keys():  # noqa: SIM118 (a safetensors file cannot be iterated over)
            if name in holder and not _same(files[holder[name]], opened, name):
                raise UserError(
                    f"{holder[name].name} and {file.name} in {folder} both hold {plain(name)}, with different numbers.",
                    "Download the model again, or delete the file that does not belong to it and name each tensor's "
                    f"own file in {INDEX}.",
                )
            holder[name] = file
    return {name: files[file] for name, file in holder.items()}


def _same(one: Any, other: Any, name: str) -> bool:
    """Whether two files hold a tensor alike, to the bit."""
    first, second = one.get_slice(name), other.get_slice(name)
    if (first.get_dtype(), first.get_shape()) != (second.get_dtype(), second.get_shape()):
        return False
    tensors = (file.get_tensor(name).reshape(-1).view(torch.uint8) for file in (one, other))
    return torch.equal(*tensors)


def refuse_encoded(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Refuse matrices in float8 or integers: they need scales, and nothing says which.

    Args:
        folder: for the message.
        tensors: as `open_tensors` gives them.

    Raises:
        UserError: it names the first such matrix.
    """
    for name in sorted(tensors):
        view = tensors[name].get_slice(name)
        dtype = view.get_dtype()
        if name.endswith(".weight") and len(view.get_shape()) > 1 and dtype not in FLOATING:
            raise UserError(
                f"{folder} stores {plain(name)} as {dtype}, and its config.json has no quantization_config that says "
                "what these numbers stand for; a 16- or 32-bit checkpoint is needed.",
                "Give the original model, or convert this one: load it in the program that made it, and save it in "
                "bfloat16.",
            )


def refuse_not_finite(where: object, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights with a NaN or an infinity: whatever is computed from them is worth nothing.

    Each number is read once.

    Args:
        where: the model, for the message.
        tensors: name and tensor of any shape and dtype; only floating ones are looked at.

    Raises:
        UserError: it names the first such tensor, and what it holds.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not is_finite(tensor):
            what = "NaN" if bool(tensor.isnan().any()) else "infinity"
            raise UserError(
                f"{where} has a tensor that is no usable weight: {plain(name)} holds {what}.",
                "The model is damaged, or was saved after its training had diverged: download it again, or take "
                "another checkpoint.",
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity."""
    if tensor.is_meta or not tensor.numel():
        return True
    return all(bool(torch.isfinite(torch.stack(piece.aminmax())).all()) for piece in _pieces(tensor))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in some pieces; what is not contiguous is one."""
    if not tensor.is_contiguous():
        return iter((tensor,))
    return iter(tensor.view(-1).split(PIECE))
