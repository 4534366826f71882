"""What stands beside the weights in a packed folder, so that transformers can load it and people may use it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgerazor import models, untrusted
from edgerazor.models import PreTrainedModel
from edgerazor.packaging.teacher_card import licence_texts
from edgerazor.untrusted import links


def write_companions(folder: Path, teacher_folder: Path, teacher: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Configuration, generation settings, tokenizer, chat template and the texts of the teacher's licence.

    The teacher's own card stays behind: what it tells is told of another model.

    Args:
        folder: where they are written.
        teacher_folder: of the teacher's files.
        teacher: the model, whose configuration it is.
        settings: of the `quantization_config`.

    Raises:
        UserError: one of them is a link that leaves the teacher's folder, or cannot be read.
    """
    models.copy_companions(teacher_folder, folder)
    texts = licence_texts(teacher_folder)
    links.refuse_leaving(teacher_folder, texts)
    for file in texts:
        shutil.copyfile(file, folder / file.name)
    values = untrusted.without_code(json.loads(teacher.config.to_json_string(use_diff=True)))
    values["dtype"] = "float32"  # of the activations between quantized layers
    values["quantization_config"] = {"quant_method": "edgerazor", **settings}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
