"""Train the embedded teacher that sees from nothing: SmolVLM's architecture (Idefics3), on the shapes of corpus.py.

    python recipes/shapes/train_teacher.py

Writes recipes/shapes/teacher/ (configurations, tokenizer, processor, bf16 safetensors) and its record training.json:
talks, seconds, machine, versions, loss curve, accuracy on the held-out tasks. Saves its state every --save-every steps
into recipes/shapes/teacher.state/ and goes on from there when started again.

A small decoder sees nothing for a while: it learns the language of the questions first, then what the tower shows. As
in the world's training, an L1 penalty at the end takes away the weights of the decoder that carry nothing, without
which rounding so small a network would lose next to nothing.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import os
import platform
import random
import re
import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from corpus import HERE, SIZE, TASKS, Picture, Question, Talk, items, talks

VOCABULARY = 128  # rows of the embedding; the words are fewer
SPECIAL = "<pad> <unk> <|im_start|> <end_of_utterance> <fake_token_around_image> <image> <global-img>".split()
PATCH, SHUFFLE = 8, 2
SEQUENCE = (SIZE // PATCH // SHUFFLE) ** 2  # image tokens of a picture: one for each cell
CONTEXT = 256
BLOCK = 16  # steps whose talks are sorted by length
WARMUP = 100  # steps
L1_SHARE = 0.2  # the last part of the training, in which weights that carry nothing are taken away
L1_PENALTY = 0.03
MASKED = -100
#: SmolVLM's chat template.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def words() -> list[str]:
    """Every word and mark of the talks, in alphabetical order."""
    found = {"User", "Assistant", ":"}
    for talk in talks("train", 3_000):
        for question in talk.questions:
            found.update(re.findall(r"\w+|[^\w\s]", f"{question.text} {question.answer}"))
    return sorted(found)


def make_processor() -> Idefics3Processor:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words()])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        model_max_length=CONTEXT,
    )
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": SIZE}, max_image_size={"longest_edge": SIZE}, do_image_splitting=False
    )
    return Idefics3Processor(pictures, fast, image_seq_len=SEQUENCE, chat_template=CHAT_TEMPLATE)


def config() -> Idefics3Config:
    """A decoder whose dimensions are multiples of 128, behind a small tower."""
    return Idefics3Config(
        image_token_id=SPECIAL.index("<image>"),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
        pad_token_id=0,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "initializer_range": 0.08,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.08,  # about 1 / sqrt(hidden)
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    )


# --- batches -----------------------------------------------------------------------------------

FIRST = f"<fake_token_around_image><global-img>{'<image>' * SEQUENCE}<fake_token_around_image>"


def written(questions: tuple[Question, ...], prompt: bool = False) -> str:
    """A talk as the chat template and the processor write it; with `prompt` without the last answer."""
    text = "<|im_start|>"
    for number, question in enumerate(questions):
        text += f"User:{'' if number else FIRST}{' ' if number else ''}{question.text}<end_of_utterance>\nAssistant:"
        text += "" if prompt and question is questions[-1] else f" {question.answer}<end_of_utterance>\n"
    return text


def pixel_values(pictures: list[Picture]) -> torch.Tensor:
    """What the processor makes of pictures, float32 [B, 1, 3, SIZE, SIZE]."""
    pixels = np.stack([picture.pixels() for picture in pictures]).transpose(0, 3, 1, 2)
    return torch.from_numpy(pixels[:, None]).float() / 127.5 - 1


def encoded(tokenizer: Tokenizer, batch: list[Talk]) -> dict[str, torch.Tensor]:
    """Inputs and labels of talks: answers and what ends them are learned."""
    rows = tokenizer.encode_batch([written(talk.questions) for talk in batch], add_special_tokens=False)
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for row, encoding in zip(ids, rows, strict=True):
        row[: len(encoding.ids)] = torch.tensor(encoding.ids)
    assistant, end = tokenizer.token_to_id("Assistant"), tokenizer.token_to_id("<end_of_utterance>")
    # A turn of the assistant begins behind "Assistant :" and ends with the first end of an utterance.
    ended = (ids == end).long().cumsum(1)
    ended = ended - (ids == end).long()  # ends before each token
    learn = (ended % 2 == 1) & (ids != assistant) & (ids != tokenizer.token_to_id(":")) & (ids != 0)
    pixels = pixel_values([talk.picture for talk in batch])
    return {"input_ids": ids, "labels": ids.masked_fill(~learn, MASKED), "pixel_values": pixels}


def batches(tokenizer: Tokenizer, rows: int, first: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of talks of about the same length: those of a block of steps, sorted, in an order by chance."""
    for block in count(first // BLOCK):
        ordered = sorted(
            talks("train", rows * BLOCK, block * rows * BLOCK), key=lambda talk: len(written(talk.questions))
        )
        for place in random.Random(block).sample(range(BLOCK), BLOCK)[
            first % BLOCK if block == first // BLOCK else 0 :
        ]:
            yield encoded(tokenizer, ordered[place * rows : (place + 1) * rows])


# --- measuring ---------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(
    model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, limit: int, new_parts: bool = False
) -> dict[str, float]:
    """Share of items whose right answer is the likeliest of its choices, through the processor itself.

    Args:
        model: in float32.
        processor: its own.
        limit: items of each task.
        new_parts: about held-out combinations; else about new pictures.
    """
    model.eval()
    result = {}
    for task in TASKS:
        right = 0
        for row in items(task, limit, new_parts):
            picture = Image.open(io.BytesIO(base64.b64decode(row["image"])))
            user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
            text = processor.apply_chat_template([user], add_generation_prompt=True)
            inputs = processor(text=text, images=[picture], return_tensors="pt", add_special_tokens=False)
            scores = model(**inputs).logits[0, -1]
            ids = [processor.tokenizer.convert_tokens_to_ids(choice) for choice in row["choices"]]
            right += int(scores[ids].argmax()) == row["gold"]
        result[task] = right / limit
    model.train()
    return result


# --- training ----------------------------------------------------------------------------------


class State:
    """Weights, optimizer moments, curve and clock on disk, replaced as one folder."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, model: torch.nn.Module, optimizer: torch.optim.AdamW, record: dict) -> None:
        new = self.folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        tensors = {}
        for name, parameter in model.named_parameters():
            tensors[name] = parameter.detach()
            tensors |= {f"{key}:{name}": optimizer.state[parameter][key] for key in self.MOMENTS}
        save_file(tensors, new / "state.safetensors")
        (new / "record.json").write_text(json.dumps(record))
        shutil.rmtree(self.folder, ignore_errors=True)
        new.rename(self.folder)

    def load(self, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> dict | None:
        if not self.folder.exists():
            return None
        record = json.loads((self.folder / "record.json").read_text())
        tensors = load_file(self.folder / "state.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])
                moments = {key: tensors[f"{key}:{name}"].clone() for key in self.MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(record["step"])), **moments}
        return record


@torch.no_grad()
def shrink(matrices: list[torch.Tensor], threshold: float) -> None:
    """Move every weight towards zero by `threshold`, and no further: the proximal step of an L1 penalty."""
    torch._foreach_sub_(matrices, [matrix.clamp(-threshold, threshold) for matrix in matrices])


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    processor = make_processor()
    tokenizer = processor.tokenizer.backend_tokenizer
    tokenizer.no_padding()
    model = Idefics3ForConditionalGeneration(config())
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    state = State(HERE / "teacher.state")
    record = state.load(model, optimizer) or {"step": 0, "seconds": 0.0, "curve": []}
    inner = [layer.weight for layer in model.model.text_model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    began, recent = time.monotonic() - record["seconds"], []
    stream = batches(tokenizer, arguments.rows, record["step"])
    for step in range(record["step"], arguments.steps):
        done = step + 1
        share = done / arguments.steps
        rate = arguments.lr * min(1.0, done / WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = next(stream)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if share > 1 - L1_SHARE:
            shrink(inner, rate * L1_PENALTY)
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if done % 100 == 0:
            record.update(step=done, seconds=round(time.monotonic() - began, 1))
            record["curve"].append([done * arguments.rows, round(sum(recent) / len(recent), 4)])
            print(f"step {done}/{arguments.steps} loss {record['curve'][-1][1]:.4f} {record['seconds']} s", flush=True)
            recent = []
        if done % arguments.save_every == 0 or done == arguments.steps:
            print("accuracy", accuracy(model, processor, 50), flush=True)
            state.save(model, optimizer, record)
    finish(model, processor, record, arguments)


def finish(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    record: dict,
    arguments: argparse.Namespace,
) -> None:
    model = model.to(torch.bfloat16)
    folder = HERE / "teacher"
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=3, pad_token_id=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    summary = {
        "talks": arguments.steps * arguments.rows,
        "seconds": record["seconds"],
        "batch_talks": arguments.rows,
        "learning_rate": arguments.lr,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "accuracy_new_pictures": accuracy(model.float(), processor, 250),
        "accuracy_new_parts": accuracy(model, processor, 250, new_parts=True),
        "curve": record["curve"][:: max(1, len(record["curve"]) // 50)],
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary["accuracy_new_pictures"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--rows", type=int, default=32, help="talks in a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved states")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
