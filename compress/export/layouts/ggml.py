"""Number formats as GGML stores them: the codes and scales of ours, in the order of its blocks.

=======  =====  ========  ============================================================
format   type   a block   its bytes
=======  =====  ========  ============================================================
bf16     BF16   1         2; what has one axis, and what a table keeps in fp32, is F32
q8_0     Q8_0   32        FP16 scale, 32 codes
q4_0     Q4_0   32        FP16 scale, 32 codes + 8 in halves
mxfp4    MXFP4  32        E8M0 scale, 32 codes in halves
nvfp4    NVFP4  64        4 E4M3 scales, 4 times 16 codes in halves; its tensor scale aside
=======  =====  ========  ============================================================

In halves means two a byte, the first half of the codes in the low bits. The formulas are those of
``ggml/src/ggml-quants.c``, whose values are ours bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.formats.blocks import from_pairs
from compress.formats.table import Format


@dataclass(frozen=True)
class GgmlType:
    """A type of GGML: its name, and what a weight's parts are in its bytes, U8 [out, bytes]."""

    name: str
    block: int
    packed: Callable[..., Tensor]


def q8_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Q8_0 of I8 codes [out, in] and FP16 scales [out, in/32]."""
    return side_by_side(scales, codes.view(torch.uint8).view(*scales.shape, 32))


def q4_0(pairs: Tensor, scales: Tensor) -> Tensor:
    """Q4_0 of pairs [out, in/2] in two's complement and FP16 scales [out, in/32]."""
    # The sign bit of four turned over is 8 more.
    return side_by_side(scales, in_halves(pairs, 32) ^ 0x88)


def mxfp4(pairs: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 of E2M1 pairs [out, in/2] and exponents [out, in/32]."""
    return side_by_side(scales, in_halves(pairs, 32))


def nvfp4(pairs: Tensor, scales: Tensor, *_: Tensor) -> Tensor:
    """NVFP4 of E2M1 pairs [out, in/2] and E4M3 scales [out, in/16]."""
    fours = (*scales.shape[:-1], -1, 4)
    codes = in_halves(pairs, 16).view(*fours, 8).flatten(-2)
    return torch.cat((scales.view(torch.uint8).view(fours), codes), -1).flatten(-2)


def in_halves(pairs: Tensor, size: int) -> Tensor:
    """Pairs [out, in/2] by blocks [out, in/size, size/2], their first half in the low bits."""
    codes = from_pairs(pairs, size).view(*pairs.shape[:-1], -1, size)
    low, high = codes.chunk(2, -1)
    return low | high << 4


def side_by_side(scales: Tensor, codes: Tensor) -> Tensor:
    """Bytes [out, all] of blocks that begin with their scale [out, blocks]."""
    return torch.cat((scales[..., None].view(torch.uint8), codes), -1).flatten(-2)


TYPES: Mapping[Format, GgmlType] = {
    "bf16": GgmlType("BF16", 1, lambda values: values.contiguous().view(torch.uint8)),
    "q8_0": GgmlType("Q8_0", 32, q8_0),
    "q4_0": GgmlType("Q4_0", 32, q4_0),
    "mxfp4": GgmlType("MXFP4", 32, mxfp4),
    "nvfp4": GgmlType("NVFP4", 64, nvfp4),
}
# Why the others have no place in the file.
REASONS: Mapping[Format, str] = {
    "fp8": "GGML has no 8-bit floats; q8_0 is its format of 8 bits",
    "int4": "GGML's blocks have 32 weights, not 128; q4_0 is int4 in blocks of 32",
}
