"""Which inputs share a prefix: every input once, prefixes that they have, and few tokens to compute."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from edgerazor.tasks.shared_prefixes import PrefixGroup, group_by_prefix


def tokens(inputs: Sequence[Sequence[int]], groups: Sequence[PrefixGroup]) -> int:
    """That are computed: prefixes, and what lies behind them."""
    return sum(group.prefix + sum(len(inputs[i]) - group.prefix for i in group.members) for group in groups)


def divisions(indices: list[int]) -> Iterator[list[list[int]]]:
    """All ways to divide indices into groups."""
    if not indices:
        yield []
        return
    first, *others = indices
    for division in divisions(others):
        yield [[first], *division]
        for place, group in enumerate(division):
            yield [*division[:place], [first, *group], *division[place + 1 :]]


def longest_prefix(inputs: list[tuple[int, ...]], limits: list[int], members: list[int]) -> int:
    common = 0
    while common < min(limits[i] for i in members) and len({inputs[i][: common + 1] for i in members}) == 1:
        common += 1
    return common


def test_groups_are_a_division_with_common_prefixes_and_nearly_the_fewest_tokens() -> None:
    draw = random.Random(0)
    fewest = found = alone = 0
    for _ in range(200):
        inputs = list({tuple(draw.choices((0, 1), k=draw.randint(1, 8))) for _ in range(draw.randint(1, 6))})
        limits = [draw.randint(1, len(each)) for each in inputs]
        groups = group_by_prefix(inputs, limits)
        assert sorted(index for group in groups for index in group.members) == list(range(len(inputs)))
        for group in groups:
            assert 1 <= group.prefix <= longest_prefix(inputs, limits, group.members)
        best = min(
            tokens(inputs, [PrefixGroup(longest_prefix(inputs, limits, members), members) for members in division])
            for division in divisions(list(range(len(inputs))))
        )
        assert tokens(inputs, groups) <= best + 2
        fewest += best
        found += tokens(inputs, groups)
        alone += sum(map(len, inputs))
    assert fewest <= found <= 1.005 * fewest < 0.9 * alone


def test_choices_share_their_prompt() -> None:
    prompts = [[0, 10 + item, *range(100, 120)] for item in range(3)]
    inputs = [[*prompt, 200 + choice, 300] for prompt in prompts for choice in range(4)]
    groups = group_by_prefix(inputs, [22] * 12)
    assert sorted((group.prefix, sorted(group.members)) for group in groups) == [
        (22, [0, 1, 2, 3]),
        (22, [4, 5, 6, 7]),
        (22, [8, 9, 10, 11]),
    ]
    assert tokens(inputs, groups) == 3 * (22 + 4 * 2)


def test_items_share_long_examples() -> None:
    examples = list(range(1000, 1400))
    inputs = [[*examples, item, 7, 8, choice] for item in range(5) for choice in range(3)]
    assert (
        tokens(inputs, group_by_prefix(inputs, [403] * 15)) == 400 + 15 * 4
    )  # of their own they could share 403 in threes
    (group,) = group_by_prefix(inputs, [403] * 15)
    assert (group.prefix, sorted(group.members)) == (400, list(range(15)))


def test_little_in_common_is_left_to_the_groups_below() -> None:
    inputs = [[0, item, *range(50), choice] for item in range(40) for choice in range(2)]
    groups = group_by_prefix(inputs, [52] * 80)
    assert {group.prefix for group in groups} == {52}
    assert len(groups) == 40


def test_deep_chains_do_not_overflow() -> None:
    inputs = [tuple(range(length)) for length in range(1, 2000)]
    groups = group_by_prefix(inputs, [len(each) for each in inputs])
    assert sum(len(group.members) for group in groups) == 1999
    assert group_by_prefix([], []) == []
