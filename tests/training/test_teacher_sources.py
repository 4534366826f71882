"""Teachers from elsewhere: streamed from disk they teach what resident ones do, and served ones as far as can be."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgerazor import losses, models
from edgerazor.errors import UserError
from edgerazor.losses import Outputs, StepTotals, step_counts
from edgerazor.models import StreamedModel
from edgerazor.training import Captures, ServedTeacher, Server, TeacherGoneError, served_teacher
from helpers.serving import serving, write_served_model
from helpers.teacher_server import StandIn, teaching
from helpers.tiny_job import Run, metrics, sha256, spawn, write_recipe
from helpers.tiny_models import FAMILIES, ModelMaker

FLOAT32 = torch.float32


def streamed(folder: Path) -> StreamedModel:
    return StreamedModel(str(folder), None, torch.device("cpu"), FLOAT32, False)


def batches() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(2, 200, shape, generator=draw) for shape in ((2, 19), (1, 11), (2, 19))]


# --- streamed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_states_are_those_of_the_whole_model(family: str, make_model: ModelMaker, tmp_path: Path) -> None:
    make_model(tmp_path / "model", family)
    model, _ = models.load(tmp_path / "model", dtype=FLOAT32)
    if family == "lfm3":  # transformers renames a tensor of it on the way
        with pytest.raises(UserError, match="under another name, so it cannot be streamed"):
            streamed(tmp_path / "model")
        return
    stream = streamed(tmp_path / "model")
    passed = stream.forward(batches(), hidden_layers=(0, 1, 2))
    assert all(weight.is_meta for layer in stream.blocks.layers for weight in layer.parameters())
    for input_ids, states in zip(batches(), passed, strict=True):
        with torch.no_grad():
            expected = model(input_ids=input_ids, output_hidden_states=True)
        for layer, state in states.hidden_states.items():
            torch.testing.assert_close(state, expected.hidden_states[layer], rtol=0, atol=0)
        logits = Outputs(states.last_hidden_state, head=stream.head).logits(torch.arange(input_ids.numel()))
        torch.testing.assert_close(logits, expected.logits.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_pass_reads_each_weight_once_for_all_batches(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, names = streamed(llama), []
    read = StreamedModel._read
    monkeypatch.setattr(StreamedModel, "_read", lambda self, name: names.append(name) or read(self, name))
    stream.forward(batches())
    assert len(names) == len(set(names)) == len([name for name in stream._places if ".layers." in name])


LOSSES = [
    {"name": "eakld"},
    {"name": "lafd", "options": {"select": "batch", "count": 1}},
    {"name": "attention_kl", "options": {"layers": [2]}},
]


def test_a_streamed_training_comes_to_the_same(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    """All kinds of losses; a streamed training also goes on where a resident one was, since both are one to it."""
    settings = {"losses": LOSSES, "accumulation": 2, "steps": 3, "evaluate_every": 1, "evaluate_sequences": 5}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "resident").code == 0
    done = run("distill", "--recipe", recipe, "--teacher-source", "streamed", "--work", tmp_path / "streamed")
    assert done.code == 0, done.err
    for ours, theirs in zip(metrics(tmp_path / "streamed"), metrics(tmp_path / "resident"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    file = Path("distill", "last", "model.safetensors")
    ours, theirs = (load_file(tmp_path / name / file) for name in ("streamed", "resident"))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6


@pytest.fixture(scope="module")
def larger(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("larger") / "larger"
    make_model(folder, "qwen3", hidden_size=128, num_hidden_layers=3)
    return folder


def test_another_model_teaches(
    run: Run, llama: Path, larger: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wider and deeper one, of another family; from memory or from disk it is the same."""
    settings = {"losses": [{"name": "forward_kl"}], "steps": 2, "evaluate_every": 1}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    words = ("distill", "--recipe", recipe, "--teacher", larger)
    for source in ("resident", "streamed"):
        done = run(*words, "--teacher-source", source, "--work", tmp_path / source)
        assert done.code == 0, done.err
    for ours, theirs in zip(metrics(tmp_path / "streamed"), metrics(tmp_path / "resident"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert run("distill", "--recipe", recipe, "--work", tmp_path / "own").code == 0
    assert metrics(tmp_path / "own")[0]["kl"] != pytest.approx(metrics(tmp_path / "resident")[0]["kl"], rel=0.1)
    monkeypatch.setattr("edgerazor.devices.resident_memory", lambda: 0)  # that of the tests grows meanwhile
    dry = run(*words, "--teacher-source", "streamed", "--dry-run", "--json", "--work", tmp_path / "dry").json()
    assert dry["memory_bytes"] < run(*words, "--dry-run", "--json", "--work", tmp_path / "dry").json()["memory_bytes"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"losses": [{"name": "lafd"}]}, "num_hidden_layers differ: 2 and 3"),
        ({"recording": "somewhere"}, "A recording takes the teacher's place"),
        ({"reconstruct": {"steps": 2}}, "Layers are reconstructed from those of the recipe's own model"),
        ({"teacher_source": "http://127.0.0.1:9/v1"}, "A served teacher is the one that its server computes"),
        ({"teacher_source": "elsewhere"}, "it is resident, streamed, or an address"),
        ({"served_model": "m"}, "names a model of a server, and there is none"),
    ],
)
def test_what_does_not_go_together_is_refused(
    run: Run, llama: Path, larger: Path, text_file: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill={"teacher": str(larger), **settings})
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job", "--dry-run")
    assert refused.code in (1, 2)
    assert words in refused.err


@pytest.mark.parametrize(
    ("damage", "words"),
    [("missing", "has no tensor"), ("nan", "holds NaN"), ("short", "is damaged"), ("shape", "do not fit")],
)
def test_a_damaged_streamed_teacher_is_one_sentence(llama: Path, tmp_path: Path, damage: str, words: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    tensors, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "nan":
        tensors[name][3, 4] = float("nan")
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=words):
        streamed(folder).forward(batches())


#: Limits the address space to what is taken after all imports, and so much more.
LIMITED = """
import resource
import edgerazor.stages.distill, accelerate, transformers.models.llama.modeling_llama
taken = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmSize')) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + {spare}, taken + {spare}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the address space is read from Linux's /proc")
def test_a_teacher_larger_than_the_address_space_teaches(
    llama: Path, text_file: Path, make_model: ModelMaker, tmp_path: Path
) -> None:
    """1 GB on disk, inside 900 MB above what the program takes itself; resident, it does not fit."""
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 56, "num_attention_heads": 16}
    make_model(tmp_path / "large", "llama", torch.bfloat16, **shape)
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 1000e6
    settings = {"losses": [{"name": "forward_kl"}], "steps": 2, "evaluate_every": 2}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, distill=settings)
    assert spawn("calibrate", "--recipe", recipe, "--work", tmp_path / "job").code == 0
    words = ("distill", "--work", tmp_path / "job", "--teacher", tmp_path / "large", "--teacher-source")
    limited = LIMITED.format(spare=900_000_000)
    refused = spawn(*words, "resident", code=limited)
    assert refused.code == 1
    done = spawn(*words, "streamed", code=limited)
    assert done.code == 0, done.err
    assert len(metrics(tmp_path / "job")) == 1
    shutil.rmtree(tmp_path / "large")


# --- served ------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(llama: Path) -> StandIn:
    return StandIn(*models.load(llama, dtype=FLOAT32))


def test_a_served_teacher_gives_what_recordings_of_its_top_do(stand_in: StandIn, llama: Path) -> None:
    """All 300 tokens make it exact; with 20 the gradient is near it."""
    input_ids = batches()[0]
    labels = input_ids.clone()
    labels[0, 15:] = -100  # padding is not asked for
    batch = {"input_ids": input_ids, "labels": labels}
    head = stand_in.model.get_output_embeddings()
    with torch.no_grad(), models.final_states(stand_in.model, "lm_head") as states:
        stand_in.model(input_ids=input_ids)
    resident = Outputs(states[0], head=losses.Head(head.weight))
    totals = StepTotals(*step_counts(labels))

    def gradient(name: str, teacher: Outputs) -> tuple[float, torch.Tensor]:
        student_states = (
            states[0] + 0.3 * torch.randn(states[0].shape, generator=torch.manual_seed(1))
        ).requires_grad_()
        loss = losses.make(name)
        statistics = {
            key: float(value) / totals.samples for key, value in loss.teacher_statistics(teacher, labels).items()
        }
        value = loss(
            Outputs(student_states, head=losses.Head(head.weight)),
            teacher,
            labels,
            StepTotals(totals.samples, totals.tokens, statistics),
        )
        return float(value.detach()), torch.autograd.grad(value, student_states)[0]

    with teaching(stand_in) as url:
        server = Server(url)
        whole, top = (
            ServedTeacher(server, 300, torch.device("cpu"), count).outputs(batch, Captures()) for count in (300, 20)
        )
    assert server.model == "larger"
    assert [len(prompt) for prompt in stand_in.requests[0]["prompt"]] == [15, 19]
    for name in ("forward_kl", "reverse_kl", "eakld", "cakld", "js"):
        value, exact = gradient(name, resident)
        same, near = gradient(name, whole), gradient(name, top)
        assert same[0] == pytest.approx(value, rel=2e-3)
        assert float((same[1] - exact).norm()) < 5e-3 * float(exact.norm())
        assert torch.nn.functional.cosine_similarity(near[1].flatten(), exact.flatten(), 0) > 0.8


def served_recipe(tmp_path: Path, llama: Path, text_file: Path, url: str, **settings: Any) -> Path:
    values = {"losses": [{"name": "forward_kl"}], "teacher_source": url, "evaluate_every": 9, "steps": 4, **settings}
    return write_recipe(tmp_path / "r.yaml", llama, text_file, distill=values)


def test_a_server_that_goes_away_ends_a_training_that_can_go_on(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy server is asked again; one that is gone is one sentence, and the training goes on to the same student."""
    monkeypatch.setattr(served_teacher, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(Server.__init__, "__defaults__", ("", 60.0, (0.0, 0.0), lambda seconds: None))
    monkeypatch.setenv(served_teacher.KEY_VARIABLE, "secret")
    with teaching(stand_in) as url:
        recipe = served_recipe(tmp_path, llama, text_file, url)
        assert run("distill", "--recipe", recipe, "--work", tmp_path / "whole").code == 0
        assert set(stand_in.keys) == {"Bearer secret"}
        stand_in.requests.clear()
        stand_in.answer_with = lambda number: 503 if number == 2 or number >= 5 else None
        gone = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
        assert gone.code == 1
        assert "does not answer (status 503: not now). Everything up to step 2 is saved." in gone.err
        assert "secret" not in gone.err
        stand_in.answer_with = lambda number: None
        resumed = run("distill", "--work", tmp_path / "job")
        assert resumed.code == 0
        assert "goes on from step 2" in resumed.err
    file = Path("distill", "last", "model.safetensors")
    assert sha256(tmp_path / "job" / file) == sha256(tmp_path / "whole" / file)
    assert metrics(tmp_path / "job") == metrics(tmp_path / "whole")


def test_what_a_server_cannot_teach_is_refused(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with teaching(stand_in) as url:
        recipe = served_recipe(tmp_path, llama, text_file, url, losses=[{"name": "lafd"}])
        refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
        assert (refused.code, "The loss lafd compares what stays inside" in refused.err) == (2, True)
        recipe = served_recipe(tmp_path, llama, text_file, url, losses=[{"name": "js", "temperature": 2.0}])
        assert "servers give distributions at 1" in run("distill", "--recipe", recipe, "--work", tmp_path / "job").err
        recipe = served_recipe(tmp_path, llama, text_file, url)
        encode = stand_in.tokenizer.encode
        monkeypatch.setattr(stand_in.tokenizer, "encode", lambda text: [token + 1 for token in encode(text)])
        refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
        assert (refused.code, "The tokenizer of larger on http://127.0.0.1" in refused.err) == (2, True)
        stand_in.answer_with = lambda number: 400
        refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job")
        assert (refused.code, "refuses to answer: status 400: not now." in refused.err) == (1, True)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [{"index": 0, "logprobs": None}]},
        {"choices": [{"index": 0, "logprobs": {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None]}}]},
        {"choices": [{"index": 0, "logprobs": {"tokens": ["token_id:1"], "token_logprobs": [], "top_logprobs": []}}]},
        {"choices": [{"index": "x", "logprobs": {}}]},
    ],
)
def test_an_unreadable_answer_is_one_sentence(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("http://127.0.0.1:9/v1", "m")
    monkeypatch.setattr(Server, "ask", lambda *_args: answer)
    with pytest.raises(UserError, match="cannot be used"):
        server.prompt_log_probs([[1, 2]], 5)


def test_nobody_listens() -> None:
    slept: list[float] = []
    with pytest.raises(TeacherGoneError, match="does not answer"):
        Server("http://127.0.0.1:9/v1", "m", waits=(1.0, 2.0), sleep=slept.append).ask("GET", "/models")
    assert slept == [1.0, 2.0]
    with pytest.raises(UserError, match="no address of a server"):
        Server("http://user:key@host/v1")


def test_our_own_server_teaches(make_model: ModelMaker, tmp_path: Path) -> None:
    """`edgerazor serve` gives the numbers of tokens and their log-probabilities, of a packed model."""
    import edgerazor

    folder = write_served_model(make_model, tmp_path)
    tokenizer = models.load_tokenizer(folder)
    prompt = batches()[0][0].tolist()
    with serving(edgerazor.load(folder, engine="transformers")) as served:
        server = Server(f"{served.url}/v1")
        served_teacher.check_tokenizer(server, tokenizer, "the student")
        (said,) = server.prompt_log_probs([prompt], 5)
    assert said.tokens == prompt
    assert all(len(top) in (5, 6) for top in said.top[1:])
    assert all(0 < sum(map(math.exp, top.values())) < 1.001 for top in said.top[1:])
