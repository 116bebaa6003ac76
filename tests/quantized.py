"""Students in several formats, and the logits that they have to have."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_models import drawn
from torch import Tensor

from compress.formats.fake import fake_quantize_block
from compress.formats.table import Format, by_group
from compress.model.architecture import Architecture, Attention, Ffn, Mamba, Moe, to_json
from compress.model.build import build_model, student_config
from compress.model.checkpoint import open_checkpoint, write_checkpoint
from compress.model.families import (
    linear_groups,
    outside_groups,
    parameters,
    read_architecture,
    stored_parameters,
)


def with_formats(architecture: Architecture, formats: Sequence[Format]) -> Architecture:
    """The architecture with these formats on the linear groups of its blocks in turn."""
    turn = itertools.cycle(formats)
    groups = [linear_groups(block, architecture.family) for block in architecture.blocks]
    blocks = tuple(
        dataclasses.replace(block, formats=by_group({group: next(turn) for group in own}))
        for block, own in zip(architecture.blocks, groups, strict=True)
    )
    return dataclasses.replace(architecture, blocks=blocks)


def with_outside(architecture: Architecture, *formats: Format) -> Architecture:
    """The architecture with these formats on its embedding and its head, if it has one."""
    groups = outside_groups(architecture)
    made = by_group(dict(zip(groups, formats, strict=False)))
    return dataclasses.replace(architecture, outside_formats=made)


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
        for p in stored_parameters(student)
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
            fused = {name: p.slot.fused for name, p in own.items()}
            tensors = fake_quantize_block(tensors, fused, architecture.blocks[number].formats)
        found |= tensors
    logits: Tensor = build_model(checkpoint.config, architecture, found.items())(rows).logits
    return logits


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory as stored."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found
