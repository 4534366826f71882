"""The tower of a model that sees, as the second file that llama.cpp reads pictures with (`mmproj`).

llama.cpp rebuilds a processor and a tower from code of its own for each kind of projector, so whatever a processor or
a tower does otherwise must be refused. Known are those of Idefics 3, SmolVLM and Qwen 2.5 VL. Sources: llama.cpp's
`conversion/smolvlm.py` and `qwenvl.py` (metadata), `tools/mtmd/clip.cpp` and `mtmd-image.cpp` (what is computed, how
pictures are cut) and the names of tensors in its package `gguf`.
"""

from __future__ import annotations

from collections.abc import Callable
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
#: Tokens around tiles that llama.cpp writes itself, of Idefics 3 and of Qwen.
TILE_TOKENS = ("<fake_token_around_image>", "<global-img>", "<row_1_col_1>")
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>")
LANCZOS, BICUBIC = 1, 3
#: More than a projector has of numbered parts, which are named as if they were layers.
PROJECTOR_PARTS = 8
#: What llama.cpp takes for granted of Qwen's towers.
QWEN_WINDOW, QWEN_MERGE, QWEN_FRAMES = 112, 2, 2
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Projector:
    """What llama.cpp knows of a kind of tower.

    Attributes:
        name: of the projector.
        problems: whole configuration, processor -> what llama.cpp would do otherwise, and whether that is so.
        add_metadata: writes what is beyond sizes, means and deviations, given the configuration and the processor of
            pictures.
        tensors: tensors by their names in the packed model -> the same as llama.cpp divides them.
        quantized: matrices of such a tower are written in blocks, too.
        note: what llama.cpp does otherwise all the same, as a sentence; empty where there is nothing.
    """

    name: str
    problems: Callable[[Any, Any], dict[str, bool]]
    add_metadata: Callable[[gguf.GGUFWriter, Any, Any], None]
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    quantized: bool = True
    note: str = ""


@dataclass(frozen=True)
class GgufTower:
    """A tower and its processor, as llama.cpp knows them.

    Attributes:
        model: the whole packed model.
        config: of the whole model, of transformers.
        processor: of its pictures.
        others: its tensors, by their names in the packed model, divided as llama.cpp has them.
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
        config, processor = models.auto_config(model.folder), check_tower(model.folder)
        projector = PROJECTORS[config.model_type]
        if not projector.quantized and any(entry.kind == "tower" for entry in model.header.matrices.values()):
            raise refused(f"the matrices of towers of {config.model_type} are written in floating types alone")
        return cls(model, config, processor, projector.tensors(tensors))

    @property
    def note(self) -> str:
        """What llama.cpp does otherwise, as a sentence or nothing."""
        return PROJECTORS[self.config.model_type].note

    def values(self, name: str, target: str, half: int | None = None) -> Tensor:
        """A tensor by its name."""
        return self.others[name]

    def target(self, name: str) -> str:
        """llama.cpp's name of a tensor.

        Raises:
            UserError: it knows no such tensor.
        """
        if name in SECOND_PATCH:
            return "v.patch_embd.weight.1"
        blocks = max(_layers(self.config.vision_config), PROJECTOR_PARTS)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, blocks)
        known_name = names.get_name(name, _SUFFIXES) or names.get_name(name.removeprefix("model."), _SUFFIXES)
        if known_name is None:
            raise refused(f"llama.cpp's towers have no tensor {name}")
        return str(known_name)

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Write sizes of the tower, and what its processor does."""
        vision, pictures = self.config.vision_config, self.processor
        projector = PROJECTORS[self.config.model_type]
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type(projector.name)
        writer.add_vision_projection_dim(self.config.get_text_config().hidden_size)
        writer.add_vision_patch_size(vision.patch_size)
        writer.add_vision_embedding_length(vision.hidden_size)
        writer.add_vision_feed_forward_length(vision.intermediate_size)
        writer.add_vision_block_count(_layers(vision))
        writer.add_vision_image_mean([float(value) for value in pictures.image_mean])
        writer.add_vision_image_std([float(value) for value in pictures.image_std])
        projector.add_metadata(writer, self.config, pictures)


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
    problems = {
        "its processor does not divide pixels by 255": abs(processor.image_processor.rescale_factor * 255 - 1) > 1e-6,
        **PROJECTORS[config.model_type].problems(config, processor),
    }
    if reasons := [reason for reason, is_so in problems.items() if is_so]:
        raise refused(f"{reasons[0]}, as llama.cpp takes for granted")
    return processor.image_processor


def _layers(vision: Any) -> int:
    """Layers of a tower."""
    return int(vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers)


def _lacking(processor: Any, tokens: tuple[str, ...]) -> dict[str, bool]:
    """What is wrong where a tokenizer lacks tokens."""
    vocabulary = processor.tokenizer.get_vocab()
    lacking = [token for token in tokens if token not in vocabulary]
    return {f"its tokenizer lacks {', '.join(lacking)}": bool(lacking)}


# Idefics 3 and SmolVLM ---------------------------------------------------------------------------------------------


def _idefics_problems(config: Any, processor: Any) -> dict[str, bool]:
    pictures, vision = processor.image_processor, config.vision_config
    tile, edge = _edge(pictures.max_image_size), _edge(pictures.size)
    return {
        f"its tower has the activation {vision.hidden_act!r}": vision.hidden_act != "gelu_pytorch_tanh",
        "its processor does not cut pictures into tiles": not pictures.do_image_splitting or edge <= tile,
        f"its tiles of {tile} pixels are not as wide as the pictures of its tower": tile != vision.image_size,
        "its processor does not resize with Lanczos's filter": pictures.resample != LANCZOS,
        **_lacking(processor, TILE_TOKENS),
    }


def _idefics_metadata(writer: gguf.GGUFWriter, config: Any, pictures: Any) -> None:
    vision = config.vision_config
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_projector_scale_factor(config.scale_factor)
    writer.add_vision_use_gelu(True)
    writer.add_vision_preproc_image_size(_edge(pictures.size))


def _edge(size: Any) -> int:
    """Longest edge of a size of a processor; 0 where it is given otherwise."""
    return int(dict(size or {}).get("longest_edge") or 0)


# Qwen 2.5 VL -------------------------------------------------------------------------------------------------------

#: The kernel of patches of a picture's second frame, which is a tensor of its own; a still picture is both frames.
SECOND_PATCH = ("model.visual.patch_embed.proj.weight.1",)
#: Square root of the pixels that its pictures are said to have; llama.cpp's converter writes it, too.
QWEN_IMAGE_SIZE = 560
QWEN_EPSILON = 1e-6


def _qwen_problems(config: Any, processor: Any) -> dict[str, bool]:
    pictures, vision = processor.image_processor, config.vision_config
    full, period = list(vision.fullatt_block_indexes), vision.fullatt_block_indexes[0] + 1
    regular = full == list(range(period - 1, vision.depth, period))
    return {
        f"its tower has the activation {vision.hidden_act!r}": vision.hidden_act != "silu",
        f"its windows are {vision.window_size} pixels wide": vision.window_size != QWEN_WINDOW,
        "not every so many layers of its tower see whole pictures": not regular,
        f"it merges {vision.spatial_merge_size} x {vision.spatial_merge_size} patches": (
            vision.spatial_merge_size != QWEN_MERGE
        ),
        f"its patches have {vision.temporal_patch_size} frames": vision.temporal_patch_size != QWEN_FRAMES,
        "its processor does not resize bicubically": pictures.resample != BICUBIC,
        **_lacking(processor, QWEN_TOKENS),
    }


def _qwen_metadata(writer: gguf.GGUFWriter, config: Any, pictures: Any) -> None:
    vision = config.vision_config
    writer.add_vision_image_size(QWEN_IMAGE_SIZE)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_attention_layernorm_eps(QWEN_EPSILON)
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(vision.fullatt_block_indexes[0] + 1)


def _qwen_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values apart, and the kernel of patches as one for each of its two frames."""
    divided: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                divided[name.replace(".qkv.", f".{part}.")] = rows
        elif tensor.ndim == 5:
            divided[name], divided[f"{name}.1"] = tensor[:, :, 0].contiguous(), tensor[:, :, 1].contiguous()
        else:
            divided[name] = tensor
    return divided


_IDEFICS = Projector("idefics3", _idefics_problems, _idefics_metadata)
#: Model types whose projector llama.cpp knows.
PROJECTORS = {
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_5_vl": Projector(
        *("qwen2.5vl_merger", _qwen_problems, _qwen_metadata, _qwen_tensors),
        quantized=False,
        note="llama.cpp resizes pictures by another bicubic filter, unless their sides are multiples of "
        "28 pixels, and bounds their sizes otherwise.",
    ),
}
