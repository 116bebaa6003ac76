"""The files of a search, invented: what is read of them needs no model."""

from pathlib import Path

from compress.formats.table import Format, by_group
from compress.memory.footprint import Deployment
from compress.model.architecture import Architecture, Ffn
from compress.report.rows import Student, Teacher, write_students, write_teacher


def architecture(ffn: int, format: Format = "bf16") -> Architecture:
    formats = by_group({"gate_up": format, "down": format})
    block = Ffn(layer=0, ffn=ffn, gated=True, formats=formats)
    return Architecture(family="llama", vocab=4, hidden=8, tied=True, blocks=(block,))


def student(name: str, made: Architecture, *, selected: bool = True) -> Student:
    return Student(
        id=name, kind="joint", budget=9, bytes=8, parameters=4, active_parameters=4,
        predicted_kl=0.1, measured_kl=0.1, measured_se=0.01, measured_sequences=5,
        selected=selected, architecture=made,
    )  # fmt: skip


def write_search(run: Path, *students: Student) -> None:
    """The files of a search."""
    write_students(students, run)
    teacher = Teacher(
        name="t", path="t", files={}, architecture=architecture(16), bytes={}, budget=9,
        deployment=Deployment(context=8),
    )  # fmt: skip
    write_teacher(teacher, run)
