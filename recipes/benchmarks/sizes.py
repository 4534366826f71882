"""Our packed file beside llama.cpp's own files of the same model: bytes, everything counted.

    make sizes                       the table in recipes/results/packing.md
    python -m recipes.benchmarks.sizes --layers 2 --results none
    python -m recipes.benchmarks.sizes --llamacpp none         ours alone, without llama.cpp

The model has the shapes of Qwen3-0.6B and Gaussian weights, as transformers draws them. It is packed at 1.58 bits with
an int4 embedding, groups of 256. llama.cpp's files are made by its own `llama-quantize` from the float16 export of that
packed model (a file's size does not depend on what the weights are), with the tool's own choice of types for the
embedding, which is also the head. *Export* is our own GGUF file of the same codes, *compressed* our packed model as
`pack --compress` writes it (which does depend on what the weights are).

*Real bits* are 8 x bytes / weights, of whole files; of ours, the weight files. A GGUF file also holds the vocabulary,
which in our folder is the tokenizer's own file, so *tensors alone* are given too. About 4 GB of disk for a while.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from edgerazor import exporters, packed, pipeline
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.console import table as rich_table
from edgerazor.errors import FAILED, UserError
from edgerazor.packed import PackedModel
from edgerazor.workdir import WorkDir, machine
from recipes.benchmarks.folders import BUILD, RESULTS, WORLD
from recipes.benchmarks.interop import built, version
from recipes.benchmarks.memory import SHAPE
from recipes.benchmarks.results import commit, markdown, publish

TYPES = ("TQ1_0", "TQ2_0", "Q2_K", "Q4_0")
#: Real bits that were promised of the whole model, packed and compressed.
MOST = (2.31, 2.00)
HEAD = ("file", "linear layers", "embedding", "bytes", "real bits", "tensors alone")


@dataclass(frozen=True)
class File:
    """A line of the table: types of the linear layers and of the embedding, bytes of the file and of its tensors."""

    name: str
    linear: str
    embedding: str
    bytes: int
    tensors: int

    def cells(self, weights: int) -> list[str]:
        bits = [f"{8 * size / weights:.3f}" for size in (self.bytes, self.tensors)]
        return [self.name, self.linear, self.embedding, f"{self.bytes:,}", *bits]


def write_gaussian(folder: Path, layers: int, tokenizer: Path) -> None:
    """The 16-bit model."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "num_hidden_layers": layers}))
    model = model.bfloat16().to_empty(device="cpu")
    for module in model.modules():
        model._init_weights(module)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def ours(folder: Path, name: str = "edgerazor") -> File:
    """A packed model."""
    opened = PackedModel.open(folder)
    names = {kind: set[str]() for kind in ("linear", "embedding")}
    for entry in opened.header.matrices.values():
        names[entry.kind] |= set(entry.formats)
    sizes = packed.size_table(opened)
    data = sum(part.bytes for part in sizes.classes)
    return File(name, *("+".join(sorted(names[kind])) for kind in names), sizes.bytes, data)


def theirs(name: str, path: Path) -> File:
    """A GGUF file, by what is in it."""
    types_of: dict[str, dict[str, int]] = {"embedding": {}, "linear": {}}
    data = 0
    for tensor in GGUFReader(path).tensors:
        data += int(tensor.n_bytes)
        if len(tensor.shape) > 1:
            types = types_of["embedding" if tensor.name.startswith("token_embd") else "linear"]
            kind = tensor.tensor_type.name
            types[kind] = types.get(kind, 0) + int(tensor.n_elements)
    words = (
        "+".join(sorted(types, key=lambda kind: -types[kind])) for types in (types_of["linear"], types_of["embedding"])
    )
    return File(name, *words, path.stat().st_size, data)


def our_files(work: WorkDir, console: Console) -> Iterator[File]:
    """The packed model, as it is and compressed."""
    model = PackedModel.open(work.folder("pack"))
    yield ours(model.folder)
    target = work.path / "compressed"
    target.mkdir()
    with console.track("compress", len(model.header.matrices)) as tracker:
        packed.rewrite(model, target, compress=True, done=tracker.advance)
    PackedModel.open(target).verify()
    yield ours(target, "edgerazor, compressed")


def too_large(ours: list[File], weights: int) -> list[str]:
    """What takes more real bits than was promised."""
    takes = [(file.name, 8 * file.bytes / weights, most) for file, most in zip(ours, MOST, strict=True)]
    return [f"{name} takes {bits:.4f} real bits, more than {most}." for name, bits, most in takes if bits > most]


def files(work: WorkDir, tools: Path, threads: int, console: Console) -> Iterator[File]:
    """Exports and llama.cpp's own files, each made, measured and deleted."""
    target = work.path / "exports"
    (quantized,) = exporters.write_all(work.folder("pack"), ["gguf"], target, False, console)
    yield theirs("edgerazor, export", Path(quantized.file))
    (wide,) = exporters.write_all(work.folder("pack"), ["gguf-f16"], target, True, console)
    for kind in TYPES:
        made = target / f"{kind}.gguf"
        console.say(f"llama-quantize {kind}")
        words = [str(tools / "llama-quantize"), wide.file, str(made), kind, str(threads)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"llama-quantize fails: {' '.join(done.stderr.split()[-20:])}")
        yield theirs(f"llama.cpp {kind}", made)
        made.unlink()
    yield theirs("llama.cpp F16", Path(wide.file))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokenizer", type=Path, default=WORLD / "teacher", help="whose vocabulary is written")
    parser.add_argument("--build", type=Path, default=BUILD / "sizes", help="deleted afterwards")
    parser.add_argument(
        "--llamacpp", type=Path, default=BUILD / "llamacpp", help="what `make llamacpp` made, or `none`"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", default=str(RESULTS / "packing.md"), help="where the table goes, or `none`")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        alone = str(options.llamacpp) == "none"
        python = None if alone else built(options.llamacpp / "bin" / "python")
        write_gaussian(options.build / "model", options.layers, options.tokenizer)
        values = {"bits": 1.58, "plan": "interleave", "group_size": 256, "rotation": "none"}  # GGUF has none
        recipe = recipes.build(
            {"model": str(options.build / "model"), "calibrate": values, "pack": {"source": "teacher"}}
        )
        work = WorkDir(options.build / "work")
        pipeline.run("pack", recipe, work, console)
        weights = packed.size_table(PackedModel.open(work.folder("pack"))).parameters
        own = list(our_files(work, console))
        others = [] if alone else list(files(work, options.llamacpp / "tools", options.threads, console))
        rows = [file.cells(weights) for file in (*own, *others)]
        wrong = too_large(own, weights) if options.layers == 28 else []
    except UserError as error:
        console.error(error)
        return error.code
    finally:
        shutil.rmtree(options.build, ignore_errors=True)
    console.out.print(rich_table(f"{weights:,} weights", list(HEAD), rows))
    if options.results != "none" and python is not None:
        facts = f"{weights:,} weights; {version(python)}; {machine()}; commit {commit()}."
        publish("sizes", f"{facts}\n\n{markdown(HEAD, rows)}", Path(options.results))
    for sentence in wrong:
        console.error(UserError(sentence))
    return FAILED if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
