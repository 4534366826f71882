"""Whether the native engine computes what transformers computes, on packed models as they are used.

    make results-engines                  the table in recipes/results/engines.md, for the student of `make quickstart`
    python -m recipes.benchmarks.engines FOLDER... --results none
    make results-gemma                    of the real Gemma-3-270M, with 16 and with 8 bits of activations and cache

Both engines take the same packed folder, with its own 8-bit activations and cache, and go on from the beginnings of
held-out texts. Whatever differs in the last bit of a float32 becomes a step of 8 bits now and then, so each engine is
also compared with itself in another order: the beginning token by token, then the whole text anew for every token. And
transformers is compared with itself where what its norms give is changed by one part in ten million, which is about
what rounding to float32 changes: a difference of the engines that is no larger than that one is no fault of either.

Bounds: with activations and cache of 16 bits logits 1e-4 and KL 1e-9; with fewer bits a KL of 1e-3, or one and a half
times of what parts transformers from itself, where that is more. Exit code 3 where they are broken.

*Logits*: the largest relative L2 distance at any position of a beginning, ||a - b|| / ||b||. *KL*: the mean of
KL(b || a) over positions, in nats. *Same text*: how many of the texts are the same, token by token, when both continue
by their own most probable tokens; *apart by*: the most that the logits of the two tokens at which texts part differ by.
Tiny random models of every family are compared in tests/runtime/test_runtime.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgerazor import runtime
from edgerazor.console import Console
from edgerazor.console import table as rich_table
from edgerazor.errors import QUALITY, UserError, usage_error
from edgerazor.packed import PackedModel
from edgerazor.runtime.transformers_model import TransformersModel
from edgerazor.workdir import machine
from recipes.benchmarks.folders import RESULTS, WORLD
from recipes.benchmarks.results import commit, markdown, packages, publish

HEAD = ("model", "a", "b", "logits, at most", "KL, mean", "same text", "apart by, at most")
#: Words of a held-out text that are gone on from.
BEGINNING = 12
#: Of logits and of KL, where activations and cache have 16 bits; of KL, where they have fewer, and how much further the
#: engines may be from each other than transformers is from itself.
EXACT_LOGITS, EXACT_KL, ROUNDED_KL, FURTHER = 1e-4, 1e-9, 1e-3, 1.5
#: Standard deviation of the relative noise behind norms: 2^-24, the largest error of rounding to float32, is 0.6e-7.
NOISE = 1e-7


@dataclass
class Result:
    """Of one beginning: its logits float32 [T, V], and the tokens behind it."""

    logits: Tensor
    text: list[int]


@dataclass
class Agreement:
    """Of two ways to compute the same, a and b, over some texts."""

    furthest: float = 0.0
    kl: float = 0.0
    positions: int = 0
    texts: int = 0
    same: int = 0
    apart: float = 0.0

    def row(self) -> list[str]:
        """The last cells under `HEAD`."""
        apart = f"{self.apart:.4f}" if self.same < self.texts else ""
        return [f"{self.furthest:.1e}", f"{self.kl / self.positions:.1e}", f"{self.same}/{self.texts}", apart]

    def add(self, a: Result, b: Result, model: runtime.Model, prompt: list[int]) -> None:
        """What came of a beginning, and the model that says how far apart two tokens are."""
        distances = (a.logits - b.logits).norm(dim=-1) / b.logits.norm(dim=-1)
        self.furthest = max(self.furthest, float(distances.max()))
        of_a, of_b = (output.logits.double().log_softmax(-1) for output in (a, b))
        self.kl += float((of_b.exp() * (of_b - of_a)).sum())
        self.positions += len(a.logits)
        self.texts += 1
        self.same += a.text == b.text
        if a.text != b.text:
            at = next(i for i, (one, other) in enumerate(zip(a.text, b.text, strict=True)) if one != other)
            logits = model.logits(prompt + b.text[:at], last=1)[0]
            self.apart = max(self.apart, abs(float(logits[a.text[at]] - logits[b.text[at]])))


def generated(model: runtime.Model, prompt: list[int], tokens: int) -> Result:
    """As it is done: the beginning at once, then token after token with the cache."""
    session = model.session()
    session.feed(prompt)
    return Result(model.logits(prompt), session.greedy(tokens))


def in_other_order(model: runtime.Model, prompt: list[int], tokens: int) -> Result:
    """The beginning token by token, and all anew for every token behind it."""
    session = model.session()
    logits = torch.stack([session.feed([token]) for token in prompt])
    text: list[int] = []
    for _ in range(tokens):
        text.append(int(model.logits(prompt + text, last=1)[0].argmax()))
    return Result(logits, text)


def with_noise(model: TransformersModel, prompt: list[int], tokens: int) -> Result:
    """As `generated`, with noise behind every norm."""
    draw = torch.Generator().manual_seed(0)
    hooks = [
        module.register_forward_hook(lambda _, inputs, out: out * (1 + NOISE * torch.randn(out.shape, generator=draw)))
        for module in model.model.modules()
        if type(module).__name__.endswith("Norm")
    ]
    try:
        return generated(model, prompt, tokens)
    finally:
        for hook in hooks:
            hook.remove()


def failure(folder: Path, engines: Agreement, itself: list[Agreement]) -> str | None:
    """The bound that is broken, if one is; `itself` is transformers beside transformers."""
    settings = PackedModel.open(folder).header.settings
    kl, of_itself = engines.kl / engines.positions, max(one.kl / one.positions for one in itself)
    if settings["activation_bits"] == settings["kv_bits"] == 16:
        if engines.furthest <= EXACT_LOGITS and kl <= EXACT_KL:
            return None
        return f"{folder}: logits are {engines.furthest:.1e} apart, at KL {kl:.1e}, with activations of 16 bits"
    if kl <= max(ROUNDED_KL, FURTHER * of_itself):
        return None
    return f"{folder}: KL {kl:.1e} between the engines, where transformers is {of_itself:.1e} from itself"


def compare(folder: Path, beginnings: list[str], tokens: int, threads: int) -> tuple[list[list[str]], str | None]:
    """Rows under `HEAD`, and what is not as it must be."""
    native, transformers = (runtime.load(folder, threads=threads, engine=engine) for engine in runtime.ENGINES)
    engines, native_itself, transformers_itself, noisy = Agreement(), Agreement(), Agreement(), Agreement()
    assert isinstance(transformers, TransformersModel)
    for beginning in beginnings:
        prompt = native.tokenizer(beginning).input_ids
        ours, theirs = (generated(model, prompt, tokens) for model in (native, transformers))
        engines.add(ours, theirs, transformers, prompt)
        native_itself.add(in_other_order(native, prompt, tokens), ours, native, prompt)
        transformers_itself.add(in_other_order(transformers, prompt, tokens), theirs, transformers, prompt)
        noisy.add(with_noise(transformers, prompt, tokens), theirs, transformers, prompt)
    rows = [
        [str(folder), "native", "transformers", *engines.row()],
        ["", "native, other order", "native", *native_itself.row()],
        ["", "transformers, other order", "transformers", *transformers_itself.row()],
        ["", "transformers, noise of 1e-7", "transformers", *noisy.row()],
    ]
    return rows, failure(folder, engines, [transformers_itself, noisy])


def beginnings(file: Path, count: int, length: int) -> list[str]:
    """The first words of a text's lines that are longer, spread over the whole text."""
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("<")]
    texts = [" ".join(words[:length]) for words in lines if len(words) > length]
    return texts[:: max(1, len(texts) // count)][:count]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="packed models")
    parser.add_argument("--text", type=Path, default=WORLD / "heldout.txt", help="that is gone on from")
    parser.add_argument("--texts", type=int, default=30)
    parser.add_argument("--words", type=int, default=BEGINNING, help="of a beginning; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="of a continuation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mark", default="engines", help="of the table's place in the page")
    parser.add_argument("--results", default=str(RESULTS / "engines.md"), help="where the table goes, or `none`")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    rows: list[list[str]] = []
    failures: list[str] = []
    try:
        texts = beginnings(options.text, options.texts, options.words)
        if not texts:
            raise usage_error(f"{options.text} has no line of more than {options.words} words.")
        for folder in options.folders:
            more, failed = compare(folder, texts, options.tokens, options.threads)
            rows += more
            failures += [failed] if failed else []
    except OSError as error:
        console.error(usage_error(f"{options.text} cannot be read: {error.strerror}."))
        return 2
    except UserError as error:
        console.error(error)
        return error.code
    what = f"{len(texts)} texts of {options.words} words and {options.tokens} tokens behind each"
    console.out.print(rich_table(what, list(HEAD), rows))
    if options.results != "none":
        facts = f"{what}; {machine()}; {packages()}; commit {commit()}."
        publish(options.mark, f"{facts}\n\n{markdown(HEAD, rows)}", Path(options.results))
    for line in failures:
        console.error(UserError(line))
    return QUALITY if failures else 0


if __name__ == "__main__":
    sys.exit(main())
