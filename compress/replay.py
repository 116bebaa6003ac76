"""Exact scores from cached hidden states: run only what comes after a change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.architecture import Architecture, Block, block_name
from compress.families import family_of
from compress.losses import kl_from_hidden
from compress.scores import Progress


@contextmanager
def silenced(model: Any, architecture: Architecture, block: Block) -> Iterator[None]:
    """The model with one block adding nothing to the residual stream."""
    site = family_of(architecture.family).sites[block.kind]
    mixer = getattr(model.model.layers[block.layer], site.mixer)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handle = mixer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def layer_inputs(model: Any, tokens: Tensor, batch: int = 8) -> tuple[list[Tensor], Tensor]:
    """Hidden state [sequences, T, D] entering every layer, and the final normed one."""
    caught: list[list[Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.register_forward_pre_hook(lambda module, args, found=found: found.append(args[0]))
        for layer, found in zip(model.model.layers, caught, strict=True)
    ]
    try:
        with torch.no_grad():
            final = [
                model.model(input_ids=rows, use_cache=False).last_hidden_state
                for rows in torch.split(tokens, batch)
            ]
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(found) for found in caught], torch.cat(final)


def run_from(model: Any, layer: int, hidden: Tensor, batch: int = 8) -> Tensor:
    """Final normed hidden state of the model started at a layer's input."""
    layers = model.model.layers
    model.model.layers = layers[layer:]
    try:
        with torch.no_grad():
            final = [
                model.model(inputs_embeds=rows, use_cache=False).last_hidden_state
                for rows in torch.split(hidden, batch)
            ]
    finally:
        model.model.layers = layers
    return torch.cat(final)


def removal_costs(
    model: Any,
    architecture: Architecture,
    tokens: Tensor,
    progress: Progress = lambda done, total: None,
) -> dict[str, float]:
    """KL in nats per token of removing each block alone, by block name.

    Args:
        model: the teacher in fp32.
        architecture: the teacher's.
        tokens: [sequences, T]; every layer's input for them is held in memory.
        progress: called with blocks done and in total.
    """
    inputs, final = layer_inputs(model, tokens)
    head = model.lm_head.weight
    costs: dict[str, float] = {}
    for number, block in enumerate(architecture.blocks):
        with silenced(model, architecture, block):
            student = run_from(model, block.layer, inputs[block.layer])
        kl = kl_from_hidden(student.flatten(0, 1), head, final.flatten(0, 1), head)
        costs[block_name(block)] = float(kl.mean())
        progress(number + 1, len(architecture.blocks))
    return costs
