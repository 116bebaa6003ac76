"""What a format adds to the output of a linear layer: errors of its weight, and of its input.

With dW what rounding adds to a weight, and dx what it adds to an input in formats that round it::

    Q(x) Q(W)^T - x W^T  =  x dW^T + dx (W + dW)^T
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from compress.formats.table import FORMATS, Format
from compress.model.inputs import Inputs


@dataclass(frozen=True)
class Shift:
    """What a format adds to an input x [..., in] times a weight [out, in]; ``error`` is dW."""

    x: Tensor
    weight: Tensor
    error: Tensor
    format: Format

    @cached_property
    def move(self) -> Tensor | None:
        """What rounding adds to the input; None where the format is of weights alone."""
        rounds = FORMATS[self.format].rounds_inputs
        return Inputs(self.format).rounded(self.x) - self.x if rounds else None

    @cached_property
    def output(self) -> Tensor:
        """What is added to the output [..., out]."""
        found = self.x @ self.error.T
        return found if self.move is None else found + self.move @ (self.weight + self.error).T

    def cost(self, gradient: Tensor, *, by_input: bool) -> Tensor:
        """What that costs to first order, by the output, or by the input that it comes from."""
        if not by_input:
            return gradient * self.output
        found = self.x * (gradient @ self.error)
        if self.move is None:
            return found
        return found + self.move * (gradient @ (self.weight + self.error))
