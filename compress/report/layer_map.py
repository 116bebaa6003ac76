"""The picture of a student inside its teacher: every block, what was kept along every axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.formats.table import Format
from compress.model.architecture import Architecture, Block, block_name, sizes
from compress.student.units import AXES

ROW_PIXELS, GAP_PIXELS, TOP_PIXELS = 30, 10, 4


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One axis of one teacher block; ``format`` is None where the block was removed."""

    column: int
    block: str
    kept: int
    whole: int
    format: Format | None


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
        for axis in axes if blocks else ():
            cells = tuple(cell_of(block, matched.get(number), axis) for number, block in blocks)
            rows.append(MapRow(kind=kind, axis=axis, cells=cells, y=y))
            y += ROW_PIXELS
        y += GAP_PIXELS if blocks else 0
    return rows


def cell_of(teacher: Block, student: Block | None, axis: str) -> Cell:
    """The cell of one block and axis."""
    return Cell(
        column=teacher.layer,
        block=block_name(teacher),
        kept=sizes(student)[axis] if student else 0,
        whole=sizes(teacher)[axis],
        format=student.format if student else None,
    )
