"""Products of linear layers with rounded operands, in plain torch: the reference of every recipe.

A linear layer is three products, each of which sums over an axis of both operands::

    y  = Q(x) Q(W)^T             over inputs
    dx = Q(dy) Q(W)              over outputs
    dW = Q(dy^T H) Q(x^T H)^T    over tokens

``Q`` rounds to a recipe's numbers with scales shared by blocks along the axis summed over; ``H`` is
an orthogonal transform of every 16 tokens that spreads outliers and leaves the product as it was.
Sums are fp32. FP8 has ``s = amax / most`` in fp32 and ``code = round(x / s)``; NVFP4 has
``s_tensor = amax / (6 * 448)`` in fp32, ``s_block = e4m3(max / (6 s_tensor))`` of at least 2^-9 and
``code = e2m1(x / (s_block s_tensor))``, in the order of ModelOpt's operations. (What ``formats``
stores keeps clear of scales that servers' kernels change besides.) A block at an edge that is not
full is one of what there is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.formats.blocks import E2M1_MAX, EXPONENT, largest, round_e2m1_
from compress.train.recipes import Operand, Precision

# N tokens, O outputs, I inputs. Matrices are [rows, along]: the axis that is summed over is last.

# The types of FP8 and the largest of their numbers.
FP8 = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
# The least scale of a block of NVFP4.
SMALLEST = 2.0**-9
TILE = 16
# The fixed signs of the Hadamard transform, Transformer Engine's.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def rounded(x: Tensor, how: Operand) -> Tensor:
    """A matrix [rows, along] after rounding, fp32."""
    x = x.float()
    if how.block is None:
        return fp8(x, x.abs().amax(), how)
    tiles = tiled(x, how.block)
    blocks = tiles.flatten(2, 3).flatten(0, 1)
    values = nvfp4_of(blocks, how) if how.numbers == "e2m1" else fp8(blocks, largest(blocks), how)
    return untiled(values.view_as(tiles), x.shape)


def fp8(x: Tensor, amax: Tensor, how: Operand) -> Tensor:
    """FP8 with a scale for each of ``amax``, which broadcasts."""
    assert not how.stochastic, "no recipe rounds FP8 so"
    kind, most = FP8[how.numbers]
    scale = one_for_zero(amax / most)
    return (x / scale).clamp_(-most, most).to(kind).float() * scale


def nvfp4_of(blocks: Tensor, how: Operand) -> Tensor:
    """NVFP4 with an E4M3 scale for every row [rows, a power of two] and one for all."""
    kind, most = FP8["e4m3"]
    scale = one_for_zero(blocks.abs().amax() / (E2M1_MAX * most))
    found = one_for_zero(largest(blocks) / (E2M1_MAX * scale))
    steps = found.clamp_(SMALLEST, most).to(kind).float() * scale
    scaled = blocks / steps
    return (round_stochastically_ if how.stochastic else round_e2m1_)(scaled).mul_(steps)


def one_for_zero(scale: Tensor) -> Tensor:
    """Scales, of which those of zeros are 1."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def round_stochastically_(x: Tensor) -> Tensor:
    """Round fp32 values to the E2M1 grid, in place: to a neighbour, whose mean is the value."""
    x.clamp_(-E2M1_MAX, E2M1_MAX)
    step = x.view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)
    step.clamp_(min=1.0).mul_(0.5)
    return x.div_(step).add_(torch.rand_like(x)).floor_().mul_(step)


def tiled(x: Tensor, block: tuple[int, int]) -> Tensor:
    """A matrix as tiles [down, across, rows, along] of a block each, zeros where it ends."""
    down, across = (-(-size // step) for size, step in zip(x.shape, block, strict=True))
    rows, along = block
    x = functional.pad(x, (0, across * along - x.shape[1], 0, down * rows - x.shape[0]))
    return x.reshape(down, rows, across, along).transpose(1, 2)


def untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The matrix of tiles."""
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


def hadamard(x: Tensor) -> Tensor:
    """The random Hadamard transform of every 16 numbers along a matrix; zeros follow its end."""
    signs = torch.tensor(SIGNS, dtype=torch.float32, device=x.device)
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < TILE:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = functional.pad(x.float(), (0, -x.shape[1] % TILE))
    turned: Tensor = x.view(len(x), -1, TILE) @ (signs[:, None] * matrix / TILE**0.5)
    return turned.flatten(1, 2)


class Linear(torch.autograd.Function):
    """``x W^T`` under a recipe: [N, I] and [O, I] give [N, O] in the type of x."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, precision: Precision, plain: bool
    ) -> Tensor:
        """The output; with ``plain`` of operands in the type of x, not rounded further."""
        assert precision.weight
        assert precision.activation
        ctx.save_for_backward(x_NI, weight_OI)
        ctx.precision = precision
        if plain:
            return x_NI @ weight_OI.to(x_NI.dtype).T
        y_NO = rounded(x_NI, precision.activation) @ rounded(weight_OI, precision.weight).T
        return y_NO.to(x_NI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x in its type and of the weight in its own."""
        x_NI, weight_OI = ctx.saved_tensors
        gradient_NO, precision = gradients[0], ctx.precision
        dx_NI = dweight_OI = None
        if ctx.needs_input_grad[0]:
            # Square blocks are the same in both directions: forward and backward see one weight.
            weight_IO = rounded(weight_OI.T, precision.weight)
            dx_NI = (rounded(gradient_NO, precision.gradient) @ weight_IO.T).to(x_NI.dtype)
        if ctx.needs_input_grad[1]:
            gradient_ON, x_IN = gradient_NO.T, x_NI.T
            if precision.hadamard:
                gradient_ON, x_IN = hadamard(gradient_ON), hadamard(x_IN)
            found = rounded(gradient_ON, precision.gradient) @ rounded(x_IN, precision.activation).T
            dweight_OI = found.to(weight_OI.dtype)
        return dx_NI, dweight_OI, None, None
