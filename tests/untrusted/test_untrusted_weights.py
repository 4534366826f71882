"""Weights of strangers: what is no number, stored twice, encoded without a word, or not the tokenizer's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from edgerazor import models, packed
from edgerazor.errors import UserError
from edgerazor.untrusted import vocabulary, weights
from helpers.packed_folders import all_of, write_packed
from helpers.tiny_job import Run, write_recipe
from helpers.tiny_models import VOCABULARY

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


def changed(model: Path, folder: Path, **tensors: Tensor) -> Path:
    """A copy of a model with other tensors (dots in names are written as two underscores)."""
    shutil.copytree(model, folder)
    stored = load_file(model / weights.WEIGHTS)
    stored |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(stored, folder / weights.WEIGHTS, metadata={"format": "pt"})
    return folder


def with_one(model: Path, name: str, value: float) -> dict[str, Tensor]:
    """A tensor of a model of which the last number is another one."""
    tensor = load_file(model / weights.WEIGHTS)[name].clone()
    tensor.view(-1)[-1] = value
    return {name.replace(".", "__"): tensor}


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [(UP, float("nan"), "NaN"), (NORM, float("nan"), "NaN"), (UP, float("-inf"), "infinity")],
)
def test_a_weight_that_is_no_number_is_named(llama: Path, tmp_path: Path, name: str, value: float, what: str) -> None:
    folder = changed(llama, tmp_path / "model", **with_one(llama, name, value))
    for dtype in (None, torch.float32):
        with pytest.raises(UserError, match=f"{name} holds {what}"):
            models.load(folder, dtype=dtype)


def test_every_command_names_it_before_any_work(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "model", **with_one(llama, NORM, float("nan")))
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, text_file)
    for command in (["pack", folder, "--bits", "4"], ["eval", folder, "--data", text_file]):
        done = run(*command, "--work", tmp_path / command[0])
        assert done.code == 1
        assert f"{NORM} holds NaN" in " ".join(done.err.split())
    for command in (["calibrate"], ["distill"]):
        done = run(*command, "--recipe", recipe, "--work", tmp_path / command[0])
        assert done.code == 1
        assert f"{NORM} holds NaN" in " ".join(done.err.split())


def test_finite_numbers_of_every_dtype_pass() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
        assert weights.is_finite(largest)
        assert weights.is_finite(-largest.T)
        largest[2, 4] = torch.nan
        assert not weights.is_finite(largest)
        assert not weights.is_finite(largest.T)
    assert weights.is_finite(torch.empty(0))


def test_the_last_piece_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE", 4)
    numbers = torch.zeros(9)
    assert weights.is_finite(numbers)
    numbers[8] = torch.inf
    assert not weights.is_finite(numbers)


def test_other_tensors_of_a_packed_folder_are_looked_at(llama: Path, tmp_path: Path) -> None:
    opened = write_packed(tmp_path / "good", llama, all_of("int4"))
    others = opened.others()
    others[NORM] = torch.full_like(others[NORM], torch.nan)
    (tmp_path / "bad").mkdir()
    matrices = [opened.matrix(name).source() for name in opened.header.matrices]
    packed.write(
        tmp_path / "bad", matrices, others, tied=opened.header.tied, settings=opened.header.settings, provenance={}
    )
    with pytest.raises(UserError, match=f"{NORM} holds NaN"):
        packed.PackedModel.open(tmp_path / "bad").verify()


def sharded(model: Path, folder: Path, old: Tensor | None) -> Path:
    """A model in two files and an index that puts one tensor into the second; the first may have a copy of it, too."""
    shutil.copytree(model, folder)
    stored = load_file(folder / weights.WEIGHTS)
    (folder / weights.WEIGHTS).unlink()
    second = {UP: stored.pop(UP)}
    index = dict.fromkeys(stored, "a.safetensors") | {UP: "b.safetensors"}
    save_file(stored | ({} if old is None else {UP: old}), folder / "a.safetensors", metadata={"format": "pt"})
    save_file(second, folder / "b.safetensors", metadata={"format": "pt"})
    (folder / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_a_tensor_stored_twice_is_refused_where_the_copies_differ(llama: Path, tmp_path: Path) -> None:
    own = load_file(llama / weights.WEIGHTS)[UP]
    for name, copy in (("alone", None), ("equal", own.clone())):
        found, _ = models.load(sharded(llama, tmp_path / name, copy))
        assert torch.equal(found.state_dict()[UP], own)
    with pytest.raises(UserError, match=r"a\.safetensors and b\.safetensors .* both hold .*up_proj"):
        models.load(sharded(llama, tmp_path / "old", own + 1))


def test_files_that_the_index_does_not_name_are_not_the_models(llama: Path, tmp_path: Path) -> None:
    """As those in another layout beside it."""
    own = load_file(llama / weights.WEIGHTS)[UP]
    folder = sharded(llama, tmp_path / "model", None)
    save_file({UP: own + 1}, folder / "consolidated.safetensors")
    assert torch.equal(models.load(folder)[0].state_dict()[UP], own)


def test_an_index_cannot_leave_its_folder(llama: Path, tmp_path: Path) -> None:
    folder = sharded(llama, tmp_path / "model", None)
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {UP: "../b.safetensors"}}))
    with pytest.raises(UserError, match="outside of its folder"):
        models.load(folder)


def test_float8_without_settings_is_refused_alike(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    stored = load_file(llama / weights.WEIGHTS)[UP].to(torch.float8_e4m3fn)
    folder = changed(llama, tmp_path / "model", **{UP.replace(".", "__"): stored})
    for command in (["pack", folder, "--bits", "8"], ["eval", folder, "--data", text_file]):
        done = run(*command, "--work", tmp_path / command[0])
        assert done.code == 1
        assert f"stores {UP} as F8_E4M3" in " ".join(done.err.split())


def test_an_untied_head_is_said_to_be_one(run: Run, llama: Path, tmp_path: Path) -> None:
    """Where the configuration says tied and the checkpoint holds two matrices, what is packed says the truth."""
    shutil.copytree(llama, tmp_path / "model")
    values = json.loads((llama / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    assert models.load(tmp_path / "model")[0].config.tie_word_embeddings is False
    assert run("pack", tmp_path / "model", "--bits", "4", "--work", tmp_path / "work").code == 0
    assert json.loads((tmp_path / "work" / "packed" / "config.json").read_text())["tie_word_embeddings"] is False


# Tokens -----------------------------------------------------------------------------------------------------------


def extended(model: Path, folder: Path) -> Path:
    """A model whose tokenizer has three tokens, one of them its padding, that the embedding has no rows for."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<think>", "<tool>"]})
    assert tokenizer.pad_token_id == VOCABULARY
    tokenizer.save_pretrained(folder)
    return folder


def test_padding_is_a_token_of_the_model(llama: Path, tmp_path: Path) -> None:
    _, tokenizer = models.load(extended(llama, tmp_path / "model"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < VOCABULARY
    vocabulary.check(tokenizer, [0, VOCABULARY - 1])
    vocabulary.check(tokenizer, [])
    with pytest.raises(UserError, match=r"the token '<tool>', which is number 302 .* rows for 300 tokens"):
        vocabulary.check(tokenizer, [5, VOCABULARY + 2])


def test_text_with_a_token_beyond_the_embedding(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    folder = extended(llama, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text() + "so <think> now")
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, text)
    for command in ("calibrate", "distill"):
        done = run(command, "--recipe", recipe, "--work", tmp_path / command)
        assert done.code == 1
        assert "the token '<think>', which is number 301" in " ".join(done.err.split())
    done = run("eval", folder, "--data", text, "--work", tmp_path / "eval")
    assert (done.code, "the token '<think>'" in " ".join(done.err.split())) == (1, True)


# Links ------------------------------------------------------------------------------------------------------------


def test_links_that_leave_the_folder_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (tmp_path / "secret").write_text("{}")
    os.symlink(tmp_path / "secret", folder / "tokenizer_secret.json")
    (tmp_path / "copy").mkdir()
    for use in (lambda: models.copy_companions(folder, tmp_path / "copy"), lambda: models.load_tokenizer(folder)):
        with pytest.raises(UserError, match=r"tokenizer_secret\.json is a link that leaves"):
            use()
    assert not list((tmp_path / "copy").iterdir())


def test_links_inside_and_of_the_hubs_cache_are_read(llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--who--what"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(llama.iterdir())):
        shutil.copyfile(file, cache / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / file.name)
    os.symlink("tokenizer.json", snapshot / "tokenizer_again.json")
    (tmp_path / "copy").mkdir()
    models.copy_companions(snapshot, tmp_path / "copy")
    assert not (tmp_path / "copy" / "tokenizer.json").is_symlink()
    assert models.load(snapshot)[1].get_vocab() == models.load(llama)[1].get_vocab()


def test_memory_that_is_not_there_is_no_damage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 90186768 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(weights, "safe_open", refuse)
    with pytest.raises(UserError, match="There is not enough memory for the weight file"):
        weights.open_files([tmp_path / "model.safetensors"])
