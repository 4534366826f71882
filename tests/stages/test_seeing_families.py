"""The chain with pictures on random models of several families, tiny ones, through both engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

import edgerazor
from edgerazor.kernels import native
from edgerazor.workdir import WorkDir
from helpers.seeing_teachers import PROCESSORS, write_seeing_data, write_seeing_teacher
from helpers.tiny_job import SMALL, call
from helpers.tiny_models import mostly_slow


@pytest.mark.parametrize("family", mostly_slow(PROCESSORS, "qwen3_vl"))
def test_the_chain_sees(family: str, tmp_path: Path) -> None:
    if family == "lfm2_vl":
        pytest.importorskip("torchvision", reason="its processor needs torchvision", exc_type=ImportError)
    write_seeing_teacher(tmp_path / "teacher", family)
    write_seeing_data(tmp_path)
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
    is_native = native.library() is not None and family != "gemma3"
    assert measured["engine"] == ("native" if is_native else "transformers")
    packed = WorkDir(tmp_path / "job").folder("pack")
    texts = set()
    for engine in (None, "transformers"):
        model = edgerazor.load(packed, threads=1, engine=engine)
        picture = Image.new("RGB", (16, 16), "red")
        texts.add(model.generate("what is this ?", images=[picture], max_tokens=6).text)
    assert len(texts) == 1
