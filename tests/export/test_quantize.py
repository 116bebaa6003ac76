"""Quantization: ModelOpt's fake-quantized model is the model of fake-quantized weights."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from quantized import fake_quantized_logits, uneven, with_formats, write_student
from tiny_models import HYBRID, LLAMA

from compress.export.quantize import quantize, token_rows
from compress.formats.table import Format
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint

FORMATS: list[Sequence[Format]] = [["fp8"], ["nvfp4"], ["nvfp4", "fp8", "bf16"]]


@pytest.mark.parametrize("formats", FORMATS)
def test_quantized_logits_are_those_of_fake_quantized_weights(
    tiny: Path, formats: Sequence[Format]
) -> None:
    architecture = with_formats(open_checkpoint(tiny).architecture, formats)
    rows = token_rows(architecture, seed=1)
    plain = load_model(tiny)(rows).logits
    found = quantize(load_model(tiny), architecture)(rows).logits
    assert torch.equal(found, fake_quantized_logits(tiny, architecture, rows))
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("config", [LLAMA, HYBRID], ids=["llama", "hybrid"])
def test_blocks_of_different_sizes_quantize(tmp_path: Path, config: dict[str, object]) -> None:
    architecture = with_formats(uneven(config), ["nvfp4", "fp8", "nvfp4"])
    path = write_student(tmp_path / "student", config, architecture)
    rows = token_rows(architecture, seed=1)
    found = quantize(load_model(path), architecture)(rows).logits
    assert torch.equal(found, fake_quantized_logits(path, architecture, rows))


def test_bf16_blocks_are_not_touched(tiny: Path) -> None:
    architecture = open_checkpoint(tiny).architecture
    rows = token_rows(architecture, seed=1)
    assert torch.equal(
        quantize(load_model(tiny), architecture)(rows).logits, load_model(tiny)(rows).logits
    )


def test_the_calibration_text_does_not_change_the_model(tiny: Path) -> None:
    architecture = with_formats(open_checkpoint(tiny).architecture, ["nvfp4", "fp8"])
    rows = token_rows(architecture, seed=1)
    default, own = (
        quantize(load_model(tiny), architecture, calibration)(rows).logits
        for calibration in (None, token_rows(architecture, seed=7))
    )
    assert torch.equal(default, own)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_weights_of_zeros_quantize_to_zeros(tiny: Path, format: Format) -> None:
    architecture = with_formats(open_checkpoint(tiny).architecture, [format])
    rows = token_rows(architecture, seed=1)
    silent, quantized = load_model(tiny), load_model(tiny)
    for model in (silent, quantized):
        for name, weight in model.named_parameters():
            if "down_proj" in name or "o_proj" in name:
                weight.zero_()
    quantized = quantize(quantized, architecture)
    weights = {name: w for name, w in quantized.named_parameters() if "down_proj" in name}
    assert all(not bool(weight.any()) for weight in weights.values())
    assert bool(torch.isfinite(quantized(rows).logits).all())
