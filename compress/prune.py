"""Surgery: a candidate's tensors, cut from the teacher's one by one, safetensors to safetensors."""

from collections.abc import Iterator, Mapping
from math import prod, sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.architecture import Moe, sizes, to_json
from compress.candidate import Candidate, block_keep, kept_experts
from compress.checkpoint import Checkpoint, write_checkpoint
from compress.families import family_of
from compress.layout import Slot, take
from compress.model import student_config
from compress.precision.fake import fake_quantize_block


def cut(
    tensor: Tensor, slot: Slot, axis_sizes: Mapping[str, int], keep: Mapping[str, Tensor]
) -> Tensor:
    """One tensor with the kept indices only, a norm's weight folded.

    A norm that averages over D of which D' stay divides by a root mean square that is sqrt(D/D')
    times what it was with the others at zero: its weight takes that factor, so that cutting equals
    masking (its eps takes D/D', in the config, where it is one value for the cut axis).
    """
    smaller = take(tensor, slot.shape, axis_sizes, keep)
    shrunk = prod(axis_sizes[a] / keep[a].shape[-1] for a in slot.normalizes if a in keep)
    return smaller if shrunk == 1 else (smaller.float() * sqrt(shrunk)).to(tensor.dtype)


def student_tensors(
    teacher: Checkpoint, candidate: Candidate, *, quantized: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The student's tensors under its names on disk, block by block.

    ``quantized`` passes every block's linear weights through its format and back (weight-only fake
    quantization of what was cut, so that scales are those of the export).
    """
    architecture, keep = teacher.architecture, candidate.keep
    family = family_of(architecture.family)
    shared = {"hidden": architecture.hidden, "vocab": architecture.vocab}
    hidden = {"hidden": keep["hidden"]} if "hidden" in keep else {}
    for name, slot in family.model.items():
        if name != family.head or not architecture.tied:
            yield name, cut(teacher[name], slot, shared, hidden)
    for number, block in zip(keep["blocks"].tolist(), candidate.architecture.blocks, strict=True):
        original = architecture.blocks[number]
        source, target = (family.layer.format(layer=b.layer) for b in (original, block))
        axis_sizes, kept = shared | sizes(original), block_keep(keep, original)
        tensors: dict[str, Tensor] = {}
        slots: dict[str, Slot] = {}
        for name, slot in family.tensors(original).items():
            per_expert = isinstance(original, Moe) and "{expert}" in name
            experts = (
                kept_experts(keep, original) if per_expert and isinstance(original, Moe) else [0]
            )
            for row, expert in enumerate(experts):
                own = dict(kept)
                if per_expert and "expert_ffn" in own:
                    own["expert_ffn"] = own["expert_ffn"][row]
                renamed = target + name.format(expert=row)
                tensors[renamed] = cut(
                    teacher[source + name.format(expert=expert)], slot, axis_sizes, own
                )
                slots[renamed] = slot
        if quantized and block.format != "bf16":
            tensors = fake_quantize_block(tensors, slots, block.format)
        yield from tensors.items()


def prune(teacher: Checkpoint, candidate: Candidate, directory: Path) -> None:
    """Write the candidate's BF16 student to ``directory``, with what it keeps beside it."""
    config = student_config(teacher.config, candidate.architecture)
    tensors = (
        (name, tensor if tensor.dtype == torch.bfloat16 or fp32(name) else tensor.bfloat16())
        for name, tensor in student_tensors(teacher, candidate)
    )
    write_checkpoint(directory, tensors, config, teacher.path, to_json(candidate.architecture))
    save_keep(candidate, directory / "keep.safetensors")


def fp32(name: str) -> bool:
    """Whether a tensor stays in fp32: the routers' correction bias."""
    return name.endswith("e_score_correction_bias")


def save_keep(candidate: Candidate, file: Path) -> None:
    """Write the kept indices."""
    save_file({name: index.contiguous() for name, index in candidate.keep.items()}, file)
