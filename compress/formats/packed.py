"""Quantized weights on disk, as we write them: which tensors hold one, packed block by block.

========  =================  ======================  ================
format    ``weight``         ``weight_scale``        beside them
========  =================  ======================  ================
FP8       E4M3 [out, in]     F32 []                  input_scale
NVFP4     U8 [out, in/2]     E4M3 [out, in/16]       weight_scale_2, input_scale
MXFP4     U8 [out, in/2]     U8 (E8M0) [out, in/32]
INT4      U8 [out, in/2]     F16 [out, in/128]
========  =================  ======================  ================

The names and the first two rows are ModelOpt's layout. ``input_scale`` F32 [] is for servers that
quantize activations. Everything else is stored as it is. ``model/quantized.py`` reads it back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from compress.formats.blocks import CHUNK
from compress.formats.fake import fused_groups, shared
from compress.formats.table import FORMATS, INPUT_SCALE, Format


def stored_names(name: str, format: Format) -> list[str]:
    """The tensors that hold a weight of this format: itself, then its scales."""
    stem = name.removesuffix("weight")
    return [name, *(stem + suffix for suffix in FORMATS[format].suffixes)]


def stored_specs(name: str, shape: Sequence[int], format: Format) -> dict[str, Tensor]:
    """Type and shape of the tensors that hold a weight, on ``meta``; InputError as ``require``."""
    row, (*outer, width) = FORMATS[format], shape
    row.require(shape)

    def spec(dtype: str, last: int | None) -> Tensor:
        whole = () if last is None else (*outer, last)
        return torch.empty(whole, dtype=getattr(torch, dtype), device="meta")

    codes = width * row.bits // 8 // getattr(torch, row.codes).itemsize
    scales = (spec(s.dtype, width // row.group if s.per_group else None) for s in row.scales)
    return dict(zip(stored_names(name, format), (spec(row.codes, codes), *scales), strict=True))


def pack_block(
    read: Callable[[str], Tensor],
    fused: Mapping[str, str | None],
    format: Format,
    inputs: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """A block's tensors as they are stored, those of fused groups in ``format``, one at a time.

    ``fused`` has the fused group of every name, None where it stays; ``read`` gives the tensor of a
    name, and is asked twice for those of a group that rounds together. ``inputs`` has the largest
    magnitude that the layers of a group read, for formats with an input scale.
    """
    row = FORMATS[format]
    common: dict[str, tuple[Tensor, ...]] = {}
    for names in fused_groups(fused, fused) if format != "bf16" else ():
        common |= dict.fromkeys(names, shared(map(read, names), format))
    for name, group in fused.items():
        if group is None or format == "bf16":
            yield name, read(name)
            continue
        stored = packed(read(name), format, *common[name])
        if INPUT_SCALE in row.suffixes:
            stored = (*stored, row.numerics.tensor_scale(inputs[group]).cpu())
        yield from zip(stored_names(name, format), stored, strict=True)


def packed(weight: Tensor, format: Format, *common: Tensor) -> tuple[Tensor, ...]:
    """The stored form of a weight [out, in], some rows at a time: codes, then scales.

    ``common`` is what its fused group rounds by together. InputError as ``require``.
    """
    row = FORMATS[format]
    row.require(weight.shape)
    rows = max(1, CHUNK // max(1, prod(weight.shape[1:])))
    parts = zip(
        *(row.numerics.pack(part, *common) for part in torch.split(weight, rows)), strict=True
    )
    return tuple(torch.cat(part) if part[0].dim() else part[0] for part in parts)
