"""The values of quantized weights, by scheme; ``schemes.py`` says which tensors hold one.

A weight is ``W = s * c``, with a code ``c`` for every number and a scale ``s`` for the tensor, its
rows, its blocks, or the groups of a row; with zero points ``s * (c - z)``. ModelOpt's
``pre_quant_scale`` multiplies what a layer reads: here it multiplies the columns. All in fp32.

Sources: compressed-tensors 0.20 (``compressors``), ModelOpt 0.47 (``export/quant_utils.py``),
DeepSeek-V3's ``fp8_cast_bf16.py``, transformers' ``integrations/mxfp4.py``. Importing this file
imports no torch: plans are made without.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Parts = Mapping[str, "Tensor"]

# The parts of a weight; ``{name}`` is its name, ``{stem}`` that without its ending "weight".
CODES, PACKED = "{name}", "{name}_packed"
SCALE, INVERSE = "{name}_scale", "{name}_scale_inv"
SECOND, GLOBAL = "{name}_scale_2", "{name}_global_scale"
BLOCKS, SCALES = "{name}_blocks", "{name}_scales"
ZERO, ORDER, SHAPE = "{name}_zero_point", "{name}_g_idx", "{name}_shape"
INPUTS = "{stem}pre_quant_scale"


def spread(scale: "Tensor", shape: Shape, block: Shape) -> "Tensor":
    """Scales, of any kind, as a tensor that broadcasts over the weight."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() < len(shape):
        return scale.unsqueeze(-1)
    if scale.shape[-2] != shape[-2]:
        rows = scale.repeat_interleave(block[0], dim=-2)[..., : shape[-2], :]
        return rows.repeat_interleave(block[1], dim=-1)[..., : shape[-1]]
    return scale.repeat_interleave(shape[-1] // scale.shape[-1], dim=-1)


def product(codes: "Tensor", scale: "Tensor", parts: Parts, block: Shape) -> "Tensor":
    """Codes, fp32 of the weight's shape, less their zero points and times all scales; in place."""
    shape, order = tuple(codes.shape), parts.get(ORDER)

    def over(numbers: "Tensor") -> "Tensor":
        # With an order, the columns of a group are not next to each other.
        return spread(numbers, shape, block) if order is None else numbers[..., order.long()]

    if (zero := parts.get(ZERO)) is not None:
        codes -= over(zero.float())
    return of_inputs(codes.mul_(over(scale)), parts)


def of_inputs(values: "Tensor", parts: Parts) -> "Tensor":
    """Values times what the inputs are multiplied by, if they are; in place."""
    return values.mul_(parts[INPUTS].float()) if INPUTS in parts else values


def numbers(scale: "Tensor") -> "Tensor":
    """Scales as fp32 numbers; bytes are exponents."""
    import torch

    from compress.formats.mxfp4 import steps

    return steps(scale) if scale.dtype == torch.uint8 else scale.float()


def fp8(scale: str, parts: Parts, shape: Shape, block: Shape) -> "Tensor":
    """FP8, with scales under a name."""
    from compress.formats.fp8 import unpack

    scales = spread(numbers(parts[scale]), shape, block)
    return of_inputs(unpack(parts[CODES], scales), parts)


def int8(parts: Parts, _: Shape, block: Shape) -> "Tensor":
    """INT8: codes that are numbers."""
    return product(parts[CODES].float(), parts[SCALE].float(), parts, block)


def nvfp4(codes: str, parts: Parts, _: Shape, __: Shape) -> "Tensor":
    """NVFP4, with codes under a name."""
    from compress.formats.nvfp4 import unpack

    if SECOND in parts:
        return of_inputs(unpack(parts[codes], parts[SCALE], parts[SECOND]), parts)
    # Ours is one whose reciprocal gives it back.
    return unpack(parts[codes], parts[SCALE], (1 / parts[GLOBAL]).reshape(()))


def mxfp4(codes: str, parts: Parts, _: Shape, __: Shape) -> "Tensor":
    """MXFP4, with codes under a name."""
    import torch

    from compress.formats.mxfp4 import unpack

    return unpack(parts[codes], parts[SCALE].view(torch.uint8))


def experts(parts: Parts, shape: Shape, block: Shape) -> "Tensor":
    """MXFP4 of gpt-oss: experts [expert, in, out] of blocks [expert, out, in/32, 16]."""
    rows = {CODES: parts[BLOCKS].flatten(-2), SCALE: parts[SCALES]}
    return mxfp4(CODES, rows, shape, block).transpose(1, 2).contiguous()


def words(bits: int, parts: Parts, shape: Shape, block: Shape) -> "Tensor":
    """INT4 and INT8 in words of 32 bits, lowest bits first, zero in the middle of the range."""
    if (zero := parts.get(ZERO)) is not None:  # packed down the columns
        columns = unpacked(zero.transpose(-1, -2), bits)[..., : shape[-2]]
        parts = {**parts, ZERO: columns.transpose(-1, -2)}
    codes = unpacked(parts[PACKED], bits)[..., : shape[-1]]
    return product(codes, numbers(parts[SCALE]), parts, block)


def unpacked(packed: "Tensor", bits: int) -> "Tensor":
    """The numbers in the words of every row, fp32."""
    import torch

    codes = packed.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 0x0F, codes >> 4), dim=-1).flatten(-2)
    return codes.float().sub_(2 ** (bits - 1))


def halves(parts: Parts, shape: Shape, block: Shape) -> "Tensor":
    """INT4 of ModelOpt: two's complement, the even row in the low half of a byte."""
    import torch

    codes = parts[CODES]
    # The sign comes down with the shift.
    rows = ((codes << 4).view(torch.int8) >> 4, codes.view(torch.int8) >> 4)
    values = torch.stack(rows, dim=-2).reshape(shape).float()
    return product(values, numbers(parts[SCALE]), parts, block)


def ours(parts: Parts, _: Shape, __: Shape) -> "Tensor":
    """4-bit codes of our own exports: two's complement, the even column in the low half."""
    from compress.formats.int4 import unpack

    return unpack(parts[CODES], parts[SCALE])
