"""Whether the native engine computes what transformers computes, on packed models as they are used.

    make results-engines                         the table in recipes/RESULTS.md
    python recipes/engines.py FOLDER... --results none

Both engines take the same packed folder, with its own 8-bit activations and cache, and go on from the beginnings of
held-out texts. *Logits*: the largest relative L2 distance at any position of a beginning, ||a - b|| / ||b||. *KL*: the
mean of KL(transformers || native) over positions, in nats. *Same text*: how many of the texts are the same, token by
token, when each engine continues by its own most probable tokens; where one is not, how far apart the two tokens'
logits are at which the first of them parts. Tiny random models of every family are compared in tests/test_runtime.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from interop import publish
from methods import HERE, commit
from torch import Tensor

from edgerazor import runtime
from edgerazor.console import Console
from edgerazor.console import table as rich_table
from edgerazor.errors import UserError
from edgerazor.workdir import machine, versions

HEAD = ("model", "layers", "logits, at most", "KL, mean", "same text", "apart by")
#: Words of a held-out text that both go on from.
BEGINNING = 12


@dataclass
class Agreement:
    """Of two engines over some texts."""

    furthest: float = 0.0
    kl: float = 0.0
    positions: int = 0
    texts: int = 0
    same: int = 0
    apart: float | None = None

    def row(self) -> list[str]:
        """The cells under `HEAD` behind the model's own."""
        apart = "" if self.apart is None else f"{self.apart:.4f}"
        return [f"{self.furthest:.1e}", f"{self.kl / self.positions:.1e}", f"{self.same}/{self.texts}", apart]

    def add_logits(self, ours: Tensor, theirs: Tensor) -> None:
        """Of one beginning, float32 [T, V]."""
        distances = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        self.furthest = max(self.furthest, float(distances.max()))
        a, b = (each.double().log_softmax(-1) for each in (theirs, ours))
        self.kl += float((a.exp() * (a - b)).sum())
        self.positions += len(ours)

    def add_texts(self, ours: list[int], theirs: list[int], model: runtime.Model, prompt: list[int]) -> None:
        """Continuations of one beginning, and the model that looks closer where they part."""
        self.texts += 1
        self.same += ours == theirs
        if ours != theirs and self.apart is None:
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            logits = model.logits(prompt + theirs[:at], last=1)[0]
            self.apart = abs(float(logits[ours[at]] - logits[theirs[at]]))


def agreement(folder: Path, beginnings: list[str], tokens: int, threads: int) -> tuple[list[str], Agreement]:
    """The model's folder and layers, and how far its two engines agree."""
    ours, theirs = (runtime.load(folder, threads=threads, engine=engine) for engine in runtime.ENGINES)
    found = Agreement()
    for beginning in beginnings:
        prompt = ours.tokenizer(beginning).input_ids
        found.add_logits(ours.logits(prompt), theirs.logits(prompt))
        texts = []
        for model in (ours, theirs):
            session = model.session()
            session.feed(prompt)
            texts.append(session.greedy(tokens))
        found.add_texts(*texts, theirs, prompt)
    return [str(folder), str(ours.config.num_hidden_layers)], found


def beginnings(count: int) -> list[str]:
    """The first words of held-out texts of the embedded world."""
    text = (HERE / "world" / "heldout.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if not line.startswith("<|")]
    return [" ".join(words[:BEGINNING]) for words in lines if len(words) > BEGINNING][:count]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="packed models")
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64, help="of a continuation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", default=str(HERE / "RESULTS.md"), help="where the table goes, or `none`")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    asked = parse(arguments)
    console = Console()
    texts = beginnings(asked.texts)
    rows = []
    try:
        for folder in asked.folders:
            name, found = agreement(folder, texts, asked.tokens, asked.threads)
            rows.append([*name, *found.row()])
    except UserError as error:
        console.error(error)
        return error.code
    what = f"{len(texts)} texts, {asked.tokens} tokens each"
    console.out.print(rich_table(what, list(HEAD), rows))
    if asked.results != "none":
        lines = [list(HEAD), ["---"] * len(HEAD), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        known = ", ".join(f"{name} {version}" for name, version in versions().items())
        publish("engines", f"{what}; {machine()}; {known}; commit {commit()}.\n\n{text}", Path(asked.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
