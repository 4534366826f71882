"""The sensitivity of rows: layer by layer, interrupted or not, as ordinary passes of the whole model compute it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from edgerazor import allocate, calibrated, formats, models, packed
from edgerazor.allocate import affordable_tokens
from edgerazor.calibration import observers
from edgerazor.console import Console
from edgerazor.formats import MatrixSpec
from edgerazor.models import LayerwisePass, PreTrainedModel
from edgerazor.modules import attention
from edgerazor.recipe import build, load
from edgerazor.report import plan_summary as plan_
from edgerazor.sensitivity import (
    FisherSensitivity,
    IntegratedGradients,
    OutputHead,
    SensitivityAnalysis,
    combined,
    output_head,
    split_rows_and_matrices,
)
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, sha256, write_recipe
from helpers.tiny_models import GROUP_SIZE, ModelMaker, mostly_slow, some_batches

#: A plain one, norms of q and k, a tied head that caps its logits, biases everywhere, fused projections.
FAMILIES = ["llama", "qwen3", "gemma2", "phi", "phi3"]
NAMES = ("ternary", "int3", "int4")
SEED = 7

Weights = dict[str, Tensor]


def spec(name: str) -> MatrixSpec:
    return MatrixSpec((name,), GROUP_SIZE)


@pytest.fixture(scope="session")
def teachers(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny teachers by family, whose logits are not so sure that rounding is a catastrophe."""

    @functools.cache
    def folder(family: str) -> Path:
        path = tmp_path_factory.mktemp("teachers") / family
        make_model(path, family)
        return path

    return folder


def analysis_of(path: Path, folder: Path, **changes: Any) -> SensitivityAnalysis:
    """An analysis of some padded batches."""
    model, _ = models.load(path)
    structure, batches = models.structure(model), some_batches()

    def make_pass(name: str, transform: Any) -> LayerwisePass:
        return LayerwisePass(model, structure, batches, folder / "passes" / name, identity=name, transform=transform)

    settings: dict[str, Any] = {
        "names": NAMES,
        "group_size": GROUP_SIZE,
        "points": 3,
        "seed": SEED,
        "identity": "an analysis",
    }
    return SensitivityAnalysis(
        model=model,
        structure=structure,
        logit_shape=models.logit_shape(model, structure.head_path),
        batches=batches,
        make_pass=make_pass,
        folder=folder / "stored",
        console=Console(quiet=True),
        **(settings | changes),
    )


def rounded(model: PreTrainedModel, specs: dict[str, MatrixSpec]) -> PreTrainedModel:
    """The same model with these matrices rounded, in place."""
    with torch.no_grad():
        for name, matrix_spec in specs.items():
            weight = model.get_submodule(name).weight
            weight.copy_(formats.rounded_weight(weight, matrix_spec))
    return model


def logits_of(model: PreTrainedModel) -> list[Tensor]:
    """float32 [n, vocabulary] at the positions that count, batch by batch."""
    logits = []
    for ids, counts in some_batches():
        with torch.no_grad():
            logits.append(model(input_ids=ids, use_cache=False).logits.float()[counts])
    return logits


def divergence(teacher: list[Tensor], student: list[Tensor]) -> float:
    """KL(teacher || student) per token, from whole logits in float64."""
    total, tokens = 0.0, 0
    for one, other in zip(teacher, student, strict=True):
        p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(one)
    return total / tokens


def plain_kl(path: Path, specs: dict[str, MatrixSpec]) -> float:
    teacher, _ = models.load(path)
    student, _ = models.load(path)
    return divergence(logits_of(teacher), logits_of(rounded(student, specs)))


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- fisher --------------------------------------------------------------------------------------


def plain_fisher(path: Path) -> Weights:
    """The estimate from passes of the whole model with autograd: linear layers (whole ones behind `alone/`), and the
    embedding's lookups."""
    model, _ = models.load(path)
    structure = models.structure(model)
    seen: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def watching(name: str) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            output.register_hook(lambda g: seen.__setitem__(name, g))

        return hook

    for target in structure.linears:
        model.get_submodule(target.name).register_forward_hook(watching(target.name))
    embedding: Any = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    embedding.register_forward_hook(
        lambda _module, _args, output: output.register_hook(lambda g: seen.__setitem__("rows", g)) and None
    )
    scale = models.embedding_scale(embedding)
    sums: Weights = {
        target.name: torch.zeros(len(NAMES), target.rows, dtype=torch.float64) for target in structure.linears
    }
    sums |= {f"alone/{target.name}": torch.zeros(len(NAMES), dtype=torch.float64) for target in structure.linears}
    sums[structure.embedding.name] = torch.zeros(len(NAMES), 1, dtype=torch.float64)
    tokens = 0
    for number, (ids, counts) in enumerate(some_batches()):
        logits = model(input_ids=ids, use_cache=False).logits.float()[counts]
        draw = torch.Generator().manual_seed(SEED + number)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)
        logits.log_softmax(-1).gather(1, labels).sum().backward()
        for target in structure.linears:
            weight = model.get_submodule(target.name).weight.detach()
            for index, name in enumerate(NAMES):
                change = inputs[target.name] @ (formats.quantize_dequantize(weight, spec(name)) - weight).T
                products = (change * seen[target.name]).double().flatten(0, 1)  # [tokens, rows]
                sums[target.name][index] += products.square().sum(0) / 2
                sums[f"alone/{target.name}"][index] += products.sum(1).square().sum() / 2
        rows, g = embedding.weight.detach()[ids.flatten()], seen["rows"].flatten(0, 1)
        for index, name in enumerate(NAMES):
            change = (formats.quantize_dequantize(rows, spec(name)) - rows) * (1.0 if scale is None else float(scale))
            sums[structure.embedding.name][index] += float((change * g).sum(1).double().square().sum()) / 2
        tokens += int(counts.sum())
    return {name: value / tokens for name, value in sums.items()}


def plain_head(path: Path) -> Tensor:
    """Half the variance of the change of logits under the model, by hand: float64 [formats, 1]."""
    model, _ = models.load(path)
    structure = models.structure(model)
    inputs: list[Tensor] = []
    hook = model.get_submodule(structure.head_path).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    exact = logits_of(model)
    hook.remove()
    head = model.get_submodule(structure.head_path)
    scale, cap = models.logit_shape(model, structure.head_path)
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    sums, tokens = torch.zeros(len(NAMES), 1, dtype=torch.float64), sum(len(logits) for logits in exact)
    for index, name in enumerate(NAMES):
        wrong = formats.quantize_dequantize(weight, spec(name))
        for (_, counts), before, x in zip(some_batches(), exact, inputs, strict=True):
            after = torch.nn.functional.linear(x[counts], wrong, bias) * scale
            after = after if cap is None else (after / cap).tanh() * cap
            p, change = before.double().softmax(-1), (after - before).double()
            mean = (p * change).sum(-1, keepdim=True)
            sums[index] += float((p * (change - mean).square()).sum()) / 2
    return sums / tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_is_that_of_the_whole_model(teachers: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    path = teachers(family)
    analysis = analysis_of(path, tmp_path)
    expected, whole = split_rows_and_matrices(plain_fisher(path))
    estimated, head = analysis.fisher(), plain_head(path)
    if analysis.structure.head is None:
        expected[analysis.structure.embedding.name] += head
    else:
        expected[analysis.structure.head.name] = head
    whole |= {name: value[:, 0] for name, value in expected.items() if name not in whole}
    alone = {f"alone/{name}": value for name, value in analysis.per_matrix().items()}
    estimated, expected = estimated | alone, expected | {f"alone/{name}": value for name, value in whole.items()}
    assert estimated.keys() == expected.keys()
    for name, value in expected.items():
        assert estimated[name].dtype == torch.float64
        torch.testing.assert_close(estimated[name], value, rtol=2e-3, atol=1e-4 * float(value.max()))


def test_a_table_of_inputs_of_single_layers_is_estimated_like_an_embedding(
    teachers: Callable[[str], Path], tmp_path: Path
) -> None:
    path = teachers("gemma4")
    model, _ = models.load(path)
    [target] = models.structure(model).tables
    table: Any = model.get_submodule(target.name)
    gradients: list[Tensor] = []
    table.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    table.register_forward_hook(lambda _module, _args, output: output.register_hook(gradients.append) and None)
    expected, tokens = torch.zeros(len(NAMES), 1, dtype=torch.float64), 0
    for number, (ids, counts) in enumerate(some_batches()):
        logits = model(input_ids=ids, use_cache=False).logits.float()[counts]
        draw = torch.Generator().manual_seed(SEED + number)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)
        logits.log_softmax(-1).gather(1, labels).sum().backward()
        rows = table.weight.detach()[ids.flatten()]
        for index, name in enumerate(NAMES):
            change = (formats.quantize_dequantize(rows, spec(name)) - rows) * models.embedding_scale(table)
            expected[index] += float((change * gradients[-1].flatten(0, 1)).sum(1).double().square().sum()) / 2
        tokens += int(counts.sum())
    found = analysis_of(path, tmp_path).fisher()[target.name]
    assert found.min() > 0
    torch.testing.assert_close(found, expected / tokens, rtol=2e-3, atol=0)


def test_all_positions_in_one_chunk_or_in_many(teachers: Callable[[str], Path], tmp_path: Path) -> None:
    path = teachers("llama")
    whole = analysis_of(path, tmp_path / "whole").fisher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_head, "LOGITS", 300 * 5)  # five positions at a time
        chunks = analysis_of(path, tmp_path / "chunks").fisher()
    for name, value in whole.items():
        torch.testing.assert_close(chunks[name], value, rtol=1e-4, atol=1e-6 * float(value.max()))


# --- measured ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_is_the_kl_of_the_whole_model(teachers: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    analysis = analysis_of(teachers(family), tmp_path)
    every = [target.name for target in analysis.structure.linears]
    mixed = {name: spec(NAMES[index % len(NAMES)]) for index, name in enumerate(every)}
    assert analysis.measure({}) == 0
    for specs in (dict.fromkeys(every, spec("int4")), mixed, {every[-1]: spec("ternary")}):
        assert analysis.measure(specs) == pytest.approx(plain_kl(teachers(family), specs), rel=1e-3)
    last = {target.name: spec("ternary") for target in analysis.structure.linears if target.layer == 1}
    assert analysis.measure(last, first=1) == pytest.approx(analysis.measure(last), rel=1e-6)


def test_ablation_is_the_kl_of_one_rounded_tensor(teachers: Callable[[str], Path], tmp_path: Path) -> None:
    analysis = analysis_of(teachers("qwen3"), tmp_path)
    estimated, fisher = analysis.ablation(), analysis.fisher()
    assert estimated.keys() == {target.name for target in analysis.structure.linears}
    for name, value in estimated.items():
        for index, number_format in enumerate(NAMES):
            expected = plain_kl(teachers("qwen3"), {name: spec(number_format)})
            assert float(value[index].sum()) == pytest.approx(expected, rel=2e-3)
            torch.testing.assert_close(
                value[index] / value[index].sum(), fisher[name][index] / fisher[name][index].sum()
            )


def test_kv_caches_are_measured_alone_and_left_as_they_were(teachers: Callable[[str], Path], tmp_path: Path) -> None:
    analysis = analysis_of(teachers("llama"), tmp_path)
    divergences = analysis.measure_kv_caches()
    assert list(divergences) == ["int8", "int4"]
    assert 0 < divergences["int8"] < divergences["int4"]
    assert analysis.measure({}) == 0
    whole, _ = models.load(teachers("llama"))
    exact = logits_of(whole)
    for bits in (8, 4):
        attention.quantize_attention(whole, bits)
        assert divergences[f"int{bits}"] == pytest.approx(divergence(exact, logits_of(whole)), rel=2e-3)


# --- integrated ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", mostly_slow(["llama", "gemma2", "phi"], "gemma2"))
def test_integrated_gradients_add_up_to_the_kl_of_the_uniform_model(
    teachers: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """Completeness (Sundararajan et al., proposition 1), whatever the KL is."""
    analysis = analysis_of(teachers(family), tmp_path, points=16)
    every = {target.name: spec("int4") for target in analysis.structure.linears}
    total = sum(float(value.sum()) for value in analysis._integrated_gradients("int4").values())
    assert total == pytest.approx(analysis.measure(every), rel=0.02)


def test_three_points_are_within_some_percent(teachers: Callable[[str], Path], tmp_path: Path) -> None:
    analysis = analysis_of(teachers("llama"), tmp_path)
    every = {target.name: spec("int4") for target in analysis.structure.linears}
    total = sum(float(value.sum()) for value in analysis._integrated_gradients("int4").values())
    assert total == pytest.approx(analysis.measure(every), rel=0.1)
    sensitivities = analysis.integrated_gradients()
    assert all(bool((value >= 0).all()) for value in sensitivities.values())
    assert {len(value) for value in sensitivities.values()} == {len(NAMES)}


def test_what_a_format_represents_is_not_sensitive_to_it(tmp_path: Path, make_model: ModelMaker) -> None:
    """Weights of int4's levels: nothing changes, so no estimate is above zero; coarser formats have some."""
    model = make_model(tmp_path / "model", "llama")
    structure = models.structure(model)
    targets = {target.name: target for target in structure.targets}
    rounded(model, dict.fromkeys(targets, spec("int4")))
    for name in targets:  # absmax formats take their own levels back exactly
        weight = model.get_submodule(name).weight
        assert torch.equal(formats.quantize_dequantize(weight, spec("int4")), weight)
    model.save_pretrained(tmp_path / "model")
    analysis = analysis_of(tmp_path / "model", tmp_path)
    index = NAMES.index("int4")
    for estimate in (analysis.fisher, analysis.integrated_gradients, analysis.ablation):
        sensitivities = estimate()
        assert all(float(value[index].abs().max()) == 0 for value in sensitivities.values())
        assert all(float(value[0].sum()) > 0 for value in sensitivities.values())
    assert analysis.measure(dict.fromkeys((target.name for target in structure.linears), spec("int4"))) == 0


def test_hessian_is_the_weighted_error(teachers: Callable[[str], Path], tmp_path: Path) -> None:
    analysis = analysis_of(teachers("llama"), tmp_path)
    moments = {target.name: torch.rand(target.columns) for target in analysis.structure.linears}
    for name, value in analysis.hessian(moments).items():
        weight = analysis.model.get_submodule(name).weight.double()
        for index, number_format in enumerate(NAMES):
            error = formats.quantize_dequantize(weight.float(), spec(number_format)).double() - weight
            expected = (error.square() * moments[name].double()).sum(1) / 2
            torch.testing.assert_close(value[index], expected, rtol=1e-4, atol=1e-9)


def test_combined_has_the_tensors_of_one_and_the_rows_of_the_other() -> None:
    fisher = {"a": torch.tensor([[1.0, 3.0], [0.0, 0.0]]), "embed": torch.ones(2, 1)}
    integrated = {"a": torch.tensor([[4.0, 4.0], [1.0, 1.0]])}
    estimated = combined(fisher, integrated)
    assert estimated.keys() == {"a"}
    assert estimated["a"][0].tolist() == [2.0, 6.0]
    assert float(estimated["a"][1].sum()) in (0.0, 2.0)


# --- interrupted ---------------------------------------------------------------------------------


def interrupting(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The same function until it has been called so often."""
    calls: list[int] = []

    @functools.wraps(function)
    def called(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*args, **keywords)

    return called


#: estimate -> (what is interrupted, after how many calls): linear layers backwards, or tensors of the ablation.
KILLS: dict[str, list[tuple[Any, str, int]]] = {
    "fisher": [(FisherSensitivity, "gradient", 5), (FisherSensitivity, "gradient", 30)],
    "integrated": [
        (IntegratedGradients, "gradient", 4),
        (IntegratedGradients, "gradient", 200),
        (OutputHead, "kl_gradient", 8),
    ],
    "direct": [(FisherSensitivity, "gradient", 25), (LayerwisePass, "forward_from", 20)],
}


KILLED = [(name, kill) for name, kills in KILLS.items() for kill in kills]


@pytest.mark.parametrize("case", mostly_slow(KILLED, KILLED[0], KILLED[4]), ids=lambda case: f"{case[0]}-{case[1][1]}")
def test_interrupted_and_resumed_it_has_the_same_bits(
    teachers: Callable[[str], Path], tmp_path: Path, case: tuple[str, tuple[Any, str, int]]
) -> None:
    estimate, (owner, name, after) = case
    whole = analysis_of(teachers("qwen3"), tmp_path / "whole").estimate(estimate, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupting(getattr(owner, name), after))
        with pytest.raises(KeyboardInterrupt):
            analysis_of(teachers("qwen3"), tmp_path / "job").estimate(estimate, {})
    resumed = analysis_of(teachers("qwen3"), tmp_path / "job").estimate(estimate, {})
    assert same(whole, resumed)


def test_stored_parts_are_used_only_by_the_same_analysis(teachers: Callable[[str], Path], tmp_path: Path) -> None:
    before = analysis_of(teachers("llama"), tmp_path).fisher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FisherSensitivity, "gradient", interrupting(lambda *_: None, 0))
        assert same(analysis_of(teachers("llama"), tmp_path).fisher(), before)  # nothing is computed
        with pytest.raises(KeyboardInterrupt):
            analysis_of(teachers("llama"), tmp_path, identity="another", seed=SEED + 1).fisher()
    other = analysis_of(teachers("llama"), tmp_path, identity="another", seed=SEED + 1).fisher()
    assert not same(other, before)
    for file in (tmp_path / "stored").glob("*"):
        file.write_bytes(b"damaged")
    assert same(analysis_of(teachers("llama"), tmp_path).fisher(), before)


# --- calibrate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "device", "tokens"),
    [
        (3_000_000, "cpu", 16384),
        (120_000_000, "cpu", 10240),
        (10**9, "cpu", 2048),
        (3_000_000, "cuda", 65536),
        (10**9, "cuda", 19660),
    ],
)
def test_how_many_tokens_are_analysed_where_nobody_says(weights: int, device: str, tokens: int) -> None:
    """As many as take the time of 2,048 tokens of 600 million weights, within 2,048 and 16k, or 64k on a GPU."""
    assert affordable_tokens(weights, torch.device(device)) == tokens


MEASURED = {"plan": "sensitivity", "sensitivity_tokens": 64}
STATISTICS = Path("calibrate", "stats.safetensors")
SERVES = "What was measured of the teacher for another plan serves this one too."


def test_calibrate_interrupted_while_analysing_ends_alike(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate=MEASURED)
    assert run("calibrate", "--recipe", recipe, "--work", tmp_path / "whole").code == 0
    with pytest.MonkeyPatch.context() as patch:
        for owner, after in ((FisherSensitivity, 10), (IntegratedGradients, 50)):
            patch.setattr(owner, "gradient", interrupting(owner.gradient, after))
            stopped = run("calibrate", "--recipe", recipe, "--work", tmp_path / "job")
            assert stopped.code == 130
            assert "Interrupted; the layers that were finished are saved." in stopped.err
            patch.undo()
    assert run("calibrate", "--work", tmp_path / "job").code == 0
    for name in (STATISTICS, Path("calibrate", "plan.json"), Path("calibrate", "sensitivity.json")):
        assert sha256(tmp_path / "job" / name) == sha256(tmp_path / "whole" / name)
    assert not (tmp_path / "job" / "calibrate" / "checkpoints").exists()


def test_what_was_measured_serves_every_budget(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate={**MEASURED, "sensitivity": "fisher"})
    work = ("--recipe", recipe, "--work", tmp_path / "job")
    assert run("calibrate", *work, "--json").code == 0
    before, ways = sha256(tmp_path / "job" / STATISTICS), []
    backward = LayerwisePass.backward
    monkeypatch.setattr(LayerwisePass, "backward", lambda *args, **named: ways.append(1) or backward(*args, **named))
    budgets: list[tuple[Any, ...]] = [
        ("--bits", 2.5),
        ("--bits", 3, "--granularity", "tensor"),
        ("--real-bits", 4.6),
        ("--bits", 2, "--formats", "ternary,int3"),  # some of the candidates
    ]
    for budget in budgets:
        counted, _ = budget[0], budget[1]
        done = run("calibrate", *work, *budget, "--json")
        assert done.code == 0, done.err
        if counted == "--bits":
            assert SERVES in done.err
            assert ways == []
            assert sha256(tmp_path / "job" / STATISTICS) == before
            assert done.json()["nominal_bits"] <= budget[1]
        else:  # more candidates are measured, and then they are there for all
            assert ways
            before = sha256(tmp_path / "job" / STATISTICS)
            ways.clear()
            assert done.json()["real_bits"] <= budget[1]
    again = run("calibrate", *work, "--bits", 2, "--group-size", 48)
    assert again.code == 0
    assert SERVES not in again.err
    assert ways
    ways.clear()
    assert run("calibrate", *work, "--bits", 2, "--group-size", 48, "--force").code == 0
    assert ways


def test_the_file_says_what_was_measured(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate={**MEASURED, "bits": 2.5})
    done = run("calibrate", "--recipe", recipe, "--work", tmp_path / "job", "--json").json()
    work, structure = WorkDir(tmp_path / "job"), models.structure(models.load(llama)[0])
    names = ["ternary", "int2", "int3", "int4"]
    said, tensors = plan_.read_sensitivity(work), load_file(tmp_path / "job" / STATISTICS)
    with safe_open(tmp_path / "job" / STATISTICS, framework="pt") as file:
        assert names == json.loads(file.metadata()["measured"])["formats"]
    for estimate in ("fisher", "integrated"):
        for target in structure.linears:
            assert tensors[f"damage/{estimate}/{target.name}"].shape == (len(names), target.rows)
    for target in (structure.embedding, structure.head):
        assert target is not None
        assert tensors[f"damage/fisher/{target.name}"].shape == (len(names), 1)
        assert f"damage/integrated/{target.name}" not in tensors
    assert said is not None
    plan = calibrated.read_plan(work)
    assert (said.model, said.tokens, said.estimate) == (str(llama), 64, plan.estimate)
    assert {tensor.name for tensor in said.tensors} == {target.name for target in structure.targets}
    assert list(said.measured_kl) == ["fisher", "integrated", "combined"]
    assert said.measured_kl[said.estimate] == min(said.measured_kl.values()) == done["measured_kl"]
    assert (done["estimate"], done["predicted_kl"]) == (plan.estimate, plan.predicted_kl)
    assert said.kv is not None
    assert 0 < said.kv["int8"] < said.kv["int4"]
    total = {"fisher": "fisher", "integrated": "integrated", "combined": "integrated"}[said.estimate]
    for tensor in said.tensors:
        estimate = total if tensor.kind == "linear" else "fisher"
        rows = tensors[f"damage/{estimate}/{tensor.name}"].double().sum(1)
        assert list(tensor.damage.values()) == pytest.approx(rows.tolist(), rel=1e-4)
        assert list(tensor.alone.values()) == pytest.approx(tensors[f"alone/{tensor.name}"].tolist(), rel=1e-4)
    assert list(said.tensors[0].damage) == names
    shown = run("show", "plan", "--work", tmp_path / "job", "--json").json()
    assert shown["estimate"] == said.estimate


@pytest.mark.parametrize("estimate", ["fisher", "integrated", "hessian", "direct"])
def test_every_estimate_makes_a_plan_within_the_budget(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, estimate: str
) -> None:
    settings = {**MEASURED, "bits": 2.5, "sensitivity": estimate}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate=settings)
    done = run("calibrate", "--recipe", recipe, "--work", tmp_path / "job", "--json").json()
    assert done["estimate"] == estimate
    assert 2.4 < done["nominal_bits"] <= 2.5  # rows of 96 and 101 in sixteens
    assert (done["predicted_kl"] is None) == (estimate == "hessian")
    assert done["measured_kl"] > 0


def test_another_plan_leaves_no_sensitivity_behind(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate={**MEASURED, "sensitivity": "fisher"})
    work = ("--recipe", recipe, "--work", tmp_path / "job")
    assert run("calibrate", *work).code == 0
    assert (tmp_path / "job" / "calibrate" / "sensitivity.json").exists()
    assert run("calibrate", *work, "--plan", "interleave").code == 0
    assert not (tmp_path / "job" / "calibrate" / "sensitivity.json").exists()
    assert run("show", "plan", "--work", tmp_path / "job").code == 0


def test_packing_a_teacher_uses_the_plan_that_is_there(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    settings = {**MEASURED, "bits": 2.5, "sensitivity": "fisher"}
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate=settings)
    assert run("calibrate", "--recipe", recipe, "--work", tmp_path / "job").code == 0
    plan = calibrated.read_plan(WorkDir(tmp_path / "job"))

    def formats_of(folder: Path, *words: Any) -> dict[str, MatrixSpec]:
        done = run("pack", llama, "--recipe", recipe, "--work", folder, *words)
        assert done.code == 0, done.err
        model = packed.PackedModel.open(folder / "packed")
        return {
            target.name: model.matrix(target.name).spec for target in models.structure(models.load(llama)[0]).targets
        }

    def equal(one: MatrixSpec, other: MatrixSpec) -> bool:
        rows = [torch.zeros(0) if s.row_formats is None else s.row_formats for s in (one, other)]
        return one.formats == other.formats and torch.equal(rows[0].long(), rows[1].long())

    planned = formats_of(tmp_path / "job")
    assert all(equal(planned[name], s) for name, s in plan.specs().items())
    without = formats_of(tmp_path / "other")
    assert not (tmp_path / "other" / "calibrate").exists()
    settings = allocate.unmeasured(build(load(recipe)).calibrate)
    interleave = allocate.make_plan(models.structure(models.load(llama)[0]).linears, settings)
    assert all(equal(without[name], s) for name, s in interleave.specs().items())
    assert any(not equal(without[name], s) for name, s in plan.specs().items())
    # Of another budget the plan says nothing.
    wider = formats_of(tmp_path / "job", "--bits", 3)
    assert any(not equal(wider[name], s) for name, s in plan.specs().items())


# Rotation ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def outliers(teachers: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with a large column in every 32 of the layers behind norms, whose gains are as much smaller."""
    model, _ = models.load(teachers("llama"))
    path = tmp_path_factory.mktemp("outliers") / "llama"
    shutil.copytree(teachers("llama"), path)
    with torch.no_grad():
        for layer in model.model.layers:
            behind = {
                layer.input_layernorm: (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                layer.post_attention_layernorm: (layer.mlp.gate_proj, layer.mlp.up_proj),
            }
            for norm, linears in behind.items():
                norm.weight[5::32] /= 10
                for linear in linears:
                    linear.weight[:, 5::32] *= 10
    model.save_pretrained(path)
    return path


def moments_of(analysis: SensitivityAnalysis) -> dict[str, Tensor]:
    observer = observers.SecondMoments(analysis.rotation)
    analysis.teacher_pass.forward(observer)
    return observer.means(analysis.tokens)


@pytest.mark.parametrize("estimate", mostly_slow(["fisher", "hessian", "integrated"], "fisher"))
def test_rotation_is_part_of_every_estimate(estimate: str, outliers: Path, tmp_path: Path) -> None:
    """Of rotated weights with outliers the estimated and the measured damage of three bits is lower."""
    damage, divergences = {}, {}
    for rotation in (None, "hadamard"):
        analysis = analysis_of(outliers, tmp_path / str(rotation), rotation=rotation, names=("int3",))
        rows = analysis.estimate(estimate, moments_of(analysis))
        turned = [target for target in analysis.structure.linears if target.name.rpartition(".")[2] in TURNED]
        damage[rotation] = sum(float(rows[target.name].sum()) for target in turned)
        specs = {target.name: analysis.spec("int3", target.columns) for target in turned}
        divergences[rotation] = analysis.measure(specs)
        assert divergences[rotation] == pytest.approx(plain_kl(outliers, specs), rel=1e-3)
    assert divergences["hadamard"] < 0.7 * divergences[None]
    assert damage["hadamard"] < 0.8 * damage[None]


#: Layers with large columns.
TURNED = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_moments_are_those_of_rotated_inputs(outliers: Path, tmp_path: Path) -> None:
    plain, turned = (
        moments_of(analysis_of(outliers, tmp_path / str(rotation), rotation=rotation))
        for rotation in (None, "hadamard")
    )
    for path, moment in plain.items():  # a rotation keeps their sum
        assert float(turned[path].sum()) == pytest.approx(float(moment.sum()), rel=1e-4)
        assert torch.equal(turned[path], moment) == path.endswith("down_proj")  # of 101 columns
    path = "model.layers.0.self_attn.q_proj"
    assert float(turned[path].max() / turned[path].mean()) < float(plain[path].max() / plain[path].mean())
