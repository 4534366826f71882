"""The comparison with llama.cpp: what it computes on our side, and what it calls a failure."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from edgerazor import pipeline, transformers_plugin
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.workdir import WorkDir
from helpers.places import ROOT
from helpers.tiny_models import GROUP_SIZE, VOCABULARY, ModelMaker
from recipes.benchmarks import interop, results, sizes

RECIPES = ROOT / "recipes"
IDS = torch.randint(2, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))


def packed(make_model: ModelMaker, folder: Path, family: str, tied: bool, **calibrate: Any) -> Path:
    make_model(folder / "model", family, tie_word_embeddings=tied)
    asked = {"plan": "interleave", "bits": 2.0, "group_size": GROUP_SIZE, **calibrate}
    values = {"model": str(folder / "model"), "calibrate": asked, "pack": {"source": "teacher"}}
    work = WorkDir(folder / "work")
    pipeline.run("pack", recipes.build(values), work, Console(quiet=True))
    return work.folder("pack")


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
def test_dequantized_models_are_packed_ones_with_16_bit_activations(
    family: str, tied: bool, make_model: ModelMaker, tmp_path: Path
) -> None:
    folder = packed(make_model, tmp_path, family, tied, activation_bits=16, kv_bits=16)
    expected = transformers_plugin.load(folder)[0](input_ids=IDS, use_cache=False).logits
    found = interop.dequantized(folder)
    torch.testing.assert_close(found(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    side = interop.ours(found, [IDS[0].tolist()], IDS[0, :4].tolist())
    torch.testing.assert_close(side.logits, expected[0], rtol=1e-5, atol=1e-5)
    whole = found(input_ids=torch.tensor([IDS[0, :4].tolist() + side.greedy]), use_cache=False).logits[0, 3:-1]
    assert torch.equal(whole.argmax(-1), torch.tensor(side.greedy))
    torch.testing.assert_close(side.steps, whole, rtol=1e-4, atol=1e-4)


def test_numbers_by_hand() -> None:
    uniform = interop.Side(torch.zeros(5, 8), [])
    assert interop.perplexity(uniform, [[0, 1], [2, 3, 4]]) == pytest.approx(8)
    # [ln 3, 0] is (3/4, 1/4); the first row's loss is -ln 3/4, the second's -ln 1/4
    side = interop.Side(torch.tensor([[math.log(3), 0.0], [5.0, 5.0], [math.log(3), 0.0], [9.0, 0.0]]), [])
    assert interop.perplexity(side, [[1, 0], [0, 1]]) == pytest.approx(math.sqrt(4 / 3 * 4))
    one, other = interop.Side(torch.tensor([[math.log(3), 0.0]]), []), interop.Side(torch.zeros(1, 2), [])
    assert interop.divergence(one, one) == 0
    assert interop.divergence(one, other) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    two = interop.Side(torch.cat([one.logits, other.logits]), []), interop.Side(torch.zeros(2, 2), [])
    assert interop.divergence(*two) == pytest.approx(interop.divergence(one, other) / 2)
    assert interop.divergence(*two, share=0.5) == 0  # the token that has least
    assert interop.apart((4.0, 5.0)) == 0.25
    assert interop.common([1, 2, 3], [1, 2, 4]) == 2
    assert interop.common([1, 2], [1, 2]) == 2


@pytest.mark.parametrize(("theirs", "tie"), [([0, 1], True), ([0, 2], False), ([0, 0], False)])
def test_a_tie_is_two_tokens_as_good(theirs: list[int], tie: bool) -> None:
    steps = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.495, 0.4]])
    mine = interop.Side(torch.zeros(1, 3), [0, 0], steps)
    assert interop.is_tie(mine, interop.Side(torch.zeros(1, 3), theirs)) is tie


def test_every_bound_is_a_failure_of_its_own() -> None:
    case = interop.Case("m", "int4", recipes.Recipe())
    perfect = interop.Row(
        case, "Q4_0", (4.1, 4.5), True, (9.0, 9.0), 0.0, 0.0, 64, False, (9.0, 9.08), 0.1, 3, 1e-10, 64, 100
    )
    assert perfect.failures() == []
    broken: list[tuple[dict[str, Any], str]] = [
        ({"same_ids": False}, "token ids"),
        ({"exact": (9.0, 9.01)}, "perplexity of the 16-bit file is +0.111 %"),
        ({"exact": (9.0, math.nan)}, "perplexity of the 16-bit file"),
        ({"exact_kl": 2e-4}, "2.0e-04 nats"),
        ({"exact_greedy": 63}, "parts after 63 tokens"),
        ({"full_kl": 2e-9}, "32-bit file are 2.0e-09 nats"),
        ({"full_greedy": 63, "tie": True}, "32-bit file parts after 63 tokens"),
        ({"rounded": (9.0, 8.9)}, "perplexity of the quantized file is -1.111 %"),
    ]
    for change, words in broken:
        (line,) = replace(perfect, **change).failures()
        assert line.startswith("m, int4: ")
        assert words in line
    mixture = replace(
        perfect, case=replace(case, model="olmoe-untied"), exact_kl=9e-4, exact_nearest=9e-5, exact_greedy=3
    )
    assert mixture.failures() == []
    for change in ({"exact_kl": 1.1e-3}, {"exact_nearest": 1.1e-4}):
        (line,) = replace(mixture, **change).failures()
        assert "16-bit file" in line
    all_experts = replace(mixture, case=replace(case, model="lfm2-moe-all-tied"), exact_greedy=64)
    assert len(all_experts.failures()) == 1
    tie = replace(perfect, exact_greedy=63, tie=True)
    assert tie.failures() == []
    assert len(interop.cells(tie)) == len(interop.HEAD)
    assert interop.cells(tie)[interop.HEAD.index("same text")] == "63/64, tie"


def test_random_models_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        interop.write_random(tmp_path / name, "llama", {"num_hidden_layers": 1}, RECIPES / "world" / "teacher")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_table_goes_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- one: begin -->\nold\n<!-- one: end -->\nb\n<!-- two: begin -->\n<!-- two: end -->\n")
    results.publish("one", "new", path)
    results.publish("one", "newer", path)
    expected = "a\n<!-- one: begin -->\nnewer\n<!-- one: end -->\nb\n<!-- two: begin -->\n<!-- two: end -->\n"
    assert path.read_text() == expected


def test_a_gguf_file_is_counted_by_its_types(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    for name, rows, kind, size in (
        ("token_embd.weight", 8, GGMLQuantizationType.Q4_0, 18),
        ("blk.0.attn_q.weight", 4, GGMLQuantizationType.Q8_0, 34),
        ("blk.0.attn_k.weight", 6, GGMLQuantizationType.Q4_0, 18),
    ):
        writer.add_tensor(name, np.zeros((rows, size), np.uint8), raw_dtype=kind)  # one block of 32 in each row
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sizes.theirs("x", path)
    assert (found.linear, found.embedding) == ("Q4_0+Q8_0", "Q4_0")
    assert found.tensors == 18 * 8 + 34 * 4 + 18 * 6 + 4 * 32
    assert found.bytes == path.stat().st_size
    assert found.cells(1000)[4:] == [f"{found.bytes / 125:.3f}", f"{found.tensors / 125:.3f}"]


def test_a_packed_model_is_counted_whole(make_model: ModelMaker, tmp_path: Path) -> None:
    folder = packed(make_model, tmp_path, "llama", True)
    found = sizes.ours(folder)
    assert (found.linear, found.embedding) == ("int4+ternary", "int4")
    assert found.bytes == (folder / "model.safetensors").stat().st_size
    assert 0 < found.bytes - found.tensors < 40_000
