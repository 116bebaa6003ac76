"""Quantization: ModelOpt's fake-quantized model is the model of fake-quantized weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import HYBRID, LLAMA, drawn
from torch import Tensor

from compress.export.quantize import quantize, token_rows
from compress.formats.fake import fake_quantize_block
from compress.formats.table import Format
from compress.model.architecture import Architecture, Attention, Ffn, Mamba, Moe, to_json
from compress.model.build import build_model, load_model, student_config
from compress.model.checkpoint import open_checkpoint, write_checkpoint
from compress.model.families import parameters, read_architecture

FORMATS: list[Sequence[Format]] = [["fp8"], ["nvfp4"], ["nvfp4", "fp8", "bf16"]]


def with_formats(architecture: Architecture, formats: Sequence[Format]) -> Architecture:
    """The architecture with these formats on its blocks in turn."""
    blocks = tuple(
        dataclasses.replace(block, format=formats[number % len(formats)])
        for number, block in enumerate(architecture.blocks)
    )
    return dataclasses.replace(architecture, blocks=blocks)


def uneven(config: dict[str, object]) -> Architecture:
    """A student whose blocks differ in every axis; of a llama, two halves of layers are gone."""
    teacher = read_architecture(config)
    blocks = []
    for number, block in enumerate(teacher.blocks):
        if isinstance(block, Ffn):
            block = dataclasses.replace(block, ffn=32 + 16 * number)
        elif isinstance(block, Attention):
            block = dataclasses.replace(block, kv_head=1 + number // 2 % 2)
        elif isinstance(block, Mamba):
            block = dataclasses.replace(block, head=2 + number // 2)
        elif isinstance(block, Moe):
            block = dataclasses.replace(block, expert=4, expert_ffn=16, shared_ffn=32)
        if teacher.family != "llama" or number not in (1, 2):
            blocks.append(block)
    return dataclasses.replace(teacher, blocks=tuple(blocks))


def write_student(directory: Path, config: dict[str, object], student: Architecture) -> Path:
    """A checkpoint of random weights."""
    generator = torch.Generator().manual_seed(5)
    tensors = (
        (p.name, drawn(p, generator).to(torch.float32 if p.slot.float32 else torch.bfloat16))
        for p in parameters(student)
    )
    write_checkpoint(directory, tensors, student_config(config, student), None, to_json(student))
    return directory


def fake_quantized_logits(path: Path, architecture: Architecture, rows: Tensor) -> Tensor:
    """Logits of a model that holds what ``fake_quantize_block`` makes of the checkpoint."""
    checkpoint = open_checkpoint(path)
    found: dict[str, Tensor] = {}
    listed = list(parameters(architecture))
    for number in [None, *range(len(architecture.blocks))]:
        own = {p.name: p for p in listed if p.block == number}
        tensors = {name: checkpoint[name].float() for name in own}
        if number is not None:
            slots = {name: p.slot for name, p in own.items()}
            tensors = fake_quantize_block(tensors, slots, architecture.blocks[number].format)
        found |= tensors
    logits: Tensor = build_model(checkpoint.config, architecture, found.items())(rows).logits
    return logits


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
