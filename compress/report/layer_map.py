"""The picture of a student inside its teacher: every block, what was kept along every axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.formats.table import Format
from compress.model.architecture import Architecture, Block, block_name, sizes
from compress.student.units import AXES

MOST_PIXELS = 820
CELL_PIXELS = (9, 58)
ROW_PIXELS = 30
LABEL_PIXELS = 150


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One axis of one teacher block; ``format`` is None where the block was removed."""

    column: int
    block: str
    axis: str
    kept: int
    whole: int
    format: Format | None

    @property
    def share(self) -> float:
        """Kept share of the axis."""
        return self.kept / self.whole

    @property
    def text(self) -> str:
        """The cell in words."""
        if self.format is None:
            return f"{self.block}: removed"
        return f"{self.block}: {self.axis} {self.kept} of {self.whole}, {self.format.upper()}"


@dataclass(frozen=True, kw_only=True)
class MapRow:
    """One axis over all layers."""

    kind: str
    axis: str
    cells: tuple[Cell, ...]
    y: int

    @property
    def share(self) -> float:
        """Kept share over all blocks."""
        return sum(cell.kept for cell in self.cells) / sum(cell.whole for cell in self.cells)


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """Rows of cells and the geometry to draw them."""

    rows: tuple[MapRow, ...]
    layers: int
    cell: int
    blocks: tuple[int, int]
    hidden: tuple[int, int]
    label: int = LABEL_PIXELS
    row_height: int = ROW_PIXELS

    @property
    def width(self) -> int:
        """Of the picture, in pixels."""
        return self.label + self.layers * self.cell + 60

    @property
    def height(self) -> int:
        """Of the picture, in pixels."""
        return self.rows[-1].y + self.row_height + 26

    @property
    def ticks(self) -> list[int]:
        """Layers to number: few enough to be read."""
        step = next(n for n in (1, 2, 5, 10, 20, 50) if n * self.cell >= 24 or n == 50)
        return list(range(0, self.layers, step))

    @property
    def summary(self) -> str:
        """The picture in one sentence."""
        kept, whole = self.blocks
        axes = ", ".join(f"{row.kind} {row.axis} {row.share:.0%}" for row in self.rows)
        return f"{kept} of {whole} blocks kept; kept shares: {axes}"


def match_blocks(
    teacher: Architecture, student: Architecture, keep: Mapping[str, Any] | None
) -> dict[int, Block] | None:
    """Student block by number of the teacher block it was cut from.

    None when that is unknown: without ``keep`` only a student that kept every block can be matched.
    """
    if keep is not None:
        numbers: Sequence[int] = keep["blocks"].tolist()
        return dict(zip(numbers, student.blocks, strict=True))
    if [block.kind for block in teacher.blocks] == [block.kind for block in student.blocks]:
        return dict(enumerate(student.blocks))
    return None


def layer_map(
    teacher: Architecture, student: Architecture, keep: Mapping[str, Any] | None
) -> LayerMap | None:
    """The picture; None when the student's blocks cannot be matched to the teacher's."""
    matched = match_blocks(teacher, student, keep)
    if matched is None:
        return None
    rows: list[MapRow] = []
    y = 4
    for kind, axes in AXES.items():
        if not any(block.kind == kind for block in teacher.blocks):
            continue
        for axis in axes:
            cells = tuple(
                cell_of(block, matched.get(number), axis)
                for number, block in enumerate(teacher.blocks)
                if block.kind == kind
            )
            rows.append(MapRow(kind=kind, axis=axis, cells=cells, y=y))
            y += ROW_PIXELS
        y += 10
    least, most = CELL_PIXELS
    columns = max(block.layer for block in teacher.blocks) + 1
    return LayerMap(
        rows=tuple(rows),
        layers=columns,
        cell=min(most, max(least, MOST_PIXELS // columns)),
        blocks=(len(student.blocks), len(teacher.blocks)),
        hidden=(student.hidden, teacher.hidden),
    )


def cell_of(teacher: Block, student: Block | None, axis: str) -> Cell:
    """The cell of one block and axis."""
    return Cell(
        column=teacher.layer,
        block=block_name(teacher),
        axis=axis,
        kept=0 if student is None else sizes(student)[axis],
        whole=sizes(teacher)[axis],
        format=None if student is None else student.format,
    )
