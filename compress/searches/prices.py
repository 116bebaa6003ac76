"""What options are worth around the incumbent: tangents at recent incumbents and the scores.

Costs at the teacher add up poorly once a third of it is gone: what a block is worth depends on what
is left around it. So every option is priced by slopes of the KL at students that were the incumbent
of late, each on another part of the text, and by the teacher's scores.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from compress.scores.costs import Scores, change, whole
from compress.scores.tangent import Tangent
from compress.searches.problem import Choice, Globals, Problem
from compress.searches.program import Floats
from compress.searches.proposals import Proposal, globals_of, named
from compress.searches.space import Option
from compress.student.candidate import Candidate

# The tangent at a candidate, on the part of the text of this number.
Linearize = Callable[[Candidate, int], Tangent]
STEP = "step"

# The share of the Gauss-Newton curvature that predicts finite changes best: drawn labels overrate
# large steps. And that of the tangents against the teacher's scores: slopes of units that are gone
# promise too much. Both measured on SmolLM2 at 50 % of its blocks (runs/LOG.md, "Scores at a
# student"). The second is another one elsewhere, by about so much, which measured candidates tell.
CURVATURE, TANGENT, TANGENT_DOUBT = 0.55, 0.5, 0.3
# A tangent is taken anew when the incumbent is so many groups away from it, or after so many steps
# that found nothing; of the last so many the nearer count more: half for so many groups further.
STALE_CHANGES, STALE_FAILURES = 4, 5
RECENT = 4
# How far off a cost may be, as a share of the sizes it is the sum of, and how far off the scores of
# one kind of block, or of rounding, may be all together.
DOUBT, COMMON_DOUBT = 0.4, 0.4
# At least and at most so much, in nats: costs are positive, so that one which is many times what
# steps gain may be far off but is not a gain.
LEAST_DOUBT, MOST_DOUBT = 0.002, 0.1
# Directions in which options of one group err alike.
ALIKE = 3


@dataclass(frozen=True)
class Prices:
    """Costs of all options against the incumbent's, [options], and how far off they may be.

    Each on its own (``doubt``), and those of a kind together (``common`` [options, kinds]).
    """

    cost: Floats
    doubt: Floats
    common: Floats


@dataclass
class Pricing:
    """Prices of a problem's options as trials come in; tangents of recent anchors are kept.

    Without ``linearize`` options are priced by the teacher's scores alone.
    """

    problem: Problem
    linearize: Linearize | None = None
    slopes: dict[tuple[int, int], Floats] = field(default_factory=dict)
    rows: dict[Choice, Floats] = field(default_factory=dict)

    def missing(self, done: Sequence[FrozenTrial]) -> list[tuple[int, FrozenTrial]]:
        """Anchors, numbered, whose slopes the next step needs."""
        if self.linearize is None:
            return []
        return [
            (number, anchor)
            for number, anchor in recent(anchors_of(done))
            if (number, anchor.number) not in self.slopes
        ]

    def fill(self, done: Sequence[FrozenTrial]) -> None:
        """Take the tangents that are missing."""
        for number, anchor in self.missing(done):
            self.slopes[number, anchor.number] = self.slope(number, anchor)

    def slope(self, number: int, anchor: FrozenTrial) -> Floats:
        """First-order changes of the KL around an anchor, [options], against whole blocks."""
        assert self.linearize is not None
        chosen, groups, choice = of_trial(self.problem, anchor)
        proposal = Proposal(groups=groups, choice=choice, chosen=chosen,
                            predicted=anchor.user_attrs["predicted"], gap=0.0)  # fmt: skip
        point = self.linearize(named(self.problem, "anchor", anchor.number, proposal), number)
        options = (option for options in groups for option in options)
        return np.array(
            [sum(slope_of(self.problem, point, *block) for block in option) for option in options]
        )

    def at(self, done: Sequence[FrozenTrial], best: FrozenTrial) -> Prices:
        """Prices around an incumbent; no slope may be missing."""
        chosen, groups, choice = of_trial(self.problem, best)
        scored = self.problem.knapsack(groups, chosen).costs
        teacher = against(np.concatenate(scored), groups, choice)
        common = bounded(COMMON_DOUBT * self.by_kind(groups, choice))
        changes = self.changes(groups, choice)
        curvature = np.concatenate([np.square(rows).sum(1) for rows in changes])
        cost, sizes = teacher, np.abs(teacher)
        anchors = recent(anchors_of(done))
        if anchors and self.linearize is not None:
            # What is near says more; of none that is left out the sum would be nothing.
            distance = np.array([apart(best, anchor) for _, anchor in anchors])
            weights = 0.5 ** ((distance - distance.min()) / STALE_CHANGES)
            slopes = np.array([self.slopes[number, anchor.number] for number, anchor in anchors])
            slope = against(weights @ slopes / weights.sum(), groups, choice)
            otherwise = slope + CURVATURE * curvature - teacher
            cost = teacher + TANGENT * otherwise
            common = np.column_stack([common, bounded(TANGENT_DOUBT * otherwise)])
            sizes = (np.abs(slope) + sizes) / 2
        # What gives up as much as it takes back costs nothing more, as far as one knows.
        doubt = bounded(DOUBT * np.maximum(sizes, curvature))
        alike = alike_within(changes)
        alone = doubt * np.sqrt(np.maximum(0, 1 - np.square(alike).sum(1)))
        return Prices(cost, LEAST_DOUBT + alone, np.hstack([common, doubt[:, None] * alike]))

    def by_kind(self, groups: Sequence[Sequence[Choice]], choice: Sequence[int]) -> Floats:
        """The teacher's scores by kind of block, and rounding's apart, against the incumbent's.

        [options, kinds + 1]; a row sums to what its option costs more than the one taken, before
        multipliers.
        """
        blocks = self.problem.teacher.blocks
        columns = {kind: at for at, kind in enumerate(sorted({b.kind for b in blocks}))}
        found = np.zeros((sum(map(len, groups)), len(columns) + 1))
        for row, option in enumerate(option for options in groups for option in options):
            for number, taken in option:
                structure, rounding = self.problem.cost(number, taken)
                found[row, columns[blocks[number].kind]] += structure
                found[row, -1] += 0.0 if self.problem.blind_to_rounding else rounding
        return np.stack([against(column, groups, choice) for column in found.T], axis=1)

    def changes(self, groups: Sequence[Sequence[Choice]], choice: Sequence[int]) -> list[Floats]:
        """What options change of the teacher's contributions, by group: [options, rows].

        Against the option taken; the squared length of a row is the second-order KL of the change.
        """
        found = []
        for options, taken in zip(groups, choice, strict=True):
            rows = np.stack([self.rows_of(option) for option in options])
            found.append(rows - rows[taken])
        return found

    def rows_of(self, choice: Choice) -> Floats:
        """Contributions of a group's option against whole blocks, those of its blocks in turn."""
        if choice not in self.rows:
            known = self.problem.known
            rows = torch.cat([option_rows(self.problem, known, *block) for block in choice])
            share = 2 * known.length * (len(rows) // len(choice))
            self.rows[choice] = (rows / math.sqrt(share)).double().numpy()
        return self.rows[choice]


def alike_within(changes: Sequence[Floats]) -> Floats:
    """How options of a group err alike: factors [options, groups x ``ALIKE``] of correlations.

    Options that change contributions in the same direction are wrong in the same way.
    """
    found = np.zeros((sum(map(len, changes)), len(changes) * ALIKE))
    start = 0
    for number, rows in enumerate(changes):
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        unit = rows / np.where(length > 0, length, 1)
        values, vectors = np.linalg.eigh(unit @ unit.T)
        most = vectors[:, -ALIKE:] * np.sqrt(np.maximum(0, values[-ALIKE:]))
        end = start + len(rows)
        found[start:end, number * ALIKE : number * ALIKE + most.shape[1]] = most
        start = end
    return found


def bounded(doubts: Floats) -> Floats:
    """Deviations no further than the most from nothing."""
    return np.clip(doubts, -MOST_DOUBT, MOST_DOUBT)


def anchors_of(done: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The incumbents where tangents are taken, in order: a function of the finished trials alone.

    The first is where the first step begins.
    """
    anchors: list[FrozenTrial] = []
    best: FrozenTrial | None = None
    failures = 0

    def stale() -> bool:
        return best is not None and (
            not anchors or apart(best, anchors[-1]) >= STALE_CHANGES or failures >= STALE_FAILURES
        )

    for trial in done:
        stepped = trial.user_attrs["move"] == STEP
        if stepped and stale():
            assert best is not None
            anchors.append(best)
            failures = 0
        if complete(trial) and (best is None or kl_of_trial(trial) < kl_of_trial(best)):
            best, failures = trial, 0
        elif stepped:
            failures += 1
    return [*anchors, best] if best is not None and stale() else anchors


def recent(anchors: Sequence[FrozenTrial]) -> list[tuple[int, FrozenTrial]]:
    """The last anchors, numbered, those with other global choices than the last one left out."""
    return [
        (number, anchor)
        for number, anchor in list(enumerate(anchors))[-RECENT:]
        if outer(anchor) == outer(anchors[-1])
    ]


def complete(trial: FrozenTrial) -> bool:
    """Whether a trial was measured on all sequences."""
    return trial.state == TrialState.COMPLETE


def kl_of_trial(trial: FrozenTrial) -> float:
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


def of_trial(
    problem: Problem, trial: FrozenTrial
) -> tuple[Globals, list[list[Choice]], tuple[int, ...]]:
    """A trial's global choice, the groups it gives, and the options taken."""
    chosen = globals_of(problem, trial.params)
    return chosen, problem.groups(chosen), tuple(trial.user_attrs["choice"])


def against(costs: Floats, groups: Sequence[Sequence[Choice]], choice: Sequence[int]) -> Floats:
    """Costs [options] minus that of the option which each group takes."""
    ends = np.cumsum([0, *map(len, groups)])
    parts = [
        costs[start:end] - costs[start + taken]
        for (start, end), taken in zip(pairwise(ends), choice, strict=True)
    ]
    found: Floats = np.concatenate(parts)
    return found


def slope_of(problem: Problem, point: Tangent, number: int, option: Option) -> float:
    """First-order change of the KL from a whole BF16 block to an option, nats per token."""
    rows = option_rows(problem, Scores(point.slope, {}, {}, point.length), number, option)
    return float(rows.mean()) / point.length


def option_rows(problem: Problem, scores: Scores, number: int, option: Option) -> Tensor:
    """Summed contributions [rows] of a block's option, against the whole block in BF16.

    Of a repaired option as much as its repair leaves of the block's error.
    """
    block = problem.teacher.blocks[number]
    if option.removed:
        return -whole(scores, block)
    rows = change(scores, block, problem.keep_of(number, option), option.format)
    return rows * math.sqrt(problem.left(number, option))
