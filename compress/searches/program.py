"""The integer program behind the knapsack, solved on few of its options and proven for all."""

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

Floats = NDArray[np.float64]
# Options per group, on average, of the first attempt: on 200 groups of 80 it proves itself enough.
CORE = 8


@dataclass(frozen=True)
class Program:
    """Exactly one option of every group at least cost, with ``low <= matrix @ taken <= high``.

    Options are a flat list; group ``g`` is ``offsets[g]`` up to ``offsets[g + 1]``.
    """

    costs: Floats
    offsets: NDArray[np.int64]
    matrix: csr_array
    low: Floats
    high: Floats

    @property
    def groups(self) -> csr_array:
        """A row per group, which counts its options that are taken."""
        total, count = len(self.costs), len(self.offsets) - 1
        return csr_array((np.ones(total), np.arange(total), self.offsets), shape=(count, total))

    @property
    def unit(self) -> float:
        """What the solver counts costs in, as its tolerances are absolute: a common difference."""
        differences = above_least(self.costs, self.offsets)
        common = differences[differences > 0]
        return float(np.median(common)) if len(common) else 1.0


@dataclass(frozen=True)
class Answer:
    """The option of every group, their cost, and a bound that no choice costs less than."""

    choice: tuple[int, ...]
    cost: float
    bound: float


def optimum(program: Program, relative_gap: float) -> Answer | None:
    """The best choice, to a relative gap and the solver's tolerance; None if there is none.

    Options that cost much more than their group's best at the prices of the linear relaxation are
    left out; if that is not proven to lose nothing, all are tried that a better choice may take.
    """
    few = CORE * (len(program.offsets) - 1)
    prices = relaxation_prices(program) if len(program.costs) > few else None
    if prices is None:
        return solved(program, relative_gap)
    floor, excess = priced(program, prices)
    first = float(np.partition(excess, few)[few])
    found = solved_within(program, floor, excess, first, relative_gap)
    if found and found.cost - found.bound <= relative_gap * abs(found.cost):
        return found
    # A choice with an option of more excess than this costs more than the one that was found.
    enough = found.cost - floor if found else np.inf
    if enough <= first:
        return found
    return solved_within(program, floor, excess, enough, relative_gap)


def relaxation_prices(program: Program) -> Floats | None:
    """What a unit of every row is worth where options may be taken in part; None if unsolved."""
    even = program.low == program.high
    upper, lower = (~even & np.isfinite(side) for side in (program.high, program.low))
    result = linprog(
        program.costs / program.unit,
        A_ub=vstack([program.matrix[upper], -program.matrix[lower]]),
        b_ub=np.concatenate([program.high[upper], -program.low[lower]]),
        A_eq=vstack([program.matrix[even], program.groups]),
        b_eq=np.concatenate([program.low[even], np.ones(len(program.offsets) - 1)]),
        method="highs-ds",
    )
    if result.status != 0:
        return None
    prices = np.zeros(len(program.low))
    above, below = np.split(result.ineqlin.marginals, [int(upper.sum())])
    # A price of the wrong sign, by the solver's tolerance, would be multiplied with infinity.
    prices[upper] += np.minimum(above, 0)
    prices[lower] -= np.minimum(below, 0)
    prices[even] = result.eqlin.marginals[: int(even.sum())]
    return prices * program.unit


def priced(program: Program, prices: Floats) -> tuple[float, Floats]:
    """A floor under every choice's cost, and every option's excess over it.

    Whatever the prices (positive ones with a finite ``low``, negative ones with a finite ``high``),
    a choice costs at least floor + excess of each option it takes. For one with ``rows = matrix @
    taken``: cost = (costs - matrix.T @ prices) @ taken + prices @ rows; the last term is least at
    an end of the rows, the first at the least of each group, and the excess is what an option is
    above that.
    """
    used = prices != 0
    ends = np.where(prices > 0, program.low, program.high)
    reduced = program.costs - program.matrix.T @ prices
    least = np.minimum.reduceat(reduced, program.offsets[:-1])
    floor = float(least.sum() + ends[used] @ prices[used])
    return floor, above_least(reduced, program.offsets)


def above_least(costs: Floats, offsets: NDArray[np.int64]) -> Floats:
    """What every option costs above the least of its group."""
    least = np.minimum.reduceat(costs, offsets[:-1])
    found: Floats = costs - np.repeat(least, np.diff(offsets))
    return found


def solved_within(
    program: Program, floor: float, excess: Floats, most: float, relative_gap: float
) -> Answer | None:
    """The best choice of options of at most so much excess; its bound holds for all options."""
    columns = np.flatnonzero(excess <= most)
    offsets = np.searchsorted(columns, program.offsets)
    matrix = program.matrix[:, columns]
    part = replace(program, costs=program.costs[columns], offsets=offsets, matrix=matrix)
    found = solved(part, relative_gap)
    if found is None:
        return None
    picked = columns[offsets[:-1] + np.array(found.choice)] - program.offsets[:-1]
    others = floor + float(excess[excess > most].min(initial=np.inf))
    return Answer(tuple(map(int, picked)), found.cost, min(found.bound, others))


def solved(program: Program, relative_gap: float) -> Answer | None:
    """The solver's answer on all options; it may exceed a bound by the solver's tolerance."""
    with silent_stdout():
        result = milp(
            program.costs / program.unit,
            integrality=np.ones(len(program.costs), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(program.groups, 1, 1),
                LinearConstraint(program.matrix, program.low, program.high),
            ],
            options={"mip_rel_gap": relative_gap},
        )
    if result.x is None:
        return None
    pairs = itertools.pairwise(program.offsets)
    picked = np.array([a + np.argmax(result.x[a:b]) for a, b in pairs])
    choice = tuple(map(int, picked - program.offsets[:-1]))
    bound = float(result.mip_dual_bound) * program.unit
    return Answer(choice, float(program.costs[picked].sum()), bound)


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
