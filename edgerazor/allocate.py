"""A budget of bits -> a format for every row or block of every matrix.

Every matrix gets two formats, a narrower and a wider one, and the same share `p` of its weights has the wider. Between
1.58 and 4 bits the two are ternary and int4, above 4 bits int4 and int8, or those that the recipe names. What differs
is which weights are lucky. A *unit* has one format: a row, a group of one row (a block), or a group of columns in all
rows; and the units are chosen

- `interleave`: spread evenly. With rows this is EdgeRazor's structural mixed precision (arXiv 2605.04062, section 3);
- `variance`: those whose weights have the highest variance (of blocks: "dynamic" in EdgeRazor's code);
- `first`: those that come first (of blocks: its "static", of columns: its "static column-wise").

Embedding and head have formats of their own, and so have matrices that the recipe names. Nothing here measures which
rows matter. Another strategy is another function from (site, share, statistics) to a choice, called in `choose`;
everything downstream reads only the plan.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from edgerazor import formats
from edgerazor.attention import UNIMPORTANT_BITS
from edgerazor.errors import UserError, usage_error
from edgerazor.formats import MatrixSpec
from edgerazor.models import Site
from edgerazor.recipe import Calibrate, Override

#: Averages that are names of a share of int4 rows, although their exact average differs in the third digit.
NAMED_SHARES = {1.58: 0.0, 1.88: 1 / 8, 2.79: 1 / 2, 4.0: 1.0}


class MatrixPlan(BaseModel):
    """The formats of one matrix. A digit is an index into `formats`.

    `row_formats` has a digit per row; `block_formats` a text per row, or one for all rows, with a digit per group.
    One of the two, or neither when the matrix has one format.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["linear", "embedding", "head"]
    rows: int
    columns: int
    formats: tuple[str, ...]
    row_formats: str = ""
    block_formats: tuple[str, ...] = ()
    group_size: int

    @model_validator(mode="after")
    def _consistent(self) -> MatrixPlan:
        if len(self.row_formats) not in (0, self.rows) or len(self.block_formats) not in (0, 1, self.rows):
            counted = len(self.row_formats or self.block_formats)
            raise ValueError(f"{self.name} has {self.rows} rows but formats for {counted}")
        if (len(self.formats) > 1) != bool(self.row_formats) + bool(self.block_formats):
            raise ValueError(f"{self.name} does not say once what has which format")
        groups = formats.group_count(self.columns, self.group_size)
        if any(len(row) != groups for row in self.block_formats):
            raise ValueError(f"{self.name} has rows of {groups} groups but formats for another number")
        digits = {str(index) for index in range(len(self.formats))}
        if not set(self.row_formats).union(*self.block_formats) <= digits:
            raise ValueError(f"{self.name} has a format that is none of its {len(self.formats)}")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def spec(self) -> MatrixSpec:
        """The same for the number formats."""
        rows = _from_digits(self.row_formats) if self.row_formats else None
        blocks = _from_digits("".join(self.block_formats)) if self.block_formats else None
        if blocks is not None:
            blocks = blocks.view(len(self.block_formats), -1)
        return MatrixSpec(self.formats, self.group_size, rows, blocks)

    def bytes(self) -> int:
        """Stored bytes of codes, scales and formats of rows or blocks."""
        return self.spec().packed_bytes(self.shape)


class Plan(BaseModel):
    """What the student will be: `calibrate/plan.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requested_bits: float
    strategy: str
    granularity: str
    activation_bits: int
    activation_scales: Literal["dynamic", "static", "learned"]
    kv_bits: int
    query_bits: int
    probability_bits: int
    adaptive_tokens: Literal["off", "causal", "ranked"]
    group_size: int
    scales: Literal["rule", "learned"]
    matrices: tuple[MatrixPlan, ...]
    predicted_kl: float | None = None

    def __getitem__(self, name: str) -> MatrixPlan:
        """The plan of a matrix by its module's path; `KeyError` if there is none."""
        for matrix in self.matrices:
            if matrix.name == name:
                return matrix
        raise KeyError(name)

    def specs(self) -> dict[str, MatrixSpec]:
        """Module path -> formats, for the modules that compute."""
        return {matrix.name: matrix.spec() for matrix in self.matrices}

    def nominal_bits(self) -> float:
        """Average over the weights of the decoder's linear layers."""
        linears = [matrix for matrix in self.matrices if matrix.kind == "linear"]
        weights = [matrix.rows * matrix.columns for matrix in linears]
        bits = [matrix.spec().nominal_bits(matrix.shape) for matrix in linears]
        return sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)

    def bytes(self) -> int:
        """Stored bytes of all planned matrices."""
        return sum(matrix.bytes() for matrix in self.matrices)

    def weights(self) -> int:
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    def notation(self) -> str:
        """The field's short name: W1.88-A8-KV8, or W4-A8/4-KV8 where some tokens have fewer bits."""
        fewer = "" if self.adaptive_tokens == "off" else f"/{UNIMPORTANT_BITS}"
        return f"W{self.nominal_bits():.2f}-A{self.activation_bits}{fewer}-KV{self.kv_bits}".replace(".00-", "-")


class Mixture(NamedTuple):
    """Two formats, the narrower first, and the share of the weights that gets the wider one.

    `every` is not 0 for EdgeRazor's published shares: every n-th unit, beginning with the first.
    """

    low: str
    high: str
    share: float
    every: int = 0


def make_plan(sites: Iterable[Site], settings: Calibrate, weight_of: Callable[[str], Tensor] | None = None) -> Plan:
    """Formats for every matrix at the requested average.

    Args:
        sites: the matrices of the model.
        settings: bits, formats, group size, strategy, formats of embedding and head, overrides.
        weight_of: gives the weight [rows, columns] of a module's path; asked one matrix at a time, and only by
            strategies that look at weights.

    Raises:
        UserError: the settings contradict themselves (as `check`) or do not fit the model.
    """
    sites = tuple(sites)
    check(settings)
    mixture = mixture_of(settings)
    fixed = fixed_formats(sites, settings)
    matrices = []
    for site in sites:
        about: dict[str, Any] = {"formats": (fixed[site.name],)} if site.name in fixed else {}
        if not about:
            about = _described(choose(site, settings, mixture, weight_of), mixture)
        about |= {"rows": site.rows, "columns": site.columns, "group_size": settings.group_size}
        matrices.append(MatrixPlan(name=site.name, kind=site.kind, **about))
    return Plan(
        requested_bits=settings.bits,
        strategy=settings.plan,
        granularity=settings.granularity,
        activation_bits=settings.activation_bits,
        activation_scales=settings.activation_scales,
        kv_bits=settings.kv_bits,
        query_bits=settings.query_bits,
        probability_bits=settings.probability_bits,
        adaptive_tokens=settings.adaptive_tokens,
        group_size=settings.group_size,
        scales=settings.scales,
        matrices=tuple(matrices),
    )


# --- what was asked for ------------------------------------------------------------------------


def check(settings: Calibrate) -> None:
    """Refuse, without looking at a model, what cannot be planned.

    Raises:
        UserError: a format that does not exist, or two that do not give the bits.
    """
    named = [settings.embedding_format, settings.head_format, *(each.format for each in settings.overrides)]
    for name in named:
        if name is not None:
            formats.get(name)
    mixture_of(settings)


def mixture_of(settings: Calibrate) -> Mixture:
    """The formats to mix for the requested bits.

    Raises:
        UserError: they are not two, one wider than the other, or the bits do not lie between theirs.
    """
    bits = settings.bits
    names = settings.formats or (("ternary", "int4") if bits <= 4 else ("int4", "int8"))
    widths = [formats.get(name).nominal_bits for name in names]
    if len(widths) != 2 or widths[0] >= widths[1]:
        raise usage_error(f"--formats is {','.join(names)}; expected two formats, the narrower first.")
    (low, high), (low_bits, high_bits) = names, widths
    if not low_bits <= bits <= high_bits:
        raise usage_error(
            f"--bits is {bits:g}, but mixing {low} and {high} gives {low_bits:g} to {high_bits:g} bits.",
            "Ask for bits between, or for other --formats.",
        )
    if (low, high) == ("ternary", "int4") and bits in NAMED_SHARES:
        share = NAMED_SHARES[bits]
        return Mixture(low, high, share, int(1 / share) if share else 0)
    return Mixture(low, high, (bits - low_bits) / (high_bits - low_bits))


def fixed_formats(sites: tuple[Site, ...], settings: Calibrate) -> dict[str, str]:
    """Module path -> format, for the matrices whose format does not depend on the bits.

    Raises:
        UserError: an override that changes nothing, or a format for a head that is tied to the embedding.
    """
    fixed = {site.name: settings.embedding_format for site in sites if site.kind == "embedding"}
    heads = [site.name for site in sites if site.kind == "head"]
    if settings.head_format is not None and not heads:
        raise usage_error(
            f"`head_format` is {settings.head_format}, but the model's head is tied to its embedding.",
            "Leave it out, and set `embedding_format` for both.",
        )
    fixed |= dict.fromkeys(heads, settings.head_format or settings.embedding_format)
    left = [site.name for site in sites]
    for override in settings.overrides:
        matched = [name for name in left if fnmatchcase(name, override.match)]
        if not matched:
            raise _useless(override, [site.name for site in sites])
        fixed |= dict.fromkeys(matched, override.format)
        left = [name for name in left if name not in matched]
    return fixed


def _useless(override: Override, names: list[str]) -> UserError:
    if any(fnmatchcase(name, override.match) for name in names):
        return usage_error(
            f"The override {override.match!r} changes nothing: earlier ones match all its modules.",
            "The first override that matches a module counts; put this one before them.",
        )
    size = override.match.count(".") + 1

    def likeness(name: str) -> float:
        end = ".".join(name.split(".")[-size:])
        return difflib.SequenceMatcher(None, end, override.match).ratio()

    kinds = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}  # the first module of each name
    close = sorted(kinds.values() if set("*?[") & set(override.match) else names, key=likeness, reverse=True)[:3]
    return usage_error(
        f"The override {override.match!r} matches no quantized module; the closest are {', '.join(close)}.",
        "`match` is a glob on the whole path of a module, as in *.down_proj.",
    )


# --- which units get the wider format ----------------------------------------------------------


def choose(
    site: Site, settings: Calibrate, mixture: Mixture, weight_of: Callable[[str], Tensor] | None = None
) -> Tensor:
    """What of a matrix gets the wider format: bool [rows], or [rows, groups], or [1, groups] when all rows are alike.

    The share of its weights is that of the mixture: never more, and less by no more than one unit; but EdgeRazor's
    published interleave may round up to a unit more.
    """
    weight = None
    if settings.plan == "variance":
        if weight_of is None:
            raise ValueError("the strategy variance looks at weights, but was given none")
        weight = weight_of(site.name).detach()
    group = min(settings.group_size, site.columns)
    wide = {"row": _choose_rows, "column": _choose_columns, "block": _choose_blocks}[settings.granularity]
    return wide(site, group, mixture, settings.plan, weight)


def _choose_rows(site: Site, group: int, mixture: Mixture, plan: str, weight: Tensor | None) -> Tensor:
    if plan == "interleave":
        return spread(site.rows, mixture)
    ranks = -torch.arange(site.rows) if weight is None else variances(weight, site.columns)[:, 0]
    return _highest(ranks, torch.ones(site.rows), mixture.share * site.rows)


def _choose_blocks(site: Site, group: int, mixture: Mixture, plan: str, weight: Tensor | None) -> Tensor:
    widths = _widths(site.columns, group)
    if plan == "interleave":  # among the whole groups, and among the shorter last ones
        whole = site.columns // group
        ends = [spread(site.rows * count, mixture).view(site.rows, count) for count in (whole, len(widths) - whole)]
        return torch.cat(ends, dim=1)
    ranks = -torch.arange(site.rows * len(widths)) if weight is None else variances(weight, group).flatten()
    wide = _highest(ranks, widths.repeat(site.rows), mixture.share * site.weights)
    return wide.view(site.rows, -1)


def _choose_columns(site: Site, group: int, mixture: Mixture, plan: str, weight: Tensor | None) -> Tensor:
    """Whole columns of groups as far as the share goes, and the next one in as many rows as it still allows."""
    widths = _widths(site.columns, group)
    if weight is not None:
        ranks = torch.stack([part.double().var(correction=0) for part in weight.split(group, dim=1)]).cpu()
    else:
        ranks = -torch.arange(len(widths)) if plan == "first" else spread(len(widths), mixture).long()
    budget = mixture.share * site.columns
    wide = _highest(ranks, widths, budget)
    left = ranks.double().masked_fill(wide, -torch.inf)
    if bool(wide.all()):
        return wide[None]
    following = int(left.argsort(descending=True, stable=True)[0])
    rows = int((budget - float(widths[wide].sum())) / float(widths[following]) * site.rows + 1e-6)
    if not rows:
        return wide[None]
    wide = wide.repeat(site.rows, 1)
    wide[:, following] = spread(site.rows, mixture._replace(share=rows / site.rows, every=0))
    return wide


def spread(count: int, mixture: Mixture) -> Tensor:
    """EdgeRazor's interleave, bool [count]: which of so many equal units get the wider format.

    The published shares give it to every 1/p-th unit, beginning with the first, as published. Any other share spreads
    `floor(p * count)` units evenly and so never exceeds its budget.
    """
    index = torch.arange(count)
    if mixture.every:
        return index % mixture.every == 0
    steps = (torch.arange(count + 1).double() * mixture.share + 1e-9).floor()
    return steps[1:] > steps[:-1]


def variances(weight: Tensor, group_size: int) -> Tensor:
    """Variance of the weights of each group, float64 [rows, groups] on the CPU, of a weight [rows, columns]."""
    found = []
    for rows in weight.split(1024):  # float64 copies stay small
        parts = rows.double().split(group_size, dim=1)
        found.append(torch.stack([part.var(dim=1, correction=0) for part in parts], dim=1).cpu())
    return torch.cat(found)


def _highest(ranks: Tensor, sizes: Tensor, budget: float) -> Tensor:
    """The units of highest rank, of equals the first, as long as their sizes together fit the budget: bool [units]."""
    order = ranks.argsort(descending=True, stable=True)
    fit = sizes[order].double().cumsum(0) <= budget + 1e-6
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[order[fit]] = True
    return chosen


def _widths(columns: int, group: int) -> Tensor:
    """Columns of each group, int64 [groups]."""
    starts = torch.arange(0, columns, group)
    return (starts + group).clamp(max=columns) - starts


# --- digits of a plan --------------------------------------------------------------------------


def _described(wide: Tensor, mixture: Mixture) -> dict[str, Any]:
    """A choice as fields of a `MatrixPlan`."""
    if bool(wide.all()) or not bool(wide.any()):
        return {"formats": (mixture.high if bool(wide.any()) else mixture.low,)}
    both = {"formats": (mixture.low, mixture.high)}
    if wide.dim() == 1 or wide.shape[1] == 1:
        return {**both, "row_formats": _digits(wide)}
    text, groups = _digits(wide), wide.shape[1]
    return {**both, "block_formats": tuple(text[at : at + groups] for at in range(0, len(text), groups))}


def _digits(wide: Tensor) -> str:
    return (wide.to(torch.uint8) + ord("0")).numpy().tobytes().decode()


def _from_digits(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) - ord("0")
