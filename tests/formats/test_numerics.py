"""Numerics: the reference is the published formula, bit for bit, and what ModelOpt packs."""

import math

import pytest
import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.formats import fp8, nvfp4
from compress.formats.fake import (
    fake_quantize,
    fake_quantize_block,
    group_amax,
    takes,
)
from compress.formats.table import Format
from compress.model.layout import Slot

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# Exponent bias 7, three bits of mantissa, subnormals below 2^-6; the last code is NaN.
E4M3 = sorted(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)
DTYPES = [torch.float32, torch.bfloat16]
SCALES = [1e-30, 1e-6, 0.02, 1.0, 1e4, 1e30]
QUANTIZED: list[Format] = ["fp8", "nvfp4"]


def single(value: float) -> float:
    """The nearest fp32 number."""
    return float(torch.tensor(value, dtype=torch.float32))


def nearest(value: float, grid: list[float]) -> float:
    """The nearest grid point, saturating; a tie goes to the even code."""
    size = min(abs(value), grid[-1])
    code = min(range(len(grid)), key=lambda c: (abs(grid[c] - size), c % 2))
    return math.copysign(grid[code], value)


def nvfp4_by_formula(rows: list[list[float]]) -> list[list[float]]:
    """The formula, a number at a time, every operation rounded to fp32."""
    amax = max(abs(x) for row in rows for x in row)
    s_tensor = single(amax / (6 * 448))
    found = []
    for row in rows:
        largest = single(max(map(abs, row)) / single(6 * s_tensor))
        s_block = max(nearest(largest, E4M3), 2.0**-9) if largest else 1.0
        step = single(s_block * s_tensor)
        found.append([single(nearest(single(x / step), E2M1) * step) for x in row])
    return found


def fp8_by_formula(values: list[float]) -> list[float]:
    s_tensor = single(max(map(abs, values)) / 448)
    return [single(nearest(single(x / s_tensor), E4M3) * s_tensor) for x in values]


def sample(scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, one of zeros, one of few values."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(32, 64, generator=generator)
    rows *= torch.randn(32, 1, generator=generator).mul(2).exp()
    rows[3] = 0
    rows[5, :16] *= 1e-4
    rows[7] = torch.arange(64) / 8
    return (rows * scale).to(dtype)


@pytest.mark.parametrize("scale", SCALES)
def test_nvfp4_is_the_published_formula(scale: float) -> None:
    weight = sample(scale)
    expected = nvfp4_by_formula(weight.view(-1, 16).tolist())
    (found,) = fake_quantize([weight], "nvfp4")
    assert torch.equal(found.view(-1, 16), torch.tensor(expected))


@pytest.mark.parametrize("scale", SCALES)
def test_fp8_is_the_published_formula(scale: float) -> None:
    weight = sample(scale)
    (found,) = fake_quantize([weight], "fp8")
    assert torch.equal(found.view(-1), torch.tensor(fp8_by_formula(weight.view(-1).tolist())))


def test_e2m1_rounds_to_nearest_with_ties_to_even() -> None:
    values = torch.linspace(-7, 7, 4 * 7 * 16 + 1)
    expected = [nearest(value, E2M1) for value in values.tolist()]
    assert torch.equal(nvfp4.round_e2m1_(values.clone()), torch.tensor(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_codes_and_scales_are_those_of_modelopt(scale: float, dtype: torch.dtype) -> None:
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    weight = sample(scale, dtype)
    theirs, block, tensor = NVFP4QTensor.quantize(weight.clone(), 16)
    ours = nvfp4.pack(weight, group_amax([weight]))
    assert torch.equal(ours[0], theirs._quantized_data)
    assert torch.equal(ours[1].view(torch.uint8), block.view(torch.uint8))
    assert torch.equal(ours[2], tensor)
    theirs8, scale8 = FP8QTensor.quantize(weight.float())
    codes, found = fp8.pack(weight, group_amax([weight]))
    assert torch.equal(codes.view(torch.uint8), theirs8._quantized_data.view(torch.uint8))
    assert torch.equal(found, scale8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_unpacking_what_was_packed_is_fake_quantization(scale: float, dtype: torch.dtype) -> None:
    weight = sample(scale, dtype)
    amax = group_amax([weight])
    assert torch.equal(nvfp4.unpack(*nvfp4.pack(weight, amax)).to(dtype), nvfp4.fake(weight, amax))
    assert torch.equal(fp8.unpack(*fp8.pack(weight, amax)).to(dtype), fp8.fake(weight, amax))


@pytest.mark.parametrize("exponent", [-20, 0, 20])
def test_grid_points_are_fixed_points(exponent: int) -> None:
    half = torch.tensor(E2M1 + [-value for value in E2M1])
    # Block scales 448, 32 and 1, all exact in E4M3, under a tensor scale that is a power of two.
    weight = torch.stack([half * 448, half * 32, half]) * 2.0**exponent
    assert torch.equal(fake_quantize([weight], "nvfp4")[0], weight)
    grid = torch.tensor(E4M3 + [-value for value in E4M3]) * 2.0**exponent
    assert torch.equal(fake_quantize([grid], "fp8")[0], grid)


@pytest.mark.parametrize("format", QUANTIZED)
def test_quantizing_twice_is_quantizing_once(format: Format) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    (once,) = fake_quantize([weight], format)
    amax = group_amax([weight])
    fake = fp8.fake if format == "fp8" else nvfp4.fake
    assert torch.equal(fake(once, amax), once)


@pytest.mark.parametrize("format", QUANTIZED)
def test_the_error_is_at_most_half_a_step(format: Format) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    (found,) = fake_quantize([weight], format)
    error = (found - weight).abs()
    if format == "fp8":
        # Three bits of mantissa: half a step is 1/16 of the power of two below, a denormal more.
        bound = weight.abs() / 16 + weight.abs().max() / 448 * 2**-10
    else:
        # The largest step of E2M1 is a third of the block's largest value; the scale rounds too.
        bound = weight.view(-1, 16).abs().amax(1, keepdim=True).expand(-1, 16) / 5
        bound = bound.reshape(weight.shape)
    assert bool((error <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", QUANTIZED)
def test_zeros_stay_zeros(format: Format, dtype: torch.dtype) -> None:
    zeros = torch.zeros(4, 32, dtype=dtype)
    (found,) = fake_quantize([zeros], format)
    assert torch.equal(found, zeros)
    assert float(nvfp4.tensor_scale(group_amax([zeros]))) == 1
    assert nvfp4.pack(zeros, group_amax([zeros]))[1].float().unique().tolist() == [1]


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("value", [3e38, 1e-38, 1e-42, 1e-45])
def test_the_ends_of_fp32_stay_finite(format: Format, value: float) -> None:
    weight = torch.full((2, 32), value)
    (found,) = fake_quantize([weight], format)
    assert bool(torch.isfinite(found).all())
    assert bool((found <= value * 1.01).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", QUANTIZED)
def test_a_fused_group_is_one_tensor_in_parts(format: Format, dtype: torch.dtype) -> None:
    weight = sample(1.0, dtype)
    parts = fake_quantize(list(weight.split([8, 4, 20])), format)
    assert torch.equal(torch.cat(parts), fake_quantize([weight], format)[0])
    assert all(part.dtype == dtype for part in parts)


def test_bf16_changes_nothing() -> None:
    weight = sample(1.0)
    assert fake_quantize([weight], "bf16")[0] is weight


def test_nvfp4_needs_input_widths_of_whole_blocks() -> None:
    assert takes((5, 32), "nvfp4")
    assert takes((5, 24), "fp8")
    assert not takes((32, 24), "nvfp4")
    with pytest.raises(InputError, match=r"\[32, 24\].*nvfp4.*16"):
        fake_quantize([torch.zeros(32, 24)], "nvfp4")


def test_a_block_quantizes_its_fused_groups_only() -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "norm": torch.randn(32, generator=generator),
        "q": torch.randn(16, 32, generator=generator),
        "k": 9 * torch.randn(8, 32, generator=generator),
        "o": torch.randn(32, 16, generator=generator),
    }
    slots = {
        "norm": Slot(shape="hidden"),
        "q": Slot(shape="a hidden", fused="qkv"),
        "k": Slot(shape="b hidden", fused="qkv"),
        "o": Slot(shape="hidden a", fused="o"),
    }
    found = fake_quantize_block(tensors, slots, "fp8")
    assert list(found) == list(tensors)
    assert found["norm"] is tensors["norm"]
    q, k = fake_quantize([tensors["q"], tensors["k"]], "fp8")
    assert torch.equal(found["q"], q)
    assert torch.equal(found["k"], k)
    assert not torch.equal(found["q"], fake_quantize([tensors["q"]], "fp8")[0])
    assert torch.equal(found["o"], fake_quantize([tensors["o"]], "fp8")[0])
