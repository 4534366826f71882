"""Every family of decoders through every stage: what is packed is what was trained, whatever the architecture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from edgerazor import models, modules, packed, pipeline, transformers_plugin
from edgerazor.allocate import Plan
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.losses import Attention, Head
from edgerazor.models import attention_capture
from edgerazor.recipe import Recipe, build
from edgerazor.workdir import WorkDir
from helpers.tiny_models import (
    FAMILIES,
    GROUP_SIZE,
    RECURRENT,
    SHAPE,
    VOCABULARY,
    ModelMaker,
    family_config,
    mostly_slow,
)

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

QUIET = Console(quiet=True)
IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def recipe_of(model: Path, text: Path, bits: float = 2.0) -> Recipe:
    return build(
        {
            "model": str(model),
            "device": "cpu",
            "data": {"train": [{"file": str(text)}], "sequence_length": 32},
            "calibrate": {"bits": bits, "group_size": GROUP_SIZE, "sequences": 4, "sensitivity_tokens": 64},
            "distill": {
                "steps": 2,
                "batch_size": 2,
                "evaluate_sequences": 2,
                "precision": "float32",
                "learning_rate": 1e-3,
            },
            "eval": {"text_sequences": 2},
            "bench": {"prefill_tokens": 8, "decode_tokens": 2, "rounds": 1},
        }
    )


@dataclass
class Razored:
    """A model after calibrate, distill, pack and eval."""

    teacher: Path
    recipe: Recipe
    work: WorkDir
    results: dict[str, dict[str, Any]]

    @property
    def folder(self) -> Path:
        return self.work.folder("pack")

    def plan(self) -> Plan:
        return Plan.model_validate_json(self.work.plan_file.read_text())

    def student(self) -> torch.nn.Module:
        """The training modules over the saved master weights."""
        student, _ = models.load(self.teacher, dtype=torch.float32)
        plan = self.plan()
        settings = modules.Settings(plan.activation_bits, plan.kv_bits, plan.group_size)
        modules.prepare_for_training(student, models.structure(student), plan.specs(), settings)
        missing, unexpected = student.load_state_dict(
            load_file(self.work.student("best") / "model.safetensors"), strict=False
        )
        assert unexpected == []
        assert len(missing) == (1 if "head" not in {matrix.kind for matrix in plan.matrices} else 0)  # a tied head
        return student.eval()


def ran(stage: str, recipe: Recipe, work: WorkDir) -> dict[str, Any]:
    """The result of a stage, and of what it needs, as its JSON has it."""
    result = pipeline.run(stage, recipe, work, QUIET)
    assert result is not None
    return result.model_dump(mode="json")


def razor(teacher: Path, text: Path, work: Path, bits: float = 2.0) -> Razored:
    recipe, folder = recipe_of(teacher, text, bits), WorkDir(work)
    return Razored(teacher, recipe, folder, {name: ran(name, recipe, folder) for name in ("distill", "pack", "eval")})


def check_exact(done: Razored) -> None:
    """Packed equals trained: the digests, the logits, and what eval saw."""
    student = done.student()
    model, _ = transformers_plugin.load(done.folder)
    with torch.no_grad(), modules.encoded_once(student) as digests, pytest.MonkeyPatch.context() as patch:
        trained = student(input_ids=IDS, use_cache=False).logits
        native = model(input_ids=IDS, use_cache=False).logits
        patch.setenv("EDGERAZOR_ISA", "reference")
        ours = model(input_ids=IDS, use_cache=False).logits
    assert (trained - ours).abs().max() <= 1e-5 * trained.abs().max()
    # Sums in another order move some activations by a step of 1/127.
    assert (trained - native).norm() <= 0.02 * trained.norm()
    packed.verify_digests(done.folder, digests)
    assert digests == json.loads((done.work.student("best") / "digests.json").read_text())
    pack, text = done.results["pack"], done.results["eval"]["text"]
    assert pack["verified"]
    assert text["tokens"] == 2 * 31
    assert 0 < text["kl"] < 5
    sizes = packed.size_table(packed.PackedModel.open(done.folder))
    assert sum(each.bytes for each in sizes.classes if each.kind != "other") == done.plan().bytes()


#: Every family, with head and embedding tied and apart; each way of a model occurs among the usual ones.
JOBS = [(family, tied) for family in FAMILIES for tied in (True, False)]
USUAL = [("llama", True), ("qwen3", False), ("gemma2", True), ("phi", False), ("phi3", True), ("olmo2", False)]


@pytest.fixture(scope="module", params=mostly_slow(JOBS, *USUAL), ids=str)
def done(
    request: pytest.FixtureRequest, make_model: ModelMaker, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Razored:
    family, tied = request.param
    folder = tmp_path_factory.mktemp(family)
    make_model(folder / "model", family, tie_word_embeddings=tied)
    return razor(folder / "model", text_file, folder / "work")


def test_packed_equals_trained(done: Razored) -> None:
    check_exact(done)
    header = packed.PackedModel.open(done.folder).header
    tied = json.loads((done.teacher / "config.json").read_text())["tie_word_embeddings"]
    assert {entry.kind for entry in header.matrices.values()} == {"linear", "embedding"} | (set() if tied else {"head"})
    assert len(header.tied) == (1 if tied else 0)


@torch.no_grad()
def test_a_cache_changes_nothing(done: Razored) -> None:
    """Keys and values are rounded token by token, so greedy text with a cache is greedy text without one."""
    model, _ = transformers_plugin.load(done.folder, cache_decoded=True)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    text = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=True, **options)
    logits = model(input_ids=text, use_cache=False).logits[:, 23:-1]  # [2, 12, vocabulary]
    chosen = logits.gather(-1, text[:, 24:, None]).squeeze(-1)
    # Sums in another order may move an activation by one step of 1/127, and so decide between two equals.
    assert ((logits.amax(-1) - chosen) <= 0.01 * logits.abs().amax(-1)).all()
    whole = model(input_ids=text, use_cache=True).logits[:, 23:-1]
    torch.testing.assert_close(whole, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


@torch.no_grad()
def test_later_tokens_change_no_earlier_ones(done: Razored) -> None:
    model, _ = transformers_plugin.load(done.folder, cache_decoded=True)
    whole, part = model(input_ids=IDS).logits[:, :10], model(input_ids=IDS[:, :10]).logits
    assert (whole - part).abs().max() <= 0.02 * whole.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_bench_measures_what_was_packed(family: str, make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model", family)
    recipe, work = recipe_of(tmp_path / "model", text_file), WorkDir(tmp_path / "work")
    recipe = recipe.model_copy(update={"threads": 1, "pack": recipe.pack.model_copy(update={"source": "teacher"})})
    size = ran("pack", recipe, work)["bytes"]
    result = ran("bench", recipe, work)
    assert result["bytes"] == size
    assert {run["phase"] for run in result["runs"]} == {"prefill", "decode"}
    assert all(run["tokens_per_second"] > 0 for run in result["runs"])


# --- checkpoints as they are found -------------------------------------------------------------


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_head(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")}))


def shard(folder: Path) -> None:
    model, _ = models.load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


CHECKPOINTS: dict[str, tuple[dict[str, Any], Callable[[Path], None]]] = {
    "float16": ({"dtype": torch.float16}, lambda folder: None),
    "bfloat16": ({"dtype": torch.bfloat16}, lambda folder: None),
    "sharded": ({}, shard),
    "only_embedding": ({"tie_word_embeddings": True}, lambda folder: None),
    "only_head": ({"tie_word_embeddings": True}, only_head),
    "padded_vocabulary": ({"vocab_size": VOCABULARY + 20}, lambda folder: None),
    "no_format_metadata": (
        {},
        lambda folder: save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors"),
    ),
}


@pytest.mark.parametrize("name", mostly_slow(CHECKPOINTS, "bfloat16", "sharded", "only_head"))
def test_checkpoints(name: str, make_model: ModelMaker, text_file: Path, tmp_path: Path) -> None:
    options, change = CHECKPOINTS[name]
    original = make_model(tmp_path / "model", "llama", **options)
    if name == "only_embedding":
        assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    change(tmp_path / "model")
    loaded, _ = models.load(tmp_path / "model")
    assert loaded.dtype == options.get("dtype", torch.float32)
    stored = original.state_dict()
    assert all(torch.equal(tensor, stored[tensor_name]) for tensor_name, tensor in loaded.state_dict().items())
    check_exact(razor(tmp_path / "model", text_file, tmp_path / "work"))


# --- refusals ----------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY}


def other(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast, **values: Any) -> None:
    """Write a random model of a class of transformers that is none of ours."""
    kind = getattr(transformers, name)
    kind(kind.config_class(**values)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


REFUSED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "encoder": (
        "BertForMaskedLM",
        {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        ("BertForMaskedLM", "not a causal language model"),
    ),
    "encoder_decoder": (
        "T5ForConditionalGeneration",
        {**SMALL, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
        ("encoder-decoder",),
    ),
    "no_linear": (
        "GPT2LMHeadModel",
        {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
        ("GPT2LMHeadModel", "no nn.Linear"),
    ),
    "experts_gpt_oss": (
        "GptOssForCausalLM",
        {**SHAPE, "num_local_experts": 4},
        ("GptOssForCausalLM stacks its experts in a way that is not understood",),
    ),
}


def sentence(error: UserError, *words: str) -> None:
    """One sentence for people, with these words in it."""
    assert "\n" not in error.message
    assert error.message.endswith(".")
    assert "Traceback" not in error.message
    for word in words:
        assert word in error.message, (word, error.message)


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    kind, values, words = REFUSED[name]
    other(tmp_path / "model", kind, tokenizer, **values)
    with pytest.raises(UserError) as caught:
        models.structure(models.load(tmp_path / "model")[0])
    sentence(caught.value, *words)


def configure(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_shard(folder: Path) -> None:
    shard(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(95)


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def damaged_index(folder: Path) -> None:
    """Without the single file, beside which no index is read."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")


DAMAGE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "gptq": (configure(quantization_config={"quant_method": "gptq", "bits": 4}), ("already quantized (gptq)",)),
    "packed": (configure(quantization_config={"quant_method": "edgerazor"}), ("already quantized (edgerazor)",)),
    "odd_quantization": (configure(quantization_config="yes"), ("already quantized",)),
    "remote_code": (configure(auto_map={"AutoModelForCausalLM": "modeling.Own"}), ("Python code of its own",)),
    "unknown_type": (configure(model_type="frobnicate"), ("frobnicate",)),
    "classifier": (configure(architectures=["LlamaForSequenceClassification"]), ("not a causal language model",)),
    "bad_value": (configure(hidden_size="many"), ("hidden_size", "many")),
    "bad_heads": (configure(num_attention_heads=7), ("multiple of the number of attention heads",)),
    "bad_rotation": (configure(rope_parameters={"rope_type": "odd"}), ("odd",)),
    "no_config": (lambda folder: (folder / "config.json").unlink(), ("without a config.json",)),
    "no_json": (write("config.json", '{"model_type": '), ("config.json cannot be read",)),
    "json_list": (write("config.json", "[]"), ("config.json cannot be read: it holds a list",)),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), ("no safetensors weights.",)),
    "pickled": (pickle_only, ("pickled weights (.bin) are not read",)),
    "cut_off": (cut, ("model.safetensors is damaged",)),
    "lost_shard": (lose_shard, ("lacks the weight file model-00002-of",)),
    "damaged_index": (damaged_index, ("index.json is damaged",)),
    "missing_tensor": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight")),
        ("lack the tensor model.layers.1.mlp.up_proj.weight.",),
    ),
    "misshapen": (
        lambda folder: edit_weights(folder, reshape),
        ("model.norm.weight is [95], not [96]",),
    ),
    "no_tokenizer": (no_tokenizer, ("has no tokenizer",)),
    "bad_tokenizer": (write("tokenizer.json", "{"), ("cannot load the tokenizer",)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence(name: str, llama: Path, tmp_path: Path) -> None:
    change, words = DAMAGE[name]
    folder = shutil.copytree(llama, tmp_path / "model")
    change(folder)
    with pytest.raises(UserError) as caught:
        models.structure(models.load(folder)[0])
    sentence(caught.value, *words)


def test_attention_that_cannot_be_rounded_is_refused_at_the_start(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which families those are changes with transformers, so one is made to be of them."""
    recipe = recipe_of(llama, text_file)
    model, _ = models.load(llama)
    monkeypatch.delattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    with pytest.raises(UserError, match="LlamaForCausalLM cannot be rounded to 8 bits") as caught:
        pipeline.run("calibrate", recipe, WorkDir(tmp_path / "work"), QUIET)
    assert "--kv-bits 16" in caught.value.hint


def test_a_family_whose_attention_cannot_be_rounded_in_every_transformers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "eos_token_id": 1}
    other(tmp_path / "model", "GPTJForCausalLM", tokenizer, **SMALL, **shape)
    recipe = recipe_of(tmp_path / "model", text_file)
    recipe = recipe.model_copy(update={"calibrate": recipe.calibrate.model_copy(update={"kv_bits": 16})})
    work = WorkDir(tmp_path / "wide")
    results = {name: ran(name, recipe, work) for name in ("distill", "pack", "eval")}
    check_exact(Razored(tmp_path / "model", recipe, work, results))


@pytest.mark.parametrize(
    ("source", "words", "code"),
    [
        ("", "No model was named", 2),
        ("./nowhere", "no folder ./nowhere", 2),
        ("a b!c/d", "neither a local folder nor a model", 1),
    ],
)
def test_names_that_are_no_model(source: str, words: str, code: int) -> None:
    with pytest.raises(UserError) as caught:
        models.resolve(source)
    sentence(caught.value, words)
    assert caught.value.code == code


def test_a_file_is_no_model(llama: Path) -> None:
    with pytest.raises(UserError, match="is a file; a model is a folder"):
        models.resolve(str(llama / "config.json"))


OFFLINE = """
import json, sys
import torch
from edgerazor import models
from edgerazor.errors import UserError
found = models.resolve("someone/tiny")
pinned = models.resolve("someone/tiny", sys.argv[1])
model, _ = models.load("someone/tiny")
refused = []
for name, revision in (("someone/else", None), ("someone/tiny", "v2")):
    try:
        models.resolve(name, revision)
    except UserError as error:
        refused.append(error.message)
described = models.describe_source("someone/tiny", found)
print(json.dumps([str(found), str(pinned), described, float(model.model.norm.weight.sum()), refused]))
"""


def test_a_hub_model_in_the_cache_is_found_without_a_network(llama: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = shutil.copytree(llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE, commit], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found, pinned, described, total, refused = json.loads(ran.stdout)
    assert found == pinned == str(snapshot)
    assert described == {"name": "someone/tiny", "revision": commit}
    assert total == pytest.approx(float(load_file(llama / "model.safetensors")["model.norm.weight"].sum()))
    assert [message.split(" is not a local folder")[0] for message in refused] == [
        "someone/else",
        "someone/tiny (revision v2)",
    ]
    assert all("could not be reached" in message for message in refused)


# --- structure and fingerprint -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_structure_covers_every_matrix(family: str) -> None:
    config = family_config(family, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    found = models.structure(model)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}  # convolutions have 3
    matrices -= {f"{name}.weight" for name in found.sixteen}
    assert {f"{site.name}.weight" for site in found.targets} == matrices
    assert sum(site.weights for site in found.targets) == sum(model.get_parameter(name).numel() for name in matrices)
    assert [site.layer for site in found.linears] == sorted(site.layer or 0 for site in found.linears)
    assert (found.layers_path, found.layer_count) == ("model.layers", config.num_hidden_layers)


def test_a_fingerprint_is_of_contents_not_of_places(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "elsewhere")
    before = models.fingerprint(llama)
    assert models.fingerprint(copy) == before
    (copy / "README.md").write_text("words")
    assert models.fingerprint(copy) == before
    edit_weights(copy, lambda weights: weights["model.norm.weight"].add_(1e-3))
    assert models.fingerprint(copy) != before


def test_random_models_follow_their_seed(llama: Path) -> None:
    one, same, another = (models.initialise(llama, seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, another)
    assert one.dtype == torch.float32


@torch.no_grad()
def test_hidden_states_are_those_between_the_layers(llama: Path) -> None:
    model, _ = models.load(llama)
    with models.capture_hidden(model, models.structure(model), (0, 1, 2)) as hidden:
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[0], expected[0])
    assert torch.equal(hidden[1], expected[1])
    assert torch.equal(model.model.norm(hidden[2]), expected[2])
    hidden.clear()
    model(input_ids=IDS)
    assert hidden == {}


# --- attention -----------------------------------------------------------------------------------


def loaded(family: str, make_model: Any, folder: Path, implementation: str) -> Any:
    """A family's tiny model, four layers deep, with one of transformers' attention implementations."""
    windows = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    layers = windows if family in ("exaone4", "gemma3", "gemma4", "olmo3") else {}
    rotations = {"no_rope_layers": [1, 0, 1, 0]} if family == "smollm3" else {}
    make_model(folder, family, num_hidden_layers=4, **layers, **rotations)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()


def maps(seen: Attention) -> torch.Tensor:
    """[B, heads, T, T], as the losses make them."""
    assert seen.query is not None
    assert seen.key is not None
    key = seen.key.repeat_interleave(seen.query.shape[1] // seen.key.shape[1], 1)
    scores = seen.query @ key.mT * seen.scale
    scores = scores if seen.cap is None else seen.cap * torch.tanh(scores / seen.cap)
    rows = torch.arange(scores.shape[2])
    visible = torch.stack([seen.allowed(sample, rows, len(rows)) for sample in range(len(scores))])
    return torch.softmax(scores.masked_fill(~visible[:, None], float("-inf")), -1)


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in RECURRENT])
def test_attention_maps_are_those_of_the_model(family: str, make_model: Any, tmp_path: Path) -> None:
    """From queries and keys as they enter attention; a window of 8 and padding to the right are respected."""
    model = loaded(family, make_model, tmp_path, "eager")
    found = models.structure(model)
    ids = torch.arange(2 * 20).view(2, 20) % 17
    padding = torch.ones_like(ids)
    padding[1, 15:] = 0
    expected = model(input_ids=ids, attention_mask=padding, output_attentions=True)
    models.enable_attention_capture(model)
    models.check_attention_capture(model, found, (1, 2, 3, 4))
    with models.capture_attention(model, found, (1, 2, 4), ("query", "key")) as seen:
        output = model(input_ids=ids, attention_mask=padding, use_cache=False)
    assert sorted(seen) == [1, 2, 4]
    assert torch.equal(output.logits, expected.logits)
    for layer, each in seen.items():
        assert each.value is None
        torch.testing.assert_close(maps(each)[0], expected.attentions[layer - 1][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            maps(each)[1, :, :15], expected.attentions[layer - 1][1, :, :15], rtol=1e-4, atol=1e-6
        )
    if not models.caps_attention(model.config):
        quick = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
        plain = quick(input_ids=ids).logits
        models.enable_attention_capture(quick)
        with models.capture_attention(quick, found, (1, 2, 4), ("query", "key")) as fast:
            assert torch.equal(quick(input_ids=ids, use_cache=False).logits, plain)
        for layer, each in fast.items():
            torch.testing.assert_close(maps(each)[0], maps(seen[layer])[0], rtol=1e-4, atol=1e-6)
    seen.clear()
    model(input_ids=ids)
    assert seen == {}


@pytest.mark.parametrize("family", RECURRENT)
def test_maps_of_a_layer_without_attention_are_refused(family: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(family_config(family))
    models.enable_attention_capture(model)
    with pytest.raises(UserError, match="attention"):
        models.check_attention_capture(model, models.structure(model), (1,))
    models.check_attention_capture(model, models.structure(model), (2,))


def test_attention_that_cannot_be_seen_or_explained_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models.load(llama)
    found = models.structure(model)
    modeling = sys.modules[type(model).__module__]
    with monkeypatch.context() as patch:
        patch.delattr(modeling, "ALL_ATTENTION_FUNCTIONS")
        with pytest.raises(UserError) as caught:
            models.enable_attention_capture(model)
        sentence(caught.value, "LlamaForCausalLM", "no exchangeable attention")
    with pytest.raises(UserError) as caught:
        models.check_attention_capture(model, found, (2,))  # it was not opened
    sentence(caught.value, "layer 2 of LlamaForCausalLM cannot be looked at")

    def with_sinks(*args: Any, **kwargs: Any) -> Any:
        output, weights = transformers.integrations.sdpa_attention.sdpa_attention_forward(*args, **kwargs)
        return 0.9 * output, weights

    models.enable_attention_capture(model)
    monkeypatch.setattr(attention_capture, "sdpa_attention_forward", with_sinks)
    with pytest.raises(UserError) as caught:
        models.check_attention_capture(model, found, (1, 2))
    sentence(caught.value, "layer 1 of LlamaForCausalLM is not made of queries and keys alone")


@pytest.mark.parametrize(
    ("kind", "special"),
    [*FAMILIES.values(), ("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 4.0})],
    ids=[*FAMILIES, "cohere", "granite"],
)
def test_the_heads_logits_are_the_models_own(kind: str, special: dict[str, Any]) -> None:
    """The factor and the cap that a family puts behind its head, and dtypes that round."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | special)).eval()
    found = models.structure(model)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    own = model(input_ids=ids).logits
    with torch.no_grad(), models.final_states(model, found.head_path) as states:
        model(input_ids=ids)
    head = model.get_submodule(found.head_path)
    made = Head(head.weight, head.bias, *models.logit_shape(model, found.head_path)).logits(states[0])
    torch.testing.assert_close(made, own.detach())
    assert models.logit_shape(model.bfloat16(), found.head_path) == models.logit_shape(model.float(), found.head_path)


def test_logits_that_are_not_understood_are_refused(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    plain = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        return type(output)(logits=output.logits * 1.1)

    model.__class__ = type("Odd", (type(model),), {"forward": forward})
    with pytest.raises(UserError, match="Odd changes its logits in a way that is not understood"):
        models.logit_shape(model, "lm_head")
