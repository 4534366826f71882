"""Tokenizers and templates of strangers: refused in a sentence, within bounds of time and memory, or as they were."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from edgerazor import data, models
from edgerazor.data import Conversation, tokens
from edgerazor.errors import UserError
from edgerazor.untrusted import tokenizer as untrusted

PLAIN = Conversation(({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nora.\n"}))


class PanicException(BaseException):
    """As the libraries in Rust raise it."""


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_template(folder: Path, template: str) -> Any:
    found = models.load_tokenizer(folder)
    found.chat_template = template
    return found


# --- tokenizers ------------------------------------------------------------------------------------------------------

WORDS = {"unk_token": "[UNK]", "vocab": {"a": 0}}
LIES: list[dict[str, Any]] = [
    {"padding": {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}},
    {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 2**32 - 1}}},
    {"added_tokens": [{"id": 2**31, "content": "x"}]},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 8).decode()}},
]


@pytest.mark.parametrize("lie", LIES)
def test_sizes_that_cannot_be(folder: Path, lie: dict[str, Any]) -> None:
    change(folder, **lie)
    with pytest.raises(UserError, match="cannot load the tokenizer") as caught:
        models.load_tokenizer(folder)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("longest", ["128", [128], True, {}])
def test_a_length_that_is_no_number(folder: Path, longest: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": longest}))
    with pytest.raises(UserError, match="its model_max_length is"):
        models.load_tokenizer(folder)


@pytest.mark.parametrize("template", [1, {"default": 1}, "\ud800", {"rag": "{{ 1 }}", "default": "\udc00"}])
def test_chat_templates_that_are_no_text(folder: Path, template: Any) -> None:
    path = folder / "tokenizer_config.json"
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(UserError, match="its chat template"):
        models.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[" * 70 + "]" * 70, "nested deeper than 64 levels"), ('{"model": ' + "9" * 50 + "}", "a number of 50 digits")],
)
def test_files_that_are_read_like_all_json(folder: Path, content: str, reason: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        models.load_tokenizer(folder)


def test_files_larger_than_any(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"tokenizer\.json has .* bytes; expected at most 1,000"):
        models.load_tokenizer(folder)


NONE = ["[1]", "[" * 100_000, "{", '{"model": null}', "\x1b", '{"model": {"vocab": {"a": []}}}']


@pytest.mark.parametrize("content", NONE)
def test_files_that_are_no_tokenizers(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot load the tokenizer") as caught:
        models.load_tokenizer(folder)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_words_that_a_tokenizer_does_not_know(tmp_path: Path, kind: str) -> None:
    model = {"type": kind, **WORDS, "max_input_chars_per_word": 9, "continuing_subword_prefix": "##"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    try:
        found = models.load_tokenizer(tmp_path)
    except UserError:
        return
    with pytest.raises(UserError, match="The model's tokenizer cannot read the text"):
        tokens.encode(["unheard of"], found)


def test_panics_are_errors(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import os

    def panic(*_: Any, **__: Any) -> Any:
        os.write(2, b"thread '<unnamed>' panicked at \x1b[31m\n")
        raise PanicException("index out of bounds")

    with (
        pytest.raises(UserError, match="cannot read the prompt: the library that reads it gave up"),
        untrusted.reading("the prompt"),
    ):
        panic()
    monkeypatch.setattr(untrusted.AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(UserError, match=r"gave up \(index out of bounds\)"):
        models.load_tokenizer(folder)
    assert "panicked" not in capfd.readouterr().err


def test_bugs_pass() -> None:
    with pytest.raises(KeyError), untrusted.reading():
        raise KeyError("x")
    with pytest.raises(KeyboardInterrupt), untrusted.reading():
        raise KeyboardInterrupt


# --- templates -------------------------------------------------------------------------------------------------------

LOOPS = "{% for x in range(99999) %}" * 3 + "{% endfor %}" * 3
FORKS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}"
DOUBLES = "{% set n = namespace(x='aa') %}{% for i in range(90) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
ENDLESS = [
    (LOOPS, "steps"),
    (FORKS, "steps"),
    (DOUBLES, "10,000,000 letters"),
    ("{{ 'a' * 10**10 }}", "10,000,000 letters"),
    ("{{ 'a' | center(10**9) }}", "too long"),
    ("{{ 'a'.ljust(999999999) }}", "too long"),
    ("{{ 9**9**9 }}", "power"),
    ("{{ '%1000000000d' % 3 }}", "256 MB of memory"),
    ("{{ '{:1000000000}'.format(3) }}", "256 MB of memory"),
    ("{{ 'x' }}" * 200_000, "1,800,000 letters; expected at most 1,000,000"),
    ("{{ raise_exception('\x1b[31m' + 'x' * 9999) }}", r"\?\[31mxxx"),
    ("{{ lipsum(10**6) }}", "lipsum"),
    ("{% if 1 %}" * 400 + "{% endif %}" * 400, "refused"),
]


@pytest.mark.parametrize(("template", "reason"), ENDLESS, ids=range(len(ENDLESS)))
def test_templates_without_an_end(folder: Path, monkeypatch: pytest.MonkeyPatch, template: str, reason: str) -> None:
    monkeypatch.setattr(untrusted, "MOST_STEPS", 20_000)
    monkeypatch.setattr(untrusted, "MOST_SECONDS", 1000.0)
    with pytest.raises(UserError, match=reason) as caught:
        data.render(PLAIN, with_template(folder, template))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


def test_time_is_a_bound_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MOST_SECONDS", -1.0)
    with pytest.raises(UserError, match="seconds"):
        data.render(PLAIN, with_template(folder, LOOPS))


TEMPLATES = [
    "{% for m in messages %}{{ loop.index }}{{ loop.last }} {{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}",
    "{%- for m in messages -%}\n{% if loop.first %}a{% elif m.role == 'x' %}b{% else %}c{% endif %} "
    "{{ m | tojson }}{%- endfor %}",
    "{% macro f(m, x=1) %}[{{ m.role }}{{ x }}]{% endmacro %}"
    "{% for m in messages if m.content %}{{ f(m, x=2) }}{% break %}{% endfor %}",
    "{% set a, b = 1, 'x' %}{% set c %}block{% endset %}{{ a }}{{ b * 3 }}{{ c }}{% filter upper %}abc{% endfilter %}",
    "{% set n = namespace(i=0) %}"
    "{% for m in messages | reverse %}{% set n.i = n.i + 1 %}{{ '%02d' % n.i }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}none{% endfor %}",
    "{% call(x) messages.__len__() %}{% endcall %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_bounded_templates_write_the_same(template: str) -> None:
    untrusted.bound_templates()
    compile_theirs: Callable[[str], Any] = chat_template_utils._cached_compile_jinja_template
    messages = list(PLAIN.messages)

    def written(compiled: Any) -> str:
        try:
            return str(compiled.render(messages=messages, tools=None, add_generation_prompt=True))
        except Exception as error:
            return type(error).__name__

    bounded = chat_template_utils._compile_jinja_template(template)
    assert isinstance(bounded, untrusted.BoundedTemplate)
    assert written(bounded) == written(compile_theirs(template))


def test_a_limit_of_memory_is_lifted_again(folder: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError):
        data.render(PLAIN, with_template(folder, "{{ '%1000000000d' % 3 }}"))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_folder_of_a_model_can_be_copied_and_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert models.load_tokenizer(tmp_path / "copy").get_vocab() == models.load_tokenizer(folder).get_vocab()
