"""Formats that round inputs cost what their products differ by, to first order."""

from pathlib import Path

import pytest
import torch
from test_contributions import LENGTH, TOKENS
from torch import Tensor

from compress.formats.table import Format
from compress.model.checkpoint import open_checkpoint
from compress.model.inputs import Inputs
from compress.model.modules import final_hidden, layer_of, weights_of
from compress.scores.gated import Gated
from compress.scores.gradients import gate_gradients
from compress.scores.taps import Taps
from compress.sweep.stack import stack_of


@pytest.mark.parametrize("format", ["nvfp4_a4", "fp8_a8", "nvfp4"])
def test_costs_are_derivatives_at_the_product_of_both(tiny_llama: Path, format: Format) -> None:
    stack = stack_of(open_checkpoint(tiny_llama))
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(len(TOKENS), LENGTH, stack.architecture.hidden, generator=generator)
    gated = Gated(stack)
    [rows] = gate_gradients(gated, Taps(gated), [TOKENS], [format], lambda *_: [upstream])
    found = sum(float(each.sum()) for key, each in rows.items() if key.endswith(f"/{format}"))
    gate = torch.zeros((), requires_grad=True)
    with stack.whole() as model:
        for number, block in enumerate(stack.architecture.blocks):
            weights = weights_of(model, stack.architecture, block)
            for name, error in gated.rounding_errors(number, weights, format).items():

                def hook(
                    module: torch.nn.Linear, args: tuple[Tensor, ...], output: Tensor,
                    error: Tensor = error,
                ) -> Tensor:  # fmt: skip
                    x, rounded = args[0].detach(), module.weight + error
                    x = Inputs(format).rounded(x) if "_" in format else x
                    return output + gate * (x @ rounded.T - args[0].detach() @ module.weight.T)

                layer_of(model, block).get_submodule(name).register_forward_hook(hook)
        loss = (final_hidden(model, TOKENS) * upstream).sum()
    [expected] = torch.autograd.grad(loss, gate)
    assert found == pytest.approx(float(expected), rel=1e-3)
