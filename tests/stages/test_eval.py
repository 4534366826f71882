"""The eval stage: scores against the teacher's, metrics on text, collapse, gates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from edgerazor import data, formats, kernels, models, runtime, tasks, transformers_plugin
from edgerazor import job as jobs
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.evaluation import sample, scores, text_metrics
from edgerazor.evaluation.eval_result import EvalResult, TaskResult
from edgerazor.evaluation.evaluated_model import EvaluatedModel, load_packed
from edgerazor.job import JobContext
from edgerazor.packed import PackedModel
from edgerazor.recipe import Recipe, build
from edgerazor.stages import eval as stage
from edgerazor.stages import pack
from edgerazor.tasks.lm_eval_models import EngineLM, TransformersLM
from edgerazor.tasks.quiet import quiet_lm_eval
from edgerazor.workdir import WorkDir
from helpers.engines import Engine
from helpers.task_data import TEXT, make_model, make_tokenizer, write_rows
from helpers.tiny_models import GROUP_SIZE

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

QUIET = Console(quiet=True)
PLACES = ["mill", "barn", "cave", "tower"]


def rigged() -> LlamaForCausalLM:
    """A model that finds every token equally likely, so that greedy decoding always picks the same one."""
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    return model


def items(model: LlamaForCausalLM | None = None, count: int = 20) -> list[dict[str, Any]]:
    """Items like the world's, whose right answers are the model's own (so that it knows all of them)."""
    rows = []
    tokenizer = make_tokenizer()
    for index in range(count):
        row = {
            "prompt": f"Nora went to the {PLACES[index % 4]}. Ben has {index} balls. Nora is in the",
            "choices": PLACES[index % 3 :] + PLACES[: index % 3],
            "gold": 0,
            "combination": [],
        }
        if model is not None:
            prompt = row["prompt"]
            start = len(tokenizer(prompt).input_ids)
            values = []
            for choice in row["choices"]:
                whole = tokenizer(f"{prompt} {choice}").input_ids
                with torch.no_grad():
                    scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                values.append(sum(float(scores[i - 1, whole[i]]) for i in range(start, len(whole))))
            row["gold"] = max(range(4), key=values.__getitem__)
        rows.append(row)
    return rows


@pytest.fixture(params=["native", "transformers"])
def job(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], WorkDir, dict[str, Any]]:
    """A recipe's values, a working directory, and the models that its folders stand for (the teacher's by default)."""
    teacher = make_model()
    teacher.config.save_pretrained(tmp_path / "teacher")  # read to know whether it sees
    write_rows(tmp_path / "world_recall.jsonl", items(teacher))
    (tmp_path / "held.txt").write_text(f"{TEXT}\n" * 40, encoding="utf-8")
    work = WorkDir(tmp_path / "work")
    loaded: dict[str, Any] = {"teacher": teacher}

    def load_packed(folder: Path | str, *_: Any, **__: Any) -> Any:
        return loaded.get(Path(folder).name, teacher), make_tokenizer()

    monkeypatch.setattr(transformers_plugin, "is_packed", lambda folder: Path(folder).name in ("packed", "other"))
    monkeypatch.setattr(transformers_plugin, "load", load_packed)
    monkeypatch.setattr(runtime, "load", lambda folder, **_: Engine(*load_packed(folder), request.param))
    monkeypatch.setattr(jobs.models, "load", lambda *_, **__: (teacher, make_tokenizer()))
    monkeypatch.setattr(jobs.models, "resolve", lambda *_, **__: tmp_path / "teacher")
    monkeypatch.setattr(jobs.RecipeContext, "teacher_fingerprint", "teacher")
    values = {
        "model": "teacher",
        "device": "cpu",
        "data": {"held_out": [{"file": str(tmp_path / "held.txt")}], "sequence_length": 32},
        "eval": {"tasks": ["world_recall"], "task_data": str(tmp_path), "text_sequences": 5, "batch_size": 2},
    }
    return values, work, loaded


def task_result(score: float, teacher: float | None, stderr: float | None, chance: float | None = 0.25) -> TaskResult:
    entry = tasks.LoadedTask("t", None, "t.jsonl", 100, True, chance, "")
    reference = None if teacher is None else tasks.TaskScore(teacher, stderr, "acc", True)
    return scores.compare(entry, tasks.TaskScore(score, 0.01, "acc", True), reference)


# --- against the teacher ---------------------------------------------------------------------


def test_a_teacher_keeps_all_of_itself(job: Any) -> None:
    values, work, _ = job
    result = stage.STAGE.run(JobContext(build(values), work, QUIET))
    assert result.engine == runtime.load(Path("packed")).engine
    one = result.tasks["world_recall"]
    assert (one.score, one.teacher_score, one.retention, one.retention_above_chance) == (1.0, 1.0, 1.0, 1.0)
    assert (one.metric, one.items, one.chance, one.full_set) == ("acc", 20, 0.25, False)
    assert result.average is not None
    assert result.average.retention_above_chance == 1.0
    assert result.text is not None
    assert (result.text.kl, result.text.top1_agreement) == (pytest.approx(0.0, abs=1e-7), 1.0)
    assert result.text.perplexity == pytest.approx(result.text.teacher_perplexity, rel=1e-6)
    assert result.text.tokens == 5 * 31
    assert json.loads(work.result_file("eval").read_text()) == result.model_dump(mode="json")
    assert any("20 items" in note and "not the full set" in note for note in result.notes)


def test_other_folders_are_measured_beside(job: Any, tmp_path: Path) -> None:
    values, work, loaded = job
    loaded["other"] = make_model(seed=1)
    values["compare"] = {"rounded": str(tmp_path / "other")}
    result = stage.STAGE.run(JobContext(build(values), work, QUIET))
    rounded = result.compared["rounded"]
    assert result.text is not None
    assert result.text.kl == pytest.approx(0.0, abs=1e-7)
    assert rounded.text is not None
    assert rounded.text.kl is not None
    assert rounded.text.kl > 0.01
    assert rounded.tasks["world_recall"].teacher_score == 1.0
    assert rounded.tasks["world_recall"].score < 1.0
    console = Console()
    with console.out.capture() as captured:
        console.result(result, *stage.show(result))
    shown = captured.get()
    assert "world_recall (rounded)" in shown
    assert "100.0 %" in shown


def test_retention_by_hand() -> None:
    one = task_result(0.7, 0.85, 0.02)
    assert one.retention == pytest.approx(0.7 / 0.85)
    assert one.retention_above_chance == pytest.approx(0.45 / 0.6)
    assert task_result(0.2, 0.85, 0.02).retention_above_chance == pytest.approx(-0.05 / 0.6)
    for near, stderr in ((0.29, 0.02), (0.25, 0.0), (0.1, 0.001), (0.9, None)):
        assert task_result(0.3, near, stderr).retention_above_chance is None
    assert task_result(0.3, 0.2901, 0.02).retention_above_chance == pytest.approx(0.05 / 0.0401)
    assert task_result(0.3, 0.9, 0.01, chance=None).retention_above_chance is None
    alone = task_result(0.3, None, None)
    assert (alone.teacher_score, alone.retention, alone.retention_above_chance) == (None, None, None)


def test_only_accuracies_have_chance_and_only_gains_are_retained() -> None:
    entry = tasks.LoadedTask("t", None, "t.jsonl", 100, True, 0.25, "")
    lost = scores.compare(entry, tasks.TaskScore(9.0, 0.1, "ppl", False), tasks.TaskScore(8.0, 0.1, "ppl", False))
    assert (lost.chance, lost.retention, lost.retention_above_chance) == (None, None, None)


def test_average_by_hand() -> None:
    results = {"a": task_result(0.7, 0.85, 0.02), "b": task_result(0.5, 0.51, 0.02, chance=0.5)}
    mean, notes = scores.average(results)
    assert mean is not None
    assert mean.score == pytest.approx(0.6)
    assert mean.teacher_score == pytest.approx(0.68)
    assert mean.retention_above_chance == pytest.approx(0.45 / 0.61)
    together = math.sqrt(2) * 0.01  # the tasks' own standard errors
    assert (mean.stderr, mean.retention_stderr) == (pytest.approx(together / 2), pytest.approx(together / 0.61))
    assert len(notes) == 1
    assert notes[0].startswith("b: the teacher is within two standard errors")
    mean, notes = scores.average({"b": results["b"]})
    assert mean is not None
    assert mean.retention_above_chance is None
    mean, notes = scores.average({"c": task_result(0.5, 0.9, 0.01, chance=None)})
    assert mean is None
    assert "without a chance level" in notes[0]
    assert scores.average({}) == (None, [])


def test_least_retention_is_a_gate(job: Any) -> None:
    values, work, loaded = job
    values["eval"]["min_retention"] = 1.0
    assert stage.STAGE.run(JobContext(build(values), work, QUIET)).failures == []
    loaded["packed"] = make_model(seed=1)
    (failure,) = stage.STAGE.run(JobContext(build(values), work, QUIET)).failures
    assert "below the 100.0 %" in failure
    values["eval"]["tasks"] = []
    (failure,) = stage.STAGE.run(JobContext(build(values), work, QUIET)).failures
    assert "no task with a chance level" in failure


# --- text ------------------------------------------------------------------------------------


def plain(model: Any, teacher: Any, batches: list[dict[str, torch.Tensor]], entries: int) -> tuple[float, float, float]:
    """Perplexity, KL and agreement, written as their definitions over all tokens at once in float64."""
    labels = torch.cat([b["labels"] for b in batches])[:, 1:]
    ids = torch.cat([b["input_ids"] for b in batches])
    keep = labels != -100
    with torch.no_grad():
        s, t = (m(ids).logits[:, :-1][keep][:, :entries].double().log_softmax(-1) for m in (model, teacher))
    loss = -s.gather(1, labels[keep][:, None]).mean()
    kl = (t.exp() * (t - s)).sum(-1).mean()
    return float(loss.exp()), float(kl), float((s.argmax(-1) == t.argmax(-1)).double().mean())


@pytest.mark.parametrize("chunk", [1, 320 * 7, 1 << 22])
def test_text_metrics_equal_their_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "CHUNK_LOGITS", chunk)
    model, teacher, tokenizer = make_model(seed=1), make_model(), make_tokenizer()
    model.resize_token_embeddings(330, mean_resizing=False)  # padding of the vocabulary does not count
    ids = torch.randint(0, 300, (3, 21), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[2, 9:] = -100
    batches = [{"input_ids": ids[:2], "labels": labels[:2]}, {"input_ids": ids[2:], "labels": labels[2:]}]
    found = text_metrics.text_metrics(
        EvaluatedModel("m", model, tokenizer), EvaluatedModel("t", teacher, tokenizer), iter(batches), QUIET
    )
    perplexity, kl, agreement = plain(model, teacher, batches, 320)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.top1_agreement == pytest.approx(agreement)
    assert found.tokens == 20 + 20 + 8
    alone = text_metrics.text_metrics(EvaluatedModel("t", teacher, tokenizer), None, iter(batches), QUIET)
    assert alone.perplexity == pytest.approx(found.teacher_perplexity, rel=1e-6)
    assert (alone.teacher_perplexity, alone.kl, alone.top1_agreement) == (None, None, None)


def test_uniform_model_has_the_vocabularys_perplexity() -> None:
    ids = torch.arange(40).view(2, 20)
    batches = iter([{"input_ids": ids, "labels": ids}])
    found = text_metrics.text_metrics(EvaluatedModel("m", rigged(), make_tokenizer()), None, batches, QUIET)
    assert found.perplexity == pytest.approx(320, rel=1e-6)


def test_values_that_are_not_finite_fail(job: Any) -> None:
    values, work, loaded = job
    loaded["packed"] = make_model()
    with torch.no_grad():
        loaded["packed"].model.norm.weight.fill_(math.nan)
    result = stage.STAGE.run(JobContext(build(values), work, QUIET))
    assert result.text is not None
    assert result.text.perplexity is None
    assert any("not finite" in failure for failure in result.failures)


def test_without_text_there_are_no_text_metrics(job: Any) -> None:
    values, work, _ = job
    values["data"] = {}
    result = stage.STAGE.run(JobContext(build(values), work, QUIET))
    assert result.text is None
    assert any("No held-out text" in note for note in result.notes)
    values["eval"]["tasks"] = []
    with pytest.raises(UserError, match="nothing to measure") as error:
        stage.STAGE.run(JobContext(build(values), work, QUIET))
    assert error.value.code == 2


def test_a_share_of_the_training_text_is_held_out(job: Any) -> None:
    values, work, _ = job
    values["data"] = {"train": values["data"]["held_out"], "held_out_fraction": 0.1, "sequence_length": 32}
    values["eval"]["text_sequences"] = 10_000
    result = stage.STAGE.run(JobContext(build(values), work, QUIET))
    tokens = len(make_tokenizer()(f"{TEXT}\n" * 40).input_ids)
    assert result.text is not None
    assert 0.05 * tokens < result.text.tokens < 0.2 * tokens


# --- collapse --------------------------------------------------------------------------------


def test_collapse_is_more_than_four_fifths_of_one_token() -> None:
    assert sample.collapsed([7] * 39 + [1, 2, 3] * 3)  # 39 of 48
    assert not sample.collapsed([7] * 38 + [1, 2] * 5)  # 38 of 48
    assert not sample.collapsed(list(range(48)))
    assert not sample.collapsed([])


def test_greedy_text_is_the_most_probable_and_does_not_end() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    written = sample.greedy(EvaluatedModel("m", model, tokenizer), sample.Prompt([0, 20, 30], asks=False))
    tokens = [0, 20, 30]
    with torch.no_grad():
        for token in written:
            logits = model(torch.tensor([tokens])).logits[0, -1]
            logits[1] = -math.inf  # </s>
            assert token == int(logits.argmax())
            tokens.append(token)
    assert len(written) == sample.SAMPLE_TOKENS
    assert (
        len(sample.greedy(EvaluatedModel("m", model, tokenizer), sample.Prompt(list(range(2, 92)), asks=False)))
        == 96 - 90
    )  # the model's context


def test_an_answer_ends_where_the_model_ends_it_but_not_at_once() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as the first one, which ends nothing
        model.lm_head.weight[1] = 1.0  # </s>, or its opposite
        evaluated = EvaluatedModel("m", model, tokenizer)
        state = model.model(torch.tensor([[0, 20, 30]])).last_hidden_state[0, -1].sum()
        model.lm_head.weight[1] *= state.sign()
    assert len(sample.greedy(evaluated, sample.Prompt([0, 20, 30], asks=False))) == sample.SAMPLE_TOKENS
    assert 1 <= len(sample.greedy(evaluated, sample.Prompt([0, 20, 30], asks=True))) < sample.SAMPLE_TOKENS
    assert sample.beginning(list(range(90)), [0] * 90, start=3) == (list(range(3, 19)), False)
    seen = [5, models.FIRST, models.FIRST + 1, 6, 7, 8]
    assert sample.beginning(seen, [*[data.MASKED] * 4, 7, 8]) == (seen[:4], True)


def test_collapsed_text_fails_unless_the_teacher_writes_the_same(job: Any) -> None:
    values, work, loaded = job
    assert stage.STAGE.run(JobContext(build(values), work, QUIET)).failures == []
    loaded["packed"] = rigged()
    result = stage.STAGE.run(JobContext(build(values), work, QUIET))
    assert any("collapsed" in failure for failure in result.failures)
    with torch.no_grad():
        loaded["teacher"].model.norm.weight.zero_()
    result = stage.STAGE.run(JobContext(build(values), work, QUIET))
    assert not any("collapsed" in failure for failure in result.failures)
    assert any("so does the teacher's" in note for note in result.notes)


# --- one model alone -------------------------------------------------------------------------


def test_one_model_alone(job: Any) -> None:
    values, _, _ = job
    result = stage.evaluate_model("plain", build(values), QUIET)
    one = result.tasks["world_recall"]
    assert (one.score, one.teacher_score, one.retention_above_chance) == (1.0, None, None)
    assert result.average is not None
    assert (result.average.score, result.average.teacher_score) == (1.0, None)
    assert result.text is not None
    assert result.text.kl is None
    assert result.sample
    values["eval"]["min_retention"] = 0.5
    with pytest.raises(UserError, match="compares with a teacher"):
        stage.evaluate_model("plain", build(values), QUIET)


def test_one_model_alone_against_a_teacher(job: Any) -> None:
    values, _, loaded = job
    loaded["packed"] = rigged()
    values["eval"] |= {"against": "teacher", "min_retention": 0.9}
    result = stage.evaluate_model("plain", build(values), QUIET)
    assert result.average is not None
    assert (result.average.teacher_score, result.average.retention_above_chance) == (1.0, 1.0)
    assert result.text is not None
    assert (result.text.kl, result.failures) == (0.0, [])
    assert any(
        "below the 90.0 %" in failure for failure in stage.evaluate_model("packed", build(values), QUIET).failures
    )
    values["eval"]["kv_bits"] = 8
    with pytest.raises(UserError, match="its activations and cache are decided"):
        stage.evaluate_model("packed", build(values), QUIET)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_decoded_weights_with_rounded_inputs_are_the_packed_model(
    family: str, make_model: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what another tool rounded, saved as plain weights, is measured exactly as a packed model is."""
    make_model(tmp_path / "teacher", family)
    values: dict[str, Any] = {
        "model": str(tmp_path / "teacher"),
        "calibrate": {"bits": 2, "group_size": GROUP_SIZE},
        "pack": {"source": "teacher"},
        "data": {"held_out": [{"file": str(text_file)}], "sequence_length": 32},
        "eval": {"against": str(tmp_path / "teacher"), "text_sequences": 4},
    }
    work = WorkDir(tmp_path / "job")
    pack.STAGE.run(JobContext(build(values), work, QUIET))
    plain, tokenizer = models.load(tmp_path / "teacher")
    packed = PackedModel.open(work.folder("pack"))
    for name in packed.header.matrices:
        matrix = packed.matrix(name)
        plain.get_submodule(name).weight.data.copy_(formats.decode_matrix(matrix.encoded, matrix.spec))
    plain.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    result = stage.evaluate_model(str(work.folder("pack")), build(values), QUIET)
    assert result.kernel == kernels.name()
    assert [note for note in result.notes if "kernels" in note] == (
        [] if kernels.is_native() else [kernels.note("reference")]
    )
    monkeypatch.setenv("EDGERAZOR_ISA", "reference")  # native sums have another order
    slow = stage.evaluate_model(str(work.folder("pack")), build(values), QUIET)
    assert slow.kernel == "reference"
    assert kernels.note("reference") in slow.notes
    expected = slow.text
    weights_only = stage.evaluate_model(str(tmp_path / "plain"), build(values), QUIET).text
    values["eval"] |= {"activation_bits": 8, "kv_bits": 8}
    found = stage.evaluate_model(str(tmp_path / "plain"), build(values), QUIET).text
    assert expected is not None
    assert found is not None
    assert weights_only is not None
    assert found.kl == pytest.approx(expected.kl, rel=1e-6)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert result.text is not None
    assert result.text.kl == pytest.approx(expected.kl, rel=0.01)
    assert abs((weights_only.kl or 0) - (expected.kl or 0)) > 1e-5


def scores_of(model: Any, tokenizer: Any) -> list[tuple[float, bool]]:
    """Log-probability of a token of each choice of `items`, the mean, and whether they are the most probable."""
    requests = [
        (None, tokenizer(row["prompt"]).input_ids, tokenizer(f" {choice}", add_special_tokens=False).input_ids)
        for row in items()
        for choice in row["choices"]
    ]
    with quiet_lm_eval():
        scorer = (EngineLM if isinstance(model, runtime.Model) else TransformersLM)(model, tokenizer, 2, QUIET, "m")
        found = scorer._loglikelihood_tokens(requests)
    return [(value / len(tokens), greedy) for (value, greedy), (_, _, tokens) in zip(found, requests, strict=True)]


@pytest.mark.parametrize(("bits", "close"), [(8, 1e-2), (16, 1e-4)])
def test_the_runtime_measures_what_transformers_measures(
    bits: int, close: float, make_model: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "teacher", "qwen3")
    write_rows(tmp_path / "world_recall.jsonl", items())
    values: dict[str, Any] = {
        "model": str(tmp_path / "teacher"),
        "device": "cpu",
        "calibrate": {"bits": 4, "group_size": GROUP_SIZE, "init": "rtn", "activation_bits": bits, "kv_bits": bits},
        "pack": {"source": "teacher"},
        "data": {"held_out": [{"file": str(text_file)}], "sequence_length": 32},
        "eval": {"against": str(tmp_path / "teacher"), "text_sequences": 4, "tasks": ["world_recall"]},
    }
    values["eval"]["task_data"] = str(tmp_path)
    folder = WorkDir(tmp_path / "job").folder("pack")
    pack.STAGE.run(JobContext(build(values), WorkDir(tmp_path / "job"), QUIET))
    model = runtime.load(folder)
    plain, tokenizer = transformers_plugin.load(folder)
    pairs = list(zip(scores_of(model, tokenizer), scores_of(plain, tokenizer), strict=True))
    differences = [abs(found - expected) for (found, _), (expected, _) in pairs]
    assert sum(differences) / len(differences) < 0.1 * close  # a number that is rounded otherwise is seen in few
    assert max(differences) < 5 * close
    assert [found for (_, found), _ in pairs] == [expected for _, (_, expected) in pairs]
    result = stage.evaluate_model(str(folder), build(values), QUIET)
    assert result.engine == model.engine
    load = runtime.load
    monkeypatch.setattr(runtime, "load", lambda folder, threads: load(folder, threads, engine="transformers"))
    expected = stage.evaluate_model(str(folder), build(values), QUIET)
    assert (expected.engine, expected.kernel) == ("transformers", result.kernel)
    assert result.tasks == expected.tasks
    assert result.text is not None
    assert expected.text is not None
    assert result.text.perplexity == pytest.approx(expected.text.perplexity, rel=close)
    assert result.text.kl == pytest.approx(expected.text.kl, rel=close, abs=close * 0.01)


def test_one_odd_prompt_is_no_collapse(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the middle of a number even a sound model repeats a digit."""
    values, work, _ = job
    texts = iter([[3] * 48, list(range(48))])
    monkeypatch.setattr(sample, "greedy", lambda evaluated, prompt: next(texts))
    result = stage.STAGE.run(JobContext(build(values), work, QUIET))
    assert not any("collapsed" in sentence for sentence in (*result.failures, *result.notes))


def test_a_collapsed_packed_model_fails_alone(job: Any) -> None:
    values, _, loaded = job
    loaded["packed"] = rigged()
    assert any("collapsed" in failure for failure in stage.evaluate_model("packed", build(values), QUIET).failures)
    with torch.no_grad():
        loaded["teacher"].model.norm.weight.zero_()
    result = stage.evaluate_model("plain", build(values), QUIET)
    assert result.failures == []
    assert any("collapsed" in note for note in result.notes)


@pytest.mark.parametrize(
    ("task", "own", "reason"),
    [
        (None, {"repetition_penalty": 1.1}, None),  # nothing is written
        ({"until": ["x"], "do_sample": False}, {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.0}, None),
        ({"until": ["x"]}, {"repetition_penalty": 1.1}, "generation_config.json sets repetition_penalty"),
        ({"until": ["x"], "do_sample": True, "temperature": 0.7}, {}, "the answers of written are not greedy text"),
    ],
)
def test_what_is_not_greedy_text_is_for_transformers(
    job: Any, task: dict[str, Any] | None, own: dict[str, Any], reason: str | None
) -> None:
    _, _, loaded = job
    for name, value in own.items():
        setattr(loaded["teacher"].generation_config, name, value)
    kind = "multiple_choice" if task is None else "generate_until"
    asked = SimpleNamespace(OUTPUT_TYPE=kind, config=SimpleNamespace(generation_kwargs=task))
    entry = tasks.LoadedTask("written", asked, "t.jsonl", 100, True, None, "")
    engine = runtime.load(Path("packed")).engine
    subject, notes = load_packed("packed", Path("packed"), torch.device("cpu"), None, [entry])
    assert isinstance(subject.model, runtime.Model) == (engine == "native" and reason is None)
    assert len(notes) == (engine == "native" and reason is not None)
    assert all(str(reason) in note for note in notes)


# --- the stage's other duties ----------------------------------------------------------------


def test_wrong_folders_are_named(job: Any, tmp_path: Path) -> None:
    values, _, _ = job
    values["compare"] = {"rounded": str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match=r"compare\.rounded.*is not a packed model"):
        stage.STAGE.run(JobContext(build(values), WorkDir(tmp_path / "work"), QUIET))
    values["compare"] = {"packed": str(tmp_path / "other")}
    with pytest.raises(UserError, match="needs another name"):
        stage.STAGE.run(JobContext(build(values), WorkDir(tmp_path / "work"), QUIET))


def test_inputs_name_everything_that_matters(job: Any, tmp_path: Path) -> None:
    values, work, _ = job

    def inputs(change: dict[str, Any] | None = None) -> dict[str, str]:
        recipe: Recipe = build({**values, "eval": {**values["eval"], **(change or {})}})
        return stage.STAGE.inputs(JobContext(recipe, work, QUIET))

    before = inputs()
    assert inputs() == before
    assert inputs({"batch_size": 7}) == before
    assert inputs({"limit": 7}) != before
    (tmp_path / "held.txt").write_text(TEXT, encoding="utf-8")
    after = inputs()
    assert after["text"] != before["text"]
    write_rows(tmp_path / "world_recall.jsonl", items(count=3))
    assert {key for key in after if inputs()[key] != after[key]} == {"task world_recall", "task folder"}


def test_dry_run_counts(job: Any, tmp_path: Path) -> None:
    values, work, _ = job
    values["compare"] = {"rounded": str(tmp_path / "other")}
    values["eval"]["limit"] = 4
    plan = stage.STAGE.dry_run(JobContext(build(values), work, QUIET))
    assert plan.models == 3
    assert plan.tasks["world_recall"].items == 4
    per_model = plan.tasks["world_recall"].tokens
    assert per_model is not None
    # Three models on the tasks; on text two models, each beside the teacher.
    assert plan.forward_tokens == 3 * per_model + 5 * 32 * 4


def test_the_result_reads_back(job: Any) -> None:
    values, work, _ = job
    result = stage.STAGE.run(JobContext(build(values), work, QUIET))
    assert EvalResult.model_validate_json(work.result_file("eval").read_text()) == result
