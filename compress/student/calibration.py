"""A student rounded layer by layer on real text, as it runs with all before it rounded.

Every fused group is rounded by what it reads in the student itself: the layer runs as far as the
group with what is rounded so far, and once more when all of it is. In memory are one layer, its
Gram matrices one at a time, and the text's hidden states.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from compress.formats.fake import fused_groups
from compress.formats.packed import stored_names
from compress.formats.table import FORMATS, Format, Rounding
from compress.model.architecture import Block, group_format
from compress.model.families import family_of
from compress.model.layout import Parameter
from compress.model.modules import weights_of
from compress.student.readings import group_inputs, head_inputs
from compress.student.rounding import NOTHING, Rounded, round_group
from compress.sweep.stack import Stack

# Sequences that go through a layer together.
BATCH = 8


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
        found = round_group([outside.pop(embedding.name)], format, [NOTHING], rounding)[0]
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
        inputs, amax = head_inputs(stack, hidden)
        [found] = round_group([head], format, [inputs], rounding)
        yield from as_named(stack.outside("head").name, format, found, amax)


def as_named(
    name: str, format: Format, found: Rounded, amax: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """A rounded weight as it is stored, under its names; ``amax`` is of what it reads."""
    row, own = FORMATS[format], found.stored
    if row.rounds_inputs:
        assert amax is not None
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
    second = rounding != "nearest"
    for names in fused_groups(weights, {name: slot.fused for name, (_, slot) in weights.items()}):
        if (format := group_format(block, weights[names[0]][1].fused)) == "bf16":
            continue
        inputs, amax = [NOTHING] * len(names), None
        if second or FORMATS[format].rounds_inputs:
            inputs, amax = group_inputs(stack, layer, block, names, hidden, second=second)
        group = [weights[name][0] for name in names]
        for name, found in zip(names, round_group(group, format, inputs, rounding), strict=True):
            weights[name][0].copy_(found.values)
            yield from as_named(f"{prefix}{name}.weight", format, found, amax)
