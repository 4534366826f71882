"""Train the embedded teacher from nothing: tokenizer, then a small Llama, on the world of corpus.py.

    python recipes/world/train_teacher.py

Writes recipes/world/teacher/ (config, tokenizer, bf16 safetensors) and its record training.json: tokens,
seconds, machine, versions, loss curve, accuracy on the held-out tasks. Saves its state every --save-every
steps into recipes/world/teacher.state/ and goes on from there when started again.

Training has three phases (PHASES). A high learning rate and little weight decay first: attention finds what to look
at. Then strong weight decay: it clears away the noise that small batches leave in the weights, and facts about people
are learned several times faster. Last an L1 penalty (a soft threshold after each step), which takes away the weights
that carry nothing. Without it a network as small as this one has so much slack that rounding to 1.58 bits loses next
to nothing (recipes/results/world.md has figures), unlike in large models, which use their weights up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import HERE, TASKS, documents, items

CONTEXT = 256
VOCABULARY = 2048
#: (millions of tokens after which it ends, learning rate as a share of the peak, weight decay, L1 penalty)
PHASES = ((4.5, 1.0, 0.1, 0.0), (7.2, 0.5, 2.0, 0.0), (11.3, 0.25, 2.0, 0.0), (14.6, 0.25, 0.3, 0.03))
WARMUP, COOLDOWN = 0.2, 1.6  # millions of tokens in which the learning rate rises, and at the end falls to zero
MOMENTS = ("exp_avg", "exp_avg_sq")
TOKENIZER_DOCUMENTS = 40_000
# Documents per block of work, so that a resumed run finds its place in the corpus.
BLOCK = 1_000


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the teacher's folder, made once."""
    folder = HERE / "teacher"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text() for d in documents("train", TOKENIZER_DOCUMENTS)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=2 * CONTEXT,
    )


def config() -> LlamaConfig:
    """Every dimension a multiple of 256, so that every group size and GGUF block fits."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2 * CONTEXT,
        initializer_range=0.06,  # about 1 / sqrt(hidden)
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def batches(tokenizer: PreTrainedTokenizerFast, rows: int, skip: int) -> Iterator[torch.Tensor]:
    """Packed batches of token ids, int64 [rows, CONTEXT + 1], the first `skip` passed over."""
    size = rows * (CONTEXT + 1)
    buffer: list[int] = []
    for block in count():
        texts = [document.text() for document in documents("train", BLOCK, block * BLOCK)]
        for ids in tokenizer(texts)["input_ids"]:
            buffer += [*ids, tokenizer.eos_token_id]
        while len(buffer) >= size:
            batch, buffer = buffer[:size], buffer[size:]
            if skip > 0:
                skip -= 1
            else:
                yield torch.tensor(batch).view(rows, CONTEXT + 1)


def schedule(tokens: int, peak: float) -> tuple[float, float, float]:
    """Learning rate, weight decay and L1 penalty after some tokens."""
    millions = tokens / 1e6
    rate, decay, penalty = next(values for end, *values in PHASES if millions < end)
    return peak * rate * min(1.0, millions / WARMUP, (PHASES[-1][0] - millions) / COOLDOWN), decay, penalty


@torch.no_grad()
def shrink(matrices: list[torch.Tensor], threshold: float) -> None:
    """Move every weight towards zero by `threshold`, and no further: the proximal step of an L1 penalty."""
    torch._foreach_sub_(matrices, [matrix.clamp(-threshold, threshold) for matrix in matrices])


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, limit: int) -> dict[str, float]:
    """Share of held-out items whose right one-token answer is the likeliest of its choices."""
    model.eval()
    result = {}
    for task in TASKS:
        rows = items(task, limit)
        texts = [row["prompt"] for row in rows]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        last = batch["attention_mask"].sum(1) - 1
        hidden = model.model(**batch).last_hidden_state[torch.arange(len(rows)), last]
        logits = model.lm_head(hidden)
        right = 0
        for row, scores in zip(rows, logits, strict=True):
            ids = [tokenizer(" " + c, add_special_tokens=False)["input_ids"][0] for c in row["choices"]]
            right += int(scores[ids].argmax()) == row["gold"]
        result[task] = right / limit
    model.train()
    return result


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.0}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


class State:
    """Weights, optimizer moments, curve and clock on disk, replaced as one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, record: dict) -> None:
        new = self.folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        tensors = {}
        for name, parameter in model.named_parameters():
            tensors[name] = parameter.detach()
            tensors |= {f"{key}:{name}": optimizer.state[parameter][key] for key in MOMENTS}
        save_file(tensors, new / "state.safetensors")
        (new / "record.json").write_text(json.dumps(record))
        shutil.rmtree(self.folder, ignore_errors=True)
        new.rename(self.folder)

    def load(self, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> dict | None:
        if not self.folder.exists():
            return None
        record = json.loads((self.folder / "record.json").read_text())
        tensors = load_file(self.folder / "state.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])
                moments = {key: tensors[f"{key}:{name}"].clone() for key in MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(record["step"])), **moments}
        return record


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = LlamaForCausalLM(config())
    optimizer = optimizer_for(model)
    state = State(HERE / "teacher.state")
    record = state.load(model, optimizer) or {"step": 0, "seconds": 0.0, "curve": []}
    tokens_per_step = arguments.rows * CONTEXT
    steps = int(PHASES[-1][0] * 1e6 / tokens_per_step)
    model.to(arguments.device)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(arguments.device, torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    compiled = torch.compile(loss_of, dynamic=False) if arguments.compile else loss_of
    began, recent, latest = time.monotonic() - record["seconds"], [], time.monotonic()
    stream = batches(tokenizer, arguments.rows, record["step"])
    inner = [layer.weight for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    for step in range(record["step"], steps):
        rate, optimizer.param_groups[0]["weight_decay"], penalty = schedule((step + 1) * tokens_per_step, arguments.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = compiled(next(stream).to(arguments.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if penalty:
            shrink(inner, rate * penalty)
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        done = step + 1
        if done % 500 == 0:
            record.update(step=done, seconds=round(time.monotonic() - began, 1))
            record["curve"].append([done * tokens_per_step, round(sum(recent) / len(recent), 4)])
            rate = 500 * tokens_per_step / (time.monotonic() - latest)
            print(f"step {done}/{steps} loss {record['curve'][-1][1]:.4f} {rate:.0f} tok/s", flush=True)
            recent, latest = [], time.monotonic()
        if done % arguments.save_every == 0 or done == steps:
            print("accuracy", accuracy(model, tokenizer, 200), flush=True)
            state.save(model, optimizer, record)
            latest = time.monotonic()
    finish(model.cpu().float(), tokenizer, record, steps * tokens_per_step, arguments)


def finish(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    record: dict,
    tokens: int,
    arguments: argparse.Namespace,
) -> None:
    model = model.to(torch.bfloat16)
    folder = HERE / "teacher"
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    summary = {
        "tokens": tokens,
        "seconds": record["seconds"],
        "batch_tokens": arguments.rows * CONTEXT,
        "learning_rate": arguments.lr,
        "device": arguments.device if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "heldout_accuracy": accuracy(model.float(), tokenizer, 1000),
        "curve": [[tokens, loss] for tokens, loss in record["curve"][:: max(1, len(record["curve"]) // 50)]],
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary["heldout_accuracy"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4, help="sequences of 256 tokens in a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--save-every", type=int, default=2000, help="steps between saved states")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
