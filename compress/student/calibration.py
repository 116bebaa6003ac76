"""A student rounded layer by layer on real text, as it runs with all before it rounded.

Every fused group is rounded by what it reads in the student itself: the layer runs as far as the
group with what is rounded so far, and once more when all of it is. In memory are one layer, its
Gram matrices one at a time, and the text's hidden states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats.fake import fused_groups
from compress.formats.packed import stored_names
from compress.formats.table import FORMATS, INPUT_SCALE, Format, Rounding
from compress.model.architecture import Block, group_format
from compress.model.experts import Experts, experts_of_block
from compress.model.families import family_of
from compress.model.layout import Parameter
from compress.model.modules import layer_of, weights_of
from compress.student.rounding import Inputs, Rounded, round_group
from compress.sweep.stack import Stack

# Sequences that go through a layer together.
BATCH = 8


class Seen(Exception):
    """Raised in a layer when everything that was looked for has been seen."""


@dataclass
class Read:
    """What one or several linear layers read: X^T X, how many tokens, the largest magnitude."""

    gram: Tensor
    tokens: int = 0
    largest: list[Tensor] = field(default_factory=list)

    def matrix(self) -> Tensor:
        """X^T X."""
        return self.gram

    def add(self, x_ND: Tensor) -> None:
        """More tokens."""
        x_ND = x_ND.float()
        self.gram.addmm_(x_ND.T, x_ND)
        self.tokens += len(x_ND)
        self.largest.append(x_ND.abs().amax())


@torch.no_grad()
def quantized(
    stack: Stack,
    stored: Callable[[Parameter], Tensor],
    rows_RT: Tensor,
    rounding: Rounding,
    progress: Callable[[int], None] = lambda layers: None,
) -> Iterator[tuple[str, Tensor]]:
    """A student's tensors as they are stored, layer by layer, those of formats rounded on text.

    ``stack`` is the student in BF16 with the formats in its architecture, ``stored`` gives what is
    written of a parameter that keeps BF16. ``progress`` is called with every layer done.
    """
    architecture, formats = stack.architecture, dict(stack.architecture.outside_formats)
    outside = {each.name: stored(each) for each in stack.parts[None]}
    table, embedding = None, stack.outside("embedding")
    if (format := formats.get("embedding", "bf16")) != "bf16":
        # Rows are looked up, not multiplied: there is nothing that some of its inputs count for.
        nothing = Inputs(lambda: torch.empty(0), 0)
        found = round_group([outside.pop(embedding.name)], format, [nothing], rounding)[0]
        table, one = found.values, found.values.new_ones(())
        yield from as_named(embedding.name, format, found, one)
    hidden = [stack.embed(rows, table) for rows in torch.split(rows_RT, BATCH)]
    if (format := formats.get("head", "bf16")) != "bf16":
        head = outside.pop(stack.outside("head").name)
    yield from outside.items()
    for number, layer in stack.visits(range(stack.layers)):
        written = set[str]()
        for block in architecture.blocks:
            if block.layer == number and block.formats:
                for name, tensor in round_block(stack, layer, block, hidden, rounding):
                    written.add(name)
                    yield name, tensor
        yield from ((e.name, stored(e)) for e in stack.parts[number] if e.name not in written)
        hidden = [stack.run(number, layer, states) for states in hidden]
        progress(1)
    if format != "bf16":
        with stack.head():
            states = [stack.normed(states).flatten(0, -2) for states in hidden]
        width = head.shape[1]
        read = Read(states[0].new_zeros(width, width, dtype=torch.float32))
        for x_ND in states:
            read.add(x_ND)
        found = round_group([head], format, [Inputs(read.matrix, read.tokens)], rounding)[0]
        amax = torch.stack(read.largest).amax()
        yield from as_named(stack.outside("head").name, format, found, amax)


def as_named(
    name: str, format: Format, found: Rounded, amax: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """A rounded weight as it is stored, under its names; ``amax`` is of what it reads."""
    row, own = FORMATS[format], found.stored
    if INPUT_SCALE in row.suffixes:
        own = (*own, row.numerics.tensor_scale(amax))
    yield from zip(stored_names(name, format), own, strict=True)


def round_block(
    stack: Stack, layer: nn.Module, block: Block, hidden: Sequence[Tensor], rounding: Rounding
) -> Iterator[tuple[str, Tensor]]:
    """A block's quantized weights as stored, under their names on disk; the model has the values.

    ``hidden`` is what enters the layer.
    """
    architecture = stack.architecture
    weights = weights_of(stack.model, architecture, block)
    prefix = family_of(architecture.family).layer.format(layer=block.layer)
    experts = experts_of_block(stack.model, architecture, block)

    def run() -> None:
        for states in hidden:
            with suppress(Seen):
                stack.run(block.layer, layer, states)

    for names in fused_groups(weights, {name: slot.fused for name, (_, slot) in weights.items()}):
        if (format := group_format(block, weights[names[0]][1].fused)) == "bf16":
            continue
        if weights[names[0]][1].place is None:
            inputs, amax = plain_inputs(layer_of(stack.model, block), names, run)
        else:
            assert experts is not None
            inputs, amax = expert_inputs(experts, names, run)
        group = [weights[name][0] for name in names]
        for name, found in zip(names, round_group(group, format, inputs, rounding), strict=True):
            weights[name][0].copy_(found.values)
            yield from as_named(f"{prefix}{name}.weight", format, found, amax)


def plain_inputs(
    layer: Any, names: Sequence[str], run: Callable[[], None]
) -> tuple[list[Inputs], Tensor]:
    """What linear layers read while ``run`` runs the layer, and its largest magnitude."""
    modules = {name: layer.get_submodule(name) for name in names}
    reads, seen = dict[str, Read](), dict[str, Tensor]()

    def tap(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            first = next((other for other, x in seen.items() if x is args[0]), None)
            seen[name] = args[0]
            if first is not None:
                reads[name] = reads[first]
            else:
                if name not in reads:
                    width = args[0].shape[-1]
                    reads[name] = Read(args[0].new_zeros(width, width, dtype=torch.float32))
                reads[name].add(args[0].flatten(0, -2))
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
