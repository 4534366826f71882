"""Whether every family computes in the native engine what transformers computes: random models with real head shapes.

    python -m recipes.benchmarks.families [--models NAME,NAME] [--results none]

Each family, tied and untied, has two to six layers, heads as wide as those of its published models, and the tokenizer
of the embedded teacher. It is packed twice, to int4: with 16-bit activations, keys and values, where the engines may
differ by the order of sums alone, and with 8 bits, where a number between two codes may go either way. Both engines get
the same held-out tokens.

    logits       distance of the logits in units of their length, 16 bits; bound 1e-4
    KL           mean, in nats; bounds 1e-9 at 16 bits (the distance squared and no more), 1e-3 at 8 bits
    greedy       tokens of 32 that are the same in both engines, 16 bits
    pieces       a prompt in pieces of several lengths, beside the whole: largest distance; bound 1e-5
    one by one   the same token by token
    prefix       log-probabilities of continuations that share a computed prefix, beside those of whole texts; 1e-4
    rewound      logits behind states that were saved and gone back to, beside those of a text that never was ahead

Exit code 3 when a bound is broken. The table goes into recipes/results/mixers.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from edgerazor import pipeline, runtime
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.errors import QUALITY, UserError
from edgerazor.kernels import name as kernel_name
from edgerazor.recipe import Recipe
from edgerazor.workdir import WorkDir, machine
from recipes.benchmarks import interop
from recipes.benchmarks.folders import BUILD, RESULTS, WORLD
from recipes.benchmarks.methods import Values, world
from recipes.benchmarks.results import commit, markdown, publish

PAGE = RESULTS / "mixers.md"
ROW, ROWS, GREEDY = 96, 2, 32
PIECES = ((0, 1), (1, 34), (34, 35), (35, 80), (80, 96))
BOUNDS = {"logits": 1e-4, "kl": 1e-9, "kl_8": 1e-3, "pieces": 1e-5, "one_by_one": 1e-5, "prefix": 1e-4, "rewound": 1e-5}
#: Heads of Gemma are 256 wide, of LFM 64 or 128, of Qwen 3.5 256 with states of 128 x 128, of Granite 4 64 with states
#: of 32 x 128.
WIDE: Values = {"head_dim": 256, "num_key_value_heads": 1}
BROAD: Values = {"head_dim": 128}
SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
DELTA: Values = {
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 128},
    **{"linear_value_head_dim": 128, "head_dim": 256, "num_key_value_heads": 1},
    "rope_parameters": {**interop.PLAIN, "partial_rotary_factor": 0.25},
}
MAMBA: Values = {**interop.GRANITE4, "mamba_d_state": 128}
EXPERTS: Values = {"num_local_experts": 8, "num_experts_per_tok": 2}
LFM3: Values = {
    **{"layer_types": ["conv", "conv", "full_attention", "conv", "sliding_attention"], "num_hidden_layers": 5},
    **{"sliding_window": 48, **BROAD},
}
#: name -> model type of transformers, and what is special about it beyond `interop.SHAPE`.
FAMILIES: dict[str, tuple[str, Values]] = {
    "gemma3": ("gemma3_text", {**WIDE, "sliding_window": 48, "layer_types": SLIDING}),
    "gemma4": ("gemma4_text", {**interop.GEMMA4, **WIDE, "global_head_dim": 512}),
    "phi3": ("phi3", {"hidden_size": 384, "head_dim": 96}),
    "phi4": ("phi3", {"hidden_size": 512, **BROAD, "partial_rotary_factor": 0.75}),
    "granite": ("granite", interop.GRANITE),
    "granite4-hybrid": ("granitemoehybrid", MAMBA),
    "granite4-hybrid-experts": ("granitemoehybrid", {**MAMBA, **EXPERTS}),
    "hunyuan": ("hunyuan_v1_dense", BROAD),
    "olmo3": ("olmo3", {**BROAD, "sliding_window": 48, "layer_types": SLIDING}),
    "exaone4": ("exaone4", {**BROAD, "sliding_window": 48, "layer_types": SLIDING}),
    "ministral3": ("ministral3", {**interop.FAMILIES["ministral3"][1], **BROAD}),
    "lfm2": ("lfm2", interop.LFM2),
    "lfm3": ("lfm3", LFM3),
    "qwen3.5": ("qwen3_5_text", DELTA),
    "granitemoe": interop.FAMILIES["granitemoe"],
    "olmoe": ("olmoe", {**interop.FAMILIES["olmoe"][1], "hidden_size": 512, **BROAD}),
    "qwen3-moe": interop.FAMILIES["qwen3-moe"],
    "lfm2-moe": interop.FAMILIES["lfm2-moe"],
}


@dataclass(frozen=True)
class Row:
    """What was found of a model; distances as in the table, and how many of its greedy tokens are the other's."""

    logits: float
    kl: float
    kl_8: float
    greedy: int
    pieces: float
    one_by_one: float
    prefix: float
    rewound: float

    def broken(self) -> list[str]:
        """Names of the columns that break their bounds."""
        return [name for name, bound in BOUNDS.items() if not getattr(self, name) <= bound]


def packed(build: Path, name: str, folder: Path, bits: int) -> Path:
    """A model packed to int4 with so many bits of activations, keys and values."""
    calibrate = {"bits": 4.0, "plan": "interleave", "activation_bits": bits, "kv_bits": bits}
    recipe: Recipe = recipes.build({"model": str(folder), "calibrate": calibrate, "pack": {"source": "teacher"}})
    work = WorkDir(build / name / f"{bits}-bits")
    pipeline.run("pack", recipe, work, Console(quiet=True))
    return work.folder("pack")


def distance(one: Tensor, other: Tensor) -> float:
    """In units of the second one's length."""
    return float((one - other).norm() / other.norm())


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL of our distributions from the others, in nats."""
    first, second = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def measure(build: Path, name: str, folder: Path, ids: Tensor) -> Row:
    """Both engines on the same tokens [ROWS, ROW]."""
    place = packed(build, name, folder, 16)
    ours, theirs = (runtime.load(place, threads=1, engine=engine) for engine in ("native", "transformers"))
    computed, expected = ours.logits(ids), theirs.logits(ids)
    row = ids[0].tolist()
    texts = []
    for model in (ours, theirs):
        session = model.session()
        session.feed(row[:16])
        texts.append(session.greedy(GREEDY))
    pieces, single, ahead = ours.session(), ours.session(), ours.session()
    of_pieces = max(distance(pieces.feed(row[start:end]), computed[0, end - 1]) for start, end in PIECES)
    one_by_one = max(distance(single.feed([token]), computed[0, place]) for place, token in enumerate(row))
    ahead.feed(row[:60])
    ahead.greedy(10)
    rewound = []
    for position in (64, 60, 41, 3):  # within what was written, to its start, and far back
        ahead.rewind(position)
        written = ahead.ids[:position]
        expected_here = ours.logits([*written, *row[90:]], last=1)[-1]
        rewound.append(distance(ahead.feed(row[90:]), expected_here))
        ahead.rewind(position)
        ahead.feed(row[60:90] if position > 41 else row[:50])
    eight = packed(build, name, folder, 8)
    of_eight = [runtime.load(eight, threads=1, engine=engine).logits(ids) for engine in ("native", "transformers")]
    return Row(
        logits=distance(computed, expected),
        kl=divergence(computed, expected),
        kl_8=divergence(*of_eight),
        greedy=interop.common(*texts),
        pieces=of_pieces,
        one_by_one=one_by_one,
        prefix=of_prefixes(ours, row),
        rewound=max(rewound),
    )


def of_prefixes(model: runtime.Model, row: list[int]) -> float:
    """Largest difference of log-probabilities of continuations, a prefix computed once or each text by itself."""
    prefix, continuations = row[:50], [row[50:60], row[70:75], row[:20], row[50:53] + row[:5]]
    [scores] = model.score([(prefix, continuations)])
    apart = []
    for continuation, score in zip(continuations, scores, strict=True):
        chances = model.logits([*prefix, *continuation[:-1]], last=len(continuation)).log_softmax(-1)
        alone = sum(float(chance[token]) for chance, token in zip(chances, continuation, strict=True))
        apart.append(abs(score.log_probability - alone))
    return max(apart)


def cells(name: str, row: Row) -> list[str]:
    """A line of the table."""
    values = [getattr(row, field.name) for field in fields(row)]
    return [name, *(f"{value}/{GREEDY}" if isinstance(value, int) else f"{value:.1e}" for value in values)]


HEAD = ("model", "logits, 16 bits", "KL, 16 bits", "KL, 8 bits", "greedy", "pieces", "one by one", "prefix", "rewound")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated, of the families with `-tied` or `-untied`; default: all")
    parser.add_argument("--build", type=Path, default=BUILD / "families")
    parser.add_argument("--results", default=str(PAGE), help="the page, or `none`")
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "teacher")
    case = interop.Case("", "", recipes.build({"model": "", "data": world().recipe["data"]}))
    [text, *_], _ = interop.text_of(case, tokenizer, 1)
    ids = torch.tensor(text[: ROW * ROWS]).view(ROWS, ROW)
    lines, failures = [], []
    for family, (kind, special) in FAMILIES.items():
        for tied in (False, True):
            name = f"{family}-{'tied' if tied else 'untied'}"
            if options.models and name not in options.models.split(","):
                continue
            console.say(name)
            folder = options.build / "random" / name
            interop.write_random(folder, kind, {**special, "tie_word_embeddings": tied}, WORLD / "teacher")
            row = measure(options.build, name, folder, ids)
            lines.append(cells(name, row))
            failures += [f"{name}: {what} is {getattr(row, what):.1e}" for what in row.broken()]
    text_of_table = markdown(HEAD, lines)
    text_of_table += f"\n\nint4, {ROWS} x {ROW} tokens; {machine()}, kernels {kernel_name()}; commit {commit()}."
    print(text_of_table)
    if options.results != "none" and not options.models:
        publish("families", text_of_table, Path(options.results))
    for failure in failures:
        console.error(UserError(failure))
    return QUALITY if failures else 0


if __name__ == "__main__":
    sys.exit(main())
