"""Contributions are gradients of drawn labels, whatever the batches, the memory and the device."""

from pathlib import Path

import torch
from torch import Tensor, nn

from compress.model.checkpoint import open_checkpoint
from compress.scores.contributions import contributions
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import stack_of

LENGTH = 16
TOKENS = torch.randint(0, 128, (10, LENGTH), generator=torch.Generator().manual_seed(7))
FORMATS = ["fp8", "nvfp4"]


def rows_of(path: Path, place: Placement = REFERENCE, tokens: Tensor = TOKENS, batch: int = 4):
    return contributions(stack_of(open_checkpoint(path), place), tokens, 2, FORMATS, batch=batch)


def hooks(model: nn.Module) -> int:
    """Hooks and replaced forwards that a model has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    found = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return found + sum("forward" in vars(m) for m in model.modules())


def test_streamed_equals_resident_bit_for_bit(tiny: Path) -> None:
    resident, streamed = rows_of(tiny), rows_of(tiny, Placement(memory=0))
    assert resident.keys() == streamed.keys()
    for key, rows in resident.items():
        assert torch.equal(rows, streamed[key]), key


def test_batches_and_their_order_do_not_matter(tiny: Path) -> None:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    first = rows_of(tiny, tokens=TOKENS[:6], batch=6)
    second = rows_of(tiny, tokens=TOKENS[:6][order], batch=4)
    for key, rows in first.items():
        squares = rows.square().mean(0)
        torch.testing.assert_close(second[key].square().mean(0), squares, rtol=1e-3, atol=1e-5)
