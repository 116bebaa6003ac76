"""From tensors on disk to the modules of a torch model, one parameter at a time."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.model.architecture import Architecture
from compress.model.families import family_of
from compress.model.layout import Parameter


def place_of(parameter: Parameter, architecture: Architecture) -> str:
    """The name in the torch model of what a checkpoint's tensor is, or is a part of."""
    family, name = family_of(architecture.family), parameter.name
    if (place := parameter.slot.place) is not None:
        assert parameter.block is not None, "a place is one within a layer"
        name = family.layer.format(layer=architecture.blocks[parameter.block].layer) + place
    own = family.embedding.partition(".")[0] + "."
    return "model." + name.removeprefix(own) if name.startswith(own) else name


def part_of(parameter: Parameter, whole: Tensor) -> Tensor:
    """What of a tensor of the torch model, or of a stack on disk, a parameter is, as a view."""
    if parameter.expert is None:
        return whole
    return parameter.slot.part.view(whole[parameter.expert])


def fill(
    model: Any,
    architecture: Architecture,
    tensors: Iterable[tuple[Parameter, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put tensors into a model whose parameters may be on ``meta``, frozen.

    They are cast to ``dtype`` (fp32 where the family's table says so) and moved; one that is so
    already is used as it is, not copied. Fused experts have to come whole; views of what they are
    to be (``fused``) are not copied either.
    """
    stacks: dict[str, Tensor] = {}
    for parameter, tensor in tensors:
        own = torch.float32 if parameter.slot.float32 else dtype
        name = place_of(parameter, architecture)
        if parameter.expert is None:
            put(model, name, tensor.to(device, own))
            continue
        if name not in stacks:
            empty = torch.empty_like(inside(model, name)[2], device=device, dtype=own)
            stacks[name] = whole_of(tensor, empty)
        part = part_of(parameter, stacks[name])
        if part.data_ptr() != tensor.data_ptr():
            part[:] = tensor
    for name, stack in stacks.items():
        put(model, name, stack)


def whole_of(view: Tensor, empty: Tensor) -> Tensor:
    """What a tensor is a view of where that can take the place of ``empty``, which it is else."""
    base = view._base
    if base is None or base.shape != empty.shape or base.dtype != empty.dtype:
        return empty
    return base if base.device == empty.device else empty


def fused(tensors: Sequence[tuple[Parameter, Tensor]], architecture: Architecture) -> list[Tensor]:
    """Tensors of one block, those of fused experts as views of what ``fill`` then takes whole."""
    experts = 1 + max(each.expert or 0 for each, _ in tensors)
    wholes: dict[str, Tensor] = {}
    found = []
    for parameter, tensor in tensors:
        if parameter.expert is not None:
            name = place_of(parameter, architecture)
            if name not in wholes:
                larger = parameter.slot.part.larger(tensor.shape)
                wholes[name] = tensor.new_empty(experts, *larger)
            tensor = part_of(parameter, wholes[name]).copy_(tensor)
        found.append(tensor)
    return found


def inside(model: Any, name: str) -> tuple[nn.Module, str, Tensor]:
    """The module that has a parameter or buffer, its name there, and what it is now."""
    path, _, leaf = name.rpartition(".")
    module: nn.Module = model.get_submodule(path)
    return module, leaf, getattr(module, leaf)


def put(model: Any, name: str, tensor: Tensor) -> None:
    """Make a tensor a model's parameter or buffer; InputError where its shape is another one."""
    module, leaf, before = inside(model, name)
    if before.shape != tensor.shape:
        raise InputError(
            f"{name} has the shape {list(tensor.shape)}, the model needs {list(before.shape)}"
        )
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def empty(model: Any, architecture: Architecture, parameters: Iterable[Parameter]) -> None:
    """Take parameters out of a model again: they go back to ``meta``."""
    for name in {place_of(parameter, architecture) for parameter in parameters}:
        put(model, name, inside(model, name)[2].detach().to("meta"))


def require_filled(model: nn.Module) -> None:
    """InputError where a parameter or buffer is still on ``meta``."""
    state = (*model.named_parameters(), *model.named_buffers())
    if missing := [name for name, tensor in state if tensor.is_meta]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"the checkpoint does not fill the model: {missing[0]}{more} is missing")
