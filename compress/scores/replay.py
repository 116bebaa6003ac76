"""Exact costs of a block's options from cached hidden states: run only what comes after them.

Sequences are added until an option's mean is known well enough.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.files import read_json, write_json
from compress.measure.losses import kl_from_hidden
from compress.model.architecture import Architecture, block_name
from compress.model.modules import final_hidden, head_of, mixer_of
from compress.scores.contributions import Progress
from compress.student.masks import masked_model

# What an option keeps of its block by axis; None when the block goes.
Keep = Mapping[str, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a mean is known well enough: its standard error is below either bound.

    ``absolute`` is in nats per token, ``relative`` a share of the mean; never before ``least``
    sequences, of which one standard deviation can be told.
    """

    absolute: float = 0.0
    relative: float = 0.0
    least: int = 4

    def reached(self, kl: Tensor) -> bool:
        """Whether the sequences' KLs [n] are enough."""
        if len(kl) < max(self.least, 2):
            return False
        error = float(kl.std()) / math.sqrt(len(kl))
        return error <= max(self.absolute, self.relative * float(kl.mean()))


NEVER = Stop(least=2**31)


@dataclass
class Text:
    """What the teacher computes on chunks of sequences, each when it is first asked for.

    The input of every layer is held in memory: tokens x hidden x layers numbers.
    """

    model: Any
    chunks: tuple[Tensor, ...]
    found: dict[int, tuple[list[Tensor], Tensor]] = field(default_factory=dict)

    def chunk(self, number: int) -> tuple[list[Tensor], Tensor]:
        """Hidden states [sequences, T, D] entering each layer, and the final normed ones."""
        if number not in self.found:
            with entering(self.model.model.layers) as caught:
                final = final_hidden(self.model, self.chunks[number])
            self.found[number] = caught, final
        return self.found[number]


@contextmanager
def entering(layers: Iterable[Any]) -> Iterator[list[Tensor]]:
    """Inputs of the layers in the order in which they run while the context is open."""
    caught: list[Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
            stack.callback(handle.remove)
        yield caught


@torch.no_grad()
def removal_costs(
    model: Any,
    architecture: Architecture,
    tokens: Tensor,
    stop: Stop = NEVER,
    progress: Progress = lambda done, total: None,
    known: Path | None = None,
) -> dict[str, float]:
    """Exact KL of removing each block alone by its name, nats per token.

    ``model`` is the teacher in fp32, in eval mode. A removal that ``stop`` never settles is run on
    all ``tokens`` [sequences, T]. ``progress`` is called with blocks done and in total; ``known``
    is a JSON file of every finished block, so that a killed replay continues there.
    """
    text, names = Text(model, torch.split(tokens, 4)), list(map(block_name, architecture.blocks))
    found: dict[str, float] = read_json(known) if known is not None and known.is_file() else {}
    for number, name in enumerate(names):
        if name not in found:
            found[name] = float(option_kl(text, architecture, number, None, stop).mean())
            if known is not None:
                write_json(known, found)
        progress(number + 1, len(names))
    return found


@torch.no_grad()
def option_kl(
    text: Text, architecture: Architecture, number: int, keep: Keep, stop: Stop = NEVER
) -> Tensor:
    """KL(teacher || student) [sequences run] of one option of a block, nats per token.

    Widths of routed experts are no masks (``masks.masked``) and cannot be replayed.
    """
    model, first = text.model, architecture.blocks[number].layer
    head, found = head_of(model), torch.zeros(0)
    for chunk in range(len(text.chunks)):
        inputs, final = text.chunk(chunk)
        with decided(model, architecture, number, keep):
            student = run_layers(model, range(first, len(inputs)), inputs[first])
        kl = kl_from_hidden(student.flatten(0, 1), head, final.flatten(0, 1), head)
        found = torch.cat([found, kl.view(final.shape[:2]).mean(1)])
        if stop.reached(found):
            break
    return found


@contextmanager
def decided(model: Any, architecture: Architecture, number: int, keep: Keep) -> Iterator[None]:
    """The teacher with one block's option as a mask, or without the block."""
    block = architecture.blocks[number]

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        # Attention also returns its weights, which nobody reads.
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    with ExitStack() as stack:
        if keep is None:
            stack.callback(mixer_of(model, block).register_forward_hook(nothing).remove)
        else:
            own = {f"{block_name(block)}/{axis}": index for axis, index in keep.items()}
            stack.enter_context(masked_model(model, architecture, own))
        yield


def run_layers(model: Any, numbers: Iterable[int], hidden: Tensor) -> Tensor:
    """Final normed hidden state of the model with only some layers, from the first one's input."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[number] for number in numbers])
    try:
        output: Tensor = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    finally:
        model.model.layers = layers
    return output
