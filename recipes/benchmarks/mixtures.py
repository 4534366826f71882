"""A mixture of experts through the whole chain: 8 of 64 experts in two layers of a random OLMoE.

    python -m recipes.benchmarks.mixtures [--hidden N] [--steps N] [--results none]
    python -m recipes.benchmarks.mixtures --touched      which bytes a token touches, at OLMoE-1B-7B's shapes; 5 GB

The random teacher, whose routers are spread and one of whose experts is never chosen, has the tokenizer of the embedded
one and is calibrated, distilled, packed, written as GGUF and benchmarked by the commands that everybody uses. What came
of it goes into recipes/results/mixers.md.

Bytes that are touched are counted by the processor: the packed file is mapped, the marks of its pages (4 KB, Linux's
`Referenced`) are wiped, one token is decoded, and the marked pages are counted. What a token reads beside experts lies
in the same file and is known to the byte (attention and the head whole, a row of the embedding), so that the rest is
what was read of experts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgerazor import kernels, runtime
from edgerazor.packed import PackedModel
from edgerazor.runtime.chosen_experts import IN_EXPERT, packed_sizes
from edgerazor.workdir import machine
from recipes.benchmarks.folders import BUILD, RESULTS, WORLD
from recipes.benchmarks.results import commit, markdown, publish

EXPERTS, CHOSEN = 64, 8
#: An expert of both layers that no token is routed to.
NEVER = 17


def write_teacher(folder: Path, hidden: int, head: int = 64, vocabulary: int | None = None) -> int:
    """Write a random OLMoE in bfloat16 and its tokenizer; returns its weights.

    Args:
        folder: where it goes.
        hidden: features; an expert has half as many between.
        head: features of a head.
        vocabulary: rows of the embedding; as many as the tokenizer needs when absent.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(WORLD / "teacher", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    own = json.loads((folder / "config.json").read_text())
    same = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = CONFIG_MAPPING["olmoe"](
        **{name: own[name] for name in same} | ({} if vocabulary is None else {"vocab_size": vocabulary}),
        **{"hidden_size": hidden, "intermediate_size": hidden // 2, "num_hidden_layers": 2},
        **{"num_attention_heads": hidden // head, "num_key_value_heads": hidden // head},
        **{"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "initializer_range": 0.06},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.copy_(torch.randn_like(parameter) * 4 * hidden**-0.5)
                parameter[NEVER] = 0  # about half of the others always have a larger score
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def run(work: Path, recipe: Path, command: str, *words: str) -> tuple[float, str]:
    """Seconds of a command, and what it said; exits where it fails."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "edgerazor", command, "--recipe", str(recipe), "--work", str(work), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{command} failed: {done.stderr[-2000:]}")
    return time.monotonic() - began, done.stderr


def facts_of(work: Path, seconds: dict[str, float]) -> list[list[str]]:
    """What the stages left, as rows of a table."""
    counts = load_file(work / "calibrate" / "stats.safetensors")
    tokens = [tensor for name, tensor in sorted(counts.items()) if name.startswith("expert_tokens/")]
    losses = [json.loads(line) for line in (work / "distill" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in losses if "kl" in line]
    steps = f"{evaluations[0]['step']} and {evaluations[-1]['step']} steps"
    packed = PackedModel.open(work / "packed")
    sizes = packed_sizes(packed)
    experts = sum(size for name, size in sizes.items() if IN_EXPERT.fullmatch(name))
    bench = json.loads((work / "bench" / "result.json").read_text())
    ours = next(engine for engine in bench["engines"] if engine["name"] == "packed")
    rates = {run["engine"]: run["tokens_per_second"] for run in bench["runs"] if run["phase"] == "decode"}
    gguf = next((work / "packed").parent.glob("exports/gguf/*.gguf"))
    spread = [f"{int(of_layer.min())} to {int(of_layer.max())}" for of_layer in tokens]
    return [
        ["calibrate: tokens of an expert, by layer", ", ".join(spread)],
        [f"distill: KL to the teacher after {steps}", f"{evaluations[0]['kl']:.4f}, {evaluations[-1]['kl']:.4f}"],
        ["pack: MB, of which experts", f"{sum(sizes.values()) / 1e6:.2f}, {experts / 1e6:.2f}"],
        ["GGUF: MB", f"{gguf.stat().st_size / 1e6:.2f}"],
        ["bench: kernel", ours["kernel"]],
        ["bench: MB a token reads", f"{ours['bytes_per_token'] / 1e6:.2f}"],
        ["of these the chosen experts'", f"{experts * CHOSEN / EXPERTS / 1e6:.2f}"],
        ["bench: decode, tokens/s, and the teacher in bfloat16", f"{rates['packed']:.0f}, {rates['teacher']:.0f}"],
        ["seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())],
    ]


# What a token touches -------------------------------------------------------------------------------------------------

#: Of OLMoE-1B-7B, with two of its 16 layers.
REAL = {"hidden": 2048, "head": 128, "vocabulary": 50304}
TOKENS = 16


def referenced(file: Path) -> int:
    """Bytes of the pages of a mapped file that were touched since `forget` was called."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = words[-1] == str(file.resolve())
        elif inside and words[0] == "Referenced:":
            total += int(words[1]) * 1024
    return total


def forget() -> None:
    """Wipe the marks of all pages of this process."""
    Path("/proc/self/clear_refs").write_text("1")


def touched_rows(work: Path, format_name: str) -> list[str]:
    """A row of the table: pack the teacher in a format, decode token by token, count."""
    teacher = work.parent / "teacher-of-real-shape"
    if not (teacher / "model.safetensors").exists():
        write_teacher(teacher, **REAL)
    packed = work / "packed"
    if not packed.exists():
        values = {"model": str(teacher), "calibrate": {"bits": BITS[format_name], "plan": "interleave"}}
        recipe = work.parent / f"{work.name}.yaml"
        recipe.write_text(yaml.safe_dump({**values, "pack": {"source": "teacher"}}))
        run(work, recipe, "pack")
    model = runtime.load(packed, threads=1, mmap=True, engine="native")
    sizes = packed_sizes(PackedModel.open(packed))
    of_experts = sum(size for name, size in sizes.items() if IN_EXPERT.fullmatch(name)) * CHOSEN / EXPERTS
    beside = sum(size for name, size in sizes.items() if not IN_EXPERT.fullmatch(name) and "embed_tokens" not in name)
    session = model.session()
    session.feed(list(range(2, 18)))
    session.greedy(1)  # which is chosen by the logits that are there
    counts = []
    for _ in range(TOKENS):
        forget()
        session.greedy(1)
        counts.append(referenced(packed / "model.safetensors"))
    touched = sum(counts) / len(counts)
    return [
        format_name,
        *(f"{size / 1e6:.2f}" for size in (of_experts, touched - beside)),
        f"{(touched - beside) / of_experts:.3f}",
        *(f"{size / 1e6:.2f}" for size in (of_experts + beside, model.bytes_per_token, touched)),
        f"{touched / (of_experts + beside):.3f}",
        f"{sum(sizes.values()) / 1e6:.0f}",
    ]


#: Formats of the matrices beside int4 embeddings -> bits that are asked for.
BITS = {"int4": 4.0, "ternary": 1.58}
TOUCHED_HEAD = (
    *("format", "chosen experts, MB", "touched of experts, MB", "ratio", "read by a token, MB", "`bench` says, MB"),
    *("touched, MB", "ratio", "whole model, MB"),
)


def touched(build: Path) -> str:
    """The table of what tokens touch."""
    text = markdown(TOUCHED_HEAD, [touched_rows(build / f"touched-{name}", name) for name in BITS])
    return (
        f"{text}\n\nA random OLMoE with the shapes of OLMoE-1B-7B: {REAL['hidden']} features, 2 layers, {CHOSEN} of "
        f"{EXPERTS} experts of {REAL['hidden'] // 2}, {REAL['vocabulary']:,} tokens; pages of 4 KB, means of {TOKENS} "
        f"decoded tokens; {machine()}, kernels {kernels.name()}; commit {commit()}."
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="features; an expert has half as many between")
    parser.add_argument("--steps", type=int, default=60, help="of the training")
    parser.add_argument("--build", type=Path, default=BUILD / "mixtures", help="folder of the teacher and the job")
    parser.add_argument("--results", default=str(RESULTS / "mixers.md"), help="where the table goes, or `none`")
    parser.add_argument("--touched", action="store_true", help="only what tokens touch, at real shapes")
    options = parser.parse_args()
    if options.touched:
        options.build.mkdir(parents=True, exist_ok=True)
        text = touched(options.build)
        print(text)
        if options.results != "none":
            publish("touched", text, Path(options.results))
        return
    weights = write_teacher(options.build / "teacher", options.hidden)
    shutil.rmtree(options.build / "job", ignore_errors=True)
    recipe = options.build / "recipe.yaml"
    values: dict[str, Any] = {
        "model": str(options.build / "teacher"),
        "data": {"train": [{"file": str(WORLD / "heldout.txt")}], "sequence_length": 64},
        "calibrate": {
            **{"bits": 2.4, "plan": "sensitivity", "sensitivity": "fisher", "sensitivity_tokens": 8192},
            # Few tokens go to each of so many experts, whose weights are read for all that pass together.
            **{"group_size": 64, "activation_bits": 8, "batch_size": 16},
        },
        "distill": {
            **{"steps": options.steps, "batch_size": 8, "learning_rate": 5e-4, "precision": "float32"},
            **{"evaluate_every": 5, "evaluate_sequences": 16},
            "losses": [
                {"name": "forward_kl", "weight": 20},
                {"name": "router_balance", "weight": 0.01},
                {"name": "router_z", "weight": 0.001},
                {"name": "router_kl", "weight": 1},
            ],
        },
        "bench": {"rounds": 3},
    }
    recipe.write_text(yaml.safe_dump(values))
    seconds: dict[str, float] = {}
    for command in ("calibrate", "distill", "pack", "bench"):
        words = ("--export", "gguf", "--allow-lossy") if command == "pack" else ()
        seconds[command], said = run(options.build / "job", recipe, command, *words)
        print(f"{command}: {seconds[command]:.0f} s", said[-600:], sep="\n", flush=True)
    text = markdown(("what", "figure"), facts_of(options.build / "job", seconds))
    text += (
        f"\n\nA random OLMoE of {options.hidden} features, 2 layers, {CHOSEN} of {EXPERTS} experts, "
        f"{weights / 1e6:.0f} M weights; 2.4 bits by sensitivity, {options.steps} steps; "
        f"{machine()}; commit {commit()}."
    )
    print(text)
    if options.results != "none":
        publish("mixtures", text, Path(options.results))


if __name__ == "__main__":
    main()
