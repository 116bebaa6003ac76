"""Steps from the incumbent: the knapsack again, priced where the incumbent stands.

Prices (``prices``) are corrected by what was measured since (``belief``), and a step is kept short:
what promises most is overrated most, and the more so the more of it is changed at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from optuna.trial import FrozenTrial

from compress.searches.belief import Belief, belief, flat, improvement
from compress.searches.knapsack import Limit, Overlap, solve
from compress.searches.prices import Prices, apart, complete, of_trial
from compress.searches.problem import Choice, Problem
from compress.searches.program import Floats
from compress.searches.proposals import Proposal, as_proposal
from compress.searches.space import Option

# A measured step differs from the sum of its options by about so much, and so much per option; more
# where it was stopped early.
NOISE, NOISE_PER_CHANGE, NOISE_STOPPED = 0.008, 0.01, 0.02
# A trial that differs in more than this share of the groups says nothing of the costs here: slopes
# do not reach so far, and what they miss would be taken for what options of a kind have in common.
REACH = 1 / 2
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
    keeping: bool = False,
) -> Proposal | None:
    """A new proposal a few changes from the best trial: the one of largest expected improvement.

    Candidates are solutions to the prices and to draws of the belief, within several radii. With
    ``keeping`` they keep the formats, where that leaves anything new. None if 20 rounds of them
    find nothing new.
    """
    chosen, groups, incumbent = of_trial(problem, best)
    knapsack = problem.knapsack(groups, replace(chosen, multipliers={}), priced=False)
    kept = replace(knapsack, limits=[*knapsack.limits, formats_kept(groups, incumbent)])
    offsets = knapsack.offsets
    random = np.random.default_rng(seed)
    for attempt in range(RETRIES):
        doubt = prices.doubt * (1 + attempt / 4)
        known = belief_of(replace(prices, doubt=doubt), done, best, offsets.tolist())
        expected = known.mean
        here = flat(incumbent, offsets[:-1].tolist(), len(expected))
        found: dict[tuple[int, ...], tuple[float, float, Proposal]] = {}
        for number in range(SOLUTIONS):
            # Small problems run out of neighbours: look further each time.
            radius = RADII[number % len(RADII)] + attempt
            costs = expected if number < len(RADII) and not attempt else known.draw(random)
            near = Overlap(incumbent, len(groups) - 1, max(0, len(groups) - radius))
            rules = kept if keeping and not attempt else knapsack
            priced = replace(rules, costs=np.split(costs, offsets[1:-1].tolist()))
            solution = solve(priced, [near])
            if solution is None or solution.choice in found:
                continue
            proposal = as_proposal(problem, groups, solution, chosen)
            # The knapsack's cost was a change; its gap is said of the predicted KL, as others are.
            gap = solution.gap * abs(solution.cost) / max(proposal.predicted, 1e-30)
            move = flat(solution.choice, offsets[:-1].tolist(), len(expected)) - here
            mean = float(move @ expected)
            promise = improvement(mean, known.deviation_of(move))
            found[solution.choice] = (promise, mean, replace(proposal, gap=gap))
        fresh = [promise for promise in found.values() if new(promise[2])]
        if fresh:
            return max(fresh, key=lambda promise: (promise[0], -promise[1]))[2]
    return None


def formats_kept(groups: Sequence[Sequence[Choice]], incumbent: Sequence[int]) -> Limit:
    """No block that stays may change its format; one that comes back takes one that is in use."""
    used = {option.format for _, option in stays(groups, incumbent)}
    amounts = []
    for options, picked in zip(groups, incumbent, strict=True):
        now = dict(options[picked])
        changed = [
            any(
                not option.removed
                and option.format not in (used if now[number].removed else {now[number].format})
                for number, option in choice
            )
            for choice in options
        ]
        amounts.append(np.array(changed, dtype=np.float64))
    return Limit(amounts, 0)


def stays(
    groups: Sequence[Sequence[Choice]], choice: Sequence[int]
) -> Iterator[tuple[int, Option]]:
    """The blocks that a choice does not remove, with their options."""
    for options, picked in zip(groups, choice, strict=True):
        yield from ((number, option) for number, option in options[picked] if not option.removed)


def noise_of(move: Floats) -> float:
    """How far a step is from the sum of its options, nats per token."""
    return NOISE + NOISE_PER_CHANGE * float(np.abs(move).sum() / 2)


def belief_of(
    prices: Prices, done: Sequence[FrozenTrial], best: FrozenTrial, offsets: Sequence[int]
) -> Belief:
    """The prices, corrected by every trial within reach, of the same global choices."""
    size = offsets[-1]
    reference = best.user_attrs["values"]
    here = flat(best.user_attrs["choice"], offsets[:-1], size)
    moves, seen, noise = [], [], []
    for trial in done:
        if trial is best or apart(trial, best) > REACH * (len(offsets) - 1):
            continue
        move = flat(trial.user_attrs["choice"], offsets[:-1], size) - here
        values = trial.user_attrs["values"]
        stopped = not complete(trial)
        moves.append(move)
        seen.append(float(np.mean(values) - np.mean(reference[: len(values)])))
        noise.append(noise_of(move) + NOISE_STOPPED * stopped)
    return belief(
        prices.cost, prices.doubt, prices.common,
        np.array(moves).reshape(len(moves), size), np.array(seen), np.array(noise),
    )  # fmt: skip
