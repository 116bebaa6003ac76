"""What output projections read, as Gram matrices: all that repair needs of a teacher's text."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compress.model.architecture import Block, sizes
from compress.model.experts import Experts, experts_of_block
from compress.model.layout import shape
from compress.model.modules import layer_of
from compress.model.tensor_files import tensor_writer
from compress.student.units import Projection, projections
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import Stack

Half = Literal["fit", "check"]
HALVES: tuple[Half, ...] = get_args(Half)
# The ridge toward the teacher's weights, as a share of the mean of the matrix' diagonal.
RIDGE = 0.1
# Refits that candidates have in common are kept up to so many bytes.
CACHE_BYTES = 64 * 2**20


@torch.no_grad()
def save_grams(
    stack: Stack,
    halves: Mapping[Half, Tensor],
    file: Path,
    batch: int = 8,
    progress: Callable[[int], None] = lambda layers: None,
) -> None:
    """Write X^T X of every output projection's input X, [d, d] in fp32, whole or not at all.

    They are named by half and the projection's key. An expert's are over the tokens routed to it,
    each weighted by its squared routing weight.

    One sweep of the teacher over both ``halves`` [sequences, T]; nothing is held but the hidden
    states and the matrices of one layer and half. ``progress`` is called with every layer done.
    """
    hidden = {half: [stack.embed(r) for r in torch.split(t, batch)] for half, t in halves.items()}
    specs = {
        f"{half}/{projection.key}": torch.empty(width, width, device="meta")
        for block in stack.architecture.blocks
        for projection in projections(stack.architecture, block)
        for width in [read_by(block, projection)]
        for half in halves
    }
    with tensor_writer(file, specs) as write:
        for number, layer in stack.visits(range(stack.layers)):
            for half, states in hidden.items():
                with tapped(stack, number) as grams:
                    for at, entering in enumerate(states):
                        states[at] = stack.run(number, layer, entering)
                for key, gram in grams.items():
                    write(f"{half}/{key}", gram)
            progress(1)


def read_by(block: Block, projection: Projection) -> int:
    """How many columns a projection reads."""
    return shape(projection.slot.shape, {"hidden": 0} | sizes(block))[1]


@contextmanager
def tapped(stack: Stack, layer: int) -> Iterator[dict[str, Tensor]]:
    """The matrices of a layer, by the projections' keys; what runs meanwhile is added."""
    found: dict[str, Tensor] = {}

    def add(key: str, x: Tensor) -> None:
        x = x.float()
        found[key].addmm_(x.T, x)

    def linear(key: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(key, args[0].flatten(0, -2))

    def routed(
        keys: list[str], experts: Experts, module: Any, args: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        for key, (_, inner, weight) in zip(keys, experts.routed(*args), strict=True):
            add(key, inner * weight)

    with ExitStack() as hooks:
        for block in stack.architecture.blocks:
            if block.layer != layer:
                continue
            keys = []
            for projection in projections(stack.architecture, block):
                width = read_by(block, projection)
                found[projection.key] = torch.zeros(width, width, device=stack.placement.device)
                if projection.expert is None:
                    module = layer_of(stack.model, block).get_submodule(projection.module)
                    tap = partial(linear, projection.key)
                    hooks.callback(module.register_forward_pre_hook(tap).remove)
                else:
                    keys.append(projection.key)
            if experts := experts_of_block(stack.model, stack.architecture, block):
                tap = partial(routed, keys, experts)
                hooks.callback(experts.module.register_forward_pre_hook(tap).remove)
        yield found


@dataclass(frozen=True)
class Grams:
    """Gram matrices on disk, of two halves of a text, read one at a time.

    Students are refitted on both halves; what repair buys is scored by fitting one and checking on
    the other, both on a placement's device. ``errors`` caches that, by matrix and kept columns, and
    ``weights`` the refits that candidates have in common, the latest ones.
    """

    file: Path
    ridge: float = RIDGE
    placement: Placement = REFERENCE
    errors: dict[Hashable, tuple[float, float]] = field(
        default_factory=dict, repr=False, compare=False
    )
    weights: "OrderedDict[Hashable, Tensor]" = field(
        default_factory=OrderedDict, repr=False, compare=False
    )

    def remembered(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gave for a key, from the cache where it still is."""
        if key not in self.weights:
            self.weights[key] = make()
            held = sum(weight.nbytes for weight in self.weights.values())
            while held > CACHE_BYTES and len(self.weights) > 1:
                held -= self.weights.popitem(last=False)[1].nbytes
        self.weights.move_to_end(key)
        return self.weights[key]

    def half(self, half: Half, key: str) -> Tensor:
        """The matrix of one half, fp32."""
        with safe_open(self.file, framework="pt") as reader:
            found = torch.as_tensor(reader.get_tensor(f"{half}/{key}"))
        return found.to(self.placement.device)

    def both(self, key: str) -> Tensor:
        """The matrix of the whole text, fp32."""
        return self.half("fit", key) + self.half("check", key)
