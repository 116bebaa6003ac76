"""NVFP4 in plain torch: E2M1 values in blocks of 16, an E4M3 scale a block, an FP32 scale a tensor.

The specification of every faster path. With ``amax`` the largest magnitude of the tensor (of its
fused group, where weights share the scale)::

    s_tensor = 1 / (1 / (amax / (6 * 448)))               fp32
    s_block  = e4m3( max(|block|) / (6 * s_tensor) )      at least 2^-6; 1 for a block of zeros
    code     = e2m1( x / (s_block * s_tensor) )           nearest, ties to the even code
    x'       = code * (s_block * s_tensor)

The order of the operations is ModelOpt's packer's, so that codes and scales agree bit for bit, but
for two that readers would change: layouts with the reciprocal of the tensor scale give it back
whole, and no block scale is subnormal, which kernels (Marlin) take for zero.
"""

import torch
from torch import Tensor

from compress.formats.blocks import (
    E2M1_MAX,
    e2m1_codes,
    e2m1_values,
    fake_blocks,
    in_chunks,
    in_pairs,
    largest,
    round_e2m1_,
)
from compress.formats.fp8 import E4M3_MAX
from compress.formats.table import FORMATS

GROUP = FORMATS["nvfp4"].group
E4M3_TINY = 2.0**-6
round_ = round_e2m1_


def tensor_scale(amax: Tensor) -> Tensor:
    """The FP32 scale of a tensor; 1 where ``amax`` is zero or too small to be scaled by."""
    inverse = 1 / (amax.float() / (E2M1_MAX * E4M3_MAX))
    return torch.where(inverse.isinf(), torch.ones_like(inverse), 1 / inverse)


def block_scale(blocks: Tensor, scale: Tensor, ratio: float | Tensor = 1.0) -> Tensor:
    """The E4M3 scale of every row of 16, as [rows, 1], for ``ratio`` times its largest value."""
    found = largest(blocks).float() * ratio / (E2M1_MAX * scale)
    found = torch.where(found == 0, torch.ones_like(found), found)
    return found.clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def scales(weight: Tensor, amax: Tensor, ratio: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """E4M3 block scales [..., in/16] and the tensor scale, as they are stored."""
    scale, rows = tensor_scale(amax), weight.reshape(-1, GROUP)
    if isinstance(ratio, Tensor):
        found = block_scale(rows, scale, ratio)
    else:
        found = in_chunks(lambda blocks: block_scale(blocks, scale, ratio), rows)
    return found.view(*weight.shape[:-1], -1), scale


def steps(scales: Tensor, scale: Tensor) -> Tensor:
    """What a code of 1 stands for in every block, fp32 [..., in/16]."""
    return scales.float() * scale


def fake(weight: Tensor, amax: Tensor) -> Tensor:
    """The weight after quantizing and dequantizing, in its own dtype; the last axis is blocked."""
    return fake_at(weight, tensor_scale(amax))


def fake_at(values: Tensor, scale: Tensor) -> Tensor:
    """As ``fake``, by the scale of the tensor."""

    def steps_of(blocks: Tensor) -> Tensor:
        return steps(block_scale(blocks, scale), scale)

    return fake_blocks(values, GROUP, steps_of, round_)


def encode(weight: Tensor, *scales: Tensor) -> Tensor:
    """The codes at these scales, in pairs [..., in/2]."""
    found = in_chunks(
        lambda blocks, own: in_pairs(e2m1_codes(blocks / own)),
        weight.reshape(-1, GROUP),
        steps(*scales).view(-1, 1),
    )
    return found.view(*weight.shape[:-1], -1)


def pack(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stored form: codes in pairs [..., in/2], E4M3 block scales [..., in/16], tensor scale."""
    found = scales(weight, amax)
    return encode(weight, *found), *found


def unpack(pairs: Tensor, *scales: Tensor) -> Tensor:
    """The FP32 values of a packed tensor."""
    values = e2m1_values(pairs, GROUP).mul_(steps(*scales).view(-1, 1))
    return values.view(*pairs.shape[:-1], -1)
