"""The gated teacher: a student's structure as masks on its teacher, equal to the cut on every axis.

Dead units are computed and then multiplied by zero, so that a gradient still says what bringing
them back would change. Experts that are gone are never routed to; theirs has no gradient. Masks are
put on a layer for its visit, and on the final norm.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.architecture import Architecture, Block, sizes
from compress.model.experts import Experts, experts_of_block, routing_among
from compress.model.families import family_of
from compress.model.layout import kept_positions, parse, shape
from compress.model.modules import (
    final_norm,
    layer_of,
    post_of,
    readers_of,
    router_of,
    with_hidden,
)
from compress.student.candidate import block_keep
from compress.student.units import Projection, Units, array_of, projections, read_by_experts
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack


def summed(values: Tensor, units: Units, axis: str) -> Tensor:
    """Values of an axis' units from those of the finest ones [..., *units.axes]."""
    others = units.others(axis)
    return values.sum(others) if others else values


def alive(block: Block, units: Units, keep: Mapping[str, Tensor]) -> Tensor:
    """Mask over a unit array: 1 where the unit is kept."""
    shape = units.shape(block)
    mask = torch.ones(shape)
    for name, axis in units.cut.items():
        if name not in keep:
            continue
        at = units.axes.index(name)
        if axis.within is None:
            own = torch.zeros(shape[at]).index_fill_(0, keep[name], 1)
        else:
            own = torch.zeros(shape[at - 1], shape[at])
            rows = keep.get(axis.within, torch.arange(len(own)))
            own[rows] = own[rows].scatter(1, keep[name], 1)
        mask *= own.reshape(*own.shape, *[1] * (len(shape) - at - 1))
    return mask


def is_alive(keep: Mapping[str, Tensor], number: int) -> bool:
    """Whether a block of the teacher survives."""
    return "blocks" not in keep or number in keep["blocks"].tolist()


def unit_mask(
    architecture: Architecture, keep: Mapping[str, Tensor], number: int, units: Units
) -> Tensor:
    """Mask over one of a block's unit arrays; all zero where the block is gone."""
    block = architecture.blocks[number]
    if not is_alive(keep, number):
        return torch.zeros(units.shape(block))
    return alive(block, units, block_keep(keep, block))


class Unmasked:
    """Masks on modules, and what those were given before the mask in their last forward."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.inputs: dict[nn.Module, Tensor] = {}

    def mask(self, module: Any, mask: Tensor, count: float = 1.0) -> Any:
        """Multiply a module's first input by ``mask`` [features]; the handle takes it off.

        All of it is multiplied by ``count`` before.
        """
        values = mask.to(self.placement.device, self.placement.dtype)

        def changed(x: Tensor) -> Tensor:
            given = x if count == 1 else x * count
            self.inputs[module] = given.detach()
            return given * values

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_hidden(args, kwargs, changed)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def mask_norm(self, module: Any, mask: Tensor) -> Any:
        """Mask what a norm averages over, as surgery does.

        That scales the norm's weight by the root of how many fewer are averaged; before the norm it
        does the same, eps included.
        """
        return self.mask(module, mask, float(len(mask) / mask.sum()) ** 0.5)


@contextmanager
def masked(stack: Stack, layer: int, keep: Mapping[str, Tensor]) -> Iterator[Unmasked]:
    """A layer as in the student of ``keep``.

    Inside the layer's visit: the experts' bias is one of its buffers.
    """
    model, architecture, unmasked = stack.model, stack.architecture, Unmasked(stack.placement)
    with ExitStack() as hooks:
        for number, block in numbered(architecture, layer):
            whole, own = is_alive(keep, number), block_keep(keep, block)
            if "hidden" in keep:
                # Of norms that read the residual stream, or what is about to be added to it,
                # surgery folds the changed width.
                for module in filter(None, (*readers_of(model, block), post_of(model, block))):
                    hooks.callback(unmasked.mask(module, hidden_mask(architecture, keep)).remove)
            if whole and own.keys() <= {"hidden"}:
                continue
            for name, mask in norms_over_heads(architecture, block, own) if whole else ():
                norm = layer_of(model, block).get_submodule(name)
                hooks.callback(unmasked.mask_norm(norm, mask).remove)
            for projection in projections(architecture, block):
                if projection.expert is not None:
                    continue
                mask = unit_mask(architecture, keep, number, projection.units)
                inside = layer_of(model, block)
                # A block that is gone leaves no units that a norm could average over.
                norm = projection.averaged if whole else None
                if norm is not None:
                    averaged, mask = around_norm(mask, projection)
                    seen = averaged.flatten()
                    values = seen.repeat_interleave(projection.features)
                    hooks.callback(unmasked.mask_norm(inside.get_submodule(norm), values).remove)
                if norm is None or projection.alike:
                    values = mask.flatten().repeat_interleave(projection.features)
                    module = inside.get_submodule(projection.module)
                    hooks.callback(unmasked.mask(module, values).remove)
                    if not whole and getattr(module, "bias", None) is not None:
                        hooks.callback(module.register_forward_hook(without_bias).remove)
            experts = experts_of_block(model, architecture, block)
            if experts and (read := read_by_experts(architecture, block)):
                mask = unit_mask(architecture, keep, number, read)
                hooks.callback(unmasked.mask(experts.module, mask).remove)
            if experts and ("expert_ffn" in own or not whole):
                mask = unit_mask(architecture, keep, number, array_of(block, "expert_ffn"))
                mask = mask.to(stack.placement.device, stack.placement.dtype)
                forward = narrow(experts, mask, bias=whole)
                hooks.enter_context(replaced_forward(experts.module, forward))
            if whole and "expert" in own:
                hooks.enter_context(routing_among(router_of(model, block), own["expert"]))
        yield unmasked


def norms_over_heads(
    architecture: Architecture, block: Block, keep: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The modules of norms over all heads some of which go, with masks over what they average."""
    for name, slot in family_of(architecture.family).tensors(block).items():
        if slot.over_heads and not keep.keys().isdisjoint(slot.normalizes):
            [dimension], [size] = parse(slot.shape), shape(slot.shape, sizes(block))
            kept = kept_positions(dimension, sizes(block), keep)
            yield name.removesuffix(".weight"), torch.zeros(size).index_fill_(0, kept, 1)


def without_bias(module: Any, args: object, output: Tensor) -> Tensor:
    """Hook of a linear module whose block is gone: what it adds to any input goes too."""
    found: Tensor = output - module.bias
    return found


def around_norm(mask: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """Masks over units before a projection's norm and behind it, which make one together.

    Before it are those that it has a weight for each of, behind it those that share one.
    """
    axes, alike = projection.units.axes, projection.alike
    shared = [at for at, axis in enumerate(axes) if axis in alike]
    own = [at for at, axis in enumerate(axes) if axis not in alike]
    before = mask.amax(shared) if shared else mask
    return before, mask.amax(own, keepdim=True).expand_as(mask)


def narrow(experts: Experts, mask: Tensor, *, bias: bool) -> Callable[..., Tensor]:
    """A forward of experts whose neurons are masked, [experts, neurons]."""

    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        output = torch.zeros_like(x, dtype=weight.dtype)
        for expert, (token, neurons, share) in enumerate(experts.routed(x, index, weight)):
            own = experts.write(neurons * mask[expert], expert, bias=bias) * share
            output = output.index_add(0, token, own.to(output.dtype))
        return output.to(x.dtype)

    return forward


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """A module with another forward; its own, or the one that it had, is back afterwards."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward  # the class's own shows again
        else:
            module.forward = before


@contextmanager
def masked_final(stack: Stack, keep: Mapping[str, Tensor]) -> Iterator[Unmasked]:
    """The final norm as in the student of ``keep``."""
    unmasked = Unmasked(stack.placement)
    with ExitStack() as hooks:
        if "hidden" in keep:
            mask = hidden_mask(stack.architecture, keep)
            hooks.callback(unmasked.mask(final_norm(stack.model), mask).remove)
        yield unmasked


def hidden_mask(architecture: Architecture, keep: Mapping[str, Tensor]) -> Tensor:
    """Mask over the hidden channels, of a student that keeps some."""
    return torch.zeros(architecture.hidden).index_fill_(0, keep["hidden"], 1)


def numbered(architecture: Architecture, layer: int) -> list[tuple[int, Block]]:
    """The blocks of a layer with their numbers."""
    blocks = enumerate(architecture.blocks)
    return [(number, block) for number, block in blocks if block.layer == layer]
