"""Numerics: the reference is the published formula, bit for bit, and what ModelOpt packs."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from compress.formats import fp8, nvfp4
from compress.formats.blocks import round_e2m1_
from compress.formats.fake import fake_quantize, group_amax, shared
from compress.formats.packed import stored_names
from compress.formats.table import FORMATS, INPUT_SCALE, Format

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# Exponent bias 7, three bits of mantissa, subnormals below 2^-6; the last code is NaN.
E4M3 = sorted(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)
DTYPES = [torch.float32, torch.bfloat16]
SCALES = [1e-30, 1e-6, 0.02, 1.0, 1e4, 1e30]
QUANTIZED = [name for name in FORMATS if name != "bf16"]


def single(value: float) -> float:
    """The nearest fp32 number."""
    return float(torch.tensor(value, dtype=torch.float32))


def nearest(value: float, grid: list[float]) -> float:
    """The nearest grid point, saturating; a tie goes to the even code."""
    size = min(abs(value), grid[-1])
    code = min(range(len(grid)), key=lambda c: (abs(grid[c] - size), c % 2))
    return math.copysign(grid[code], value)


def nvfp4_by_formula(values: list[float]) -> list[float]:
    """The formula, a number at a time, every operation rounded to fp32."""
    rows = in_groups(values, 16)
    amax = max(abs(x) for row in rows for x in row)
    s_tensor = single(1 / single(1 / single(amax / (6 * 448))))
    found = []
    for row in rows:
        largest = single(max(map(abs, row)) / single(6 * s_tensor))
        s_block = max(nearest(largest, E4M3), 2.0**-6) if largest else 1.0
        step = single(s_block * s_tensor)
        found += [single(nearest(single(x / step), E2M1) * step) for x in row]
    return found


def mxfp4_by_formula(values: list[float]) -> list[float]:
    found = []
    for row in in_groups(values, 32):
        largest = max(map(abs, row))
        step = 2.0 ** max(math.frexp(largest)[1] - 1 - 2, -127) if largest else 1.0
        found += [nearest(x / step, E2M1) * step for x in row]
    return found


def int4_by_formula(values: list[float]) -> list[float]:
    found = []
    for row in in_groups(values, 128):
        largest = single(max(map(abs, row)) / 7)
        step = float(torch.tensor(largest).bfloat16()) if any(row) else 1.0
        found += [min(max(round(single(x / step)), -8), 7) * step for x in row]
    return found


def fp16_scale(value: float) -> float:
    """The nearest FP16 number, within those that scales may have."""
    size = min(max(abs(value), 2.0**-24), 65504.0)
    return math.copysign(float(torch.tensor(size).half()), value)


def q8_0_by_formula(values: list[float]) -> list[float]:
    found = []
    for row in in_groups(values, 32):
        step = fp16_scale(single(max(map(abs, row)) / 127)) if any(row) else 1.0
        found += [min(max(round(single(x / step)), -127), 127) * step for x in row]
    return found


def q4_0_by_formula(values: list[float]) -> list[float]:
    found = []
    for row in in_groups(values, 32):
        extreme = max(row, key=lambda x: (abs(x), x))
        step = fp16_scale(single(extreme / -8)) if extreme else 1.0
        found += [min(max(round(single(x / step)), -8), 7) * step for x in row]
    return found


def in_groups(values: list[float], size: int) -> list[list[float]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def fp8_by_formula(values: list[float]) -> list[float]:
    exact = torch.tensor(single(max(map(abs, values)) / 448)).double()
    # The numbers of BF16 have 8 significant bits.
    unit = 2.0 ** (math.frexp(float(exact))[1] - 8)
    s_tensor = math.ceil(float(exact) / unit) * unit
    return [single(nearest(single(x / s_tensor), E4M3) * s_tensor) for x in values]


def sample(scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, one of zeros, one of few values."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(32, 128, generator=generator)
    rows *= torch.randn(32, 1, generator=generator).mul(2).exp()
    rows[3] = 0
    rows[5, :16] *= 1e-4
    rows[7] = torch.arange(128) / 8
    return (rows * scale).to(dtype)


FORMULAS = {
    "fp8": fp8_by_formula,
    "nvfp4": nvfp4_by_formula,
    "mxfp4": mxfp4_by_formula,
    "int4": int4_by_formula,
    "q8_0": q8_0_by_formula,
    "q4_0": q4_0_by_formula,
    "fp8_a8": fp8_by_formula,
    "nvfp4_a4": nvfp4_by_formula,
}


def pack(weight: Tensor, format: Format) -> tuple[Tensor, ...]:
    """What is stored of a weight that is a fused group of its own, input scale aside."""
    found: tuple[Tensor, ...] = FORMATS[format].numerics.pack(weight, *shared([weight], format))
    return found


def test_every_row_of_the_table_has_a_formula() -> None:
    assert list(FORMULAS) == QUANTIZED
    assert get_args(Format) == tuple(FORMATS)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("scale", SCALES)
def test_a_format_is_its_published_formula(format: Format, scale: float) -> None:
    weight = sample(scale)
    (found,) = fake_quantize([weight], format)
    assert torch.equal(found.view(-1), torch.tensor(FORMULAS[format](weight.view(-1).tolist())))


def test_e2m1_rounds_to_nearest_with_ties_to_even() -> None:
    values = torch.linspace(-7, 7, 4 * 7 * 16 + 1)
    expected = [nearest(value, E2M1) for value in values.tolist()]
    assert torch.equal(round_e2m1_(values.clone()), torch.tensor(expected))


@pytest.mark.parametrize(
    ("format", "values", "expected"),
    [
        ("fp8", [448, 1.0625, 1.1875, -1.0625], [448, 1, 1.25, -1]),
        ("nvfp4", [6 * 448, 448 * 0.25, 448 * 2.5, 448 * -5], [6 * 448, 0, 448 * 2, 448 * -4]),
        ("mxfp4", [6, 0.25, 2.5, -5], [6, 0, 2, -4]),
        ("int4", [7, 0.5, 1.5, -2.5], [7, 0, 2, -2]),
        ("q8_0", [127, 0.5, 1.5, -2.5], [127, 0, 2, -2]),
        ("q4_0", [-8, 0.5, 1.5, -2.5], [-8, 0, 2, -2]),
    ],
)
def test_ties_go_to_the_even_code(
    format: Format, values: list[float], expected: list[float]
) -> None:
    weight = torch.zeros(1, 128)
    weight[0, :4] = torch.tensor(values)
    (found,) = fake_quantize([weight], format)
    assert found[0, :4].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_codes_and_scales_are_those_of_modelopt(scale: float, dtype: torch.dtype) -> None:
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    weight = sample(scale, dtype)
    # At the tensor scales that readers do not change, which are theirs to the last bits.
    ours = nvfp4.pack(weight, group_amax([weight]))
    theirs, block, tensor = NVFP4QTensor.quantize(weight.clone(), 16, None, ours[2])
    torch.testing.assert_close(group_amax([weight]) / (6 * 448), tensor, atol=0, rtol=2**-22)
    normal = block.float() >= 2**-6
    assert not bool(normal.all())
    assert torch.equal(ours[1].float(), block.float().clamp(min=2**-6))
    same = normal.repeat_interleave(8, dim=-1)
    assert torch.equal(ours[0][same], theirs._quantized_data[same])
    codes, found = fp8.pack(weight, group_amax([weight]))
    theirs8, _ = FP8QTensor.quantize(weight.float(), found)
    assert torch.equal(codes.view(torch.uint8), theirs8._quantized_data.view(torch.uint8))
    assert 0 <= float(found / (group_amax([weight]) / 448)) - 1 < 2**-7


@pytest.mark.parametrize("scale", SCALES)
def test_scales_are_those_that_servers_compute_with(scale: float) -> None:
    amax = torch.rand(1000, generator=torch.Generator().manual_seed(3)) * scale
    # Marlin reads FP8 scales in BF16, compressed-tensors stores the reciprocal of NVFP4's.
    found = torch.stack([fp8.tensor_scale(one) for one in amax])
    assert torch.equal(found, found.bfloat16().float())
    found = torch.stack([nvfp4.tensor_scale(one) for one in amax])
    assert torch.equal(1 / (1 / found), found)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_unpacking_what_was_packed_is_fake_quantization(
    scale: float, dtype: torch.dtype, format: Format
) -> None:
    weight = sample(scale, dtype)
    values = FORMATS[format].numerics.unpack(*pack(weight, format))
    assert torch.equal(values.to(dtype), fake_quantize([weight], format)[0])


@pytest.mark.parametrize("format", QUANTIZED)
def test_stored_tensors_have_the_bytes_and_types_of_their_row(format: Format) -> None:
    weight, row = sample(1.0), FORMATS[format]
    listed = pack(weight, format)
    if INPUT_SCALE in row.suffixes:
        listed = (*listed, row.numerics.tensor_scale(weight.max()))
    stored = dict(zip(stored_names("q.weight", format), listed, strict=True))
    held = sum(tensor.nbytes for tensor in stored.values())
    assert held + row.shape_bytes == row.bytes(weight.shape)
    codes, *scales = stored.values()
    assert codes.dtype == getattr(torch, row.codes)
    for scale, tensor in zip(row.scales, scales, strict=True):
        assert tensor.dtype == getattr(torch, scale.dtype)
        assert tensor.element_size() == scale.bytes
        assert list(tensor.shape) == ([32, 128 // row.group] if scale.per_group else [])


@pytest.mark.parametrize("exponent", [-20, 0, 10])
def test_grid_points_are_fixed_points(exponent: int) -> None:
    half = torch.tensor(E2M1 + [-value for value in E2M1])
    # Block scales 448, 32 and 1, all exact in E4M3, under a tensor scale that is a power of two.
    weight = torch.stack([half * 448, half * 32, half]) * 2.0**exponent
    assert torch.equal(fake_quantize([weight], "nvfp4")[0], weight)
    both = torch.stack([half.repeat(2), half.repeat(2) / 8]) * 2.0**exponent
    assert torch.equal(fake_quantize([both], "mxfp4")[0], both)
    grid = torch.tensor(E4M3 + [-value for value in E4M3]) * 2.0**exponent
    assert torch.equal(fake_quantize([grid], "fp8")[0], grid)
    whole = (torch.arange(128) % 15 - 7) * 2.0**exponent
    assert torch.equal(fake_quantize([whole], "int4")[0], whole)


@pytest.mark.parametrize("format", QUANTIZED)
def test_quantizing_twice_is_quantizing_once(format: Format) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    common = shared([weight], format)
    fake = FORMATS[format].numerics.fake
    once = fake(weight, *common)
    assert torch.equal(fake(once, *common), once)


@pytest.mark.parametrize("format", QUANTIZED)
def test_the_error_is_at_most_half_a_step(format: Format) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    (found,) = fake_quantize([weight], format)
    group = FORMATS[format].group
    largest = weight.view(-1, group).abs().amax(1, keepdim=True).expand(-1, group)
    bound = {
        # Three bits of mantissa: half a step is 1/16 of the power of two below, a denormal more.
        "fp8": weight.abs() / 16 + weight.abs().max() / 448 * 2**-10,
        # The largest step of E2M1 is a third of the block's largest value; the scale rounds too.
        "nvfp4": (largest / 5).reshape(weight.shape),
        # The largest value is 4 to 8 times the scale, and what is above 6 becomes 6.
        "mxfp4": (largest / 4).reshape(weight.shape),
        # Half of a step that is a seventh of the largest value, which BF16 rounds; saturated.
        "int4": (largest / 14 * (1 + 2**-4)).reshape(weight.shape),
        "q8_0": (largest / 254 * (1 + 2**-7)).reshape(weight.shape),
        # A whole step where the code 8 is missing.
        "q4_0": (largest / 8 * (1 + 2**-10)).reshape(weight.shape),
    }[FORMATS[format].weights or format]
    assert bool(((found - weight).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", QUANTIZED)
def test_zeros_stay_zeros_and_their_scales_are_one(format: Format, dtype: torch.dtype) -> None:
    zeros = torch.zeros(4, 128, dtype=dtype)
    (found,) = fake_quantize([zeros], format)
    assert torch.equal(found, zeros)
    codes, *scales = pack(zeros, format)
    assert not bool(codes.float().any())
    one = 127 if format == "mxfp4" else 1  # E8M0 has its exponent's bias only
    assert all(scale.float().unique().tolist() == [one] for scale in scales)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("value", [3e38, 1e-38, 1e-42, 1e-45])
def test_the_ends_of_fp32_stay_finite(format: Format, value: float) -> None:
    weight = torch.full((2, 128), value)
    (found,) = fake_quantize([weight], format)
    assert bool(torch.isfinite(found).all())
    assert bool((found <= value * 1.01).all())
