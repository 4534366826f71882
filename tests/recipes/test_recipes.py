"""The recipes for published models: each trains and packs a random model of its real layer shapes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgerazor import allocate, models
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.data import RowSettings, open_rows, streaming
from edgerazor.errors import USAGE, UserError
from edgerazor.job import JobContext
from edgerazor.recipe import Calibrate
from edgerazor.training import objective, phase_schedule
from edgerazor.workdir import WorkDir
from helpers.places import ROOT
from helpers.tiny_job import Run
from helpers.tiny_models import ModelMaker, mostly_slow

FOLDER = ROOT / "recipes"
PUBLISHED_BITS = (1.58, 1.88, 2.79, 4.0)
#: recipe -> model type and the configuration that its hub folder has, head_dim and sharing of the embedding included
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": (
        "qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-1.7b": (
        "qwen3",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "mobilellm-350m": (
        "llama",
        {
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
}
#: EdgeQAT's model, which both of its recipes are for
BABY_LLAMA = (
    "llama",
    {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 16000,
        "tie_word_embeddings": False,
    },
)
#: million parameters of the whole model, as its authors count them
PARAMETERS = {"qwen3-0.6b": 596, "qwen3-1.7b": 1721, "mobilellm-350m": 376, "llama-3.2-1b": 1236, "smollm2-135m": 135}
EVERY_RECIPE = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", EVERY_RECIPE, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    assert bool(recipes.build(recipes.load(path), f"The recipe {path}").model) == (path.stem != "phases")


def load(name: str) -> recipes.Recipe:
    return recipes.build(recipes.load(FOLDER / f"{name}.yaml"))


@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_model_gets_the_published_average(name: str) -> None:
    """On the meta device, where the real model costs no memory: bits, whole groups, and the size of the file."""
    model_type, shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**shape))
        model.tie_weights()
    sites = models.structure(model).targets
    settings = load(name).calibrate
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.6)
    assert all(site.columns % settings.group_size == 0 for site in sites)  # no shorter group at the end of a row
    real = []
    for bits in PUBLISHED_BITS:
        plan = allocate.make_plan(sites, settings.model_copy(update={"bits": bits}))
        assert plan.nominal_bits() == pytest.approx(bits, abs=0.01)
        assert {plan[site.name].formats for site in sites if site.kind == "embedding"} == {("int4",)}
        real.append(8 * plan.bytes() / plan.weights())
    assert real == sorted(real)
    if name == "qwen3-0.6b":  # the paper's own accounting of its 1.58 bits is 2.27
        assert real[0] == pytest.approx(2.27, abs=0.05)


#: bits -> weights of ce, eakld and lafd, as in the training settings of EdgeRazor's authors (at their commit 77c3524)
QWEN3 = dict.fromkeys((1.58, 1.88, 2.79), (0.1, 2.0, 0.1)) | {4.0: (0.05, 2.0, 0.5)}
MOBILELLM = dict.fromkeys((1.58, 1.88), (0.2, 4.0, 1.0)) | dict.fromkeys((2.79, 4.0), (0.5, 2.0, 0.1))
#: recipe -> those weights, group size, warm-up, schedule, sequences in a step, and steps or tokens; ours for the two
#: models that they do not have, but for weights and group size
PUBLISHED: dict[str, tuple[dict[float, tuple[float, ...]], int, float, str, int, int]] = {
    "qwen3-0.6b": (QWEN3, 256, 0.05, "constant", 1024, 10_900),
    "qwen3-1.7b": (QWEN3, 256, 0.05, "constant", 1536, 14_500),
    "mobilellm-350m": (MOBILELLM, 64, 0.01, "cosine", 1920, 4_480),
    "llama-3.2-1b": (QWEN3, 256, 0.05, "constant", 32, 200_000_000),
    "smollm2-135m": (MOBILELLM, 64, 0.05, "constant", 32, 200_000_000),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_published_settings(name: str) -> None:
    """EdgeRazor, arXiv 2605.04062: loss weights differ from model to model and with the bits."""
    recipe = load(name)
    settings, calibrate = recipe.distill, recipe.calibrate
    by_bits, *others = PUBLISHED[name]
    for bits, weights in by_bits.items():
        (phase,) = phase_schedule.make_phases(settings, recipe.model, 4, objective.placeholder_metrics(4), bits)
        assert [(term.name, term.weight) for term, _ in phase.terms] == list(
            zip(("ce", "eakld", "lafd"), weights, strict=True)
        )
    sequences = settings.batch_size * settings.accumulation
    found = [calibrate.group_size, settings.warmup, settings.schedule, sequences, settings.steps or settings.tokens]
    assert found == others
    assert (settings.betas, settings.weight_decay, settings.learning_rate) == ((0.9, 0.95), 0.01, 2e-5)
    assert (settings.clip, settings.final_learning_rate, recipe.data.sequence_length) == (1.0, 0.0, 1024)
    assert (calibrate.activation_bits, calibrate.kv_bits) == (8, 8)


def test_what_the_weights_of_losses_depend_on(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The bits that are asked for; where a size is, those that the plan made of it; and the recipe says so alone."""
    recipe = load("qwen3-0.6b")
    sized = recipe.model_copy(update={"calibrate": recipe.calibrate.model_copy(update={"target_size": 10**9})})
    plan = allocate.make_plan([models.QuantTarget("a", "linear", 0, 8, 8)], Calibrate(bits=4.0, plan="interleave"))
    contexts = [JobContext(each, WorkDir(tmp_path), Console(quiet=True)) for each in (recipe, sized)]
    assert (contexts[0].nominal_bits(plan), contexts[1].nominal_bits(plan), contexts[1].nominal_bits(None)) == (
        1.88,
        4,
        1.88,
    )
    assert objective.describe(recipe.distill.losses, 4) != objective.describe(recipe.distill.losses, 3.99)
    never = {"losses": [{"name": "ce", "from_bits": 6}]}
    path = shortened("smollm2-135m", llama, text_file, tmp_path / "r.yaml")
    path.write_text(yaml.safe_dump(recipes.merge(recipes.load(path), {"distill": never})), encoding="utf-8")
    refused = run("distill", "--recipe", path, "--work", tmp_path / "job")
    assert refused.code == USAGE
    assert "None of the recipe's losses counts at 1.88 bits" in refused.err


def test_the_published_conversations(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data section of a recipe over a stand-in: data sets of the hub's shape, with configurations, in folders."""
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    )
    turns = [{"from": "human", "value": "who are you?"}, {"from": "gpt", "value": "a model"}]
    talk = [{"role": "user", "content": "what is two and two?"}, {"role": "assistant", "content": "four"}]
    rows = {"7M": {"id": 1, "conversations": turns}, "Gen": {"id": 2, "conversations": turns, "label": "x"}}
    write_hub_folder(tmp_path / "BAAI" / "Infinity-Instruct", rows)
    write_hub_folder(tmp_path / "allenai" / "tulu-v3.1-mix-preview-4096-OLMoE", {"default": {"messages": talk}})
    monkeypatch.chdir(tmp_path)  # an id of the hub is a folder here
    monkeypatch.setattr(streaming, "BLOCK", 8)
    asked = load("qwen3-0.6b").data
    assert [(source.dataset, source.config) for source in asked.train] == [
        ("BAAI/Infinity-Instruct", "7M"),
        ("BAAI/Infinity-Instruct", "Gen"),
        ("allenai/tulu-v3.1-mix-preview-4096-OLMoE", None),
    ]
    found, held_out = open_rows(asked.train, tokenizer, RowSettings(64, 0, 0.05, asked.packing, held_out_rows=2))
    assert held_out is not None
    batches = [found.row(index) for index in range(32)]
    assert {tokenizer.decode(each["labels"][each["labels"] != -100]) for each in batches} == {"a model</s>", "four</s>"}
    assert {tokenizer.decode(each["input_ids"]) for each in batches} == {
        "[user]who are you?</s>[assistant]a model</s>",
        "[user]what is two and two?</s>[assistant]four</s>",
    }


def write_hub_folder(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    """A data set as the hub keeps it: configuration -> a row, which it has 40 times."""
    folder.mkdir(parents=True)
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in rows]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)


def shortened(name: str, model: Path, text: Path, path: Path) -> Path:
    """The recipe with everything as published but the model, the text, and how long it takes."""
    changes = {
        "model": str(model),
        "threads": 1,
        "data": {"train": [{"file": str(text)}], "sequence_length": 32},
        "calibrate": {"sequences": 2, "sensitivity_tokens": 64},
        "distill": {"steps": 2, "batch_size": 1, "accumulation": 1, "evaluate_sequences": 1},
    }
    path.write_text(yaml.safe_dump(recipes.merge(recipes.load(FOLDER / f"{name}.yaml"), changes)), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("bits", PUBLISHED_BITS)
@pytest.mark.parametrize("name", SHAPES)
def test_two_steps_and_a_packed_layer_of_the_real_shape(
    name: str, bits: float, run: Run, make_model: ModelMaker, text_file: Path, tmp_path: Path
) -> None:
    """At 1.88 bits the whole layer; at the others, where only rows change their format, a narrower feed-forward."""
    model_type, shape = SHAPES[name]
    if bits != 1.88:
        shape = {**shape, "intermediate_size": 1024}
    recipe = shortened(name, layer_of(model_type, shape, make_model, tmp_path), text_file, tmp_path / "r.yaml")
    trained, packed = train_and_pack(run, recipe, tmp_path / "job", "--bits", bits)
    assert trained["notation"] == f"W{bits:g}-A8-KV8"
    assert packed["nominal_bits"] == pytest.approx(bits, abs=0.01)


def layer_of(model_type: str, shape: dict[str, Any], make_model: ModelMaker, folder: Path) -> Path:
    """A random model of one layer and a few words."""
    small = {**shape, "num_hidden_layers": 1, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    make_model(folder / "model", CONFIG_MAPPING[model_type](**small), dtype=torch.bfloat16)
    return folder / "model"


def train_and_pack(run: Run, recipe: Path, work: Path, *options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two steps, and the packed model, which is verified against what was trained."""
    trained = run("distill", "--recipe", recipe, "--work", work, "--json", *options)
    assert trained.code == 0, trained.err
    assert trained.json()["steps"] == 2
    packed = run("pack", "--work", work, "--json")
    assert packed.code == 0, packed.err
    assert packed.json()["verified"] is True
    shutil.rmtree(work)  # half a gigabyte that pytest would keep
    return trained.json(), packed.json()


@pytest.mark.parametrize("name", ["edgeqat-w4a8", "edgeqat-w4a4"])
def test_edgeqat(name: str, run: Run, make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Its settings (arXiv 2402.10787 and the code of its authors), and two steps of a layer of its model's shape."""
    settings = load(name).distill
    terms = {term.name: (term.weight, term.temperature) for term in settings.losses}
    assert terms == {
        "ce": (0.5, None),
        "forward_kl": (0.5, 2.0),
        "qk_entropy": (1.0, None),
        "attention_cosine": (1.0, None),
    }
    assert (settings.learning_rate, settings.schedule, settings.weight_decay) == (2.5e-4, "cosine", 0.1)
    calibrate = load(name).calibrate
    assert (calibrate.scales, calibrate.activation_scales, calibrate.activation_bits) == ("learned", "asymmetric", 8)
    recipe = shortened(name, layer_of(*BABY_LLAMA, make_model, tmp_path), text_file, tmp_path / "r.yaml")
    trained, packed = train_and_pack(run, recipe, tmp_path / "job")
    assert trained["notation"] == {"edgeqat-w4a8": "W4-A8-KV8", "edgeqat-w4a4": "W4-A8/4-KV8"}[name]
    assert packed["nominal_bits"] == pytest.approx(4, abs=0.01)


def test_bits_of_a_recipe_on_the_command_line(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`edgerazor run RECIPE --bits B` is the recipe at other bits."""
    from edgerazor import pipeline

    asked: list[recipes.Recipe] = []
    monkeypatch.setattr(pipeline, "run_all", lambda recipe, *_: asked.append(recipe))
    recipe = shortened("smollm2-135m", llama, text_file, tmp_path / "r.yaml")
    for words in ([], ["--bits", "2.79"]):
        run("run", recipe, "--work", tmp_path / "job", *words)
    assert [each.calibrate.bits for each in asked] == [1.88, 2.79]
    assert asked[0].model_copy(update={"calibrate": asked[1].calibrate}) == asked[1]
    run("run", recipe, "--work", tmp_path / "job", "--bits", "4", "--steps", "3")
    assert (asked[2].calibrate.bits, asked[2].distill.steps) == (4, 3)
    wrong = run("run", recipe, "--work", tmp_path / "job", "--bits", "1.2")
    assert wrong.code == 2
    assert "--bits is 1.2; expected a number from 1.58 to 8" in wrong.err


# The schedule of phases, and recipes by their names ---------------------------------------------------------------


@pytest.mark.slow
def test_a_recipe_by_its_name(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model, bits and a text are all that it needs; every phase takes its part and what is made can be packed."""
    monkeypatch.chdir(tmp_path)
    small = ["--sequence-length", 32, "--batch-size", 1, "--accumulation", 1, "--threads", 1, "--reconstruct", 16]
    asked = [llama, "--bits", 2, "--recipe", "phases", "--data", text_file, "--steps", 8, *small]
    dry = run("distill", *asked, "--dry-run", "--json").json()
    assert {name: each["steps"] for name, each in dry["phases"].items()} == {
        "reconstruct": 32,
        "1 scales": 2,
        "2 all": 6,
    }
    done = run("distill", *asked, "--json")
    assert done.code == 0, done.err
    phases = done.json()["phases"]
    assert [each["what"] for each in phases] == ["initialise", "reconstruct", "scales", "all"]
    assert phases[1]["held_out"] < phases[0]["held_out"]
    packed = run("pack", "--json")
    assert packed.code == 0, packed.err
    assert packed.json()["verified"] is True
    refused = run("distill", "--recipe", "phases", "--work", "other")
    assert refused.code == USAGE
    assert "names no model" in refused.err
    assert "edgerazor distill MODEL --recipe" in refused.err


def test_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()  # a folder is no recipe
    for name in ("phases", "qwen3-0.6b"):
        assert recipes.find(Path(name)) == FOLDER / f"{name}.yaml"
    Path("phases.yaml").touch()
    assert recipes.find(Path("phases")) == Path("phases.yaml")
    Path("phases").touch()
    assert recipes.find(Path("phases")) == Path("phases")
    for path in ("elsewhere/phases", "nowhere.yaml", str(tmp_path / "phases")):
        assert recipes.find(Path(path)) == Path(path)
    for name, hint in (
        ("phasse", "Did you mean phases"),
        ("recipes", "Known: "),
        ("qwen3-0.6", "Did you mean qwen3-0.6b"),
    ):
        with pytest.raises(UserError, match=f"There is no recipe called '{name}'") as wrong:
            recipes.find(Path(name))
        assert wrong.value.hint.startswith(hint)
        assert wrong.value.code == USAGE


def stands_alone(path: Path) -> bool:
    """Whether a recipe needs no file or folder of the checkout."""
    recipe = recipes.build(recipes.load(path))
    files = [source.file for source in (*recipe.data.train, *recipe.data.held_out) if source.file]
    return not files and not os.path.isabs(recipe.model)


def test_an_installation_finds_the_recipes_that_stand_alone(tmp_path: Path) -> None:
    """A wheel, built from a copy because building leaves folders behind, and installed into a folder of its own."""
    root, copy, prefix = FOLDER.parent, tmp_path / "source", tmp_path / "installed"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    shutil.copytree(root / "edgerazor", copy / "edgerazor", ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    shutil.copytree(FOLDER, copy / "recipes", ignore=lambda _, names: [n for n in names if not n.endswith(".yaml")])
    alone = sorted(path.stem for path in EVERY_RECIPE if stands_alone(path))
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    assert sorted(Path(name).stem for names in listed.values() for name in names) == alone

    def python(folder: Path, *words: str, **environment: str) -> str:
        settings = {**os.environ, **environment}
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=folder, env=settings, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # without kernels, which take minutes
    python(copy, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')", CXX="none")
    (wheel,) = copy.glob("*.whl")
    python(
        copy,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        "--prefix",
        str(prefix),
        str(wheel),
    )
    (site,) = prefix.glob("lib/python*/site-packages")
    ask = "from edgerazor import recipe; print(recipe.__file__, *sorted(recipe.shipped()), recipe.shipped()['phases'])"
    found = python(prefix, "-c", ask, PYTHONPATH=str(site)).split()
    assert found[0].startswith(str(prefix))
    assert found[1:-1] == alone
    assert Path(found[-1]).read_text() == (FOLDER / "phases.yaml").read_text()


# Recipes made for GGUF --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow(SHAPES, *list(SHAPES)[:2]))
def test_a_recipe_made_for_gguf(name: str, run: Run, make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    """Where all rows are multiples of 256 every matrix has one format, whose type takes about the packed bits; where
    they are not, int4 in blocks of 32 is what the smallest exact type stores. Training is as in the other recipe."""
    recipe, plain = load(f"{name}-gguf"), load(name)
    assert recipe.model_copy(update={"calibrate": plain.calibrate, "pack": plain.pack}) == plain
    model_type, shape = SHAPES[name]
    small = {**shape, "intermediate_size": 1024}
    path = shortened(f"{name}-gguf", layer_of(model_type, small, make_model, tmp_path), text_file, tmp_path / "r.yaml")
    quick = {"calibrate": {"sensitivity": "fisher", "sensitivity_tokens": 32}} if recipe.calibrate.bits < 4 else {}
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipes.merge(recipes.load(path), quick)), encoding="utf-8")
    assert run("distill", "--recipe", short, "--work", tmp_path / "job", "--quiet").code == 0
    packed = run("pack", "--work", tmp_path / "job", "--json")
    assert packed.code == 0, packed.err
    (export,) = packed.json()["exports"]
    assert export["lossy"] == []
    whole = shape["hidden_size"] % 256 == 0
    assert set(export["types"]["linear"]) <= ({"TQ1_0", "Q2_K", "Q3_K", "Q4_0"} if whole else {"Q4_0"})
    assert ("TQ1_0" in export["types"]["linear"]) == whole
    assert set(export["types"]["embedding"]) == {"Q4_0"}
    assert export["real_bits"] < 1.2 * export["packed_real_bits"]
    assert "mix" not in packed.err
    shutil.rmtree(tmp_path / "job")
