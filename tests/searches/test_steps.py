"""Steps from an incumbent: what its options are believed to cost, and a study that uses it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial

from compress.scores.costs import kl_of, whole
from compress.scores.tangent import Tangent, tangent, turn
from compress.searches.knapsack import Overlap, solve
from compress.searches.prices import (
    MOST_DOUBT,
    REACH,
    TANGENT_TRIALS,
    Pricing,
    anchor_of,
    corrected,
)
from compress.searches.problem import Problem, taken
from compress.searches.proposals import (
    Proposal,
    attributes_of,
    decode,
    decode_trial,
    distributions,
    globals_of,
    params_of,
    seeds,
)
from compress.searches.space import REMOVED, Option
from compress.searches.steps import formats_kept, place, propose
from compress.searches.study import explore
from compress.student.candidate import Candidate
from compress.sweep.stack import stack_of
from teachers import Teacher, settings, shown


@pytest.fixture(scope="module")
def hybrid(tiny_hybrid: Path) -> Teacher:
    return Teacher(tiny_hybrid)


def linearizer(teacher: Teacher) -> Callable[[Candidate, int], Tangent]:
    stack, formats = stack_of(teacher.checkpoint), ["fp8", "nvfp4"]
    return lambda candidate, number: tangent(stack, candidate, turn(teacher.text, number), formats)


def whole_teacher(problem: Problem) -> Proposal:
    found = decode(problem, globals_of(problem, {}))
    assert found is not None
    return found


def trial(problem: Problem, number: int, proposal: Proposal, value: float | None) -> FrozenTrial:
    """A finished trial; without a value one that was stopped early."""
    made = create_trial(
        state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
        value=value,
        params=params_of(problem, proposal.globals_),
        distributions=dict(distributions(problem)),
        # As they come out of the journal.
        user_attrs=json.loads(json.dumps(attributes_of(proposal)))
        | {"values": [9.0 if value is None else value]},
    )
    made.number = number
    return made


# Prices

PRIOR, DOUBT = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 0.5, 0.5, 1.0])
MOVES = np.array([[0.0, 1.0, 0.0, 1.0]])


def test_without_measurements_costs_and_doubts_stay() -> None:
    mean, doubt = corrected(PRIOR, DOUBT, np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    assert np.array_equal(mean, PRIOR)
    assert np.array_equal(doubt, DOUBT)


def test_a_sure_measurement_is_believed_and_shared_by_doubt() -> None:
    mean, doubt = corrected(PRIOR, DOUBT, MOVES, np.array([9.0]), np.array([1e-6]))
    assert float(MOVES[0] @ mean) == pytest.approx(9.0, abs=1e-4)
    # Five nats more than expected: variances are 1 to 4.
    assert mean == pytest.approx([0.0, 2.0, 2.0, 7.0], abs=1e-4)
    # What is left of their doubts is one and the same, of opposite sign; nobody tried the third.
    assert doubt == pytest.approx([0.0, 0.2**0.5, 0.5, 0.2**0.5], abs=1e-4)


def test_an_unsure_measurement_changes_little() -> None:
    mean, doubt = corrected(PRIOR, DOUBT, MOVES, np.array([9.0]), np.array([100.0]))
    assert mean == pytest.approx(PRIOR, abs=0.01)
    assert doubt == pytest.approx(DOUBT, abs=0.01)


def test_at_the_teacher_the_slope_is_nothing_and_the_curvature_is_the_score(
    hybrid: Teacher,
) -> None:
    problem = hybrid.problem("puzzle", 1.0)
    pricing = Pricing(problem, 0, linearizer(hybrid))
    pricing.prepare([trial(problem, 0, whole_teacher(problem), 1e-9)])
    for number, block in enumerate(hybrid.architecture.blocks):
        kept, gone = ((number, Option()),), ((number, REMOVED),)
        assert pricing.slope_of(kept) == 0
        assert pricing.slope_of(gone) == pytest.approx(0, abs=1e-3)
        assert not pricing.rows_of(kept).any()
        score = kl_of(whole(hybrid.scores, block), hybrid.scores.length)
        assert np.square(pricing.rows_of(gone)).sum() == pytest.approx(score)


def test_measurements_within_reach_correct_prices_and_others_do_not(hybrid: Teacher) -> None:
    problem = hybrid.problem("puzzle", 1.0)
    groups, pricing = problem.groups(globals_of(problem, {})), Pricing(problem)
    here, most = (0,) * len(groups), int(REACH * len(groups))

    def without(count: int) -> tuple[int, ...]:
        return tuple(len(options) - 1 if n < count else 0 for n, options in enumerate(groups))

    near, far = {without(most): 1.0}, {without(most + 1): 1.0}
    plain, doubt = pricing.around(groups, here, far)
    assert np.array_equal(plain, pricing.around(groups, here, {})[0])
    assert doubt.max() == MOST_DOUBT
    mean, less = pricing.around(groups, here, near | far)
    ends = np.cumsum(list(map(len, groups)))[:most] - 1
    assert abs(mean[ends].sum() - 1.0) < abs(plain[ends].sum() - 1.0) / 2
    assert (less[ends] < doubt[ends]).all()
    others = np.setdiff1d(np.arange(len(mean)), ends)
    assert np.array_equal(mean[others], plain[others])


def test_what_is_taken_costs_nothing_and_is_not_doubted(hybrid: Teacher) -> None:
    problem = hybrid.problem("joint", 0.5)
    here = whole_teacher(problem)
    groups, pricing = problem.groups(here.globals_), Pricing(problem, 0, linearizer(hybrid))
    pricing.prepare([trial(problem, 0, here, 1.0)])
    start = place(groups, here)
    assert start is not None
    assert taken(groups, start) == here.options
    mean, doubt = pricing.around(groups, start, {})
    own = np.cumsum([0, *map(len, groups)])[:-1] + start
    assert not mean[own].any()
    assert not doubt[own].any()
    assert (doubt > 0).sum() > len(groups)


def test_a_tangent_serves_a_few_trials_at_what_was_the_incumbent(hybrid: Teacher) -> None:
    problem = hybrid.problem("puzzle", 0.6)
    proposals = seeds(problem)
    count = len(proposals)
    done = [trial(problem, n, proposal, 2.0 + n) for n, proposal in enumerate(proposals)]
    best = done[0]
    for number in range(3 * TANGENT_TRIALS):
        times = number // TANGENT_TRIALS
        assert anchor_of(done, count) == (times, best)
        # The first step of all finds something better, which the second tangent is taken at.
        done.append(trial(problem, len(done), proposals[0], None if number else 1.0))
        if number % TANGENT_TRIALS == TANGENT_TRIALS - 1:
            best = done[count]


# Steps


def test_a_trial_of_the_journal_is_what_was_proposed_whatever_options_cost(
    hybrid: Teacher,
) -> None:
    for space in ("joint", "minitron"):
        problem = hybrid.problem(space, 0.75)
        # Nothing of it is needed but the names of its global variables.
        other = replace(hybrid.problem(space, 0.5), scores=None)
        for number, proposal in enumerate(seeds(problem)):
            found = decode_trial(other, trial(problem, number, proposal, 1.0))
            assert found.options == proposal.options
            assert params_of(other, found.globals_) == params_of(problem, proposal.globals_)


def test_a_step_that_keeps_formats_changes_none_of_a_block_that_stays(hybrid: Teacher) -> None:
    problem = hybrid.problem("joint", 0.5)
    found = whole_teacher(problem)
    here = replace(found, options=(REMOVED, *found.options[1:]))
    assert len({option.formats for option in here.options[1:]}) > 1
    groups = problem.groups(here.globals_)
    picked = [
        options.index(((number, here.options[number]),)) for number, options in enumerate(groups)
    ]
    knapsack = problem.knapsack(groups, here.globals_)
    kept = replace(knapsack, limits=[formats_kept(groups, here)])
    structures, back = set(), set()
    for number in range(40):
        random = np.random.default_rng(number)
        costs = [random.random(len(options)) for options in groups]
        overlap = Overlap(tuple(picked), len(groups) - 1)
        solution = solve(replace(kept, costs=costs), [overlap])
        assert solution is not None
        options = taken(groups, solution.choice)
        pairs = zip(here.options, options, strict=True)
        assert all(a.formats == b.formats for a, b in pairs if not (a.removed or b.removed))
        structures.add(options)
        back.add(options[0].formats)
    assert len(structures) > 20
    # A block that comes back takes any that is in use.
    assert len(back) > 1


def test_proposals_are_new_and_every_other_step_changes_cuts_alone(hybrid: Teacher) -> None:
    problem = hybrid.problem("joint", 0.5)
    first = seeds(problem)
    pricing = Pricing(problem, len(first))
    done = [trial(problem, n, proposal, 1.0 + n) for n, proposal in enumerate(first)]
    here, rounded = first[0], []
    for number in range(len(done), len(done) + 12):
        proposal = propose(pricing, first, done, [], seed=0)
        assert proposal is not None
        assert proposal.options not in {decode_trial(problem, t).options for t in done}
        if params_of(problem, proposal.globals_) == params_of(problem, here.globals_):
            pairs = zip(here.options, proposal.options, strict=True)
            changed = any(a.formats != b.formats for a, b in pairs if not (a.removed or b.removed))
            assert not changed or number % 2 == 0
            rounded.append(changed)
        done.append(trial(problem, number, proposal, None))
    assert any(rounded)


def test_a_study_with_tangents_is_one_function_of_its_seed(hybrid: Teacher, tmp_path: Path) -> None:
    problem, linearize = hybrid.problem("joint", 0.5), linearizer(hybrid)

    def study(name: str, trials: int) -> list[object]:
        options = settings(tmp_path / name, trials)
        return shown(explore(problem, options, hybrid.measure, linearize=linearize))

    once = study("once", 14)
    assert len({architecture for _, architecture, _, _ in once}) == 14
    study("twice", 9)
    assert study("twice", 14) == once


def test_steps_come_closer_than_the_seeds(hybrid: Teacher, tmp_path: Path) -> None:
    problem = hybrid.problem("puzzle", 0.6)
    options = settings(tmp_path / "journal.log", 24)
    found = explore(problem, options, hybrid.measure, linearize=linearizer(hybrid))
    kl = {int(t.candidate.id[-3:]): t.kl for t in found if t.complete}
    first = len(seeds(problem))
    assert min(kl.values()) < min(kl[n] for n in kl if n < first)
    assert torch.isfinite(torch.tensor(list(kl.values()))).all()
