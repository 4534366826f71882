"""`edgerazor generate` and Model.generate: greedy text is transformers', pieces are the text."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from edgerazor import runtime, transformers_plugin
from edgerazor.cli import main
from edgerazor.errors import FAILED, INTERRUPTED, USAGE, UserError
from edgerazor.runtime import Generation, Model, generation
from edgerazor.stages import generate as stage
from edgerazor.stages.generate import GenerateResult
from helpers.packed_folders import all_of, write_packed
from helpers.tiny_job import Run, spawn, with_template
from helpers.tiny_models import VOCABULARY, ModelMaker, mostly_slow

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

PROMPT = "Nora took the ball"
#: So many that a text of all of them takes some time, and does not fit into a pipe.
POSITIONS = 100_000
#: Seconds without a word from a terminal after which none is awaited any more.
PATIENCE = 300
TEMPLATE = """{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


def pieces_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the tokens look like, a blank as Ġ."""
    return list(tokenizer.convert_ids_to_tokens(list(range(VOCABULARY))))


@pytest.fixture(scope="module")
def packed(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A packed model with a chat template that writes words, and goes on until it is stopped."""
    place = tmp_path_factory.mktemp("generate")
    model = make_model(place / "plain", "llama", max_position_embeddings=POSITIONS)
    words = torch.tensor([each.removeprefix("Ġ").isascii() and each[-1:].isalpha() for each in pieces_of(tokenizer)])
    with torch.no_grad():  # no part of a character and no end of the text is ever the likeliest
        model.get_output_embeddings().weight[~words] = 0
    model.save_pretrained(place / "plain")
    with_template(place / "plain", place / "model", TEMPLATE)
    write_packed(place / "packed", place / "model", all_of("int4"))
    return place / "packed"


@pytest.fixture(scope="module")
def model(packed: Path) -> Model:
    return runtime.load(packed, threads=1)


def with_files(folder: Path, copy: Path, **files: dict[str, Any]) -> Model:
    """A copy of a packed model some of whose JSON files have other values."""
    shutil.copytree(folder, copy)
    for name, values in files.items():
        path = copy / f"{name}.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(stored | values))
    return runtime.load(copy, threads=1)


# --- Model.generate ----------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@torch.no_grad()
def test_greedy_text_is_that_of_transformers(packed: Path, model: Model, penalty: float) -> None:
    theirs, tokenizer = transformers_plugin.load(packed)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    found = theirs.generate(ids, max_new_tokens=30, do_sample=False, repetition_penalty=penalty, eos_token_id=1)
    made = model.generate(PROMPT, max_tokens=30, repetition_penalty=penalty)
    assert made.tokens == found[0, ids.shape[1] :].tolist()
    assert made.text == tokenizer.decode(made.tokens)
    assert made.finish_reason == "length"
    assert made.prompt_tokens == ids.shape[1]
    assert made.cached_tokens == 0


def test_pieces_are_the_text_and_some_at_a_time_are_those_one_by_one(model: Model) -> None:
    stream = model.stream(PROMPT, max_tokens=40)
    assert stream.generation.finish_reason is None
    pieces = list(stream)
    made = stream.generation
    assert "".join(pieces) == made.text
    assert all(pieces)
    one_by_one = model.generate(PROMPT, max_tokens=40, stop="never comes up")  # else tokens would be thrown away
    assert one_by_one.tokens == made.tokens
    drawn = model.generate(PROMPT, max_tokens=40, temperature=1e-9)
    assert drawn.tokens == made.tokens


def test_a_seed_decides_what_is_drawn(model: Model) -> None:
    def drawn(seed: int) -> Generation:
        return model.generate(PROMPT, seed, max_tokens=20, temperature=1.5, top_p=0.95, top_k=100, min_p=0.001)

    assert drawn(3).tokens == drawn(3).tokens
    assert len({tuple(drawn(seed).tokens) for seed in range(4)}) == 4


def test_times_add_up(model: Model) -> None:
    made = model.generate(PROMPT, max_tokens=12)
    assert 0 < made.prefill_seconds <= made.first_token_seconds
    assert made.decode_seconds > 0
    assert made.tokens_per_second == pytest.approx(11 / made.decode_seconds)
    alone = model.generate(PROMPT, max_tokens=1)
    assert alone.tokens_per_second is None


def test_the_text_ends_before_a_stop_string_across_tokens(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=40)
    texts = [model.tokenizer.decode(whole.tokens[:n]) for n in range(41)]
    border = len(texts[20])  # a stop string of the end of one token and the beginning of the next
    stop = whole.text[border - 2 : border + 2]
    made = model.generate(PROMPT, max_tokens=40, stop=[stop, "never comes up"])
    assert made.text == whole.text[: whole.text.find(stop)]
    assert made.finish_reason == "stop"
    assert made.tokens == whole.tokens[: len(made.tokens)]
    assert stop in model.tokenizer.decode(made.tokens)
    assert stop not in model.tokenizer.decode(made.tokens[:-1])


@pytest.mark.parametrize("file", ["generation_config", "config", "tokenizer"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.01}])
def test_the_model_ends_its_text(
    packed: Path, model: Model, tmp_path: Path, file: str, options: dict[str, float]
) -> None:
    whole = model.generate(PROMPT, max_tokens=30, **options)
    end = whole.tokens[12]
    if file == "tokenizer":
        ending = with_files(packed, tmp_path / "copy")
        ending.tokenizer.eos_token = ending.tokenizer.convert_ids_to_tokens(end)
    else:
        ending = with_files(packed, tmp_path / "copy", **{file: {"eos_token_id": [299, end]}})
    made = ending.generate(PROMPT, max_tokens=30, **options)
    assert made.finish_reason == "eos"
    assert made.tokens == whole.tokens[: whole.tokens.index(end)]
    assert made.text == model.tokenizer.decode(made.tokens)


def test_the_context_has_an_end(packed: Path, model: Model, tmp_path: Path) -> None:
    short = with_files(packed, tmp_path / "copy", config={"max_position_embeddings": 24})
    count = len(model.tokenizer(PROMPT)["input_ids"])
    for options in ({}, {"temperature": 0.1}):
        made = short.generate(PROMPT, max_tokens=100, **options)
        assert made.finish_reason == "context"
        assert made.prompt_tokens + len(made.tokens) == 24
    assert short.generate(PROMPT, max_tokens=24 - count).finish_reason == "length"
    with pytest.raises(UserError, match=r"tokens, which leaves no room for an answer: the model has 24"):
        short.generate(" ball" * 24)


def test_an_empty_prompt_begins_as_texts_do(model: Model) -> None:
    made = model.generate("", max_tokens=5)
    assert made.prompt_tokens == 1
    ids = [model.tokenizer.bos_token_id]
    assert made.tokens[0] == int(model.logits(ids)[-1].argmax())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_p": 0.0, "temperature": 1}, "`generate.top_p` is 0.0; expected a number above 0 and of at most 1"),
        ({"min_p": 2, "temperature": 1}, "`generate.min_p` is 2; expected a number from 0 to 1"),
        ({"temperature": "warm"}, "`generate.temperature` is 'warm'; expected a number"),
        ({"temperature": -1}, "`generate.temperature` is -1; expected a number of at least 0"),
        ({"temperature": float("nan")}, "`generate.temperature` is nan; expected a"),
        ({"max_tokens": 0}, "`generate.max_tokens` is 0; expected a whole number of at least 1"),
        ({"repetition_penalty": 0}, "`generate.repetition_penalty` is 0; expected a number above 0"),
        ({"top_k": 5}, "`top_k` draws tokens, and temperature 0 takes the likeliest"),
        ({"stop": ["a", ""]}, "`stop` is empty text"),
        ({"system": "Be kind."}, "`system` is a message of a chat"),
        ({"top_q": 5}, "unknown field `generate.top_q`"),
        ({"seed": -1}, "`seed` is -1; expected a whole number of at least 0"),
    ],
)
def test_a_wrong_option_is_one_sentence(model: Model, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        model.generate(PROMPT, **options)
    assert raised.value.message.startswith("The options of generate")
    assert sentence in raised.value.message
    assert raised.value.code == USAGE


@pytest.mark.parametrize("prompt", [5, b"text", "half \ud800 of a pair", [{"role": "user", "content": "Hi"}]])
def test_a_prompt_that_is_no_text_is_one_sentence(model: Model, prompt: Any) -> None:
    with pytest.raises(UserError, match=r"^(A|The) prompt is ") as raised:
        model.generate(prompt)
    assert raised.value.code == USAGE


# --- chat --------------------------------------------------------------------------------------


def test_a_chat_is_what_the_template_writes(model: Model) -> None:
    made = model.generate("Who?", max_tokens=8, chat=True, system="Be kind.")
    ids = model.tokenizer("system:Be kind.</s>user:Who?</s>assistant:", add_special_tokens=False)["input_ids"]
    assert made.prompt_tokens == len(ids)
    session = model.session()
    session.feed(ids)
    assert made.tokens == session.greedy(8)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    assert model.generate(messages, max_tokens=8, chat=True).tokens == made.tokens


def test_the_token_that_ends_a_turn_ends_an_answer(packed: Path, model: Model, tmp_path: Path) -> None:
    first = model.generate("Who?", max_tokens=8, chat=True).tokens[0]
    shutil.copytree(packed, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(packed)
    end = tokenizer.convert_ids_to_tokens(first)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = TEMPLATE.replace("</s>", end)
    tokenizer.save_pretrained(tmp_path / "copy")
    ending = runtime.load(tmp_path / "copy", threads=1)
    assert first in generation.turn_ends(ending.tokenizer)
    assert first not in generation.end_tokens(ending)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "repetition_penalty": 1.2}])
def test_a_chat_remembers_and_reads_only_what_is_new(model: Model, options: dict[str, float]) -> None:
    chat = model.chat(max_tokens=6, system="Be kind.", **options)
    messages: list[dict[str, str]] = [{"role": "system", "content": "Be kind."}]
    known = 0
    for question in ("Who?", "Where then?", "Why?"):
        messages.append({"role": "user", "content": question})
        stream = chat.ask(question)
        said = "".join(stream)
        made = stream.generation
        assert made.cached_tokens >= known
        if not options:  # a sampler of its own would draw other numbers
            fresh = model.generate(messages, max_tokens=6, chat=True)
            assert (fresh.tokens, fresh.prompt_tokens, fresh.cached_tokens) == (made.tokens, made.prompt_tokens, 0)
        messages.append({"role": "assistant", "content": said})
        known = made.prompt_tokens
    assert known > 20


def test_an_answer_that_was_broken_off_stays_as_far_as_it_came(model: Model) -> None:
    chat = model.chat(max_tokens=30)
    stream = chat.ask("Who?")
    said = next(stream) + next(stream)
    list(chat.ask("Where?"))
    assert chat.messages[1] == {"role": "assistant", "content": said}
    fresh = model.generate(chat.messages, max_tokens=30, chat=True)
    assert chat._latest is not None
    assert chat._latest.generation.tokens == fresh.tokens


def test_without_a_template_there_is_no_chat(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        model.generate("Who?", chat=True)
    with pytest.raises(UserError, match="no chat template"):
        model.chat()


# --- the command -------------------------------------------------------------------------------


def test_the_text_is_on_stdout_and_the_rest_on_stderr(run: Run, packed: Path, model: Model) -> None:
    done = run("generate", PROMPT, "--model", packed, "--max-tokens", 12, "--threads", 1)
    assert done.code == 0
    assert done.out == model.generate(PROMPT, max_tokens=12).text + "\n"
    assert done.err.count("\n") == 1
    assert "12 tokens in" in done.err
    assert "ended at --max-tokens" in done.err
    quiet = run("generate", PROMPT, "--model", packed, "--max-tokens", 12, "--quiet")
    assert (quiet.out, quiet.err) == (done.out, "")


def test_options_arrive(run: Run, packed: Path, model: Model) -> None:
    words = "--temperature 1.2 --top-k 50 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.1 --seed 5".split()
    options = {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 5}
    done = run("generate", PROMPT, "--model", packed, "--max-tokens", 15, *words, "--chat", "--system", "Be.", "-q")
    assert done.out.rstrip("\n") == model.generate(PROMPT, max_tokens=15, chat=True, system="Be.", **options).text
    whole = model.generate(PROMPT, max_tokens=15).text
    stopped = run("generate", PROMPT, "--model", packed, "--max-tokens", 15, "--stop", "zz", "--stop", whole[6:9], "-q")
    assert stopped.out == whole[: whole.find(whole[6:9])] + "\n"


def test_json_is_one_object_of_the_schema(run: Run, packed: Path, model: Model) -> None:
    done = run("generate", PROMPT, "--model", packed, "--max-tokens", 12, "--json", "--quiet", "--threads", 1)
    found = GenerateResult.model_validate(done.json())
    made = model.generate(PROMPT, max_tokens=12)
    assert (found.text, found.tokens, found.finish_reason) == (made.text, made.tokens, "length")
    assert (found.engine, found.kernel, found.threads) == (model.engine, model.kernel, 1)
    assert found.prompt == PROMPT
    assert found.load_seconds > 0
    schema = run("show", "schema").json()["generate"]
    assert set(schema["properties"]) == done.json().keys()
    assert set(schema["required"]) == done.json().keys()


@pytest.mark.parametrize("words", [(), ("-",)])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_pipe_gives_the_prompt(
    run: Run, packed: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], end: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"Héllo\n{end}".encode())))
    done = run("generate", *words, "--model", packed, "--max-tokens", 1, "--json")
    assert done.json()["prompt"] == ("Héllo\n" if end else "Héllo")


@pytest.mark.parametrize(
    ("words", "given", "sentence"),
    [
        (["--max-tokens", 0], b"", "--max-tokens is 0; expected a whole number of at least 1"),
        ([PROMPT, "--temperature", -1], b"", "--temperature is -1.0; expected a number of at least 0"),
        ([PROMPT, "--top-p", 0.5], b"", "`top_p` draws tokens, and temperature 0 takes the likeliest"),
        ([PROMPT, "--stop", ""], b"", "`stop` is empty text"),
        ([PROMPT, "--system", "Be"], b"", "`system` is a message of a chat"),
        ([PROMPT, "--threads", 0], b"", "--threads is 0; expected a whole number from 1 to 1024"),
        ([PROMPT, "--seed", -1], b"", "--seed is -1"),
        ([], b"", "There is no prompt: standard input is empty"),
        (["-"], b"\n", "There is no prompt: standard input is empty"),
        ([], b"\xff", "is not UTF-8 text"),
        ([b"\xff".decode("utf-8", "surrogateescape")], b"", "The prompt is not UTF-8 text"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(
    run: Run, packed: Path, monkeypatch: pytest.MonkeyPatch, words: list[Any], given: bytes, sentence: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    done = run("generate", *words, "--model", packed)
    assert done.code == USAGE
    assert sentence in done.err
    assert done.out == ""
    assert done.err.count("\n") <= 2


def test_only_packed_models_write(run: Run, packed: Path, llama: Path, tmp_path: Path) -> None:
    def refused(*words: Any) -> str:
        done = run("generate", PROMPT, *words)
        assert done.code == USAGE
        return done.err

    assert f"edgerazor pack {llama} --bits 4" in refused("--model", llama)
    assert "There is no folder" in refused("--model", tmp_path / "nowhere")
    assert "There is no folder" in refused("--model", llama / "config.json")
    assert "holds no packed model" in refused("--work", tmp_path)
    assert "both name" in refused("--work", tmp_path, "--model", packed)
    shutil.copytree(packed, tmp_path / "packed")
    assert f"--work {tmp_path}" in refused("--model", tmp_path)
    assert run("generate", PROMPT, "--work", tmp_path, "--max-tokens", 2).code == 0


def test_a_recipe_says_how(run: Run, packed: Path, tmp_path: Path, model: Model) -> None:
    shutil.copytree(packed, tmp_path / "packed")
    (tmp_path / "recipe.yaml").write_text("seed: 4\ngenerate: {max_tokens: 7, temperature: 1.5}\n")
    done = run("generate", PROMPT, "--work", tmp_path, "--json")
    assert done.json()["tokens"] == model.generate(PROMPT, 4, max_tokens=7, temperature=1.5).tokens
    greedy = run("generate", PROMPT, "--work", tmp_path, "--temperature", 0, "--json")
    assert greedy.json()["tokens"] == model.generate(PROMPT, max_tokens=7).tokens


def test_a_reader_that_goes_away_is_no_traceback(packed: Path) -> None:
    words = ["-m", "edgerazor", "generate", PROMPT, "--model", str(packed), "--max-tokens", str(POSITIONS)]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(3)) == 3
        process.stdout.close()
        assert process.wait(60) == FAILED
        assert process.stderr.read() == b""


@pytest.mark.parametrize("json_mode", mostly_slow([False, True], True))
def test_ctrl_c_keeps_what_was_written(packed: Path, json_mode: bool) -> None:
    words = [PROMPT, "--model", str(packed), "--max-tokens", str(POSITIONS), *(["--json"] if json_mode else [])]
    # the signal comes when some pieces are out, as from a user who reads along
    code = """
import os, signal
from edgerazor.runtime import Stream
plain, count = Stream.__next__, iter(range(10**9))
def interrupting(self):
    if next(count) == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return plain(self)
Stream.__next__ = interrupting"""
    done = spawn("generate", *words, code=code)
    assert done.code == INTERRUPTED
    assert "Traceback" not in done.err
    assert done.err.endswith("Error: Interrupted.\n")
    if json_mode:
        assert done.json()["finish_reason"] == "interrupted"
        assert len(done.json()["tokens"]) >= 5
    else:
        assert len(done.out) > 5
        assert done.out.endswith("\n")


def test_a_terminal_gets_no_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b[2J\x07\x9b\r\nb\té 👩\u200d👩\u200d👧"
    stage.write(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    stage.write(text)
    assert capsys.readouterr().out == "a?[2J??\nb\té 👩\u200d👩\u200d👧"


def test_what_stdout_cannot_write_is_replaced(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    stage.write("é!")
    assert raw.getvalue() == b"?!"


class Terminal:
    """A user at a terminal: what is typed, and what is seen."""

    def __init__(self, *words: Any) -> None:
        ours, theirs = pty.openpty()
        self.file = ours
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        command = [sys.executable, "-m", "edgerazor", *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def until(self, text: str) -> str:
        """What is seen until a text comes up."""
        while text not in self.seen:
            self.read(text)
        before, _, self.seen = self.seen.partition(text)
        return before

    def read(self, text: str) -> None:
        """See more, where a text is still to come."""
        ready, _, _ = select.select([self.file], [], [], PATIENCE)
        try:
            assert ready
            self.seen += os.read(self.file, 4096).decode("utf-8", "replace")
        except (AssertionError, OSError):  # nothing comes, or it is closed
            self.process.kill()
            raise AssertionError(f"{text!r} did not come up in {self.seen!r}") from None

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())


def test_a_chat_in_the_terminal(packed: Path) -> None:
    user = Terminal("generate", "--chat", "--model", packed, "--max-tokens", 5)
    user.until("Ctrl-D ends the chat.")
    user.until("> ")
    user.type("Who?\n")
    user.until("ended at --max-tokens")
    user.until("> ")
    user.type("Where?\n")
    assert "more known) in" in user.until("ended at --max-tokens")
    user.until("> ")
    user.type("\x04")
    assert user.process.wait(30) == 0


@pytest.mark.slow
def test_ctrl_c_breaks_off_an_answer_and_then_the_chat(packed: Path) -> None:
    user = Terminal("generate", "--chat", "--model", packed, "--max-tokens", POSITIONS - 100)
    user.until("> ")
    user.type("Who?\n")
    user.until("Who?")
    while len(user.seen) < 20:
        user.read("an answer")
    user.process.send_signal(signal.SIGINT)
    user.until("interrupted")
    user.until("> ")
    user.process.send_signal(signal.SIGINT)
    user.until("Interrupted.")
    assert user.process.wait(30) == INTERRUPTED


def test_a_terminal_without_a_prompt_is_told_so(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    for words in ([], ["--chat", "--json"]):
        monkeypatch.setattr(sys, "argv", ["edgerazor", "generate", "--model", str(packed), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == USAGE
        assert "There is no prompt." in capsys.readouterr().err
