"""A number measured on samples, its standard error, and the error of paired differences.

Every metric keeps one *influence value* per sample: for a mean the sample itself, for a ratio or a
perplexity its linearization (delta method). Then one formula serves all: the standard error is the
standard deviation of the values over sqrt(n), and that of a difference between two models on the
same samples is the same of the paired differences of the values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A measured value and the influence of each sample on it; samples are in a fixed order."""

    value: float
    influence: Values

    @property
    def stderr(self) -> float | None:
        """The standard error of the value; None for less than two samples."""
        return standard_error(self.influence)


def mean_of(values: ArrayLike) -> Estimate:
    """The mean over samples."""
    samples = np.asarray(values, dtype=np.float64)
    return Estimate(float(samples.mean()), samples)


def ratio_of(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """The sum of numerators over the sum of denominators: nats over bytes, say."""
    above, below = (np.asarray(part, dtype=np.float64) for part in (numerators, denominators))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(above.sum() / below.sum())
        return Estimate(ratio, ratio + (above - ratio * below) / below.mean())


def exponential(estimate: Estimate) -> Estimate:
    """The estimate as an exponent of e: a perplexity from nats, infinite beyond floats."""
    with np.errstate(over="ignore", invalid="ignore"):
        value = float(np.exp(estimate.value))
        return Estimate(value, value * (1 + estimate.influence - estimate.value))


def finite(value: float | None) -> float | None:
    """A value as JSON may hold it: null where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def difference(a: Estimate, b: Estimate) -> tuple[float, float | None]:
    """``b - a`` and its standard error, paired over the samples that both were measured on."""
    assert len(a.influence) == len(b.influence)
    with np.errstate(invalid="ignore"):
        return b.value - a.value, standard_error(b.influence - a.influence)


def pooled(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over the samples of several means, each sample counting alike."""
    return mean_of(np.concatenate([estimate.influence for estimate in estimates]))


def standard_error(values: Values) -> float | None:
    """Standard deviation (n - 1) over sqrt(n); None for less than two values or infinite ones."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(values.std(ddof=1) / math.sqrt(len(values)))
