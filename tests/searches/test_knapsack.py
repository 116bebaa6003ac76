"""The inner problem: exact, within the budget to the byte, as diverse as promised."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from knapsacks import check_best, every_choice, instance, limited

from compress.searches.knapsack import (
    Knapsack,
    Limit,
    Overlap,
    diverse,
    excesses,
    smallest,
    solve,
    value,
)


@pytest.mark.parametrize("seed", range(24))
def test_the_knapsack_equals_brute_force(seed: int) -> None:
    problem, draw = instance(seed), random.Random(seed)
    overlaps: list[Overlap] = []
    if seed % 3:
        near = tuple(draw.randrange(len(costs)) for costs in problem.costs)
        overlaps = [Overlap(near, len(near) - 1, draw.randrange(2))]
    if solution := check_best(problem, overlaps):
        assert solution.bytes == value(problem.bytes, solution.choice) <= problem.room


@pytest.mark.parametrize("seed", range(24))
def test_two_bounds_equal_brute_force_and_the_gap_is_true(seed: int) -> None:
    problem = limited(seed)
    solution = check_best(problem, [])
    if solution is None:
        return
    assert max(excesses(problem, solution.choice)) <= 0
    # A second bound binds to the unit: what the choice takes is enough, one less is not for it.
    [limit] = problem.limits
    taken = int(value(limit.amounts, solution.choice))
    exact = solve(replace(problem, limits=[replace(limit, bound=taken)]))
    assert exact is not None
    assert exact.cost == pytest.approx(solution.cost, rel=2e-4)
    less = solve(replace(problem, limits=[replace(limit, bound=taken - 1)]))
    assert less is None or less.choice != solution.choice


def test_some_of_the_instances_are_bound_by_either_resource() -> None:
    bytes_alone = [solve(replace(limited(seed), limits=[])) for seed in range(24)]
    with_both = [solve(limited(seed)) for seed in range(24)]
    pairs = list(zip(bytes_alone, with_both, strict=True))
    assert any(a and b and a.choice != b.choice for a, b in pairs)
    assert any(a and b and a.choice == b.choice for a, b in pairs)
    assert any(a and b is None for a, b in pairs)


def test_what_the_solver_lets_over_a_bound_is_taken_back() -> None:
    # Units among options of 10^9: what differs by as little within a group is told apart.
    close = [np.array([1e9, 1e9 - 1])] * 2
    costs = [np.array([0.0, 1.0])] * 2
    exact = solve(Knapsack(costs, close, 2 * 10**9 - 2, limits=[Limit(close, 2 * 10**9 - 2)]))
    assert exact is not None
    assert exact.choice == (1, 1)
    # Beside a span of 10^9 an excess of ten is under the solver's tolerance; the large option goes
    # where one change is enough, and all changes are looked for where each bound wants another.
    spans = [np.array([1e9, 0.0]), np.array([5.0, 0.0]), np.array([5.0, 0.0])]
    costs = [np.array([0.0, 10.0]), np.array([0.0, 1.0]), np.array([0.0, 1.0])]
    for limits in ([], [Limit([spans[1], spans[0], spans[2]], 10**9)]):
        problem = Knapsack(costs, spans, 10**9, limits=limits)
        solution = solve(problem)
        assert solution is not None
        assert max(excesses(problem, solution.choice)) <= 0
        assert solution.cost * (1 - solution.gap) <= 2


@pytest.mark.parametrize("seed", range(12))
def test_the_smallest_choice_is_the_smallest(seed: int) -> None:
    problem = instance(seed)
    least = smallest(problem)
    every = every_choice(replace(problem, room=10**9), [])
    assert least == min(value(problem.bytes, choice) for choice in every)
    found = solve(replace(problem, room=least))
    assert found is not None
    assert found.bytes == least
    assert solve(replace(problem, room=least - 1)) is None


def test_diverse_solutions_share_at_most_the_promised_groups() -> None:
    draw = np.random.default_rng(0)
    problem = Knapsack(
        costs=[draw.random(4) for _ in range(10)],
        bytes=[draw.integers(0, 1000, size=4).astype(float) for _ in range(10)],
        room=4000,
    )
    found = diverse(problem, 5, share=0.7)
    assert len(found) == 5
    assert [s.cost for s in found] == sorted(s.cost for s in found)
    for one, two in itertools.combinations(found, 2):
        assert sum(a == b for a, b in zip(one.choice, two.choice, strict=True)) <= 7
    assert all(s.bytes <= problem.room for s in found)
