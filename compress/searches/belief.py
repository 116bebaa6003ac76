"""What measured candidates say about the costs of options: a Gaussian belief over the knapsack's.

The knapsack picks the options whose costs are most underrated. So the costs are not numbers but a
belief with a mean and a deviation, and every measured candidate corrects all options it consists
of, in proportion to how uncertain each was (linear regression with a Gaussian prior; Rasmussen and
Williams 2006, section 2.1). A draw from the belief proposes the next candidate (Thompson 1933).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from compress.searches.program import Floats


@dataclass(frozen=True)
class Belief:
    """A Gaussian over the options' costs, nats per token: a prior and what measurements changed.

    The prior covariance is that of independent errors of ``deviation`` [options] and of common ones
    along ``factors`` [options, factors]; ``gain`` and ``moves`` carry the measurements.
    """

    prior: Floats
    deviation: Floats
    factors: Floats
    moves: Floats
    gain: Floats
    seen: Floats
    noise: Floats

    @property
    def mean(self) -> Floats:
        """Expected cost of every option."""
        return self.corrected(self.prior, self.seen)

    def corrected(self, costs: Floats, seen: Floats) -> Floats:
        """Costs after observations."""
        found: Floats = costs + self.gain @ (seen - self.moves @ costs)
        return found

    def deviation_of(self, move: Floats) -> float:
        """Deviation of the sum of costs that a move changes, [options], after observations."""
        spread = self.deviation**2 * move + self.factors @ (self.factors.T @ move)
        variance = float(move @ spread - (self.moves @ spread) @ (self.gain.T @ move))
        return math.sqrt(max(0.0, variance))

    def draw(self, random: np.random.Generator) -> Floats:
        """One draw of all costs: of the prior, then corrected as the mean is (Matheron's rule)."""
        costs = self.prior + self.deviation * random.standard_normal(len(self.prior))
        costs += self.factors @ random.standard_normal(self.factors.shape[1])
        return self.corrected(
            costs, self.seen + self.noise * random.standard_normal(len(self.seen))
        )


def belief(
    prior: Floats, deviation: Floats, factors: Floats, moves: Floats, seen: Floats, noise: Floats
) -> Belief:
    """The belief after observations.

    Args:
        prior: expected cost of every option, [options].
        deviation: how far off each may be on its own, [options].
        factors: how far off all may be together, [options, factors]: a column is the change of all
            costs at one deviation of what they have in common.
        moves: [observations, options], 1 where a candidate takes an option that the reference does
            not, -1 where it gives one up.
        seen: KL of the candidate minus that of the reference, [observations].
        noise: deviation of an observation from the sum of its options' costs, [observations].
    """
    spread = moves * deviation**2 + moves @ factors @ factors.T
    within = spread @ moves.T + np.diag(noise**2)
    gain: Floats = np.zeros((len(prior), 0))
    if len(seen):
        gain = np.asarray(np.linalg.solve(within, spread), dtype=np.float64).T
    return Belief(prior, deviation, factors, moves, gain, seen, noise)


def flat(choice: Sequence[int], offsets: Sequence[int], size: int) -> Floats:
    """A choice of one option per group as an indicator over all options."""
    found = np.zeros(size)
    found[[offset + option for offset, option in zip(offsets, choice, strict=False)]] = 1.0
    return found


def improvement(mean: float, deviation: float) -> float:
    """Expected improvement of a Gaussian change of the KL: E[max(0, -change)] (Mockus 1975)."""
    if deviation == 0:
        return max(0.0, -mean)
    z = -mean / deviation
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float(deviation * (z * ndtr(z) + density))
