"""A cut block's output projection refitted: least squares from Gram matrices, without labels."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from repairs import (
    CUTS,
    OTHER,
    TEACHERS,
    TOKENS,
    Teachers,
    block_output,
    built,
    case_of,
    cut_candidate,
    inputs_of,
    squared_error,
    teachers_in,
)
from torch import Tensor

from compress.measure.kl import measure, reference, sequence_kl
from compress.memory.budget import teacher_bytes
from compress.memory.footprint import Deployment
from compress.model.checkpoint import open_checkpoint
from compress.model.families import in_one_format
from compress.run.bench import Bench
from compress.run.directory import Run
from compress.run.recipe import Recipe
from compress.run.session import Session
from compress.scores.contributions import contributions
from compress.scores.costs import Scores
from compress.scores.kv import kv_costs
from compress.scores.replay import removal_costs
from compress.searches.problem import Globals, Problem
from compress.searches.proposals import candidate_of, decode, globals_of
from compress.searches.space import load_space
from compress.student import grams as grams_of
from compress.student.assemble import stack_in_formats
from compress.student.candidate import expert_keep
from compress.student.grams import Grams, Half, save_grams
from compress.student.refits import refit
from compress.student.repair import refitted_weight, repair_ratios
from compress.student.surgery import (
    load_candidate,
    prune,
    same_candidate,
    save_candidate,
    student_tensors,
)
from compress.sweep.placement import REFERENCE
from compress.sweep.stack import stack_of

DEPLOYMENT = Deployment(context=64)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    return teachers_in(tmp_path_factory.mktemp("repair"))


@pytest.mark.parametrize("name", CUTS)
def test_without_a_ridge_the_error_is_that_of_least_squares(teachers: Teachers, name: str) -> None:
    teacher, block, projection, weight, kept = case_of(teachers, name)
    x = inputs_of(teacher.model, block, projection)
    target = x @ weight.double().T
    solution = torch.linalg.lstsq(x[:, kept], target).solution
    least = float((x[:, kept] @ solution - target).square().sum())
    gram = x.T @ x
    fitted = refit(weight.double(), gram, kept, 1e-9)
    assert squared_error(weight, fitted, gram, kept) == pytest.approx(least, rel=1e-3)
    cut = float((x[:, kept] @ weight[:, kept].double().T - target).square().sum())
    assert least < 0.95 * cut, "there must be something to repair"


@pytest.mark.parametrize("name", CUTS)
def test_repair_is_never_worse_on_the_text_that_it_is_fitted_on(
    teachers: Teachers, name: str
) -> None:
    teacher, _, projection, weight, kept = case_of(teachers, name)
    weight, gram = weight.double(), teacher.grams.half("fit", projection.key).double()
    left = [
        squared_error(weight, refit(weight, gram, kept, ridge), gram, kept)
        for ridge in (1e-6, 1e-3, 1e-1, 10.0)
    ]
    assert left == sorted(left)
    assert left[-1] < squared_error(weight, weight[:, kept], gram, kept)


@pytest.mark.parametrize("name", CUTS)
def test_an_endless_ridge_leaves_the_weights(teachers: Teachers, name: str) -> None:
    teacher, _, projection, weight, kept = case_of(teachers, name)
    gram = teacher.grams.half("fit", projection.key)
    fitted = refit(weight, gram, kept, 1e9)
    torch.testing.assert_close(fitted, weight[:, kept], atol=1e-6, rtol=0)
    dead = refit(weight, torch.zeros_like(gram), kept, 1.0)
    assert torch.equal(dead, weight[:, kept])


@pytest.mark.parametrize("family", TEACHERS)
def test_repairing_what_is_whole_changes_nothing(teachers: Teachers, family: str) -> None:
    teacher = teachers[family]
    blocks = frozenset(range(len(teacher.checkpoint.architecture.blocks)))
    whole = cut_candidate(teacher.checkpoint, 0, {}, repaired=False)
    found = student_tensors(teacher.checkpoint, replace(whole, repaired=blocks), teacher.grams)
    for name, tensor in found:
        assert torch.equal(tensor, teacher.checkpoint[name]), name


@pytest.mark.parametrize("name", CUTS)
def test_a_smaller_hidden_size_leaves_rows_out(teachers: Teachers, name: str) -> None:
    keep = CUTS[name][2]
    teacher, block, projection, _, _ = case_of(teachers, name)
    own = expert_keep(keep, block, projection.expert)
    assert own is not None
    rows = {"hidden": torch.tensor([0, 5, 7])}
    grams = Grams(teacher.grams.file)
    whole = refitted_weight(teacher.checkpoint, grams, block, projection, own)
    found = refitted_weight(teacher.checkpoint, grams, block, projection, own | rows)
    latent = projection.after is not None  # its rows are not of the residual stream
    assert torch.equal(found, whole if latent else whole[rows["hidden"]])
    assert len(grams.weights) == 1, "one refit serves every hidden size"


def test_refits_are_kept_within_a_limit(
    teachers: Teachers, monkeypatch: pytest.MonkeyPatch
) -> None:
    grams = Grams(teachers["llama"].grams.file)
    made = [grams.remembered(n, partial(torch.zeros, 8, 8)) for n in range(3)]
    assert grams.remembered(0, partial(torch.ones, 8, 8)) is made[0]
    monkeypatch.setattr(grams_of, "CACHE_BYTES", 3 * made[0].nbytes)
    grams.remembered(3, partial(torch.zeros, 8, 8))
    assert list(grams.weights) == [2, 0, 3], "what was asked for longest ago goes"


@pytest.mark.parametrize("name", CUTS)
def test_the_student_reads_what_its_projection_was_fitted_on(teachers: Teachers, name: str) -> None:
    family, number, keep = CUTS[name]
    teacher = teachers[family]
    checkpoint = teacher.checkpoint
    block = checkpoint.architecture.blocks[number]
    whole = block_output(teacher.model, checkpoint.architecture.family, block)
    grams, left = Grams(teacher.grams.file, 1e-4), {}
    for repaired in (False, True):
        student = cut_candidate(checkpoint, number, keep, repaired=repaired)
        output = block_output(built(teacher, student, grams), checkpoint.architecture.family, block)
        left[repaired] = float((output - whole).square().sum())
    [predicted] = repair_ratios(checkpoint, grams, number, [keep])
    measured = left[True] / left[False]
    assert measured < 1
    # Exact but for a gated norm's share of energy per token, and experts that share a token.
    # What latent experts read is not repaired, and its part of the error a guess.
    rough = "mamba" in name or "experts" in name or "latent" in name
    assert measured == pytest.approx(predicted, rel=0.3 if rough else 1e-3)


def test_a_repaired_candidate_measures_as_the_student_written_and_loaded(
    tiny: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny)
    halves: dict[Half, Tensor] = {"fit": TOKENS, "check": OTHER}
    save_grams(stack_of(checkpoint), halves, tmp_path / "grams.safetensors")
    grams = Grams(tmp_path / "grams.safetensors")
    number, keep = (3, {"ffn": torch.arange(48)})
    repaired = cut_candidate(checkpoint, number, keep, repaired=True)
    blocks = list(repaired.architecture.blocks)
    formats = in_one_format(blocks[number], checkpoint.architecture.family, "fp8")
    blocks[number] = replace(blocks[number], formats=formats)
    repaired = replace(repaired, architecture=replace(repaired.architecture, blocks=tuple(blocks)))
    prune(checkpoint, repaired, tmp_path / "student", grams)
    written = open_checkpoint(tmp_path / "student")
    text = reference(checkpoint, stack_of(checkpoint), OTHER)
    loaded = stack_in_formats(written, repaired.architecture, REFERENCE)
    expected = torch.cat(list(sequence_kl(loaded, text)))
    found = torch.cat(list(measure(repaired, text, grams)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    plain = torch.cat(list(measure(replace(repaired, repaired=frozenset()), text)))
    assert float(found.mean()) < float(plain.mean())


def test_a_repaired_candidate_is_read_as_written(teachers: Teachers, tmp_path: Path) -> None:
    teacher = teachers["llama"].checkpoint
    keep = {"ffn": torch.arange(48)}
    repaired = cut_candidate(teacher, 3, keep, repaired=True)
    save_candidate(repaired, tmp_path / "x")
    found = load_candidate(tmp_path / "x", "prune")
    assert found.repaired == {3}
    assert found.keep.keys() == repaired.keep.keys()
    assert same_candidate(repaired, tmp_path / "x")
    plain = cut_candidate(teacher, 3, keep, repaired=False)
    assert not same_candidate(plain, tmp_path / "x")
    save_candidate(plain, tmp_path / "x")
    assert load_candidate(tmp_path / "x", "prune").repaired == frozenset()


def test_experts_that_go_are_not_repaired(teachers: Teachers) -> None:
    teacher = teachers["hybrid"]
    gone = {"expert": torch.tensor([0, 2, 3, 5])}
    thin = {"expert_ffn": CUTS["experts"][2]["expert_ffn"]}
    both = gone | {"expert_ffn": thin["expert_ffn"][:4]}
    found = repair_ratios(teacher.checkpoint, teacher.grams, 1, [thin, both, gone])
    assert found == sorted(found)
    assert found[0] < found[2] == 1


@pytest.fixture(scope="module")
def problem(teachers: Teachers) -> Problem:
    teacher = teachers["hybrid"]
    architecture = teacher.checkpoint.architecture
    found = contributions(stack_of(teacher.checkpoint), TOKENS[:4], 2, ["fp8", "nvfp4"])
    stack = stack_of(teacher.checkpoint)
    scores = Scores(found, removal_costs(stack, TOKENS[:4]), kv_costs(stack, TOKENS[:4]), 48)
    return Problem(
        architecture, scores, load_space("joint").model_copy(update={"head_formats": ("bf16",)}),
        DEPLOYMENT,
        teacher_bytes(architecture, DEPLOYMENT) // 3,
        repair_ratios=partial(repair_ratios, teacher.checkpoint, teacher.grams),
    )  # fmt: skip


def test_every_cut_costs_what_its_repair_leaves_and_is_repaired(problem: Problem) -> None:
    plain = replace(problem, repair_ratios=None, costs={}, cuts={}, keeps={})
    for with_repair, without in zip(
        problem.groups(Globals()), plain.groups(Globals()), strict=True
    ):
        assert len(with_repair) == len(without)
        for ((number, option),), ((_, same),) in zip(with_repair, without, strict=True):
            assert option == same
            (cut, bits), (whole, same_bits) = problem.cost(number, option), plain.cost(number, same)
            left = problem.share_left_by_repair(number, option)
            held = plain.exact_cost(number, same)
            assert (cut, bits) == (pytest.approx(left * (whole - held) + held), same_bits)
            assert option.target or left == 1
    proposal = decode(problem, globals_of(problem, {}))
    assert proposal is not None
    candidate = candidate_of(problem, "joint", 0, proposal)
    assert candidate.repaired
    assert candidate.repaired == {n for n, option in enumerate(proposal.options) if option.target}
    assert not candidate_of(plain, "joint", 0, proposal).repaired


def test_a_space_without_repair_computes_no_matrices(
    tiny_hybrid: Path, problem: Problem, tmp_path: Path
) -> None:
    recipe = Recipe(model=str(tiny_hybrid), budget="50%", rounding="nearest")
    session = Session(Run(tmp_path), recipe)
    bench = Bench(session, problem.known, session.reference(TOKENS[:1]))
    space = load_space("puzzle").model_copy(update={"repair": False})
    assert bench.problem(space).repair_ratios is None
    assert not any(tmp_path.iterdir())
