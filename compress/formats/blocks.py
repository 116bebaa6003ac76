"""What formats with 4-bit codes in blocks share: E2M1, codes in pairs, work in chunks.

E2M1 has two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = E2M1[-1]
# Adding and subtracting 1.5 * 2^23 * step rounds an fp32 number to a multiple of step, ties to
# even. The E2M1 step is half the power of two below the value, at least one half.
ROUND = 1.5 * 2.0**22
EXPONENT, SIGN = 0x7F800000, -(2**31)
# Numbers worked on at a time: what is in flight stays in the cache, which is 5 times faster.
CHUNK = 2**20


def largest(blocks: Tensor) -> Tensor:
    """The largest magnitude of every row of equal ones, fp32 [rows, 1]."""
    rows, width = blocks.shape
    # As one line of windows: torch reduces short rows at half the speed (measured, fp32).
    line = blocks.abs().float().reshape(1, 1, -1)
    return max_pool1d(line, width).view(rows, 1) if rows else line.view(0, 1)


def in_chunks(make: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """What ``make`` gives of so many rows at a time, of tensors with as many rows each."""
    count, step = len(rows[0]), max(1, CHUNK // rows[0][0].numel()) if len(rows[0]) else 1
    found = [make(*(e[start : start + step] for e in rows)) for start in range(0, count, step)]
    return found[0] if len(found) == 1 else torch.cat(found) if found else make(*rows)


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


@cache
def code_table(device: torch.device) -> Tensor:
    """The code of every number of the E2M1 grid by sign, exponent and the mantissa's first bit."""
    grid = torch.tensor(E2M1)
    numbers = torch.cat((grid, torch.copysign(grid, torch.tensor(-1.0))))
    table = torch.zeros(1 << 10, dtype=torch.uint8)
    table[places_of(numbers).long()] = torch.arange(16, dtype=torch.uint8)
    return table.to(device)


def places_of(grid: Tensor) -> Tensor:
    """Where numbers of the grid are in ``code_table``; the numbers are lost."""
    return grid.view(torch.int32).bitwise_right_shift_(22).bitwise_and_(0x3FF)


def e2m1_codes(scaled: Tensor) -> Tensor:
    """The codes of fp32 values after rounding, U8: the sign in bit 3, the place in the grid.

    The values are lost.
    """
    # A zero has no sign, but what is rounded to zero keeps its own.
    bits = scaled.add_(0.0).view(torch.int32)
    signs = bits & SIGN
    round_e2m1_(scaled)
    bits.bitwise_or_(signs)
    # One look-up: comparing and choosing take three times as long.
    codes = code_table(scaled.device).index_select(0, places_of(scaled).view(-1))
    return codes.view(scaled.shape)


def e2m1_values(pairs: Tensor, group: int) -> Tensor:
    """The fp32 values [rows, group] of codes in pairs, in bytes of any shape."""
    grid = torch.tensor(E2M1 + tuple(-value for value in E2M1), device=pairs.device)
    # Both values of a byte at once, which is three times faster than one code at a time.
    both = torch.stack((grid.repeat(16), grid.repeat_interleave(16)), dim=-1)
    return both.index_select(0, pairs.reshape(-1).int()).view(-1, group)


def in_pairs(codes: Tensor) -> Tensor:
    """4-bit codes [rows, group] two a byte, the even column in the low half: [rows, group / 2]."""
    both = codes.contiguous().view(torch.int16)
    return (both >> 4 | both).to(torch.uint8)


def from_pairs(pairs: Tensor, group: int) -> Tensor:
    """The codes [rows, group] of bytes of any shape."""
    return torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).view(-1, group)
