"""The comparison of speeds: what it makes of measured rounds, and the models that it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgerazor.benchmark.engines import Round, Speed
from edgerazor.benchmark.peers import Program
from edgerazor.errors import UserError
from edgerazor.packed import PackedModel, size_table
from recipes.benchmarks import bench_models as models
from recipes.benchmarks import bench_peers as peers
from recipes.benchmarks import bench_tables as tables

SHAPE = "Qwen3-0.6B"


def log_of(path: Path) -> Any:
    """Two rounds with one thread, the second on a machine that is twice as fast; ours moves half the bytes."""
    log = tables.Log(path, {"commit": "a"})
    for entry, moved in ((tables.BASE3, 100), (tables.TQ2, 200)):
        about = {"weight_bytes": 10**6, "bytes_per_token": moved, "cache_bytes_per_token": 1, "note": None}
        log.describe(SHAPE, entry, about)
    for number, factor in enumerate((1, 2)):
        speeds = {
            tables.BASE3: [Speed("prefill", 0, 30.0 * factor), Speed("decode", 0, 40.0 * factor)],
            tables.TQ2: [Speed("prefill", 0, 10.0 * factor), Speed("decode", 0, 10.0 * factor)],
        }
        log.add(SHAPE, 1, number, 5000.0 * factor, speeds)
    return log


def test_ratios_and_shares_are_those_of_a_round(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log.json")
    assert log.rate(SHAPE, tables.BASE3, 1, "decode") == 60.0
    assert log.ratio(SHAPE, tables.BASE3, tables.TQ2, 1, "decode") == 4.0
    assert log.ratio(SHAPE, tables.BASE3, tables.TQ2, 1, "prefill") == 3.0
    assert log.ratio(SHAPE, tables.BASE3, tables.TQ2, 1, "decode", of_bytes=True) == 2.0  # half the bytes
    assert log.share(SHAPE, tables.BASE3, 1) == 40 * 100 / 5000
    assert log.moved(SHAPE, tables.BASE3, 1024) == 1124
    assert log.bandwidth(SHAPE, 1) == 7500
    for other, threads in ((tables.TQ2, 2), (tables.IK, 1)):  # what was not measured
        assert log.rate(SHAPE, other, threads, "decode") is None
        assert log.ratio(SHAPE, tables.BASE3, other, threads, "decode") is None


def test_a_round_that_lacks_one_side_is_no_ratio(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log.json")
    log.add(SHAPE, 1, 2, 1.0, {tables.BASE3: [Speed("decode", 0, 1e9)]})
    assert log.ratio(SHAPE, tables.BASE3, tables.TQ2, 1, "decode") == 4.0


def test_measurements_are_found_again_unless_something_else_is_measured(tmp_path: Path) -> None:
    log_of(tmp_path / "log.json")
    again = tables.Log(tmp_path / "log.json", {"commit": "a"})
    assert [again.has(SHAPE, 1, number) for number in (0, 1, 2)] == [True, True, False]
    assert again.ratio(SHAPE, tables.BASE3, tables.TQ2, 1, "decode") == 4.0
    assert not tables.Log(tmp_path / "log.json", {"commit": "b"}).has(SHAPE, 1, 0)


def test_a_promise_is_kept_or_not(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log.json")
    decode = tables.claims(log, SHAPE, True)[0]
    assert decode.cells()[1:] == ["4.00", "", "1.90 / 2.20", "**no**"]  # not measured with two threads
    for number in (0, 1):
        log.values["rounds"][f"{SHAPE}/2/{number}"] = log.values["rounds"][f"{SHAPE}/1/{number}"]
    found = {claim.text: claim for claim in tables.claims(log, SHAPE, True)}
    assert found["decode over llama.cpp TQ2_0, same head"].cells()[1:] == ["4.00", "4.00", "1.90 / 2.20", "yes"]
    assert found["prefill over llama.cpp TQ2_0, same head"].cells()[1:] == ["3.00", "3.00", "3.50", "**no**"]
    share = next(claim for text, claim in found.items() if "share of the bandwidth" in text)
    assert share.cells()[1:] == ["80 %", "80 %", "80 % / 85 %", "**no**"]
    assert not any("ik_llama.cpp" in text for text in found)  # neither measured nor promised
    unpromised = tables.claims(log_of(tmp_path / "log.json"), SHAPE, False)
    assert {claim.text: claim.verdict() for claim in unpromised if claim.verdict()} == {
        "12.5 % int4 rows: bytes a second over base 3": "**no**"
    }


def test_tables_and_plot_are_made_of_what_there_is(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log.json")
    log.note("llama.cpp Q4_0: It fails.")
    text, wrong = tables.all_tables(log, (SHAPE,))
    assert f"| {tables.TQ2} | 1 | 0 | 15.0 | 40 % |  |  | 15.0 |  |" in text
    assert text.endswith("- llama.cpp Q4_0: It fails.")
    assert f"**{SHAPE}: ratios**: prefill over llama.cpp TQ2_0, same head: not as promised." in wrong
    picture = tmp_path / "plot.png"
    tables.plot(log, (SHAPE,), picture, "facts")
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    tables.plot(log, (SHAPE,), picture, "facts")
    assert picture.read_bytes() == first


def test_every_entry_takes_its_turn_and_one_that_fails_is_left_out(tmp_path: Path) -> None:
    program = Program(name="llama.cpp", path=tmp_path / "llama-bench")
    asked: list[tuple[str, Round]] = []

    def fine(name: str) -> Any:
        return lambda each: asked.append((name, each)) or [Speed("prefill", 0, 1.0)]

    def fail(_: Round) -> list[Speed]:
        raise UserError("It fails.")

    class Still:
        def measure(self, threads: int) -> float:
            return 7.0 * threads

    ours, few = peers.Entry("ours", Path, long=1), peers.Entry("few", Path, rounds=1)
    broken = peers.Entry("broken", Path, program)
    engines = {ours: fine("ours"), few: fine("few"), broken: fail}
    table, log = peers.Table("t", tuple(engines), 2), tables.Log(tmp_path / "log.json", {})
    for number in range(2):
        peers.one_round(engines, table, 2, number, log, Still())
    assert [(name, each.contexts) for name, each in asked] == [
        ("ours", (0, 1024, 4096)),
        ("few", (0,)),
        ("ours", (0,)),
    ]
    assert log.values["notes"] == ["broken: It fails."]
    assert log.bandwidth("t", 2) == 14.0
    assert broken not in engines
    with pytest.raises(UserError, match="It fails"):
        peers.one_round({ours: fail}, table, 1, 0, log, Still())


@pytest.mark.parametrize(
    ("name", "formats", "group"),
    [
        ("base 3", {"ternary"}, 256),
        ("1.88 bits", {"ternary", "int4"}, 256),
        ("int4", {"int4"}, 256),
        ("group 64", {"ternary"}, 64),
    ],
)
def test_models_have_the_formats_that_their_names_say(name: str, formats: set[str], group: int, tmp_path: Path) -> None:
    place = models.Place(tmp_path, layers=1, vocabulary=2304)
    model = PackedModel.open(models.packed(place, SHAPE, name))
    linear = [entry for entry in model.header.matrices.values() if entry.kind == "linear"]
    assert {each for entry in linear for each in entry.formats} == formats
    assert {entry.group_size for entry in linear} == {group}
    assert model.header.tied
    assert [entry.formats for entry in model.header.matrices.values() if entry.kind == "embedding"] == [("int4",)]
    if name == "1.88 bits":
        assert size_table(model).nominal_bits == pytest.approx(1.88, abs=0.01)


def test_shapes_are_those_of_published_models() -> None:
    place = models.Place(Path())
    weights = {}
    for shape in models.SHAPES:
        config = place.configuration(shape)
        heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        layer = config.hidden_size * (heads + 3 * config.intermediate_size)
        weights[shape] = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    assert weights["Qwen3-0.6B"] == pytest.approx(596e6, rel=0.001)
    assert weights["Llama-3.2-1B"] == pytest.approx(1.236e9, rel=0.001)
    assert weights["SmolLM2-360M"] == pytest.approx(362e6, rel=0.001)
    tails = place.configuration("tails")
    assert tails.hidden_size % 256
    assert tails.intermediate_size % 256
