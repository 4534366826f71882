"""A tiny job through the command line, in this process or in another."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from edgerazor import cli

#: A whole training in about a second: float32, because results are compared between machines and processes; the plan
#: that measures nothing, and few tokens where a test asks for one that does.
SMALL: dict[str, Any] = {
    "threads": 1,
    "data": {"sequence_length": 32},
    "calibrate": {"bits": 1.88, "plan": "interleave", "group_size": 40, "sequences": 4, "sensitivity_tokens": 64},
    "distill": {
        "steps": 5,
        "batch_size": 2,
        "evaluate_every": 2,
        "evaluate_sequences": 2,
        "checkpoint_every": 2,
        "precision": "float32",
        "learning_rate": 1e-3,
    },
    "eval": {"text_sequences": 2},
    "bench": {"rounds": 1, "prefill_tokens": 8, "decode_tokens": 2},
}


def load_script(path: Path) -> ModuleType:
    """A script of recipes/ as a module of its own name, which finds those beside it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def with_template(model: Path, folder: Path, template: str, **tokens: Any) -> Path:
    """A copy of a model whose tokenizer has a chat template, and special tokens of its own."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(path: Path, model: Path, text: Path | None, **sections: Any) -> Path:
    """A recipe file like `SMALL`; fields of its sections are replaced one by one."""
    values: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    values["model"] = str(model)
    if text is not None:
        values["data"]["train"] = [{"file": str(text)}]
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields} if isinstance(fields, dict) else fields
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


class Outcome:
    """What a command left: its exit code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


def make_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("distill", ...)` calls the command line in this process."""

    def run(*words: Any) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["edgerazor", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 0, printed.out, printed.err)

    return run


def call(*words: Any) -> Outcome:
    """Calls the command line in this process, for fixtures that several tests share."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["edgerazor", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    code = ended.value.code
    return Outcome(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def spawn(*words: Any, code: str = "", launcher: tuple[str, ...] = (), cwd: Path | None = None) -> Outcome:
    """The same in another process; `code` is Python to run there before the command."""
    entry = ("-m", "edgerazor") if not code else ("-c", f"{code}\nfrom edgerazor.cli import main\nmain()")
    command = [sys.executable, *launcher, *entry, *map(str, words)] if not launcher else [*launcher, *entry]
    command += map(str, words) if launcher else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=600, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder but the lock: its hash and modification time."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): (sha256(file), file.stat().st_mtime_ns) for file in files}


def metrics(work: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl but for the time they took."""
    lines = (work / "distill" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def move_zero_points(job: Path) -> None:
    """Put the zero points of a student where a long training may: a short one leaves them at 0, give or take."""
    for file in (job / "distill").glob("*/model.safetensors"):
        tensors = load_file(file)
        names = sorted(name for name in tensors if name.endswith("zero_point"))
        assert any(tensors[name] != 0 for name in names)  # trained, where anything is cut off
        for name, value in zip(names, itertools.cycle((2.4, -3.0, 0.3, 90.0)), strict=False):
            tensors[name] = torch.tensor(value)
        save_file(tensors, file, {"format": "pt"})
