"""Train the embedded teacher that sees from nothing: SmolVLM's architecture (Idefics3), on the shapes of corpus.py.

    python recipes/shapes/train_teacher.py

Writes recipes/shapes/teacher/ (configurations, tokenizer, processor, bf16 safetensors) and its record training.json:
talks, seconds, machine, versions, loss curve, accuracy on the held-out tasks. Saves its state every --save-every steps
into recipes/shapes/teacher.state/ and goes on from there when started again.

Training has two phases, as that of large models that see. First the tower alone, on pictures without questions: the
feature of a cell is asked for the words of what is there (shape, color, row and column), by the decoder's own table of
embeddings. Then the decoder learns to read a tower that stays as it is. A picture stands before many questions, each of
which sees the picture and itself alone, as if it were the only one: it is paid for once, and most tokens of a batch
teach something. Some batches are talks of several turns. What is trained is then made fragile, without changing what it
computes (`spread_channels`): rounding so small a network would lose next to nothing.

Left to itself, a decoder needs hours to find out that a question's "circle" is the circle of the picture. Three things
bring it there in minutes: pictures of few objects first; keys that begin as queries do, so that attention begins where
something is alike; and, in the middle of the decoder, the name of a thing in a question is asked for what the picture
tells of it (its color, row and column, or how many there are), by the table of embeddings again.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import random
import re
import shutil
import time
from collections.abc import Iterable, Iterator
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

from corpus import (
    COLORS,
    COLUMNS,
    HERE,
    ROWS,
    SHAPES,
    SIZE,
    TASKS,
    Picture,
    Question,
    Talk,
    held_out,
    items,
    look,
    picture_of,
    place,
    plural,
    talks,
    told_by,
)

VOCABULARY = 128  # rows of the embedding; the words are fewer
SPECIAL = "<pad> <unk> <|im_start|> <end_of_utterance> <fake_token_around_image> <image> <global-img>".split()
PATCH, SHUFFLE = 8, 2
SEQUENCE = (SIZE // PATCH // SHUFFLE) ** 2  # image tokens of a picture: one for each cell
CONTEXT = 256
QUESTIONS = 16  # behind a picture
TOWER_STEPS, TOWER_PICTURES = 400, 64
TURNS_EVERY = 5  # each of so many batches is of talks of several turns
WARMUP = 100  # steps
#: (share of the training at which it ends, learning rate as a share of the peak, weight of what names tell)
PHASES = ((0.55, 1.0, 1.0), (1.0, 0.5, 0.3))
MIDDLE = 2  # layers of the decoder before its middle
COOLDOWN = 0.2  # share of the training in which the learning rate falls to zero at the end
MEASURE_EVERY = 500  # steps
SPREAD = 1.0  # octaves by which channels of the finished decoder differ in size: standard deviation
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
    for talk in talks("train", 3_000, length=QUESTIONS):
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


def turns(tokenizer: Tokenizer, batch: list[Talk]) -> dict[str, torch.Tensor]:
    """Inputs and labels of talks of several turns: answers and what ends them are learned."""
    rows = tokenizer.encode_batch([written(talk.questions) for talk in batch], add_special_tokens=False)
    ids = padded([encoding.ids for encoding in rows])
    assistant, end = tokenizer.token_to_id("Assistant"), tokenizer.token_to_id("<end_of_utterance>")
    # A turn of the assistant begins behind "Assistant :" and ends with the first end of an utterance.
    ended = (ids == end).long().cumsum(1)
    ended = ended - (ids == end).long()  # ends before each token
    learn = (ended % 2 == 1) & (ids != assistant) & (ids != tokenizer.token_to_id(":")) & (ids != 0)
    pixels = pixel_values([talk.picture for talk in batch])
    return {"input_ids": ids, "labels": ids.masked_fill(~learn, MASKED), "pixel_values": pixels}


def padded(rows: list[list[int]]) -> torch.Tensor:
    """Rows of numbers, int64 [B, longest], with zeros behind them."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def branches(tokenizer: Tokenizer, batch: list[Talk]) -> dict[str, torch.Tensor]:
    """Inputs and labels of pictures with questions, each of which sees nothing but the picture and itself."""
    rows, labels, positions, owners = [], [], [], []
    for talk in batch:
        row: list[int] = []
        label: list[int] = []
        place: list[int] = []
        owner: list[int] = []
        texts = [written((question,)) for question in talk.questions]
        begin = len(tokenizer.encode(f"<|im_start|>User:{FIRST}", add_special_tokens=False).ids)
        for number, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False), 1):
            ids = encoding.ids
            answer = len(ids) - 1 - ids[::-1].index(tokenizer.token_to_id("Assistant")) + 2
            first = begin if row else 0
            row += ids[first:]
            place += range(first, len(ids))
            label += [*[MASKED] * (answer - first), *ids[answer:]]
            owner += [0] * (begin - first) + [number] * (len(ids) - begin)
        for listed, values in ((rows, row), (labels, label), (positions, place), (owners, owner)):
            listed.append(values)
    owned = padded([[number + 1 for number in owner] for owner in owners])  # 0: padding, 1: the picture
    length = owned.shape[1]
    sees = (owned[:, :, None] == owned[:, None, :]) | (owned[:, None, :] == 1)
    sees = sees & torch.ones(length, length, dtype=torch.bool).tril()
    learned = padded(labels)
    return {
        "input_ids": padded(rows),
        "labels": learned.masked_fill(owned == 0, MASKED),
        "position_ids": padded(positions),
        "attention_mask": sees[:, None],
        "pixel_values": pixel_values([talk.picture for talk in batch]),
    }


def batches(tokenizer: Tokenizer, rows: int, first: int) -> Iterator[tuple[list[Talk], dict[str, torch.Tensor]]]:
    """Batches of talks and what becomes of them, those of some steps of several turns."""
    for step in count(first):
        several = step % TURNS_EVERY == TURNS_EVERY - 1
        batch = list(talks("train", rows, step * rows, 4 if several else QUESTIONS))
        yield batch, (turns if several else branches)(tokenizer, batch)


# --- the tower ---------------------------------------------------------------------------------


def cell_words(tokenizer: Tokenizer, pictures: list[Picture]) -> torch.Tensor:
    """The words of each cell: shape, color, row, column; token ids int64 [B, SEQUENCE, 4]."""
    table = []
    for picture in pictures:
        there = {thing.cell: [thing.shape, thing.color] for thing in picture.things}
        table.append([[*there.get(cell, ["nothing", "nothing"]), *place(cell).split()] for cell in range(SEQUENCE)])
    ids = {word: tokenizer.token_to_id(word) for row in table for cell in row for word in cell}
    return torch.tensor([[[ids[word] for word in cell] for cell in row] for row in table])


def features_of(model: Idefics3ForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Features of pictures, [B, SEQUENCE, H]."""
    return torch.stack(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))


def naming_loss(model: Idefics3ForConditionalGeneration, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """How badly states name words, by the table of embeddings; mean of these in nats.

    Args:
        model: with the table.
        states: float32 [..., H].
        words: token ids int64 [..., W]; masked where there are fewer.
    """
    logits = torch.nn.functional.rms_norm(states, states.shape[-1:]) @ model.get_input_embeddings().weight.T
    known = words != MASKED
    logarithms = logits.log_softmax(-1).gather(-1, words.clamp(min=0)).masked_fill(~known, 0.0)
    return -(logarithms.sum(-1) / known.sum(-1)).mean()


def told_words(
    tokenizer: Tokenizer, batch: list[Talk], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the questions of `branches` name something, and what the pictures tell of it.

    Returns:
        rows int64 [N], places int64 [N] and token ids int64 [N, 3], masked where there are fewer.
    """
    number = {word: tokenizer.token_to_id(word) for word in tokenizer.get_vocab()}
    names = {number[word]: word for word in [*SHAPES, *COLORS, *map(plural, SHAPES)] if word in number}
    end = number["<end_of_utterance>"]
    rows, places, told = [], [], []
    for row, (talk, listed) in enumerate(zip(batch, ids.tolist(), strict=True)):
        ended = 0
        for place_of, token in enumerate(listed):
            ended += token == end
            if token in names and ended % 2 == 0 and ended < 2 * len(talk.questions):  # in a question
                words = [number[word] for word in told_by(talk.picture, talk.questions[ended // 2], names[token])]
                if words:
                    rows.append(row)
                    places.append(place_of)
                    told.append([*words, *[MASKED] * (3 - len(words))])
    return torch.tensor(rows), torch.tensor(places), torch.tensor(told)


@torch.no_grad()
def naming_accuracy(model: Idefics3ForConditionalGeneration, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """Share of things in held-out cells whose features are nearest to the words of shape, color, row and column."""
    rng = random.Random("names")
    pictures: list[Picture] = []
    while len(pictures) < count:
        picture = picture_of(rng)
        if any(held_out(look(thing)) for thing in picture.things):
            pictures.append(picture)
    scores = features_of(model, pixel_values(pictures)) @ model.get_input_embeddings().weight.T
    words = cell_words(tokenizer, pictures)
    result = {}
    for number, kind in enumerate((SHAPES, COLORS, ROWS, COLUMNS)):
        ids = torch.tensor([tokenizer.token_to_id(word) for word in kind])
        right = ids[scores[..., ids].argmax(-1)] == words[..., number]
        new = [(at, thing.cell) for at, one in enumerate(pictures) for thing in one.things if held_out(look(thing))]
        result["shape color row column".split()[number]] = round(
            sum(right[at, cell].item() for at, cell in new) / len(new), 3
        )
    return result


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
            if parameter.requires_grad:
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
                if not parameter.requires_grad:
                    continue
                moments = {key: tensors[f"{key}:{name}"].clone() for key in self.MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(record["step"])), **moments}
        return record


def optimizer_for(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    parameters = list(parameters)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def schedule(done: int, steps: int, peak: float) -> tuple[float, float]:
    """Learning rate and weight of what names tell of a step."""
    share = done / steps
    rate, telling = next(values for end, *values in PHASES if share <= end)
    return peak * rate * min(1.0, done / WARMUP, (1 - share) / COOLDOWN), telling


def train_tower(model: Idefics3ForConditionalGeneration, tokenizer: Tokenizer, peak: float) -> None:
    """Teach the tower, and the table of embeddings, to name what is in the cells of pictures."""
    parts = (model.model.vision_model, model.model.connector, model.get_input_embeddings())
    optimizer = optimizer_for(parameter for part in parts for parameter in part.parameters())
    for step in range(TOWER_STEPS):
        set_rate(optimizer, peak * min(1.0, (step + 1) / WARMUP, 2 * (1 - step / TOWER_STEPS)))
        pictures = [talk.picture for talk in talks("train", TOWER_PICTURES, step * TOWER_PICTURES, 0)]
        with torch.autocast("cpu", torch.bfloat16):
            features = features_of(model, pixel_values(pictures))
        loss = naming_loss(model, features.float(), cell_words(tokenizer, pictures))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            print(f"tower {step + 1}/{TOWER_STEPS} loss {loss.item():.4f} {time.process_time():.0f} s", flush=True)
    print("named", naming_accuracy(model, tokenizer, 500), flush=True)
    prepare(model)


@torch.no_grad()
def prepare(model: Idefics3ForConditionalGeneration) -> None:
    """Features as large as embeddings, and keys as queries."""
    features = features_of(model, pixel_values([talk.picture for talk in talks("train", TOWER_PICTURES, 0, 0)]))
    ratio = model.get_input_embeddings().weight.square().mean().sqrt() / features.square().mean().sqrt()
    model.model.connector.modality_projection.proj.weight.mul_(ratio)
    for layer in model.model.text_model.layers:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    processor = make_processor()
    tokenizer = processor.tokenizer.backend_tokenizer
    tokenizer.no_padding()
    model = Idefics3ForConditionalGeneration(config())
    model.model.vision_model.requires_grad_(False)
    optimizer = optimizer_for(parameter for parameter in model.parameters() if parameter.requires_grad)
    state = State(HERE / "teacher.state")
    record = state.load(model, optimizer)
    if record is None:
        model.requires_grad_(True)
        train_tower(model, tokenizer, arguments.lr)
        model.model.vision_model.requires_grad_(False)
        optimizer = optimizer_for(parameter for parameter in model.parameters() if parameter.requires_grad)
        record = {"step": 0, "seconds": 0.0, "curve": []}
    began, recent = record["seconds"] - (time.process_time() if record["step"] else 0.0), []
    stream = batches(tokenizer, arguments.rows, record["step"])
    for step in range(record["step"], arguments.steps):
        done = step + 1
        rate, telling = schedule(done, arguments.steps, arguments.lr)
        set_rate(optimizer, rate)
        batch, inputs = next(stream)
        labels = inputs.pop("labels")
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs, output_hidden_states=True)
        logits = output.logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        recent.append(loss.item())
        if "position_ids" in inputs:
            rows, places, words = told_words(tokenizer, batch, inputs["input_ids"])
            loss = loss + telling * naming_loss(model, output.hidden_states[MIDDLE][rows, places].float(), words)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if done % 100 == 0:
            record["curve"].append([done * arguments.rows, round(sum(recent) / len(recent), 4)])
            seconds = time.process_time() + began
            print(f"step {done}/{arguments.steps} loss {record['curve'][-1][1]:.4f} {seconds:.0f} s", flush=True)
            recent = []
        if done % arguments.save_every == 0 or done == arguments.steps:
            record.update(step=done, seconds=round(time.process_time() + began, 1))
            state.save(model, optimizer, record)
        if done % MEASURE_EVERY == 0:
            print("accuracy", accuracy(model, processor, 50), accuracy(model, processor, 50, True), flush=True)
    finish(model, processor, record, arguments)


@torch.no_grad()
def spread_channels(model: Idefics3ForConditionalGeneration, deviation: float) -> None:
    """Let channels of the decoder differ in size, in place; what the model computes stays what it was.

    A network as small as this one has so much slack that rounding to 1.58 bits loses little of it. In large models
    channels of one matrix differ in size, and a scale for many of them fits few. So each channel between two parts is
    multiplied by a power of two (of a normal exponent, rounded) and its readers are divided by it: gains of norms
    against columns of what reads them, rows of values against columns of outputs, rows of `up` against columns of
    `down`. Powers of two change no digit of a floating-point number, so logits stay equal.

    Args:
        model: of any dtype.
        deviation: of the exponents.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.text_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for writer, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (attention.v_proj, (attention.o_proj,)),
            (mlp.up_proj, (mlp.down_proj,)),
        ):
            rows = len(writer.weight)
            factors = torch.exp2((torch.randn(rows, generator=generator) * deviation).round()).to(writer.weight.dtype)
            writer.weight.mul_(factors if writer.weight.ndim == 1 else factors[:, None])
            for reader in readers:
                reader.weight.div_(factors)


def finish(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    record: dict,
    arguments: argparse.Namespace,
) -> None:
    model = model.to(torch.bfloat16)
    spread_channels(model, SPREAD)
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
    parser.add_argument("--steps", type=int, default=7_800)
    parser.add_argument("--rows", type=int, default=8, help="talks in a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--save-every", type=int, default=50, help="steps between saved states")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
