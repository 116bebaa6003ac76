"""Cuts of every kind of output projection, and tiny teachers with the Gram matrices of a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import EVERY, TINY, write_tiny
from torch import Tensor

from compress.model.architecture import Block, block_name
from compress.model.build import build_model, load_model, student_config
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.families import family_of
from compress.student.candidate import Candidate, expert_keep, student_architecture
from compress.student.grams import HALVES, Grams, Half, save_grams
from compress.student.repair import kept_columns
from compress.student.surgery import (
    student_tensors,
)
from compress.student.units import Projection, projections
from compress.sweep.stack import stack_of

TEACHERS = TINY | {"latent": EVERY["nemotron_h_latent"], "gemma": EVERY["gemma3"]}
TOKENS = torch.randint(0, 128, (16, 48), generator=torch.Generator().manual_seed(7))
SAME: dict[Half, Tensor] = dict.fromkeys(HALVES, TOKENS)
OTHER = torch.randint(0, 128, (16, 48), generator=torch.Generator().manual_seed(8))
# A cut of every kind of output projection: tiny model, block, kept indices by axis.
CUTS: dict[str, tuple[str, int, dict[str, Tensor]]] = {
    "llama attention": ("llama", 2, {"query": torch.tensor([[0], [1]])}),
    "llama ffn": ("llama", 3, {"ffn": torch.arange(0, 96, 2)}),
    "gemma attention": ("gemma", 2, {"query": torch.tensor([[0], [1]])}),
    "gemma ffn": ("gemma", 3, {"ffn": torch.arange(0, 96, 2)}),
    "hybrid attention": ("hybrid", 2, {"kv_head": torch.tensor([1])}),
    "hybrid ffn": ("hybrid", 3, {"ffn": torch.arange(0, 96, 2)}),
    "mamba heads": ("hybrid", 0, {"head": torch.tensor([[0, 2], [1, 3]])}),
    "mamba channels": ("hybrid", 4, {"channel": torch.arange(0, 16, 2)}),
    "experts": ("hybrid", 1, {"expert_ffn": torch.arange(0, 32, 2).expand(6, -1)}),
    "latent experts": ("latent", 1, {"expert_ffn": torch.arange(0, 32, 2).expand(6, -1)}),
    "latent width": ("latent", 1, {"latent": torch.arange(0, 32, 2)}),
    "shared expert": ("hybrid", 1, {"shared_ffn": torch.arange(0, 48, 2)}),
}


@dataclass(frozen=True)
class Teacher:
    """A tiny teacher and Gram matrices of it, both halves of the same text."""

    checkpoint: Checkpoint
    model: Any
    grams: Grams


Teachers = dict[str, Teacher]


def teachers_in(folder: Path) -> Teachers:
    """Every teacher with its matrices, written to a folder."""
    found = {}
    for name, config in TEACHERS.items():
        # fp32 on disk, so that what is refitted is not rounded.
        path = write_tiny(folder / name, config, dtype=torch.float32)
        checkpoint, model, file = open_checkpoint(path), load_model(path), folder / f"{name}.grams"
        save_grams(stack_of(checkpoint), SAME, file)
        found[name] = Teacher(checkpoint, model, Grams(file))
    return found


def cut_candidate(
    teacher: Checkpoint, number: int, keep: dict[str, Tensor], *, repaired: bool
) -> Candidate:
    architecture = teacher.architecture
    name = block_name(architecture.blocks[number])
    whole = {"blocks": torch.arange(len(architecture.blocks))}
    kept = whole | {f"{name}/{axis}": index for axis, index in keep.items()}
    student = student_architecture(architecture, kept, {}, {})
    numbers = frozenset([number] if repaired else [])
    return Candidate(id="x", kind="prune", architecture=student, keep=kept, repaired=numbers)


def built(teacher: Teacher, candidate: Candidate, grams: Grams) -> Any:
    config = student_config(teacher.checkpoint.config, candidate.architecture)
    tensors = student_tensors(teacher.checkpoint, candidate, grams)
    return build_model(config, candidate.architecture, tensors)


def block_output(model: Any, family: str, block: Block) -> Tensor:
    """[tokens, hidden] that a block adds to the residual stream on the text.

    Times what a norm behind the block divides by.
    """
    found: list[Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    layer = model.model.layers[block.layer]
    site = family_of(family).sites[block.kind]
    handle = getattr(layer, site.mixer).register_forward_hook(hook)
    model.model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    weight = 1 + getattr(layer, site.post).weight if site.post else 1
    return found[0].flatten(0, -2) * weight


def inputs_of(model: Any, block: Block, projection: Projection) -> Tensor:
    """[rows, d] that a projection reads on the text; an expert's, times their routing weights."""
    found: list[Tensor] = []
    layer, name = model.model.layers[block.layer], projection.name.removesuffix(".weight")
    if projection.expert is None:
        module = layer.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda m, args: found.append(args[0]))
    else:
        experts, number = layer.mixer.experts, projection.expert

        def hook(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
            x, index, weight = args
            mine = weight.masked_fill(index != number, 0).sum(1, keepdim=True)
            inner = torch.relu(x @ experts.up_proj[number].T).square()
            found.append((inner * mine)[mine[:, 0] > 0])

        handle = experts.register_forward_pre_hook(hook)
    model.model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    return found[0].flatten(0, -2).double()


def case_of(teachers: Teachers, name: str) -> tuple[Teacher, Block, Projection, Tensor, Tensor]:
    """Teacher, block, its projection that the cut narrows (one expert's), weight and columns."""
    family, number, keep = CUTS[name]
    teacher = teachers[family]
    block = teacher.checkpoint.architecture.blocks[number]
    found = projections(teacher.checkpoint.architecture, block)
    wanted = 2 if "experts" in name else None
    projection = next(p for p in found if p.expert == wanted and p.units.cut.keys() & keep.keys())
    prefix = family_of(teacher.checkpoint.architecture.family).layer.format(layer=block.layer)
    own = expert_keep(keep, block, projection.expert)
    assert own is not None
    kept = kept_columns(projection, block, own)
    return teacher, block, projection, teacher.checkpoint[prefix + projection.name], kept


def squared_error(weight: Tensor, student: Tensor, gram: Tensor, kept: Tensor) -> float:
    """|X_k W'^T - X W^T|^2 of a student's weight on the text of a Gram matrix."""
    difference = -weight.double()
    difference[:, kept] += student.double()
    return float(((difference @ gram) * difference).sum())
