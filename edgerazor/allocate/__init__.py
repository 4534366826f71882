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


