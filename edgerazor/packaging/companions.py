"""What stands beside the weights in a packed folder, so that transformers can load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgerazor import models, untrusted
from edgerazor.models import PreTrainedModel


def write_companions(folder: Path, teacher_folder: Path, teacher: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Configuration, generation settings, tokenizer and chat template.

    Args:
        folder: where they are written.
        teacher_folder: of the teacher's files.
        teacher: the model, whose configuration it is.
        settings: of the `quantization_config`.
    """
    models.copy_companions(teacher_folder, folder)
    values = untrusted.without_code(json.loads(teacher.config.to_json_string(use_diff=True)))
    values["dtype"] = "float32"  # of the activations between quantized layers
    values["quantization_config"] = {"quant_method": "edgerazor", **settings}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
