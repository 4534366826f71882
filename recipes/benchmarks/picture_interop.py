"""Whether llama.cpp answers about pictures what we answer, with the two GGUF files of a model that sees.

    make interop-pictures                  the table in recipes/results/interop.md
    python -m recipes.benchmarks.picture_interop --build FOLDER

The models are random ones of SmolVLM's and of Qwen 2.5 VL's architecture, with weights so wide that the picture decides
what is answered, a byte-level tokenizer and a processor, the first one's cutting pictures into tiles. Each is packed in
4 bits and exported three times.
Both sides get the same chats with a picture and two continuations of each, our greedy one and a piece of text, and the
logits before each token of these are compared, as `interop` does for models of text:

* *32 bits*: both files in float32, keys and values too, against transformers in float32 with the dequantized weights.
  The greedy text is the same. The mean KL is at most 1e-6, of Qwen 1e-5: sums of two programs differ in the last bits,
  those of resized pictures, too, and llama.cpp looks GELU up in a table of float16.
* *16 bits*: both files in float16. The mean KL is at most 1e-4, the perplexities of the text differ by at most 0.1 %,
  and the greedy text is the same but for ties.
* *quantized*: the codes as they are, against our packed model with its own 8-bit activations, keys and values.
  Perplexities differ by at most 1 %.
* `llama-mtmd-cli`, from the files in float32, prints the text of our greedy tokens.

Exit code 3 when one of these is not so.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
)

from edgerazor import exporters, models, pipeline, transformers_plugin
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.errors import QUALITY, UserError
from edgerazor.exporters.core.gguf_tower import PREFIX
from edgerazor.workdir import WorkDir, machine
from recipes.benchmarks.folders import BENCHMARKS, BUILD, RESULTS, WORLD
from recipes.benchmarks.interop import EXACT, EXACT_KL, ROUNDED, TIE, TableGelu, built, dequantized, version
from recipes.benchmarks.results import commit, markdown, number, publish

WRITTEN = 64
TRIES = 5
TILE, EDGE, PATCH, SHUFFLE = 32, 64, 8, 2
VOCABULARY = 640
MARK = "<__media__>"
SPECIAL = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
SPECIAL += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
CHAT = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
#: Multiples of 28 pixels, to which Qwen's processor resizes, by another bicubic filter than llama.cpp's.
QWEN_SIZES = ((112, 112), (168, 84), (84, 140))
QWEN_SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
QWEN_SPECIAL += ["<|video_pad|>"]
QWEN_IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
QWEN_IDS |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = ("What is this?", "Where is the blue one, and  why?", "Describe it.")
SIZES = ((64, 64), (96, 48), (40, 100))


# --- the model ---------------------------------------------------------------------------------


def tokenizer(special: list[str], chat: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that knows two ends of lines as one token.

    Args:
        special: tokens: padding, what begins texts, what ends turns, and others.
        chat: template.
    """
    raw = Tokenizer(token_models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 40,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (WORLD / "heldout.txt").read_text(encoding="utf-8")[:100_000]
    raw.train_from_iterator([text, *["\n\n"] * 2_000], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat
    return fast


LAYERS: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4}
DECODER: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, **LAYERS, "num_key_value_heads": 2},
    **{"max_position_embeddings": 512, "tie_word_embeddings": True},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def write_model(folder: Path) -> None:
    """A random model of SmolVLM's architecture with a processor that cuts pictures into tiles, as `_write`."""
    vision = {"hidden_size": 64, "intermediate_size": 128, **LAYERS, "image_size": TILE, "patch_size": PATCH}
    config = Idefics3Config(
        image_token_id=SPECIAL.index("<image>"),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
        pad_token_id=0,
        vision_config=vision,
        text_config={"model_type": "llama", "head_dim": 64, **DECODER},
    )
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": EDGE}, max_image_size={"longest_edge": TILE})
    tokens = (TILE // PATCH // SHUFFLE) ** 2
    made = Idefics3Processor(pictures, tokenizer(SPECIAL, CHAT), image_seq_len=tokens, chat_template=CHAT)
    _write(folder, config, made)


def write_qwen(folder: Path) -> None:
    """A random model of Qwen 2.5 VL's architecture with its processor, as `_write`."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    ids = {name: QWEN_SPECIAL.index(token) for name, token in QWEN_IDS.items()}
    config = Qwen2_5_VLConfig(
        **ids,
        tie_word_embeddings=True,
        vision_config={
            **{"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 256},
            **{"fullatt_block_indexes": [1, 3]},
        },
        text_config={**DECODER, "rope_parameters": rope},
    )
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256})
    _write(folder, config, pictures, tokenizer(QWEN_SPECIAL, QWEN_CHAT))


@torch.no_grad()
def _write(folder: Path, config: Any, *parts: Any) -> None:
    """Random weights, the same every time, and the parts of a processor, if they are not there yet."""
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.3))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with models.quiet_transformers():
        model.save_pretrained(folder)
        for part in parts:
            part.save_pretrained(folder)


@dataclass(frozen=True)
class Kind:
    """A model that is compared: how it is written, what stands for a picture in its chats, sizes of pictures, and the
    largest mean KL in float32."""

    name: str
    write: Callable[[Path], None]
    picture: str
    sizes: tuple[tuple[int, int], ...]
    full_kl: float


KINDS = (
    Kind("SmolVLM", write_model, "<image>", SIZES, 1e-6),
    Kind("Qwen 2.5 VL", write_qwen, "<|vision_start|><|image_pad|><|vision_end|>", QWEN_SIZES, 1e-5),
)


def pictures(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Path]:
    """Pictures of several shapes: smooth colors with a sharp square in them."""
    files = []
    for seed, (width, height) in enumerate(sizes):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / (5 + seed) + seed) * np.cos(y / 7), np.cos(x / 9 - y / 11), np.sin((x + y) / (6 + seed))]
        pixels = (np.stack(waves, -1) * 120 + 127).astype(np.uint8)
        pixels[height // 4 : height // 2, width // 3 : width // 2] = (250, 20 * seed, 40)
        files.append(folder / f"picture-{seed}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


# --- both sides --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A chat with a picture: its text, with the processor's mark where the picture stands, and the inputs of ours."""

    text: str
    picture: Path
    inputs: dict[str, Tensor]


def prompts(folder: Path, files: list[Path]) -> list[Prompt]:
    made = models.load_processor(folder)
    listed = []
    for question, file in zip(QUESTIONS, files, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = made.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = made(text=text, images=[Image.open(file)], return_tensors="pt", add_special_tokens=False)
        listed.append(Prompt(text, file, dict(inputs)))
    return listed


@torch.inference_mode()
def logits_of(model: PreTrainedModel, prompt: Prompt, answer: list[int]) -> Tensor:
    """Logits float32 [tokens of the answer, vocabulary] before each token of an answer."""
    begin = prompt.inputs["input_ids"].shape[1]
    ids = torch.cat([prompt.inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], dim=1)
    others = {name: value for name, value in prompt.inputs.items() if name.startswith(("pixel", "image"))}
    if (kinds := prompt.inputs.get("mm_token_type_ids")) is not None:
        others["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(answer)))
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **others).logits
    return logits[0, begin - 1 : -1].float() if answer else logits[0, -1:].float()


def greedy(model: PreTrainedModel, prompt: Prompt) -> list[int]:
    """Our greedy tokens; the end of a turn is a token like others."""
    written: list[int] = []
    while len(written) < WRITTEN:
        written.append(int(logits_of(model, prompt, [*written, 0])[-1].argmax()))
    return written


def positions(model: PreTrainedModel, prompt: Prompt) -> int:
    """How many positions a prompt takes; a picture may take fewer than it has tokens."""
    ids = prompt.inputs["input_ids"]
    if (index := getattr(model.base_model, "get_rope_index", None)) is None:
        return int(ids.shape[1])
    names = ("mm_token_type_ids", "image_grid_thw")
    return int(index(ids, **{name: prompt.inputs[name] for name in names})[0].max()) + 1


def theirs(
    file: Path, chats: list[Prompt], answers: list[list[int]], python: Path, cache_bits: int, picture: str = "<image>"
) -> tuple[Tensor, list[int]]:
    """What llama.cpp computes: logits [prompts, tokens of an answer, vocabulary], and positions of each prompt.

    Raises:
        UserError: it cannot.
    """
    request, answer = file.with_suffix(".request.json"), file.with_suffix(".answer.npz")
    values = {
        "prompts": [prompt.text.replace(picture, MARK) for prompt in chats],
        "pictures": [str(prompt.picture) for prompt in chats],
        **{"answers": answers, "cache_bits": cache_bits, "threads": 1},
    }
    request.write_text(json.dumps(values), encoding="utf-8")
    tower = file.with_name(f"{PREFIX}{file.name}")
    words = [str(python), str(BENCHMARKS / "llamacpp_pictures.py"), *map(str, (file, tower, request, answer))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"llama.cpp does not compute {file}: {' '.join(lines[-1:])}")
    with np.load(answer) as arrays:
        return torch.from_numpy(arrays["logits"]), arrays["tokens"].tolist()


def told(file: Path, prompt: Prompt, question: str, python: Path) -> str:
    """What `llama-mtmd-cli` prints.

    Its answers end with two ends of lines. On a busy machine the last tokens are lost now and then, which a thread of
    its own prints while the program ends; it is asked again then.
    """
    tool = python.parents[1] / "tools" / "llama-mtmd-cli"
    words = [str(tool), "-m", str(file), "--mmproj", str(file.with_name(f"{PREFIX}{file.name}")), "--jinja"]
    words += ["--image", str(prompt.picture), "-p", question, "--temp", "0", "-n", str(WRITTEN), "-t", "1"]
    words += ["-ctk", "f32", "-ctv", "f32", "-c", "1024", "--no-warmup"]
    settings = {"stdin": subprocess.DEVNULL, "errors": "replace"}  # bytes that are no text may be written, too
    for _ in range(TRIES):
        done = subprocess.run(words, capture_output=True, check=False, **settings)
        if done.returncode:
            raise UserError(f"{tool.name} does not answer: {' '.join(done.stderr.splitlines()[-1:])}")
        if done.stdout.endswith("\n\n"):
            break
    return done.stdout


# --- the comparison ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One export beside ours: mean KL in nats, perplexities of the text, tokens of the greedy continuations alike."""

    export: str
    kl: float
    perplexities: tuple[float, float]
    alike: int
    tied: bool  # where another token would be chosen, both are as good

    @property
    def apart(self) -> float:
        return self.perplexities[1] / self.perplexities[0] - 1


def compare(export: str, mine: Tensor, other: Tensor, answers: list[list[int]]) -> Compared:
    """Both sides' logits [continuations, tokens, vocabulary]; the first half of these is greedy, the other text."""
    half = len(answers) // 2
    first, second = mine.double().log_softmax(-1), other.double().log_softmax(-1)
    chosen = torch.tensor(answers)[half:, :, None]
    losses = [float(-side[half:].gather(-1, chosen).mean()) for side in (first, second)]
    best, chosen_there = mine[:half].argmax(-1), other[:half].argmax(-1)
    differ = (best != chosen_there).nonzero().tolist()
    gaps = [float(mine[p, t, best[p, t]] - mine[p, t, chosen_there[p, t]]) for p, t in differ]
    return Compared(
        export=export,
        kl=float((first.exp() * (first - second)).sum(-1).mean()),
        perplexities=(math.exp(losses[0]), math.exp(losses[1])),
        alike=best.numel() - len(differ),
        tied=all(gap < TIE for gap in gaps),
    )


def failures(rows: list[Compared], total: int, full_kl: float) -> Iterator[str]:
    """What is not as it must be."""
    bounds = {"gguf-f32": (full_kl, math.inf), "gguf-f16": (EXACT_KL, EXACT), "gguf": (math.inf, ROUNDED)}
    for row in rows:
        kl, apart = bounds[row.export]
        if not row.kl <= kl:
            yield f"{row.export}: the distributions are {row.kl:.1e} nats from ours"
        if not abs(row.apart) <= apart:
            yield f"{row.export}: perplexity is {100 * row.apart:+.3f} % from ours"
        if row.export != "gguf" and row.alike < total and not row.tied:
            yield f"{row.export}: {total - row.alike} of {total} tokens are not ours"


def table_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """The model with GELU in its tower as llama.cpp computes it."""
    for module in list(model.modules()):
        if hasattr(module, "activation_fn"):
            module.activation_fn = TableGelu()
        for name, part in module.named_children():
            if isinstance(part, torch.nn.GELU):
                setattr(module, name, TableGelu())
    return model


def measure(kind: Kind, build: Path, python: Path) -> tuple[list[Compared], int, list[bool]]:
    """Rows of the table, tokens of all greedy continuations, and whether `llama-mtmd-cli` prints each of ours."""
    folder = build / "model"
    kind.write(folder)
    work = WorkDir(build / "job")
    packing = {"model": str(folder), "calibrate": {"bits": 4, "plan": "interleave"}, "pack": {"source": "teacher"}}
    pipeline.run("pack", recipes.build(packing), work, Console(quiet=True))
    packed = work.folder("pack")
    chats = prompts(folder, pictures(build, kind.sizes))
    exact = table_gelu(dequantized(packed))
    rounded = table_gelu(transformers_plugin.load(packed, cache_decoded=True)[0])
    words = models.load_tokenizer(folder)
    text = words((WORLD / "heldout.txt").read_text(encoding="utf-8")[-10_000:], add_special_tokens=False)["input_ids"]
    continued = [greedy(exact, prompt) for prompt in chats]
    answers = [*continued, *(text[begin * WRITTEN : (begin + 1) * WRITTEN] for begin in range(len(chats)))]
    twice = [*chats, *chats]
    rows, printed = [], []
    for export, model, bits in (("gguf-f32", exact, 32), ("gguf-f16", exact, 16), ("gguf", rounded, 16)):
        [made] = exporters.write_all(packed, [export], work.path / "exports", True, Console(quiet=True))
        other, lengths = theirs(Path(made.file), twice, answers, python, bits, kind.picture)
        if lengths != [positions(model, prompt) for prompt in twice]:
            raise UserError(f"llama.cpp makes {lengths} positions of the prompts, and we do not.")
        mine = torch.stack([logits_of(model, prompt, answer) for prompt, answer in zip(twice, answers, strict=True)])
        rows.append(compare(export, mine, other, answers))
        if export == "gguf-f32":
            for prompt, question, answer in zip(chats, QUESTIONS, continued, strict=True):
                ended = answer[: answer.index(2)] if 2 in answer else answer
                text = words.decode(ended, skip_special_tokens=True)
                printed.append(told(Path(made.file), prompt, question, python).strip() == text.strip())
    return rows, sum(map(len, continued)), printed


HEAD = ("model", "files", "KL", "perplexity: ours", "llama.cpp", "apart", "same tokens")


@dataclass(frozen=True)
class Measured:
    """What was measured of a model: rows of the table, tokens of all greedy continuations, texts of the tool alike."""

    kind: Kind
    rows: list[Compared]
    total: int
    printed: list[bool]

    def lines(self) -> list[list[str]]:
        return [
            [
                *(self.kind.name, row.export, f"{row.kl:.1e}"),
                *(number(row.perplexities[0], 5), number(row.perplexities[1], 5), f"{100 * row.apart:+.3f} %"),
                f"{row.alike}/{self.total}{', tie' if row.alike < self.total and row.tied else ''}",
            ]
            for row in self.rows
        ]

    def failures(self) -> list[str]:
        failed = [f"{self.kind.name}, {line}" for line in failures(self.rows, self.total, self.kind.full_kl)]
        return failed if all(self.printed) else [*failed, f"{self.kind.name}: llama-mtmd-cli prints another text"]


def described(measured: list[Measured], python: Path) -> str:
    """The facts and the table."""
    facts = f"{len(QUESTIONS)} prompts with a picture; {version(python)}; {machine()}; commit {commit()}."
    told_alike = [f"{sum(one.printed)} of {len(one.printed)} prompts of {one.kind.name}" for one in measured]
    cli = f"`llama-mtmd-cli` prints our greedy text in {' and '.join(told_alike)}."
    return f"{facts}\n\n{markdown(HEAD, [line for one in measured for line in one.lines()])}\n\n{cli}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=BUILD / "interop-pictures", help="folder of what is made")
    parser.add_argument("--llamacpp", type=Path, default=BUILD / "llamacpp" / "bin" / "python")
    parser.add_argument("--results", type=Path, default=RESULTS / "interop.md", help="where the table goes")
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(1)
    try:
        python = built(options.llamacpp)
        measured = [
            Measured(kind, *measure(kind, options.build / kind.name.replace(" ", "-").lower(), python))
            for kind in KINDS
        ]
    except UserError as error:
        console.error(error)
        return error.code
    page = described(measured, options.llamacpp)
    console.out.print(page)
    publish("interop-pictures", page, options.results)
    failed = [line for one in measured for line in one.failures()]
    for line in failed:
        console.error(UserError(line))
    return QUALITY if failed else 0


if __name__ == "__main__":
    sys.exit(main())
