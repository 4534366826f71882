"""Conversations: the loss falls on the assistant's words and the tokens that end its turns, whatever the template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from edgerazor.data import MASKED, RowSettings, TokenRows, documents, open_rows
from edgerazor.data.chat import Conversation, encode, parse_conversation, render
from edgerazor.errors import UserError
from edgerazor.recipe import Source

#: Tokens that stand for themselves in one template or another.
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<turn>", "</turn>"]

#: Templates of the families' styles; each strips, adds and refuses as its models' own do.
TEMPLATES = {
    # Qwen2: a default system message, words as they are
    "chatml": """{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    # Qwen3: thoughts of earlier turns are dropped, and the last turn has a thinking block even when it is empty
    "thinking": """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content %}{% set thoughts = m.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}""",
    # Llama 3: headers, stripped words
    "headers": """{{- bos_token }}{% for m in messages %}
{{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}""",
    # Gemma: the assistant is called model, roles alternate, no system messages
    "turns": """{{- bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '</turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}""",
    # Llama 2: no prompt for generation, blanks around the words, a text of its own for every exchange
    "brackets": """{%- for m in messages %}{% if m.role == 'user' %}
{{- bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}""",
    # a template that marks the words itself
    "generation": """{%- for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}""",
    # one that takes more than the model writes
    "generation, line break too": """{%- for m in messages %}{% if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}""",
    # one that leaves the end of the turn to others
    "generation, words only": """{%- for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}""",
    # plain words for roles, no token that ends a turn
    "plain": "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\\n' }}{% endfor %}",
}

TWO = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " yes \n"},
    {"role": "user", "content": "so\n"},
    {"role": "assistant", "content": "no"},
]
THOUGHT = [TWO[0], {"role": "assistant", "content": "<think>\nmm\n</think>\n\nyes"}, TWO[2]]
LATE = {"role": "assistant", "content": "<think>\nah\n</think>\n\nno"}
APART = {"role": "assistant", "content": "no", "reasoning_content": "ah"}

#: (template, messages, what is rendered; between « and » stands what is to be learned)
CASES = [
    (
        "chatml",
        TWO,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n« yes \n"
        "<|im_end|>»\n<|im_start|>user\nso\n<|im_end|>\n<|im_start|>assistant\n«no<|im_end|>»\n",
    ),
    (
        "chatml",
        [{"role": "system", "content": "no"}, *TWO[2:]],
        "<|im_start|>system\nno<|im_end|>\n<|im_start|>user\nso\n<|im_end|>\n<|im_start|>assistant\n«no<|im_end|>»\n",
    ),
    (
        "thinking",
        TWO,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n« yes \n<|im_end|>»\n<|im_start|>user\nso\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n«no<|im_end|>»\n",
    ),
    *(
        (
            "thinking",
            [*THOUGHT, last],
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»\n<|im_start|>user\nso\n<|im_end|>\n"
            "<|im_start|>assistant\n«<think>\nah\n</think>\n\nno<|im_end|>»\n",
        )
        for last in (LATE, APART)
    ),
    (
        "headers",
        TWO,
        "<s><|start|>user<|end|>\n\nhi<|eot|><|start|>assistant<|end|>\n\n«yes<|eot|>»<|start|>user<|end|>\n\nso<|eot|>"
        "<|start|>assistant<|end|>\n\n«no<|eot|>»",
    ),
    (
        "turns",
        TWO,
        "<s><turn>user\nhi</turn>\n<turn>model\n«yes</turn>»\n<turn>user\nso</turn>\n<turn>model\n«no</turn>»\n",
    ),
    ("brackets", TWO, "<s>[INST] hi [/INST] «yes </s>»<s>[INST] so [/INST] «no </s>»"),
    *(
        (
            name,
            TWO,
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n« yes \n<|im_end|>»\n<|im_start|>user\nso\n"
            "<|im_end|>\n<|im_start|>assistant\n«no<|im_end|>»\n",
        )
        for name in ("generation", "generation, line break too", "generation, words only")
    ),
    ("plain", TWO, "### user: hi\n### assistant: « yes \n»\n### user: so\n\n### assistant: «no»\n"),
    # turns that say the same as what stands around them, or nothing
    (
        "chatml",
        [*TWO[:1], {"role": "assistant", "content": "user\nhi"}, *TWO[2:3], {"role": "assistant", "content": ""}],
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«user\nhi"
        "<|im_end|>»\n<|im_start|>user\nso\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
    ),
    (
        "headers",
        [*TWO[:1], {"role": "assistant", "content": "PLACEHOLDER"}],
        "<s><|start|>user<|end|>\n\nhi<|eot|><|start|>assistant<|end|>\n\n«PLACEHOLDER<|eot|>»",
    ),
]


def make_tokenizer(template: str | None, **options: Any) -> PreTrainedTokenizerFast:
    """One token for each byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)  # as many models' own
    raw.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **names, **options)


def learned(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, learn: np.ndarray) -> str:
    """The text, with what is learned between « and »."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learn.astype(int), [0]])))
    parts, last = [], 0
    for number, edge in enumerate(edges):
        parts += [tokenizer.decode(ids[last:edge]), "»" if number % 2 else "«"]
        last = edge
    return "".join(parts) + tokenizer.decode(ids[last:])


@pytest.mark.parametrize(("name", "messages", "expected"), CASES, ids=[case[0] for case in CASES])
def test_what_is_learned(name: str, messages: list[Any], expected: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    ids, learn = encode(parse_conversation("The row", messages), tokenizer)
    assert learned(tokenizer, ids, learn) == expected
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_both_kinds_of_masks_agree() -> None:
    """The library's own mask of a template with {% generation %}, and ours of the same one without."""
    template = TEMPLATES["generation"]
    bare = template.replace("{%- generation %}", "{%- if true %}").replace("{% endgeneration %}", "{% endif %}")
    (ids, learn), (other_ids, other_learn) = (
        encode(parse_conversation("The row", TWO), make_tokenizer(each)) for each in (template, bare)
    )
    assert ids.tolist() == other_ids.tolist()
    assert learn.tolist() == other_learn.tolist()


def test_a_token_over_the_edge_is_learned() -> None:
    """Where the last blank of the markup and the first letter are one token, the model has to write that token."""
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "▁yes": 1, "▁no": 2, "</s>": 3, "<s>": 4}, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATES["brackets"].replace(" + ' ' + eos_token", " + eos_token")
    ids, learn = encode(parse_conversation("The row", TWO), tokenizer)
    assert ids[learn].tolist() == [1, 3, 2, 3]


def test_the_date_is_always_the_same() -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }}: " + TEMPLATES["headers"])
    ids, _ = encode(parse_conversation("The row", TWO), tokenizer)
    assert tokenizer.decode(ids).startswith("26 Jul 2024:<s>")


# --- forms of records --------------------------------------------------------------------------


SAME_RECORDS = [
    {"messages": TWO},
    {"conversations": TWO},
    {"conversations": [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in TWO]},
    {"conversations": [{"from": m["role"], "value": m["content"]} for m in TWO], "id": 7},
    {"messages": [{**m, "name": None, "tool_calls": None} for m in TWO], "tools": None},
    {"messages": [{**m, "content": [{"type": "text", "text": each} for each in m["content"]]} for m in TWO]},
]


@pytest.mark.parametrize("record", SAME_RECORDS)
def test_forms_of_a_conversation(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (found,) = documents(Source(file=str(path)))
    assert isinstance(found, Conversation)
    assert found.messages == tuple(TWO)
    assert found.tools is None
    assert found.where == f"Line 1 of {path}"


def test_other_columns_and_rows_of_text_beside_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"text": "one", "talk": TWO}, {"text": "two", "talk": "three"}])))
    assert list(documents(Source(file=str(path)))) == ["one", "two"]
    talk = list(documents(Source(file=str(path), column="talk")))
    assert isinstance(talk[0], Conversation)
    assert talk[1] == "three"


def test_conversations_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [{"id": 1, "messages": TWO}, {"id": 2, "messages": [*TWO[:1], APART]}]  # one has a field more
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = documents(Source(dataset=str(folder)))
    assert isinstance(first, Conversation)
    assert isinstance(second, Conversation)
    assert first.messages == tuple(TWO)
    assert second.messages == (TWO[0], APART)


def test_tools_reach_the_template() -> None:
    template = "{% for t in tools or [] %}{{ t.name }};{% endfor %}" + TEMPLATES["chatml"]
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    template = template.replace("m.content +", "m.content + (m.tool_calls[0].function.name if m.tool_calls else '') +")
    answer = {"role": "tool", "content": "5"}
    messages = [TWO[0], {"role": "assistant", "content": None, "tool_calls": call}, answer, TWO[3]]
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        tokenizer = make_tokenizer(template)
        ids, learn = encode(parse_conversation("The row", messages, tools), tokenizer)
        assert learned(tokenizer, ids, learn).startswith("f;<|im_start|>system")
        assert learned(tokenizer, ids, learn).endswith(
            "assistant\n«f<|im_end|>»\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n«no<|im_end|>»\n"
        )


# --- refused -----------------------------------------------------------------------------------


SURROGATE = "is not JSON that can be read: it has half of a surrogate pair, which is no text"


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"messages": []}, "chatml", "Line 1 of .* has no assistant turn to learn from; its roles are none"),
        ({"messages": TWO[:1]}, "chatml", "no assistant turn to learn from; its roles are 'user'"),
        ({"messages": TWO}, None, "Line 1 of .* is a conversation, but the model's tokenizer has no chat template"),
        ({"messages": TWO[1:]}, "turns", "Line 1 of .* is refused by the .* chat template: Roles must alternate"),
        ({"messages": [{"role": "system", "content": "x"}, *TWO]}, "turns", "refused by .*: System role not supported"),
        ({"messages": TWO}, "{{ 1 // 0 }}", "refused by the tokenizer's chat template: "),
        ({"messages": TWO}, "{% for m in messages", "refused by the tokenizer's chat template: "),
        ({"messages": ["hi"]}, "chatml", "Message 1 of line 1 of .* is a str; expected an object with role"),
        ({"messages": [{"content": "hi"}]}, "chatml", "Message 1 of line 1 of .* has no role"),
        ({"messages": [{"from": ["x"], "value": "hi"}]}, "chatml", "Message 1 of line 1 of .* has no role"),
        ({"messages": [{"from": {"a": 1}, "value": "hi"}]}, "chatml", "Message 1 of line 1 of .* has no role"),
        ({"messages": [{"role": "user"}]}, "chatml", "Message 1 of .* has NoneType as its content; expected text"),
        ({"messages": [*TWO, {"role": "user", "content": 3}]}, "chatml", "Message 5 of .* has int as its content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "chatml", "a part of type 'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TWO[1]]}, "chatml", "holds pictures, but"),
        (
            {"messages": [{"role": "\ud800", "content": "hi"}, TWO[1]]},
            "chatml",
            SURROGATE,
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "chatml", SURROGATE),
        ({"messages": TWO, "tools": "{"}, "chatml", "has tools that are not JSON"),
        ({"messages": TWO, "tools": {"a": 1}}, "chatml", "has dict as its tools"),
        # templates that give the words back changed, twice, or not at all
        ({"messages": TWO}, "{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "turn 1 cannot be found"),
        ({"messages": TWO}, "{% for m in messages[:2] %}{{ m.content }}{% endfor %}", "turn 2 cannot be found again"),
        ({"messages": TWO}, "{{ messages | map(attribute='content') | map('length') | join }}", "turn 1 cannot be"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    tmp_path: Path, record: dict[str, Any], template: str | None, message: str
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(record))
    tokenizer = make_tokenizer(TEMPLATES.get(template, template) if template else None)
    with pytest.raises(UserError, match=message) as caught:
        open_rows([Source(file=str(path))], tokenizer, RowSettings(8))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([{"role": "\ud800", "content": "hi"}, TWO[1]], "what the tokenizer's chat template makes of it"),
        ([{"role": "user", "content": "\ud800"}], "its content"),
    ],
)
def test_text_that_no_tokenizer_reads_is_refused(messages: list[dict[str, str]], what: str) -> None:
    with pytest.raises(UserError, match=f"half of a surrogate pair in {what}; expected valid text"):
        render(parse_conversation("here", messages), make_tokenizer(TEMPLATES["chatml"]))


def test_text_alone_is_rendered() -> None:
    """Who does not read pictures refuses them, and reads no file that somebody names."""
    message = {"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What?"}]}
    with pytest.raises(UserError, match="holds pictures, which cannot be read here"):
        render(parse_conversation("Here", [message]), make_tokenizer(TEMPLATES["chatml"]), prompt=True)


def test_conversations_without_words_are_nothing_to_learn_from(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [*TWO[:1], {"role": "assistant", "content": ""}]}))
    with pytest.raises(UserError, match="nothing that is to be learned follows anything in its"):
        open_rows([Source(file=str(path))], make_tokenizer(TEMPLATES["chatml"]), RowSettings(8))


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(UserError, match="cannot say which characters a token stands for"):
        encode(parse_conversation("The row", TWO), make_tokenizer(TEMPLATES["chatml"]))


# --- rows --------------------------------------------------------------------------------------


def chat_file(path: Path, count: int) -> Source:
    talks = [
        [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n} " * n}] for n in range(count)
    ]
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    return Source(file=str(path))


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize("length", [2, 7, 16, 64, 1000])
def test_cutting_keeps_every_label(tmp_path: Path, length: int, packing: Any) -> None:
    """Every token to be learned is a label once, but those at the beginning of a row, which nothing precedes."""
    tokenizer = make_tokenizer(TEMPLATES["headers"])
    source = chat_file(tmp_path / "chat.jsonl", 20)
    pieces = [encode(each, tokenizer) for each in documents(source) if isinstance(each, Conversation)]
    if packing == "stream":
        pieces = [(np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces]))]
    cut = [(i[k : k + length], m[k : k + length]) for i, m in pieces for k in range(0, len(i), length)]
    expected = [(ids.tolist(), np.where(learn, ids, MASKED).tolist()) for ids, learn in cut if learn[1:].any()]
    rows, _ = open_rows([source], tokenizer, RowSettings(length, packing=packing))
    found = []
    for row in rows.in_order():
        real = len(expected[len(found)][0])
        assert (row["labels"][real:] == MASKED).all()
        found.append((row["input_ids"][:real].tolist(), row["labels"][:real].tolist()))
    assert found == expected


def test_no_label_is_predicted_from_another_conversation(tmp_path: Path) -> None:
    """Even where a template begins with the assistant's words."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    path = tmp_path / "chat.jsonl"
    talks = [[{"role": "assistant", "content": letter * 3}] for letter in "abc"]
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    (row,) = open_rows([Source(file=str(path))], tokenizer, RowSettings(12))[0].in_order()
    assert tokenizer.decode(row["input_ids"]) == "aaa</s>bbb</s>ccc</s>"
    assert (row["labels"] == MASKED).tolist() == [True, False, False, False] * 3


def test_text_and_conversations_mix_by_weight(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATES["turns"])
    text = tmp_path / "a.txt"
    text.write_text("word " * 500)
    chat = chat_file(tmp_path / "chat.jsonl", 20).model_copy(update={"weight": 3.0})
    rows, held_out = open_rows([Source(file=str(text)), chat], tokenizer, RowSettings(32, held_out_fraction=0.1))
    assert isinstance(held_out, TokenRows)
    texts = [tokenizer.decode(rows.row(index)["input_ids"]) for index in range(40)]
    assert sum("word" in each for each in texts) == 10
    assert any((row["labels"] != MASKED).any() for row in held_out.in_order())
