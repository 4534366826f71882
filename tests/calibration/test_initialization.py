"""Starts from calibrate to the packed model: what is made, trained from, packed, and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgerazor import data, devices, formats, models, modules, packed, pipeline, transformers_plugin
from edgerazor import recipe as recipes
from edgerazor.allocate import make_plan
from edgerazor.calibrated import read_plan
from edgerazor.calibration import initialization
from edgerazor.console import Console
from edgerazor.formats import MatrixSpec
from edgerazor.job import JobContext
from edgerazor.modules import InitialWeight, Settings
from edgerazor.recipe import Calibrate
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, metrics, sha256, snapshot, write_recipe
from helpers.tiny_models import FAMILIES, GROUP_SIZE, VOCABULARY, ModelMaker, family_config, mostly_slow
from helpers.trainings import interrupt_at

IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


# Training modules -------------------------------------------------------------------------------------------------


def starts_of(model: PreTrainedModel, specs: dict[str, MatrixSpec]) -> dict[str, InitialWeight]:
    """Every matrix somewhere else than at its own weights and its rule."""
    starts = {}
    for name, spec in specs.items():
        weight = 1.25 * model.get_submodule(name).weight.detach()
        starts[name] = InitialWeight(None if "embed" in name else weight, formats.search_scales(weight, spec))
    return starts


def started(
    tied: bool, learned: bool = False, scales_only: bool = False
) -> tuple[PreTrainedModel, dict[str, InitialWeight]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config("llama", tie_word_embeddings=tied))
    found = models.structure(model)
    settings = Calibrate(bits=1.88, plan="interleave", group_size=GROUP_SIZE)
    specs = make_plan(found.targets, settings, lambda name: model.get_submodule(name).weight).specs()
    starts = starts_of(model, specs)
    how = Settings(8, 8, GROUP_SIZE, learned)
    modules.prepare_for_training(model, found, specs, how, scales_only, initial_weight=starts.get)
    return model, starts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("scales_only", [True, False])
def test_a_training_begins_with_the_codes_of_its_start(tied: bool, learned: bool, scales_only: bool) -> None:
    model, starts = started(tied, learned, scales_only)
    matrices = modules.fake_quant_weights(model)
    assert matrices.keys() == starts.keys()
    for name, module in matrices.items():
        codes, scales = module.encoded()
        assert torch.equal(scales, starts[name].scales)
        begun = starts[name].weight
        if begun is not None:
            assert torch.equal(codes, formats.encode_matrix(begun, module.spec, starts[name].scales).codes), name
        assert module.scales is not None
        assert module.scales.requires_grad == (learned or scales_only)
        assert module.weight.requires_grad != scales_only
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    for name, module in matrices.items():
        assert module.scales is not None
        assert (module.scales.grad is not None) == (learned or scales_only), name
        assert (module.weight.grad is not None) != scales_only, name


def test_fixed_scales_let_the_gradient_straight_through() -> None:
    """Also that of weights that are clipped: it is the gradient with respect to the decoded weight."""
    model, _ = started(tied=False)
    embedding, linear = model.get_input_embeddings(), model.get_submodule("model.layers.1.self_attn.q_proj")
    assert isinstance(embedding, modules.FakeQuantEmbedding)
    assert isinstance(linear, modules.FakeQuantLinear)
    table = embedding.decoded(torch.float32).requires_grad_()
    torch.nn.functional.embedding(IDS, table).square().sum().backward()
    embedding(IDS).square().sum().backward()
    assert torch.equal(embedding.weight.grad, table.grad)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    weight = linear.decoded(torch.float32).requires_grad_()
    torch.nn.functional.linear(linear.quantized_input(x), weight).square().sum().backward()
    linear(x).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, weight.grad)
    assert bool((weight.grad != 0).all())


# What calibrate makes ---------------------------------------------------------------------------------------------


def write_start(path: Path, model: Path, text: Path, start: str, **sections: Any) -> Path:
    calibrate = {"sequences": 16, "init": start, **sections.pop("calibrate", {})}
    return write_recipe(path, model, text, calibrate=calibrate, **sections)


def job_of(folder: Path) -> tuple[recipes.Recipe, WorkDir]:
    work = WorkDir(folder)
    return recipes.build(recipes.load(work.recipe_file)), work


def input_moments(
    recipe: recipes.Recipe, work: WorkDir, teacher: Any, linears: set[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What linear layers of the packed model multiply their weights with, `x^T x / n`, and `(x_T - x)^T x / n`, where
    x_T are the teacher's; float64."""
    model, tokenizer = transformers_plugin.load(work.folder("pack"))
    rows, _ = JobContext(recipe, work, Console(quiet=True)).open_text(tokenizer, recipe.data.sequence_length)
    seen: dict[str, Tensor] = {}
    sums = {name: [torch.zeros((), dtype=torch.float64) for _ in range(2)] for name in linears}
    counts = torch.empty(0)

    def watching(name: str, is_teacher: bool) -> Any:
        def hook(module: Any, args: tuple) -> None:
            if is_teacher:
                seen[name] = args[0][counts].double()
                return
            x = formats.fake_quantize_activations(args[0][counts], module.activation_bits, module.group_size).double()
            sums[name][0] = sums[name][0] + x.T @ x
            sums[name][1] = sums[name][1] + (seen[name] - x).T @ x

        return hook

    for name in linears:
        teacher.get_submodule(name).register_forward_pre_hook(watching(name, True))
        model.get_submodule(name).register_forward_pre_hook(watching(name, False))
    tokens = 0
    for batch in data.sample_batches(rows, recipe.calibrate.sequences, 4):
        counts = batch["labels"] != data.MASKED
        tokens += int(counts.sum())
        with torch.no_grad():
            teacher(input_ids=batch["input_ids"], use_cache=False)
            model(input_ids=batch["input_ids"], use_cache=False)
    return {name: (hessian / tokens, drift / tokens) for name, (hessian, drift) in sums.items()}


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "gemma2"))
def test_each_layer_was_compensated_for_what_it_sees_when_packed(
    run: Run, make_model: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """What the packed model's layers see gives, up to a few ties, the codes that the packed model has."""
    monkeypatch.setattr(devices, "fast_bfloat16", lambda _: False)  # whose products move more codes than ties do
    make_model(tmp_path / "model", family)
    # Of fewer tokens than a layer has columns (Mamba-2's 192), second moments are singular, and the last bits decide.
    # So have the wide MLPs of Gemma 4's last layers, to which the ties of five layers add up.
    sequences = {"granite-hybrid": 12, "gemma4": 40}.get(family, 6)
    file = write_start(tmp_path / "r.yaml", tmp_path / "model", text_file, "gptq", calibrate={"sequences": sequences})
    assert run("calibrate", "--recipe", file, "--work", tmp_path / "job").code == 0
    done = run("pack", tmp_path / "model", "--work", tmp_path / "job")
    assert done.code == 0, done.err
    recipe, work = job_of(tmp_path / "job")
    teacher, _ = models.load(tmp_path / "model", dtype=torch.float32)
    linears = {site.name for site in models.structure(teacher).linears}
    specs, folder = read_plan(work).specs(), packed.PackedModel.open(work.folder("pack"))
    for name, (hessian, drift) in input_moments(recipe, work, teacher, linears).items():
        master, scales = formats.gptq_quantize(teacher.get_submodule(name).weight, specs[name], hessian, drift)
        expected, found = formats.encode_matrix(master, specs[name], scales), folder.matrix(name).encoded
        assert float((expected.codes != found.codes).float().mean()) < 0.02, name


def test_what_the_file_holds(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    files, promised, sizes = {}, {}, {"rtn": 0}
    for start in ("rtn", "clip", "gptq"):
        file = write_start(tmp_path / f"{start}.yaml", llama, text_file, start)
        job = tmp_path / start
        promised[start] = run("calibrate", "--recipe", file, "--work", job, "--dry-run", "--json").json()["disk_bytes"]
        assert run("calibrate", "--recipe", file, "--work", job).code == 0
        made = WorkDir(job).start_file
        assert made.exists() == (start != "rtn")
        if made.exists():
            files[start], sizes[start] = load_file(made), sum(t.nbytes for t in load_file(made).values())
    assert {start: promised[start] - promised["rtn"] for start in promised} == sizes
    recipe, work = job_of(tmp_path / "clip")
    teacher, tokenizer = models.load(llama)
    found, specs = models.structure(teacher), read_plan(work).specs()
    rows, _ = JobContext(recipe, work, Console(quiet=True)).open_text(tokenizer, 32)
    states = []
    for batch in data.sample_batches(rows, 16, 4):
        with torch.no_grad(), models.final_states(teacher, "lm_head") as final:
            teacher(input_ids=batch["input_ids"])
        states.append(final[0][batch["labels"] != data.MASKED])
    moments = {key: value for key, value in load_file(work.statistics_file).items() if key.startswith("input_second")}
    for site in found.targets:
        moment = moments.get(f"input_second_moment/{site.name}")
        if site.kind == "head":
            moment = torch.cat(states).square().mean(0, dtype=torch.float64).float()
        expected = formats.search_scales(teacher.get_submodule(site.name).weight, specs[site.name], moment)
        differing = (files["clip"][f"{site.name}.scales"] != expected).float().mean()  # sums in another order
        assert float(differing) < (0.02 if site.kind == "head" else 1e-9), site.name
    assert {name.rpartition(".")[2] for name in files["clip"]} == {"scales"}
    compensated = {name.removesuffix(".weight") for name in files["gptq"] if name.endswith(".weight")}
    assert compensated == {site.name for site in found.linears}


@pytest.mark.parametrize("bits", mostly_slow([1.58, 1.88, 4], 1.88))
def test_better_starts_pack_to_better_models(
    run: Run, make_model: ModelMaker, text_file: Path, tmp_path: Path, bits: float
) -> None:
    """KL to the teacher before any training: gptq's is below the others'."""
    make_model(tmp_path / "model", "qwen3", num_hidden_layers=3)
    found = {}
    for start in ("rtn", "clip", "gptq"):
        calibrate = {"bits": bits, "sequences": 64}
        file = write_start(tmp_path / "r.yaml", tmp_path / "model", text_file, start, calibrate=calibrate)
        job = tmp_path / start
        assert run("calibrate", "--recipe", file, "--work", job).code == 0
        assert run("pack", tmp_path / "model", "--work", job).code == 0
        measured = run("eval", "--work", job, "--json")
        assert measured.code == 0, measured.err
        found[start] = measured.json()["text"]["kl"]
    assert found["gptq"] < 0.8 * min(found["clip"], found["rtn"]), found


# Training and packing ---------------------------------------------------------------------------------------------

LEARNED, ALONE = {"calibrate": {"scales": "learned"}}, {"distill": {"train": "scales"}}
BLOCKS = {"calibrate": {"granularity": "block"}, "distill": {"reconstruct": {"steps": 2, "sequences": 4}}}
#: start, family, tied, how scales are trained and formats given
KINDS: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "gptq": ("gptq", "llama", False, {}),
    "clip, tied": ("clip", "llama", True, {}),
    "gptq, learned": ("gptq", "qwen3", True, LEARNED),
    "clip, scales alone": ("clip", "phi", False, ALONE),
    "gptq, scales alone": ("gptq", "gemma3", True, {**LEARNED, **ALONE}),
    "gptq, blocks": ("gptq", "llama", False, BLOCKS),
    "clip, static": ("clip", "llama", False, {"calibrate": {"activation_scales": "static"}}),
    "gptq, learned inputs": ("gptq", "llama", False, {"calibrate": {"activation_scales": "learned", "kv_bits": 4}}),
}


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "gptq", "clip, static"))
def test_packed_equals_trained_and_resumed_equals_uninterrupted(
    run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path, kind: str
) -> None:
    start, family, tied, sections = KINDS[kind]
    make_model(tmp_path / "model", family, tie_word_embeddings=tied)
    file = write_start(tmp_path / "r.yaml", tmp_path / "model", text_file, start, **sections)
    job = tmp_path / "job"
    done = run("distill", "--recipe", file, "--work", job)
    assert done.code == 0, done.err
    made = run("pack", "--work", job, "--json")
    assert made.code == 0, made.err
    assert made.json()["verified"]
    begun = load_file(job / "calibrate" / "start.safetensors")
    stored = load_file(job / "distill" / "best" / "model.safetensors")
    folder = packed.PackedModel.open(job / "packed")
    packed.verify_digests(job / "packed", json.loads((job / "distill" / "best" / "digests.json").read_text()))
    trained = sections.get("calibrate", {}).get("scales") == "learned" or "train" in sections.get("distill", {})
    for name in folder.header.matrices:
        scales = formats.stored_scales(stored[f"{name}.scales"])
        assert torch.equal(folder.matrix(name).encoded.scales, scales)
        assert torch.equal(scales, begun[f"{name}.scales"]) != trained, name
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        stopped = run("distill", "--recipe", file, "--work", tmp_path / "again")
    assert stopped.code == 130, stopped.err
    assert run("distill", "--work", tmp_path / "again").code == 0
    for which in ("best", "last"):
        weights = Path("distill", which, "model.safetensors")
        assert sha256(tmp_path / "again" / weights) == sha256(job / weights)
    assert metrics(tmp_path / "again") == metrics(job)


def test_nothing_trained_is_the_start_itself(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    """A training that moves nothing packs to the teacher packed from the same start."""
    still = {"steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
    file = write_start(tmp_path / "r.yaml", llama, text_file, "gptq", distill=still)
    assert run("distill", "--recipe", file, "--work", tmp_path / "student").code == 0
    assert run("pack", "--work", tmp_path / "student").code == 0
    assert run("calibrate", "--recipe", file, "--work", tmp_path / "teacher").code == 0
    assert run("pack", llama, "--work", tmp_path / "teacher").code == 0
    one, other = (packed.PackedModel.open(tmp_path / job / "packed") for job in ("student", "teacher"))
    for name in one.header.matrices:
        for ours, theirs in zip(one.matrix(name).encoded, other.matrix(name).encoded, strict=True):
            assert torch.equal(ours, theirs), name


def test_a_tied_embedding_is_clipped_for_both_its_uses(make_model: ModelMaker, tmp_path: Path) -> None:
    make_model(tmp_path, "smollm2")
    model, _ = models.load(tmp_path)
    found = models.structure(model)
    spec = MatrixSpec(("int4",), GROUP_SIZE)
    with torch.no_grad(), models.final_states(model, found.head_path) as states:
        model(input_ids=IDS)
    moment = states[0].flatten(0, 1).double().square().mean(0)
    batch = {"input_ids": IDS, "labels": IDS}
    with torch.no_grad():
        starts = initialization.clip_ends(model, found, {found.embedding.name: spec}, [batch])
    expected = formats.search_scales(model.get_input_embeddings().weight, spec, 1 + moment / moment.mean())
    assert starts.keys() == {found.embedding.name}
    assert float((starts[found.embedding.name].scales != expected).float().mean()) < 0.02


def test_the_same_start_twice_is_the_same_file(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    file = write_start(tmp_path / "r.yaml", llama, text_file, "gptq")
    for job in ("one", "two"):
        assert run("calibrate", "--recipe", file, "--work", tmp_path / job).code == 0
    one, two = (tmp_path / job / "calibrate" / "start.safetensors" for job in ("one", "two"))
    assert sha256(one) == sha256(two)
    before = snapshot(tmp_path / "one")
    again = run("calibrate", "--recipe", file, "--work", tmp_path / "one")
    assert "calibrate is up to date" in again.err
    assert snapshot(tmp_path / "one") == before


def test_run_calibrates_when_the_teacher_is_rounded_from_a_start() -> None:
    values: dict[str, Any] = {"model": "x", "pack": {"source": "teacher"}}
    assert pipeline.stages_of(recipes.build(values)) == ["pack", "eval", "bench"]
    for calibrate in ({"init": "clip"}, {"init": "gptq"}, {"activation_scales": "static"}):
        asked = recipes.build({**values, "calibrate": calibrate})
        assert pipeline.stages_of(asked) == ["calibrate", "pack", "eval", "bench"]


# What is refused --------------------------------------------------------------------------------------------------


def test_packing_the_teacher_needs_the_start_of_the_same_plan(
    run: Run, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    file, job = write_start(tmp_path / "r.yaml", llama, text_file, "clip"), tmp_path / "job"
    missing = run("pack", llama, "--recipe", file, "--work", job)
    assert missing.code == 1
    assert "holds no clip start" in missing.err
    assert "edgerazor calibrate" in missing.err
    assert "--bits 1.88 --init clip" in " ".join(missing.err.split())
    assert run("calibrate", "--recipe", file, "--work", job).code == 0
    for words in (("--init", "gptq"), ("--bits", "2.5"), ("--group-size", "32")):
        other = run("pack", llama, "--recipe", file, "--work", job, *words)
        assert other.code == 1, words
        assert "start for these settings" in other.err
    assert run("pack", llama, "--recipe", file, "--work", job).code == 0
    first = sha256(job / "packed" / "model.safetensors")
    assert run("pack", llama, "--recipe", file, "--work", job, "--init", "rtn").code == 0
    assert sha256(job / "packed" / "model.safetensors") != first
    (job / "calibrate" / "start.safetensors").write_bytes(b"no such thing")
    broken = run("pack", llama, "--recipe", file, "--work", job)
    assert broken.code == 1
    assert "start.safetensors is missing or damaged" in broken.err


def test_packing_again_sees_that_the_start_is_another(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Pack's identity has that of what calibrate made, so a start from other text is packed anew."""
    job = tmp_path / "job"
    for sequences in (4, 16):
        file = write_start(tmp_path / "r.yaml", llama, text_file, "gptq", calibrate={"sequences": sequences})
        assert run("calibrate", "--recipe", file, "--work", job).code == 0
        done = run("pack", llama, "--work", job)
        assert done.code == 0
        assert "up to date" not in done.err
    assert "up to date" in run("pack", llama, "--work", job).err


def test_a_student_keeps_its_start(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    job, file = tmp_path / "job", write_start(tmp_path / "r.yaml", llama, text_file, "clip", distill={"steps": 1})
    assert run("distill", "--recipe", file, "--work", job).code == 0
    refused = run("distill", "--work", job, "--init", "gptq")
    assert refused.code == 1
    assert "calibrate.init was clip, and is gptq now" in " ".join(refused.err.split())
    late = run("pack", "--work", job, "--init", "gptq")
    assert late.code == 2
    assert "pack takes no --init" in late.err


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"calibrate": {"init": "awq"}}, "`calibrate.init` is 'awq'; expected least_error, rtn, clip or gptq."),
        ({"calibrate": {"adaptive_tokens": "causal"}}, "looks at one layer at a time"),
        (
            {"distill": {"initialise": "random"}},
            "A random student cannot begin with the teacher's gptq initialization.",
        ),
    ],
)
def test_wrong_values_are_one_sentence(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, sections: dict[str, Any], sentence: str
) -> None:
    file = write_start(tmp_path / "r.yaml", llama, text_file, "gptq", **sections)
    refused = run("distill", "--recipe", file, "--work", tmp_path / "job")
    assert refused.code == 2
    assert sentence in " ".join(refused.err.split())
    assert not (tmp_path / "job").exists()


def test_a_layer_that_is_not_used_cannot_be_compensated(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = initialization.in_order_of_use

    def forgetting(blocks: models.Blocks, index: int, flow: Sequence[initialization.Sequences]) -> Any:
        attention = blocks.layers[index].self_attn
        monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
        return in_order(blocks, index, flow)

    monkeypatch.setattr(initialization, "in_order_of_use", forgetting)
    file = write_start(tmp_path / "r.yaml", llama, text_file, "gptq")
    refused = run("calibrate", "--recipe", file, "--work", tmp_path / "job")
    assert refused.code == 1
    assert "has linear layers that it does not use" in " ".join(refused.err.split())
