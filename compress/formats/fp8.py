"""FP8 in plain torch: E4M3 values with one FP32 scale a tensor.

The specification of every faster path. With ``amax`` the largest magnitude of the tensor (of its
fused group, where weights share the scale)::

    s_tensor = amax / 448              fp32
    code     = e4m3( x / s_tensor )    nearest, ties to even
    x'       = code * s_tensor
"""

import torch
from torch import Tensor

from compress.formats.blocks import CHUNK

E4M3_MAX = 448.0


def tensor_scale(amax: Tensor) -> Tensor:
    """The FP32 scale of a tensor; 1 where ``amax`` is zero or too small to be scaled by."""
    scale = amax.float() / E4M3_MAX
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def pack(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """The stored form: E4M3 codes of the weight's shape and the tensor scale."""
    scale = tensor_scale(amax)
    # fp32 before the division: rounding to BF16 on the way would round twice. The clamp only acts
    # where the scale itself is subnormal, and E4M3 would turn what lies above into NaN.
    scaled = (weight.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def unpack(codes: Tensor, scale: Tensor) -> Tensor:
    """The FP32 values of a packed tensor."""
    return codes.float() * scale


def fake(weight: Tensor, amax: Tensor) -> Tensor:
    """The weight after quantizing and dequantizing, in its own dtype."""
    flat = weight.detach().reshape(-1)
    result = torch.empty_like(flat)
    for start in range(0, len(flat), CHUNK):
        codes, scale = pack(flat[start : start + CHUNK], amax)
        result[start : start + CHUNK] = codes.float() * scale
    return result.view(weight.shape)
