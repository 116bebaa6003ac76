"""What trials are made of: a teacher rounded on text, and cuts of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuts import FFN, GROUP, HEAD, HIDDEN, WIDTH, candidate
from quantized import with_formats, with_outside
from torch import Tensor

from compress.formats.table import FORMATS, Format
from compress.model.build import weight_formats
from compress.model.checkpoint import open_checkpoint
from compress.model.families import outside_groups, parameters
from compress.scores.gated import Gated
from compress.student.assemble import BlockStore
from compress.student.candidate import Candidate
from compress.student.rounded_teacher import RoundedTeacher, round_teacher
from compress.sweep.stack import final_states, stack_of

CUTS = {
    "llama": {"layers.1.ffn/ffn": FFN, "layers.2.attention/kv_head": GROUP},
    "nemotron_h": {"layers.0.mamba/head": HEAD, "layers.1.moe/expert_ffn": WIDTH},
}
GENERATOR = torch.Generator().manual_seed(3)
ROWS, CHECK, FRESH = (torch.randint(0, 97, (16, 32), generator=GENERATOR) for _ in range(3))
FORMATS_OF_ALL: Sequence[Format] = ("fp8", "nvfp4")


def made(path: Path, directory: Path) -> BlockStore:
    """The store of a teacher that is rounded on text."""
    checkpoint = open_checkpoint(path)
    store = BlockStore(checkpoint, stack_of(checkpoint))
    asked = FORMATS_OF_ALL, "second-order", directory
    round_teacher(store.stack, ROWS, CHECK, *asked)
    store.rounded = RoundedTeacher(directory, "second-order")
    return store


def student_of(store: BlockStore, keep: dict[str, Tensor], format: Format) -> Candidate:
    whole = {"blocks": torch.arange(len(store.teacher.architecture.blocks))}
    cut = candidate(store.teacher.architecture, whole | keep)
    return replace(cut, architecture=with_formats(cut.architecture, [format]))


def tensors_of(store: BlockStore, student: Candidate) -> dict[str, Tensor]:
    stack = store.student(student)
    return {each.name: stack.read(each) for each in parameters(student.architecture)}


def distance(store: BlockStore, student: Candidate, against: Candidate) -> float:
    """How far the final states of a student are from another's, on fresh text."""
    [one], [other] = (final_states(store.student(each), [FRESH]) for each in (student, against))
    return float((one - other).norm())


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("tiny", ["llama", "hybrid"], indirect=True)
def test_what_trials_measure_is_nearer_than_to_nearest_cut_or_whole(
    hidden: bool, tiny: Path, tmp_path: Path
) -> None:
    store = made(tiny, tmp_path)
    cut = CUTS[store.teacher.architecture.family] | ({"hidden": HIDDEN} if hidden else {})
    for keep in ({}, cut):
        plain, student = (student_of(store, keep, format) for format in ("bf16", "nvfp4"))
        found = distance(store, student, plain)
        rounded, store.rounded = store.rounded, None
        store.clear()
        assert found < distance(store, student, plain)
        store.rounded = rounded
        store.clear()


@pytest.mark.parametrize("tiny", ["llama", "hybrid"], indirect=True)
def test_what_reads_all_inputs_is_rows_of_the_teachers(tiny: Path, tmp_path: Path) -> None:
    store = made(tiny, tmp_path)
    cut = CUTS[store.teacher.architecture.family]
    whole, some = (tensors_of(store, student_of(store, keep, "fp8")) for keep in ({}, cut))
    same = [name for name in whole if whole[name].shape == some[name].shape]
    assert all(torch.equal(whole[name], some[name]) for name in same)
    if "llama" in str(store.teacher.architecture.family):
        for name in ("gate_proj", "up_proj"):
            name = f"model.layers.1.mlp.{name}.weight"
            assert torch.equal(some[name], whole[name][FFN])


def test_values_of_a_cut_are_ones_of_the_format(tiny_llama: Path, tmp_path: Path) -> None:
    store = made(tiny_llama, tmp_path)
    student = student_of(store, {**CUTS["llama"], "hidden": HIDDEN}, "nvfp4")
    found, formats = tensors_of(store, student), weight_formats(student.architecture)
    for name in formats:
        groups = found[name].reshape(-1, FORMATS["nvfp4"].group)
        assert all(len(group.abs().unique()) <= 8 for group in groups)


def test_a_killed_rounding_goes_on_to_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    store = made(tiny_llama, tmp_path / "one")
    files = sorted((tmp_path / "one").iterdir())
    half = tmp_path / "half"
    half.mkdir()
    for file in files[::2]:
        (half / file.name).write_bytes(file.read_bytes())
    round_teacher(store.stack, ROWS, CHECK, FORMATS_OF_ALL, "second-order", half)
    for file in files:
        assert (half / file.name).read_bytes() == file.read_bytes()


def test_scores_price_what_rounding_leaves(tiny_llama: Path, tmp_path: Path) -> None:
    store = made(tiny_llama, tmp_path)
    near, left = Gated(store.stack), Gated(store.stack, rounded=store.rounded)
    assert store.rounded is not None
    for number, _ in store.stack.visits(range(1)):
        with (
            near.layer(number, ["nvfp4"]) as (_, whole),
            left.layer(number, ["nvfp4"]) as (_, some),
        ):
            for block, errors in whole.items():
                for name, error in errors["nvfp4"].items():
                    ratio = float(some[block]["nvfp4"][name].norm() / error.norm())
                    assert 0 < ratio < 1


def test_embedding_and_head_are_nearer_than_to_nearest(tiny: Path, tmp_path: Path) -> None:
    store = made(tiny, tmp_path)
    plain = student_of(store, {}, "bf16")
    architecture = with_outside(plain.architecture, "nvfp4", "nvfp4")
    student = replace(plain, architecture=architecture)
    found, whole = tensors_of(store, student), tensors_of(store, plain)
    store.rounded = None
    store.clear()
    near = tensors_of(store, student)
    name = store.stack.outside("embedding").name
    assert (found[name] - whole[name]).norm() < (near[name] - whole[name]).norm()
    for group in outside_groups(architecture):
        name = store.stack.outside(group).name
        assert not torch.equal(found[name], near[name])
