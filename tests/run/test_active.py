"""A bound on the parameters that one token uses: kept, exact, refused with what is reachable."""

import random
from dataclasses import replace

import pytest

from compress.core.errors import Infeasible, InputError
from compress.model.families import block_active, count_active, outside_count, parameters
from compress.run.recipe import check
from compress.searches.baselines import randomly, uniform
from compress.searches.knapsack import value
from compress.searches.problem import Globals, Problem, taken, total_bytes
from compress.searches.proposals import require_feasible, seeds
from teachers import DEPLOYMENT, Teacher, first_candidates


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return Teacher(request.getfixturevalue(f"tiny_{request.param}"))


def bounded(teacher: Teacher, share: float, active_share: float, space: str = "joint") -> Problem:
    active = int(count_active(teacher.architecture) * active_share)
    return replace(teacher.problem(space, share), active=active)


@pytest.mark.parametrize("space", ["joint", "puzzle", "minipuzzle"])
def test_active_parameters_in_the_knapsack_are_those_of_the_architecture(
    teacher: Teacher, space: str
) -> None:
    problem, draw = bounded(teacher, 2.0, 1.0, space), random.Random(1)
    assert problem.active is not None
    for share in (1.0, *(problem.space.axes["hidden"].keep if space == "joint" else ())):
        globals_ = Globals(shares={"hidden": share})
        groups = problem.groups(globals_)
        [limit] = problem.knapsack(groups, globals_).limits
        for _ in range(8):
            choice = [draw.randrange(len(options)) for options in groups]
            candidate = problem.candidate("x", "x", taken(groups, choice), globals_)
            counted = value(limit.amounts, choice) + problem.active - limit.bound
            assert counted == count_active(candidate.architecture)


def test_only_idle_experts_do_not_count(teacher: Teacher) -> None:
    whole = teacher.architecture
    for number, block in enumerate(whole.blocks):
        own = [p for p in parameters(whole) if p.block == number]
        idle = sum(p.count for p in own if p.expert is not None and p.expert >= block.top_k)
        counted = sum(p.count for p in own) - idle
        assert block_active(block, whole.hidden, whole.family) == counted
    assert outside_count(whole) == sum(p.count for p in parameters(whole) if p.block is None)


@pytest.mark.parametrize("shares", [(0.6, 0.9), (0.9, 0.6), (0.5, 0.55)])
def test_no_candidate_exceeds_either_bound(teacher: Teacher, shares: tuple[float, float]) -> None:
    problem = bounded(teacher, *shares)
    found = first_candidates(problem)
    puzzle = bounded(teacher, *shares, "puzzle")
    found += [c for c, _ in [*uniform(puzzle), *randomly(puzzle, 4, seed=0)]]
    assert found
    assert problem.active is not None
    for candidate in found:
        assert total_bytes(candidate, DEPLOYMENT) <= problem.budget
        assert count_active(candidate.architecture) <= problem.active


def test_a_bound_on_active_parameters_changes_what_is_chosen(teacher: Teacher) -> None:
    free = first_candidates(teacher.problem("joint", 0.6))[0]
    active = count_active(free.architecture) - 1
    [first, *_] = first_candidates(replace(teacher.problem("joint", 0.6), active=active))
    assert first.architecture != free.architecture


@pytest.mark.parametrize("space", ["joint", "formats", "minipuzzle"])
def test_an_impossible_bound_names_a_number_that_is_reached(teacher: Teacher, space: str) -> None:
    problem = replace(teacher.problem(space, 0.9), active=1)
    with pytest.raises(Infeasible, match="active_parameters 1 is below the fewest") as caught:
        require_feasible(problem)
    fewest = int(str(caught.value).partition("(")[2].partition(" active")[0])
    reached = first_candidates(replace(problem, active=fewest))
    assert {count_active(candidate.architecture) for candidate in reached} == {fewest}
    with pytest.raises(Infeasible, match=f"{fewest} active"):
        seeds(replace(problem, active=fewest - 1))


def test_the_recipe_takes_a_count() -> None:
    assert check({"active_parameters": "1.2B"}, "x").active_parameters == "1.2B"
    with pytest.raises(InputError, match=r"active_parameters .* is not understood"):
        check({"active_parameters": "1.2 GiB"}, "x")
