"""Plans by sensitivity: a budget is never exceeded and hardly left unused, and wide formats go where they help."""

from __future__ import annotations

import functools
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from edgerazor import formats, packed
from edgerazor.allocate import (
    NAMED_SHARES,
    MatrixPlan,
    Plan,
    SensitivityTable,
    candidates_of,
    check,
    make_plan,
    measures,
    unmeasured,
)
from edgerazor.errors import USAGE, UserError
from edgerazor.models import QuantTarget
from edgerazor.packed import FolderSize
from edgerazor.recipe import Calibrate, Constraint
from helpers.tiny_models import mostly_slow

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

#: Relative squared error of Gaussian weights, about.
ERRORS = {"ternary": 0.19, "int2": 0.14, "int3": 0.04, "int4": 0.012, "int5": 0.003, "int8": 0.00005}
LAYER = {
    "self_attn.q_proj": (2048, 1024),
    "self_attn.k_proj": (1024, 1024),
    "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 2048),
    "mlp.gate_proj": (3072, 1024),
    "mlp.up_proj": (3072, 1024),
    "mlp.down_proj": (1024, 3072),
}
#: Four layers like those of Qwen3-0.6B.
LINEARS = tuple(
    QuantTarget(f"model.layers.{layer}.{name}", "linear", layer, *shape)
    for layer in range(4)
    for name, shape in LAYER.items()
)
EMBEDDING, HEAD = (
    QuantTarget("model.embed_tokens", "embedding", None, 8000, 1024),
    QuantTarget("lm_head", "head", None, 8000, 1024),
)
TARGETS = (EMBEDDING, *LINEARS, HEAD)
#: Rows that no sixteen divides, and groups that are cut short.
AWKWARD = (
    QuantTarget("embed", "embedding", None, 300, 96),
    QuantTarget("layers.0.q", "linear", 0, 96, 101),
    QuantTarget("layers.0.k", "linear", 0, 7, 96),
    QuantTarget("layers.1.q", "linear", 1, 101, 96),
    QuantTarget("layers.1.k", "linear", 1, 1, 33),
)
BUDGETS = [1.6, 1.7, 1.9, 2.0, 2.2, 2.5, 2.75, 3.0, 3.3, 3.7, 3.9, 4.1, 4.5, 5.0, 6.0, 7.0, 7.9, 8.0]
NORMS = {"model.norm.weight": ("F32", (1024,))}


@functools.cache
def sensitivities_of(
    targets: tuple[QuantTarget, ...] = TARGETS, estimate: str = "fisher", in_nats: bool = True
) -> SensitivityTable:
    """A few rows have most of the sensitivity, the more so in some matrices; 0.3 nats in all for ternary."""
    draw = torch.Generator().manual_seed(3)
    rows = {}
    for target in targets:
        count = target.rows if target.kind == "linear" else 1
        each = torch.randn(count, generator=draw, dtype=torch.float64).mul(1.5).exp()
        each *= torch.randn(1, generator=draw, dtype=torch.float64).exp()
        wobble = 1 + 0.1 * torch.rand(len(ERRORS), count, generator=draw, dtype=torch.float64)
        rows[target.name] = torch.tensor(list(ERRORS.values()), dtype=torch.float64)[:, None] * each * wobble
    total = sum(float(value[0].sum()) for value in rows.values())
    scaled = {name: value * 0.3 / total for name, value in rows.items()}
    return SensitivityTable(estimate, tuple(ERRORS), scaled, in_nats)


def size_of(plan: Plan) -> FolderSize:
    return packed.predict(
        ((matrix.name, matrix.kind, matrix.spec(), matrix.shape) for matrix in plan.matrices),
        NORMS,
        tied={},
        settings={},
        provenance={},
    )


def plan_of(
    targets: tuple[QuantTarget, ...] = TARGETS, sensitivities: SensitivityTable | None = None, **settings: Any
) -> Plan:
    asked = Calibrate.model_validate(settings, strict=False)
    return make_plan(targets, asked, None, sensitivities or sensitivities_of(targets), size_of)


def linears(plan: Plan) -> list[MatrixPlan]:
    return [matrix for matrix in plan.matrices if matrix.kind == "linear"]


def rows_by_format(matrix: MatrixPlan) -> dict[str, int]:
    digits = Counter(matrix.row_formats or "0" * matrix.rows)
    return {name: digits[str(index)] for index, name in enumerate(matrix.formats)}


def predicted(plan: Plan, sensitivities: SensitivityTable) -> float:
    """The sensitivity of all rows in the formats of a plan, of matrices whose format was chosen."""
    total = 0.0
    for matrix in linears(plan):
        each = sensitivities.of(matrix.name, matrix.formats)
        digits = torch.tensor([int(digit) for digit in matrix.row_formats or "0" * matrix.rows])
        total += float(each[digits, torch.arange(matrix.rows)].sum())
    return total


# --- nominal bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BUDGETS)
def test_rows_use_the_budget_up_and_never_more(bits: float) -> None:
    plan = plan_of(bits=bits)
    assert bits * (1 - 0.005) <= plan.nominal_bits() <= bits + 1e-9
    assert {plan["model.embed_tokens"].formats, plan["lm_head"].formats} == {("int4",)}
    assert (plan.strategy, plan.granularity, plan.estimate) == ("sensitivity", "row", "fisher")
    assert plan.predicted_kl == pytest.approx(predicted(plan, sensitivities_of()))
    for matrix in linears(plan):  # kernels take sixteen rows at a time
        assert not matrix.block_formats
        assert all(count % 16 == 0 and count for count in rows_by_format(matrix).values())


@pytest.mark.parametrize("bits", BUDGETS)
def test_awkward_shapes_keep_the_budget_too(bits: float) -> None:
    plan = plan_of(AWKWARD, bits=bits, group_size=40)
    assert plan.nominal_bits() <= bits + 1e-9
    for matrix in linears(plan):  # all but the tile that is cut short
        assert sum(count % 16 != 0 for count in rows_by_format(matrix).values()) <= (matrix.rows % 16 != 0)


@pytest.mark.parametrize("bits", sorted(NAMED_SHARES))
def test_published_averages_are_names(bits: float) -> None:
    plan, share = plan_of(bits=bits), NAMED_SHARES[bits]
    exact = 1.58 * (1 - share) + 4 * share  # 1.8825 is called 1.88
    assert exact * (1 - 0.005) <= plan.nominal_bits() <= exact + 1e-9
    if share in (0, 1):
        assert {matrix.formats for matrix in linears(plan)} == {("ternary" if share == 0 else "int4",)}


@pytest.mark.parametrize("bits", BUDGETS)
def test_whole_tensors_keep_the_budget_and_rows_do_better(bits: float) -> None:
    rows, tensors = plan_of(bits=bits), plan_of(bits=bits, granularity="tensor")
    assert all(not matrix.row_formats for matrix in tensors.matrices)
    assert tensors.nominal_bits() <= bits + 1e-9
    assert tensors.predicted_kl == pytest.approx(predicted(tensors, sensitivities_of()))
    assert rows.predicted_kl is not None
    assert tensors.predicted_kl is not None
    assert rows.predicted_kl <= tensors.predicted_kl * (1 + 1e-6)
    # Nothing can be widened within what is left: the plan is not far below its budget for no reason.
    left = (bits - tensors.nominal_bits()) * sum(target.weights for target in LINEARS)
    names = candidates_of(Calibrate(bits=bits))
    for matrix in linears(tensors):
        wider = names[names.index(matrix.formats[0]) + 1 :]
        for name in wider:
            now, then = (float(sensitivities_of().of(matrix.name, (each,)).sum()) for each in (matrix.formats[0], name))
            more = formats.get(name).nominal_bits - formats.get(matrix.formats[0]).nominal_bits
            assert then >= now or more * matrix.rows * matrix.columns > left * (1 - 1e-9) - 1e-6


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_more_bits_never_have_a_larger_predicted_kl(granularity: str) -> None:
    predictions = [plan_of(bits=bits, granularity=granularity).predicted_kl for bits in BUDGETS if bits <= 4]
    values = [value for value in predictions if value is not None]
    assert len(values) == len(predictions)
    gap = 1e-3 if granularity == "row" else 0.0  # of a step, which rows have small ones of
    assert all(later <= earlier * (1 + gap) for earlier, later in pairwise(values))


def test_the_most_sensitive_rows_get_the_widest_formats() -> None:
    rows = {  # of one shape, so that no row is worse in one format and better in another
        name: value[:1] / ERRORS["ternary"] * torch.tensor(list(ERRORS.values()), dtype=torch.float64)[:, None]
        for name, value in sensitivities_of().rows.items()
    }
    sensitivities = SensitivityTable("fisher", tuple(ERRORS), rows)
    plan = plan_of(sensitivities=sensitivities, bits=2.5)
    mixed = [matrix for matrix in linears(plan) if matrix.row_formats]
    assert mixed
    for matrix in mixed:
        widths = [formats.get(name).nominal_bits for name in matrix.formats]
        assert widths == sorted(widths)
        every = sensitivities.of(matrix.name, ("ternary", "int4"))
        saved = every[0] - every[1]
        digits = torch.tensor([int(digit) for digit in matrix.row_formats])
        for digit in range(1, len(widths)):
            assert saved[digits >= digit].min() >= saved[digits < digit].max()
    # And among matrices: a row in int4 saves more for its bits than one that is ternary would.
    means = [float(sensitivities.rows[matrix.name][0].mean()) for matrix in linears(plan)]
    bits = [matrix.spec().nominal_bits(matrix.shape) for matrix in linears(plan)]
    assert float(np.corrcoef(np.argsort(np.argsort(means)), np.argsort(np.argsort(bits)))[0, 1]) > 0.8


def test_one_sensitive_row_among_thousands_is_found() -> None:
    rows = {target.name: torch.full((2, target.rows), 1e-9, dtype=torch.float64) for target in LINEARS}
    worst = "model.layers.2.self_attn.o_proj"
    rows[worst][0, 777], rows[worst][1] = 1.0, 0.0
    plan = plan_of(
        sensitivities=SensitivityTable("direct", ("ternary", "int4"), rows), bits=1.6, formats=["ternary", "int4"]
    )
    matrix = plan[worst]
    assert matrix.formats == ("ternary", "int4")
    assert matrix.row_formats[777] == "1"


def test_equal_questions_have_equal_answers() -> None:
    for settings in ({"bits": 2.0}, {"bits": 2.79, "granularity": "tensor"}, {"real_bits": 2.6}):
        assert plan_of(**settings).model_dump_json() == plan_of(**settings).model_dump_json()
    assert Plan.model_validate_json(plan_of(bits=2.0).model_dump_json(indent=1)) == plan_of(bits=2.0)


def test_what_is_not_in_nats_predicts_nothing() -> None:
    plan = plan_of(sensitivities=sensitivities_of(TARGETS, "hessian", False), bits=2.0)
    assert (plan.estimate, plan.predicted_kl) == ("hessian", None)
    assert plan.matrices == plan_of(bits=2.0).matrices


def test_candidates_are_those_that_are_asked_for() -> None:
    plan = plan_of(bits=3.0, formats=["int8", "int2"])
    assert {name for matrix in linears(plan) for name in matrix.formats} == {"int2", "int8"}
    assert 3.0 * (1 - 0.005) <= plan.nominal_bits() <= 3.0
    assert {each.formats for each in linears(plan_of(bits=2.0, formats=["int2"]))} == {("int2",)}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": 4.5, "formats": ["int2", "int4"]}, "--bits is 4.5, but int2, int4 give 2 to 4 bits."),
        ({"bits": 1.9, "formats": ["int2", "int4"]}, "--bits is 1.9, but int2, int4 give 2 to 4 bits."),
        ({"formats": ["int2", "int2"]}, "--formats is int2,int2; expected different formats."),
        ({"formats": ["int44"]}, "no format called 'int44'"),
        ({"constraints": [{"match": "*", "at_least": "fp4"}]}, "no format called 'fp4'"),
        ({"constraints": [{"match": "*", "at_most": "fp5"}]}, "no format called 'fp5'"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_a_model_is_seen(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as wrong:
        check(Calibrate.model_validate(settings, strict=False))
    assert sentence in wrong.value.message
    assert "\n" not in wrong.value.message
    assert wrong.value.code == USAGE


# --- constraints and overrides -----------------------------------------------------------------


def widths(plan: Plan, ending: str) -> set[str]:
    return {name for matrix in plan.matrices if matrix.name.endswith(ending) for name in matrix.formats}


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_constraints_hold_and_count_in_the_average(granularity: str) -> None:
    limits = [
        {"match": "*.o_proj", "at_least": "int4"},
        {"match": "*.mlp.*", "at_most": "int3"},
        {"match": "*.k_proj", "at_least": "int2", "at_most": "int3"},
        {"match": "*.layers.0.*.q_proj", "at_least": "int3"},
        {"match": "*.q_proj", "at_most": "int3"},
    ]
    plan = plan_of(bits=2.5, granularity=granularity, constraints=limits)
    assert widths(plan, ".o_proj") == {"int4"}
    assert "int4" not in widths(plan, ".gate_proj") | widths(plan, ".up_proj") | widths(plan, ".down_proj")
    assert widths(plan, ".k_proj") <= {"int2", "int3"}
    assert plan["model.layers.0.self_attn.q_proj"].formats == ("int3",)
    assert plan.nominal_bits() <= 2.5 + 1e-9
    if granularity == "row":
        assert plan.nominal_bits() >= 2.5 * (1 - 0.005)
    free = plan_of(bits=2.5, granularity=granularity)
    assert plan.predicted_kl is not None
    assert free.predicted_kl is not None
    assert plan.predicted_kl > free.predicted_kl


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (
            [{"match": "*.q", "at_least": "int4"}],
            "The constraint '*.q' matches no matrix whose format is to be chosen.",
        ),
        ([{"match": "lm_head", "at_least": "int4"}], "The constraint 'lm_head' matches no matrix"),
        ([{"match": "*.q_proj", "at_least": "int5"}], "The constraint '*.q_proj' leaves none of the formats ternary,"),
        (
            [{"match": "*.q_proj", "at_most": "int2"}, {"match": "*.layers.0.*", "at_least": "int3"}],
            "The constraint '*.layers.0.*' leaves none of the formats",
        ),
        (
            [{"match": "*_proj", "at_least": "int3"}],
            "--bits is 2.5, but with the recipe's constraints it cannot be less than 3.000.",
        ),
    ],
)
def test_constraints_that_cannot_be_are_one_sentence(limits: list[dict[str, str]], sentence: str) -> None:
    with pytest.raises(UserError) as wrong:
        plan_of(bits=2.5, constraints=limits)
    assert sentence in wrong.value.message
    assert "\n" not in wrong.value.message
    assert wrong.value.code == USAGE


def test_overrides_are_taken_out_of_the_average() -> None:
    asked = [{"match": "*.down_proj", "format": "int8"}, {"match": "lm_head", "format": "int5"}]
    plan = plan_of(bits=2.0, overrides=asked)
    assert widths(plan, ".down_proj") == {"int8"}
    assert (plan["lm_head"].formats, plan["model.embed_tokens"].formats) == (("int5",), ("int4",))
    others = [matrix for matrix in linears(plan) if not matrix.name.endswith("down_proj")]
    weights = [matrix.rows * matrix.columns for matrix in others]
    average = np.average([matrix.spec().nominal_bits(matrix.shape) for matrix in others], weights=weights)
    assert 2.0 * (1 - 0.005) <= average <= 2.0 + 1e-9
    rest = tuple(target for target in LINEARS if not target.name.endswith("down_proj"))
    assert {matrix.name: matrix for matrix in others} == {
        matrix.name: matrix for matrix in plan_of(rest, sensitivities_of(), bits=2.0).matrices
    }


def test_where_everything_is_overridden_nothing_is_chosen() -> None:
    plan = plan_of(bits=2.0, overrides=[{"match": "*_proj", "format": "int3"}])
    assert {matrix.formats for matrix in linears(plan)} == {("int3",)}


# --- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("real_bits", mostly_slow([1.75, 1.9, 2.3, 3.0, 4.05, 5.5, 7.0], 1.75, 2.3, 5.5))
def test_real_bits_are_never_exceeded_and_used(real_bits: float, granularity: str) -> None:
    plan = plan_of(real_bits=real_bits, granularity=granularity)
    size = size_of(plan)
    assert size.real_bits <= real_bits
    assert size.real_bits >= real_bits * (1 - (0.005 if granularity == "row" else 0.05))
    assert all(not matrix.row_formats for matrix in plan.matrices if matrix.kind != "linear")
    for matrix in linears(plan):
        assert all(count % 16 == 0 and count for count in rows_by_format(matrix).values())


@pytest.mark.parametrize("megabytes", mostly_slow([18, 20, 31.5, 48], 18, 31.5))
def test_a_target_size_is_never_exceeded_and_used(megabytes: float) -> None:
    limit = int(megabytes * 1e6)
    plan = plan_of(target_size=limit)
    assert limit * (1 - 0.005) <= size_of(plan).bytes <= limit


def test_embedding_and_head_are_candidates_under_bytes() -> None:
    """Each takes what its sensitivity is worth: of two alike, the one that hurts more is not the narrower."""
    errors = torch.tensor(list(ERRORS.values()), dtype=torch.float64)[:, None]
    seen = {}
    for share in (1e-6, 0.1, 100.0):  # nats if it is ternary; all linear layers together have about 0.3
        rows = dict(sensitivities_of().rows) | {"lm_head": share * errors / errors[0]}
        plan = plan_of(sensitivities=SensitivityTable("fisher", tuple(ERRORS), rows), real_bits=5.0)
        assert size_of(plan).real_bits <= 5.0
        seen[share] = formats.get(plan["lm_head"].formats[0]).nominal_bits
    assert seen[1e-6] == 1.58
    assert seen[1e-6] <= seen[0.1] <= seen[100.0] == 8


def test_overrides_of_embedding_and_head_hold_under_bytes() -> None:
    asked = [{"match": "*embed_tokens", "format": "int4"}, {"match": "lm_head", "format": "int8"}]
    plan = plan_of(real_bits=4.0, overrides=asked)
    assert (plan["model.embed_tokens"].formats, plan["lm_head"].formats) == (("int4",), ("int8",))
    assert 4.0 * (1 - 0.005) <= size_of(plan).real_bits <= 4.0
    limits = [{"match": "lm_head", "at_least": "int5"}, {"match": "*embed_tokens", "at_most": "int3"}]
    limited = plan_of(real_bits=3.0, constraints=limits)
    assert formats.get(limited["lm_head"].formats[0]).nominal_bits >= 5
    assert formats.get(limited["model.embed_tokens"].formats[0]).nominal_bits <= 3
    assert size_of(limited).real_bits <= 3.0


@pytest.mark.parametrize("settings", [{"real_bits": 1.2}, {"target_size": 1000}])
@pytest.mark.parametrize("plan", ["sensitivity", "interleave"])
def test_too_few_bytes_are_one_sentence_with_the_least(settings: dict[str, Any], plan: str) -> None:
    with pytest.raises(UserError, match=r"cannot be smaller than ([\d,]+) bytes") as wrong:
        plan_of(plan=plan, **settings)
    assert "\n" not in wrong.value.message
    assert wrong.value.code == USAGE
    least = int(wrong.value.message.split("smaller than ")[1].split(" bytes")[0].replace(",", ""))
    assert size_of(plan_of(plan=plan, target_size=least)).bytes == least
    with pytest.raises(UserError):
        plan_of(plan=plan, target_size=least - 1)


def test_awkward_shapes_keep_budgets_of_bytes_too() -> None:
    """Headers and alignment are much of so small a file, and change with the plan."""
    least = size_of(plan_of(AWKWARD, bits=1.58, embedding_format="ternary", group_size=40)).bytes
    for limit in range(least, 6 * least, 4999):
        for granularity in ("row", "tensor"):
            plan = plan_of(AWKWARD, target_size=limit, group_size=40, granularity=granularity)
            assert size_of(plan).bytes <= limit
    assert {matrix.formats for matrix in plan.matrices} == {("int8",)}  # of enough bytes, the best


@pytest.mark.parametrize("budget", [{"real_bits": 2.9}, {"real_bits": 3.9}, {"target_size": 25_000_000}])
@pytest.mark.parametrize("granularity", mostly_slow(["row", "column", "block"], "row"))
def test_the_interleave_under_bytes(budget: dict[str, Any], granularity: str) -> None:
    plan = plan_of(plan="interleave", granularity=granularity, formats=["ternary", "int4"], **budget)
    size = size_of(plan)
    limit = budget.get("target_size", budget.get("real_bits", 0) * size.weights / 8)
    assert limit * (1 - 0.005) <= size.bytes <= limit
    assert plan["lm_head"].formats == plan["model.embed_tokens"].formats == ("int4",)  # not candidates here


def test_one_format_is_not_missed_where_a_mixture_of_fewer_bits_is_larger() -> None:
    """Formats of rows take bytes, so that the size does not rise evenly up to 4 bits and has its step behind them."""
    limit = size_of(plan_of(plan="interleave", bits=4.0)).bytes
    for more in (0, 1, 1000):
        plan = plan_of(plan="interleave", target_size=limit + more)
        assert {matrix.formats for matrix in linears(plan)} == {("int4",)}


# --- before anything is measured -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"bits": 2.0}, ()),
        ({"bits": 2.0, "formats": ["int4", "int2"]}, ("int2", "int4")),
        ({"bits": 2.4, "formats": ["ternary", "int2", "int3", "int4"]}, ("int2", "int3")),
        ({"bits": 1.58, "formats": ["ternary", "int2", "int3"]}, ("ternary", "int2")),
        ({"bits": 3.0, "formats": ["ternary", "int2", "int3"]}, ("int2", "int3")),
        ({"bits": 3.5, "formats": ["int8", "ternary", "int3"]}, ("int3", "int8")),
        ({"bits": 2.0, "formats": ["int2"]}, ("int2",)),
        ({"bits": 8.0, "formats": ["int8"]}, ("int8",)),
        ({"real_bits": 3.5, "formats": ["ternary", "int2", "int3"]}, ()),
        ({"target_size": 25_000_000}, ()),
    ],
)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_unmeasured_plans_are_interleaves_around_the_bits(
    settings: dict[str, Any], names: tuple[str, ...], granularity: str
) -> None:
    limits = [{"match": "*.q_proj", "at_least": "int2"}]
    asked = Calibrate.model_validate({**settings, "granularity": granularity, "constraints": limits}, strict=False)
    fallback = unmeasured(asked)
    assert (fallback.plan, fallback.granularity, fallback.formats, fallback.constraints) == (
        "interleave",
        "row",
        names,
        (),
    )
    assert fallback.budget() == asked.budget()
    plan = make_plan(TARGETS, fallback, None, None, size_of)
    counted, value = asked.budget()
    if counted == "bits":
        assert value * (1 - 0.005) <= plan.nominal_bits() <= value + 1e-9


def test_other_strategies_need_no_measuring() -> None:
    for plan in ("interleave", "variance", "first"):
        asked = Calibrate(bits=2.0, plan=plan)
        assert unmeasured(asked) is asked


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"bits": 1.58}, "ternary"),
        ({"bits": 4.0}, "int4"),
        ({"bits": 8.0}, "int8"),
        ({"bits": 3, "formats": ["int3"]}, "int3"),
    ],
)
def test_where_nothing_is_to_be_chosen_nothing_is_measured(
    settings: dict[str, Any], name: str, granularity: str
) -> None:
    asked = Calibrate.model_validate({**settings, "granularity": granularity}, strict=False)
    assert not measures(asked)
    assert {matrix.formats for matrix in linears(make_plan(TARGETS, asked))} == {(name,)}
    limited = asked.model_copy(update={"constraints": (Constraint(match="*.q_proj", at_most=name),)})
    assert measures(limited)  # they may not hold of the one format


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="no sensitivities"):
        make_plan(TARGETS, Calibrate(bits=2.0))
    with pytest.raises(ValueError, match="the size of a plan"):
        make_plan(TARGETS, Calibrate(real_bits=2.0), None, sensitivities_of())
