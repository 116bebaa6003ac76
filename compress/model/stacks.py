"""Experts stacked on disk: tables have them one by one, files all of a layer in one tensor.

Quantized they are alone on disk too: a weight, its codes and its scales, under the table's name.
"""

from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor

from compress.model.architecture import Architecture
from compress.model.families import stored_parameters
from compress.model.fill import part_of
from compress.model.layout import Parameter


def stored_shapes(
    architecture: Architecture, alone: Container[str] = ()
) -> Iterator[tuple[str, tuple[int, ...], Parameter]]:
    """Name and shape of every tensor on disk, with a parameter that is in it.

    Parameters that are ``alone`` are left out.
    """
    found = set()
    for each in stored_parameters(architecture):
        name = each.stack or each.name
        if each.name not in alone and name not in found:
            found.add(name)
            yield name, each.stacked or each.shape, each


def stacked(
    tensors: Iterable[tuple[str, Tensor]], architecture: Architecture, alone: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names on disk, of those by the tables': what is stacked comes whole.

    One stack is held while its parts come in a row. Those of parameters that are ``alone``, and
    what no table knows, pass as they are.
    """
    known = {p.name: p for p in stored_parameters(architecture) if p.stack and p.name not in alone}
    left: dict[str, int] = {}
    for each in known.values():
        left[str(each.stack)] = left.get(str(each.stack), 0) + 1
    wholes: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if (parameter := known.get(name)) is None:
            yield name, tensor
            continue
        stack, shape = str(parameter.stack), parameter.stacked
        assert shape is not None, "a stack has a shape"
        if stack not in wholes:
            wholes[stack] = torch.empty(shape, dtype=tensor.dtype)
        part_of(parameter, wholes[stack]).copy_(tensor)
        left[stack] -= 1
        if not left[stack]:
            yield stack, wholes.pop(stack)
