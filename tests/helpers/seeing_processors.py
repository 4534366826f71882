"""Processors of three families with a tokenizer of a few words: how a picture's placeholder becomes its tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

WORDS = "User Assistant : what is this and that ? a red circle blue square yes no".split()
SPECIAL = "<pad> <bos> <end> <image> <fake_token_around_image> <global-img> <end_of_utterance> <vs> <ve>".split()
SPECIAL += ["<boi>", "<eoi>", "<video>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]


def template(mark: str) -> str:
    return (
        "<bos>{% for m in messages %}{{ m['role'] | capitalize }}:{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}" + mark + "{% else %}{{ ' ' + p['text'] }}{% endif %}{% endfor %}<end>\n"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )


def tokenizer(**names: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<end>", pad_token="<pad>", extra_special_tokens=names
    )


def idefics3(tokens: int = 3) -> Idefics3Processor:
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    return Idefics3Processor(pictures, tokenizer(), image_seq_len=tokens, chat_template=template("<image>"))


class WithoutVideo(Qwen2_5_VLProcessor):
    """Qwen's own expansion; that its video processor has the right class can only be checked with torchvision."""

    def check_argument_for_proper_class(self, *_arguments: object) -> None:
        pass


def qwen() -> Qwen2_5_VLProcessor:
    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 256}
    )
    names = tokenizer(image_token="<image>", video_token="<video>")
    return WithoutVideo(pictures, names, None, chat_template=template("<vs><image><ve>"))


def gemma3(tokens: int = 2) -> Gemma3Processor:
    names = tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    pictures = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(pictures, names, chat_template=template("<boi>"), image_seq_length=tokens)


def lfm2_vl(tokens: int = 4) -> ProcessorMixin:
    """Needs torchvision, as the family's pictures do."""
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

    pictures = Lfm2VlImageProcessor(
        **{"encoder_patch_size": 4, "tile_size": 16, "min_image_tokens": tokens, "max_image_tokens": tokens},
        **{"do_image_splitting": False, "size": {"height": 16, "width": 16}},
    )
    return Lfm2VlProcessor(pictures, tokenizer(image_token="<image>"), chat_template=template("<image>"))
