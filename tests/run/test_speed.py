"""A bound on what a profile predicts: exact in the knapsack, kept, or refused in words."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from profiles import invented_profile

from compress.core.errors import Infeasible
from compress.memory.latency import SpeedBound
from compress.searches.baselines import randomly, uniform
from compress.searches.knapsack import value
from compress.searches.problem import Globals, Problem, taken, total_bytes
from compress.searches.proposals import require_feasible
from teachers import DEPLOYMENT, Teacher, first_candidates


@pytest.fixture(scope="module")
def teacher(tiny_llama: Path) -> Teacher:
    return Teacher(tiny_llama)


def bounded(teacher: Teacher, share: float, times: float, space: str = "joint") -> Problem:
    """A problem whose students take so many times the teacher's seconds at most."""
    profile = invented_profile(teacher.architecture)
    whole = profile.model(teacher.architecture)
    speed = SpeedBound(profile, prompt=whole.prompt * times, token=whole.token * times)
    return replace(teacher.problem(space, share), speed=speed)


@pytest.mark.parametrize("space", ["joint", "minipuzzle"])
def test_seconds_in_the_knapsack_are_those_of_the_profile(teacher: Teacher, space: str) -> None:
    problem, draw = bounded(teacher, 2.0, 1.0, space), random.Random(1)
    assert problem.speed is not None
    groups = problem.groups(Globals())
    limits = problem.knapsack(groups, Globals()).limits
    for _ in range(8):
        choice = [draw.randrange(len(options)) for options in groups]
        candidate = problem.candidate("x", "x", taken(groups, choice), Globals())
        seconds = problem.speed.profile.model(candidate.architecture)
        for limit, (name, most) in zip(limits, problem.speed.bounds.items(), strict=True):
            counted = value(limit.amounts, choice) + math.floor(most * 1e9) - limit.bound
            # Each block's nanoseconds are rounded up.
            expected = getattr(seconds, name) * 1e9
            assert expected <= counted + 1e-3 <= expected + len(groups) + 2


@pytest.mark.parametrize("shares", [(0.9, 0.6), (0.5, 0.8)])
def test_no_candidate_is_slower_than_asked(teacher: Teacher, shares: tuple[float, float]) -> None:
    problem, puzzle = bounded(teacher, *shares), bounded(teacher, *shares, "puzzle")
    found = first_candidates(problem)
    found += [c for c, _ in [*uniform(puzzle), *randomly(puzzle, 4, seed=0)]]
    assert found
    assert problem.speed is not None
    for candidate in found:
        assert total_bytes(candidate, DEPLOYMENT) <= problem.budget
        assert problem.speed.kept(candidate.architecture)


def test_a_speed_out_of_reach_is_refused_with_the_fastest(teacher: Teacher) -> None:
    require_feasible(bounded(teacher, 0.9, 0.9))
    with pytest.raises(Infeasible, match=r"fastest that this space reaches.*ms of a prompt"):
        require_feasible(bounded(teacher, 0.9, 0.01))
