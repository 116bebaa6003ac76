"""NVFP4 in plain torch: E2M1 values in blocks of 16, an E4M3 scale a block, an FP32 scale a tensor.

The specification of every faster path. With ``amax`` the largest magnitude of the tensor (of its
fused group, where weights share the scale)::

    s_tensor = amax / (6 * 448)                           fp32
    s_block  = e4m3( max(|block|) / (6 * s_tensor) )      at least 2^-9; 1 for a block of zeros
    code     = e2m1( x / (s_block * s_tensor) )           nearest, ties to the even code
    x'       = code * (s_block * s_tensor)

The order of the operations is ModelOpt's packer's, so that codes and scales agree bit for bit.
"""

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Adding and subtracting 1.5 * 2^23 * step rounds an fp32 number to a multiple of step, ties to
# even. The E2M1 step is half the power of two below the value, at least one half.
ROUND = 1.5 * 2.0**22
EXPONENT = 0x7F800000
# Blocks worked on at a time: what is in flight stays in the cache, which is 5 times faster.
CHUNK = 2**16


def tensor_scale(amax: Tensor) -> Tensor:
    """The FP32 scale of a tensor; 1 where ``amax`` is zero or too small to be scaled by."""
    scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def block_scale(blocks: Tensor, scale: Tensor) -> Tensor:
    """The E4M3 scale of every row of 16, as [rows, 1]."""
    # A tree of elementwise maxima: reducing rows of 16 directly is 3 times slower.
    largest = blocks.abs()
    for width in (8, 4, 2, 1):
        largest = torch.maximum(largest[:, :width], largest[:, width:])
    found = largest.float() / (E2M1_MAX * scale)
    found = torch.where(found == 0, torch.ones_like(found), found)
    return found.clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def round_e2m1_(x: Tensor) -> Tensor:
    """Round fp32 values to the E2M1 grid, in place: nearest, ties to even, saturating at 6."""
    x.clamp_(-E2M1_MAX, E2M1_MAX)
    step = x.view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)
    step.clamp_(min=1.0).mul_(ROUND)
    return x.add_(step).sub_(step)


def fake(weight: Tensor, amax: Tensor) -> Tensor:
    """The weight after quantizing and dequantizing, in its own dtype; the last axis is blocked."""
    scale = tensor_scale(amax)
    rows = weight.detach().reshape(-1, BLOCK)
    result = torch.empty_like(rows)
    for start in range(0, len(rows), CHUNK):
        blocks = rows[start : start + CHUNK]
        scales = block_scale(blocks, scale).float() * scale
        result[start : start + CHUNK] = round_e2m1_(blocks / scales).mul_(scales)
    return result.view(weight.shape)


def pack(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stored form: codes, block scales, tensor scale.

    Codes are U8 [..., in/2], the even column in the low nibble; block scales E4M3 [..., in/16].
    """
    scale = tensor_scale(amax)
    rows = weight.reshape(-1, BLOCK)
    scales = block_scale(rows, scale)
    scaled = rows / (scales.float() * scale)
    negative = (scaled < 0).to(torch.uint8) << 3
    grid = torch.tensor(E2M1, device=weight.device)
    codes = torch.searchsorted(grid, round_e2m1_(scaled).abs_()).to(torch.uint8) | negative
    packed = codes[:, 1::2] << 4 | codes[:, 0::2]
    shape = weight.shape[:-1]
    return packed.view(*shape, -1), scales.view(*shape, -1), scale


def unpack(codes: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """The FP32 values of a packed tensor."""
    grid = torch.tensor(E2M1 + tuple(-value for value in E2M1), device=codes.device)
    nibbles = torch.stack((codes & 0x0F, codes >> 4), dim=-1).view(-1, BLOCK)
    values = grid[nibbles.int()] * (scales.float() * scale).view(-1, 1)
    return values.view(*codes.shape[:-1], -1)
