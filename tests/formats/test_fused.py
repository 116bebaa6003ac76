"""Weights that share a scale are quantized as one; shapes that a format refuses are named."""

import pytest
import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.formats.fake import fake_quantize, fake_quantize_block
from compress.formats.table import FORMATS, Format
from compress.student.rounding import Inputs, round_group

DTYPES = [torch.float32, torch.bfloat16]
QUANTIZED = [name for name in FORMATS if name != "bf16"]


def sample(scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, one of zeros, one of few values."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(32, 128, generator=generator)
    rows *= torch.randn(32, 1, generator=generator).mul(2).exp()
    rows[3] = 0
    rows[5, :16] *= 1e-4
    rows[7] = torch.arange(128) / 8
    return (rows * scale).to(dtype)


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
    assert FORMATS["bf16"].bytes(weight.shape) == weight.bfloat16().nbytes


@pytest.mark.parametrize("format", QUANTIZED)
def test_shapes_that_a_format_cannot_take_are_refused_in_one_line(format: Format) -> None:
    row = FORMATS[format]
    assert row.takes((5, 3 * row.group))
    if row.group == 1:
        return
    weight = torch.zeros(32, row.group + 8)
    assert not row.takes(weight.shape)
    line = rf"^a weight of shape \[32, {row.group + 8}\] cannot be {format}: .* {row.group}$"
    with pytest.raises(InputError, match=line):
        fake_quantize([weight], format)
    with pytest.raises(InputError, match=line):
        row.bytes(weight.shape)
    with pytest.raises(InputError, match=line):
        round_group([weight], format, [Inputs(lambda: torch.eye(row.group + 8), 1)])


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_block_quantizes_its_fused_groups_only(format: Format) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "norm": torch.randn(128, generator=generator),
        "q": torch.randn(16, 128, generator=generator),
        "k": 9 * torch.randn(8, 128, generator=generator),
        "o": torch.randn(32, 128, generator=generator),
    }
    groups, formats = (
        {"norm": None, "q": "qkv", "k": "qkv", "o": "o"},
        (("o", "bf16"), ("qkv", format)),
    )
    found = fake_quantize_block(tensors, groups, formats)
    assert list(found) == list(tensors)
    assert found["norm"] is tensors["norm"]
    q, k = fake_quantize([tensors["q"], tensors["k"]], format)
    assert torch.equal(found["q"], q)
    assert torch.equal(found["k"], k)
    alone = torch.equal(found["q"], fake_quantize([tensors["q"]], format)[0])
    assert alone != FORMATS[format].shared
    assert found["o"] is tensors["o"]
