"""Random models that see as folders with their processors, and talks and questions for them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.seeing_models import SEEING
from helpers.seeing_processors import SPECIAL, gemma3, idefics3, lfm2_vl, qwen

TOKENS = 4  # of a picture of 16 x 16 pixels, in all of these families
PROCESSORS = {"idefics3": idefics3, "qwen2_5_vl": qwen, "qwen3_vl": qwen, "gemma3": gemma3, "lfm2_vl": lfm2_vl}
COLORS = ("red", "blue")


def write_seeing_teacher(
    folder: Path, family: str, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> None:
    """A random model of a family with its processor, and special tokens as the processor has them.

    `text` and `vision`: fields of the configurations in the place of the tiny model's.
    """
    fields = SEEING[family]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    names = {"image_token_id": SPECIAL.index("<image>"), "vision_start_token_id": SPECIAL.index("<vs>")}
    given = {name: value for name, value in names.items() if name in fields}
    inner = {
        "text_config": {**fields["text_config"], **ends, "tie_word_embeddings": True, **(text or {})},
        "vision_config": {**fields["vision_config"], **(vision or {})},
    }
    config = CONFIG_MAPPING[family](**{**fields, **given, **inner, "tie_word_embeddings": True})
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    made = PROCESSORS[family]() if family.startswith("qwen") else PROCESSORS[family](TOKENS)
    made.tokenizer.chat_template = made.chat_template
    made.tokenizer.save_pretrained(folder)
    if family.startswith("qwen"):  # whose video processor needs torchvision
        made.image_processor.save_pretrained(folder)
    else:
        made.save_pretrained(folder)


def shown(color: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_seeing_data(folder: Path) -> None:
    """Talks about circles in two colors, and questions with two answers to choose from."""
    rows = []
    for number in range(12):
        color = COLORS[number % 2]
        user = [{"type": "image", "base64": shown(color)}, {"type": "text", "text": "what is this ?"}]
        rows.append(
            {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": f"a {color} circle"}]}
        )
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [
        {
            "image": shown(color),
            "question": "what is this ?",
            "choices": ["a red circle", "a blue circle"],
            "gold": gold,
        }
        for gold, color in enumerate(COLORS)
    ]
    (folder / "colors.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
