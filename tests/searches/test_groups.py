"""Formats of linear groups: what is offered, what it costs, and what a search makes of it."""

import itertools
from dataclasses import replace

import pytest
import torch

from compress.formats.table import by_group, used_in
from compress.memory.footprint import block_bytes, footprint, group_bytes
from compress.model.families import in_one_format, linear_groups
from compress.scores.costs import change, kl_of, option_cost
from compress.scores.sensitivity import sensitivities
from compress.searches.curve import bits, format_curve
from compress.searches.problem import Globals, Problem
from compress.searches.proposals import candidate_of, decode
from compress.searches.space import block_options
from teachers import DEPLOYMENT, Teacher


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return Teacher(request.getfixturevalue(f"tiny_{request.param}"))


def in_scope(problem: Problem, scope: str) -> Problem:
    space = problem.space.model_copy(update={"format_scope": scope, "head_formats": ("bf16",)})
    return replace(problem, space=space, costs={}, keeps={})


def test_groups_that_agree_are_a_block_in_that_format(teacher: Teacher) -> None:
    whole, scores = teacher.architecture, teacher.scores
    for block in whole.blocks:
        groups = linear_groups(block, whole.family)
        for format in ("fp8", "nvfp4"):
            formats = in_one_format(block, whole.family, format)
            made = replace(block, formats=formats)
            each = (group_bytes(block, g, whole.hidden, whole.family, format) for g in groups)
            none = (group_bytes(block, g, whole.hidden, whole.family, "bf16") for g in groups)
            plain = block_bytes(block, whole.hidden, whole.family)
            assert block_bytes(made, whole.hidden, whole.family) == plain - sum(none) + sum(each)
            alone = [by_group(dict.fromkeys(groups, "bf16") | {g: format}) for g in groups]
            rows = torch.stack([change(scores, block, {}, own) for own in alone]).sum(0)
            cost = option_cost(scores, block, {}, formats)
            assert cost == pytest.approx(kl_of(rows, scores.length), rel=1e-5)


@pytest.mark.parametrize("space", ["formats", "joint"])
def test_options_left_out_are_dominated_within_their_cut(teacher: Teacher, space: str) -> None:
    problem = in_scope(teacher.problem(space, 0.6), "group")
    kept = problem.groups(Globals())
    for number in range(len(teacher.architecture.blocks)):
        hidden = teacher.architecture.hidden
        everything = list(block_options(teacher.architecture, number, problem.space, {}, hidden))
        left = {option for choice in kept[number] for _, option in choice if not option.removed}
        assert left <= set(everything)
        for option in everything:
            size = problem.option_bytes(number, option, Globals())
            cost = problem.cost(number, option)[1]
            assert any(
                other.target == option.target
                and other.kv_format == option.kv_format
                and problem.option_bytes(number, other, Globals()) <= size
                and problem.cost(number, other)[1] <= cost
                for other in left
            )


def test_a_format_for_every_group_is_never_predicted_worse(teacher: Teacher) -> None:
    mixed = set()
    for share in (0.65, 0.7, 0.75, 0.8):
        whole = teacher.problem("formats", share)
        block, group = (in_scope(whole, scope) for scope in ("block", "group"))
        found = [decode(problem, Globals()) for problem in (block, group)]
        assert found[0] is not None
        assert found[1] is not None
        assert found[1].predicted <= found[0].predicted * (1 + 1e-4)
        for problem, proposal in zip((block, group), found, strict=True):
            made = candidate_of(problem, "formats", 0, proposal)
            assert footprint(made.architecture, DEPLOYMENT).total <= problem.budget
            mixed |= {len(used_in(block.formats)) > 1 for block in made.architecture.blocks}
    assert mixed == {True, False}


def test_a_curve_falls_with_bits_and_ends_in_one_format(teacher: Teacher) -> None:
    points = format_curve(teacher.architecture, teacher.scores, {"fp8", "nvfp4"})
    mixed = [point for point in points if point.format is None]
    assert mixed[0].kl == 0
    assert mixed[0].bits == bits(teacher.architecture)
    assert all(a.bits >= b.bits for a, b in itertools.pairwise(mixed))
    assert all(a.kl <= b.kl * (1 + 1e-3) for a, b in itertools.pairwise(mixed))
    alone = {point.format: point for point in points if point.format}
    assert alone.keys() == {"fp8", "nvfp4"}
    assert mixed[-1].bytes == alone["nvfp4"].bytes
    rows = sensitivities(teacher.architecture, teacher.scores)
    saved = sum(row.saved for row in rows if row.format == "nvfp4" and row.kind != "outside")
    assert mixed[0].bytes - mixed[-1].bytes == saved
