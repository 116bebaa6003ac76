"""Steps from the incumbent: the knapsack again, priced where the incumbent stands.

Prices (``prices``) are corrected by what was measured since (``belief``), and a step is kept short:
what promises most is overrated most, and the more so the more of it is changed at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from optuna.trial import FrozenTrial

from compress.searches.belief import Belief, belief, flat
from compress.searches.knapsack import Overlap, solve
from compress.searches.prices import Prices, complete, of_trial, outer
from compress.searches.problem import Problem
from compress.searches.proposals import Proposal, as_proposal

# A measured step differs from the sum of its options by about so much, and so much per option; more
# where it was stopped early.
NOISE, NOISE_PER_CHANGE, NOISE_STOPPED = 0.008, 0.01, 0.02
# Groups that a step may change.
RADII = (2, 3, 4)
# Solutions that a step is chosen from: at every radius with what costs are expected to be, then
# with draws of the belief.
SOLUTIONS = 9
# A step that finds nothing new is drawn again with more doubt and further away, so often.
RETRIES = 20


def stepped(
    problem: Problem,
    done: Sequence[FrozenTrial],
    best: FrozenTrial,
    prices: Prices,
    new: Callable[[Proposal], bool],
    seed: int,
) -> Proposal | None:
    """A new proposal a few changes from the best trial.

    Of solutions to the prices and to draws of the belief, every other step takes the one that
    promises most, the others any of them. None if 20 rounds of them find nothing new.
    """
    chosen, groups, incumbent = of_trial(problem, best)
    knapsack = problem.knapsack(groups, replace(chosen, multipliers={}), priced=False)
    offsets = knapsack.offsets
    random = np.random.default_rng(seed)
    for attempt in range(RETRIES):
        doubt = prices.doubt * (1 + attempt / 4)
        known = belief_of(replace(prices, doubt=doubt), done, best, offsets.tolist())
        expected = known.mean
        found: dict[tuple[int, ...], tuple[float, Proposal]] = {}
        for number in range(SOLUTIONS):
            # Small problems run out of neighbours: look further each time.
            radius = RADII[number % len(RADII)] + attempt
            costs = expected if number < len(RADII) and not attempt else known.draw(random)
            near = Overlap(incumbent, len(groups) - 1, max(0, len(groups) - radius))
            priced = replace(knapsack, costs=np.split(costs, offsets[1:-1].tolist()))
            solution = solve(priced, [near])
            if solution is None or solution.choice in found:
                continue
            proposal = as_proposal(problem, groups, solution, chosen)
            # The knapsack's cost was a change; its gap is said of the predicted KL, as others are.
            gap = solution.gap * abs(solution.cost) / max(proposal.predicted, 1e-30)
            promised = expected[offsets[:-1] + np.array(solution.choice)].sum()
            found[solution.choice] = (float(promised), replace(proposal, gap=gap))
        fresh = [(promised, p) for promised, p in found.values() if new(p)]
        if fresh:
            if seed % 2:
                return fresh[int(random.integers(len(fresh)))][1]
            return min(fresh, key=lambda pair: pair[0])[1]
    return None


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
        prices.cost, prices.doubt, prices.common,
        np.array(moves).reshape(len(moves), size), np.array(seen), np.array(noise),
    )  # fmt: skip
