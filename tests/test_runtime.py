"""Running packed models: both engines compute what transformers computes, in pieces or as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import GROUP_SIZE, VOCABULARY, ModelMaker

import edgerazor
from edgerazor import integration, pipeline, runtime
from edgerazor.console import Console
from edgerazor.errors import USAGE, UserError
from edgerazor.recipe import build
from edgerazor.workdir import WorkDir

IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
QUIET = Console(quiet=True)


def pack(model: Path, work: Path, **calibrate: object) -> Path:
    """Round a model to nearest, without training."""
    recipe = build(
        {
            "model": str(model),
            "device": "cpu",
            "calibrate": {"bits": 2.5, "group_size": GROUP_SIZE, **calibrate},
            "pack": {"source": "teacher"},
        }
    )
    pipeline.run("pack", recipe, WorkDir(work), QUIET)
    return WorkDir(work).folder("pack")


@pytest.fixture(scope="module", params=["llama", "mistral", "phi3"])
def folder(request: pytest.FixtureRequest, make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    make_model(place / "model", request.param)
    return pack(place / "model", place / "work", bits=4.0)


@pytest.fixture(scope="module", params=["transformers"])
def model(request: pytest.FixtureRequest, folder: Path) -> runtime.Model:
    return runtime.load(folder, threads=1, engine=request.param)


@torch.no_grad()
def test_logits_are_those_of_transformers(folder: Path, model: runtime.Model) -> None:
    expected = integration.load(folder)[0](input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(model.logits(IDS), expected)
    torch.testing.assert_close(model.logits(IDS[0].tolist(), last=3), expected[0, -3:])


def test_a_sequence_in_pieces(model: runtime.Model) -> None:
    ids = IDS[0].tolist()
    expected = model.logits(ids)
    session = model.session()
    for start, end in ((0, 1), (1, 9), (9, 10), (10, 24)):
        torch.testing.assert_close(session.feed(ids[start:end]), expected[end - 1], rtol=0, atol=2e-2)
        assert session.position == end
    for position in (20, 7, 0):
        session.rewind(position)
        assert session.position == position
        torch.testing.assert_close(session.feed(ids[position:]), expected[-1], rtol=0, atol=2e-2)


def by_argmax(model: runtime.Model, ids: list[int], count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        found.append(int(model.logits([*ids, *found], last=1).argmax()))
    return found


def test_greedy_is_a_loop_of_argmax(model: runtime.Model) -> None:
    ids = IDS[0].tolist()
    expected = by_argmax(model, ids, 12)
    session = model.session()
    session.feed(ids)
    assert session.greedy(5) == expected[:5]
    assert session.greedy(0) == []
    assert session.greedy(7) == expected[5:]
    assert session.ids == ids + expected
    session.rewind(26)
    assert session.greedy(4) == expected[2:6]
    session.rewind(25)
    session.feed(expected[1:3])
    stop = expected[5]
    assert session.greedy(12, [stop, VOCABULARY - 1]) == expected[3 : 1 + expected.index(stop, 3)]


def test_scores_are_log_probabilities(model: runtime.Model) -> None:
    ids = IDS[0].tolist()
    best = by_argmax(model, ids[:9], 3)
    requests = [(ids[:9], [ids[9:12], best, [7], [8], best[:1]]), (ids[:1], [ids[1:9]]), (ids[:5], [])]
    scores = model.score(requests)
    assert [len(each) for each in scores] == [5, 1, 0]
    for (prefix, continuations), found in zip(requests, scores, strict=True):
        for continuation, score in zip(continuations, found, strict=True):
            chances = model.logits([*prefix, *continuation], last=len(continuation) + 1)[:-1].log_softmax(-1)
            expected = sum(float(chance[token]) for chance, token in zip(chances, continuation, strict=True))
            assert score.log_probability == pytest.approx(expected, abs=2e-2)
    assert [each.greedy for each in scores[0]] == [False, True, False, False, True]


def test_what_is_asked_wrongly(model: runtime.Model) -> None:
    most = model.max_positions
    assert most == 128
    assert model.vocabulary == VOCABULARY
    session = model.session()
    for ask, about in (
        (lambda: model.logits([]), "at least 1"),
        (lambda: model.logits([VOCABULARY]), f"no token {VOCABULARY}"),
        (lambda: model.logits([-1]), "no token -1"),
        (lambda: model.logits([2] * (most + 1)), "too long"),
        (lambda: model.logits([2, 3], last=3), "last 3 of 2"),
        (lambda: model.score([([], [[2]])]), "at least one token"),
        (lambda: model.score([([2], [[]])]), "at least one token"),
        (lambda: model.score([([2], [[VOCABULARY]])]), "no token"),
        (lambda: session.feed([]), "no token to feed"),
        (lambda: session.greedy(1), "nothing to continue"),
        (lambda: session.rewind(1), "cannot go back"),
        (lambda: session.feed([[2, 3]]), "whole numbers"),  # type: ignore[list-item]
    ):
        with pytest.raises(UserError, match=about) as caught:
            ask()
        assert caught.value.code == USAGE
    session.feed([2] * (most - 1))
    assert len(session.greedy(5)) == 1
    with pytest.raises(UserError, match="too long"):
        session.feed([2])


def test_loading_is_asked_wrongly(folder: Path, llama: Path) -> None:
    for ask, about in (
        (lambda: edgerazor.load(folder, engine="fast"), "no engine called 'fast'"),
        (lambda: edgerazor.load(folder, threads=0), "at least 1 thread"),
        (lambda: edgerazor.load(llama), "not a packed model"),
    ):
        with pytest.raises(UserError, match=about):
            ask()


def test_sizes(folder: Path, model: runtime.Model) -> None:
    assert edgerazor.load(folder).folder == folder
    assert 0 < model.bytes_per_token < model.weight_bytes
    assert model.cache_bytes_per_token > 0
    assert model.kernel
    assert model.tokenizer.decode(model.tokenizer("Nora took the ball.").input_ids) == "Nora took the ball."
