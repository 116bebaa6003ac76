"""What linear layers read: the magnitudes that input scales are taken from."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.model.architecture import Architecture
from compress.model.experts import Experts, experts_of_block
from compress.model.layout import Slot
from compress.model.modules import layer_of, slots_of
from compress.sweep.stack import Stack

CALIBRATION_ROWS, CALIBRATION_TOKENS = 8, 64
Group = tuple[int, str]  # a block's number and one of its fused groups


@torch.no_grad()
def input_ranges(stack: Stack, rows: Tensor) -> dict[Group, Tensor]:
    """The largest magnitude that the layers of every fused group read over token rows [B, T].

    fp32 [], where the stack is. Routed experts read what all of them are routed to.
    """
    found: dict[Group, Tensor] = {}

    def note(number: int, slot: Slot, x: Tensor) -> None:
        if x.numel():
            amax, group = x.abs().amax().float(), (number, str(slot.fused))
            found[group] = torch.maximum(amax, found.get(group, amax))

    def linear(number: int, slot: Slot, module: Any, args: tuple[Tensor, ...]) -> None:
        note(number, slot, args[0])

    def routed(
        number: int, experts: Experts, module: Any, args: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        for _, slot in experts.reading:
            note(number, slot, args[0])
        for _, inner, _ in experts.routed(*args):
            note(number, experts.writing[1], inner)

    with ExitStack() as hooks:
        for number, block in enumerate(stack.architecture.blocks):
            for name, slot in slots_of(stack.architecture, block, experts=False).items():
                module = layer_of(stack.model, block).get_submodule(name)
                tap = partial(linear, number, slot)
                hooks.callback(module.register_forward_pre_hook(tap).remove)
            if experts := experts_of_block(stack.model, stack.architecture, block):
                tap = partial(routed, number, experts)
                hooks.callback(experts.module.register_forward_pre_hook(tap).remove)
        hidden = stack.embed(rows)
        for layer, module in stack.visits(range(stack.layers)):
            hidden = stack.run(layer, module, hidden)
    return found


def token_rows(architecture: Architecture, seed: int = 0) -> Tensor:
    """Token rows drawn uniformly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    shape = (CALIBRATION_ROWS, CALIBRATION_TOKENS)
    return torch.randint(architecture.vocab, shape, generator=generator)
