"""The next candidate of a study: seeds first, then steps from the incumbent, now and then a sample.

A ``seed`` is one of the knapsack's diverse solutions, a ``sample`` what TPE asks for (KV format,
hidden size, global widths and score multipliers), a ``step`` a few changes to the incumbent. Every
other step keeps the incumbent's formats and changes cuts alone: what cuts and what rounding costs
is not known equally well, and trading one for the other promises too much.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from compress.searches.prices import STEP, Pricing, complete
from compress.searches.problem import Problem
from compress.searches.proposals import Proposal, decode, distributions, key_of
from compress.searches.steps import stepped

# Every so many trials one is a sample; the others are steps, which find more.
SAMPLE_EVERY = 8


@dataclass(frozen=True)
class Move:
    """A new candidate, the parameters it belongs to and the kind of move that found it.

    Without a proposal: the move is a step, for which tangents have to be taken first.
    """

    name: str
    proposal: Proposal | None = None
    params: dict[str, Any] = field(default_factory=dict)


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
    best = incumbent(done)
    if best is None or (number % SAMPLE_EVERY == 0 and distributions(problem)):
        params = sampled(problem, (*done, *running), seed * 100003 + number, len(first))
        proposal = decode(problem, params)
        if proposal is not None and new(proposal):
            return Move("sample", proposal, params)
    if best is None:
        return None
    if pricing.missing(done):
        return Move(STEP)
    both = problem.space.prunes and len(problem.space.formats) > 1
    keeping = both and number % 2 == 1
    proposal = stepped(
        problem, done, best, pricing.at(done, best), new, seed * 1000003 + number, keeping
    )
    return None if proposal is None else Move(STEP, proposal, dict(best.params))


def incumbent(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The best of those that were measured on all sequences."""
    return min((t for t in trials if complete(t)), key=lambda t: t.value or 0.0, default=None)


def sampled(
    problem: Problem, trials: Sequence[FrozenTrial], seed: int, startup: int
) -> dict[str, Any]:
    """The outer choice that TPE asks for after these trials."""
    # In memory: the trial of the run's study gets what this decodes to, and by other moves as well.
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    study = optuna.create_study(sampler=sampler)
    study.add_trials(trials)
    return study.ask(distributions(problem)).params
