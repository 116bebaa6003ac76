"""The inner problem: one option per group at least predicted KL within every bound, exactly."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from compress.searches.program import Floats, Program, optimum

# HiGHS stops when the bound is this close; the gap of a solution is reported with it.
RELATIVE_GAP = 1e-4
DIVERSE_GAP = 0.02
# HiGHS lets a row exceed its bound by this much of the row's scale.
TOLERANCE = 1e-6
# What the widest span of a group is for HiGHS: at 1, a choice that just keeps its bounds is lost
# to the tolerance of the solver's cuts now and then, and what it claims to be proven is false.
SPAN = 1000.0


@dataclass(frozen=True)
class Limit:
    """A resource: what every option of every group takes of it, whole numbers, and the bound."""

    amounts: Sequence[Floats]
    bound: int

    @property
    def beyond(self) -> Floats:
        """What options take beyond the least of their group."""
        return np.concatenate([options - options.min() for options in self.amounts])

    @property
    def step(self) -> int:
        """The largest number that all differences within groups are whole multiples of."""
        return max(1, int(np.gcd.reduce(self.beyond.astype(np.int64))))

    @property
    def span(self) -> float:
        """The widest of a group, which the solver's tolerance is relative to."""
        return max(1.0, *(float(np.ptp(options)) for options in self.amounts))


@dataclass(frozen=True)
class Knapsack:
    """Groups of options with predicted KL and bytes, of which ``room`` are left to them.

    ``at_least_one`` holds sets of (group, option) pairs of which one at least must be taken (an
    attention block has to survive). ``limits`` bind besides the bytes.
    """

    costs: Sequence[Floats]
    bytes: Sequence[Floats]
    room: int
    at_least_one: Sequence[Sequence[tuple[int, int]]] = field(default=())
    limits: Sequence[Limit] = field(default=())

    @property
    def possible(self) -> bool:
        """Whether there is an option for every group."""
        return all(map(len, self.costs))

    @property
    def resources(self) -> list[Limit]:
        """Everything that is bounded, bytes first."""
        return [Limit(self.bytes, self.room), *self.limits]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Index of every group's first option in the flat list, and its end."""
        return np.cumsum([0, *(len(costs) for costs in self.costs)])


@dataclass(frozen=True)
class Solution:
    """Chosen option per group, its predicted KL, bytes, and relative optimality gap.

    The gap is (cost - proven lower bound) / cost: no choice is better by a larger share.
    """

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


def solve(
    problem: Knapsack, overlaps: Sequence[Overlap] = (), relative_gap: float = RELATIVE_GAP
) -> Solution | None:
    """The best choice within every bound, or None if there is none.

    Groups are Puzzle's (Bercovich et al. 2024, the MIP over blocks): sum of costs is minimal, one
    option each, resources within their bounds to the unit; ``overlaps`` keep it near or away from
    other choices.
    """
    if not problem.possible:
        return None
    if (first := optimum(as_program(problem, overlaps), relative_gap)) is None:
        return None
    if (choice := within_bounds(problem, first.choice, overlaps, relative_gap)) is None:
        return None
    cost = value(problem.costs, choice)
    # Sums of this many costs are not exact to more than this.
    rounding = 1e-12 * sum(float(np.abs(options).max()) for options in problem.costs)
    excess = cost - first.bound if cost - first.bound > rounding else 0.0
    gap = excess / max(abs(cost), 1e-30)
    return Solution(choice, cost, int(value(problem.bytes, choice)), gap)


def within_bounds(
    problem: Knapsack, choice: tuple[int, ...], overlaps: Sequence[Overlap], relative_gap: float
) -> tuple[int, ...] | None:
    """The solver's choice, or where that exceeds a bound by its tolerance the better way back.

    That is a single change, or the best within bounds tighter by the tolerance.
    """
    if max(excesses(problem, choice)) <= 0:
        return choice
    again = optimum(as_program(tightened(problem), overlaps), relative_gap)
    found = [again.choice] if again else []
    if (changed := mended(problem, choice, overlaps)) is not None:
        found.append(changed)
    return min(found, key=lambda other: value(problem.costs, other), default=None)


def as_program(problem: Knapsack, overlaps: Sequence[Overlap]) -> Program:
    """The knapsack as rows over all options of all groups."""
    offsets = problem.offsets
    total = int(offsets[-1])
    rows: list[tuple[Sequence[int], Sequence[float], float, float]] = []
    for limit in problem.resources:
        amounts, bound = in_steps(limit)
        rows.append((range(total), list(amounts), -np.inf, bound))
    for pairs in problem.at_least_one:
        rows.append(([int(offsets[g]) + o for g, o in pairs], [1.0] * len(pairs), 1.0, np.inf))
    for near in overlaps:
        columns = [int(offsets[g]) + o for g, o in enumerate(near.choice)]
        rows.append((columns, [1.0] * len(columns), near.least, near.most))
    indices, values, low, high = zip(*rows, strict=True)
    starts = np.cumsum([0, *(len(row) for row in indices)])
    cells = (np.concatenate(values), np.concatenate(indices).astype(int), starts)
    matrix = csr_array(cells, shape=(len(rows), total))
    return Program(np.concatenate(problem.costs), offsets, matrix, np.array(low), np.array(high))


def in_steps(limit: Limit) -> tuple[Floats, float]:
    """What options take beyond the least of their group, and the room for it, for the solver.

    One option each is taken anyhow. Half a step more room lets no other choice in, and keeps those
    that fill it away from the solver's tolerance.
    """
    step, least = limit.step, sum(int(options.min()) for options in limit.amounts)
    unit = max(1.0, limit.span / step / SPAN)
    amounts: Floats = limit.beyond / step / unit
    return amounts, ((limit.bound - least) // step + 0.5) / unit


def tightened(problem: Knapsack) -> Knapsack:
    """The problem with bounds that the solver's tolerance cannot carry over the true ones."""
    first, *others = (
        replace(limit, bound=limit.bound - math.ceil(TOLERANCE * limit.span) - limit.step)
        for limit in problem.resources
    )
    return replace(problem, room=first.bound, limits=others)


def value(values: Sequence[Floats], choice: Sequence[int]) -> float:
    """Sum of the chosen options' values."""
    return float(sum(options[picked] for options, picked in zip(values, choice, strict=True)))


def allowed(problem: Knapsack, choice: Sequence[int], overlaps: Sequence[Overlap] = ()) -> bool:
    """Whether a choice keeps every rule but the bounds."""
    taken = set(enumerate(choice))
    return all(taken & set(pairs) for pairs in problem.at_least_one) and all(
        near.least <= len(taken & set(enumerate(near.choice))) <= near.most for near in overlaps
    )


def excesses(problem: Knapsack, choice: Sequence[int]) -> list[float]:
    """How far a choice exceeds every bound, bytes first; negative where there is room."""
    return [value(limit.amounts, choice) - limit.bound for limit in problem.resources]


def mended(
    problem: Knapsack, choice: tuple[int, ...], overlaps: Sequence[Overlap]
) -> tuple[int, ...] | None:
    """The choice with one group's option changed to keep every bound to the unit, at least cost."""
    over = excesses(problem, choice)
    best: tuple[float, tuple[int, ...]] | None = None
    for group, picked in enumerate(choice):
        enough = np.ones(len(problem.costs[group]), dtype=bool)
        for limit, excess in zip(problem.resources, over, strict=True):
            enough &= limit.amounts[group][picked] - limit.amounts[group] >= excess
        for option in np.flatnonzero(enough):
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
        overlaps = [Overlap(other.choice, most) for other in found]
        # Overlaps make the problem hard, and the last percent of another solution buys nothing.
        solution = solve(problem, overlaps, DIVERSE_GAP if found else RELATIVE_GAP)
        if solution is None or any(solution.choice == other.choice for other in found):
            break
        found.append(solution)
    return found


def smallest(problem: Knapsack) -> int:
    """The fewest bytes that any choice takes, exactly; other limits aside."""
    least = [int(np.argmin(options)) for options in problem.bytes]
    # One pair of every set is forced; the other groups stay at their least.
    forced = (dict(pairs) for pairs in itertools.product(*problem.at_least_one))
    choices = ([pairs.get(g, o) for g, o in enumerate(least)] for pairs in forced)
    found = (choice for choice in choices if allowed(problem, choice))
    return int(min(value(problem.bytes, choice) for choice in found))
