"""Small knapsacks and brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from compress.searches.knapsack import (
    Knapsack,
    Limit,
    Overlap,
    Solution,
    solve,
    value,
)


def instance(seed: int) -> Knapsack:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, 5, size=draw.integers(3, 6))
    weights = [draw.integers(0, 10**6, size=n).astype(float) for n in sizes]
    low, high = sum(w.min() for w in weights), sum(w.max() for w in weights)
    survivors = [(0, int(sizes[0]) - 1), (1, 0)]
    return Knapsack(
        costs=[draw.random(n) for n in sizes],
        bytes=weights,
        room=int(low + draw.random() * 0.7 * (high - low)),
        at_least_one=[survivors] if seed % 2 else [],
    )


def limited(seed: int) -> Knapsack:
    """An instance with a second resource, which binds in another way than the bytes."""
    problem, draw = instance(seed), np.random.default_rng(1000 + seed)
    amounts = [draw.integers(0, 10**9, size=len(costs)).astype(float) for costs in problem.costs]
    low, high = sum(a.min() for a in amounts), sum(a.max() for a in amounts)
    bound = int(low + draw.random() * 0.6 * (high - low))
    return replace(problem, limits=[Limit(amounts, bound)])


def every_choice(problem: Knapsack, overlaps: list[Overlap]) -> list[tuple[int, ...]]:
    """All choices that keep every rule, from the rules' own words."""

    def keeps(choice: tuple[int, ...]) -> bool:
        shared = [sum(a == b for a, b in zip(choice, o.choice, strict=True)) for o in overlaps]
        return (
            value(problem.bytes, choice) <= problem.room
            and all(value(x.amounts, choice) <= x.bound for x in problem.limits)
            and all(any(choice[g] == o for g, o in pairs) for pairs in problem.at_least_one)
            and all(o.least <= n <= o.most for o, n in zip(overlaps, shared, strict=True))
        )

    return [c for c in itertools.product(*(range(len(x)) for x in problem.costs)) if keeps(c)]


def check_best(problem: Knapsack, overlaps: list[Overlap]) -> Solution | None:
    """Solve, and compare with brute force; the solution, None where nothing is allowed."""
    choices, solution = every_choice(problem, overlaps), solve(problem, overlaps)
    if not choices:
        assert solution is None
        return None
    assert solution is not None
    assert solution.choice in choices
    best = min(value(problem.costs, choice) for choice in choices)
    assert solution.cost == pytest.approx(best, rel=2e-4)
    assert solution.cost - solution.gap * abs(solution.cost) <= best + 1e-12
    return solution
