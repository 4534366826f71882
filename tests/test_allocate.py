"""A budget of bits becomes formats for rows: never more bits than asked for, spread evenly, counted exactly."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import GROUP_SIZE
from pydantic import ValidationError

from edgerazor import formats, packed
from edgerazor.allocate import NAMED_SHARES, MatrixPlan, Plan, interleave, make_plan
from edgerazor.models import Site
from edgerazor.packed import PackedMatrix
from edgerazor.recipe import Calibrate

ROWS = [1, 2, 3, 7, 8, 31, 64, 101, 960, 1024]
SWEEP = [1.58 + 0.01 * step for step in range(int((8 - 1.58) / 0.01) + 1)] + [1.5801, 3.9999, 4.0001, 7.9999, 8.0]
SITES = (
    Site("embed", "embedding", None, 300, 96),
    Site("layers.0.q", "linear", 0, 96, 101),
    Site("layers.0.k", "linear", 0, 7, 96),
    Site("layers.1.q", "linear", 1, 96, 101),
    Site("head", "head", None, 300, 96),
)


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


# --- the plan ----------------------------------------------------------------------------------


def plan_of(bits: float, embedding_format: str = "int4") -> Plan:
    return make_plan(SITES, Calibrate(bits=bits, group_size=GROUP_SIZE, embedding_format=embedding_format))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [1.58, 1.88, 2.0, 2.79, 3.3, 4.0, 5.5, 8.0])
def test_a_plan_survives_json(bits: float) -> None:
    plan = plan_of(bits)
    again = Plan.model_validate_json(plan.model_dump_json(indent=1))
    assert again == plan
    assert again.nominal_bits() == plan.nominal_bits()
    assert again.specs().keys() == {site.name for site in SITES}


def test_layers_are_planned_alike_and_ends_have_their_own_format() -> None:
    plan = plan_of(2.0, "int8")
    assert plan["layers.0.q"].row_formats == plan["layers.1.q"].row_formats
    assert plan["embed"].formats == plan["head"].formats == ("int8",)
    with pytest.raises(KeyError):
        plan["layers.2.q"]


@pytest.mark.parametrize(("bits", "notation"), [(1.58, "W1.58-A8-KV8"), (4.0, "W4-A8-KV8"), (8.0, "W8-A8-KV8")])
def test_nominal_bits_are_those_of_the_linear_layers(bits: float, notation: str) -> None:
    for embedding_format in ("int4", "int8"):
        plan = plan_of(bits, embedding_format)
        assert plan.nominal_bits() == pytest.approx(bits)
        assert plan.notation() == notation


def test_nominal_bits_count_weights_not_matrices() -> None:
    plan = plan_of(2.0)
    linears = [site for site in SITES if site.kind == "linear"]
    expected = sum(bits_of(*interleave(site.rows, 2.0), site.rows) * site.weights for site in linears)
    assert plan.nominal_bits() == pytest.approx(expected / sum(site.weights for site in linears))
    assert plan.nominal_bits() <= 2.0
    assert plan.weights() == sum(site.weights for site in SITES)


@pytest.mark.parametrize("bits", [1.58, 1.88, 2.0, 2.79, 3.3, 4.0, 5.5, 8.0])
@pytest.mark.parametrize("group_size", [8, 40, 256])
def test_planned_bytes_are_written_bytes(bits: float, group_size: int, tmp_path: Path) -> None:
    plan = make_plan(SITES, Calibrate(bits=bits, group_size=group_size))
    torch.manual_seed(0)

    def matrices() -> list[PackedMatrix]:
        return [
            PackedMatrix(m.name, m.kind, formats.encode_matrix(torch.randn(m.rows, m.columns), m.spec()), m.spec())
            for m in plan.matrices
        ]

    packed.write(tmp_path, matrices(), {}, tied={}, settings={}, provenance={})
    model = packed.PackedModel.open(tmp_path)
    sizes = packed.size_table(model)
    assert sum(each.bytes for each in sizes.classes) == plan.bytes()
    assert sizes.nominal_bits == pytest.approx(plan.nominal_bits())
    for matrix in plan.matrices:
        parts = formats.pack_matrix(model.matrix(matrix.name).encoded, matrix.spec())
        assert sum(part.nbytes for part in parts.values()) == matrix.bytes()


@pytest.mark.parametrize(
    ("names", "digits"),
    [(("ternary", "int4"), ""), (("ternary", "int4"), "01"), (("int4",), "000"), (("ternary", "int4"), "0x1")],
)
def test_contradictory_plans_are_refused(names: tuple[str, ...], digits: str) -> None:
    with pytest.raises(ValidationError):
        MatrixPlan(name="m", kind="linear", rows=3, columns=4, formats=names, row_formats=digits, group_size=8)
