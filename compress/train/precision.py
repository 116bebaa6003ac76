"""A precision recipe on a model: which of its linear layers compute how, and where it can run.

Quantized are the linear layers of blocks that a checkpoint may quantize, so neither embeddings,
head, norms, routers, latent projections nor convolutions; what attention and Mamba multiply beside
them is in BF16. The reference (``products.py``) is asked for with ``emulate``; without it a recipe
needs units of the machine and Transformer Engine (``engine.py``).
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from compress.core.errors import InputError
from compress.model.architecture import Architecture
from compress.model.families import parameters
from compress.model.fill import place_of
from compress.sweep.placement import Placement
from compress.train import engine
from compress.train.products import Linear
from compress.train.recipes import PRECISIONS, Precision, PrecisionName


@dataclass
class Numerics:
    """How a training computes at present: its recipe, and whether forward products are plain now.

    ``emulate`` is whether quantized products are the reference's.
    """

    precision: Precision
    emulate: bool = True
    plain: bool = False

    def at(self, share: float) -> None:
        """Be at a share of the training's tokens."""
        self.plain = share >= 1 - self.precision.plain_forward

    def computing(self, device: torch.device) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        enabled = self.precision.products == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def numerics_of(name: PrecisionName | None, emulate: bool, placement: Placement) -> Numerics:
    """What a recipe's name stands for on a placement; None: fp32 where that works in it, else BF16.

    InputError where this machine cannot run it fast and nobody asked to emulate it.
    """
    if name is None:
        name = "fp32" if placement.dtype == torch.float32 else "bf16"
    precision = PRECISIONS[name]
    if precision.weight and not emulate:
        engine.require(precision, placement.device)
    return Numerics(precision, emulate)


@contextmanager
def quantized(model: Any, architecture: Architecture, numerics: Numerics) -> Iterator[None]:
    """A model whose linear layers compute as a recipe says; afterwards they are what they were.

    InputError where the recipe leaves none of them quantized.
    """
    if not (precision := numerics.precision).weight:
        yield
        return
    chosen = linears(model, architecture, precision)
    if not chosen:
        raise InputError(
            f"precision {precision.name} leaves none of {architecture.layers} layers quantized; "
            "bf16 is the same"
        )
    if not numerics.emulate:
        with engine.linears(model, chosen, precision, lambda: numerics.plain):
            yield
        return
    before = {module: type(module) for module in chosen.values()}
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None))}
    experts = {key: config._experts_implementation for key, config in configs.items()}
    for module in chosen.values():
        reroute(module, numerics)
    for config in configs.values():
        # One product after the other, which are linear layers.
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind
        for key, config in configs.items():
            config._experts_implementation = experts[key]


def linears(model: Any, architecture: Architecture, precision: Precision) -> dict[str, nn.Module]:
    """The modules that compute quantized linear layers, by name, in the order of the model."""
    names: dict[str, int] = {}
    for each in parameters(architecture):
        if each.block is not None and each.slot.fused:
            name = place_of(each, architecture)
            path = name.removesuffix(".weight") if each.expert is None else name.rpartition(".")[0]
            names[path] = architecture.blocks[each.block].layer
    kept = len(names) - math.ceil(precision.plain_share * len(names))
    last = architecture.layers - precision.plain_last
    inside = [path for path in list(names)[:kept] if precision.plain_first <= names[path] < last]
    return {path: model.get_submodule(path) for path in inside}


def reroute(module: nn.Module, numerics: Numerics) -> None:
    """Have the products of a module computed by the reference."""
    kind: Any = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Rerouted(numerics):
            return kind.forward(self, *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


class Rerouted(TorchFunctionMode):
    """Where linear layers are the reference's."""

    def __init__(self, numerics: Numerics) -> None:
        super().__init__()
        self.numerics = numerics

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What a function gives here."""
        if function is functional.linear:
            return self.linear(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of any number of rows with a weight."""
        now = self.numerics
        x_NI = input.flatten(0, -2).to(torch.bfloat16)
        apply: Any = Linear.apply
        y_NO: Tensor = apply(x_NI, weight, now.precision, now.plain)
        y = y_NO.view(*input.shape[:-1], -1)
        return y if bias is None else y + bias.to(y.dtype)
