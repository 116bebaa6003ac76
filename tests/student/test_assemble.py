"""A student assembled from stored blocks has the tensors that surgery writes, bit for bit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuts import FFN, GROUP, HEAD, HIDDEN, WIDTH, candidate
from quantized import with_formats
from torch import Tensor

from compress.formats.table import Format
from compress.memory.budget import in_format
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.families import parameters
from compress.student.assemble import BlockStore
from compress.student.candidate import Candidate
from compress.student.grams import HALVES, Grams, save_grams
from compress.student.rounded import rounded
from compress.student.surgery import student_tensors
from compress.sweep.placement import Placement
from compress.sweep.stack import stack_of

CUTS = {
    "llama": {"layers.1.ffn/ffn": FFN, "layers.2.attention/kv_head": GROUP},
    "nemotron_h": {"layers.0.mamba/head": HEAD, "layers.1.moe/expert_ffn": WIDTH},
}
ROWS = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(3))


def student_of(teacher: Checkpoint, formats: list[Format], hidden: bool = False) -> Candidate:
    """A cut student without the teacher's fourth block, its blocks in these formats in turn."""
    keep = CUTS[teacher.architecture.family] | {"blocks": torch.tensor([0, 1, 2, 4])}
    if teacher.architecture.family == "llama":
        keep["blocks"] = torch.tensor([0, 1, 3, 4, 5])
    if hidden:
        keep["hidden"] = HIDDEN
    made = candidate(teacher.architecture, keep)
    return replace(made, architecture=with_formats(made.architecture, formats))


def expected(
    teacher: Checkpoint, student: Candidate, grams: Grams | None = None
) -> dict[str, Tensor]:
    """What surgery makes of the student, after its formats and back."""
    cut = dict(student_tensors(teacher, student, grams))
    give = rounded(lambda each: cut[each.name], student.architecture)
    return {each.name: give(each).float() for each in parameters(student.architecture)}


def assembled(
    store: BlockStore, student: Candidate, grams: Grams | None = None
) -> dict[str, Tensor]:
    """Every tensor of the student that a store gives."""
    stack = store.student(student, grams)
    return {each.name: stack.read(each) for each in parameters(student.architecture)}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def store_of(path: Path, memory: int | None = None) -> BlockStore:
    """The store of a teacher."""
    checkpoint = open_checkpoint(path)
    return BlockStore(checkpoint, stack_of(checkpoint, Placement(memory=memory)))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("formats", [["bf16"], ["fp8"], ["nvfp4"], ["mxfp4"], ["fp8", "bf16"]])
def test_an_assembled_student_is_that_of_surgery(
    formats: list[Format], hidden: bool, tiny: Path
) -> None:
    store = store_of(tiny)
    student = student_of(store.teacher, formats, hidden)
    if "mxfp4" in formats:
        student = with_room(student)
    found = assembled(store, student)
    assert same(found, expected(store.teacher, student))
    assert same(assembled(store, student), found)


def with_room(student: Candidate) -> Candidate:
    """The student with the blocks in BF16 that its format does not take."""
    architecture = student.architecture
    fits = in_format(architecture, min(architecture.formats))
    return replace(student, architecture=fits)


def test_an_assembled_repaired_student_is_that_of_surgery(tiny: Path, tmp_path: Path) -> None:
    store = store_of(tiny)
    save_grams(store.stack, dict.fromkeys(HALVES, ROWS), tmp_path / "grams.safetensors")
    grams = Grams(tmp_path / "grams.safetensors")
    plain = student_of(store.teacher, ["fp8", "bf16"], hidden=True)
    repaired = replace(plain, repaired=frozenset(plain.keep["blocks"].tolist()))
    assembled(store, plain)
    found = assembled(store, repaired, grams)
    assert same(found, expected(store.teacher, repaired, grams))
    assert not same(found, assembled(store, plain))


def test_a_changed_block_is_made_and_the_others_are_found(tiny_llama: Path) -> None:
    store = store_of(tiny_llama)
    before = student_of(store.teacher, ["fp8"])
    keep = {**before.keep, "layers.1.ffn/ffn": torch.arange(64)}
    one, other = assembled(store, before), assembled(store, replace(before, keep=keep))
    changed = {name for name in one if one[name] is not other[name]}
    assert changed == {name for name in one if "layers.1.mlp" in name or ".1.post_att" in name}


@pytest.mark.parametrize("formats", [["bf16"], ["fp8"]])
def test_a_stack_copies_nothing_of_its_store(formats: list[Format], tiny: Path) -> None:
    store = store_of(tiny)
    stack = store.student(student_of(store.teacher, formats))
    with stack.head() as head, store.stack.head() as teachers:
        assert head.weight.data_ptr() == teachers.weight.data_ptr()
    for _, layer in stack.visits(range(stack.layers)):
        held = {tensor.data_ptr() for made in store.held.values() for tensor in made.values()}
        assert {weight.data_ptr() for weight in layer.parameters()} <= held


def test_a_store_holds_the_latest_blocks_within_its_limit(tiny: Path) -> None:
    store = store_of(tiny, memory=1_600_000)
    for formats in (["bf16"], ["fp8"], ["nvfp4"]):
        student = student_of(store.teacher, formats)
        assert same(assembled(store, student), expected(store.teacher, student))
        held = sum(tensor.nbytes for made in store.held.values() for tensor in made.values())
        assert held == store.bytes <= store.limit
    assert store.keys(student)[-1] in store.held
    store.clear()
    assert not store.held
    assert store.bytes == 0
