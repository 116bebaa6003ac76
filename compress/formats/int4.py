"""INT4 in plain torch: whole numbers from -8 to 7 in groups of 128, a BF16 scale a group.

Symmetric, without a zero point::

    s_group = bf16( max(|group|) / 7 )        1 for a group of zeros, or below 2^-126
    code    = round( x / s_group )            nearest, ties to even, from -8 to 7
    x'      = code * s_group

Codes are stored in two's complement.
"""

import torch
from torch import Tensor

from compress.formats.blocks import fake_blocks, from_pairs, in_pairs, largest
from compress.formats.fp8 import FP32_TINY
from compress.formats.table import FORMATS

GROUP = FORMATS["int4"].group
LEAST, MOST = -8, 7


def group_scale(groups: Tensor, ratio: float | Tensor = 1.0) -> Tensor:
    """The BF16 scale of every row of 128, as [rows, 1], for ``ratio`` times its largest value."""
    found = largest(groups).float() * ratio / MOST
    return torch.where(found < FP32_TINY, torch.ones_like(found), found).bfloat16()


def scales(weight: Tensor, ratio: float | Tensor = 1.0) -> tuple[Tensor]:
    """BF16 scales [..., in/128], as they are stored."""
    rows = weight.reshape(-1, GROUP)
    return (group_scale(rows, ratio).view(*weight.shape[:-1], -1),)


def steps(scales: Tensor) -> Tensor:
    """What a code of 1 stands for in every group, fp32 [..., in/128]."""
    return scales.float()


def round_(scaled: Tensor) -> Tensor:
    """Round fp32 values to those of the codes, in place."""
    return scaled.round_().clamp_(LEAST, MOST)


def fake(weight: Tensor) -> Tensor:
    """The weight after quantizing and dequantizing, in its own dtype; the last axis is grouped."""
    return fake_blocks(weight, GROUP, lambda groups: steps(group_scale(groups)), round_)


def encode(weight: Tensor, scales: Tensor) -> Tensor:
    """The codes at these scales, in pairs, U8 [..., in/2]; a scale for every group of a row."""
    scaled = weight.reshape(scales.numel(), -1) / steps(scales).view(-1, 1)
    codes = round_(scaled).to(torch.int8).view(torch.uint8) & 0x0F
    return in_pairs(codes).view(*weight.shape[:-1], -1)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The stored form: codes in pairs, U8 [..., in/2], and BF16 scales [..., in/128]."""
    (found,) = scales(weight)
    return encode(weight, found), found


def unpack(pairs: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of a packed tensor."""
    codes = from_pairs(pairs, 2 * pairs.numel() // scales.numel()) << 4
    signed = codes.view(torch.int8) >> 4  # the sign comes down with it
    return (signed * steps(scales).view(-1, 1)).view(*pairs.shape[:-1], -1)
