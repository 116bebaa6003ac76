"""A student's weights rounded to nearest, each when it is asked for."""

from collections.abc import Callable
from functools import cache

from torch import Tensor

from compress.formats.fake import shared
from compress.formats.table import FORMATS
from compress.model.architecture import Architecture
from compress.model.build import weight_format
from compress.model.families import parameters
from compress.model.layout import Parameter


def rounded(
    read: Callable[[Parameter], Tensor], architecture: Architecture
) -> Callable[[Parameter], Tensor]:
    """What gives a parameter after its format and back, fp32 where that is not BF16.

    ``read`` gives parameters in BF16. The largest magnitude of a fused group is taken once. What
    is rounded on text instead, and stored, is made by ``calibration``.
    """
    groups: dict[tuple[int | None, str | None], list[Parameter]] = {}
    for each in parameters(architecture):
        groups.setdefault((each.block, each.slot.fused), []).append(each)

    @cache
    def common(block: int | None, group: str | None) -> tuple[Tensor, ...]:
        parameters = groups[block, group]
        return shared(map(read, parameters), weight_format(architecture, parameters[0]))

    def give(parameter: Parameter) -> Tensor:
        if (format := weight_format(architecture, parameter)) == "bf16":
            return read(parameter)
        row = FORMATS[format]
        row.require(parameter.shape)
        found: Tensor = row.numerics.fake(
            read(parameter).float(), *common(parameter.block, parameter.slot.fused)
        )
        return found

    return give
