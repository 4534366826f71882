"""Train the embedded teacher from nothing: tokenizer, then a small Llama, on the world of corpus.py.

    python recipes/world/train_teacher.py --tokens 40000000

Writes recipes/world/teacher/ (config, tokenizer, bf16 safetensors) and its record training.json: tokens,
seconds, machine, versions, loss curve, accuracy on the held-out tasks. Saves its state every --save-every
steps into recipes/world/teacher.state/ and goes on from there when started again.

The schedule is linear warm-up, constant, and linear decay to zero over the last quarter of the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import HERE, TASKS, documents, items

CONTEXT = 256
VOCABULARY = 1536
ANSWER_WEIGHT = 3.0
SHORT_SHARE = 0.8
SHORT = 96
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
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=2 * CONTEXT,
        initializer_range=0.06,  # about 1 / sqrt(hidden)
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def batches(tokenizer: PreTrainedTokenizerFast, rows: int, steps: int, skip: int) -> Iterator[torch.Tensor]:
    """Batches of equally many tokens, the first `skip` passed over.

    For the first SHORT_SHARE of the steps each row is one short document without filler, [2 * rows, SHORT + 1],
    padded: looking things up is learned far sooner where there is one story to look in, and from many small steps. Then
    rows are packed, [rows, CONTEXT + 1].
    """
    end = tokenizer.eos_token_id
    short, length = int(steps * SHORT_SHARE), SHORT + 1
    buffer: list[int] = []
    single: list[list[int]] = []
    step = block = 0
    while True:
        texts = [d.text() for d in documents("train", BLOCK, block * BLOCK, plain=step < short)]
        block += 1
        for ids in tokenizer(texts)["input_ids"]:
            ids = [*ids, end]
            if step < short:
                if len(ids) <= length:
                    single.append(ids + [end] * (length - len(ids)))
                if len(single) < 2 * rows:
                    continue
                batch, single = torch.tensor(single), []
            else:
                buffer += ids
                if len(buffer) < rows * (CONTEXT + 1):
                    continue
                batch = torch.tensor(buffer[: rows * (CONTEXT + 1)]).view(rows, CONTEXT + 1)
                buffer = buffer[rows * (CONTEXT + 1) :]
            step += 1
            if step > skip:
                yield batch


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm, decay = min(200, steps // 10), steps // 4
    return peak * min(1.0, (step + 1) / warm, (steps - step) / decay)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """Share of held-out items whose right one-token answer is the likeliest of its choices."""
    model.eval()
    result = {}
    for task in TASKS:
        rows = items(task, count)
        texts = [f"{row['passage']}\nQuestion: {row['question']}\nAnswer: {row['lead']}" for row in rows]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        last = batch["attention_mask"].sum(1) - 1
        hidden = model.model(**batch).last_hidden_state[torch.arange(len(rows)), last]
        logits = model.lm_head(hidden)
        right = 0
        for row, scores in zip(rows, logits, strict=True):
            ids = [tokenizer(" " + c, add_special_tokens=False)["input_ids"][0] for c in row["choices"]]
            right += int(scores[ids].argmax()) == row["gold"]
        result[task] = right / count
    model.train()
    return result


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
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


def new_model() -> LlamaForCausalLM:
    """Weights to begin with: random, but attention begins as "look at the same word, and copy it".

    Mimetic initialization (Trockman and Kolter, arXiv 2305.09828): the key projection of half of the heads equals
    their query projection, and the output projection is the transpose of the value projection, all with orthogonal
    rows. Looking up is then refined rather than discovered, in a fraction of the tokens.
    """
    model = LlamaForCausalLM(config())
    half = model.config.hidden_size // 2
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                torch.nn.init.orthogonal_(projection.weight)
            attention.k_proj.weight[:half] = attention.q_proj.weight[:half]
            attention.o_proj.weight.copy_(0.7 * attention.v_proj.weight.T)
    return model


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = new_model()
    optimizer = optimizer_for(model)
    state = State(HERE / "teacher.state")
    record = state.load(model, optimizer) or {"step": 0, "seconds": 0.0, "curve": []}
    tokens_per_step = arguments.rows * CONTEXT
    steps = arguments.tokens // tokens_per_step
    model.to(arguments.device)

    newline, answer, _ = tokenizer("\nAnswer:", add_special_tokens=False)["input_ids"]

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(arguments.device, torch.bfloat16):
            logits = model.lm_head(model.model(input_ids=batch[:, :-1]).last_hidden_state)
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        # Answers are few among the tokens and carry what the tasks ask: their lines count more.
        before = batch[:, :-1]
        place = torch.arange(before.shape[1], device=before.device).expand_as(before)
        answers = torch.where(before == answer, place, -1).cummax(1).values
        lines = torch.where(before == newline, place, -1).cummax(1).values
        weights = torch.where(answers > lines, ANSWER_WEIGHT, 1.0)
        weights = torch.where(before == tokenizer.eos_token_id, 0.0, weights).flatten()  # padding
        return (losses * weights).sum() / weights.sum()

    compiled = torch.compile(loss_of, dynamic=False) if arguments.compile else loss_of
    began, recent, latest = time.monotonic() - record["seconds"], [], time.monotonic()
    stream = batches(tokenizer, arguments.rows, steps, record["step"])
    for step in range(record["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, arguments.lr)
        loss = compiled(next(stream).to(arguments.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
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
    parser.add_argument("--tokens", type=int, default=40_000_000, help="training tokens in all")
    parser.add_argument("--rows", type=int, default=4, help="sequences of 256 tokens in a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--save-every", type=int, default=2000, help="steps between saved states")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
