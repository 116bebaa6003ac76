"""On a GPU: fp32 is the CPU's, BF16 is near it, codes are the same, and plans hold."""

from pathlib import Path

import pytest
import torch
from quantized import with_formats

from compress.formats.fake import shared
from compress.formats.table import FORMATS, Format
from compress.measure.kl import mean_kl, reference
from compress.memory.machine import Machine
from compress.model.checkpoint import open_checkpoint
from compress.run.recipe import check
from compress.run.work import works_of
from compress.scores.contributions import contributions
from compress.scores.replay import removal_costs
from compress.student.assemble import stack_in_formats
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import Stack, stack_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = torch.arange(1, 129).view(4, 32) % 120
CUDA = torch.device("cuda")


def test_contributions_and_removals_are_those_of_the_cpu(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    plain, there = (stack_of(checkpoint, place) for place in (REFERENCE, Placement(CUDA)))
    meant, found = (contributions(stack, ROWS, 2, ["fp8", "nvfp4"]) for stack in (plain, there))
    for key, rows in meant.items():
        assert found[key].is_cpu
        assert (found[key] - rows).norm() <= 1e-4 * rows.norm(), key
    assert removal_costs(there, ROWS) == pytest.approx(removal_costs(plain, ROWS), rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "absolute", "relative"), [(torch.float32, 0, 1e-4), (torch.bfloat16, 0.002, 0.01)]
)
def test_a_measured_kl_is_that_of_the_cpu(
    tiny: Path, dtype: torch.dtype, absolute: float, relative: float
) -> None:
    checkpoint, found = open_checkpoint(tiny), []
    rounded = with_formats(checkpoint.architecture, ["fp8", "nvfp4"])
    for place in (REFERENCE, Placement(CUDA, dtype)):
        text = reference(checkpoint, stack_of(checkpoint, place), ROWS)
        found.append(mean_kl(stack_in_formats(checkpoint, rounded, place), text))
    meant, there = found
    assert abs(there - meant) <= max(absolute, relative * meant)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "bf16"])
def test_codes_and_scales_are_those_of_the_cpu(format: Format) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    places = weight, weight.to(CUDA)
    meant, found = (FORMATS[format].numerics.pack(each, *shared([each], format)) for each in places)
    for one, other in zip(meant, found, strict=True):
        assert torch.equal(one.view(-1).view(torch.uint8), other.cpu().view(-1).view(torch.uint8))


def test_scoring_takes_no_more_memory_than_planned(tiny: Path) -> None:
    stack = stack_of(open_checkpoint(tiny), Placement(CUDA, torch.bfloat16))
    recipe = check({"score_tokens": 128, "score_length": 32, "draws": 2}, "test")
    machine = Machine(
        name="gpu", memory=2**40, flops=1, number_bytes=2, accelerator=True,
    )  # fmt: skip
    score = works_of(stack.architecture, recipe, machine)[0]
    contributions(stack, ROWS, 2, ["fp8", "nvfp4"])  # libraries take their own once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - stack_bytes(stack)
    contributions(stack, ROWS, 2, ["fp8", "nvfp4"])
    assert torch.cuda.max_memory_allocated() - before <= score.takes(machine)


def stack_bytes(stack: Stack) -> int:
    """Bytes of a stack's weights that are on the device."""
    return sum(each.nbytes for each in stack.model.parameters() if each.is_cuda)
