"""A packed model answers over HTTP, as OpenAI's interface has it, until a signal ends it."""

from __future__ import annotations

import os
from pathlib import Path

from edgerazor import runtime
from edgerazor.console import Console
from edgerazor.errors import usage_error
from edgerazor.packed import PackedModel
from edgerazor.recipe import Recipe
from edgerazor.report.serve_result import ServeResult
from edgerazor.server import Engine, build_app, is_loopback, listen
from edgerazor.server import run as serve_forever
from edgerazor.server.listening import url_of

#: Where the key may stand instead of on the command line, which everybody on the machine can read.
KEY_VARIABLE = "EDGERAZOR_API_KEY"


def api_key(word: str | None, host: str) -> str | None:
    """The key that clients have to give: that of the command line, or of the environment.

    Raises:
        UserError: there is none where one is needed, or one that no header can hold.
    """
    key = word if word is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and (not key or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise usage_error("An API key is printable ASCII text, without blanks at its ends.")
    if key is None and not is_loopback(host):
        raise usage_error(
            f"A server that listens on {host} can be reached from other machines, so it needs a key.",
            f"Put one into the environment: `{KEY_VARIABLE}=... edgerazor serve`; or --api-key KEY.",
        )
    return key


def run(folder: Path, recipe: Recipe, key: str | None, console: Console, mmap: bool = False) -> None:
    """Load the model, say where it is served, and answer until a signal ends it.

    Args:
        folder: packed.
        recipe: its section `serve`, and threads.
        key: see `api_key`.
        console: the address goes to stdout, all else to stderr.
        mmap: read weights in place.

    Raises:
        UserError: as `runtime.load`; or the address cannot be listened on.
    """
    settings = recipe.serve
    key = api_key(key, settings.host)
    listening = listen(settings.host, settings.port)  # first: loading takes long
    with listening:
        model = runtime.load(folder, threads=recipe.threads, mmap=mmap)
        if model.note:
            console.say(model.note)
        engine = Engine(model, settings, settings.name or model_name(folder))
        app = build_app(engine, key, is_loopback(settings.host), console)
        result = ServeResult(
            url=url_of(listening),
            model=engine.name,
            folder=str(folder),
            engine=model.engine,
            kernel=model.kernel,
            threads=model.threads,
            note=model.note,
            context=engine.context,
            max_sequences=settings.max_sequences if model.engine == "native" else 1,
            needs_key=key is not None,
        )
        console.result(result, f"{result.url}/v1 serves {result.model}; chat: {result.url}/")
        serve_forever(app, engine, listening, console)


def model_name(folder: Path) -> str:
    """The name of a packed model: that of its teacher, or of the folder where it is not known."""
    teacher = PackedModel.open(folder).header.provenance.get("teacher")
    name = teacher.get("name") if isinstance(teacher, dict) else teacher
    words = str(name).rstrip("/").split("/")[-1] if name else ""
    plain = "".join(letter for letter in words if letter.isascii() and (letter.isalnum() or letter in "._-"))
    return plain or folder.resolve().name
