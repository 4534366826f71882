"""How llama.cpp's byte-level vocabularies cut text into words: its names of the patterns, and what they stand for.

Source: `llama-vocab.cpp` of llama.cpp (`tokenizer_pre`, `llm_tokenizer_bpe`). Where llama.cpp writes a pattern in a way
of its own (`gpt-4o`, `tekken`: its regular expressions know no cases of letters), the pattern here is that of the
models' own tokenizers, which it imitates.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A step that is no regular expression: each digit is a word.
DIGITS = "digits"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED_WORDS = r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: What a `ByteLevel` step of the tokenizers package cuts with.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#: Without a last alternative: what it leaves is a word, too.
_GPT2_GAPS = GPT2.removesuffix(r"|\s+")


def _cased(ending: str) -> str:
    return _CASED.replace("{0}", ending).replace("{{", "{").replace("}}", "}")


#: Steps that cut text into words, and whether whole words win over merges -> llama.cpp's name of the pattern.
PATTERNS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((_CONTRACTIONS + _WORDS + _REST,), False): "qwen2",
    ((_CONTRACTIONS + _MARKED_WORDS,), False): "qwen35",
    ((_CONTRACTIONS + _WORDS + "{1,3}" + _REST,), True): "llama-bpe",
    ((_CONTRACTIONS + _WORDS + "{1,3}" + _REST,), False): "smaug-bpe",
    ((_cased("") + r"|\p{N}" + _CASED_REST,), True): "tekken",
    ((_cased(_CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_REST,), False): "gpt-4o",
}

_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: Patterns that are read, and that nothing here writes.
_OTHERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_GAPS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_GAPS, "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", _CJK, _PUNCTUATED),
    "seed-coder": (_CONTRACTIONS + _WORDS + r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",),
    "bailingmoe": (r"'(?i:[sdmt]|ll|ve|re)" + _WORDS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",),
}
#: Names that llama.cpp gave to tokenizers of other models, by the pattern that they share.
_SAME: dict[str, str] = {
    "gpt-2": "phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert jina-es jina-de "
    "jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "qwen2": "stablelm2 deepseek-r1-qwen megrez kormo f2llmv2 hunyuan solar-open grok-2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    "smaug-bpe": "dbrx chatglm-bpe glm4 glm5",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "bailingmoe": "bailingmoe2 llada-moe",
}
#: Whose whole words win over merges although those of their pattern do not.
_WHOLE_WORDS = frozenset({"glm4", "glm5"})
#: Names whose texts begin with the first token unless the file says otherwise.
_FIRST_TOKEN = frozenset({"llama-bpe", "tekken"})

#: Names that llama.cpp takes for the end of a text, whatever type the file gives them (Qwen's vocabulary has a `</s>`).
ENDS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>
    <\uff5cend\u2581of\u2581sentence\uff5c> [e~[""".split()
)


@dataclass(frozen=True)
class PreTokenizer:
    """What a name stands for.

    Attributes:
        steps: each cuts the pieces of those before; regular expressions, or `DIGITS`.
        whole_words: a word that is a token is one, whatever merges would make of it.
        add_bos: a text begins with the first token where the metadata do not say.
    """

    steps: tuple[str, ...]
    whole_words: bool
    add_bos: bool


def find_pre_tokenizer(name: str) -> PreTokenizer | None:
    """The pre-tokenizer that llama.cpp calls `name` (`tokenizer.ggml.pre`); None where it is not known."""
    shared = next((known for known, others in _SAME.items() if name in others.split()), name)
    for (steps, whole_words), known in PATTERNS.items():
        if known == shared:
            return PreTokenizer(steps, whole_words or name in _WHOLE_WORDS, shared in _FIRST_TOKEN)
    return PreTokenizer(_OTHERS[shared], False, False) if shared in _OTHERS else None
