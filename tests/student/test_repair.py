"""A cut block's output projection refitted: least squares from Gram matrices, without labels."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, write_tiny
from torch import Tensor

from compress.measure.kl import measure, reference, sequence_kl
from compress.memory.budget import teacher_bytes
from compress.memory.footprint import Deployment
from compress.model.architecture import Block, block_name
from compress.model.build import build_model, load_model, student_config
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.families import family_of
from compress.run.bench import Bench
from compress.run.directory import Run
from compress.run.recipe import Recipe
from compress.run.session import Session
from compress.scores.contributions import contributions
from compress.scores.costs import Scores
from compress.scores.replay import removal_costs
from compress.searches.problem import Globals, Problem
from compress.searches.proposals import candidate_of, decode, globals_of
from compress.searches.space import load_space
from compress.student import grams as grams_of
from compress.student.assemble import stack_in_formats
from compress.student.candidate import Candidate, expert_keep, student_architecture
from compress.student.grams import HALVES, Grams, Half, save_grams
from compress.student.refits import refit
from compress.student.repair import kept_columns, refitted_weight, repair_ratios
from compress.student.surgery import (
    load_candidate,
    prune,
    same_candidate,
    save_candidate,
    student_tensors,
)
from compress.student.units import Projection, projections
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import stack_of

TEACHERS = TINY | {"latent": TINY["hybrid"] | {"moe_latent_size": 32}}
DEPLOYMENT = Deployment(context=64)
TOKENS = torch.randint(0, 128, (16, 48), generator=torch.Generator().manual_seed(7))
SAME: dict[Half, Tensor] = dict.fromkeys(HALVES, TOKENS)
OTHER = torch.randint(0, 128, (16, 48), generator=torch.Generator().manual_seed(8))
# A cut of every kind of output projection: tiny model, block, kept indices by axis.
CUTS: dict[str, tuple[str, int, dict[str, Tensor]]] = {
    "llama attention": ("llama", 2, {"query": torch.tensor([[0], [1]])}),
    "llama ffn": ("llama", 3, {"ffn": torch.arange(0, 96, 2)}),
    "hybrid attention": ("hybrid", 2, {"kv_head": torch.tensor([1])}),
    "hybrid ffn": ("hybrid", 3, {"ffn": torch.arange(0, 96, 2)}),
    "mamba heads": ("hybrid", 0, {"head": torch.tensor([[0, 2], [1, 3]])}),
    "mamba channels": ("hybrid", 4, {"channel": torch.arange(0, 16, 2)}),
    "experts": ("hybrid", 1, {"expert_ffn": torch.arange(0, 32, 2).expand(6, -1)}),
    "latent experts": ("latent", 1, {"expert_ffn": torch.arange(0, 32, 2).expand(6, -1)}),
    "shared expert": ("hybrid", 1, {"shared_ffn": torch.arange(0, 48, 2)}),
}


@dataclass(frozen=True)
class Teacher:
    """A tiny teacher and Gram matrices of it, both halves of the same text."""

    checkpoint: Checkpoint
    model: Any
    grams: Grams


Teachers = dict[str, Teacher]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    found = {}
    for name, config in TEACHERS.items():
        # fp32 on disk, so that what is refitted is not rounded.
        folder = tmp_path_factory.mktemp("repair")
        path = write_tiny(folder / name, config, dtype=torch.float32)
        checkpoint, model = open_checkpoint(path), load_model(path)
        save_grams(stack_of(checkpoint), SAME, folder / "grams.safetensors")
        found[name] = Teacher(checkpoint, model, Grams(folder / "grams.safetensors"))
    return found


def cut_candidate(
    teacher: Checkpoint, number: int, keep: dict[str, Tensor], *, repaired: bool
) -> Candidate:
    architecture = teacher.architecture
    name = block_name(architecture.blocks[number])
    whole = {"blocks": torch.arange(len(architecture.blocks))}
    kept = whole | {f"{name}/{axis}": index for axis, index in keep.items()}
    student = student_architecture(architecture, kept, {}, "bf16")
    numbers = frozenset([number] if repaired else [])
    return Candidate(id="x", kind="prune", architecture=student, keep=kept, repaired=numbers)


def built(teacher: Teacher, candidate: Candidate, grams: Grams) -> Any:
    config = student_config(teacher.checkpoint.config, candidate.architecture)
    tensors = student_tensors(teacher.checkpoint, candidate, grams)
    return build_model(config, candidate.architecture, tensors)


def block_output(model: Any, family: str, block: Block) -> Tensor:
    """[tokens, hidden] that a block adds to the residual stream on the text."""
    found: list[Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    layer = model.model.layers[block.layer]
    mixer = getattr(layer, family_of(family).sites[block.kind].mixer)
    handle = mixer.register_forward_hook(hook)
    model.model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    return found[0].flatten(0, -2)


def inputs_of(model: Any, block: Block, projection: Projection) -> Tensor:
    """[rows, d] that a projection reads on the text; an expert's, times their routing weights."""
    found: list[Tensor] = []
    layer, name = model.model.layers[block.layer], projection.name.removesuffix(".weight")
    if projection.expert is None:
        module = layer.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda m, args: found.append(args[0]))
    else:
        experts, number = layer.mixer.experts, projection.expert

        def hook(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
            x, index, weight = args
            mine = weight.masked_fill(index != number, 0).sum(1, keepdim=True)
            inner = torch.relu(x @ experts.up_proj[number].T).square()
            found.append((inner * mine)[mine[:, 0] > 0])

        handle = experts.register_forward_pre_hook(hook)
    model.model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    return found[0].flatten(0, -2).double()


def case_of(teachers: Teachers, name: str) -> tuple[Teacher, Block, Projection, Tensor, Tensor]:
    """Teacher, block, its projection that the cut narrows (one expert's), weight and columns."""
    family, number, keep = CUTS[name]
    teacher = teachers[family]
    block = teacher.checkpoint.architecture.blocks[number]
    found = projections(teacher.checkpoint.architecture, block)
    wanted = 2 if "experts" in name else None
    projection = next(p for p in found if p.expert == wanted)
    prefix = family_of(teacher.checkpoint.architecture.family).layer.format(layer=block.layer)
    own = expert_keep(keep, block, projection.expert)
    assert own is not None
    kept = kept_columns(projection, block, own)
    return teacher, block, projection, teacher.checkpoint[prefix + projection.name], kept


def squared_error(weight: Tensor, student: Tensor, gram: Tensor, kept: Tensor) -> float:
    """|X_k W'^T - X W^T|^2 of a student's weight on the text of a Gram matrix."""
    difference = -weight.double()
    difference[:, kept] += student.double()
    return float(((difference @ gram) * difference).sum())


@pytest.mark.parametrize("family", TEACHERS)
def test_batches_of_any_size_give_the_same_matrices(
    teachers: Teachers, family: str, tmp_path: Path
) -> None:
    teacher = teachers[family]
    architecture, one = teacher.checkpoint.architecture, Grams(tmp_path / "one.safetensors")
    save_grams(stack_of(teacher.checkpoint), SAME, one.file, batch=1)
    for projection in (p for b in architecture.blocks for p in projections(architecture, b)):
        for half in HALVES:
            expected = teacher.grams.half(half, projection.key)
            found = one.half(half, projection.key)
            atol = 1e-4 * float(expected.max())
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("memory", [0, 300_000])
def test_matrices_are_the_same_streamed_and_resident(
    teachers: Teachers, memory: int, tmp_path: Path
) -> None:
    for teacher in teachers.values():
        stack = stack_of(teacher.checkpoint, Placement(memory=memory))
        save_grams(stack, SAME, tmp_path / "streamed.safetensors")
        assert (tmp_path / "streamed.safetensors").read_bytes() == teacher.grams.file.read_bytes()


@pytest.mark.parametrize("family", TEACHERS)
def test_matrices_of_a_bf16_sweep_agree(teachers: Teachers, family: str, tmp_path: Path) -> None:
    teacher = teachers[family]
    rough = Grams(tmp_path / "rough.safetensors")
    place = Placement(dtype=torch.bfloat16)
    save_grams(stack_of(teacher.checkpoint, place), SAME, rough.file)
    architecture = teacher.checkpoint.architecture
    # Where tokens may go to other experts, what comes after them differs too.
    bound = 0.03 if family == "llama" else 0.1
    for projection in (p for b in architecture.blocks for p in projections(architecture, b)):
        exact, found = (g.half("fit", projection.key) for g in (teacher.grams, rough))
        assert float((found - exact).norm()) < bound * float(exact.norm())


@pytest.mark.parametrize("name", CUTS)
def test_matrices_are_of_what_the_projection_reads(teachers: Teachers, name: str) -> None:
    teacher, block, projection, _, _ = case_of(teachers, name)
    x = inputs_of(teacher.model, block, projection)
    gram = teacher.grams.half("fit", projection.key)
    torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-4, atol=1e-4 * float(gram.max()))


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
    rough = "mamba" in name or "experts" in name
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
    blocks[number] = replace(blocks[number], format="fp8")
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
    scores = Scores(
        found, removal_costs(stack_of(teacher.checkpoint), TOKENS[:4]), {"fp8": 1e-3}, 48
    )
    return Problem(
        architecture, scores, load_space("joint"), DEPLOYMENT,
        teacher_bytes(architecture, DEPLOYMENT) * 3 // 5,
        repair_ratios=partial(repair_ratios, teacher.checkpoint, teacher.grams),
    )  # fmt: skip


def test_every_cut_costs_what_its_repair_leaves_and_is_repaired(problem: Problem) -> None:
    plain = replace(problem, repair_ratios=None, costs={}, keeps={})
    for with_repair, without in zip(
        problem.groups(Globals()), plain.groups(Globals()), strict=True
    ):
        assert len(with_repair) == len(without)
        for ((number, option),), ((_, same),) in zip(with_repair, without, strict=True):
            assert option == same
            (cut, bits), (whole, same_bits) = problem.cost(number, option), plain.cost(number, same)
            left = problem.share_left_by_repair(number, option)
            assert (cut, bits) == (pytest.approx(left * whole), same_bits)
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
    session = Session(Run(tmp_path), Recipe(model=str(tiny_hybrid), budget="50%"))
    bench = Bench(session, problem.known, session.reference(TOKENS[:1]))
    space = load_space("puzzle").model_copy(update={"repair": False})
    assert bench.problem(space).repair_ratios is None
    assert not any(tmp_path.iterdir())
