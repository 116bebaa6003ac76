"""Students of any family: without blocks, cut along every axis, or with blocks that differ."""

from collections.abc import Iterator
from typing import Any

import torch
from cuts import Keep, candidate, some

from compress.model.architecture import (
    Architecture,
    block_name,
    cached,
    sizes,
)
from compress.model.build import build_model, student_config
from compress.model.checkpoint import Checkpoint
from compress.model.families import (
    family_of,
)
from compress.student.surgery import student_tensors
from compress.student.units import AXES, number_of


def student_model(teacher: Checkpoint, keep: Keep) -> Any:
    student = candidate(teacher.architecture, keep)
    config = student_config(teacher.config, student.architecture)
    return build_model(config, student.architecture, student_tensors(teacher, student))


def cuts_of(architecture: Architecture) -> Iterator[Keep]:
    """A cut of every axis of every kind of block, and of blocks and layers."""
    if not family_of(architecture.family).whole_hidden:
        yield {"hidden": some(48, of=architecture.hidden)}
    kinds = {block.kind: block for block in reversed(architecture.blocks)}
    for kind, block in kinds.items():
        for axis, rule in AXES[kind].items():
            if axis not in sizes(block):
                continue
            size = sizes(block)[axis]
            if rule.within:
                index = some(sizes(block)[rule.within], (size + 1) // 2, of=size)
            else:
                # Of every routing group as many.
                groups, least = (number_of(block, n) for n in (rule.multiple, rule.least))
                most = size // groups
                rows = some(groups, max(most // 2, least // groups), of=most)
                index = (rows + most * torch.arange(groups)[:, None]).flatten()
            yield {f"layers.{block.layer}.{kind}/{axis}": index}
        yield without(architecture, architecture.blocks.index(block))
    gone = architecture.blocks[0].layer
    yield without(architecture, *(n for n, b in enumerate(architecture.blocks) if b.layer == gone))


def without(architecture: Architecture, *numbers: int) -> Keep:
    kept = [number for number in range(len(architecture.blocks)) if number not in numbers]
    return {"blocks": torch.tensor(kept)}


def uneven(architecture: Architecture) -> Keep:
    """A student whose blocks differ, without its first attention and one whole layer."""
    first, *others = (n for n, block in enumerate(architecture.blocks) if cached(block))
    gone = architecture.blocks[-1].layer
    last = [n for n, block in enumerate(architecture.blocks) if block.layer == gone]
    keep = without(architecture, *last, *([first] if others else []))
    kinds = {b.kind: b for b in reversed(architecture.blocks) if b.layer != gone}
    for kind, axis in (("ffn", "ffn"), ("moe", "expert_ffn"), ("mamba", "channel")):
        if block := kinds.get(kind):
            size = sizes(block)[axis]
            outer = (sizes(block)["expert"],) if kind == "moe" else ()
            keep[f"{block_name(block)}/{axis}"] = some(*outer, size // 2, of=size)
    return keep
