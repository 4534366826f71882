"""Whether other people's packages say of our exported folders what we say of the packed models.

    make interop                                          after the same for llama.cpp: the table in interop.md
    python -m recipes.benchmarks.interop_folders --models world --formats int4

Each model of `interop.py` that is no random one is packed and exported as folders; none of our code reads them back.

* *weights*: each quantized layer of a compressed-tensors folder, decoded by the package of that name (with scales as
  float32), and each matrix of a plain one, read by safetensors, has the weights of the packed model bit for bit.
* *logits*: transformers loads the folder and computes held-out text in float32; the largest difference from what it
  computes with the dequantized weights of the packed model is 0 or, where a program decodes as it goes, as small as
  orders of sums allow. Folders with inputs in 8 bits are compared with the packed model in our transformers path, which
  rounds inputs by its own rule and keys and values, too: there KL is said, and is at most 0.01 nats.

Exit code 3 when one of these is not so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgerazor import exporters, formats, transformers_plugin, untrusted
from edgerazor.console import Console
from edgerazor.console import table as rich_table
from edgerazor.errors import QUALITY, UserError, usage_error
from edgerazor.exporters.core.grouped import GroupedPlan
from edgerazor.packed import PackedModel
from edgerazor.workdir import machine
from recipes.benchmarks.folders import BUILD, RESULTS
from recipes.benchmarks.interop import (
    FORMATS,
    ROWS,
    WRITTEN,
    Case,
    Setting,
    common,
    dequantized,
    divergence,
    ours,
    pack,
    text_of,
    trained_cases,
)
from recipes.benchmarks.results import commit, markdown, publish

#: Largest difference of logits that the order of sums explains, and largest KL in nats of folders with rounded inputs.
SUMS, ROUNDED_KL = 1e-3, 1e-2
EXPORTS = ("compressed-tensors", "compressed-tensors-a8", "hf-f32")
HEAD = ("model", "packed", "export", "widths, groups", "real bits", "weights", "logits", "KL", "same text")


@dataclass(frozen=True)
class Row:
    """What was found of a folder: matrices of it, those that are exact, and logits beside ours."""

    case: Case
    export: str
    layouts: str
    bits: tuple[float, float]  # of the packed model, and of the folder
    matrices: int
    exact: int
    largest: float
    kl: float
    greedy: int

    def failures(self) -> list[str]:
        """What is not as it must be."""
        who = f"{self.case.model}, {self.case.format}, {self.export}"
        failed = [] if self.exact == self.matrices else [f"{who}: {self.matrices - self.exact} matrices differ"]
        if self.export.endswith("-a8"):
            if not self.kl <= ROUNDED_KL:
                failed.append(f"{who}: distributions are {self.kl:.1e} nats from ours")
        elif not self.largest <= SUMS or self.greedy < WRITTEN:
            failed.append(f"{who}: logits are up to {self.largest:.1e} from ours, and {self.greedy} tokens the same")
        return failed

    def cells(self) -> list[str]:
        """One row of the table."""
        return [
            self.case.model,
            self.case.format,
            self.export,
            self.layouts,
            f"{self.bits[0]:.2f}, {self.bits[1]:.2f}",
            f"{self.exact} of {self.matrices}",
            "0" if self.largest == 0 else f"{self.largest:.1e}",
            "0" if self.kl == 0 else f"{self.kl:.1e}",
            f"{self.greedy}/{WRITTEN}",
        ]


def decoded(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder by the paths of their modules, float32; packed ones through their package."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensors = load_file(folder / "model.safetensors")
    described = untrusted.load_json(folder / "config.json").get("quantization_config")
    weights = {name.removesuffix(".weight"): tensor.float() for name, tensor in tensors.items()}
    if described is None:
        return weights
    schemes = QuantizationConfig(**described).config_groups
    for name in [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]:
        [scheme] = [group for group in schemes.values() if name in group.targets or group.targets == ["Linear"]]
        state = {part: tensors[f"{name}.{part}"] for part in ("weight_packed", "weight_shape")}
        state["weight_scale"] = tensors[f"{name}.weight_scale"].float()
        weights[name] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return weights


def exact_matrices(model: PackedModel, weights: Mapping[str, Tensor]) -> int:
    """How many matrices of a packed model are the same bit for bit in what somebody else decoded."""
    count = 0
    for name in model.header.matrices:
        matrix = model.matrix(name)
        expected = matrix.spec.rotate_back(formats.decode_matrix(matrix.encoded, matrix.spec))
        count += name in weights and torch.equal(weights[name], expected)
    return count


def described_layouts(plan: exporters.ExportPlan) -> str:
    """Widths and group sizes of a folder's layers, those of most layers first."""
    if not isinstance(plan, GroupedPlan):
        return ", ".join(sorted({tensor.type for tensor in plan.tensors}))
    counts: dict[str, int] = {}
    for layout in plan.layouts.values():
        name = f"W{layout.bits} g{layout.group_size}"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(sorted(counts, key=lambda name: -counts[name]))


def measure(case: Case, setting: Setting, names: Sequence[str]) -> list[Row]:
    """Pack, export, let the packages read, compare."""
    work = pack(case, setting)
    folder = work.folder("pack")
    model = PackedModel.open(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, _ = text_of(case, tokenizer, ROWS)
    prompt = texts[0][:16]
    exact = ours(dequantized(folder), texts, prompt)
    rows = []
    for name in names:
        plan = exporters.find(name).plan(model)
        [written] = exporters.write_all(folder, [name], work.path / "exports", False, Console(quiet=True))
        loaded = AutoModelForCausalLM.from_pretrained(written.file, dtype=torch.float32)
        theirs = ours(loaded.eval(), texts, prompt)
        mine = exact
        if name.endswith("-a8"):
            mine = ours(transformers_plugin.load(folder, cache_decoded=True)[0], texts, prompt)
        rows.append(
            Row(
                case=case,
                export=name,
                layouts=described_layouts(plan),
                bits=(written.packed_real_bits, written.real_bits),
                matrices=len(model.header.matrices),
                exact=exact_matrices(model, decoded(Path(written.file))),
                largest=float((theirs.logits - mine.logits).abs().max()),
                kl=max(0.0, divergence(mine, theirs)),
                greedy=common(mine.greedy, theirs.greedy),
            )
        )
    return rows


def described(rows: list[Row]) -> str:
    """The facts and the table."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("compressed-tensors", "transformers", "safetensors"))
    return f"{packages}; {machine()}; commit {commit()}.\n\n" + markdown(HEAD, [row.cells() for row in rows])


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for, each packed model once."""
    cases = {(case.model, case.format): case for case in trained_cases(options.real_data)}
    for index, wanted in enumerate((options.models, options.formats)):
        if wanted is not None:
            cases = {key: case for key, case in cases.items() if key[index] in wanted.split(",")}
    if not cases:
        raise usage_error("There is no such model in such a format.")
    return list(cases.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated; default: all that are there")
    parser.add_argument("--formats", help=f"comma-separated, of {', '.join(FORMATS)}; default: all")
    parser.add_argument("--real-data", type=Path, help="folder with `models` and `text` of real teachers")
    parser.add_argument("--build", type=Path, default=BUILD / "interop", help="folder of packed models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="where the table goes; default: nowhere, or interop.md for all")
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    try:
        for case in chosen(options):
            console.say(f"{case.model}, {case.format}")
            rows += measure(case, Setting(options.build, Path(), options.threads, console), EXPORTS)
    except UserError as error:
        console.error(error)
        return error.code
    console.out.print(rich_table("Folders and ours", HEAD, [row.cells() for row in rows]))
    whole = options.models is None and options.formats is None
    if results := options.results or (RESULTS / "interop.md" if whole else None):
        publish("interop-folders", described(rows), results)
    failures = [line for row in rows for line in row.failures()]
    for line in failures:
        console.error(UserError(line))
    return QUALITY if failures else 0


if __name__ == "__main__":
    sys.exit(main())
