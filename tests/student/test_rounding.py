"""Rounding by what weights read: laws of every format."""

import dataclasses
from pathlib import Path

import pytest
import torch
from quantized import with_formats
from torch import Tensor

from compress.core.errors import InputError
from compress.export.student import export_student, round_student
from compress.formats.fake import fake_quantize
from compress.formats.table import FORMATS, Format, Rounding
from compress.model.checkpoint import open_checkpoint
from compress.student.assemble import stack_in_formats
from compress.student.rounding import Inputs, round_group
from compress.sweep.placement import REFERENCE
from compress.sweep.stack import final_states, stack_at

QUANTIZED = [name for name in FORMATS if name != "bf16"]
WIDTH = 256


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: Tensor) -> Inputs:
    return Inputs(lambda: rows.T @ rows, len(rows))


def correlated(tokens: int = 512) -> Tensor:
    """Inputs of few directions and very different sizes, with some noise."""
    mixed = drawn(1, tokens, 40) @ drawn(2, 40, WIDTH) + 0.3 * drawn(3, tokens, WIDTH)
    return mixed * drawn(4, WIDTH).exp()


def error(weight: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Squared error of every output, over the rows."""
    return ((rows @ (weight - values).T).double() ** 2).sum(0)


@pytest.mark.parametrize("format", QUANTIZED)
def test_no_row_is_worse_than_to_nearest_and_the_whole_is_far_better(format: Format) -> None:
    weight, rows, fresh = drawn(0, 24, WIDTH), correlated(), correlated(2048)[512:]
    [near] = round_group([weight], format, [inputs(rows)], "nearest")
    assert torch.equal(near.values, fake_quantize([weight], format)[0])
    before, total = error(weight, near.values, rows), {}
    for rounding in ("scales", "second-order"):
        [found] = round_group([weight], format, [inputs(rows)], rounding)
        assert (error(weight, found.values, rows) <= before * (1 + 1e-5)).all()
        ratio = error(weight, found.values, fresh).sum() / error(weight, near.values, fresh).sum()
        total[rounding] = float(ratio)
    assert total["second-order"] < 0.8
    assert total["second-order"] < total["scales"] <= 1


@pytest.mark.parametrize("rounding", ["nearest", "scales", "second-order"])
@pytest.mark.parametrize("format", QUANTIZED)
def test_what_is_stored_unpacks_to_the_values(format: Format, rounding: Rounding) -> None:
    weights = [drawn(5, 8, WIDTH), 3 * drawn(6, 16, WIDTH)]
    read = inputs(correlated())
    for found, weight in zip(
        round_group(weights, format, [read, read], rounding), weights, strict=True
    ):
        unpacked = FORMATS[format].numerics.unpack(*found.stored)
        assert torch.equal(unpacked, found.values)
        assert found.values.shape == weight.shape


@pytest.mark.parametrize("format", QUANTIZED)
def test_what_is_on_the_grid_stays(format: Format) -> None:
    [weight] = fake_quantize([drawn(7, 8, WIDTH)], format)
    [found] = round_group([weight], format, [inputs(correlated())])
    assert torch.equal(found.values, weight)


@pytest.mark.parametrize("format", QUANTIZED)
def test_inputs_that_have_nothing_to_do_with_each_other_leave_scales_alone(format: Format) -> None:
    weight = drawn(8, 8, WIDTH)
    alone = Inputs(lambda: torch.diag(drawn(9, WIDTH).exp()), 1000)
    [scaled] = round_group([weight], format, [alone], "scales")
    [second] = round_group([weight], format, [alone], "second-order")
    assert torch.equal(scaled.values, second.values)


@pytest.mark.parametrize("tokens", [0, 9])
def test_weights_that_read_nothing_have_scales_of_least_error(tokens: int) -> None:
    weight, nothing = drawn(10, 8, WIDTH), inputs(torch.zeros(tokens, WIDTH))
    [found] = round_group([weight], "nvfp4", [nothing])
    [near] = round_group([weight], "nvfp4", [nothing], "nearest")
    assert (weight - found.values).norm() < (weight - near.values).norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_inputs_that_are_not_finite_are_one_line(format: Format, value: float) -> None:
    rows = correlated()
    rows[3, 5] = value
    with pytest.raises(InputError, match="what a layer reads is not finite on this text"):
        round_group([drawn(0, 8, WIDTH)], format, [inputs(rows)])


def test_scales_that_a_group_shares_are_of_all() -> None:
    small, large = drawn(11, 8, WIDTH), 50 * drawn(12, 8, WIDTH)
    other = [inputs(correlated()), inputs(drawn(13, 600, WIDTH))]
    found = round_group([small, large], "nvfp4", other)
    assert torch.equal(found[0].stored[2], found[1].stored[2])


@pytest.mark.parametrize("tiny", ["llama", "hybrid"], indirect=True)
def test_a_student_rounded_to_nearest_is_the_one_of_fake_formats(
    tiny: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny)
    architecture = with_formats(checkpoint.architecture, ["nvfp4", "fp8", "bf16"])
    rows = torch.randint(2, 97, (4, 32), generator=torch.Generator().manual_seed(0))
    round_student(tiny, tmp_path / "near", architecture, rows, "nearest")
    [found] = final_states(stack_at(tmp_path / "near"), [rows])
    [meant] = final_states(stack_in_formats(checkpoint, architecture, REFERENCE), [rows])
    assert torch.equal(found, meant)


@pytest.mark.parametrize("tiny", ["llama", "hybrid"], indirect=True)
def test_a_rounded_student_is_nearer_and_exported_to_the_bit(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    architecture = with_formats(checkpoint.architecture, ["nvfp4"])
    generator = torch.Generator().manual_seed(0)
    rows, fresh = (torch.randint(2, 97, (32, 32), generator=generator) for _ in range(2))
    plain = dataclasses.replace(architecture, blocks=checkpoint.architecture.blocks)
    [teacher] = final_states(stack_in_formats(checkpoint, plain, REFERENCE), [fresh])
    distance = {}
    for rounding in ("nearest", "scales", "second-order"):
        round_student(tiny, tmp_path / rounding, architecture, rows, rounding)
        [found] = final_states(stack_at(tmp_path / rounding), [fresh])
        distance[rounding] = float((found - teacher).norm())
    assert distance["second-order"] < distance["scales"] < distance["nearest"]
    facts = export_student(
        tmp_path / "second-order", tmp_path / "out", architecture, "compress", {}
    )
    assert facts["logit_difference"] == 0
