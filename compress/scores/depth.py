"""Exact costs of whole layers, each given those that go before it: a greedy path.

Layers next to each other do the same work: either may go, both may not, and costs of one alone do
not add up. So the cheapest layer goes, its neighbours are scored again without it, and so on, after
the iterative removal of Nemotron Nano 2 (NVIDIA 2025).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.core.files import read_json, write_json
from compress.measure.losses import kl_from_hidden
from compress.model.architecture import Architecture, Attention
from compress.model.modules import head_of
from compress.scores.contributions import Progress
from compress.scores.replay import Text, entering, run_layers

# Hardly a budget takes more of a model's layers; those beyond keep the cost of when last scored.
MOST = 0.5
# KL(teacher || the model without these layers), nats per token.
Cost = Callable[[tuple[int, ...]], float]


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Layers in the order in which they go, and what every layer costs, nats per token.

    ``costs`` is by layer number: on the path given those before it, so that a prefix adds up to
    the exact KL without its layers; off the path given those that were gone when it was last
    scored.
    """

    path: tuple[int, ...]
    costs: Mapping[int, float]

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        write_json(file, {"path": self.path, "costs": self.costs})


def load_depth(file: Path) -> Depth:
    """Read what ``Depth.save`` wrote; InputError where it is something else."""
    found = read_json(file)
    try:
        costs = {int(layer): float(cost) for layer, cost in found["costs"].items()}
        return Depth(path=tuple(map(int, found["path"])), costs=costs)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} does not list layers; delete it to score them again") from error


def layer_numbers(architecture: Architecture) -> list[int]:
    """The layers that have a block, ascending."""
    return sorted({block.layer for block in architecture.blocks})


def removals(architecture: Architecture) -> int:
    """The layers that a path takes."""
    return int(MOST * len(layer_numbers(architecture)))


def path_steps(architecture: Architecture) -> int:
    """Steps of finding a path: every layer alone, then those that go."""
    return len(layer_numbers(architecture)) + removals(architecture)


def path_forwards(architecture: Architecture) -> float:
    """Forward passes of the teacher that finding a path takes, output heads aside.

    A run costs what comes after its layer of those left, taken as half; there is one for every
    layer alone, and for each that goes at most two to take it out and one for either neighbour.
    """
    count = len(layer_numbers(architecture))
    left = [(count - gone) / count for gone in range(removals(architecture))]
    return count / 2 + 4 * sum(left) / 2


@torch.no_grad()
def layer_costs(
    model: Any,
    architecture: Architecture,
    tokens: Tensor,
    chunk: int = 4,
    progress: Progress = lambda done, total: None,
    known: Path | None = None,
) -> Depth:
    """The path of a teacher on all of the text, and the costs of its layers.

    Args:
        model: the teacher in fp32, in eval mode.
        architecture: the teacher's.
        tokens: [sequences, T].
        chunk: sequences of a forward pass.
        progress: called with steps done and in total.
        known: keeps every KL as it is found, so that a killed path continues there.
    """
    layers, steps = layer_numbers(architecture), path_steps(architecture)
    student = shortened(Text(model, torch.split(tokens, chunk)))
    kls: dict[str, float] = read_json(known) if known is not None and known.is_file() else {}

    def cost(gone: tuple[int, ...]) -> float:
        key = " ".join(map(str, sorted(gone)))
        if key not in kls:
            student.go_to(gone[:-1])
            kls[key] = student.kl_without(gone[-1])
            if known is not None:
                write_json(known, kls)
        return kls[key]

    attention = {b.layer for b in architecture.blocks if isinstance(b, Attention)}
    count = removals(architecture)
    return greedy(layers, attention, cost, count, lambda done: progress(done, steps))


def greedy(
    layers: Sequence[int],
    attention: Collection[int],
    cost: Cost,
    count: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Depth:
    """Take the cheapest layer, then score the nearest one left on either side again; and so on.

    ``count`` go, at most all but one. Of the layers with attention, if there are any, one stays.
    ``cost`` is only asked for what is gone and one more, which is last.
    """
    costs: dict[int, float] = {}
    for layer in layers:
        costs[layer] = cost((layer,))
        progress(len(costs))
    path: tuple[int, ...] = ()
    total = 0.0
    for step in range(count):
        left = [layer for layer in layers if layer not in path]
        attending = [layer for layer in left if layer in attention]
        may_go = [layer for layer in left if [layer] != attending]
        layer = min(may_go, key=lambda one: costs[one])
        # Scored when a neighbour went, maybe long ago: what it costs now is on the path.
        path = (*path, layer)
        reached = cost(path)
        costs[layer], total = reached - total, reached
        place = left.index(layer)
        for near in [*left[:place][-1:], *left[place + 1 :][:1]]:
            costs[near] = cost((*path, near)) - total
        progress(len(layers) + step + 1)
    return Depth(path=path, costs=costs)


@dataclass
class Shortened:
    """The teacher without some layers: the inputs of those left, and the teacher's final states.

    Both by chunk of the text. Only what comes after a change is run again.
    """

    model: Any
    inputs: list[dict[int, Tensor]]
    teacher: list[Tensor]
    gone: tuple[int, ...] = ()

    def go_to(self, gone: tuple[int, ...]) -> None:
        """Take layers out; ``gone`` begins with those that are out already."""
        assert gone[: len(self.gone)] == self.gone, (gone, self.gone)
        for layer in gone[len(self.gone) :]:
            for inputs in self.inputs:
                after = [number for number in inputs if number > layer]
                with entering([self.model.model.layers[number] for number in after]) as caught:
                    run_layers(self.model, after, inputs.pop(layer))
                inputs.update(zip(after, caught, strict=True))
        self.gone = gone

    def kl_without(self, layer: int) -> float:
        """KL(teacher || this model without one more layer), nats per token."""
        head = head_of(self.model)
        found = []
        for inputs, teacher in zip(self.inputs, self.teacher, strict=True):
            after = [number for number in inputs if number > layer]
            student = run_layers(self.model, after, inputs[layer])
            found.append(kl_from_hidden(student.flatten(0, 1), head, teacher.flatten(0, 1), head))
        return float(torch.cat(found).double().mean())


def shortened(text: Text) -> Shortened:
    """The whole teacher on a text."""
    chunks = [text.chunk(number) for number in range(len(text.chunks))]
    inputs = [dict(enumerate(entering_layers)) for entering_layers, _ in chunks]
    return Shortened(text.model, inputs, [final for _, final in chunks])
