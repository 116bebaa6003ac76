"""The outer problem: Optuna asks, the knapsack decodes, the student in memory is measured.

A proposal (``steps``) is a function of the seed, the finished trials and those that others are
measuring, so that a study of one process continues after a kill as if there had been none.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from compress.searches.journal import (
    attending,
    claiming,
    close_dead,
    close_waiting,
    elsewhere,
    finished,
    open_study,
)
from compress.searches.prices import Linearize, Pricing
from compress.searches.problem import Problem, total_bytes
from compress.searches.proposals import (
    Proposal,
    attributes_of,
    candidate_of,
    complete,
    decode_trial,
    distributions,
    params_of,
    seeds,
)
from compress.searches.steps import propose
from compress.student.candidate import Candidate

# A trial is stopped early only after so many tokens.
EARLIEST_STOP_TOKENS = 512
# Between two looks at what others are doing.
LOOK_SECONDS = 0.1

Measure = Callable[[Candidate], Iterator[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A measured candidate: the per-sequence KL and what was predicted, nats per token.

    ``gap`` is the relative optimality gap of its knapsack; None where there was none to solve.
    """

    candidate: Candidate
    bytes: int
    predicted: float
    values: tuple[float, ...]
    complete: bool
    gap: float | None = None

    @property
    def kl(self) -> float:
        """Mean KL over the sequences measured."""
        return float(np.mean(self.values))


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """How many candidates a study measures, and the journal that it shares with others.

    ``name`` has to differ where what is measured differs; ``kind`` names the candidates.
    """

    name: str
    kind: str
    trials: int
    journal: Path
    tokens_per_sequence: int
    seed: int = 0


def explore(
    problem: Problem,
    settings: StudySettings,
    measure: Measure,
    progress: Callable[[int, float], None] = lambda done, best: None,
    linearize: Linearize | None = None,
) -> list[Trial]:
    """Measure different candidates of a problem (fewer than asked for if there are no more).

    Others may explore the same study at the same time: each takes what none of them has taken, and
    all wait until the last trial is measured.

    Args:
        problem: what is searched.
        settings: of the study; trials of an earlier process count.
        measure: gives a candidate's per-sequence KL, a batch at a time.
        progress: called after every trial with how many are measured and the best KL so far.
        linearize: gives tangents for steps; else the teacher's scores alone price them.

    Returns:
        The first ``settings.trials`` candidates, best first; those stopped early come last.

    Raises:
        Infeasible: nothing in the space fits the budget.
    """
    study = open_study(settings.journal, settings.name)
    first = seeds(problem)
    pricing = Pricing(problem, len(first), linearize)
    with attending(settings.journal) as worker:
        while (claimed := claim(study, settings, worker, first, pricing)) is not None:
            trial, candidate = claimed
            run_trial(trial, measure(candidate), settings.tokens_per_sequence)
            progress(len(finished(study)), study.best_value)
    counted = enumerate(finished(study)[: settings.trials])
    found = [as_measured(problem, settings.kind, number, trial) for number, trial in counted]
    return sorted(found, key=lambda trial: (not trial.complete, trial.kl))


def claim(
    study: optuna.Study,
    settings: StudySettings,
    worker: str,
    first: Sequence[Proposal],
    pricing: Pricing,
) -> tuple[optuna.Trial, Candidate] | None:
    """A running trial of this ``worker`` and its candidate, which no other trial has.

    Waits while the last candidates are with others: one that dies leaves its own. None when enough
    candidates are measured, or there are no more.
    """
    problem, seen = pricing.problem, None
    while True:
        done = finished(study)
        if len(done) < settings.trials:
            # Beside the lock: others go on meanwhile.
            pricing.prepare(done)
        # One at a time, so that a proposal knows all others.
        with claiming(settings.journal):
            close_dead(study, settings.journal)
            close_waiting(study)
            done, running = finished(study), elsewhere(study)
            if len(done) >= settings.trials:
                return None
            now, open_trials = (len(done), len(running)), settings.trials - len(done)
            # The same trials would give the same proposal.
            if now != seen and len(running) < open_trials:
                proposal = propose(pricing, first, done, running, settings.seed)
                if proposal is not None:
                    attributes = attributes_of(proposal) | {"worker": worker}
                    params = params_of(problem, proposal.globals_)
                    study.enqueue_trial(params, user_attrs=attributes)
                    trial = study.ask(dict(distributions(problem)))
                    return trial, candidate_of(problem, settings.kind, sum(now), proposal)
                if not running:
                    return None
            seen = now
        time.sleep(LOOK_SECONDS)


def run_trial(trial: optuna.Trial, batches: Iterator[Tensor], tokens_per_sequence: int) -> None:
    """Measure until done or hopeless against the best trial, and tell the study."""
    values: list[float] = []
    # PRUNED keeps the intermediate values and is no incumbent; the mean says how bad it was.
    state = TrialState.COMPLETE
    for batch in batches:
        for value in batch.tolist():
            trial.report(value, len(values))
            values.append(value)
        if len(values) * tokens_per_sequence >= EARLIEST_STOP_TOKENS and trial.should_prune():
            state = TrialState.PRUNED
            break
    trial.set_user_attr("values", values)
    mean = float(np.mean(values)) if state == TrialState.COMPLETE else None
    trial.study.tell(trial, mean, state)


def as_measured(problem: Problem, kind: str, number: int, trial: FrozenTrial) -> Trial:
    """A finished trial with its candidate, which is named after its number among them."""
    proposal = decode_trial(problem, trial)
    candidate = candidate_of(problem, kind, number, proposal)
    return Trial(
        candidate=candidate,
        bytes=total_bytes(candidate, problem.deployment),
        predicted=proposal.predicted,
        values=tuple(trial.user_attrs["values"]),
        complete=complete(trial),
        gap=proposal.gap,
    )
