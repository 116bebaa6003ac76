"""Q4_0 of llama.cpp in plain torch: whole numbers from -8 to 7 in blocks of 32, an FP16 scale each.

The value of largest magnitude is the code -8, so that the scale has the other sign::

    s_block = fp16( extreme(block) / -8 )         2^-24 to 65504 in size; 1 for a block of zeros
    code    = round( x / s_block )                nearest, ties to even, from -8 to 7
    x'      = code * s_block

Codes are stored in two's complement, as those of ``int4`` (``ggml-quants.c`` adds 8 to them; it
rounds by the scale before that is FP16, so that a few of its codes differ by one).
"""

import torch
from torch import Tensor

from compress.formats.blocks import fake_blocks, largest
from compress.formats.int4 import LEAST, encode, round_, steps, unpack
from compress.formats.q8_0 import FP16_MAX, FP16_TINY
from compress.formats.table import FORMATS

__all__ = ["encode", "fake", "pack", "round_", "scales", "steps", "unpack"]

GROUP = FORMATS["q4_0"].group


def block_scale(blocks: Tensor, ratio: float | Tensor = 1.0) -> Tensor:
    """The FP16 scale of every row of 32, as [rows, 1], for ``ratio`` times its extreme value."""
    size = largest(blocks).float()
    positive = blocks.amax(1, keepdim=True) == size
    found = torch.where(size == 0, torch.ones_like(size), size * ratio / -LEAST)
    found = found.clamp_(FP16_TINY, FP16_MAX).half()
    return torch.where(positive & (size > 0), -found, found)


def scales(weight: Tensor, ratio: float | Tensor = 1.0) -> tuple[Tensor]:
    """FP16 scales [..., in/32], as they are stored."""
    rows = weight.reshape(-1, GROUP)
    return (block_scale(rows, ratio).view(*weight.shape[:-1], -1),)


def fake(weight: Tensor) -> Tensor:
    """The weight after quantizing and dequantizing, in its own dtype; the last axis is blocked."""
    return fake_blocks(weight, GROUP, lambda blocks: steps(block_scale(blocks)), round_)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The stored form: codes in pairs, U8 [..., in/2], and FP16 scales [..., in/32]."""
    (found,) = scales(weight)
    return encode(weight, found), found
