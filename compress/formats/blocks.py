"""What formats with 4-bit codes in blocks share: E2M1, codes in pairs, work in chunks.

E2M1 has two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
"""

from collections.abc import Callable

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = E2M1[-1]
# Adding and subtracting 1.5 * 2^23 * step rounds an fp32 number to a multiple of step, ties to
# even. The E2M1 step is half the power of two below the value, at least one half.
ROUND = 1.5 * 2.0**22
EXPONENT = 0x7F800000
# Numbers worked on at a time: what is in flight stays in the cache, which is 5 times faster.
CHUNK = 2**20


def largest(blocks: Tensor) -> Tensor:
    """The largest magnitude of every row [rows, a power of two], as [rows, 1]."""
    # A tree of elementwise maxima: reducing short rows directly is 3 times slower.
    found = blocks.abs()
    while (width := found.shape[1] // 2) > 0:
        found = torch.maximum(found[:, :width], found[:, width:])
    return found


def fake_blocks(
    weight: Tensor,
    group: int,
    scales_of: Callable[[Tensor], Tensor],
    round_: Callable[[Tensor], Tensor],
) -> Tensor:
    """The weight after quantizing and dequantizing blocks of its last axis, in its own dtype.

    ``scales_of`` gives the fp32 scale [rows, 1] of blocks [rows, group]; ``round_`` rounds scaled
    values to those of the codes, in place.
    """
    rows = weight.detach().reshape(-1, group)
    result = torch.empty_like(rows)
    step = CHUNK // group
    for start in range(0, len(rows), step):
        blocks = rows[start : start + step]
        scales = scales_of(blocks)
        result[start : start + step] = round_(blocks / scales).mul_(scales)
    return result.view(weight.shape)


def round_e2m1_(x: Tensor) -> Tensor:
    """Round fp32 values to the E2M1 grid, in place: nearest, ties to even, saturating at 6."""
    x.clamp_(-E2M1_MAX, E2M1_MAX)
    step = x.view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)
    step.clamp_(min=1.0).mul_(ROUND)
    return x.add_(step).sub_(step)


def e2m1_codes(scaled: Tensor) -> Tensor:
    """The codes of fp32 values after rounding, U8: the sign in bit 3, the place in the grid."""
    negative = (scaled < 0).to(torch.uint8) << 3
    size = round_e2m1_(scaled).abs_()
    # From 1 = code 2 on, exponent and first bit of the mantissa count the grid.
    normal = (size.view(torch.int32) >> 22) - (127 * 2 - 2)
    return torch.where(size < 1, (size + size).to(torch.uint8), normal.to(torch.uint8)) | negative


def e2m1_values(pairs: Tensor, group: int) -> Tensor:
    """The fp32 values [rows, group] of codes in pairs, in bytes of any shape."""
    grid = torch.tensor(E2M1 + tuple(-value for value in E2M1), device=pairs.device)
    # Both values of a byte at once, which is three times faster than one code at a time.
    both = torch.stack((grid.repeat(16), grid.repeat_interleave(16)), dim=-1)
    return both.index_select(0, pairs.reshape(-1).int()).view(-1, group)


def in_pairs(codes: Tensor) -> Tensor:
    """4-bit codes [rows, group] two a byte, the even column in the low half: [rows, group / 2]."""
    return codes[:, 1::2] << 4 | codes[:, 0::2]


def from_pairs(pairs: Tensor, group: int) -> Tensor:
    """The codes [rows, group] of bytes of any shape."""
    return torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).view(-1, group)
