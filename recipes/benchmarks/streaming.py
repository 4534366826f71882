"""A teacher larger than the address space of the program that learns from it.

    python -m recipes.benchmarks.streaming                      4 GB on disk, inside 3 GB
    python -m recipes.benchmarks.streaming --gigabytes 1 --limit 1.4

The embedded teacher of `recipes/world` learns from a random Llama of the same tokenizer, whose layers are read from
disk in every step (`distill.teacher_source: streamed`). The limit is on the address space (`RLIMIT_AS`): libraries,
Python and all that is mapped count. The same command with the teacher in memory is run beside it, to be refused.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from recipes.benchmarks.folders import BUILD, WORLD
from recipes.benchmarks.results import commit

#: Of the random teacher, but for its layers and its vocabulary.
SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


def write_teacher(folder: Path, gigabytes: float) -> int:
    """Write a random Llama in bfloat16, a file for each layer, and its tokenizer; returns its bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(WORLD / "teacher", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    own = json.loads((folder / "config.json").read_text())
    hidden, wide, heads = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    layer = {
        "self_attn.q_proj": (SHAPE["num_attention_heads"] * heads, hidden),
        "self_attn.k_proj": (SHAPE["num_key_value_heads"] * heads, hidden),
        "self_attn.v_proj": (SHAPE["num_key_value_heads"] * heads, hidden),
        "self_attn.o_proj": (hidden, SHAPE["num_attention_heads"] * heads),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    layer_bytes = 2 * sum(rows * columns for rows, columns in layer.values())
    count = max(2, round(gigabytes * 1e9 / layer_bytes))
    same = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = {name: own[name] for name in same if name in own}
    config |= SHAPE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": count}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "tie_word_embeddings": True}))
    index: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape) * 0.02).to(torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    write(
        "rest.safetensors", {"model.embed_tokens.weight": (own["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    )
    for number in range(count):
        names = {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        names |= {f"model.layers.{number}.{name}.weight": (hidden,) for name in norms}
        write(f"layer-{number:03d}.safetensors", names)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def distill(work: Path, teacher: Path, source: str, limit: int, steps: int) -> tuple[int, float, str]:
    """Exit code, seconds and what was said of a training within a limit."""
    words = [
        "distill",
        str(WORLD / "teacher"),
        "--work",
        str(work),
        "--data",
        str(WORLD / "heldout.txt"),
        "--bits",
        "2",
    ]
    words += ["--plan", "interleave", "--steps", str(steps), "--batch-size", "2", "--accumulation", "4"]
    words += ["--sequence-length", "64", "--teacher", str(teacher), "--teacher-source", source]
    recipe = work.parent / "recipe.yaml"
    recipe.write_text("distill: {losses: [{name: forward_kl}], evaluate_sequences: 8, precision: float32}\n")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "edgerazor", *words, "--recipe", str(recipe)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, time.monotonic() - began, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the teacher on disk")
    parser.add_argument("--limit", type=float, default=3.0, help="address space in gigabytes")
    parser.add_argument("--steps", type=int, default=3, help="of the training")
    parser.add_argument("--build", type=Path, default=BUILD / "streaming", help="folder of the teacher and the jobs")
    options = parser.parse_args()
    teacher, limit = options.build / "teacher", int(options.limit * 1e9)
    size = write_teacher(teacher, options.gigabytes)
    print(f"commit {commit()}; the teacher has {size / 1e9:.2f} GB on disk, the limit is {limit / 1e9:.2f} GB")
    for source in ("streamed", "resident"):
        work = options.build / source
        shutil.rmtree(work, ignore_errors=True)
        code, seconds, said = distill(work, teacher, source, limit, options.steps)
        last = " ".join(said.strip().splitlines()[-2:])
        print(f"{source}: exit code {code} after {seconds:.0f} s; {last}", flush=True)
        if code == 0:
            print((work / "distill" / "metrics.jsonl").read_text().strip())
    shutil.rmtree(options.build)


if __name__ == "__main__":
    main()
