"""The picture of a student inside its teacher: every block, what was kept along every axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.formats.table import KV_BYTES, KV_FORMATS, Format, KvFormat, used_in
from compress.model.architecture import Architecture, Block, block_name, kv_format_of, sizes
from compress.report.figures import words
from compress.student.units import AXES

ROW_PIXELS, GAP_PIXELS, TOP_PIXELS = 30, 10, 4


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One axis of one teacher block; ``formats`` are none where the block was removed.

    Else the format of every linear group, or one where they agree, and ``text`` says it in words.
    Or its KV cache, in bits of a number.
    """

    column: int
    block: str
    kept: int
    whole: int
    formats: tuple[Format | KvFormat, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class MapRow:
    """One axis over all layers, and its place on the page."""

    kind: str
    axis: str
    cells: tuple[Cell, ...]
    y: int

    @property
    def share(self) -> float:
        """Kept share over all blocks."""
        return sum(cell.kept for cell in self.cells) / sum(cell.whole for cell in self.cells)


def layer_map(
    teacher: Architecture, student: Architecture, keep: Mapping[str, Any] | None
) -> list[MapRow] | None:
    """Rows of the picture; None when the student's blocks cannot be matched to the teacher's.

    Without ``keep`` only a student that kept every block can be matched.
    """
    numbers: Sequence[int] = range(len(teacher.blocks)) if keep is None else keep["blocks"].tolist()
    if keep is None and [b.kind for b in teacher.blocks] != [b.kind for b in student.blocks]:
        return None
    matched = dict(zip(numbers, student.blocks, strict=True))
    rows: list[MapRow] = []
    y = TOP_PIXELS
    for kind, axes in AXES.items():
        blocks = [(n, block) for n, block in enumerate(teacher.blocks) if block.kind == kind]
        having = {a: [(n, b) for n, b in blocks if a in sizes(b)] for a in axes}
        found = {
            axis: tuple(cell_of(block, matched.get(number), axis) for number, block in own)
            for axis, own in having.items()
        }
        caches = [(n, b) for n, b in blocks if kv_format_of(b) is not None]
        found["KV bits"] = tuple(cache_cell(block, matched.get(n)) for n, block in caches)
        for axis, cells in found.items():
            if cells:
                rows.append(MapRow(kind=kind, axis=axis, cells=cells, y=y))
                y += ROW_PIXELS
        y += GAP_PIXELS if blocks else 0
    return rows


def cell_of(teacher: Block, student: Block | None, axis: str) -> Cell:
    """The cell of one block and axis."""
    used = tuple(used_in(student.formats)) if student else ()
    text = "".join(used).upper() or "removed"
    if student and len(used) > 1:
        used = tuple(format for _, format in student.formats)
        text = ", ".join(f"{words(group)} {format.upper()}" for group, format in student.formats)
    return Cell(
        column=teacher.layer,
        block=block_name(teacher),
        kept=sizes(student)[axis] if student else 0,
        whole=sizes(teacher)[axis],
        formats=used,
        text=text,
    )


def cache_cell(teacher: Block, student: Block | None) -> Cell:
    """The cell of one block's KV cache."""
    kv_format = kv_format_of(student) if student else None
    return Cell(
        column=teacher.layer,
        block=block_name(teacher),
        kept=8 * KV_BYTES[kv_format] if kv_format else 0,
        whole=8 * KV_BYTES[KV_FORMATS[0]],
        formats=(kv_format,) if kv_format else (),
        text=kv_format.upper() if kv_format else "removed",
    )
