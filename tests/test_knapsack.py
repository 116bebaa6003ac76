"""The inner problem: exact, within the budget to the byte, as diverse as promised."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from compress.searches.knapsack import Knapsack, Overlap, diverse, smallest, solve, value


def instance(seed: int) -> Knapsack:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, 5, size=draw.integers(3, 6))
    weights = [draw.integers(0, 10**6, size=n).astype(float) for n in sizes]
    low, high = sum(w.min() for w in weights), sum(w.max() for w in weights)
    survivors = [(0, int(sizes[0]) - 1), (1, 0)]
    return Knapsack(
        costs=[draw.random(n) for n in sizes],
        bytes=weights,
        budget=int(low + draw.random() * 0.7 * (high - low)),
        at_least_one=[survivors] if seed % 2 else [],
    )


def every_choice(problem: Knapsack, overlaps: list[Overlap]) -> list[tuple[int, ...]]:
    """All choices that keep every rule, from the rules' own words."""

    def keeps(choice: tuple[int, ...]) -> bool:
        shared = [sum(a == b for a, b in zip(choice, o.choice, strict=True)) for o in overlaps]
        return (
            value(problem.bytes, choice) <= problem.budget
            and all(any(choice[g] == o for g, o in pairs) for pairs in problem.at_least_one)
            and all(o.least <= n <= o.most for o, n in zip(overlaps, shared, strict=True))
        )

    return [c for c in itertools.product(*(range(len(x)) for x in problem.costs)) if keeps(c)]


@pytest.mark.parametrize("seed", range(24))
def test_the_knapsack_equals_brute_force(seed: int) -> None:
    problem, draw = instance(seed), random.Random(seed)
    overlaps: list[Overlap] = []
    if seed % 3:
        near = tuple(draw.randrange(len(costs)) for costs in problem.costs)
        overlaps = [Overlap(near, len(near) - 1, draw.randrange(2))]
    choices = every_choice(problem, overlaps)
    solution = solve(problem, overlaps)
    if not choices:
        assert solution is None
        return
    assert solution is not None
    assert solution.choice in choices
    assert solution.bytes == value(problem.bytes, solution.choice) <= problem.budget
    best = min(value(problem.costs, choice) for choice in choices)
    assert solution.cost == pytest.approx(best, rel=2e-4)


@pytest.mark.parametrize("seed", range(12))
def test_the_smallest_choice_is_the_smallest(seed: int) -> None:
    problem = instance(seed)
    least = smallest(problem)
    every = every_choice(replace(problem, budget=10**9), [])
    assert least == min(value(problem.bytes, choice) for choice in every)
    found = solve(replace(problem, budget=least))
    assert found is not None
    assert found.bytes == least
    assert solve(replace(problem, budget=least - 1)) is None


def test_diverse_solutions_share_at_most_the_promised_groups() -> None:
    draw = np.random.default_rng(0)
    problem = Knapsack(
        costs=[draw.random(4) for _ in range(10)],
        bytes=[draw.integers(0, 1000, size=4).astype(float) for _ in range(10)],
        budget=4000,
    )
    found = diverse(problem, 5, share=0.7)
    assert len(found) == 5
    assert [s.cost for s in found] == sorted(s.cost for s in found)
    for one, two in itertools.combinations(found, 2):
        assert sum(a == b for a, b in zip(one.choice, two.choice, strict=True)) <= 7
    assert all(s.bytes <= problem.budget for s in found)
