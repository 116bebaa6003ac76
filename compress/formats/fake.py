"""Weight-only fake quantization: what a weight becomes after its format and back."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.formats import fp8, nvfp4
from compress.formats.table import Format
from compress.model.layout import Slot


def takes(shape: Sequence[int], format: Format) -> bool:
    """Whether a linear weight [out, in] can be stored in a format: NVFP4 needs in % 16 == 0."""
    return format != "nvfp4" or shape[-1] % nvfp4.BLOCK == 0


def group_amax(weights: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of a fused group, fp32."""
    extremes = [torch.aminmax(weight) for weight in weights if prod(weight.shape)]
    return torch.stack([torch.maximum(-e.min, e.max).float() for e in extremes]).amax()


def fake_quantize(weights: Sequence[Tensor], format: Format) -> list[Tensor]:
    """Quantize and dequantize a fused group under one tensor scale; dtypes stay.

    Raises:
        InputError: a shape that cannot take the format.
    """
    if format == "bf16" or not weights:
        return list(weights)
    for weight in weights:
        if not takes(weight.shape, format):
            raise InputError(
                f"a weight of shape {list(weight.shape)} cannot be stored as {format}: "
                f"its input width must divide by {nvfp4.BLOCK}"
            )
    amax = group_amax(weights)
    fake = nvfp4.fake if format == "nvfp4" else fp8.fake
    return [fake(weight, amax) for weight in weights]


def fake_quantize_block(
    tensors: Mapping[str, Tensor], slots: Mapping[str, Slot], format: Format
) -> dict[str, Tensor]:
    """A block's tensors with every fused group in ``format``; norms, routers and conv stay.

    ``slots`` has the slot of every name in ``tensors``; the order of the names is kept.
    """
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if (fused := slots[name].fused) is not None:
            groups.setdefault(fused, []).append(name)
    result = dict(tensors)
    for names in groups.values():
        quantized = fake_quantize([tensors[name] for name in names], format)
        result.update(zip(names, quantized, strict=True))
    return result
