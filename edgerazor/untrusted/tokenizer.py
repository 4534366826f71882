"""Tokenizers and chat templates of strangers.

A tokenizer is data that a library in Rust believes: what it could not survive is looked for before it gets it, and
where it panics all the same, that becomes an error like any other. A chat template is a program. transformers runs it
in Jinja's sandbox, which keeps it from files and from Python's insides, but not from running for ever or filling the
memory; so the sandbox here also counts each statement, and limits the text that one may be made to hold.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import resource
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from edgerazor.errors import UserError, plain
from edgerazor.untrusted.documents import MOST_ENTRIES_OF_TOKENIZERS, parse_json, read_bytes

#: Bytes of a tokenizer's files; the largest that we know have 35 MB.
MOST_BYTES = 200_000_000
#: Numbers of tokens, and any other number in a tokenizer: lengths to pad to, above all.
MOST_IDS, MOST_NUMBER = 10_000_000, 100_000_000
#: Letters of a template, and of any text or list that it makes; statements that it may run, and seconds.
MOST_SOURCE, MOST_LETTERS, MOST_STEPS, MOST_SECONDS = 1_000_000, 10_000_000, 500_000, 10.0
#: Bytes that rendering may add to the process.
MOST_MEMORY = 256 * 2**20


# Tokenizers -------------------------------------------------------------------------------------------------------


def open_tokenizer(folder: Path, *, trust_remote_code: bool, **options: Any) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a folder, or with `gguf_file` that of a file in it, through transformers.

    Args:
        folder: with the tokenizer's files.
        trust_remote_code: run Python code that comes with it.
        options: others of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: it is larger than any, claims an impossible size, or makes the library panic.
        Exception: whatever else transformers has against it.
    """
    bound_templates()
    if "gguf_file" not in options:
        for file in sorted(folder.glob("*")):
            if file.is_file() and file.name.startswith(("tokenizer", "vocab", "merges", "added_", "special_", "chat_")):
                check_size(file)
        if (folder / "tokenizer.json").is_file():
            content = read_bytes(folder / "tokenizer.json", MOST_BYTES)
            check_tokenizer_json(parse_json(content, most_entries=MOST_ENTRIES_OF_TOKENIZERS))
    with without_panics():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        number = getattr(tokenizer, name)
        if not (number is None or isinstance(number, int)):
            raise ValueError(f"its {name} is {plain(number, 40)}")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise ValueError(f"its model_max_length is {plain(longest, 40)}")
    check_templates(tokenizer.chat_template)
    return tokenizer


def check_templates(templates: Any) -> None:
    """ValueError where chat templates are neither text nor texts by name; transformers takes what a file holds."""
    if templates is None or templates == []:
        return
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if not isinstance(template, str):
            raise ValueError(f"its chat template is {plain(template, 40)}; expected text")
        try:
            template.encode()
        except UnicodeEncodeError:
            raise ValueError("its chat template has half of a surrogate pair; expected valid text") from None


def check_size(file: Path) -> None:
    """Refuse a tokenizer's file that is larger than any.

    Raises:
        ValueError: it is.
    """
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{file.name} has {size:,} bytes; expected at most {MOST_BYTES:,}")


def check_tokenizer_json(content: Any) -> None:
    """Refuse a parsed tokenizer.json that names a size for which memory would be allocated.

    Raises:
        ValueError: it does; the message names the number.
    """
    if not isinstance(content, dict):
        raise ValueError("tokenizer.json holds no object")
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        for token, number in vocabulary.items():
            if not isinstance(number, int) or not 0 <= number < MOST_IDS:
                raise ValueError(f"tokenizer.json has {plain(number, 40)} as the number of {plain(token, 40)!r}")
    pending = [value for name, value in content.items() if name != "model"]
    pending += [value for name, value in (model or {}).items() if name not in ("vocab", "merges")] if vocabulary else []
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            charsmap = value.get("precompiled_charsmap")
            if isinstance(charsmap, str):
                check_charsmap(charsmap)
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, int) and abs(value) > MOST_NUMBER:
            raise ValueError(f"tokenizer.json has the number {plain(value, 40)}; expected at most {MOST_NUMBER:,}")


def check_charsmap(text: str) -> None:
    """Refuse SentencePiece's map of characters where it claims to be longer than it is.

    Raises:
        ValueError: it does.
    """
    raw = base64.b64decode(text, validate=True)
    if text and (len(raw) < 4 or struct.unpack("<I", raw[:4])[0] > len(raw) - 4):
        raise ValueError("the map of characters in tokenizer.json is cut short")


@contextlib.contextmanager
def without_panics() -> Iterator[None]:
    """Turns a panic of a library in Rust into a ValueError, without the report that Rust writes to file 2."""
    try:
        with _captured_stderr():
            yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"the library that reads it gave up ({plain(error, 200)})") from None


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked: that exception is no `Exception`, and only its class name tells."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _captured_stderr() -> Iterator[None]:
    """What is written to file 2 comes to `sys.stderr` when all is well, and nowhere after a panic."""
    with tempfile.TemporaryFile() as captured:
        try:
            before = os.dup(2)
        except OSError:  # closed
            yield
            return
        sys.stderr.flush()
        os.dup2(captured.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            captured.seek(0)
            if not panicked and (text := captured.read().decode("utf-8", "replace")):
                sys.stderr.write(text)


@contextlib.contextmanager
def reading(what: str = "the text") -> Iterator[None]:
    """Around calls of a tokenizer: UserError where it cannot read a text, as one without an unknown token cannot.

    Raises:
        UserError: the library gave up; it raises bare `Exception`s.
    """
    try:
        with without_panics():
            yield
    except Exception as error:
        if not cannot_read(error):
            raise
        raise UserError(
            f"The model's tokenizer cannot read {what}: {plain(error, 200).rstrip('.')}.",
            "Its tokenizer.json is damaged, or has no token for what it does not know.",
        ) from None


def cannot_read(error: BaseException) -> bool:
    """Whether the error says that a tokenizer cannot read a text: its library raises bare exceptions for that."""
    return type(error) is Exception or (isinstance(error, ValueError) and "the library that reads it" in str(error))


# Templates --------------------------------------------------------------------------------------------------------


class _Budget(threading.local):
    """What is left to the template that this thread renders; None where it renders none."""

    steps: int | None = None
    end: float = 0.0

    def step(self) -> str:
        """Count one statement, and refuse one too many."""
        if self.steps is not None:
            self.steps -= 1
            if self.steps < 0:
                raise TemplateError(f"it takes more than {MOST_STEPS:,} steps")
            if time.monotonic() > self.end:
                raise TemplateError(f"it takes more than {MOST_SECONDS:.0f} seconds")
        return ""


_budget = _Budget()


def _bounded(value: Any) -> Any:
    """The value, if it is not too long."""
    if isinstance(value, str | bytes | list | tuple | dict) and len(value) > MOST_LETTERS:
        raise TemplateError(f"it makes a text of more than {MOST_LETTERS:,} letters")
    return value


class BoundedTemplate(Template):
    """A template whose rendering ends."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        with rendering():
            return str(_bounded(super().render(*args, **kwargs)))

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        with rendering():
            total = 0
            for piece in super().generate(*args, **kwargs):
                total += len(piece)
                if total > MOST_LETTERS:
                    raise TemplateError(f"it makes a text of more than {MOST_LETTERS:,} letters")
                yield piece


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """Around a rendering: a full budget of steps and seconds, and a limit to the memory of the process."""
    before = _budget.steps, _budget.end
    _budget.steps, _budget.end = MOST_STEPS, time.monotonic() + MOST_SECONDS
    try:
        with _limited_memory():
            yield
    except MemoryError:
        raise TemplateError(f"it needs more than {MOST_MEMORY // 2**20} MB of memory") from None
    finally:
        _budget.steps, _budget.end = before


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Where the system says how much there is, no more than `MOST_MEMORY` beyond it: then Python raises MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with open("/proc/self/statm", encoding="ascii") as status:
            most = int(status.read().split()[0]) * resource.getpagesize() + MOST_MEMORY
    except OSError:
        most = 0
    if not most or (soft != resource.RLIM_INFINITY and soft < most):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' sandbox, with a step before each statement and a bound to each value that is kept or filtered."""

    template_class = BoundedTemplate
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > 10**6 or abs(right) > 64):
            raise TemplateError("it raises large numbers to a power")
        lengths = [len(operand) for operand in (left, right) if isinstance(operand, str | bytes | list | tuple)]
        if operator == "*" and lengths and lengths[0] * max(left if isinstance(left, int) else right, 0) > MOST_LETTERS:
            raise TemplateError(f"it makes a text of more than {MOST_LETTERS:,} letters")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja's
        _budget.step()
        if any(isinstance(value, int) and abs(value) > MOST_LETTERS for value in (*args, *kwargs.values())):
            raise TemplateError("it asks for something too long")
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _stepping(super()._parse(source, name, filename))


def _stepping(template: nodes.Template) -> nodes.Template:
    """A template's tree in which each statement is a step, and each assignment is of a bounded value."""
    for assignment in list(template.find_all(nodes.Assign)):
        lineno = assignment.lineno
        assignment.node = nodes.Filter(assignment.node, "bounded", [], [], None, None, lineno=lineno)
    for parent in [template, *template.find_all(nodes.Node)]:
        for field in ("body", "else_"):
            statements = getattr(parent, field, None)
            if field == "body" and isinstance(parent, nodes.For) and not statements:
                parent.body = [_step(parent.lineno)]
            elif isinstance(statements, list):
                setattr(
                    parent, field, [part for statement in statements for part in (_step(statement.lineno), statement)]
                )
    return template


def _step(line: int) -> nodes.Node:
    attribute = nodes.EnvironmentAttribute("step", lineno=line)
    return nodes.ExprStmt(nodes.Call(attribute, [], [], None, None, lineno=line), lineno=line)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that neither takes nor makes something too long."""

    @functools.wraps(function)  # with the mark of what Jinja hands over first
    def checked(*args: Any, **kwargs: Any) -> Any:
        _budget.step()
        if any(isinstance(value, int) and abs(value) > MOST_LETTERS for value in (*args, *kwargs.values())):
            raise TemplateError("it asks for something too long")
        for value in args[:2]:
            _bounded(value)
        return _bounded(function(*args, **kwargs))

    return checked


@functools.cache
def bound_templates() -> None:
    """From here on, every template that transformers renders (lm-eval's prompts, too) is bounded."""
    theirs = chat_template_utils._compile_jinja_template
    chat_template_utils._compile_jinja_template = functools.lru_cache(maxsize=64)(
        functools.partial(_compile, _environment(theirs("").environment))
    )


def _environment(theirs: Any) -> BoundedEnvironment:
    """What transformers gives its templates, in an environment of ours."""
    ours: Any = theirs.overlay(optimized=False)  # nothing is computed while compiling
    ours.__class__ = BoundedEnvironment
    ours.template_class = BoundedTemplate
    ours.intercepted_binops = BoundedEnvironment.intercepted_binops
    ours.step = _budget.step
    for extension in ours.extensions.values():
        if hasattr(extension, "activate_tracker"):  # of {% generation %} blocks: of the copy, which is what renders
            ours.activate_tracker = extension.activate_tracker
    ours.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    ours.filters = {name: _checked(function) for name, function in theirs.filters.items()} | {"bounded": _bounded}
    return ours


def _compile(environment: BoundedEnvironment, source: str) -> Template:
    if len(source) > MOST_SOURCE:
        raise TemplateError(f"it has {len(source):,} letters; expected at most {MOST_SOURCE:,}")
    with rendering():
        return environment.from_string(source)
