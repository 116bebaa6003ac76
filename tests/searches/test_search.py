import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import HYBRID, LLAMA, write_tiny

from compress.core.errors import Infeasible, InputError
from compress.export.accepted import check_target, differing
from compress.export.targets import Target, loader_of
from compress.formats.table import FORMATS, Format
from compress.measure.kl import sequence_kl
from compress.memory.footprint import footprint
from compress.model.architecture import (
    Attention,
    Moe,
    block_name,
    in_kv_format,
    kv_format_of,
    kv_text,
)
from compress.model.build import is_plain, weight_formats
from compress.model.checkpoint import open_checkpoint
from compress.model.families import count_parameters
from compress.run.recipe import check
from compress.run.score import scored_formats
from compress.scores.costs import removed
from compress.searches.baselines import baselines, main_kind, randomly, uniform, variants
from compress.searches.knapsack import value
from compress.searches.problem import Globals, taken, total_bytes
from compress.searches.proposals import candidate_of, decode, globals_of, seeds
from compress.searches.space import KINDS, Option, load_space, shipped_spaces
from compress.student.assemble import stack_in_formats
from compress.student.surgery import prune
from compress.sweep.placement import REFERENCE
from teachers import DEPLOYMENT, TOKENS, Teacher, first_candidates

SPACES = sorted(shipped_spaces())
# What a space must reach of each tiny teacher; formats alone save least.
SHARE = {
    "formats": 0.9, "joint": 0.5, "gguf": 0.5, "puzzle": 0.75, "minitron": 0.75, "minipuzzle": 0.75,
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return Teacher(request.getfixturevalue(f"tiny_{request.param}"))


@pytest.mark.parametrize("space", SPACES)
def test_no_candidate_exceeds_the_budget_or_loses_what_a_model_needs(
    teacher: Teacher, space: str
) -> None:
    problem = teacher.problem(space, SHARE[space])
    found = first_candidates(problem)
    assert found
    for candidate in found:
        architecture = candidate.architecture
        assert total_bytes(candidate, DEPLOYMENT) == footprint(architecture, DEPLOYMENT).total
        assert total_bytes(candidate, DEPLOYMENT) <= problem.budget
        assert any(isinstance(block, Attention) for block in architecture.blocks)
        assert all(b.expert >= b.top_k for b in architecture.blocks if isinstance(b, Moe))
        assert architecture.formats <= set(problem.space.formats)


def test_a_joint_search_begins_with_every_format_alone_too(teacher: Teacher) -> None:
    found = first_candidates(teacher.problem("joint", SHARE["joint"]))
    alone = [c.architecture.formats for c in found if len(c.architecture.formats) == 1]
    assert {"nvfp4"} in alone
    assert {"fp8"} in alone


@pytest.mark.parametrize("space", SPACES)
def test_bytes_in_the_knapsack_are_those_of_the_footprint(teacher: Teacher, space: str) -> None:
    problem, draw = teacher.problem(space, 2.0), random.Random(1)
    for kv_format in (None, *problem.space.kv_formats):
        for share in (1.0, *(problem.space.axes["hidden"].keep if space == "joint" else ())):
            globals_ = Globals(kv_format=kv_format, shares={"hidden": share})
            groups = problem.groups(globals_)
            knapsack = problem.knapsack(groups, globals_)
            for _ in range(8):
                choice = [draw.randrange(len(options)) for options in groups]
                candidate = problem.candidate("x", "x", taken(groups, choice), globals_)
                fixed = problem.budget - knapsack.room
                counted = value(knapsack.bytes, choice) + fixed
                assert counted == footprint(candidate.architecture, DEPLOYMENT).total


def test_every_cache_has_a_format_of_its_own_unless_the_target_has_one_for_all(
    teacher: Teacher,
) -> None:
    whole = teacher.problem("formats", 1.0)
    attentions = list(teacher.architecture.kv_formats)
    for number, options in enumerate(whole.groups(Globals())):
        found = {choice[0][1].kv_format for choice in options}
        assert found == ({"bf16", "fp8"} if number in attentions else {"bf16"})
    # What it costs is what its scores say.
    plain, cheap = Option(), Option(kv_format="fp8")
    name = block_name(teacher.architecture.blocks[attentions[0]])
    costs = [whole.price(((attentions[0], option),)) for option in (plain, cheap)]
    assert costs == [0, teacher.scores.kv[f"{name}/fp8"]]
    served = teacher.problem("formats", 1.0, "vllm")
    assert served.space.kv_scope == "global"
    for kv_format in served.space.kv_formats:
        for options in served.groups(Globals(kv_format=kv_format)):
            found = {choice[0][1].kv_format for choice in options}
            assert found in ({kv_format}, {"bf16"})
    for candidate in first_candidates(teacher.problem("joint", SHARE["joint"], "vllm")):
        assert kv_text(candidate.architecture) in ("bf16", "fp8")


def test_caches_that_cost_least_go_to_fp8_first(tmp_path: Path) -> None:
    teacher = Teacher(write_tiny(tmp_path / "llama", LLAMA))
    only_kv = load_space("formats").model_copy(update={"formats": ("bf16",)})
    small = in_kv_format(teacher.architecture, "fp8")
    per_block = (teacher.bytes - footprint(small, DEPLOYMENT).total) // 3
    order = sorted(teacher.scores.kv, key=teacher.scores.kv.__getitem__)
    for count in range(4):
        budget = teacher.bytes - count * per_block
        problem = replace(teacher.within("formats", budget), space=only_kv)
        proposal = decode(problem, Globals())
        assert proposal is not None
        architecture = candidate_of(problem, "x", 0, proposal).architecture
        blocks = [architecture.blocks[number] for number in architecture.kv_formats]
        rounded = {f"{block_name(b)}/fp8" for b in blocks if kv_format_of(b) == "fp8"}
        assert rounded == set(order[:count])


def test_a_layer_costs_what_its_blocks_cost_alone(teacher: Teacher) -> None:
    problem = teacher.problem("minitron", 1.0)
    costs = problem.knapsack(problem.groups(Globals()), Globals()).costs
    blocks = teacher.architecture.blocks
    for layer, options in zip(sorted({block.layer for block in blocks}), costs, strict=True):
        alone = [removed(teacher.scores, block) for block in blocks if block.layer == layer]
        assert options[-1] == pytest.approx(sum(alone))


@pytest.mark.parametrize("space", SPACES)
def test_an_impossible_budget_names_a_floor_that_is_reached(teacher: Teacher, space: str) -> None:
    with pytest.raises(Infeasible, match="below the smallest size") as caught:
        seeds(teacher.within(space, 1))
    floor = int(str(caught.value).partition("(")[2].partition(" bytes")[0])
    reached = first_candidates(teacher.within(space, floor))
    assert {total_bytes(candidate, DEPLOYMENT) for candidate in reached} == {floor}
    with pytest.raises(Infeasible, match=f"{floor} bytes"):
        seeds(teacher.within(space, floor - 1))


@pytest.mark.parametrize("space", SPACES)
def test_every_space_offers_every_block_something(teacher: Teacher, space: str) -> None:
    problem = teacher.problem(space, 1.0)
    groups = problem.groups(Globals())
    blocks = {number for options in groups for choice in options for number, _ in choice}
    beside = {problem.outside} if len(problem.space.head_formats) > 1 else set()
    assert blocks == set(range(len(teacher.architecture.blocks))) | beside
    prunes = problem.space.remove != "none" or len(problem.space.formats) > 1
    assert all(len(options) > 1 for options in groups) == prunes


@pytest.mark.parametrize("target", ["transformers", "vllm"])
@pytest.mark.parametrize("space", ["joint", "puzzle", "minitron", "minipuzzle"])
def test_a_target_gives_students_that_its_table_says_it_loads(
    teacher: Teacher, space: str, target: Target
) -> None:
    problem = teacher.problem(space, SHARE[space], target)
    loader = loader_of(target, teacher.architecture.family)
    found = first_candidates(problem)
    assert found
    for candidate in found:
        architecture = candidate.architecture
        check_target(architecture, target)
        if not loader.uneven:
            assert is_plain(architecture)
        assert set(differing(architecture)) <= set(loader.uneven)
        assert set(weight_formats(architecture).values()) <= {*loader.formats}
        assert kv_text(architecture) in loader.kv_formats


# Measuring


def test_the_whole_teacher_in_bf16_has_no_kl(teacher: Teacher) -> None:
    problem = teacher.problem("puzzle", 1.0)
    proposal = decode(problem, globals_of(problem, {}))
    assert proposal is not None
    whole = candidate_of(problem, "whole", 0, proposal)
    assert whole.architecture == teacher.architecture
    values = torch.cat(list(teacher.measure(whole)))
    assert len(values) == len(TOKENS)
    assert float(values.abs().max()) < 1e-6


@pytest.mark.parametrize("space", ["joint", "puzzle"])
def test_a_candidate_measures_as_the_student_written_and_loaded(
    teacher: Teacher, space: str, tmp_path: Path
) -> None:
    candidate = first_candidates(teacher.problem(space, SHARE[space]))[0]
    prune(teacher.checkpoint, candidate, tmp_path / "student")
    written = open_checkpoint(tmp_path / "student")
    loaded = stack_in_formats(written, candidate.architecture, REFERENCE)
    expected = torch.cat(list(sequence_kl(loaded, teacher.text)))
    found = torch.cat(list(teacher.measure(candidate)))
    assert float(expected.mean()) > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_uniform_and_random_cuts_fit_and_are_kept_distinct(teacher: Teacher) -> None:
    problem = teacher.problem("puzzle", 0.7)
    for found in (uniform(problem), randomly(problem, 4, seed=0)):
        assert found
        assert len({candidate.id for candidate, _ in found}) == len(found)
        for candidate, predicted in found:
            assert total_bytes(candidate, DEPLOYMENT) <= problem.budget
            assert predicted > 0
    again = [candidate.architecture for candidate, _ in randomly(problem, 4, seed=0)]
    assert again == [candidate.architecture for candidate, _ in randomly(problem, 4, seed=0)]


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_a_uniform_cut_in_a_format_is_wider_and_fits_to_the_byte(
    teacher: Teacher, format: Format
) -> None:
    problem = teacher.problem("joint", 0.7)
    plain, wider = uniform(problem), uniform(problem, format)
    assert [kv_text(c.architecture) for c, _ in wider] == list(problem.space.kv_formats)
    for (narrow, _), (candidate, predicted) in zip(plain, wider, strict=True):
        architecture = candidate.architecture
        assert architecture.formats == {format}
        assert candidate.kind == f"uniform_then_{format}"
        assert footprint(architecture, DEPLOYMENT).total <= problem.budget
        assert count_parameters(architecture) > count_parameters(narrow.architecture)
        assert predicted > 0
    # Its own bytes are enough, one less is not.
    budget = total_bytes(wider[0][0], DEPLOYMENT)
    [same, *_] = uniform(teacher.within("joint", budget), format)
    assert same[0].architecture == wider[0][0].architecture
    [less, *_] = uniform(teacher.within("joint", budget - 1), format)
    assert total_bytes(less[0], DEPLOYMENT) < budget


@pytest.mark.parametrize("space", SPACES)
def test_baselines_are_those_that_the_searched_kind_is_not(space: str) -> None:
    loaded = load_space(space)
    found = variants(loaded, ("bf16", "fp8", "nvfp4"), loaded.kv_formats)
    assert main_kind(loaded) in found
    assert found["prune"].formats == ("bf16",)
    assert not found["formats"].prunes
    assert found["joint"].prunes


@pytest.mark.parametrize(
    ("space", "kinds"),
    [
        ("joint", {"prune", "formats", "prune_then_quantize", "joint"}),
        ("formats", {"formats"}),
        ("puzzle", {"prune"}),
        ("minitron", {"prune"}),
    ],
)
def test_a_space_is_compared_with_its_parts_and_with_what_is_asked_for(
    space: str, kinds: set[str]
) -> None:
    loaded = load_space(space)
    named = variants(loaded, ("bf16", "fp8", "nvfp4"), loaded.kv_formats)
    assert set(baselines(loaded, named, None)) == kinds | {"uniform", "random"}
    assert baselines(loaded, named, "all") == list(KINDS)
    assert baselines(loaded, named, "none") == []
    assert baselines(loaded, named, "joint, uniform") == ["uniform", "joint"]


@pytest.mark.parametrize("text", ["unifrom", "uniform,", "all,prune", ""])
def test_a_baseline_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="a list has uniform, random, prune"):
        check({"baselines": text}, "x")


# A cut takes the width to a multiple of what a format needs, where the whole block is none.
ODD: dict[str, dict[str, object]] = {
    "ffn": LLAMA | {"intermediate_size": 100},
    "hidden": LLAMA | {"hidden_size": 72},
    "shared_ffn": HYBRID | {"moe_shared_expert_intermediate_size": 40},
    "expert_ffn": HYBRID | {"moe_intermediate_size": 24},
    "expert": HYBRID | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "head": HYBRID | {"mamba_num_heads": 6, "mamba_head_dim": 12},
}


@pytest.mark.parametrize("axis", list(ODD))
def test_what_is_offered_was_scored(tmp_path: Path, axis: str) -> None:
    teacher = Teacher(write_tiny(tmp_path / "teacher", ODD[axis]))
    problem = teacher.problem("joint", 0.5)
    for shares in ({}, {"hidden": 0.9}):
        chosen = Globals(kv_format="fp8", shares=shares)
        for choices in problem.groups(chosen):
            for number, option in (pair for choice in choices for pair in choice):
                assert all(math.isfinite(cost) for cost in problem.cost(number, option))
    assert uniform(problem, "nvfp4")


def test_a_space_decides_which_formats_are_scored(tmp_path: Path) -> None:
    default: list[Format] = ["fp8", "nvfp4"]
    assert scored_formats(check({}, "test")) == default
    for name in SPACES:
        offered = set(load_space(name).formats) - {"bf16"}
        of_space = [format for format in FORMATS if format in offered]
        assert scored_formats(check({"space": name}, "test")) == of_space
        compared = scored_formats(check({"space": name, "baselines": "all"}, "test"))
        assert compared == (of_space or default)
    file = tmp_path / "space.yaml"
    text = "remove: none\naxes: {}\nkv_formats: [bf16]\nformats: "
    for listed, expected in (("[bf16, int4, mxfp4]", ["mxfp4", "int4"]), ("[bf16]", [])):
        file.write_text(text + listed, encoding="utf-8")
        assert scored_formats(check({"space": str(file)}, "test")) == expected
