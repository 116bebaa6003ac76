"""Training in formats: what a forward has is what is stored, exported and loaded."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import with_formats
from test_distill import SETTINGS, Interrupted, quiet, stop_at_three, taught, tokens

from compress.export.student import round_student, store_student
from compress.formats.table import FORMATS, Format
from compress.model.architecture import Architecture
from compress.model.build import disk_tensors, load, load_model
from compress.model.checkpoint import in_bf16, open_checkpoint
from compress.model.modules import final_hidden
from compress.student.grids import Grid, grids_of, on_grids
from compress.student.rounding import Inputs, round_group
from compress.sweep.placement import Placement
from compress.train.distill import distill
from compress.train.masters import Masters, Roundings, roundings


@dataclass(frozen=True)
class Student:
    """A teacher's student in every format, and how it is trained in them."""

    teacher: Path
    path: Path
    architecture: Architecture
    grids: Mapping[str, Grid]

    @property
    def roundings(self) -> Roundings:
        return roundings(self.architecture, self.grids)


@pytest.fixture(scope="module", params=["llama", "hybrid"])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    teacher: Path = request.getfixturevalue(f"tiny_{request.param}")
    formats: list[Format] = ["nvfp4", "fp8", "mxfp4", "bf16"]
    architecture = with_formats(open_checkpoint(teacher).architecture, formats)
    path = tmp_path_factory.mktemp("formats") / "student"
    round_student(teacher, path, architecture, tokens(), "second-order")
    return Student(teacher, path, architecture, grids_of(path, architecture, torch.device("cpu")))


def test_every_forward_has_what_is_stored_and_training_helps(
    rounded: Student, tmp_path: Path
) -> None:
    student, architecture, grids = load_model(rounded.path), rounded.architecture, rounded.grids
    start = {name: w.clone() for name, w in student.state_dict().items()}
    seen: list[float] = []

    def on_the_grid(done: int, steps: int, figures: dict[str, float]) -> None:
        seen.append(figures["loss"])
        weights = dict(disk_tensors(student, architecture))
        for name, near in in_bf16(weights.items(), architecture):
            weight, near = weights[name], near.float()
            if name in grids:
                near = torch.empty_like(weight)
                grids[name].round(weight, near)
            assert torch.equal(weight, near), name

    settings = dataclasses.replace(SETTINGS, tokens=40 * 64)
    distill(
        taught(rounded.teacher, tokens()), student, tokens(), settings, progress=on_the_grid,
        roundings=rounded.roundings,
    )  # fmt: skip
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
    moved = [name for name, weight in student.state_dict().items() if (weight != start[name]).any()]
    assert len(moved) > len(start) / 2
    trained = in_bf16(disk_tensors(student, architecture), architecture)
    store_student(rounded.path, tmp_path / "out", architecture, on_grids(trained, grids))
    rows: Any = tokens(3)
    assert torch.equal(final_hidden(load(tmp_path / "out"), rows), final_hidden(student, rows))


def test_interrupted_and_resumed_is_uninterrupted(rounded: Student, tmp_path: Path) -> None:
    asked, how = (tokens(), SETTINGS, Placement()), rounded.roundings
    lesson = taught(rounded.teacher, tokens())
    whole, stopped, resumed = (load_model(rounded.path) for _ in range(3))
    curve = distill(lesson, whole, *asked, progress=quiet, roundings=how)
    with pytest.raises(Interrupted):
        distill(lesson, stopped, *asked, tmp_path, stop_at_three, roundings=how)
    assert distill(lesson, resumed, *asked, tmp_path, quiet, roundings=how) == curve
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_without_formats_it_is_distillation(tiny_hybrid: Path) -> None:
    none = roundings(open_checkpoint(tiny_hybrid).architecture, {})
    students = [load_model(tiny_hybrid) for _ in range(2)]
    for student, how in zip(students, (none, None), strict=True):
        distill(
            taught(tiny_hybrid, tokens()), student, tokens(), SETTINGS, progress=quiet,
            roundings=how,
        )  # fmt: skip
    for name, weight in students[0].state_dict().items():
        assert torch.equal(weight, students[1].state_dict()[name]), name


def test_masters_begin_where_rounding_left_them(rounded: Student) -> None:
    student = load_model(rounded.path)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    Masters(student, rounded.roundings).take()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "bf16"])
def test_what_is_on_a_grid_is_stored_without_loss(format: Any) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    [found] = round_group([weight], format, [Inputs(lambda: torch.eye(256), 512)])
    grid = Grid(format, found.stored[1:])
    assert torch.equal(FORMATS[format].numerics.unpack(*grid.stored(found.values)), found.values)
