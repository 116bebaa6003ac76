"""Options left out of the integer program are those that no best choice takes."""

import random
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from knapsacks import check_best, every_choice, limited

from compress.searches import program as programs
from compress.searches.knapsack import (
    Knapsack,
    Limit,
    Overlap,
    as_program,
    excesses,
    solve,
    value,
)
from compress.searches.program import priced, relaxation_prices


def ruled(seed: int) -> tuple[Knapsack, list[Overlap]]:
    """Two bounds, survivors every other time, overlaps, and costs of either sign."""
    problem, draw = limited(seed), random.Random(seed)
    near = tuple(draw.randrange(len(costs)) for costs in problem.costs)
    shifted = [costs - costs[o] for costs, o in zip(problem.costs, near, strict=True)]
    away = tuple(draw.randrange(len(costs)) for costs in problem.costs)
    overlaps = [Overlap(near, len(near), draw.randrange(2)), Overlap(away, len(away) - 1)]
    return replace(problem, costs=shifted), overlaps


def grid(seed: int) -> Knapsack:
    """Blocks of few sizes, widths and formats; some choice fills both bounds to the unit."""
    draw = np.random.default_rng(seed)
    widths, formats = np.linspace(1, 0, 4), np.array([2, 1, 9 / 16])
    costs, taken, active = [], [], []
    for _ in range(6):
        size = draw.choice([20e6, 50e6, 80e6])
        cut = draw.lognormal(0, 1.5) * (1 - widths) ** 2
        rounding = draw.lognormal(-3, 1) * np.array([0, 0.1, 1])
        costs.append((cut[:, None] + rounding * widths[:, None]).ravel())
        taken.append(np.round(size * widths[:, None] * formats).ravel())
        active.append(np.round(np.repeat(size * widths, 3)))
    choice = tuple(int(o) for o in draw.integers(0, 12, 6))
    limits = [Limit(active, int(value(active, choice)))]
    return Knapsack(costs, taken, int(value(taken, choice)), limits=limits)


def least_cost(problem: Knapsack) -> float:
    """Cost of the best of all choices within the bounds, all of them counted."""

    def sums(values: list[np.ndarray]) -> np.ndarray:
        total = np.zeros(1)
        for options in values:
            total = np.add.outer(total, options).ravel()
        return total

    within = [sums(list(limit.amounts)) <= limit.bound for limit in problem.resources]
    return float(sums(list(problem.costs))[np.logical_and.reduce(within)].min())


@pytest.mark.parametrize("core", [1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_few_options_first_equal_brute_force(
    seed: int, core: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "CORE", core)
    check_best(*ruled(seed))


def test_some_of_the_instances_need_more_than_the_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "CORE", 1)
    counted = Mock(wraps=programs.solved_within)
    monkeypatch.setattr(programs, "solved_within", counted)
    found = set()
    for seed in range(40):
        counted.reset_mock()
        solve(*ruled(seed))
        found.add(counted.call_count)
    assert {1, 2} <= found


@pytest.mark.parametrize("seed", range(12))
def test_at_any_prices_a_choice_costs_the_floor_and_the_excess_of_its_options(seed: int) -> None:
    problem, overlaps = ruled(seed)
    program, draw = as_program(problem, overlaps), np.random.default_rng(seed)
    guessed = draw.normal(size=len(program.low))
    guessed[~np.isfinite(program.low)] = -np.abs(guessed[~np.isfinite(program.low)])
    guessed[~np.isfinite(program.high)] = np.abs(guessed[~np.isfinite(program.high)])
    solved = relaxation_prices(program)
    for prices in [guessed] if solved is None else [guessed, solved]:
        floor, excess = priced(program, prices)
        assert excess.min() >= 0
        for choice in every_choice(problem, overlaps):
            most = max(excess[program.offsets[g] + o] for g, o in enumerate(choice))
            assert floor + most <= value(problem.costs, choice) + 1e-9


@pytest.mark.parametrize("core", [1, 3, 8])
@pytest.mark.parametrize("seed", [10, 28, 63, 91, 115, 149])
def test_the_gap_is_true_where_a_choice_fills_its_bounds(
    seed: int, core: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "CORE", core)
    problem = grid(seed)
    solution = solve(problem)
    assert solution is not None
    assert solution.cost * (1 - solution.gap) <= least_cost(problem) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_price_that_nobody_pays_changes_nothing(seed: int) -> None:
    problem = limited(seed)
    solution = solve(problem)
    dear = [np.append(costs, 1e7) for costs in problem.costs]
    most = [np.append(options, options.max()) for options in problem.bytes]
    [limit] = problem.limits
    full = Limit([np.append(options, options.max()) for options in limit.amounts], limit.bound)
    other = solve(replace(problem, costs=dear, bytes=most, limits=[full]))
    assert (solution and solution.choice) == (other and other.choice)


def test_the_knapsack_of_a_large_model_is_proven_and_within_both_bounds() -> None:
    draw = np.random.default_rng(0)
    kept = np.sort(draw.random((200, 80)))
    costs = draw.lognormal(0, 1.5, (200, 1)) * (1 - kept) ** 2 * draw.lognormal(0, 0.2, kept.shape)
    taken = np.round(kept * 1e8 * draw.uniform(0.5, 2.0, (200, 1)))
    active = np.round(taken * draw.uniform(0.2, 0.6, kept.shape))
    half = [int((x.min(1).sum() + x.max(1).sum()) / 2) for x in (taken, active)]
    problem = Knapsack(list(costs), list(taken), half[0], limits=[Limit(list(active), half[1])])
    solution = solve(problem)
    assert solution is not None
    assert solution.gap <= 1e-4
    assert max(excesses(problem, solution.choice)) <= 0
