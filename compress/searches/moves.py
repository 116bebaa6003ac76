"""The next candidate of a study: seeds first, then steps from the incumbent, now and then a sample.

A ``seed`` is one of the knapsack's diverse solutions, a ``sample`` what TPE asks for (KV format,
hidden size, global widths and score multipliers), a ``step`` a few changes to the incumbent. Every
other step is from the best candidate of one format and keeps to it, where that is not far behind:
prune, then quantize, which is where a search of cuts and formats that are priced unequally well may
end as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from compress.searches.prices import STEP, Pricing, complete, kl_of_trial, of_trial, outer
from compress.searches.problem import Choice, Problem
from compress.searches.proposals import Proposal, decode, distributions, key_of
from compress.searches.steps import of_one_format, stepped

# Every so many trials one is a sample; the others are steps, which find more.
SAMPLE_EVERY = 8
# The best candidate of one format is left alone where its KL is so many times that of the best: a
# few steps do not make up for it.
FAR = 2.0


@dataclass(frozen=True)
class Move:
    """A new candidate, the parameters it belongs to and the kind of move that found it.

    Without a proposal: the move is a step, for which the tangents of ``path`` have to be taken
    first.
    """

    name: str
    proposal: Proposal | None = None
    params: dict[str, Any] = field(default_factory=dict)
    path: Sequence[FrozenTrial] = ()


def propose(
    pricing: Pricing,
    done: Sequence[FrozenTrial],
    running: Sequence[FrozenTrial],
    first: Sequence[tuple[dict[str, Any], Proposal]],
    seed: int,
) -> Move | None:
    """The next move, a function of its arguments alone; None if nothing new is found."""
    problem = pricing.problem
    known = {trial.user_attrs["key"] for trial in (*done, *running)}
    number = len(done) + len(running)

    def new(proposal: Proposal) -> bool:
        return key_of(problem, proposal) not in known

    for params, seeded in first:
        if new(seeded):
            return Move("seed", seeded, params)
    if incumbent(done) is None or (number % SAMPLE_EVERY == 0 and distributions(problem)):
        params = sampled(problem, (*done, *running), seed * 100003 + number, len(first))
        proposal = decode(problem, params)
        if proposal is not None and new(proposal):
            return Move("sample", proposal, params)
    path = same_format(problem, done) if number % 2 else done
    best = incumbent(path)
    if best is None:
        return None
    if pricing.missing(path):
        return Move(STEP, path=path)
    proposal = stepped(
        problem, done, best, pricing.at(path, best), new, seed * 1000003 + number, path is not done
    )
    return None if proposal is None else Move(STEP, proposal, dict(best.params))


def incumbent(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The best of those that were measured on all sequences."""
    return min((t for t in trials if complete(t)), key=lambda t: t.value or 0.0, default=None)


def same_format(problem: Problem, done: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
    """The trials of one format; all if there is but one, or no good one was measured to the end.

    They are of whichever format: the incumbent's decides what steps keep.
    """
    if len(problem.space.formats) == 1:
        return done
    groups: dict[str, list[list[Choice]]] = {}
    found = []
    for trial in done:
        # Many trials share their groups, which take longer to make than all else here.
        key = repr(sorted(outer(trial).items()))
        if key not in groups:
            groups[key] = of_trial(problem, trial)[1]
        if of_one_format(groups[key], trial.user_attrs["choice"]):
            found.append(trial)
    best, alone = incumbent(done), incumbent(found)
    if best is None or alone is None or kl_of_trial(alone) > FAR * kl_of_trial(best):
        return done
    return found


def sampled(
    problem: Problem, trials: Sequence[FrozenTrial], seed: int, startup: int
) -> dict[str, Any]:
    """The outer choice that TPE asks for after these trials."""
    # In memory: the trial of the run's study gets what this decodes to, and by other moves as well.
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    study = optuna.create_study(sampler=sampler)
    study.add_trials(trials)
    return study.ask(distributions(problem)).params
