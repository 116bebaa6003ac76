"""Weight-only fake quantization: what a weight becomes after its format and back."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from compress.formats.table import FORMATS, Format, GroupFormats


def group_amax(weights: Iterable[Tensor]) -> Tensor:
    """The largest magnitude of a fused group, fp32."""
    extremes = [torch.aminmax(weight) for weight in weights if prod(weight.shape)]
    return torch.stack([torch.maximum(-e.min, e.max).float() for e in extremes]).amax()


def shared(weights: Iterable[Tensor], format: Format) -> tuple[Tensor, ...]:
    """What the weights of a fused group round by together: their largest magnitude, or nothing."""
    return (group_amax(weights),) if FORMATS[format].shared else ()


def fake_quantize(weights: Sequence[Tensor], format: Format) -> list[Tensor]:
    """A fused group after its format and back, in its dtypes; InputError where a shape forbids."""
    if format == "bf16" or not weights:
        return list(weights)
    for weight in weights:
        FORMATS[format].require(weight.shape)
    common = shared(weights, format)
    return [FORMATS[format].numerics.fake(weight, *common) for weight in weights]


def fused_groups(names: Iterable[str], fused: Mapping[str, str | None]) -> Iterable[list[str]]:
    """Names of the tensors of every fused group of a block, in their order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if (group := fused[name]) is not None:
            groups.setdefault(group, []).append(name)
    return groups.values()


def fake_quantize_block(
    tensors: Mapping[str, Tensor], fused: Mapping[str, str | None], formats: GroupFormats
) -> dict[str, Tensor]:
    """A block's tensors with every fused group in its format; norms, routers and conv stay.

    ``fused`` has the fused group of every name in ``tensors``, None where it is not quantized; the
    order of the names is kept.
    """
    result, own = dict(tensors), dict(formats)
    for names in fused_groups(tensors, fused):
        group = fused[names[0]]
        quantized = fake_quantize([tensors[name] for name in names], own.get(group or "", "bf16"))
        result.update(zip(names, quantized, strict=True))
    return result
