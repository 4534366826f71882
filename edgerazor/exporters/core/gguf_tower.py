"""The tower of a model that sees, as the second file that llama.cpp reads pictures with (`mmproj`).

llama.cpp rebuilds a processor and a tower from code of its own for each kind of projector, so whatever a processor or
a tower does otherwise must be refused. Known are those of Idefics 3 and SmolVLM. Sources: llama.cpp's
`conversion/smolvlm.py` (metadata), `tools/mtmd/clip.cpp` and `mtmd-image.cpp` (what is computed, how pictures are cut)
and the names of tensors in its package `gguf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from edgerazor import models
from edgerazor.exporters.core.gguf_metadata import refused
from edgerazor.packed import PackedModel, tower_tensors

#: What comes before the name of the decoder's file.
PREFIX = "mmproj-"
#: Tensors that llama.cpp wants in float32 although they are matrices.
FLOAT32 = ("v.patch_embd", "v.position_embd")
#: Model types whose projector llama.cpp knows under this name.
PROJECTORS = {"idefics3": "idefics3", "smolvlm": "idefics3"}
#: Tokens around tiles that llama.cpp writes itself.
TOKENS = ("<fake_token_around_image>", "<global-img>", "<row_1_col_1>")
LANCZOS = 1
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class GgufTower:
    """A tower and its processor, as llama.cpp knows them.

    Attributes:
        model: the whole packed model.
        config: of the whole model, of transformers.
        processor: of its pictures.
        others: its tensors, by their names in the packed model.
    """

    model: PackedModel
    config: Any
    processor: Any
    others: dict[str, Tensor]

    @classmethod
    def of(cls, model: PackedModel) -> GgufTower | None:
        """The tower of a packed model; None where the model reads text only.

        Raises:
            UserError: llama.cpp does not know such a tower, or the model is damaged.
        """
        if not (tensors := tower_tensors(model)):
            return None
        return cls(model, models.auto_config(model.folder), check_tower(model.folder), tensors)

    def values(self, name: str, target: str, half: int | None = None) -> Tensor:
        """A tensor by its name."""
        return self.others[name]

    def target(self, name: str) -> str:
        """llama.cpp's name of a tensor.

        Raises:
            UserError: it knows no such tensor.
        """
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, self.config.vision_config.num_hidden_layers)
        if (known_name := names.get_name(name, _SUFFIXES)) is None:
            raise refused(f"llama.cpp's towers have no tensor {name}")
        return str(known_name)

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Write sizes of the tower, and what its processor does."""
        vision, pictures = self.config.vision_config, self.processor
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type(PROJECTORS[self.config.model_type])
        writer.add_vision_projection_dim(self.config.get_text_config().hidden_size)
        writer.add_vision_image_size(vision.image_size)
        writer.add_vision_patch_size(vision.patch_size)
        writer.add_vision_embedding_length(vision.hidden_size)
        writer.add_vision_feed_forward_length(vision.intermediate_size)
        writer.add_vision_block_count(vision.num_hidden_layers)
        writer.add_vision_head_count(vision.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
        writer.add_vision_image_mean([float(value) for value in pictures.image_mean])
        writer.add_vision_image_std([float(value) for value in pictures.image_std])
        writer.add_vision_projector_scale_factor(self.config.scale_factor)
        writer.add_vision_use_gelu(True)
        writer.add_vision_preproc_image_size(_edge(pictures.size))


def check_tower(folder: Path) -> Any:
    """The processor of pictures of a model that sees; None where it reads text only.

    Raises:
        UserError: llama.cpp does not know such a tower, or would cut pictures otherwise.
    """
    config = models.auto_config(folder)
    if not models.sees(config):
        return None
    if config.model_type not in PROJECTORS:
        raise refused(f"the towers of {config.model_type} are not among those known, which are {', '.join(PROJECTORS)}")
    processor: Any = models.load_processor(folder)
    pictures, vision = processor.image_processor, config.vision_config
    tile, edge = _edge(pictures.max_image_size), _edge(pictures.size)
    vocabulary = processor.tokenizer.get_vocab()
    lacking = [token for token in TOKENS if token not in vocabulary]
    problems = {
        f"its tower has the activation {vision.hidden_act!r}": vision.hidden_act != "gelu_pytorch_tanh",
        "its processor does not cut pictures into tiles": not pictures.do_image_splitting or edge <= tile,
        f"its tiles of {tile} pixels are not as wide as the pictures of its tower": tile != vision.image_size,
        "its processor does not resize with Lanczos's filter": pictures.resample != LANCZOS,
        "its processor does not divide pixels by 255": abs(pictures.rescale_factor * 255 - 1) > 1e-6,
        f"its tokenizer lacks {', '.join(lacking)}": bool(lacking),
    }
    if reasons := [reason for reason, is_so in problems.items() if is_so]:
        raise refused(f"{reasons[0]}, as llama.cpp takes for granted")
    return pictures


def _edge(size: Any) -> int:
    """Longest edge of a size of a processor; 0 where it is given otherwise."""
    return int(dict(size or {}).get("longest_edge") or 0)
