"""The chain with pictures on random models of several families, tiny ones, through both engines."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import edgerazor
from edgerazor.workdir import WorkDir
from helpers.seeing_models import SEEING
from helpers.seeing_processors import SPECIAL, gemma3, idefics3, qwen
from helpers.tiny_job import SMALL, call
from helpers.tiny_models import mostly_slow

TOKENS = 4  # of a picture of 16 x 16 pixels, in all of these families
PROCESSORS = {"idefics3": idefics3, "qwen2_5_vl": qwen, "qwen3_vl": qwen, "gemma3": gemma3}
COLORS = ("red", "blue")


def write_teacher(folder: Path, family: str) -> None:
    """A random model of a family with its processor, and special tokens as the processor has them."""
    fields = SEEING[family]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    names = {"image_token_id": SPECIAL.index("<image>"), "vision_start_token_id": SPECIAL.index("<vs>")}
    given = {name: value for name, value in names.items() if name in fields}
    text = {**fields["text_config"], **ends, "tie_word_embeddings": True}
    config = CONFIG_MAPPING[family](**{**fields, **given, "text_config": text, "tie_word_embeddings": True})
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


def write_data(folder: Path) -> None:
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


@pytest.mark.parametrize("family", mostly_slow(PROCESSORS, "qwen3_vl"))
def test_the_chain_sees(family: str, tmp_path: Path) -> None:
    write_teacher(tmp_path / "teacher", family)
    write_data(tmp_path)
    talks = [{"file": str(tmp_path / "talks.jsonl")}]
    recipe = {
        **SMALL,
        "model": str(tmp_path / "teacher"),
        "data": {"train": talks, "sequence_length": 64, "packing": "document", "held_out_fraction": 0.25},
        "calibrate": {"bits": 2, "group_size": 32, "sequences": 4, "sensitivity_tokens": 64, "init": "gptq"},
        "distill": {**SMALL["distill"], "reconstruct": {"steps": 1, "sequences": 2}},
        "eval": {"text_sequences": 2, "pictures": [str(tmp_path / "colors.jsonl")]},
        "bench": {**SMALL["bench"], "contexts": [0]},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = call("run", tmp_path / "r.yaml", "--work", tmp_path / "job")
    assert done.code in (0, 3), done.err
    measured = json.loads(WorkDir(tmp_path / "job").result_file("eval").read_text())
    assert measured["text"]["picture_tokens"] > 0
    assert measured["engine"] == ("transformers" if family == "gemma3" else "native")
    packed = WorkDir(tmp_path / "job").folder("pack")
    texts = set()
    for engine in (None, "transformers"):
        model = edgerazor.load(packed, threads=1, engine=engine)
        picture = Image.new("RGB", (16, 16), "red")
        texts.add(model.generate("what is this ?", images=[picture], max_tokens=6).text)
    assert len(texts) == 1
