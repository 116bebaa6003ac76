"""Quantized weights on disk, as we write them: which tensors hold one.

========  =================  ======================  ================
format    ``weight``         ``weight_scale``        beside them
========  =================  ======================  ================
FP8       E4M3 [out, in]     F32 []
NVFP4     U8 [out, in/2]     E4M3 [out, in/16]       weight_scale_2
MXFP4     U8 [out, in/2]     U8 (E8M0) [out, in/32]
INT4      U8 [out, in/2]     BF16 [out, in/128]
Q8_0      I8 [out, in]       F16 [out, in/32]
Q4_0      U8 [out, in/2]     F16 [out, in/32]
========  =================  ======================  ================

The names and the first two rows are ModelOpt's layout. Formats that round inputs have their
``input_scale`` F32 [] last. Everything else is stored as it is. ``model/quantized.py`` reads it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.formats.table import FORMATS, Format


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
