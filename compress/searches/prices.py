"""What options cost around the incumbent: a Gaussian belief, corrected by what was measured.

Costs at the teacher add up poorly once a third of it is gone: what a block is worth depends on what
is left around it. So an option costs the mean of what the teacher's scores say and of what the
slope of the KL at the incumbent says. The knapsack picks the options whose costs are most
underrated: a measured trial corrects those that it takes or gives up, in proportion to how
uncertain each was (linear regression with a Gaussian prior; Rasmussen and Williams 2006,
section 2.1).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from optuna.trial import FrozenTrial
from torch import Tensor

from compress.formats.table import Format
from compress.scores.costs import Scores, cut_rows, rounding_rows, whole
from compress.scores.tangent import Tangent
from compress.searches.problem import Choice, Parts, Problem
from compress.searches.program import Floats
from compress.searches.proposals import candidate_of, decode_trial, incumbent
from compress.searches.space import Option
from compress.student.candidate import Candidate

# The tangent at a candidate, on the part of the text of this number.
Linearize = Callable[[Candidate, int], Tangent]

# The share of the Gauss-Newton curvature that predicts finite changes best: drawn labels overrate
# large steps. Measured on SmolLM2 at 50 % of its blocks (runs/LOG.md).
CURVATURE = 0.55
# How far off a cost may be, as a share of the sizes that it is made of; in nats at most so much: a
# cost many times what steps gain may be far off, but is no gain.
DOUBT, MOST_DOUBT = 0.4, 0.1
# A trial differs from the sum of its options' costs by about so much an option.
NOISE = 0.01
# A trial that differs in more than this share of the groups says nothing of the costs here: slopes
# do not reach so far.
REACH = 1 / 2
# A tangent serves so many trials; the next one is of another part of the text.
TANGENT_TRIALS = 6


@dataclass
class Pricing:
    """Prices of a problem's options as trials come in; what steps ask for again is kept.

    Without ``linearize`` options are priced by the teacher's scores alone. ``seeds`` trials come
    before the first step.
    """

    problem: Problem
    seeds: int = 0
    linearize: Linearize | None = None
    anchor: tuple[int, int] | None = None
    tangent: Scores | None = None
    slopes: dict[Choice, float] = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)
    rows: dict[Choice, Floats] = field(default_factory=dict)

    def prepare(self, done: Sequence[FrozenTrial]) -> None:
        """Take the tangent that the next step needs, if it is not at hand."""
        if self.linearize is None or len(done) < self.seeds or incumbent(done) is None:
            return
        number, trial = anchor_of(done, self.seeds)
        if self.anchor != (number, trial.number):
            proposal = decode_trial(self.problem, trial)
            made = candidate_of(self.problem, "anchor", trial.number, proposal)
            point = self.linearize(made, number)
            mean = {key: rows.mean(0, keepdim=True) for key, rows in point.slope.items()}
            self.tangent = Scores(mean, {}, {}, point.length)
            self.slopes, self.parts = {}, {}
            self.anchor = (number, trial.number)

    def around(
        self,
        groups: Sequence[Sequence[Choice]],
        here: Sequence[int],
        seen: Mapping[tuple[int, ...], float],
    ) -> tuple[Floats, Floats]:
        """What the groups' options cost against those here, flat, and how far off each may be.

        ``here`` is the index of the incumbent's option in every group, ``seen`` by how much the KL
        of measured choices is above the incumbent's.
        """
        pairs = [(o, options[i]) for options, i in zip(groups, here, strict=True) for o in options]
        teacher = np.array([self.problem.price(a) - self.problem.price(b) for a, b in pairs])
        changes = (self.rows_of(a) - self.rows_of(b) for a, b in pairs)
        curvature = np.array([np.square(rows).sum() for rows in changes])
        prior, size = teacher, np.abs(teacher)
        if self.tangent is not None:
            slope = np.array([self.slope_of(a) - self.slope_of(b) for a, b in pairs])
            prior = (teacher + slope + CURVATURE * curvature) / 2
            size = (np.abs(teacher) + np.abs(slope)) / 2
        # What gives up as much as it takes back costs nothing more, as far as one knows.
        doubt = np.minimum(MOST_DOUBT, DOUBT * np.maximum(size, curvature))
        starts = np.cumsum([0, *map(len, groups)])[:-1]
        reached = [c for c in seen if apart(c, here) <= REACH * len(groups)]
        moves = np.zeros((len(reached), len(pairs)))
        for row, choice in zip(moves, reached, strict=True):
            row[starts + here] -= 1
            row[starts + choice] += 1
        noise = NOISE * np.abs(moves).sum(1) / 2
        return corrected(prior, doubt, moves, np.array([seen[c] for c in reached]), noise)

    def rows_of(self, choice: Choice) -> Floats:
        """Contributions of a group's option against whole blocks, those of its blocks in turn.

        The squared length of a difference is the second-order KL of the change.
        """
        if choice not in self.rows:
            known = self.problem.known
            rows = [option_rows(self.problem, known, self.problem.rows, *pair) for pair in choice]
            share = 2 * known.length * len(rows[0])
            self.rows[choice] = (torch.cat(rows) / math.sqrt(share)).double().numpy()
        return self.rows[choice]

    def slope_of(self, choice: Choice) -> float:
        """First-order change of the KL around the anchor, from whole blocks to an option.

        Of formats of caches, embedding and head what the scores say: a tangent has no gate for
        them.
        """
        if choice not in self.slopes:
            assert self.tangent is not None
            own = self.problem, self.tangent, self.parts
            rows = [option_rows(*own, *pair) for pair in choice]
            held = sum(self.problem.exact_cost(*pair) for pair in choice)
            self.slopes[choice] = float(torch.cat(rows).sum()) / self.tangent.length + held
        return self.slopes[choice]


def corrected(
    prior: Floats, doubt: Floats, moves: Floats, seen: Floats, noise: Floats
) -> tuple[Floats, Floats]:
    """Expected costs of options after measurements, and how far off each still is.

    Args:
        prior: expected costs before, [options].
        doubt: how far off each is, on its own, [options].
        moves: [measurements, options], 1 where an option is taken, -1 where one is given up.
        seen: change of the KL, [measurements].
        noise: how far that is from the sum of the options' costs, [measurements].
    """
    spread = moves * doubt**2
    gain = np.linalg.solve(spread @ moves.T + np.diag(noise**2), spread)
    mean: Floats = prior + (seen - moves @ prior) @ gain
    variance = doubt**2 - (spread * gain).sum(0)
    return mean, np.sqrt(np.maximum(0, variance))


def option_rows(
    problem: Problem, scores: Scores, known: Parts, number: int, option: Option
) -> Tensor:
    """Summed contributions [rows] of a block's option, against the whole block in BF16.

    Of a cut as much as its repair leaves of the block's error. Options are made of the same parts,
    which are ``known`` once they were asked for.
    """
    if number == problem.outside:
        return torch.zeros(len(scores.contributions["hidden"]))
    block = problem.teacher.blocks[number]
    if option.removed:
        return -whole(scores, block)
    keep = problem.keep_of(number, option)

    def part(group: str, format: Format) -> Tensor:
        key = (number, option.target, group, format)
        if key not in known:
            own = scores, block, keep
            known[key] = rounding_rows(*own, group, format) if group else cut_rows(*own)
        return known[key]

    parts = [part(*pair) for pair in option.formats if pair[1] != "bf16"]
    rows = torch.stack([part("", "bf16"), *parts]).sum(0)
    return rows * math.sqrt(problem.share_left_by_repair(number, option))


def anchor_of(done: Sequence[FrozenTrial], seeds: int) -> tuple[int, FrozenTrial]:
    """Where the next step's tangent is taken, and how many were before: of finished trials alone.

    At the incumbent of a few trials ago; at the present one where global choices are others.
    """
    best = incumbent(done)
    assert best is not None
    number = (len(done) - seeds) // TANGENT_TRIALS
    then = incumbent(done[: seeds + number * TANGENT_TRIALS])
    return number, best if then is None or then.params != best.params else then


def apart(one: Sequence[int], other: Sequence[int]) -> int:
    """Groups in which two choices differ."""
    return sum(a != b for a, b in zip(one, other, strict=True))
