"""Steps from the incumbent: the knapsack again, priced where the incumbent stands.

Costs at the teacher add up poorly once a third of it is gone: what a block is worth depends on what
is left around it. So every option of every block is priced by a tangent at a recent incumbent and
by the teacher's scores, and what was measured since corrects both (``belief``).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from compress.candidate import Candidate
from compress.scores import Scores, change, whole
from compress.searches.belief import Belief, belief, flat
from compress.searches.knapsack import Overlap, solve
from compress.searches.problem import Choice, Problem
from compress.searches.program import Floats
from compress.searches.proposals import Proposal, as_proposal, globals_of, named
from compress.space import Option
from compress.tangent import Tangent

Linearize = Callable[[Candidate], Tangent]

# The share of the Gauss-Newton curvature that predicts finite changes best: drawn labels overrate
# large steps. And that of the tangent against the teacher's scores: slopes of units that are gone
# promise too much. Both measured on SmolLM2 at 50 % of its blocks (runs/README.md).
CURVATURE, TANGENT = 0.55, 0.5
# How far off a cost may be, as a share of the sizes it is the sum of; and at least, in nats.
DOUBT, LEAST_DOUBT = 0.4, 0.002
# A measured step differs from the sum of its options by about so much, and so much per option.
NOISE, NOISE_PER_CHANGE, NOISE_STOPPED = 0.008, 0.01, 0.015
# Groups that a step may change; and how far the incumbent may be from its tangent's.
RADII = (3, 4, 5, 6, 8)
STALE_CHANGES, STALE_FAILURES = 8, 6
# Draws of the belief per step; the one that promises most is measured.
DRAWS = 4


@dataclass(frozen=True)
class Prices:
    """Costs of all options against the anchor's, [options], and how far off each may be."""

    cost: Floats
    doubt: Floats

    def doubted(self, factor: float) -> "Prices":
        """The same with more doubt."""
        return replace(self, doubt=self.doubt * factor)


def anchor_of(done: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The trial where the tangent is to be taken, a function of the finished trials alone."""
    best: FrozenTrial | None = None
    anchor: FrozenTrial | None = None
    failures = 0
    for trial in done:
        if complete(trial) and (best is None or kl_of(trial) < kl_of(best)):
            best, failures = trial, 0
        else:
            failures += 1
        if best is not None and (
            anchor is None
            or apart(best, anchor) >= STALE_CHANGES
            or (failures >= STALE_FAILURES and best is not anchor)
        ):
            anchor = best
    return anchor


def complete(trial: FrozenTrial) -> bool:
    """Whether a trial was measured on all sequences."""
    return trial.state == TrialState.COMPLETE


def kl_of(trial: FrozenTrial) -> float:
    """Mean KL over the sequences that were measured, nats per token."""
    return float(np.mean(trial.user_attrs["values"]))


def apart(one: FrozenTrial, other: FrozenTrial) -> float:
    """Groups in which two trials differ; infinite where their global choices do."""
    if outer(one) != outer(other):
        return np.inf
    pairs = zip(one.user_attrs["choice"], other.user_attrs["choice"], strict=True)
    return float(sum(a != b for a, b in pairs))


def outer(trial: FrozenTrial) -> dict[str, Any]:
    """The global choices of a trial that decide what its groups are."""
    return {key: value for key, value in trial.params.items() if not key.startswith("log_")}


def stepped(
    problem: Problem,
    done: Sequence[FrozenTrial],
    best: FrozenTrial,
    prices: Prices,
    random: np.random.Generator,
) -> Proposal | None:
    """A few changes to the best trial: the most promising of some draws of the belief."""
    chosen = globals_of(problem, best.params)
    groups = problem.groups(chosen)
    knapsack = problem.knapsack(groups, replace(chosen, multipliers={}), priced=False)
    incumbent, offsets = tuple(best.user_attrs["choice"]), knapsack.offsets
    known = belief_of(prices, done, best, offsets.tolist())
    expected = known.mean
    found: dict[tuple[int, ...], tuple[float, Any]] = {}
    for _ in range(DRAWS):
        costs = known.draw(random)
        near = Overlap(incumbent, len(groups) - 1, len(groups) - int(random.choice(RADII)))
        solution = solve(replace(knapsack, costs=np.split(costs, offsets[1:-1].tolist())), [near])
        if solution is not None:
            promised = expected[offsets[:-1] + np.array(solution.choice)].sum()
            found[solution.choice] = (float(promised), solution)
    if not found:
        return None
    _, solution = min(found.values(), key=lambda pair: pair[0])
    proposal = as_proposal(problem, groups, solution, chosen)
    # The knapsack's cost was a change; its gap is said of the whole predicted KL, as others are.
    gap = solution.gap * abs(solution.cost) / max(proposal.predicted, 1e-30)
    return replace(proposal, gap=gap)


def belief_of(
    prices: Prices, done: Sequence[FrozenTrial], best: FrozenTrial, offsets: Sequence[int]
) -> Belief:
    """The prices, corrected by every trial of the same global choices."""
    size = offsets[-1]
    reference = best.user_attrs["values"]
    here = flat(best.user_attrs["choice"], offsets[:-1], size)
    moves, seen, noise = [], [], []
    for trial in done:
        if trial is best or outer(trial) != outer(best):
            continue
        move = flat(trial.user_attrs["choice"], offsets[:-1], size) - here
        values = trial.user_attrs["values"]
        stopped = not complete(trial)
        moves.append(move)
        seen.append(float(np.mean(values) - np.mean(reference[: len(values)])))
        changes = float(np.abs(move).sum() / 2)
        noise.append(NOISE + NOISE_PER_CHANGE * changes + NOISE_STOPPED * stopped)
    return belief(
        prices.cost, prices.doubt, np.array(moves).reshape(len(moves), size), np.array(seen),
        np.array(noise),
    )  # fmt: skip


def prices_at(problem: Problem, anchor: FrozenTrial, linearize: Linearize | None) -> Prices:
    """Prices of all options of the anchor's groups: the scores and, if there is one, a tangent."""
    chosen = globals_of(problem, anchor.params)
    groups = problem.groups(chosen)
    picked = [o[i] for o, i in zip(groups, anchor.user_attrs["choice"], strict=True)]
    scored = problem.knapsack(groups, chosen)
    teacher = np.concatenate(
        [
            costs - costs[i]
            for costs, i in zip(scored.costs, anchor.user_attrs["choice"], strict=True)
        ]
    )
    if linearize is None:
        return Prices(teacher, LEAST_DOUBT + DOUBT * np.abs(teacher))
    proposal = Proposal(groups=groups, choice=tuple(anchor.user_attrs["choice"]), chosen=chosen,
                        predicted=anchor.user_attrs["predicted"], gap=0.0)  # fmt: skip
    point = linearize(named(problem, "anchor", anchor.number, proposal))
    taken = dict(pair for choice in picked for pair in choice)
    parts = [step(problem, point, taken, choice) for options in groups for choice in options]
    slope, curvature = np.array(parts).T
    cost = TANGENT * (slope + CURVATURE * curvature) + (1 - TANGENT) * teacher
    doubt = DOUBT * (np.abs(slope) + np.abs(teacher)) / 2
    return Prices(cost, LEAST_DOUBT + doubt)


def step(
    problem: Problem, point: Tangent, taken: dict[int, Option], choice: Choice
) -> tuple[float, float]:
    """First and second-order change of the KL, nats per token, from what blocks do to a choice."""
    first, second = 0.0, 0.0
    for number, option in choice:
        if option == taken[number]:
            continue
        slope, curvature = (
            option_rows(problem, rows, number, option)
            - option_rows(problem, rows, number, taken[number])
            for rows in (
                Scores(point.slope, {}, 0.0, point.length),
                Scores(point.curvature, {}, 0.0, point.length),
            )
        )
        first += float(slope.mean()) / point.length
        second += float(curvature.square().mean()) / (2 * point.length)
    return first, second


def option_rows(problem: Problem, scores: Scores, number: int, option: Option) -> Tensor:
    """Summed contributions [rows] of a block's option, against the whole block in BF16.

    Of a repaired option as much as its repair leaves of the block's error.
    """
    block = problem.teacher.blocks[number]
    if option.removed:
        return -whole(scores, block)
    rows = change(scores, block, problem.keep_of(number, option), option.format)
    return rows * math.sqrt(problem.left(number, option))
