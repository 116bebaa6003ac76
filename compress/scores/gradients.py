"""Gradients of every gate in two sweeps: forward keeping layer inputs, backward computing again."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from compress.formats.table import Format
from compress.model.modules import Head
from compress.scores.gated import Gated
from compress.scores.taps import Taps

# Gradients [B, T, D] at the final hidden states of a batch, given its number and those states.
Upstream = Callable[[int, Tensor, Head], Iterable[Tensor]]


def entering(gated: Gated, batches: Sequence[Tensor]) -> list[list[Tensor]]:
    """What enters each layer and leaves the last, [B, T, D] of every batch."""
    stack = gated.stack
    inputs = [[stack.embed(ids) for ids in batches]]
    for number, layer in stack.visits(range(stack.layers)):
        with gated.layer(number):
            inputs.append([stack.run(number, layer, hidden) for hidden in inputs[-1]])
    return inputs


@torch.no_grad()
def gate_gradients(
    gated: Gated,
    taps: Taps,
    batches: Sequence[Tensor],
    formats: Sequence[Format],
    upstream: Upstream,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Tensor]]:
    """The rows of ``Taps``, of every batch of token ids [B, T], on the CPU.

    The weights of a layer are brought in once in either direction, and what formats add to them is
    there only in the layer's visit; the inputs of all layers are held.
    """
    stack, inputs = gated.stack, entering(gated, batches)
    total = stack.layers + 1
    found: list[dict[str, Tensor]] = [{} for _ in batches]
    gradients: list[list[Tensor]] = [[] for _ in batches]

    def collect(run: Callable[[Tensor], Tensor], upstream: Callable[..., Iterable[Tensor]]) -> None:
        for batch, hidden in enumerate(inputs.pop()):
            gradients[batch], rows = taps.backward(run, hidden, partial(upstream, batch))
            for key, value in rows.items():
                own = found[batch]
                own[key] = own[key] + value.cpu() if key in own else value.cpu()

    with stack.head() as head, taps.on_final():
        collect(stack.normed, lambda batch, hidden: upstream(batch, hidden, head))
    progress(1, total)
    for done, (number, layer) in enumerate(stack.visits(range(stack.layers)[::-1])):
        with gated.layer(number, formats) as inside, taps.on_layer(number, *inside):
            collect(partial(stack.run, number, layer), lambda batch, _: gradients[batch])
        progress(done + 2, total)
    return found
