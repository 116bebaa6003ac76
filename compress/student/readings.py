"""What the weights of a fused group read while their layer runs on a text: what rounding needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.architecture import Block
from compress.model.experts import Experts, experts_of_block
from compress.model.modules import layer_of, slots_of
from compress.student.rounding import Inputs
from compress.sweep.stack import Stack


class Seen(Exception):
    """Raised in a layer when everything that was looked for has been seen."""


@dataclass
class Read:
    """What one or several linear layers read: X^T X, how many tokens, the largest magnitude."""

    gram: Tensor
    tokens: int = 0
    largest: list[Tensor] = field(default_factory=list)

    def matrix(self) -> Tensor:
        """X^T X; zeros where it was not asked for."""
        return self.gram

    def add(self, x_ND: Tensor, *, second: bool) -> None:
        """More tokens; X^T X only where ``second`` moments are asked for."""
        if second:
            x_ND = x_ND.float()
            self.gram.addmm_(x_ND.T, x_ND)
        self.tokens += len(x_ND)
        self.largest.append(x_ND.abs().amax().float())


def group_inputs(
    stack: Stack,
    layer: nn.Module,
    block: Block,
    names: Sequence[str],
    hidden: Sequence[Tensor],
    *,
    second: bool = True,
) -> tuple[list[Inputs], Tensor]:
    """What the weights of a fused group read in a layer, and its largest magnitude.

    ``names`` are their modules in the layer, ``hidden`` what enters it. Without ``second`` moments
    no Gram matrix is made.
    """

    def run() -> None:
        for states in hidden:
            with suppress(Seen):
                stack.run(block.layer, layer, states)

    if names[0] in slots_of(stack.architecture, block, experts=False):
        return plain_inputs(layer_of(stack.model, block), names, run, second=second)
    experts = experts_of_block(stack.model, stack.architecture, block)
    assert experts is not None
    return expert_inputs(experts, names, run)


def head_inputs(stack: Stack, hidden: Sequence[Tensor]) -> tuple[Inputs, Tensor]:
    """What the head reads of what leaves the last layer, and its largest magnitude."""
    width = stack.architecture.hidden
    with stack.head():
        read = Read(hidden[0].new_zeros(width, width, dtype=torch.float32))
        for states in hidden:
            read.add(stack.normed(states).flatten(0, -2), second=True)
    return Inputs(read.matrix, read.tokens), torch.stack(read.largest).amax()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two layers read the same."""
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def plain_inputs(
    layer: Any, names: Sequence[str], run: Callable[[], None], *, second: bool
) -> tuple[list[Inputs], Tensor]:
    """What linear layers read while ``run`` runs the layer, and its largest magnitude."""
    modules = {name: layer.get_submodule(name) for name in names}
    reads, seen = dict[str, Read](), dict[str, Tensor]()

    def tap(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Rounded inputs are equal, not the same.
            first = next((other for other, x in seen.items() if same(x, args[0])), None)
            seen[name] = args[0]
            if first is not None:
                reads[name] = reads[first]
            else:
                if name not in reads:
                    width = args[0].shape[-1] if second else 0
                    reads[name] = Read(args[0].new_zeros(width, width, dtype=torch.float32))
                reads[name].add(args[0].flatten(0, -2), second=second)
            if len(seen) == len(modules):
                seen.clear()
                raise Seen

        return hook

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(tap(name)).remove)
        run()
    known = {id(read): Inputs(read.matrix, read.tokens) for read in reads.values()}
    largest = [each for read in reads.values() for each in read.largest]
    return [known[id(reads[name])] for name in names], torch.stack(largest).amax()


def expert_inputs(
    experts: Experts, names: Sequence[str], run: Callable[[], None]
) -> tuple[list[Inputs], Tensor]:
    """What routed experts read while ``run`` runs the layer: tokens, or neurons for what writes.

    Of each expert over the tokens routed to it; neurons are weighted by its routing weight, as what
    they put out is.
    """
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        calls.append(args)
        raise Seen

    with ExitStack() as hooks:
        hooks.callback(experts.module.register_forward_pre_hook(hook).remove)
        run()
    writes = experts.writing[0].format(expert=0) in names

    def read(expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every call what the expert reads [t, in], and its weights [t, 1]."""
        for x, index, weight in calls:
            token, choice = torch.where(index == expert)
            own = x[token]
            if writes:
                own = experts.neurons(experts.read(own, expert))
            yield own, weight[token, choice, None]

    def gram(expert: int) -> Tensor:
        parts = [own * weight if writes else own for own, weight in read(expert)]
        rows = torch.cat(parts).float()
        return rows.T @ rows

    found, largest = dict[str, Inputs](), [calls[0][0].new_zeros((), dtype=torch.float32)]
    for expert in range(len(experts)):
        parts = [own for own, _ in read(expert)]
        largest += [own.abs().amax().float() for own in parts if own.numel()]
        inputs = Inputs(partial(gram, expert), sum(map(len, parts)))
        found |= {name.format(expert=expert): inputs for name in experts.matrices}
    return [found[name] for name in names], torch.stack(largest).amax()
