"""The inner problem: one option per group at least predicted KL under the byte budget, exactly."""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
# HiGHS stops when the bound is this close; the gap of a solution is reported with it.
RELATIVE_GAP = 1e-4


@dataclass(frozen=True)
class Knapsack:
    """Groups of options with predicted KL and bytes.

    ``at_least_one`` holds sets of (group, option) pairs of which one at least must be taken (an
    attention block has to survive).
    """

    costs: Sequence[Floats]
    bytes: Sequence[Floats]
    budget: int
    at_least_one: Sequence[Sequence[tuple[int, int]]] = field(default=())

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Index of every group's first option in the flat list, and its end."""
        return np.cumsum([0, *(len(costs) for costs in self.costs)])


@dataclass(frozen=True)
class Solution:
    """Chosen option per group, its predicted KL, bytes, and relative optimality gap."""

    choice: tuple[int, ...]
    cost: float
    bytes: int
    gap: float


@dataclass(frozen=True)
class Overlap:
    """A bound on how many groups a solution may share with an earlier choice."""

    choice: tuple[int, ...]
    most: int
    least: int = 0


def solve(problem: Knapsack, overlaps: Sequence[Overlap] = ()) -> Solution | None:
    """The best choice under the budget, or None if there is none.

    Groups are Puzzle's (Bercovich et al. 2024, the MIP over blocks): sum of costs is minimal, one
    option each, bytes within the budget; ``overlaps`` keep it near or away from other choices.
    """
    offsets = problem.offsets
    total = int(offsets[-1])
    weight = np.concatenate(problem.bytes)
    # Bytes in units of the largest option: HiGHS compares within 1e-6 of the row's scale.
    scale = max(float(weight.max()), 1.0)
    rows: list[tuple[Sequence[int], Sequence[float], float, float]] = [
        (range(int(a), int(b)), [1.0] * int(b - a), 1.0, 1.0)
        for a, b in itertools.pairwise(offsets)
    ]
    rows.append((range(total), list(weight / scale), -np.inf, problem.budget / scale))
    for pairs in problem.at_least_one:
        rows.append(([int(offsets[g]) + o for g, o in pairs], [1.0] * len(pairs), 1.0, np.inf))
    for near in overlaps:
        columns = [int(offsets[g]) + o for g, o in enumerate(near.choice)]
        rows.append((columns, [1.0] * len(columns), near.least, near.most))
    matrix = csr_array(
        (
            np.concatenate([np.asarray(values, float) for _, values, _, _ in rows]),
            np.concatenate([np.asarray(columns, int) for columns, _, _, _ in rows]),
            np.cumsum([0, *(len(columns) for columns, _, _, _ in rows)]),
        ),
        shape=(len(rows), total),
    )
    low, high = (np.array([row[i] for row in rows]) for i in (2, 3))
    costs = np.concatenate(problem.costs)
    with silent_stdout():
        result = milp(
            costs / max(float(np.abs(costs).max()), 1e-30),
            integrality=np.ones(total, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": RELATIVE_GAP},
        )
    if result.x is None:
        return None
    picked = [int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(offsets)]
    choice = repaired(problem, tuple(picked), overlaps)
    if choice is None:
        return None
    total = int(value(problem.bytes, choice))
    return Solution(choice, value(problem.costs, choice), total, result.mip_gap or 0.0)


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Without what compiled code prints: HiGHS in scipy 1.17 has a debugging line left in it."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def value(values: Sequence[Floats], choice: Sequence[int]) -> float:
    """Sum of the chosen options' values."""
    return float(sum(options[picked] for options, picked in zip(values, choice, strict=True)))


def allowed(problem: Knapsack, choice: Sequence[int], overlaps: Sequence[Overlap] = ()) -> bool:
    """Whether a choice keeps every rule but the budget."""
    taken = set(enumerate(choice))
    return all(taken & set(pairs) for pairs in problem.at_least_one) and all(
        near.least <= len(taken & set(enumerate(near.choice))) <= near.most for near in overlaps
    )


def repaired(
    problem: Knapsack, choice: tuple[int, ...], overlaps: Sequence[Overlap] = ()
) -> tuple[int, ...] | None:
    """The choice within the budget to the byte: the solver's tolerance may exceed it slightly.

    The group where saving the missing bytes costs least takes a smaller option.
    """
    excess = value(problem.bytes, choice) - problem.budget
    if excess <= 0:
        return choice
    best: tuple[float, tuple[int, ...]] | None = None
    for group, picked in enumerate(choice):
        saved = problem.bytes[group][picked] - problem.bytes[group]
        for option in np.flatnonzero(saved >= excess):
            other = (*choice[:group], int(option), *choice[group + 1 :])
            price = float(problem.costs[group][option] - problem.costs[group][picked])
            if (best is None or price < best[0]) and allowed(problem, other, overlaps):
                best = (price, other)
    return None if best is None else best[1]


def diverse(problem: Knapsack, count: int, share: float = 0.8) -> list[Solution]:
    """Up to ``count`` solutions, best first, by Puzzle's diversity cut.

    Each shares at most ``share`` of its groups with any earlier one.
    """
    found: list[Solution] = []
    most = int(share * len(problem.costs))
    while len(found) < count:
        solution = solve(problem, [Overlap(other.choice, most) for other in found])
        if solution is None or any(solution.choice == other.choice for other in found):
            break
        found.append(solution)
    return found


def smallest(problem: Knapsack) -> int:
    """The fewest bytes that any choice takes, exactly."""
    least = tuple(int(np.argmin(options)) for options in problem.bytes)
    if not allowed(problem, least):
        # One pair of every set is forced; the other groups stay at their least.
        forced = (dict(pairs) for pairs in itertools.product(*problem.at_least_one))
        choices = (tuple(pairs.get(g, o) for g, o in enumerate(least)) for pairs in forced)
        found = (choice for choice in choices if allowed(problem, choice))
        return int(min(value(problem.bytes, choice) for choice in found))
    return int(value(problem.bytes, least))
