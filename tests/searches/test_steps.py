"""Steps from an incumbent: what is believed of options' costs, and a study that uses it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial

from compress.model.build import load_model
from compress.scores.costs import kl_of, whole
from compress.scores.tangent import Tangent, tangent, turn
from compress.searches.belief import belief, flat, improvement
from compress.searches.knapsack import Overlap, solve, value
from compress.searches.moves import propose
from compress.searches.prices import (
    STALE_FAILURES,
    STEP,
    Prices,
    Pricing,
    against,
    alike_within,
    anchors_of,
    bounded,
    slope_of,
)
from compress.searches.proposals import decode, distributions, key_of, neutral, seeds
from compress.searches.space import REMOVED, Option
from compress.searches.steps import REACH, belief_of, formats_kept, stepped
from compress.searches.study import explore
from compress.student.candidate import Candidate
from teachers import Teacher, settings, shown


@pytest.fixture(scope="module")
def hybrid(tiny_hybrid: Path) -> Teacher:
    return Teacher(tiny_hybrid)


def linearizer(teacher: Teacher) -> Callable[[Candidate, int], Tangent]:
    model, formats = load_model(teacher.path), ["fp8", "nvfp4"]
    return lambda candidate, number: tangent(model, candidate, turn(teacher.text, number), formats)


PRIOR, DOUBT = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 0.5, 0.5, 1.0])
ALONE = np.zeros((4, 0))


def test_without_measurements_a_belief_is_its_prior() -> None:
    known = belief(PRIOR, DOUBT, ALONE, np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    assert np.array_equal(known.mean, PRIOR)
    draws = np.array([known.draw(np.random.default_rng(n)) for n in range(2000)])
    assert draws.std(0) == pytest.approx(DOUBT, rel=0.1)


def test_a_sure_measurement_is_believed_and_shared_by_doubt() -> None:
    moves = np.array([[0.0, 1.0, 0.0, 1.0]])
    known = belief(PRIOR, DOUBT, ALONE, moves, np.array([9.0]), np.array([1e-6]))
    assert float(moves[0] @ known.mean) == pytest.approx(9.0, abs=1e-4)
    # Five nats more than expected: variances are 1 to 4.
    assert known.mean == pytest.approx([0.0, 2.0, 2.0, 7.0], abs=1e-4)
    assert float(moves[0] @ known.draw(np.random.default_rng(0))) == pytest.approx(9.0, abs=1e-4)


def test_an_unsure_measurement_changes_little() -> None:
    moves = np.array([[0.0, 1.0, 0.0, 1.0]])
    known = belief(PRIOR, DOUBT, ALONE, moves, np.array([9.0]), np.array([100.0]))
    assert known.mean == pytest.approx(PRIOR, abs=0.01)


def test_what_a_kind_has_in_common_is_learned_from_one_measurement_of_it() -> None:
    # Options 0 and 1 are of one kind, 2 and 3 of another; all of their doubt is common.
    factors = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 3.0]])
    moves = np.array([[1.0, 0.0, 0.0, 0.0]])
    prior = np.array([1.0, 2.0, 2.0, 3.0])
    known = belief(prior, np.zeros(4), factors, moves, np.array([1.5]), np.array([1e-6]))
    assert known.mean == pytest.approx([1.5, 3.0, 2.0, 3.0], abs=1e-4)


def test_a_draw_errs_alone_and_in_common() -> None:
    factors = np.array([[1.0], [0.5], [0.0], [-1.0]])
    known = belief(PRIOR, DOUBT, factors, np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    draws = np.array([known.draw(np.random.default_rng(n)) for n in range(4000)])
    expected = np.diag(DOUBT**2) + factors @ factors.T
    assert np.cov(draws.T) == pytest.approx(expected, abs=0.1)


def test_the_deviation_of_a_move_is_that_of_its_draws() -> None:
    factors = np.array([[1.0], [0.5], [0.0], [-1.0]])
    moves, seen = np.array([[0.0, 1.0, 0.0, 1.0]]), np.array([9.0])
    known = belief(PRIOR, DOUBT, factors, moves, seen, np.array([0.3]))
    draws = np.array([known.draw(np.random.default_rng(n)) for n in range(4000)])
    for move in (np.array([-1.0, 1.0, 0.0, 0.0]), np.array([-1.0, 1.0, -1.0, 1.0])):
        assert known.deviation_of(move) == pytest.approx((draws @ move).std(), rel=0.05)
    assert known.deviation_of(moves[0]) < 0.3


@pytest.mark.parametrize(("mean", "deviation"), [(-1.0, 0.5), (0.0, 1.0), (0.4, 0.8)])
def test_expected_improvement_is_the_mean_of_what_a_change_gains(
    mean: float, deviation: float
) -> None:
    changes = np.random.default_rng(0).normal(mean, deviation, 400_000)
    expected = np.maximum(0, -changes).mean()
    assert improvement(mean, deviation) == pytest.approx(expected, rel=0.01)


def test_a_sure_change_improves_by_itself_and_a_hopeless_one_by_nothing() -> None:
    assert improvement(-2.0, 0.0) == 2.0
    assert improvement(2.0, 0.0) == 0.0
    assert 0 <= improvement(50.0, 1.0) < 1e-30


def test_a_step_that_keeps_formats_changes_none_of_a_block_that_stays(hybrid: Teacher) -> None:
    problem = hybrid.problem("joint", 0.5)
    proposal = decode(problem, neutral(problem))
    assert proposal is not None
    groups = proposal.groups
    # The last option of a block is to go.
    picked = (len(groups[0]) - 1, *proposal.choice[1:])
    knapsack = problem.knapsack(groups, proposal.chosen)
    now = {n: o for options, i in zip(groups, picked, strict=True) for n, o in options[i]}
    assert now[0].removed
    assert len({o.format for n, o in now.items() if n}) > 1
    kept = replace(knapsack, limits=[formats_kept(groups, picked)])
    structures, back = set(), set()
    for number in range(40):
        random = np.random.default_rng(number)
        costs = [random.random(len(options)) for options in groups]
        solution = solve(replace(kept, costs=costs), [Overlap(picked, len(groups) - 1)])
        assert solution is not None
        found = {n: o for g, i in zip(groups, solution.choice, strict=True) for n, o in g[i]}
        stay = [n for n in found if not (found[n].removed or now[n].removed)]
        assert all(found[n].format == now[n].format for n in stay)
        structures.add(solution.choice)
        back.add(found[0].format)
    assert len(structures) > 20
    # A block that comes back takes any that is in use.
    assert len(back) > 1


def test_every_other_step_changes_cuts_alone(hybrid: Teacher) -> None:
    problem = hybrid.problem("joint", 0.5)
    params, proposal = seeds(problem)[0]
    done: list[FrozenTrial] = []
    rounded = []
    # Few enough that there are new cuts of these formats.
    for number in range(8):
        made = trial(number, "step", list(proposal.choice), None if done else 1.0)
        made.params, made.distributions = dict(params), distributions(problem)
        made.set_user_attr("key", key_of(problem, proposal))
        done.append(made)
        move = propose(Pricing(problem), done, [], [], seed=0)
        assert move is not None
        assert move.proposal is not None
        params, proposal = move.params, move.proposal
        if move.name == STEP:
            kept = formats_kept(proposal.groups, done[0].user_attrs["choice"])
            changed = value(kept.amounts, proposal.choice)
            rounded += [changed] if len(done) % 2 == 0 else []
            assert changed == 0 or len(done) % 2 == 0
    assert any(rounded)


def test_trials_within_reach_correct_prices_and_others_do_not() -> None:
    groups = 20
    offsets = [2 * number for number in range(groups + 1)]
    cost = np.tile([0.0, 0.1], groups)
    prices = Prices(cost, 0.04 * np.ones(2 * groups), 0.4 * cost[:, None])
    best = trial(0, "seed", [0] * groups, 1.0)
    near = trial(1, "step", [1] * 4 + [0] * (groups - 4), 2.0)
    most = int(REACH * groups)
    far = trial(2, "seed", [1] * (most + 1) + [0] * (groups - most - 1), 2.0)
    assert np.array_equal(belief_of(prices, [best, far], best, offsets).mean, cost)
    corrected = belief_of(prices, [best, near], best, offsets).mean
    assert corrected[1] > 2 * cost[1]
    both = belief_of(prices, [best, near, far], best, offsets).mean
    assert np.array_equal(both, corrected)


def test_an_option_of_large_cost_is_never_a_step(hybrid: Teacher) -> None:
    # All options are within this budget, and all but two of them cost ten nats, give or take four.
    problem = hybrid.problem("puzzle", 1.0)
    proposal = seeds(problem)[0][1]
    sizes = [len(options) for options in proposal.groups]
    starts = np.cumsum([0, *sizes])[:-1]
    costs = np.full(sum(sizes), 10.0)
    costs[starts + np.array(proposal.choice)] = 0.0
    # Taken beside the incumbent's, these gain nothing but doubt.
    mild = starts[:2] + (np.array(proposal.choice[:2]) + 1) % np.array(sizes[:2])
    costs[mild] = 0.01
    prices = Prices(costs, bounded(0.4 * costs), bounded(0.4 * costs[:, None]))
    best = trial(0, "seed", list(proposal.choice), 1.0)
    for seed in range(5):
        step = stepped(problem, [best], best, prices, lambda p: p.choice != proposal.choice, seed)
        assert step is not None
        assert step.choice[2:] == proposal.choice[2:]


def test_flat_marks_one_option_of_every_group() -> None:
    assert flat([1, 0, 2], [0, 2, 3], 6).tolist() == [0, 1, 1, 0, 0, 1]


def test_at_the_teacher_the_slope_is_nothing_and_the_curvature_is_the_score(
    hybrid: Teacher,
) -> None:
    problem = hybrid.problem("puzzle", 1.0)
    proposal = decode(problem, neutral(problem))
    assert proposal is not None
    teacher = problem.candidate("whole", "x", proposal.picked, proposal.chosen)
    point, pricing = linearizer(hybrid)(teacher, 0), Pricing(problem)
    assert float(point.kl.abs().max()) < 1e-6
    for number, block in enumerate(hybrid.architecture.blocks):
        kept, gone = ((number, Option()),), ((number, REMOVED),)
        assert slope_of(problem, point, *kept[0]) == 0
        assert slope_of(problem, point, *gone[0]) == pytest.approx(0, abs=1e-3)
        rows = whole(hybrid.scores, block)
        [change] = pricing.changes([[kept, gone]], [0])
        assert not change[0].any()
        assert np.square(change[1]).sum() == pytest.approx(kl_of(rows, hybrid.scores.length))
        [back] = pricing.changes([[kept, gone]], [1])
        assert np.array_equal(back[0], -change[1])


def test_options_that_change_the_same_err_alike_and_those_of_other_groups_do_not() -> None:
    one, two = np.zeros((4, 8)), np.random.default_rng(0).normal(size=(3, 8))
    one[1, :2], one[2, :2], one[3, :2] = (1.0, 2.0), (2.0, 4.0), (-3.0, -6.0)
    found = alike_within([one, two])
    within = found @ found.T
    # Twice as much errs with it, giving back against it; the option taken has no error.
    expected = np.array([[0, 0, 0, 0], [0, 1, 1, -1], [0, 1, 1, -1], [0, -1, -1, 1]])
    assert within[:4, :4] == pytest.approx(expected)
    assert not within[:4, 4:].any()
    unit = two / np.linalg.norm(two, axis=1, keepdims=True)
    assert within[4:, 4:] == pytest.approx(unit @ unit.T)


@pytest.mark.parametrize("blind", [False, True])
def test_costs_by_kind_add_up_to_the_costs_of_the_options(hybrid: Teacher, blind: bool) -> None:
    problem = replace(hybrid.problem("joint", 0.5), blind_to_rounding=blind)
    proposal = decode(problem, neutral(problem))
    assert proposal is not None
    groups = problem.groups(proposal.chosen)
    choice = [0] * len(groups)
    costs = np.concatenate(problem.knapsack(groups, proposal.chosen).costs)
    parts = Pricing(problem).by_kind(groups, choice)
    assert parts.sum(1) == pytest.approx(against(costs, groups, choice))
    assert bool(parts[:, -1].any()) is not blind
    kinds = sorted({block.kind for block in hybrid.architecture.blocks})
    options = [option for group in groups for option in group]
    for column, kind in enumerate(kinds):
        touched = [any(problem.teacher.blocks[n].kind == kind for n, _ in o) for o in options]
        assert not parts[[not t for t in touched], column].any()


def trial(number: int, move: str, choice: list[int], value: float | None) -> FrozenTrial:
    """A finished trial; without a value one that was stopped early."""
    made = create_trial(
        state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
        value=value,
        user_attrs={"move": move, "choice": choice, "values": [9.0 if value is None else value]},
    )
    made.number = number
    return made


def test_tangents_are_taken_where_the_steps_are_and_again_after_failures() -> None:
    seed, other = trial(0, "seed", [0] * 6, 2.0), trial(1, "seed", [1] * 6, 3.0)
    assert anchors_of([]) == []
    assert anchors_of([other, seed]) == [seed]
    failed = [trial(2 + n, "step", [n, 1, 0, 0, 0, 0], None) for n in range(STALE_FAILURES)]
    assert anchors_of([other, seed, *failed[:-1]]) == [seed]
    assert anchors_of([other, seed, *failed]) == [seed, seed]
    near = trial(8, "step", [1, 1, 1, 0, 0, 0], 1.5)
    assert anchors_of([other, seed, near]) == [seed]
    far = trial(9, "step", [1, 1, 1, 1, 0, 0], 1.4)
    assert anchors_of([other, seed, near, far]) == [seed, far]
    assert anchors_of([other, seed, near, far, *failed]) == [seed, far, far]


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
