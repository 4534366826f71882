"""Folded names: all of them come back, and a header cannot name more than there is."""

from __future__ import annotations

import random

import pytest

from edgerazor.packed.names import fold, unfold

MODEL = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(28) for name in ("down", "gate", "up")]
EXPERTS = [f"layers.{layer}.experts.{expert}.up" for layer in range(1, 12) for expert in range(64)]


def test_numbers_are_folded() -> None:
    assert fold([*MODEL, "lm_head"]) == [
        "lm_head",
        *(f"model.layers.0-27.mlp.{n}_proj" for n in ("down", "gate", "up")),
    ]
    assert fold(EXPERTS) == ["layers.1-11.experts.0-63.up"]
    assert fold(["a.1", "a.3", "a.4", "a.10", "a.05", "a.x", "b.2"]) == ["a.05", "a.1", "a.10", "a.3-4", "a.x", "b.2"]
    assert fold(["", ".", "7", "a..b"]) == ["", ".", "7", "a..b"]
    assert fold([]) == []


def test_names_come_back() -> None:
    draw = random.Random(0)
    for _ in range(200):
        names = {".".join(draw.choices(["a", "", "01", *"012345"], k=draw.randint(1, 4))) for _ in range(60)}
        names |= set(draw.sample(EXPERTS, 100))
        folded = fold(draw.sample(sorted(names), len(names)))
        assert sorted(unfold(folded, len(names))) == sorted(names)
        assert folded == fold(names)
        with pytest.raises(ValueError, match="more tensors than there are"):
            list(unfold(folded, len(names) - 1))


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing can be called a\.0-3\.b: it looks like a range"):
        fold(["x", "a.0-3.b"])
    for piece in ("3-3", "4-3"):
        with pytest.raises(ValueError, match=f"{piece} is no range"):
            list(unfold([f"a.{piece}"], 10))
    for harmless in ("-3", "3-", "03-4", "a-b", "1-2-3", "1" * 5000 + "-" + "2" * 5000):
        assert list(unfold([harmless], 1)) == [harmless]
    with pytest.raises(ValueError, match="more tensors than there are"):
        list(unfold([".".join(["0-999999999"] * 1_000_000)], 1000))
