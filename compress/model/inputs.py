"""Layers that round what they read, in formats that say so; gradients pass as if they did not.

Values are ModelOpt's fake quantization: NVFP4 in blocks of 16 along the inputs, each with an E4M3
scale of its own, or FP8, both by a scale of the tensor from calibration.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats.table import FORMATS, Format
from compress.model.architecture import Architecture, group_format
from compress.model.experts import Experts, experts_of_block
from compress.model.families import family_of
from compress.model.modules import layer_of, slots_of


@dataclass(frozen=True)
class Inputs:
    """How a layer rounds what it reads: by a ``scale``, or where there is none, by what comes."""

    format: Format
    scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The input rounded."""
        apply: Any = _StraightThrough.apply
        found: Tensor = apply(x, self)
        return found

    def rounded(self, x: Tensor) -> Tensor:
        """The input rounded, no gradient with it."""
        numerics, wide = FORMATS[self.format].numerics, x.float()
        scale = numerics.tensor_scale(wide.abs().amax()) if self.scale is None else self.scale
        found: Tensor = numerics.fake_at(wide, scale.to(x.device)).to(x.dtype)
        return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inputs: Inputs) -> Tensor:
        return inputs.rounded(x) if x.numel() else x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def round_inputs(
    model: Any, architecture: Architecture, scales: Mapping[str, Tensor] | None = None
) -> None:
    """Make a model's layers round what they read where the formats of their weights say so.

    ``scales`` are those of the weights' inputs, by the weights' names on disk.
    """
    family = family_of(architecture.family)
    for block in architecture.blocks:
        prefix = family.layer.format(layer=block.layer)

        def of(name: str, group: str | None, prefix: str = prefix, block: Any = block) -> Any:
            format = group_format(block, group)
            scale = (scales or {}).get(f"{prefix}{name.format(expert=0)}.weight")
            return Inputs(format, scale) if FORMATS[format].rounds_inputs else None

        for name, slot in slots_of(architecture, block, experts=False).items():
            if (inputs := of(name, slot.fused)) is not None:
                module = layer_of(model, block).get_submodule(name)
                module.register_forward_pre_hook(Rounding(inputs))
        if (experts := experts_of_block(model, architecture, block)) is not None:
            read, write = (of(n, s.fused) for n, s in (experts.reading[0], experts.writing))
            if read or write:
                experts.module.forward = OneByOne(experts, read, write)


@dataclass(frozen=True)
class Rounding:
    """A hook before a linear layer."""

    inputs: Inputs

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The layer's arguments, the first one rounded."""
        return self.inputs(args[0]), *args[1:]


@dataclass(frozen=True)
class OneByOne:
    """The forward of routed experts that round what they read, or their neurons."""

    experts: Experts
    read: Inputs | None
    write: Inputs | None

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The output [n, D] of tokens [n, D], chosen experts and their weights [n, top-k]."""
        output = torch.zeros_like(x, dtype=weight.dtype)
        rounded = x if self.read is None else self.read(x)
        for expert in range(len(self.experts)):
            token, choice = torch.where(index == expert)
            neurons = self.experts.neurons(self.experts.read(rounded[token], expert))
            neurons = neurons if self.write is None else self.write(neurons)
            share = self.experts.write(neurons, expert) * weight[token, choice, None]
            output = output.index_add(0, token, share.to(output.dtype))
        return output.to(x.dtype)
