"""Weights are written whole or not at all, and are as readable as any other file."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuts import candidate
from quantized import with_formats
from safetensors.torch import load_file, save_file

from compress.export.student import export_student
from compress.formats.table import Format
from compress.model.checkpoint import open_checkpoint
from compress.model.tensor_files import DTYPES, save_tensors, tensor_writer
from compress.student.surgery import prune

ONES = {"a": torch.ones(3)}


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def plain_mode(directory: Path) -> int:
    """Permissions of a file that is made beside the others."""
    file = directory / "plain"
    file.write_text("")
    found = mode(file)
    file.unlink()
    return found


@pytest.mark.usefixtures("umask")
def test_tensors_have_the_permissions_of_a_file_made_beside_them(tmp_path: Path) -> None:
    # A killed process left one that only its owner reads.
    (tmp_path / "x.safetensors.partial").touch(0o600)
    save_tensors(ONES, tmp_path / "x.safetensors", {"format": "pt"})
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert mode(tmp_path / "x.safetensors") == plain_mode(tmp_path)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_every_file_of_a_student_and_its_export_has_them(
    tiny_llama: Path, tmp_path: Path, format: Format
) -> None:
    teacher, student, out = open_checkpoint(tiny_llama), tmp_path / "student", tmp_path / "out"
    keep = {"layers.0.ffn/ffn": torch.arange(16)}
    cut = candidate(teacher.architecture, keep)
    prune(teacher, cut, student)
    architecture = with_formats(cut.architecture, [format])
    export_student(student, out, architecture, "compress", {})
    for directory in (student, out):
        files = [file for file in directory.iterdir() if file.is_file()]
        assert any(file.suffix == ".safetensors" for file in files)
        assert {mode(file) for file in files} == {plain_mode(directory)}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_tensors(ONES, file)
    specs = {"a": torch.zeros(3), "b": torch.zeros(2)}

    def write_a(tensor: torch.Tensor) -> None:
        with tensor_writer(file, specs) as write:
            write("a", tensor)

    for wrong in (torch.zeros(3), torch.zeros(4), torch.zeros(3).bfloat16()):
        with pytest.raises(ValueError, match=r"lacks b|a is"):
            write_a(wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(load_file(file)["a"], ONES["a"])


def test_tensors_are_written_in_any_order(tmp_path: Path) -> None:
    dtypes = [dtype for dtype in DTYPES if dtype is not torch.bool]
    tensors = {f"{n}": torch.arange(3).to(dtype) for n, dtype in enumerate(dtypes)}
    tensors |= {"one": torch.tensor(2.0), "none": torch.empty(0, 4), "bool": torch.tensor([True])}
    tensors["turned"] = torch.arange(6.0).view(2, 3).T
    specs = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with tensor_writer(tmp_path / "x", specs, {"format": "pt"}) as write:
        for name in reversed(tensors):
            write(name, tensors[name])
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3).bfloat16(), "b": torch.ones(2, 2), "c": torch.arange(5)}
    save_tensors(tensors, tmp_path / "own", {"format": "pt"})
    save_file(tensors, tmp_path / "library", {"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()
