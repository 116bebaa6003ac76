"""The next candidate of a study: seeds first, then short steps from the incumbent.

A step is the knapsack again, around the incumbent and priced there (``prices``), with what was
measured already left out. It is kept short: what promises most is overrated most, and the more so
the more of it is changed at once. Every other step keeps the incumbent's formats and changes cuts
alone: what cuts and what rounding costs is not known equally well, and trading one for the other
promises too much. Where a space has global choices (KV format, hidden size, global widths), TPE is
asked for others now and then.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from compress.formats.table import used_in
from compress.searches.knapsack import Limit, Overlap, solve
from compress.searches.prices import Pricing, apart
from compress.searches.problem import Choice, Globals, Problem
from compress.searches.proposals import (
    Proposal,
    as_proposal,
    decode,
    decode_trial,
    distributions,
    globals_of,
    identity,
    incumbent,
)

# Groups that a step may change, in turn; more where that leaves nothing new.
RADII = (2, 3, 4)
# How far under its expected cost an option is taken to be, in deviations: a step of four has one of
# its sum then, and what nobody has tried is tried.
HOPE = 0.5
# Every so many trials one is of other global choices; steps find more.
SAMPLE_EVERY = 8


def propose(
    pricing: Pricing,
    first: Sequence[Proposal],
    done: Sequence[FrozenTrial],
    running: Sequence[FrozenTrial],
    seed: int,
) -> Proposal | None:
    """The next proposal, a function of its arguments alone; None if nothing new is found."""
    problem, trials = pricing.problem, (*done, *running)
    known = {identity(problem, decode_trial(problem, trial)) for trial in trials}

    def new(proposal: Proposal) -> bool:
        return identity(problem, proposal) not in known

    for seeded in first:
        if new(seeded):
            return seeded
    best, number = incumbent(done), len(trials)
    if distributions(problem) and (best is None or number % SAMPLE_EVERY == 0):
        globals_ = sampled(problem, trials, seed * 100003 + number, len(first))
        proposal = decode(problem, globals_)
        if proposal is not None and new(proposal):
            return proposal
    return None if best is None else stepped(pricing, done, running, best, new)


def stepped(
    pricing: Pricing,
    done: Sequence[FrozenTrial],
    running: Sequence[FrozenTrial],
    best: FrozenTrial,
    new: Callable[[Proposal], bool],
) -> Proposal | None:
    """A new proposal a few groups from the best trial; None if its global choice has no other."""
    problem, here = pricing.problem, decode_trial(pricing.problem, best)
    # With what the incumbent takes, should that not be offered any more.
    offered = problem.groups(here.globals_, here.options)
    groups = [[*dict.fromkeys([*options, own(options, here)])] for options in offered]
    start = place(groups, here)
    assert start is not None
    known, seen, values = [], {}, best.user_attrs["values"]
    for trial in (*done, *running):
        choice = place(groups, decode_trial(problem, trial))
        if choice is None or choice == start or trial.params != best.params:
            continue
        known.append(choice)
        # Of one that is running there are none yet.
        if measured := trial.user_attrs.get("values"):
            seen[choice] = float(np.mean(measured) - np.mean(values[: len(measured)]))
    pricing.prepare(done)
    mean, deviation = pricing.around(groups, start, seen)
    knapsack = problem.knapsack(groups, here.globals_, priced=False)
    hoped = np.split(mean - HOPE * deviation, knapsack.offsets[1:-1].tolist())
    knapsack = replace(knapsack, costs=hoped)
    number, count = len(done) + len(running), len(groups)
    radii = range(RADII[number % len(RADII)], count + 1)
    tries = [(radius, knapsack) for radius in radii]
    if number % 2 and problem.space.prunes and len(problem.space.formats) > 1:
        kept = replace(knapsack, limits=[*knapsack.limits, formats_kept(groups, here)])
        tries = [(radii[0], kept), *tries]
    for radius, rules in tries:
        near = Overlap(start, count - 1, count - radius)
        others = [Overlap(choice, count - 1) for choice in known if apart(choice, start) <= radius]
        if (solution := solve(rules, [near, *others])) is None:
            continue
        proposal = as_proposal(problem, groups, solution, here.globals_)
        if new(proposal):
            # The knapsack's cost was a change; its gap is said of the predicted KL, as others are.
            gap = solution.gap * abs(solution.cost) / max(proposal.predicted, 1e-30)
            return replace(proposal, gap=gap)
    return None


def place(groups: Sequence[Sequence[Choice]], proposal: Proposal) -> tuple[int, ...] | None:
    """The index in every group of what a proposal takes; None where that is not offered."""
    if any(own(options, proposal) not in options for options in groups):
        return None
    return tuple(options.index(own(options, proposal)) for options in groups)


def own(options: Sequence[Choice], proposal: Proposal) -> Choice:
    """What a proposal does with the blocks of a group."""
    return tuple((number, proposal.options[number]) for number, _ in options[0])


def formats_kept(groups: Sequence[Sequence[Choice]], here: Proposal) -> Limit:
    """No block that stays may change its formats; one that comes back takes some in use."""
    used = {f for o in here.options if not o.removed for f in used_in(o.formats)}

    def changes(choice: Choice) -> bool:
        pairs = [(here.options[number], option) for number, option in choice]
        return any(
            not after.removed
            and (
                not used_in(after.formats) <= used
                if before.removed
                else after.formats != before.formats
            )
            for before, after in pairs
        )

    return Limit([np.array([float(changes(c)) for c in options]) for options in groups], 0)


def sampled(problem: Problem, trials: Sequence[FrozenTrial], seed: int, startup: int) -> Globals:
    """The global choice that TPE asks for after these trials."""
    # In memory: the trial of the run's study gets what this decodes to, and by steps as well.
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    study = optuna.create_study(sampler=sampler)
    study.add_trials(trials)
    return globals_of(problem, study.ask(dict(distributions(problem))).params)
