"""Damaged inputs of every kind, given to the commands that read them: an answer, or one sentence.

    make fuzz-inputs                       20,000 damaged inputs (N=...), or as many as FUZZ_SECONDS=... allow
    PYTHONPATH=tests python tests/fuzz/fuzz_inputs.py --only 4711   one again: its command and where its input lies

Real inputs lie in memory: a tiny model's folder, its packed, GGUF and MLX forms, a recipe, texts and chats, items of a
task. A worker process per core damages one of them, writes it, and has a child of it call the command line as the
console script does, with a command that only reads it. *The law*: exit code 0, 1 or 2 (or 3, of a gate of `eval`); at
most 3 KB on stderr, without control characters or a traceback; an answer within 15 seconds, which with the imports that
a worker has behind it makes 20; less than 1 GB of memory more than before. The seconds are those of the child's own CPU
time, so that other work on the machine does not count.

A worker has run every command once, on whole inputs of another name, before it forks: what is imported, compiled and
registered at first use is there already. A child runs some commands one after the other, until one of them ends it or
breaks the law; that one is run again in a child of its own, and counts as it behaves there.

Each damaged input follows from its number and the seed alone.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from edgerazor import terminal

if __name__ == "__main__":
    terminal.prepare()  # before libraries keep stderr for themselves, as the console script does

import typer
from fuzz_packed import NASTY, change_tree, dump, encoded, rewrite_bytes

from edgerazor import cli
from helpers.fuzzing import Folder, Subject, main
from helpers.tiny_models import SHAPE, sentences, tiny_tokenizer, write_tiny_model

#: Seconds of CPU time for a command, and of waiting for a child that neither computes nor ends.
SECONDS, PATIENCE = 15, 120
#: Commands that run in one process, one after the other; a breach of the law counts when it happens alone, too.
SHARED = 100
#: Bytes that a command may take, and addresses that the machine is kept from giving it for the sake of its other users.
MEMORY, ADDRESSES = 10**9, 4 * 10**9
LONGEST = 3000
#: Header of a folder in memory that has none.
NO_HEADER: Any = None

# What is damaged --------------------------------------------------------------------------------------------------

MODEL, PACKED, GGUF, MLX = "model", "packed", "model.gguf", "mlx"
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
RECIPE = """model: model
threads: 1
data:
  train:
    - {file: text.jsonl, column: text}
    - {file: chat.jsonl, weight: 0.5}
  sequence_length: 16
calibrate: {bits: 4, plan: interleave, group_size: 40, sequences: 2, sensitivity_tokens: 32}
distill: {steps: 2, batch_size: 2}
eval: {tasks: [arc_easy], task_data: tasks, limit: 2}
"""
TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nora."}]
ITEM = {"id": "1", "question": "Where?", "choices": {"text": ["mill", "barn"], "label": ["A", "B"]}, "answerKey": "A"}
BASE = Path("base")  # in the place of a worker: what the others refer to


def make_base(place: Path) -> None:
    """The whole inputs, all of one tiny model."""
    base = place / BASE
    base.mkdir()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    write_tiny_model(tokenizer, base / MODEL, "llama")
    end_often(base / MODEL / "model.safetensors")
    with contextlib.chdir(base):
        quietly(
            "pack", MODEL, "--bits", "4", "--group-size", "32", "--work", "job", "--export", "gguf", "--allow-lossy"
        )
        shutil.move("job/packed", PACKED)
        for file in Path("job").rglob("*.gguf"):
            shutil.move(file, GGUF)
        shutil.rmtree("job")
        make_mlx()
        Path("text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines(40)))
        Path("chat.jsonl").write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": TALK * 3}) + "\n")
        Path("text.txt").write_text("\n".join(lines(40)))
        Path("recipe.yaml").write_text(RECIPE)
        Path("tasks").mkdir()
        Path("tasks/arc_easy.jsonl").write_text((json.dumps(ITEM) + "\n") * 3)


def end_often(weights: Path) -> None:
    """A model that ends its answers soon, so that `data` has some to write."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["lm_head.weight"][SHAPE["eos_token_id"]] *= 40
    save_file(tensors, weights, {"format": "pt"})


def warm_up(place: Path) -> None:
    """All that happens at first use, once for all children; under other names, so that nothing of an input is known."""
    import datasets  # noqa: F401
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import lm_eval.tasks  # noqa: F401

    from edgerazor import importers, pipeline, runtime, tasks  # noqa: F401
    from edgerazor.packaging import recompression  # noqa: F401
    from edgerazor.stages import generate, pack, show, write_data  # noqa: F401

    sys.modules["tqdm"].tqdm.monitor_interval = 0  # of transformers: a thread, which no child would have
    typer.main.get_command = functools.cache(typer.main.get_command)
    shutil.copytree(place / BASE, place / "whole", symlinks=True)
    known = [words for commands in KINDS.values() for words in commands]
    for words in {tuple(line): line for line in known}.values():
        with contextlib.chdir(place / "whole"):
            quietly(*words)
            shutil.rmtree("job", ignore_errors=True)
            for file in Path().glob("out.jsonl*"):
                file.unlink()
    shutil.rmtree(place / "whole")
    gc.collect()
    gc.freeze()  # children do not touch, and copy, what they do not use


def lines(count: int) -> list[str]:
    return sentences(count).splitlines()


def make_mlx() -> None:
    """A folder as MLX writes it: the model's, with some matrices in its format of 4 bits."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, MLX)
    tensors = load_file(Path(MODEL) / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "embed_tokens.weight"))]:
        rows, cols = tensors[name].shape
        bare = name.removesuffix(".weight")
        tensors[name] = torch.randint(2**30, (rows, cols // 8), dtype=torch.int32).view(torch.uint32)
        tensors[f"{bare}.scales"] = torch.full((rows, cols // 32), 0.01, dtype=torch.float16)
        tensors[f"{bare}.biases"] = torch.full((rows, cols // 32), -0.08, dtype=torch.float16)
    save_file(tensors, Path(MLX) / "model.safetensors", {"format": "mlx"})
    config = json.loads((Path(MLX) / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (Path(MLX) / "config.json").write_text(json.dumps(config))


#: kind -> commands that read it; they run beside the whole inputs, with the damaged one in its place.
KINDS: dict[str, list[list[str]]] = {
    MODEL: [
        ["pack", MODEL, "--bits", "4", "--group-size", "32", "--work", "job", "--dry-run"],
        ["pack", MODEL, "--bits", "4", "--group-size", "32", "--work", "job"],
        ["calibrate", "--recipe", "recipe.yaml", "--work", "job", "--dry-run"],
        ["distill", "--recipe", "recipe.yaml", "--work", "job", "--dry-run"],
        ["data", MODEL, "--prompts", "chat.jsonl", "--tokens", "4", "--answer-tokens", "40", "--out", "out.jsonl"],
    ],
    PACKED: [
        ["show", PACKED],
        ["show", PACKED, "--verify"],
        ["generate", "Nora", "--model", PACKED, "--max-tokens", "4", "--threads", "1"],
        ["generate", "Nora", "--model", PACKED, "--chat", "--max-tokens", "4", "--threads", "1"],
        ["eval", PACKED, "--tasks", "arc_easy", "--task-data", "tasks", "--limit", "1"],
        ["pack", PACKED, "--export", "gguf", "--dry-run"],
    ],
    GGUF: [
        ["pack", GGUF, "--work", "job"],
        ["pack", GGUF, "--bits", "4", "--group-size", "32", "--work", "job"],
        ["calibrate", GGUF, "--bits", "4", "--group-size", "32", "--data", "text.txt", "--work", "job", "--dry-run"],
    ],
    MLX: [["pack", MLX, "--work", "job"]],
    "recipe.yaml": [
        *[["calibrate", "--recipe", "recipe.yaml", "--work", "job", "--dry-run"]] * 3,
        ["distill", "--recipe", "recipe.yaml", "--work", "job", "--dry-run"],
    ],
    "text.jsonl": [["calibrate", "--recipe", "recipe.yaml", "--work", "job", "--dry-run"]],
    "chat.jsonl": [
        ["distill", "--recipe", "recipe.yaml", "--work", "job", "--dry-run"],
        ["data", MODEL, "--prompts", "chat.jsonl", "--tokens", "4", "--answer-tokens", "40", "--out", "out.jsonl"],
    ],
    "text.txt": [["eval", PACKED, "--data", "text.txt"]],
    "tasks": [["eval", PACKED, "--tasks", "arc_easy", "--task-data", "tasks", "--limit", "2"]],
}


def make_folders(place: Path) -> list[Folder]:
    """One of each kind, and the whole inputs beside them."""
    make_base_apart(place)
    warm_up(place)
    return read_folders(place / BASE)


def make_base_apart(place: Path) -> None:
    """In a child: what it computes, and the threads that it takes, are not to be there when the others fork."""
    child = os.fork()
    if child == 0:
        try:
            make_base(place)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def read_folders(base: Path) -> list[Folder]:
    made = []
    for kind in KINDS:
        path = base / kind
        files = [path] if path.is_file() else sorted(path.iterdir())
        made.append(Folder(kind, {file.name: file.read_bytes() for file in files}, NO_HEADER))
    return made


# Damage ------------------------------------------------------------------------------------------------------------


def pick(draw: random.Random, folder: Folder) -> str:
    """A file to damage; weights, which have a fuzzer of their own, seldom."""
    names = sorted(folder.files)
    return draw.choices(names, [1 if name.endswith(".safetensors") else 5 for name in names])[0]


def change_bytes(draw: random.Random, folder: Folder) -> None:
    name = pick(draw, folder)
    alone = Folder(folder.kind, {name: folder.files[name]}, NO_HEADER)
    rewrite_bytes(draw, alone)
    folder.files |= alone.files


def change_json(draw: random.Random, folder: Folder) -> None:
    """A value, name or item of a JSON, JSONL or YAML file; bytes of any other."""
    name = pick(draw, folder)
    content = folder.files[name]
    if name.endswith(".json"):
        folder.files[name] = encoded(draw, dump(change_tree(draw, json.loads(content))))
    elif name.endswith(".jsonl"):
        rows = content.splitlines()
        place = draw.randrange(len(rows))
        rows[place] = encoded(draw, dump(change_tree(draw, json.loads(rows[place]))))
        folder.files[name] = b"\n".join(rows)
    elif name.endswith(".yaml"):
        import yaml

        folder.files[name] = encoded(draw, dump(change_tree(draw, yaml.safe_load(content))))
    else:
        change_bytes(draw, folder)


def insert_text(draw: random.Random, folder: Folder) -> None:
    """Strange letters, commands for a terminal, and languages' own tricks, in a file of any kind."""
    name = pick(draw, folder)
    content = folder.files[name]
    start = draw.randrange(len(content) + 1)
    tricks = [str(text).encode(errors="surrogatepass") for text in NASTY if isinstance(text, str)]
    tricks += [
        b"\x1b[31m",
        b"\xc2\x9b2J",
        "\u202e".encode(),
        b"\r",
        b"&a [*a]",
        b"!!int abc",
        b"2001-99-99",
        b"9" * 5000,
    ]
    tricks += [b"{% raw", b"{{ 9**9**9 }}", b"[" * 5000, b"<<: *x", b"\xff\xfe", b'"\\ud800"', b"{" * 5000]
    folder.files[name] = content[:start] + draw.choice(tricks) + content[start:]


def change_template(draw: random.Random, folder: Folder) -> None:
    """A chat template that refuses, fails, loops or grows; where there is a tokenizer."""
    loops = "".join("{% for x in range(99999) %}" for _ in range(4)) + "{% endfor %}" * 4
    templates = [
        loops,
        "{{ raise_exception('\x1b[31m' + 'x' * 9999) }}",
        "{{ 'a' * 10**9 }}",
        "{{ x.y.z }}",
        "{% if",
        "",
    ]
    templates += [
        "{% set n = namespace(x='aa') %}{% for i in range(90) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ]
    templates += [
        "{{ 'x'.__class__.__mro__ }}",
        "{{ messages[7].content }}",
        "{{ '%999999999d' | format(1) }}",
        "\x1b[2J",
    ]
    name = "tokenizer_config.json"
    if name not in folder.files:
        change_bytes(draw, folder)
        return
    template: Any = draw.choice(templates)
    if draw.random() < 0.1:
        template = draw.choice([1, [], {}, [{"name": "default", "template": loops}], {"default": 1}])
    if "chat_template.jinja" in folder.files and isinstance(template, str):
        folder.files["chat_template.jinja"] = template.encode(errors="surrogatepass")
    else:
        folder.files.pop("chat_template.jinja", None)
        folder.files[name] = json.dumps(json.loads(folder.files[name]) | {"chat_template": template}).encode()


def change_index(draw: random.Random, folder: Folder) -> None:
    """An index of shards beside weights; right but for one change, or wholly wrong."""
    if "model.safetensors" not in folder.files:
        change_bytes(draw, folder)
        return
    tricks = [
        "../model.safetensors",
        "/etc/passwd",
        "model.bin",
        "",
        ".",
        "\x1b[31m",
        "a" * 5000,
        1,
        None,
        [],
        "\ud800",
    ]
    tree: Any = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model.safetensors"}}
    tree["weight_map"]["model.norm.weight"] = draw.choice(["model.safetensors", *tricks])
    folder.files["model.safetensors.index.json"] = encoded(draw, dump(change_tree(draw, tree)))


DAMAGES: dict[Callable[[random.Random, Folder], None], int] = {
    change_json: 10,
    change_bytes: 3,
    insert_text: 4,
    change_template: 2,
    change_index: 1,
}

# Commands ---------------------------------------------------------------------------------------------------------


def quietly(*words: str) -> None:
    """A command in this process, which must succeed; what it says goes nowhere."""
    before, sys.argv = sys.argv, ["edgerazor", *words]
    try:
        with devnull():
            cli.main()
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise RuntimeError(f"{words} ended with {ended.code}") from None
    finally:
        sys.argv = before


@contextlib.contextmanager
def devnull() -> Iterator[None]:
    """What is written to files 1 and 2 goes nowhere."""
    copies = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), copies, strict=True):
            os.dup2(before, number)
            os.close(before)
        os.close(nowhere)


def command(folder: Folder) -> list[str]:
    """The command for an input, which follows from its bytes."""
    known = KINDS[folder.kind]
    return known[sum(map(len, folder.files.values())) % len(known)]


def check(path: Path, folder: Folder) -> str:
    """`done` or `refused`, of the command for a damaged input; `unharmed` where nothing is damaged.

    Raises:
        AssertionError: the law is broken.
    """
    place = path.parent / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for source in (path.parent / BASE).iterdir():
        (place / source.name).symlink_to(source)
    (place / folder.kind).unlink()
    if (path.parent / BASE / folder.kind).is_file():
        shutil.copyfile(path / folder.kind, place / folder.kind)
    else:
        (place / folder.kind).symlink_to(path)
    words = command(folder)
    answer = RUNNER.run(place, words)
    try:
        check_answer(answer, " ".join(words))
    except AssertionError:
        RUNNER.end()  # once more alone: it is not to answer for what others before it have left
        answer = RUNNER.run(place, words)
        RUNNER.end()
        check_answer(answer, " ".join(words))
    base = path.parent / BASE / folder.kind
    if all(
        (copy := base / name if base.is_dir() else base).exists() and copy.read_bytes() == content
        for name, content in folder.files.items()
    ):
        assert answer.code == 0, f"{' '.join(words)}: exit code {answer.code} of a whole input: {answer.said!r}"
        return "unharmed"
    return "refused" if answer.code else "done"


class Answer(NamedTuple):
    """What a command left.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        said: what it wrote to stderr.
        memory: bytes that it grew by.
    """

    code: int
    said: bytes
    memory: int


def check_answer(answer: Answer, command: str) -> None:
    """AssertionError where the law is broken by the command that `command` names."""
    code, said, memory = answer
    assert code != -signal.SIGXCPU, f"{command}: no answer within {SECONDS} seconds of CPU time: {said[-1500:]!r}"
    codes = (0, 1, 2, 3) if command.startswith("eval") else (0, 1, 2)  # its gates: a damaged model or text is a bad one
    assert code in codes, f"{command}: exit code {code}: {said[-1500:]!r}"
    assert len(said) <= LONGEST, f"{command}: {len(said)} bytes on stderr: {said[:300]!r} ... {said[-300:]!r}"
    text = said.decode("utf-8")
    assert "Traceback" not in text, f"{command}: {text[-1500:]}"
    strange = {character for character in text if not (character.isprintable() or character == "\n")}
    assert not strange, f"{command}: {strange} in {text!r}"
    assert code == 0 or "Error" in text, f"{command}: exit code {code} without a sentence: {text!r}"
    assert memory < MEMORY, f"{command}: {memory / 1e6:.0f} MB of memory"
    assert "There is not enough memory" not in text, f"{command}: {ADDRESSES / 1e9:.0f} GB of addresses: {text!r}"


class Runner:
    """Runs commands in a child of this process, which another takes the place of after `SHARED` commands."""

    def __init__(self) -> None:
        self.child, self.done = 0, 0

    def run(self, place: Path, words: list[str]) -> Answer:
        """What a command leaves, in a folder."""
        signal.setitimer(signal.ITIMER_REAL, 0)  # that of the worker; here CPU time counts
        if self.done == SHARED:
            self.end()
        if not self.child:
            self.start()
        os.write(self.asks, json.dumps([str(place), words]).encode() + b"\n")
        said, deadline = b"", time.monotonic() + PATIENCE
        while not said.endswith(b"\n"):
            if not select.select([self.answers], [], [], max(deadline - time.monotonic(), 0))[0]:
                os.killpg(self.child, signal.SIGKILL)
            if not (piece := os.read(self.answers, 1 << 20)):
                return self.end()
            said += piece
        self.done += 1
        code, text, memory = json.loads(said)
        return Answer(code, text.encode("latin-1"), memory)

    def start(self) -> None:
        """A child, in a group of its own."""
        heard, self.asks = os.pipe()
        self.answers, answer = os.pipe()
        self.stderr = os.memfd_create("stderr")
        sys.stderr.flush()
        self.child, self.done = os.fork(), 0
        if self.child == 0:
            try:
                os.setpgid(0, 0)
                os.close(self.asks)
                os.close(self.answers)
                run_commands(os.fdopen(heard), answer, self.stderr)
            finally:
                os._exit(70)
        with contextlib.suppress(PermissionError):  # it has done so itself
            os.setpgid(self.child, self.child)
        os.close(heard)
        os.close(answer)

    def end(self) -> Answer:
        """End the child, which may have ended by itself; what it left last."""
        if not self.child:
            return Answer(0, b"", 0)
        os.close(self.asks)
        _, status, used = os.wait4(self.child, 0)
        os.close(self.answers)
        with os.fdopen(self.stderr, "rb") as file:
            file.seek(0)
            said = file.read(10**6)
        self.child = 0
        return Answer(os.waitstatus_to_exitcode(status), said, used.ru_maxrss * 1024 - resident())


def resident() -> int:
    """Bytes of memory of this process; those of a child that is forked now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_commands(requests: Iterable[str], answers: int, stderr: int) -> None:
    """Commands as the console script runs them, one after the other; a line of JSON about each."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    before = resident()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES,) * 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 0)
    os.dup2(stderr, 2)
    for line in requests:
        place, words = json.loads(line)
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + SECONDS, -1))
        os.chdir(place)
        code = run_command(words)
        sys.stderr.flush()
        said = os.pread(2, 10**6, 0).decode("latin-1")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        os.write(answers, json.dumps([code, said, memory]).encode() + b"\n")


def run_command(words: list[str]) -> int:
    """The exit code of a command in this process."""
    sys.argv = ["edgerazor", *words]
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


RUNNER = Runner()
SUBJECT = Subject(__file__, make_folders, DAMAGES, check, patience=PATIENCE, last_patience=3 * PATIENCE, memory=None)

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["EDGERAZOR_CACHE"] = "cache"  # in the folder of each command: models that GGUF files become
    main(SUBJECT, __doc__, 20_000, workers=len(os.sched_getaffinity(0)))
