"""The outer problem: Optuna asks, the knapsack decodes, the student in memory is measured.

Moves, by the number of completed trials: ``seed`` (diverse knapsack solutions), ``sample`` (TPE
over KV format, hidden size, global widths and score multipliers) and ``swap`` (the incumbent's
knapsack with jittered scores, where only a few groups may differ). Everything is a function of the
seed and the completed trials, so that a killed study continues as if it had not been killed.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from compress.candidate import Candidate
from compress.errors import Infeasible
from compress.searches.knapsack import Knapsack, Overlap, Solution, diverse, smallest, solve
from compress.searches.problem import Choice, Globals, Problem, total_bytes
from compress.units import format_bytes

SEEDS = 8
# Log of a multiplier's range: scores of a kind of block may be off by a factor of two.
MULTIPLIER = math.log(2.0)
# Jitter of a swap's scores (log-normal) and how many groups may change.
JITTER, RADII = 0.3, (2, 3, 4, 6, 8)
# A trial is stopped early only after so many tokens: its measurement stays worth reading.
EARLIEST_STOP_TOKENS = 1024
STOP_P_VALUE = 0.1
# A swap that finds nothing new is drawn again, so often.
RETRIES = 20

Measure = Callable[[Candidate], Iterator[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A measured candidate: the per-sequence KL and what was predicted, nats per token."""

    candidate: Candidate
    bytes: int
    predicted: float
    values: tuple[float, ...]
    complete: bool

    @property
    def kl(self) -> float:
        """Mean KL over the sequences measured."""
        return float(np.mean(self.values))


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A decoded ask: the groups' options, the choice among them and the outer variables."""

    groups: list[list[Choice]]
    choice: tuple[int, ...]
    chosen: Globals
    predicted: float

    @property
    def picked(self) -> list[Choice]:
        """The chosen option of every group."""
        return [options[i] for options, i in zip(self.groups, self.choice, strict=True)]


def open_study(journal: Path, name: str) -> optuna.Study:
    """The study of a run, new or as an earlier process left it; what that left open is closed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
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


def explore(
    problem: Problem,
    kind: str,
    trials: int,
    measure: Measure,
    journal: Path,
    tokens_per_sequence: int,
    seed: int,
    progress: Callable[[int, int, float], None] = lambda done, total, best: None,
    label: str | None = None,
) -> list[Trial]:
    """Measure ``trials`` different candidates of a problem (fewer if there are no more).

    Args:
        problem: teacher, scores, space, deployment and budget.
        kind: names the study, and its candidates unless ``label`` does.
        trials: candidates to measure, those of an earlier process included.
        measure: gives a candidate's per-sequence KL, a batch at a time.
        journal: Optuna's journal file; several studies share it.
        tokens_per_sequence: to stop hopeless trials only after enough text.
        seed: of every draw.
        progress: called with trials done, in total and the best KL.
        label: names the candidates.

    Returns:
        Every measured candidate, best first; those stopped early come last.

    Raises:
        Infeasible: nothing in the space fits the budget.
    """
    study = open_study(journal, kind)
    kind = label or kind
    first = seeds(problem)
    while len(done := finished(study)) < trials:
        study.sampler = optuna.samplers.TPESampler(
            seed=seed * 100003 + len(done), n_startup_trials=len(first)
        )
        proposal, params, move = propose(problem, study, first, done, seed)
        if proposal is None:
            break
        study.enqueue_trial(params, user_attrs={"move": move})
        trial = study.ask(distributions(problem))
        candidate = named(problem, kind, len(done), proposal)
        trial.set_user_attr("choice", list(proposal.choice))
        trial.set_user_attr("key", key_of(problem, proposal))
        trial.set_user_attr("predicted", proposal.predicted)
        values = run_trial(trial, measure(candidate), tokens_per_sequence)
        best = min(
            (t.value for t in finished(study) if t.value is not None and whole(t)),
            default=float(np.mean(values)),
        )
        progress(len(done) + 1, trials, best)
    return measured(problem, kind, finished(study))


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


def distributions(problem: Problem) -> dict[str, optuna.distributions.BaseDistribution]:
    """The outer variables of a problem."""
    categorical = optuna.distributions.CategoricalDistribution
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    if len(problem.space.kv_formats) > 1:
        found["kv_format"] = categorical(problem.space.kv_formats)
    for axis, choice in problem.space.axes.items():
        if choice.scope == "global":
            found[f"share_{axis}"] = categorical((1.0, *choice.keep))
    kinds = sorted({block.kind for block in problem.teacher.blocks})
    scaled = kinds if problem.space.prunes else []
    if len(problem.space.formats) > 1 and problem.space.prunes:
        scaled = [*kinds, "format"]
    # One kind is the unit of the others.
    for name in scaled[1:]:
        found[f"log_{name}"] = optuna.distributions.FloatDistribution(-MULTIPLIER, MULTIPLIER)
    return found


def globals_of(problem: Problem, params: Mapping[str, Any]) -> Globals:
    """The outer choice that a trial's parameters spell."""
    return Globals(
        kv_format=params.get("kv_format", problem.space.kv_formats[0]),
        shares={k.removeprefix("share_"): v for k, v in params.items() if k.startswith("share_")},
        multipliers={
            k.removeprefix("log_"): math.exp(v) for k, v in params.items() if k.startswith("log_")
        },
    )


def neutral(problem: Problem) -> dict[str, Any]:
    """Parameters that change nothing: whole widths, multipliers 1, the first KV format."""
    return {
        name: 0.0 if name.startswith("log_") else getattr(d, "choices", (0.0,))[0]
        for name, d in distributions(problem).items()
    }


def decode(
    problem: Problem, params: Mapping[str, Any], overlaps: Sequence[Overlap] = ()
) -> Proposal | None:
    """The knapsack's answer to an outer choice; None if nothing fits."""
    chosen = globals_of(problem, params)
    groups = problem.groups(chosen)
    solution = solve(problem.knapsack(groups, chosen), overlaps)
    return None if solution is None else as_proposal(problem, groups, solution, chosen)


def as_proposal(
    problem: Problem, groups: list[list[Choice]], solution: Solution, chosen: Globals
) -> Proposal:
    """A solution with its predicted KL under the scores as they are, multipliers aside."""
    plain = problem.knapsack(groups, replace(chosen, multipliers={}))
    cost = sum(float(c[i]) for c, i in zip(plain.costs, solution.choice, strict=True))
    return Proposal(
        groups=groups,
        choice=solution.choice,
        chosen=chosen,
        predicted=cost + problem.global_cost(chosen),
    )


def seeds(problem: Problem) -> list[tuple[dict[str, Any], Proposal]]:
    """First proposals: the best of every single global change, then diverse ones of the best.

    Raises:
        Infeasible: none of them fits; the message names the smallest reachable size.
    """
    variants = [neutral(problem)]
    shares = sorted({s for a in problem.space.axes.values() if a.scope == "global" for s in a.keep})
    dims = distributions(problem)
    for kv_format in problem.space.kv_formats:
        base = neutral(problem) | ({"kv_format": kv_format} if "kv_format" in dims else {})
        variants.append(base)
        for axis, choice in problem.space.axes.items():
            if choice.scope == "global":
                variants += [base | {f"share_{axis}": share} for share in choice.keep]
        for share in shares:
            # All global widths together, each at its nearest share.
            every = {
                f"share_{axis}": min((1.0, *c.keep), key=lambda s: abs(s - share))
                for axis, c in problem.space.axes.items()
                if c.scope == "global"
            }
            variants.append(base | every)
    unique = [v for i, v in enumerate(variants) if v not in variants[:i]]
    decoded = [(v, p) for v in unique if (p := decode(problem, v)) is not None]
    if not decoded:
        floors = [floor_bytes(problem, variant) for variant in unique]
        raise Infeasible(infeasible(problem, min(floors)))
    decoded.sort(key=lambda pair: pair[1].predicted)
    new: dict[str, tuple[dict[str, Any], Proposal]] = {}
    for pair in decoded:
        new.setdefault(key_of(problem, pair[1]), pair)
    decoded = list(new.values())
    params, best = decoded[0]
    knapsack = problem.knapsack(best.groups, best.chosen)
    others = [
        (params, as_proposal(problem, best.groups, solution, best.chosen))
        for solution in diverse(knapsack, SEEDS // 2)[1:]
    ]
    return [decoded[0], *others, *decoded[1 : 1 + SEEDS - 1 - len(others)]]


def floor_bytes(problem: Problem, params: Mapping[str, Any]) -> int:
    """The smallest total size under an outer choice."""
    chosen = globals_of(problem, params)
    knapsack: Knapsack = problem.knapsack(problem.groups(chosen), chosen)
    return smallest(knapsack) + problem.budget - knapsack.budget


def infeasible(problem: Problem, floor: int) -> str:
    """What does not fit, by how much, and what would."""
    hints = ["a larger --budget", "a shorter --context"]
    if "fp8" not in problem.space.kv_formats:
        hints.append("a space with an FP8 KV cache")
    if len(problem.space.formats) == 1 or not problem.space.prunes:
        hints.append("--space joint")
    return (
        f"budget {format_bytes(problem.budget)} is below the smallest size this space reaches, "
        f"{format_bytes(floor)} ({floor} bytes); what would help: {', '.join(hints)}"
    )


def propose(
    problem: Problem,
    study: optuna.Study,
    first: Sequence[tuple[dict[str, Any], Proposal]],
    done: Sequence[FrozenTrial],
    seed: int,
) -> tuple[Proposal | None, dict[str, Any], str]:
    """The next new candidate, the parameters it belongs to and the move that found it."""
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
    for attempt in range(RETRIES):
        # Small problems run out of neighbours: look further each time.
        proposal = swapped(problem, best, draw, JITTER * (1 + attempt / 4))
        if proposal is not None and key_of(problem, proposal) not in known:
            return proposal, dict(best.params), "swap"
    return None, {}, "none"


def swapped(
    problem: Problem, best: FrozenTrial, draw: random.Random, jitter: float
) -> Proposal | None:
    """The incumbent's knapsack with jittered scores; between one and a few groups differ."""
    chosen = globals_of(problem, best.params)
    groups = problem.groups(chosen)
    knapsack = problem.knapsack(groups, chosen)
    jittered = replace(
        knapsack,
        costs=[costs * np.exp([draw.gauss(0, jitter) for _ in costs]) for costs in knapsack.costs],
    )
    incumbent = tuple(best.user_attrs["choice"])
    near = Overlap(incumbent, len(groups) - 1, len(groups) - draw.choice(RADII))
    solution = solve(jittered, [near])
    return None if solution is None else as_proposal(problem, groups, solution, chosen)


def key_of(problem: Problem, proposal: Proposal) -> str:
    """What makes two proposals the same candidate, however their asks differ."""
    what = [
        (number, option.target, option.format, option.removed)
        for choice in proposal.picked
        for number, option in choice
    ]
    return repr((proposal.chosen.kv_format, problem.hidden(proposal.chosen), sorted(what)))


def named(problem: Problem, kind: str, number: int, proposal: Proposal) -> Candidate:
    """The candidate of a proposal: the kind and the number of its trial."""
    return problem.candidate(f"{kind}-{number:03}", kind, proposal.picked, proposal.chosen)


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
        )
        candidate = named(problem, kind, number, proposal)
        found.append(
            Trial(
                candidate=candidate,
                bytes=total_bytes(candidate, problem.deployment),
                predicted=proposal.predicted,
                values=tuple(trial.user_attrs["values"]),
                complete=whole(trial),
            )
        )
    return sorted(found, key=lambda trial: (not trial.complete, trial.kl))
