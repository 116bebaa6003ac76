"""What a search writes of its candidates and its teacher, and every later stage reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError, with_config

from compress.core.errors import InputError
from compress.core.files import read_json, write_json
from compress.core.settings import first_fault
from compress.memory.footprint import Deployment, Footprint, footprint
from compress.model.architecture import STRICT, Architecture

CANDIDATES, TEACHER = "candidates.json", "teacher.json"
Value = TypeVar("Value")


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class Student:
    """A row of ``candidates.json``; KL in nats per token on the selection text.

    ``repaired`` are the teacher's block numbers, ``reselected`` counts units that are not those of
    the ranking, ``stock`` are students that are plain BF16 checkpoints of their family.
    """

    id: str
    kind: str
    budget: int
    bytes: int
    parameters: int
    active_parameters: int
    predicted_kl: float
    gap: float | None = None
    measured_kl: float
    measured_se: float
    measured_sequences: int
    distilled_kl: float | None = None
    distilled_tokens: int | None = None
    finalist: bool = False
    selected: bool = False
    repaired: tuple[int, ...] = ()
    reselected: int = 0
    stock: bool = False
    architecture: Architecture

    @property
    def kl(self) -> float:
        """The latest figure: after distillation if it had any."""
        return self.measured_kl if self.distilled_kl is None else self.distilled_kl


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class Teacher:
    """``teacher.json``: what was compressed, for which deployment, into how many bytes.

    ``files`` are the sha256 of its files by name.
    """

    name: str
    path: str
    files: dict[str, str]
    note: str = ""
    architecture: Architecture
    bytes: dict[str, int]
    budget: int
    deployment: Deployment

    @property
    def footprint(self) -> Footprint:
        """Its bytes as it is deployed."""
        return footprint(self.architecture, self.deployment)


STUDENTS, TEACHERS = TypeAdapter(tuple[Student, ...]), TypeAdapter(Teacher)


def write_students(students: Sequence[Student], run: Path) -> None:
    """Write ``candidates.json`` of a run, best first."""
    write_json(run / CANDIDATES, STUDENTS.dump_python(tuple(students), mode="json"))


def read_students(run: Path) -> tuple[Student, ...]:
    """The candidates of a run, best first; none where it was not searched.

    Raises:
        InputError: the file is not what a search writes; it names the row.
    """
    return read(run / CANDIDATES, STUDENTS) or ()


def selected_of(students: Sequence[Student]) -> list[Student]:
    """The students that a run stands for, one per budget."""
    return [student for student in students if student.selected]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at most as large as in both coordinates, by the first one."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def write_teacher(teacher: Teacher, run: Path) -> None:
    """Write ``teacher.json`` of a run."""
    write_json(run / TEACHER, TEACHERS.dump_python(teacher, mode="json"))


def read_teacher(run: Path) -> Teacher | None:
    """The teacher of a run, None where it was not searched; InputError as of ``read_students``."""
    return read(run / TEACHER, TEACHERS)


def read(file: Path, kind: TypeAdapter[Value]) -> Value | None:
    """The value of a JSON file, None if it is not there."""
    if not file.is_file():
        return None
    read_json(file)
    try:
        return kind.validate_json(file.read_bytes())
    except ValidationError as error:
        raise InputError(f"{file}, {first_fault(error)}; search again to write it") from error
