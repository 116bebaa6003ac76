"""Models and students of them for a device without values (``fake_device``)."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from tiny_models import HYBRID, LLAMA
from torch import Tensor

from compress.formats.table import Format, GroupFormats, KvFormat, by_group
from compress.model.architecture import Architecture
from compress.model.families import linear_groups, outside_groups, parameters, read_architecture
from compress.model.layout import Parameter
from compress.student.candidate import Candidate, student_architecture
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack

# "linear_attention", "full_attention", "mlp": all kinds but the routed experts.
KINDS = ["linear_attention", "full_attention", "mlp", "linear_attention"]
CONFIGS = {"llama": LLAMA, "nemotron_h": HYBRID | {"layers_block_type": KINDS}}
NAME = "gpu"
SHAPE = (2, 16)
# Real indices, on the CPU, as candidates have them.
KEPT = {
    "llama": {
        "blocks": torch.arange(6), "hidden": torch.arange(48), "layers.0.ffn/ffn": torch.arange(64),
        "layers.1.attention/kv_head": torch.arange(1),
        "layers.2.attention/query": torch.zeros(2, 1, dtype=torch.long),
    },
    "nemotron_h": {
        "blocks": torch.arange(4), "hidden": torch.arange(48), "layers.2.ffn/ffn": torch.arange(64),
        "layers.0.mamba/head": torch.arange(3).expand(2, -1).contiguous(),
        "layers.3.mamba/channel": torch.arange(8),
    },
}  # fmt: skip


class Faked(Stack):
    """A stack whose embedding asks for no values of ids."""

    def embed(self, ids_BT: Tensor, table: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D]."""
        shape = (*ids_BT.shape, self.architecture.hidden)
        return torch.zeros(shape, device=self.placement.device, dtype=self.placement.dtype)


class FakedCheckpoint:
    """Tensors of a model on the CPU, as surgery reads them."""

    def __init__(self, family: str) -> None:
        self.config: Any = CONFIGS[family]
        self.architecture = read_architecture(self.config)
        # Made here: the thread that reads ahead is not in the mode.
        self.tensors = {
            each.name: torch.empty(
                each.shape, dtype=torch.float32 if each.slot.float32 else torch.bfloat16
            )
            for each in parameters(self.architecture)
        }

    def __getitem__(self, name: str) -> Tensor:
        """A tensor."""
        return self.tensors[name]


def stack_of(family: str, dtype: torch.dtype, memory: int | None = 0) -> Faked:
    """A stack on the device, streamed, of tensors as a checkpoint has them: on the CPU."""
    teacher = FakedCheckpoint(family)

    def read(parameter: Parameter) -> Tensor:
        return teacher[parameter.name]

    place = Placement(torch.device(NAME), dtype, memory=memory)
    return Faked(teacher.config, teacher.architecture, read, place)


def in_formats(architecture: Architecture, number: int, *formats: Format) -> GroupFormats:
    """A block's linear groups, in turn in these formats."""
    groups = linear_groups(architecture.blocks[number], architecture.family)
    return by_group(dict(zip(groups, itertools.cycle(formats), strict=False)))


def outside_formats(architecture: Architecture) -> GroupFormats:
    """Embedding and head in a format."""
    return by_group(dict.fromkeys(outside_groups(architecture), "nvfp4"))


def candidate_of(architecture: Architecture) -> Candidate:
    """A student that lacks something along every axis, in several formats within blocks too."""
    keep = KEPT[architecture.family]
    formats = {
        1: in_formats(architecture, 1, "nvfp4", "fp8"),
        2: in_formats(architecture, 2, "fp8", "bf16"),
    }
    everywhere: dict[int, KvFormat] = dict.fromkeys(architecture.kv_formats, "fp8")
    student = student_architecture(architecture, keep, formats, everywhere)
    student = replace(student, outside_formats=outside_formats(architecture))
    return Candidate(id="x", kind="joint", architecture=student, keep=keep)


def masks_of(architecture: Architecture) -> dict[str, Tensor]:
    """What it keeps that masks can say here: those of Mamba count their units, on the CPU."""
    return {key: kept for key, kept in KEPT[architecture.family].items() if "mamba" not in key}


def rows() -> Tensor:
    """Token ids on the CPU."""
    return torch.zeros(SHAPE, dtype=torch.long)


def states(stack: Stack) -> Tensor:
    """Hidden states."""
    return stack.embed(rows())
