"""Gram matrices of a text: of what projections read, whatever the batches and the memory."""

from pathlib import Path

import pytest
import torch
from repairs import CUTS, SAME, TEACHERS, Teachers, case_of, inputs_of, teachers_in

from compress.student.grams import HALVES, Grams, save_grams
from compress.student.units import projections
from compress.sweep.placement import Placement
from compress.sweep.stack import stack_of


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    return teachers_in(tmp_path_factory.mktemp("repair"))


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
