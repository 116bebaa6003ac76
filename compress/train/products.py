"""Products of linear layers with rounded operands, in plain torch: the reference of every recipe.

A linear layer is three products, each of which sums over an axis of both operands::

    y  = Q(x) Q(W)^T             over inputs
    dx = Q(dy) Q(W)              over outputs
    dW = Q(dy^T H) Q(x^T H)^T    over tokens

``Q`` rounds to a recipe's numbers with scales shared by blocks along the axis summed over; ``H`` is
an orthogonal transform of every 16 tokens that spreads outliers and leaves the product as it was.
Sums are fp32. NVFP4's numbers and scales are those of ``formats/nvfp4.py``, so ModelOpt's, FP8's
those of ``formats/fp8.py``; a block at an edge that is not full is one of what there is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.formats import fp8, nvfp4
from compress.formats.blocks import E2M1_MAX, EXPONENT, largest
from compress.train.recipes import Operand, Precision

# N tokens, O outputs, I inputs. Matrices are [rows, along]: the axis that is summed over is last.

E5M2_MAX = 57344.0
TILE = 16
# The fixed signs of the Hadamard transform, Transformer Engine's.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def rounded(x: Tensor, how: Operand) -> Tensor:
    """A matrix [rows, along] after rounding, fp32."""
    x = x.float()
    if how.block is None:
        return by_tensor(x, how)
    tiles = tiled(x, how.block)
    blocks = tiles.flatten(2, 3).flatten(0, 1)
    values = (e2m1_blocks if how.numbers == "e2m1" else e4m3_blocks)(blocks, how.stochastic)
    return untiled(values.view_as(tiles), x.shape)


def by_tensor(x: Tensor, how: Operand) -> Tensor:
    """FP8 with one scale for the tensor: current scaling."""
    amax = x.abs().amax()
    if how.numbers == "e4m3":
        return fp8.fake(x, amax)
    scale = amax / E5M2_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (x / scale).clamp_(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2)
    return codes.float() * scale


def e4m3_blocks(blocks: Tensor, stochastic: bool) -> Tensor:
    """E4M3 with an fp32 scale for every row [rows, a power of two]."""
    assert not stochastic, "no recipe rounds FP8 so"
    scales = fp8.tensor_scale(largest(blocks))
    return fp8.round_(blocks / scales).mul_(scales)


def e2m1_blocks(blocks: Tensor, stochastic: bool) -> Tensor:
    """NVFP4 with an E4M3 scale for every row [rows, a power of two] and one for all."""
    scale = nvfp4.tensor_scale(blocks.abs().amax())
    steps = nvfp4.steps(nvfp4.block_scale(blocks, scale), scale)
    scaled = blocks / steps
    return (round_stochastically_ if stochastic else nvfp4.round_)(scaled).mul_(steps)


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
