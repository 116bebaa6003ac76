"""Training in formats: fp32 weights are trained, every forward has them as they are stored.

The gradient in the rounded weights is taken for that in the weights (straight-through: Bengio et
al. 2013, arXiv 1308.3432). All that it costs is a rounding a step. Scales stay those of the
calibrated rounding, and masters begin at its values (runs/LOG.md has what else was tried).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from compress.model.architecture import Architecture
from compress.model.families import parameters
from compress.model.fill import part_of, place_of
from compress.model.layout import Parameter
from compress.student.grids import Grid
from compress.train.world import sharded_as, whole

# Of parameters by name what rounds a whole one, in place.
Roundings = Mapping[str, Callable[[Tensor], None]]


def roundings(architecture: Architecture, grids: Mapping[str, Grid]) -> Roundings:
    """How a model's parameters round to what is stored: to grids, by names on disk, or to BF16.

    What is stored in fp32 stays. Nothing rounds where there is no grid.
    """
    held: dict[str, list[Parameter]] = {}
    for each in parameters(architecture) if grids else ():
        held.setdefault(place_of(each, architecture), []).append(each)

    def round_(own: list[Parameter], weight: Tensor) -> None:
        for each in own:
            part, grid = part_of(each, weight), grids.get(each.name)
            if grid is not None:
                grid.round(part, part)
            elif not each.slot.float32:
                part.copy_(part.bfloat16())

    return {name: partial(round_, own) for name, own in held.items()}


class Masters:
    """What is trained of a module whose weights are rounded: masters, which begin as these are.

    The module holds what is stored; inside ``in_place`` it holds the masters, and afterwards what
    these round to.
    """

    def __init__(self, module: nn.Module, roundings: Roundings) -> None:
        self.parameters = dict(module.named_parameters())
        self.masters = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.roundings = roundings

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module with its masters; what they have become is rounded afterwards."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.masters[name])
        try:
            yield
        finally:
            self.take()

    @torch.no_grad()
    def take(self) -> None:
        """Make what the module holds the masters, and round it."""
        for name, parameter in self.parameters.items():
            self.masters[name].copy_(parameter)
            if (round_ := self.roundings.get(name)) is not None:
                weight = whole(self.masters[name]).clone()
                round_(weight)
                parameter.copy_(sharded_as(weight, parameter))
