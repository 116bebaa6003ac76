"""What output projections read, as Gram matrices: all that repair needs of a teacher's text."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compress.model.architecture import Architecture, sizes
from compress.model.layout import shape
from compress.model.modules import fused_experts, layer_of, routed
from compress.model.tensor_files import save_tensors
from compress.student.units import projections

Half = Literal["fit", "check"]
HALVES: tuple[Half, ...] = get_args(Half)
# The ridge toward the teacher's weights, as a share of the mean of the kept columns' diagonal.
RIDGE = 0.1
# A refit takes up to a second and the candidates of a search share most of theirs.
CACHE_BYTES = 512 * 2**20


@torch.no_grad()
def gram_matrices(
    model: Any,
    architecture: Architecture,
    tokens: Tensor,
    batch: int = 8,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Tensor]:
    """X^T X of every output projection's input X, [d, d] in fp32, by the projection's key.

    An expert's are over the tokens routed to it, each weighted by its squared routing weight.

    One pass of the teacher ``model`` in fp32 over ``tokens`` [sequences, T]; nothing is held but
    the matrices and a batch. ``progress`` is called with the sequences of every batch done.
    """
    found: dict[str, Tensor] = {}

    def linear(key: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        found[key].addmm_(x.T, x)

    def experts(keys: list[str], module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        for key, (_, inner, weight) in zip(keys, routed(module, *args), strict=True):
            inner *= weight
            found[key].addmm_(inner.T, inner)

    with ExitStack() as stack:
        for block in architecture.blocks:
            keys = []
            for projection in projections(architecture, block):
                width = shape(projection.slot.shape, {"hidden": 0} | sizes(block))[1]
                found[projection.key] = torch.zeros(width, width)
                if projection.expert is None:
                    module = layer_of(model, block).get_submodule(projection.module)
                    tap = partial(linear, projection.key)
                    stack.callback(module.register_forward_pre_hook(tap).remove)
                else:
                    keys.append(projection.key)
            if fused := fused_experts(model, architecture, block):
                tap = partial(experts, keys)
                stack.callback(fused.register_forward_pre_hook(tap).remove)
        for rows in torch.split(tokens, batch):
            model.model(input_ids=rows, use_cache=False)
            progress(len(rows))
    return found


@dataclass(frozen=True)
class Grams:
    """Gram matrices on disk, of two halves of a text, read one at a time.

    Students are refitted on both halves; what repair buys is scored by fitting one and checking on
    the other. ``errors`` caches that, by matrix and kept columns, and ``weights`` the refits that
    candidates have in common, the latest ones.
    """

    file: Path
    ridge: float = RIDGE
    errors: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = field(
        default_factory=dict, repr=False
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
        """The matrix of one half, fp64."""
        with safe_open(self.file, framework="pt") as reader:
            return torch.as_tensor(reader.get_tensor(f"{half}/{key}")).double()

    def both(self, key: str) -> Tensor:
        """The matrix of the whole text, fp64."""
        return self.half("fit", key) + self.half("check", key)


def save_grams(halves: Mapping[Half, Mapping[str, Tensor]], file: Path) -> None:
    """Write the matrices of both halves, whole or not at all."""
    named = {f"{half}/{key}": gram for half, grams in halves.items() for key, gram in grams.items()}
    save_tensors(named, file)
