"""Q8_0 of llama.cpp in plain torch: whole numbers to 127 in blocks of 32, an FP16 scale a block.

::

    s_block = fp16( max(|block|) / 127 )          2^-24 to 65504; 1 for a block of zeros
    code    = round( x / s_block )                nearest, ties to even, from -127 to 127
    x'      = code * s_block

``ggml-quants.c`` rounds by the scale before that is FP16, so that a few of its codes differ by one.
"""

import torch
from torch import Tensor

from compress.formats.blocks import fake_blocks, largest
from compress.formats.int4 import steps
from compress.formats.table import FORMATS

__all__ = ["encode", "fake", "pack", "round_", "scales", "steps", "unpack"]

GROUP = FORMATS["q8_0"].group
MOST = 127
FP16_TINY, FP16_MAX = 2.0**-24, 65504.0


def block_scale(blocks: Tensor, ratio: float | Tensor = 1.0) -> Tensor:
    """The FP16 scale of every row of 32, as [rows, 1], for ``ratio`` times its largest value."""
    found = largest(blocks).float() * ratio / MOST
    found = torch.where(found == 0, torch.ones_like(found), found)
    return found.clamp_(FP16_TINY, FP16_MAX).half()


def scales(weight: Tensor, ratio: float | Tensor = 1.0) -> tuple[Tensor]:
    """FP16 scales [..., in/32], as they are stored."""
    rows = weight.reshape(-1, GROUP)
    return (block_scale(rows, ratio).view(*weight.shape[:-1], -1),)


def round_(scaled: Tensor) -> Tensor:
    """Round fp32 values to those of the codes, in place."""
    return scaled.round_().clamp_(-MOST, MOST)


def fake(weight: Tensor) -> Tensor:
    """The weight after quantizing and dequantizing, in its own dtype; the last axis is blocked."""
    return fake_blocks(weight, GROUP, lambda blocks: steps(block_scale(blocks)), round_)


def encode(weight: Tensor, scales: Tensor) -> Tensor:
    """The codes at these scales, I8 of the weight's shape."""
    scaled = weight.reshape(scales.numel(), -1) / steps(scales).view(-1, 1)
    return round_(scaled).to(torch.int8).view(weight.shape)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The stored form: I8 codes of the weight's shape and FP16 scales [..., in/32]."""
    (found,) = scales(weight)
    return encode(weight, found), found


def unpack(codes: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of a packed tensor."""
    return (codes.view(scales.numel(), -1) * steps(scales).view(-1, 1)).view(codes.shape)
