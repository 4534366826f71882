"""Scores of continuations by every engine: parts that only count, prefixes of many, and long requests in pieces."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from edgerazor import pipeline, runtime
from edgerazor.console import Console
from edgerazor.errors import USAGE, UserError
from edgerazor.recipe import build
from edgerazor.runtime import native_model
from edgerazor.workdir import WorkDir
from helpers.tiny_models import GROUP_SIZE, VOCABULARY, ModelMaker

TOKENS = random.Random(0).choices(range(2, VOCABULARY), k=24)
#: Two differ in their last token, two are the same but for what counts, one has a token.
CONTINUATIONS = [TOKENS[5:12], TOKENS[5:9], TOKENS[7:16], [*TOKENS[5:11], 7], [*TOKENS[5:11], 8], [9], TOKENS[5:9]]
COUNTS = [1, 4, 3, 2, 1, 1, 2]


@pytest.fixture(scope="module")
def folder(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scores")
    make_model(place / "model", "qwen3")
    values = {"model": str(place / "model"), "device": "cpu", "pack": {"source": "teacher"}}
    recipe = build({**values, "calibrate": {"bits": 4, "group_size": GROUP_SIZE}})
    pipeline.run("pack", recipe, WorkDir(place / "work"), Console(quiet=True))
    return WorkDir(place / "work").folder("pack")


@pytest.fixture(scope="module", params=runtime.ENGINES)
def model(request: pytest.FixtureRequest, folder: Path) -> runtime.Model:
    """One that the engine computes, or skipped where there is no native library."""
    found = runtime.load(folder, threads=1)
    if request.param == "native" and found.engine != "native":
        pytest.skip(str(found.note))
    return runtime.load(folder, threads=1, engine=request.param)


def by_logits(model: runtime.Model, prefix: list[int], tokens: list[int], count: int) -> runtime.Score:
    chances = model.logits([*prefix, *tokens], last=count + 1)[:-1].log_softmax(-1)  # [count, V]
    value = sum(float(chance[token]) for chance, token in zip(chances, tokens[-count:], strict=True))
    return runtime.Score(value, chances.argmax(-1).tolist() == tokens[-count:])


@pytest.mark.parametrize("at_once", [512, 16, 8, 1])
def test_last_tokens_count_and_pieces_are_the_whole(
    model: runtime.Model, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_model, "CALL_TOKENS", at_once)
    requests = [
        (TOKENS[:3], [TOKENS[3:5]], [2]),
        (TOKENS[:5], CONTINUATIONS, COUNTS),
        (TOKENS[:4], [], []),
        (TOKENS[:1], [TOKENS[1:3], [9]], [1, 1]),
    ]
    found = model.score(requests)
    assert [len(each) for each in found] == [1, 7, 0, 2]
    for (prefix, continuations, counts), scores in zip(requests, found, strict=True):
        for tokens, count, score in zip(continuations, counts, scores, strict=True):
            expected = by_logits(model, prefix, tokens, count)
            assert score == (pytest.approx(expected.log_probability, abs=2e-2), expected.greedy)


def test_all_tokens_count_unless_said_otherwise(model: runtime.Model) -> None:
    lengths = [len(each) for each in CONTINUATIONS]
    assert model.score([(TOKENS[:5], CONTINUATIONS)]) == model.score([(TOKENS[:5], CONTINUATIONS, lengths)])


def test_the_last_token_needs_no_position(model: runtime.Model) -> None:
    full = (TOKENS * 6)[: model.max_positions]
    ((at_end,), (behind, same)) = model.score([(full[:-2], [[*full[-2:], 7]], [1]), (full, [[7], [7]])])
    assert at_end.log_probability == pytest.approx(behind.log_probability, abs=2e-2)
    assert behind == same
    with pytest.raises(UserError, match="too long"):
        model.score([(full, [[7, 8]])])


@pytest.mark.parametrize(
    ("counts", "about"),
    [([1], "1 counts for 2 continuations"), ([0, 1], "no last 0 of the 2"), ([3, 1], "no last 3 of the 2")],
)
def test_wrong_counts_are_refused(model: runtime.Model, counts: list[int], about: str) -> None:
    with pytest.raises(UserError, match=about) as caught:
        model.score([([2], [[3, 4], [5]], counts)])
    assert caught.value.code == USAGE
