"""The outer problem: Optuna asks, the knapsack decodes, the student in memory is measured.

Moves, by the number of completed trials: ``seed`` (diverse knapsack solutions), ``sample`` (TPE
over KV format, hidden size, global widths and score multipliers) and ``swap`` (the incumbent's
knapsack with jittered scores, where only a few groups may differ). Everything is a function of the
seed and the completed trials, so that a killed study continues as if it had not been killed.
"""

import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from compress.candidate import Candidate
from compress.searches.problem import Problem, total_bytes
from compress.searches.proposals import (
    Proposal,
    decode,
    distributions,
    globals_of,
    key_of,
    named,
    seeds,
    swapped,
)

# Jitter of a swap's scores (log-normal).
JITTER = 0.3
# A trial is stopped early only after so many tokens: its measurement stays worth reading.
EARLIEST_STOP_TOKENS = 1024
STOP_P_VALUE = 0.1
# A swap that finds nothing new is drawn again, so often.
RETRIES = 20

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
    """What a study is called, how many candidates it measures and where it is kept.

    Several studies share a journal. ``name`` has to differ where what is measured differs; ``kind``
    names the candidates. ``tokens_per_sequence`` is for stopping hopeless trials only after enough
    text.
    """

    name: str
    kind: str
    trials: int
    journal: Path
    tokens_per_sequence: int
    seed: int = 0


def open_study(journal: Path, name: str) -> optuna.Study:
    """The study of a run, new or as an earlier process left it; what that left open is closed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    mend(journal)
    backend = JournalFileBackend(str(journal))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=name,
            load_if_exists=True,
            pruner=optuna.pruners.WilcoxonPruner(p_threshold=STOP_P_VALUE),
        )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.tell(study.ask(), state=TrialState.FAIL)
    return study


def mend(journal: Path) -> None:
    """Take away what a killed process left: its lock on the journal, and half a line."""
    # Optuna 5 waits for such a lock: 30 seconds, or forever where the path is relative.
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    if journal.is_file():
        whole_lines = journal.read_bytes().rfind(b"\n") + 1
        os.truncate(journal, whole_lines)


def explore(
    problem: Problem,
    settings: StudySettings,
    measure: Measure,
    progress: Callable[[float], None] = lambda best: None,
) -> list[Trial]:
    """Measure different candidates of a problem (fewer than asked for if there are no more).

    Args:
        problem: teacher, scores, space, deployment and budget.
        settings: of the study; trials of an earlier process count.
        measure: gives a candidate's per-sequence KL, a batch at a time.
        progress: called after every trial with the best KL so far.

    Returns:
        The first ``settings.trials`` candidates, best first; those stopped early come last.

    Raises:
        Infeasible: nothing in the space fits the budget.
    """
    study = open_study(settings.journal, settings.name)
    first = seeds(problem)
    while len(done := finished(study)) < settings.trials:
        study.sampler = optuna.samplers.TPESampler(
            seed=settings.seed * 100003 + len(done), n_startup_trials=len(first)
        )
        proposal, params, move = propose(problem, study, first, settings.seed)
        if proposal is None:
            break
        study.enqueue_trial(params, user_attrs={"move": move})
        trial = study.ask(distributions(problem))
        candidate = named(problem, settings.kind, len(done), proposal)
        trial.set_user_attr("choice", list(proposal.choice))
        trial.set_user_attr("key", key_of(problem, proposal))
        trial.set_user_attr("predicted", proposal.predicted)
        trial.set_user_attr("gap", proposal.gap)
        values = run_trial(trial, measure(candidate), settings.tokens_per_sequence)
        best = min(
            (t.value for t in finished(study) if t.value is not None and whole(t)),
            default=float(np.mean(values)),
        )
        progress(best)
    return measured(problem, settings.kind, finished(study)[: settings.trials])


def run_trial(
    trial: optuna.Trial, batches: Iterator[Tensor], tokens_per_sequence: int
) -> list[float]:
    """Measure until done or hopeless against the best trial, and tell the study."""
    values: list[float] = []
    for batch in batches:
        for value in batch.tolist():
            trial.report(value, len(values))
            values.append(value)
        if len(values) * tokens_per_sequence >= EARLIEST_STOP_TOKENS and trial.should_prune():
            break
    else:
        trial.set_user_attr("complete", True)
    trial.set_user_attr("values", values)
    study = trial.study
    # PRUNED keeps the intermediate values and is no incumbent; the mean says how bad it was.
    if trial.user_attrs.get("complete"):
        study.tell(trial, float(np.mean(values)))
    else:
        study.tell(trial, state=TrialState.PRUNED)
    return values


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were measured, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def whole(trial: FrozenTrial) -> bool:
    """Whether a trial was measured on all sequences."""
    return trial.state == TrialState.COMPLETE


def propose(
    problem: Problem,
    study: optuna.Study,
    first: Sequence[tuple[dict[str, Any], Proposal]],
    seed: int,
) -> tuple[Proposal | None, dict[str, Any], str]:
    """The next new candidate, the parameters it belongs to and the move that found it."""
    done = finished(study)
    known = {trial.user_attrs["key"] for trial in done}
    number = len(done)
    if number < len(first):
        params, seeded = first[number]
        if key_of(problem, seeded) not in known:
            return seeded, params, "seed"
    best = min((t for t in done if whole(t)), key=lambda t: t.value or 0.0, default=None)
    if best is None or (number % 3 == 0 and distributions(problem)):
        # The sampler's own ask, read and closed: it is enqueued again with what it decodes to.
        probe = study.ask(distributions(problem))
        study.tell(probe, state=TrialState.FAIL)
        proposal = decode(problem, probe.params)
        if proposal is not None and key_of(problem, proposal) not in known:
            return proposal, dict(probe.params), "sample"
    if best is None:
        return None, {}, "none"
    draw = random.Random(seed * 1000003 + number)
    incumbent = tuple(best.user_attrs["choice"])
    for attempt in range(RETRIES):
        # Small problems run out of neighbours: look further each time.
        jitter = JITTER * (1 + attempt / 4)
        proposal = swapped(problem, best.params, incumbent, draw, jitter)
        if proposal is not None and key_of(problem, proposal) not in known:
            return proposal, dict(best.params), "swap"
    return None, {}, "none"


def measured(problem: Problem, kind: str, trials: Sequence[FrozenTrial]) -> list[Trial]:
    """Finished trials as candidates, best first, those stopped early last."""
    found = []
    for number, trial in enumerate(trials):
        chosen = globals_of(problem, trial.params)
        proposal = Proposal(
            groups=problem.groups(chosen),
            choice=tuple(trial.user_attrs["choice"]),
            chosen=chosen,
            predicted=trial.user_attrs["predicted"],
            gap=trial.user_attrs["gap"],
        )
        candidate = named(problem, kind, number, proposal)
        found.append(
            Trial(
                candidate=candidate,
                bytes=total_bytes(candidate, problem.deployment),
                predicted=proposal.predicted,
                values=tuple(trial.user_attrs["values"]),
                complete=whole(trial),
                gap=proposal.gap,
            )
        )
    return sorted(found, key=lambda trial: (not trial.complete, trial.kl))
