"""MXFP4 in plain torch: E2M1 values in blocks of 32, a power of two a block.

OCP Microscaling Formats (MX) Specification 1.0, section 6.3, with the exponent of E2M1's largest
power of two, 2, taken off::

    s_block = 2^( floor(log2 max(|block|)) - 2 )      at least 2^-127; 1 for a block of zeros
    code    = e2m1( x / s_block )                     nearest, ties to the even code, at most 6
    x'      = code * s_block

The scale is stored as E8M0: its exponent plus 127 in a byte. A block's largest value is 4 to 8
steps; what is above 6 saturates, so that its error may be two steps.
"""

import torch
from torch import Tensor

from compress.formats.blocks import (
    e2m1_codes,
    e2m1_values,
    fake_blocks,
    in_chunks,
    in_pairs,
    largest,
    round_e2m1_,
)
from compress.formats.table import FORMATS

GROUP = FORMATS["mxfp4"].group
BIAS, MANTISSA_BITS = 127, 23  # of fp32, whose exponent is biased as E8M0's is
E2M1_EXPONENT = 2
round_ = round_e2m1_


def block_scale(blocks: Tensor, ratio: float | Tensor = 1.0) -> Tensor:
    """The E8M0 scale of every row of 32, U8 [rows, 1], for ``ratio`` times its largest value."""
    amax = largest(blocks).float() * ratio
    exponent = (amax.view(torch.int32) >> MANTISSA_BITS) - E2M1_EXPONENT
    return torch.where(amax == 0, BIAS, exponent.clamp_(min=0)).to(torch.uint8)


def scales(weight: Tensor, ratio: float | Tensor = 1.0) -> tuple[Tensor]:
    """E8M0 block scales [..., in/32], U8, as they are stored."""
    rows = weight.reshape(-1, GROUP)
    return (block_scale(rows, ratio).view(*weight.shape[:-1], -1),)


def steps(scales: Tensor) -> Tensor:
    """The fp32 numbers that E8M0 scales stand for."""
    # An exponent field of zero is a subnormal: 2^-127 has the highest bit of the mantissa only.
    bits = (scales.int() << MANTISSA_BITS).clamp_(min=1 << (MANTISSA_BITS - 1))
    return bits.view(torch.float32)


def fake(weight: Tensor) -> Tensor:
    """The weight after quantizing and dequantizing, in its own dtype; the last axis is blocked."""
    return fake_blocks(weight, GROUP, lambda blocks: steps(block_scale(blocks)), round_)


def encode(weight: Tensor, scales: Tensor) -> Tensor:
    """The codes at these scales, in pairs [..., in/2]."""
    found = in_chunks(
        lambda blocks, own: in_pairs(e2m1_codes(blocks / own)),
        weight.reshape(-1, GROUP),
        steps(scales).view(-1, 1),
    )
    return found.view(*weight.shape[:-1], -1)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The stored form: codes in pairs [..., in/2] and E8M0 block scales [..., in/32], both U8."""
    (found,) = scales(weight)
    return encode(weight, found), found


def unpack(pairs: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of a packed tensor."""
    values = e2m1_values(pairs, GROUP).mul_(steps(scales).view(-1, 1))
    return values.view(*pairs.shape[:-1], -1)
