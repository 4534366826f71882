"""A budget of bits becomes formats for rows or blocks: never more bits than asked for, counted exactly."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from edgerazor import allocate, formats, packed
from edgerazor.allocate import NAMED_SHARES, MatrixPlan, Plan, make_plan
from edgerazor.errors import USAGE, UserError
from edgerazor.models import QuantTarget
from edgerazor.packed import PackedMatrix
from edgerazor.recipe import Calibrate
from helpers.tiny_models import GROUP_SIZE

ROWS = [1, 2, 3, 7, 8, 31, 64, 101, 960, 1024]
SWEEP = [1.58 + 0.01 * step for step in range(int((8 - 1.58) / 0.01) + 1)] + [1.5801, 3.9999, 4.0001, 7.9999, 8.0]
TARGETS = (
    QuantTarget("embed", "embedding", None, 300, 96),
    QuantTarget("layers.0.q", "linear", 0, 96, 101),
    QuantTarget("layers.0.k", "linear", 0, 7, 96),
    QuantTarget("layers.1.q", "linear", 1, 96, 101),
    QuantTarget("head", "head", None, 300, 96),
)


PLANS = ("interleave", "variance", "first")
GRANULARITIES = ("row", "column", "block")
PAIRS = [("ternary", "int4"), ("int2", "int4"), ("int2z", "int3"), ("int3", "int8"), ("int4", "int5")]


def weight_of(name: str) -> Tensor:
    """A weight for each of `TARGETS` whose groups differ in variance."""
    target = next(target for target in TARGETS if target.name == name)
    generator = torch.Generator().manual_seed(len(name) + target.rows)
    return torch.randn(target.rows, target.columns, generator=generator) * torch.rand(
        target.rows, 1, generator=generator
    )


def plan_of(bits: float, **settings: Any) -> Plan:
    """The plan of `TARGETS`, by interleave where no other strategy is named."""
    return make_plan(
        TARGETS, Calibrate(bits=bits, **{"plan": "interleave", "group_size": GROUP_SIZE, **settings}), weight_of
    )


def one(rows: int, bits: float, columns: int = 8, weight: Tensor | None = None, **settings: Any) -> MatrixPlan:
    """The plan of a matrix alone."""
    target = QuantTarget("m", "linear", 0, rows, columns)
    settings = {"plan": "interleave", "group_size": 8, **settings}
    return make_plan([target], Calibrate(bits=bits, **settings), None if weight is None else lambda _: weight)["m"]


def interleave(rows: int, bits: float) -> tuple[tuple[str, ...], str]:
    """Formats, and a digit per row."""
    plan = one(rows, bits)
    return plan.formats, plan.row_formats


def bits_of(names: tuple[str, ...], digits: str, rows: int) -> float:
    each = [formats.get(name).nominal_bits for name in names]
    return sum(each[int(digit)] for digit in digits) / rows if digits else each[0]


def wide_rows(bits: float, rows: int) -> list[int]:
    """Indices of the rows that have the wider of two formats."""
    names, digits = interleave(rows, bits)
    assert len(names) == 2 or not digits
    return [row for row, digit in enumerate(digits) if digit == "1"]


# --- interleave --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
def test_no_budget_is_exceeded_and_no_row_is_wasted(rows: int) -> None:
    for bits in SWEEP:
        if bits in NAMED_SHARES:  # names, whose exact averages differ in the third digit
            continue
        names, digits = interleave(rows, bits)
        average = bits_of(names, digits, rows)
        low, high = ("ternary", "int4") if bits <= 4 else ("int4", "int8")
        step = (formats.get(high).nominal_bits - formats.get(low).nominal_bits) / rows
        assert average <= bits + 1e-6, (bits, average)
        assert average > bits - step - 1e-6, (bits, average)  # one more row would not fit


@pytest.mark.parametrize("rows", ROWS)
def test_the_average_grows_with_the_budget(rows: int) -> None:
    budgets = sorted(bits for bits in SWEEP if bits not in NAMED_SHARES)
    averages = [round(bits_of(*interleave(rows, bits), rows), 9) for bits in budgets]
    assert averages == sorted(averages)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("bits", "every"), [(1.88, 8), (2.79, 2)])
def test_published_averages_take_every_nth_row_from_the_first(rows: int, bits: float, every: int) -> None:
    """EdgeRazor: row i is int4 where i mod floor(1/p) = 0."""
    if rows == 1:
        assert interleave(1, bits) == (("int4",), "")
        return
    assert wide_rows(bits, rows) == [row for row in range(rows) if row % every == 0]
    if rows % every == 0:
        names, digits = interleave(rows, bits)
        assert bits_of(names, digits, rows) == pytest.approx(1.58 + (4 - 1.58) / every)
        assert round(bits_of(names, digits, rows), 2) == bits


@pytest.mark.parametrize(("bits", "name"), [(1.58, "ternary"), (4.0, "int4"), (8.0, "int8")])
def test_uniform_averages_have_one_format(bits: float, name: str) -> None:
    assert [interleave(rows, bits) for rows in ROWS] == [((name,), "")] * len(ROWS)


@pytest.mark.parametrize("bits", [1.6, 2.0, 2.5, 3.0, 3.9, 4.5, 6.0, 7.9])
def test_rows_are_spread_evenly(bits: float) -> None:
    rows = 960
    low, high = (1.58, 4.0) if bits <= 4 else (4.0, 8.0)
    share = (bits - low) / (high - low)
    wide = wide_rows(bits, rows)
    assert len(wide) == int(share * rows + 1e-9)
    for start in range(0, rows, 48):  # any stretch of rows has its share, give or take one
        count = sum(start <= row < start + 48 for row in wide)
        assert abs(count - 48 * share) < 1.0 + 1e-6
    gaps = {later - earlier for earlier, later in pairwise(wide)}
    assert max(gaps) - min(gaps) <= 1
    assert wide == [row for row in range(rows) if int((row + 1) * share + 1e-9) > int(row * share + 1e-9)]


# --- other strategies ----------------------------------------------------------------------------


def wide(plan: MatrixPlan) -> Tensor:
    """Which weights have the wider of two formats: bool [rows, columns]."""
    spec = plan.spec()
    if spec.row_formats is None and spec.block_formats is None:
        return torch.full(plan.shape, plan.formats == ("int4",))
    chosen = spec.block_formats if spec.row_formats is None else spec.row_formats[:, None]
    assert chosen is not None
    if chosen.shape[1] > 1:
        chosen = chosen.repeat_interleave(plan.group_size, dim=1)[:, : plan.columns]
    return chosen.expand(plan.shape).bool()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 101])
def test_every_strategy_meets_every_budget_within_a_row(plan: str, granularity: str, rows: int) -> None:
    for columns, group in ((33, 8), (40, 8), (9, 8), (8, 65536)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        for low, high in PAIRS:
            narrow, broad = (formats.get(name).nominal_bits for name in (low, high))
            for step in range(12):
                bits = narrow + (broad - narrow) * (step / 11 if step % 2 else round(step / 11, 2))
                settings = {"plan": plan, "granularity": granularity, "group_size": group, "formats": (low, high)}
                matrix = one(rows, bits, columns, weight, **settings)
                average = matrix.spec().nominal_bits((rows, columns))
                assert average <= bits + 1e-9, (columns, low, high, bits)
                assert average > bits - (broad - narrow) / rows - 1e-9, (columns, low, high, bits)
                if granularity != "row" and plan != "interleave":  # within a block, even
                    block = min(group, columns) / (rows * columns)
                    assert average > bits - (broad - narrow) * block - 1e-9, (columns, low, high, bits)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [1.58, 1.88, 2.79, 4.0])
def test_published_names_are_their_shares_within_a_row(plan: str, granularity: str, bits: float) -> None:
    for rows, columns in ((64, 64), (101, 33), (7, 100)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        matrix = one(rows, bits, columns, weight, plan=plan, granularity=granularity)
        assert abs(float(wide(matrix).double().mean()) - NAMED_SHARES[bits]) < 1 / rows


def test_the_first_rows_columns_and_blocks() -> None:
    settings = {"plan": "first", "formats": ("int2", "int4")}
    assert one(5, 2.8, 24, **settings).row_formats == "11000"
    partly = {"granularity": "column", "formats": ("int2", "int4")}  # of the next column as many rows as fit
    assert one(4, 2.9, 24, plan="first", **partly).block_formats == ("100", "100", "100", "110")
    assert one(4, 2.9, 24, **partly).block_formats == ("001", "001", "001", "101")
    assert one(3, 3.0, 32, granularity="column", **settings).block_formats == ("1100",)
    assert one(3, 3.0, 32, granularity="column", formats=("int2", "int4")).block_formats == ("0101",)
    assert one(3, 3.0, 32, granularity="block", **settings).block_formats == ("1111", "1100", "0000")
    assert one(3, 3.0, 32, granularity="block", formats=("int2", "int4")).block_formats == ("0101",) * 3
    assert one(16, 1.88, 128, granularity="column").block_formats == ("1000000010000000",)  # every eighth


def test_the_widest_format_goes_where_the_variance_is_highest() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)) + 100
    factors = torch.tensor([[1.0, 9, 3], [2, 4, 2], [1, 1, 9], [5, 1, 1], [9, 9, 9], [1, 1, 1]])
    weight = (weight - 100) * factors.repeat_interleave(8, dim=1)[:, :20] + 100  # a mean is no variance
    settings: dict[str, Any] = {"plan": "variance", "formats": ("int2", "int4"), "weight": weight}
    for granularity, units in (("row", 6), ("column", 3), ("block", 18)):
        parts = {"row": [weight], "column": weight.split(8, 1), "block": weight.split(8, 1)}[granularity]
        dims = {"row": 1, "block": 1, "column": (0, 1)}[granularity]
        spread = torch.stack([part.double().var(dim=dims, correction=0) for part in parts], dim=-1).flatten()
        assert len(spread) == units
        chosen_wide = wide(one(6, 3.0, 20, granularity=granularity, **settings))
        each = torch.stack([part[..., 0] for part in chosen_wide.split(20 if granularity == "row" else 8, 1)], dim=1)
        lucky = each.all(0) if granularity == "column" else each.flatten()
        unlucky = ~each.any(0) if granularity == "column" else ~lucky
        assert lucky.any()
        assert spread[lucky].min() > spread[unlucky].max()


def test_equal_variances_go_to_the_first() -> None:
    assert one(5, 2.8, 8, torch.ones(5, 8), plan="variance", formats=("int2", "int4")).row_formats == "11000"


def test_weights_are_asked_for_one_by_one_and_only_when_needed() -> None:
    asked: list[str] = []

    def reader(name: str) -> Tensor:
        asked.append(name)
        return weight_of(name)

    make_plan(TARGETS, Calibrate(bits=2.0, plan="interleave"), reader)
    assert asked == []
    make_plan(TARGETS, Calibrate(bits=2.0, plan="variance"), reader)
    assert asked == [target.name for target in TARGETS if target.kind == "linear"]
    with pytest.raises(ValueError, match="looks at weights"):
        make_plan(TARGETS, Calibrate(bits=2.0, plan="variance"))


# --- formats that are asked for ------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_two_formats_reach_from_one_to_the_other(pair: tuple[str, str]) -> None:
    for name in pair:
        assert plan_of(formats.get(name).nominal_bits, formats=pair)["layers.0.q"].formats == (name,)


@pytest.mark.parametrize("name", formats.names())
def test_a_single_format_is_that_of_every_row(name: str) -> None:
    plan = plan_of(formats.get(name).nominal_bits, formats=(name,))
    assert {matrix.formats for matrix in plan.matrices if matrix.kind == "linear"} == {(name,)}


REFUSED: dict[str, dict[str, Any]] = {
    "mixing int2 and int4 gives 2 to 4 bits": {"bits": 4.5, "formats": ("int2", "int4")},
    "--bits is 1.9, but mixing": {"bits": 1.9, "formats": ("int2", "int4")},
    "--formats is int4,int2; expected one format, or two, the narrower first": {"formats": ("int4", "int2")},
    "--formats is int2,int2z; expected one format, or two": {"formats": ("int2", "int2z")},
    "--bits is 3, but int2 alone has 2": {"bits": 3, "formats": ("int2",)},
    "no format called 'int44'": {"formats": ("int2", "int44")},
    "no format called 'fp4'": {"embedding_format": "fp4"},
    "no format called 'fp5'": {"head_format": "fp5"},
    "no format called 'fp6'": {"overrides": [{"match": "*", "format": "fp6"}]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_planned_is_refused_before_a_model_is_seen(reason: str) -> None:
    with pytest.raises(UserError, match=reason) as wrong:
        allocate.check(Calibrate.model_validate({"plan": "interleave", **REFUSED[reason]}, strict=False))
    assert wrong.value.code == USAGE
    assert "\n" not in wrong.value.message


def overridden(bits: float, *overrides: tuple[str, str], **settings: Any) -> Plan:
    pairs = tuple({"match": match, "format": name} for match, name in overrides)
    return plan_of(bits, overrides=pairs, **settings)


def test_overrides_come_first_and_leave_the_others_their_average() -> None:
    plain = plan_of(2.0)
    plan = overridden(2.0, ("layers.0.q", "int8"), ("*.q", "int3"), ("embed", "int5"), ("h*", "int2"))
    assert {matrix.name: matrix.formats for matrix in plan.matrices if matrix.name != "layers.0.k"} == {
        "embed": ("int5",),
        "layers.0.q": ("int8",),
        "layers.1.q": ("int3",),
        "head": ("int2",),
    }
    assert plan["layers.0.k"] == plain["layers.0.k"]
    q, k = 96 * 101, 7 * 96
    rest = plain["layers.0.k"].spec().nominal_bits((7, 96))
    assert plan.nominal_bits() == pytest.approx((8 * q + 3 * q + rest * k) / (2 * q + k))
    assert plan.notation() == f"W{plan.nominal_bits():.2f}-A8-KV8"
    assert plan.nominal_bits() > 5


def test_a_head_has_its_own_format() -> None:
    plan = plan_of(2.0, embedding_format="int3", head_format="int8")
    assert (plan["embed"].formats, plan["head"].formats) == (("int3",), ("int8",))
    with pytest.raises(UserError, match="tied to its embedding") as wrong:
        make_plan(TARGETS[:-1], Calibrate(plan="interleave", head_format="int8"))
    assert wrong.value.code == USAGE


@pytest.mark.parametrize(
    ("matches", "sentence"),
    [
        (["*.qq"], "'\\*.qq' matches no quantized module; the closest are layers.0.q"),
        (["layers.2.q"], "'layers.2.q' matches no quantized module; the closest are layers.0.q, layers.1.q"),
        (["heat"], "the closest are head"),
        (["q"], "matches no quantized module"),  # the whole path, not a part of it
        (["layers.*", "*.q"], "'\\*.q' changes nothing: earlier ones match all its modules"),
    ],
)
def test_an_override_that_changes_nothing_is_refused(matches: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as wrong:
        overridden(2.0, *((match, "int8") for match in matches))
    assert wrong.value.code == USAGE
    assert "\n" not in wrong.value.message


# --- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1.58, 1.88, 2.0, 2.79, 3.3, 4.0, 5.5, 8.0])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_plan_survives_json(bits: float, granularity: str) -> None:
    plan = plan_of(bits, granularity=granularity, plan="variance")
    again = Plan.model_validate_json(plan.model_dump_json(indent=1))
    assert again == plan
    assert again.nominal_bits() == plan.nominal_bits()
    assert again.specs().keys() == {target.name for target in TARGETS}


def test_layers_are_planned_alike_and_ends_have_their_own_format() -> None:
    plan = plan_of(2.0, embedding_format="int8")
    assert plan["layers.0.q"].row_formats == plan["layers.1.q"].row_formats
    assert plan["embed"].formats == plan["head"].formats == ("int8",)
    with pytest.raises(KeyError):
        plan["layers.2.q"]


@pytest.mark.parametrize(("bits", "notation"), [(1.58, "W1.58-A8-KV8"), (4.0, "W4-A8-KV8"), (8.0, "W8-A8-KV8")])
def test_nominal_bits_are_those_of_the_linear_layers(bits: float, notation: str) -> None:
    for embedding_format in ("int4", "int8"):
        plan = plan_of(bits, embedding_format=embedding_format)
        assert plan.nominal_bits() == pytest.approx(bits)
        assert plan.notation() == notation


def test_nominal_bits_count_weights_not_matrices() -> None:
    plan = plan_of(2.0)
    linears = [target for target in TARGETS if target.kind == "linear"]
    expected = sum(bits_of(*interleave(target.rows, 2.0), target.rows) * target.weights for target in linears)
    assert plan.nominal_bits() == pytest.approx(expected / sum(target.weights for target in linears))
    assert plan.nominal_bits() <= 2.0
    assert plan.weights() == sum(target.weights for target in TARGETS)


@pytest.mark.parametrize("bits", [1.58, 1.88, 2.0, 2.79, 3.3, 4.0, 5.5, 8.0])
@pytest.mark.parametrize("group_size", [8, 40, 256])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_planned_bytes_are_written_bytes(bits: float, group_size: int, granularity: str, tmp_path: Path) -> None:
    plan = plan_of(bits, group_size=group_size, granularity=granularity, plan="variance")
    torch.manual_seed(0)

    def matrices() -> list[PackedMatrix]:
        return [
            PackedMatrix(m.name, m.kind, formats.encode_matrix(torch.randn(m.rows, m.columns), m.spec()), m.spec())
            for m in plan.matrices
        ]

    packed.write(tmp_path, [each.source() for each in matrices()], {}, tied={}, settings={}, provenance={})
    model = packed.PackedModel.open(tmp_path)
    sizes = packed.size_table(model)
    assert sum(each.bytes for each in sizes.classes) == plan.bytes()
    assert sizes.nominal_bits == pytest.approx(plan.nominal_bits())
    for matrix in plan.matrices:
        parts = formats.pack_matrix(model.matrix(matrix.name).encoded, matrix.spec())
        assert (
            sum(len(piece) for pieces in formats.serialize_parts(parts).values() for piece in pieces) == matrix.bytes()
        )


@pytest.mark.parametrize(
    ("names", "digits"),
    [(("ternary", "int4"), ""), (("ternary", "int4"), "01"), (("int4",), "000"), (("ternary", "int4"), "0x1")],
)
def test_contradictory_plans_are_refused(names: tuple[str, ...], digits: str) -> None:
    with pytest.raises(ValidationError):
        MatrixPlan(name="m", kind="linear", rows=3, columns=4, formats=names, row_formats=digits, group_size=8)


@pytest.mark.parametrize(
    "rows",
    [("01", "10"), ("01",) * 4, ("0", "1", "0"), ("012", "000", "000"), ("01", "02", "00")],
)
def test_contradictory_plans_of_blocks_are_refused(rows: tuple[str, ...]) -> None:
    about: dict[str, Any] = {"name": "m", "kind": "linear", "rows": 3, "columns": 4, "group_size": 2}
    assert MatrixPlan(**about, formats=("ternary", "int4"), block_formats=("01", "10", "00")).spec()
    with pytest.raises(ValidationError):
        MatrixPlan(**about, formats=("ternary", "int4"), block_formats=rows)
    with pytest.raises(ValidationError):
        MatrixPlan(**about, formats=("ternary", "int4"), block_formats=("01",), row_formats="010")
