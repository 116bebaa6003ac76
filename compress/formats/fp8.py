"""FP8 in plain torch: E4M3 values with one scale a tensor, which kernels in BF16 read unrounded.

The specification of every faster path. With ``amax`` the largest magnitude of the tensor (of its
fused group, where weights share the scale)::

    s_tensor = bf16up( amax / 448 )    the next BF16 number that is not below
    code     = e4m3( x / s_tensor )    nearest, ties to even
    x'       = code * s_tensor

Kernels that multiply in BF16 (Marlin) round the scale to it: one that is a BF16 number stays.
"""

import torch
from torch import Tensor

from compress.formats.blocks import CHUNK, in_chunks

E4M3_MAX = 448.0
# The smallest number of FP32 and BF16 with all its digits.
FP32_TINY = 2.0**-126


def tensor_scale(amax: Tensor) -> Tensor:
    """The scale of a tensor, as FP32; 1 where ``amax`` is zero or too small to be scaled by."""
    bits = (amax.float() / E4M3_MAX).view(torch.int32)
    scale = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return torch.where(scale < FP32_TINY, torch.ones_like(scale), scale)


def scales(weight: Tensor, amax: Tensor, ratio: float | Tensor = 1.0) -> tuple[Tensor]:
    """The tensor scale, as it is stored, for ``ratio`` times the largest value."""
    return (tensor_scale(amax * ratio),)


def steps(scale: Tensor) -> Tensor:
    """What a code of 1 stands for, fp32 []."""
    return scale


def round_(scaled: Tensor) -> Tensor:
    """Round fp32 values to those of the codes, in place."""
    # E4M3 turns what lies above its largest value into NaN.
    return scaled.copy_(scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn))


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """The E4M3 codes at this scale, of the weight's shape."""

    def codes(flat: Tensor) -> Tensor:
        # fp32 before the division: rounding to BF16 on the way would round twice.
        return (flat.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)

    return in_chunks(codes, weight.reshape(-1)).view(weight.shape)


def pack(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """The stored form: E4M3 codes of the weight's shape and the tensor scale."""
    (found,) = scales(weight, amax)
    return encode(weight, found), found


def unpack(codes: Tensor, scale: Tensor) -> Tensor:
    """The FP32 values of a packed tensor."""
    return codes.float() * scale


def fake(weight: Tensor, amax: Tensor) -> Tensor:
    """The weight after quantizing and dequantizing, in its own dtype."""
    return fake_at(weight, tensor_scale(amax))


def fake_at(values: Tensor, scale: Tensor) -> Tensor:
    """As ``fake``, by the scale of the tensor."""
    flat = values.detach().reshape(-1)
    result = torch.empty_like(flat)
    for start in range(0, len(flat), CHUNK):
        codes = encode(flat[start : start + CHUNK], scale)
        result[start : start + CHUNK] = codes.float() * scale
    return result.view(values.shape)
