"""Gradients of every gate in two sweeps: forward keeping layer inputs, backward computing again."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.formats.table import Format
from compress.model.modules import Head
from compress.model.tensor_files import save_tensors
from compress.scores.gated import Gated
from compress.scores.taps import Taps

# Gradients [B, T, D] at the final hidden states of a batch, given its number and those states.
Upstream = Callable[[int, Tensor, Head], Iterable[Tensor]]
# How often a sweep is saved on its way down.
SAVE_SECONDS = 60.0
# Names in that file besides rows, each after its batch's number.
GRADIENTS, LEFT = "gradients", "left"


def entering(gated: Gated, batches: Sequence[Tensor], layers: int) -> list[list[Tensor]]:
    """What enters so many layers and leaves the last of them, [B, T, D] of every batch."""
    stack = gated.stack
    inputs = [[stack.embed(ids) for ids in batches]]
    for number, layer in stack.visits(range(layers)):
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
    saved: Path | None = None,
) -> list[dict[str, Tensor]]:
    """The rows of ``Taps``, of every batch of token ids [B, T], on the CPU.

    The weights of a layer are brought in once in either direction, and what formats add to them is
    there only in the layer's visit; the inputs of all layers are held. ``saved`` is a file that the
    way back is saved to now and then, and continued from.
    """
    stack = gated.stack
    total = left = stack.layers + 1
    found: list[dict[str, Tensor]] = [{} for _ in batches]
    gradients: list[list[Tensor]] = [[] for _ in batches]
    if saved is not None and saved.is_file():
        left, found, gradients = restored(saved, len(batches))
        progress(total - left, total)
    inputs, last = entering(gated, batches, left - 1), time.monotonic()

    def collect(run: Callable[[Tensor], Tensor], upstream: Callable[..., Iterable[Tensor]]) -> None:
        for batch, hidden in enumerate(inputs.pop()):
            gradients[batch], rows = taps.backward(run, hidden, partial(upstream, batch))
            for key, value in rows.items():
                own = found[batch]
                own[key] = own[key] + value.cpu() if key in own else value.cpu()

    if left == total:
        with stack.head() as head, taps.on_final():
            collect(stack.normed, lambda batch, hidden: upstream(batch, hidden, head))
        progress(1, total)

    def visited(number: int, layer: nn.Module) -> None:
        device, run = stack.placement.device, partial(stack.run, number, layer)
        with gated.layer(number, formats) as inside, taps.on_layer(number, *inside):
            collect(run, lambda batch, _: (gradient.to(device) for gradient in gradients[batch]))

    for number, layer in stack.visits(range(len(inputs))[::-1]):
        visited(number, layer)
        progress(total - number, total)
        if saved is not None and number and time.monotonic() - last >= SAVE_SECONDS:
            save(saved, number, found, gradients)
            last = time.monotonic()
    return found


def save(
    file: Path, left: int, found: Sequence[dict[str, Tensor]], gradients: Sequence[list[Tensor]]
) -> None:
    """Write a sweep that has ``left`` so many layers, the rows so far and the gradients there."""
    tensors = {LEFT: torch.tensor(left)}
    for batch, rows in enumerate(found):
        tensors |= {f"{batch} {key}": value for key, value in rows.items()}
        tensors[f"{batch} {GRADIENTS}"] = torch.stack(gradients[batch]).cpu()
    save_tensors(tensors, file)


def restored(file: Path, batches: int) -> tuple[int, list[dict[str, Tensor]], list[list[Tensor]]]:
    """What ``save`` was given."""
    tensors = load_file(file)
    left = int(tensors.pop(LEFT))
    found: list[dict[str, Tensor]] = [{} for _ in range(batches)]
    for name, value in tensors.items():
        batch, _, key = name.partition(" ")
        found[int(batch)][key] = value
    return left, found, [list(rows.pop(GRADIENTS)) for rows in found]
