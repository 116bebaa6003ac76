"""What a search of one space is compared with: the field's methods at the same bytes and cost.

Every method gets the same problem (teacher, space, budget, ranking of units) and the same number of
token-forwards; it returns the choice that it measured best on the selection text, if it measures.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
import torch
from optuna.distributions import CategoricalDistribution
from torch import Tensor

from benchmarks.common import Cost
from compress.measure.kl import Reference, measure
from compress.scores import replay
from compress.scores.replay import Keep, variant
from compress.searches.baselines import randomly, uniform
from compress.searches.knapsack import Knapsack, diverse, value
from compress.searches.problem import Choice, Globals, Problem, taken
from compress.searches.space import Option
from compress.student.candidate import Candidate, block_keep
from compress.student.grams import Grams
from compress.sweep.stack import Stack

# EvoPress (Sieberling et al. 2024, algorithm 1): offspring of a generation, and how many of them
# survive on how many sequences; the last rung is all of the selection text.
OFFSPRING = 16
SURVIVORS = ((4, 2), (1, 4))
PLAIN = Globals()
# Solutions of the additive knapsack that are measured.
DIVERSE = 8


@dataclass
class Trials:
    """Measured candidates of one method under a limit of token-forwards.

    ``more`` gives training text, twice as much as is measured on, ``fresh`` other selection text,
    as much as that.
    """

    problem: Problem
    stack: Stack
    text: Reference
    limit: float
    more: Callable[[], Reference]
    fresh: Callable[[], Reference]
    grams: Grams | None = None
    cost: Cost = field(default_factory=Cost)
    best: tuple[float, Candidate] | None = None
    slopes: Reference | None = None

    @property
    def left(self) -> float:
        """Token-forwards that may still be spent."""
        return self.limit - self.cost.token_forwards

    @property
    def whole(self) -> int:
        """Tokens of the selection text."""
        return self.text.tokens.numel()

    def slopes_text(self) -> Reference:
        """Training text for tangents; the teacher runs on it, and is paid for, once."""
        if self.slopes is None:
            self.slopes = self.more()
            self.cost.add(self.slopes.tokens.numel())
        return self.slopes

    def kl(self, options: Sequence[Option], sequences: int | None = None) -> float:
        """Mean KL of a choice on the first sequences; on all of them it may become the best."""
        candidate = self.problem.candidate("x", "x", options, PLAIN)
        return self.kl_of(candidate, sequences)

    def kl_of(self, candidate: Candidate, sequences: int | None = None) -> float:
        """The same of a candidate."""
        text = self.text if sequences is None else self.text.part(0, sequences)
        self.cost.add(text.tokens.numel())
        kl = float(torch.cat(list(measure(candidate, text, self.grams))).mean())
        if sequences is None:
            self.offer(kl, candidate)
        return kl

    def offer(self, kl: float, candidate: Candidate) -> None:
        """Keep a candidate that was measured on all of the text if it is the best."""
        if self.best is None or kl < self.best[0]:
            self.best = (kl, candidate)


def uniform_width(trials: Trials) -> Candidate:
    """The widest uniform FFN cut that fits."""
    return uniform(trials.problem)[0][0]


def uniform_by_activation(trials: Trials) -> Candidate:
    """The same with units ranked by activations (Minitron, Minitron-SSM); a forward pass."""
    trials.cost.add(trials.whole)
    problem = replace(trials.problem, ranking="activation", costs={}, keeps={})
    return uniform_width(replace(trials, problem=problem))


def depth_by_score(trials: Trials) -> Candidate:
    """Blocks removed, those that cost least alone first, until the rest fits."""
    problem, removals = trials.problem, exact_removals(trials)
    groups = problem.groups(PLAIN)
    knapsack = problem.knapsack(groups, PLAIN, priced=False)
    choice = [0] * len(groups)
    for number in sorted(removals, key=lambda number: removals[number]):
        if value(knapsack.bytes, choice) <= knapsack.room:
            break
        choice[number] = len(groups[number]) - 1
    return problem.candidate("x", "x", taken(groups, choice), PLAIN)


def best_of_random(trials: Trials, count: int = 32) -> Candidate:
    """The best of random cuts that fill the budget."""
    for candidate, _ in randomly(trials.problem, count, seed=1):
        if trials.left < trials.whole:
            break
        trials.kl_of(candidate)
    return measured_best(trials)


def additive_knapsack(trials: Trials, share: float = 0.8) -> Candidate:
    """Puzzle: every option alone, exactly, then diverse solutions of the knapsack, measured.

    ``share`` of the cost goes to the scores (Bercovich et al. 2024, replace-one-block KL). The
    rest pays for more solutions than this; each takes the solver longer than the one before.
    """
    problem = with_exact_costs(trials, share)
    groups = problem.groups(PLAIN)
    knapsack = problem.knapsack(groups, PLAIN)
    for solution in diverse(knapsack, min(DIVERSE, int(trials.left // trials.whole))):
        trials.kl(taken(groups, solution.choice))
    return measured_best(trials)


def evolution(trials: Trials, seed: int = 0) -> Candidate:
    """EvoPress from a random start: level switches at equal bytes, selection in growing text."""
    problem, draw = trials.problem, random.Random(seed)
    groups = problem.groups(PLAIN)
    knapsack = problem.knapsack(groups, PLAIN, priced=False)
    parent = start(problem, groups)
    while True:
        offspring = [parent, *(mutated(knapsack, parent, draw) for _ in range(OFFSPRING))]
        rungs = [len(offspring) * SURVIVORS[0][1]]
        rungs += [SURVIVORS[0][0] * SURVIVORS[1][1], len(trials.text.tokens)]
        if trials.left < sum(rungs) * trials.text.tokens.shape[1]:
            return measured_best(trials)
        for survivors, sequences in SURVIVORS:
            scored = [(trials.kl(taken(groups, c), sequences), n) for n, c in enumerate(offspring)]
            offspring = [offspring[n] for _, n in sorted(scored)[:survivors]]
        parent = offspring[0]
        trials.kl(taken(groups, parent))


def raw_tpe(trials: Trials, seed: int = 0) -> Candidate:
    """Optuna's TPE over one categorical variable per block; what does not fit is not measured."""
    problem = trials.problem
    groups = problem.groups(PLAIN)
    knapsack = problem.knapsack(groups, PLAIN, priced=False)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    space: dict[str, Any] = {
        str(g): CategoricalDistribution(range(len(options))) for g, options in enumerate(groups)
    }
    study.enqueue_trial({str(g): o for g, o in enumerate(start(problem, groups))})
    asked = 0
    while trials.left >= trials.whole and asked < 4000:
        asked += 1
        trial = study.ask(space)
        choice = [trial.params[str(g)] for g in range(len(groups))]
        excess = value(knapsack.bytes, choice) - knapsack.room
        if excess > 0:
            # Worse than anything measured, and the worse the more it exceeds.
            study.tell(trial, 100 + 100 * excess / knapsack.room)
        else:
            study.tell(trial, trials.kl(taken(groups, choice)))
    return measured_best(trials)


def measured_best(trials: Trials) -> Candidate:
    """The candidate measured best."""
    assert trials.best is not None
    return trials.best[1]


def start(problem: Problem, groups: Sequence[Sequence[Choice]]) -> list[int]:
    """A choice that fits and knows no scores: the first random cut, as option numbers."""
    candidate = randomly(problem, 1, seed=7)[0][0]
    found = []
    for options in groups:
        ((number, _),) = options[0]
        alive = number in candidate.keep["blocks"].tolist()
        kept = kept_counts(problem, candidate, number)
        match = [
            o for o, ((_, option),) in enumerate(options)
            if option.removed != alive and (option.removed or dict(option.target) == kept)
        ]  # fmt: skip
        found.append(match[0])
    return found


def kept_counts(problem: Problem, candidate: Candidate, number: int) -> dict[str, int]:
    """Counts by cut axis of a block in a candidate."""
    kept = block_keep(candidate.keep, problem.teacher.blocks[number])
    return {axis: index.shape[-1] for axis, index in kept.items() if axis != "hidden"}


def mutated(knapsack: Knapsack, parent: Sequence[int], draw: random.Random) -> list[int]:
    """A few level switches: one group gets smaller, others take what that leaves."""
    for _ in range(200):
        child = list(parent)
        for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
            down, up = draw.sample(range(len(child)), 2)
            child[down] = draw.randrange(len(knapsack.bytes[down]))
            child[up] = draw.randrange(len(knapsack.bytes[up]))
        used = value(knapsack.bytes, child)
        # Nearly the same bytes: a child that wastes budget says nothing.
        if 0.985 * knapsack.room <= used <= knapsack.room and child != list(parent):
            return child
    return list(parent)


def exact_removals(trials: Trials, share: float = 1.0) -> dict[int, float]:
    """KL of removing each block alone, on as many sequences as ``share`` of the cost pays for."""
    teacher = trials.problem.teacher
    options: dict[int, Mapping[str, Keep]] = {
        number: {"removed": None} for number in range(len(teacher.blocks))
    }
    found = replayed(trials, options, share)
    return {number: float(costs["removed"].mean()) for number, costs in found.items()}


def with_exact_costs(trials: Trials, share: float) -> Problem:
    """The problem with every option's cost measured alone instead of estimated."""
    problem = replace(trials.problem, costs={})
    options: dict[int, dict[str, Keep]] = {}
    named: dict[tuple[int, str], Option] = {}
    for group in problem.groups(PLAIN):
        for ((number, option),) in group:
            keep = None if option.removed else problem.keep_of(number, option)
            cuts = option.removed or option.target
            # Widths of routed experts are no masks: they keep their estimates.
            if cuts and "expert_ffn" not in (keep or {}):
                options.setdefault(number, {})[str(option.target)] = keep
                named[number, str(option.target)] = option
    for number, costs in replayed(trials, options, share).items():
        for key, kl in costs.items():
            option = named[number, key]
            # What repair leaves of a cut is estimated for everybody alike.
            problem.costs[number, option] = (
                float(kl.mean()) * problem.share_left_by_repair(number, option),
                0.0,
            )
    return problem


def replayed(
    trials: Trials, options: Mapping[int, Mapping[str, Keep]], share: float
) -> dict[int, dict[str, Tensor]]:
    """Exact KLs of single options on as many selection sequences as a share of the cost pays for.

    A replay counts by its share of the depth.
    """
    teacher, length = trials.problem.teacher, trials.text.tokens.shape[1]
    depth = teacher.layers
    forwards = 1 + sum(
        len(keeps) * (depth - teacher.blocks[number].layer) / depth
        for number, keeps in options.items()
    )
    affordable = int(share * trials.left / (forwards * length))
    tokens = trials.text.tokens[: max(1, affordable)]
    trials.cost.add(forwards * tokens.numel())
    variants = {
        f"{number} {key}": variant(trials.stack, number, keep)
        for number, keeps in options.items()
        for key, keep in keeps.items()
    }
    found = replay.replayed(trials.stack, tokens, variants)
    return {
        number: {key: found[f"{number} {key}"] for key in keeps}
        for number, keeps in options.items()
    }


METHODS: Mapping[str, Callable[[Trials], Candidate]] = {
    "uniform width": uniform_width,
    "uniform by activation": uniform_by_activation,
    "depth by score": depth_by_score,
    "best of 32 random": best_of_random,
    "additive knapsack": additive_knapsack,
    "evolution": evolution,
    "raw TPE": raw_tpe,
}
