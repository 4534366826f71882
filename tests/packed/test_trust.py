"""Packed folders whose other files are damaged: whatever opens them says so in one sentence and exits with 1."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgerazor
from edgerazor.errors import FAILED, UserError
from helpers.tiny_job import Run, write_recipe


@pytest.fixture(scope="module")
def packed_folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgerazor import pipeline, recipe
    from edgerazor.console import Console
    from edgerazor.workdir import WorkDir

    place = tmp_path_factory.mktemp("trust")
    values = recipe.load(write_recipe(place / "r.yaml", llama, None, pack={"source": "teacher"}))
    pipeline.run("pack", recipe.build(values), WorkDir(place / "work"), Console(quiet=True))
    return place / "work" / "packed"


@pytest.fixture
def folder(packed_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_folder, tmp_path / "packed"))


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Nobody waits for a pipe."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def by_text(text: str | bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def link(target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return change


def special(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


#: What may stand in the place of any JSON file.
TEXTS = ["", "{", "[]", "null", "3", '"x"', "\xff", "[" * 100_000, '{"a":' * 50_000, "\x00" * 100]
ODD: dict[str, Callable[[Path], None]] = {
    **{f"text {text[:8]!r}": by_text(text.encode("latin-1")) for text in TEXTS},
    "pipe": special(os.mkfifo),
    "folder": special(Path.mkdir),
    "link to nowhere": link("/nowhere/at/all"),
    "link to itself": link("config.json"),
    "device": link("/dev/zero"),
}


def refused(folder: Path, run: Run, commands: tuple[tuple[Any, ...], ...]) -> None:
    """`edgerazor.load` and the commands fail with one sentence."""
    with pytest.raises(UserError) as failure:
        edgerazor.load(folder)
    assert failure.value.code == FAILED
    assert failure.value.message.isprintable()
    assert len(failure.value.message) < 1000
    for command in commands:
        outcome = run(*command)
        assert outcome.code == FAILED, (command, outcome.code, outcome.err)
        assert outcome.err.startswith("Error: ")
        assert outcome.out == ""


@pytest.mark.parametrize("name", ODD)
def test_a_damaged_configuration(name: str, folder: Path, run: Run) -> None:
    ODD[name](folder / "config.json")
    shown = (("show", folder),) if name not in ("text '[]'", "text 'null'", "text '3'", "text '\"x\"'") else ()
    refused(folder, run, shown)


def change(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    *path, last, value = path_and_value

    def apply(config: dict[str, Any]) -> None:
        place = config
        for step in path:
            place = place[step]
        place[last] = value

    return apply


Q = "quantization_config"
LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "model_type": change("model_type", "nothing"),
    "model_type, a number": change("model_type", 3),
    "hidden_size": change("hidden_size", 97),
    "hidden_size, a word": change("hidden_size", "wide"),
    "hidden_size, huge": change("hidden_size", 1 << 62),
    "layers": change("num_hidden_layers", 10**9),
    "layers, a word": change("num_hidden_layers", "many"),
    "layers, in a list": lambda config: config.update(model_type="qwen3", num_hidden_layers=1 << 40),
    "layers of a part": change("text_config", {"num_hidden_layers": 1 << 40}),
    "labels": change("num_labels", 1 << 40),
    "layers, none": change("num_hidden_layers", None),
    "head_dim, huge": change("head_dim", 1 << 40),
    "vocab_size": change("vocab_size", 10**12),
    "method": change(Q, "quant_method", "other"),
    "method, a list": change(Q, "quant_method", []),
    "settings, a word": change(Q, "none"),
    "activation_bits": change(Q, "activation_bits", "8\n\x1b[31m" + "x" * 5000),
    "thresholds": change(Q, "thresholds", [0.5] * 7),
    "adaptive": change(Q, "adaptive_tokens", "causal"),
    "group_size": change(Q, "group_size", -1),
    "surprise": change(Q, "group_size", {"a": ["b"]}),
}


@pytest.mark.parametrize("name", LIES)
def test_a_configuration_that_lies(name: str, folder: Path, run: Run) -> None:
    config = json.loads((folder / "config.json").read_text())
    LIES[name](config)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, run, ())


@pytest.mark.parametrize("name", ["text ''", "text '{'", "text 'null'", "pipe", "folder", "link to nowhere", "device"])
@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
def test_other_damaged_files(name: str, file: str, folder: Path, run: Run) -> None:
    ODD[name](folder / file)
    refused(folder, run, (("show", folder),) if file == "model.safetensors" else ())


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1000, -1])
def test_truncated_weights(size: int, folder: Path, run: Run) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    refused(folder, run, (("show", folder), ("show", folder, "--json")))


def test_a_terminal_is_not_written_to(folder: Path, run: Run) -> None:
    """Provenance may say anything, but not to the terminal."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    header = json.loads(entries["__metadata__"]["edgerazor"])
    header["provenance"]["teacher"] = {"name": "\x1b]0;owned\x07\n\x9b2J"}
    header["provenance"]["a\x1b[2Jb"] = "\x1b[2J"
    text = json.dumps(header)
    entries["__metadata__"] |= {"edgerazor": text, "edgerazor_sha256": hashlib.sha256(text.encode()).hexdigest()}
    new = json.dumps(entries).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])
    shown = run("show", folder)
    assert shown.code == 0
    assert not set("\x1b\x07\x9b") & set(shown.out + shown.err)
    assert run("show", folder, "--json").json()["provenance"]["teacher"] == header["provenance"]["teacher"]
