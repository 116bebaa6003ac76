"""The values that stored weights can take at the scales they have, for training between them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.formats.blocks import CHUNK
from compress.formats.packed import stored_names
from compress.formats.table import FORMATS, INPUT_SCALE, Format
from compress.model.architecture import Architecture
from compress.model.build import weight_formats
from compress.model.checkpoint import open_checkpoint
from compress.model.headers import stored_tensors
from compress.student.rounding import in_groups


@dataclass(frozen=True)
class Grid:
    """A weight's format and what is stored beside its codes, input scales last."""

    format: Format
    beside: tuple[Tensor, ...]

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """What codes are multiplied with."""
        suffixes = FORMATS[self.format].suffixes
        return self.beside[: sum(suffix != INPUT_SCALE for suffix in suffixes)]

    def round(self, weight: Tensor, out: Tensor) -> None:
        """The values nearest to a weight [out, in], fp32, put into ``out``."""
        row = FORMATS[self.format]
        steps, count = row.numerics.steps(*self.scales), max(1, CHUNK // weight.shape[1])
        for start in range(0, len(weight), count):
            rows = slice(start, start + count)
            own = (steps[rows] if steps.dim() else steps)[..., None]
            scaled = in_groups(weight[rows].float(), row) / own
            out[rows] = row.numerics.round_(scaled).mul_(own).flatten(-2)

    def stored(self, values: Tensor) -> tuple[Tensor, ...]:
        """What is stored of a weight: codes, and what is beside them."""
        return (FORMATS[self.format].numerics.encode(values, *self.scales), *self.beside)


def grids_of(directory: Path, architecture: Architecture, device: torch.device) -> dict[str, Grid]:
    """The grids of a rounded student's weights on a device, by their names on disk."""
    checkpoint = open_checkpoint(directory)
    stored = stored_tensors(directory, checkpoint.config)

    def read(name: str) -> Tensor:
        return checkpoint.read(stored[name]).to(device)

    return {
        name: Grid(format, tuple(map(read, stored_names(name, format)[1:])))
        for name, format in weight_formats(architecture).items()
    }


def on_grids(
    tensors: Iterable[tuple[str, Tensor]], grids: Mapping[str, Grid]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they are stored, of those that have a grid codes and scales."""
    for name, tensor in tensors:
        if (grid := grids.get(name)) is None:
            yield name, tensor
        else:
            yield from zip(stored_names(name, grid.format), grid.stored(tensor), strict=True)
