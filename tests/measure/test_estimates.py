"""Estimates: values, standard errors, and those of paired differences."""

import math

import numpy as np
import pytest

from compress.measure.estimates import difference, exponential, mean_of, pooled, ratio_of


def test_paired_standard_error_is_that_of_the_differences() -> None:
    a, b = mean_of([1.0, 2.0, 3.0, 4.0]), mean_of([1.5, 2.5, 3.0, 5.0])
    change, stderr = difference(a, b)
    # Differences .5 .5 0 1: mean .5, standard deviation sqrt(1/6), over sqrt(4).
    assert change == pytest.approx(0.5)
    assert stderr == pytest.approx(math.sqrt(1 / 6) / 2)
    assert a.stderr == pytest.approx(math.sqrt(5 / 3) / 2)


def test_a_constant_offset_has_no_paired_error() -> None:
    values = np.random.default_rng(1).normal(size=50)
    _, stderr = difference(mean_of(values), mean_of(values + 0.25))
    assert stderr == pytest.approx(0, abs=1e-12)


def test_one_sample_has_no_standard_error() -> None:
    assert mean_of([1.0]).stderr is None


def test_influence_values_average_to_the_value() -> None:
    draw = np.random.default_rng(2)
    ratio = ratio_of(draw.random(40), 1 + draw.random(40))
    for estimate in (ratio, exponential(ratio), pooled([ratio, exponential(ratio)])):
        assert estimate.influence.mean() == pytest.approx(estimate.value)


def test_ratio_error_agrees_with_resampling() -> None:
    draw = np.random.default_rng(3)
    below = 1 + draw.random(400)
    above = 0.5 * below + 0.1 * draw.random(400)
    picks = draw.integers(0, 400, (4000, 400))
    resampled = above[picks].sum(1) / below[picks].sum(1)
    assert ratio_of(above, below).stderr == pytest.approx(resampled.std(), rel=0.1)


def test_perplexities_beyond_floats_are_infinite_and_have_no_error() -> None:
    huge = exponential(mean_of([1000.0, 2000.0]))
    assert huge.value == math.inf
    assert huge.stderr is None
