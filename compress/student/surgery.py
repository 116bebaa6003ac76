"""Surgery: a candidate's tensors, cut from the teacher's one by one, safetensors to safetensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod, sqrt
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.core.files import atomic_directory, write_text
from compress.model.architecture import Architecture, from_json, sizes, to_json
from compress.model.build import student_config
from compress.model.checkpoint import Checkpoint, in_bf16, write_checkpoint
from compress.model.config import ARCHITECTURE
from compress.model.families import experts_of, family_of, mtp_parameters, outside
from compress.model.layout import Slot, take
from compress.model.tensor_files import save_tensors
from compress.student.candidate import Candidate, block_keep, expert_keep
from compress.student.grams import Grams
from compress.student.repair import refitted_weight
from compress.student.units import projections

KEEP = "keep.safetensors"
# Beside the kept indices in the same file: the teacher's blocks that are repaired.
REPAIRED = "repaired"


def cut(
    tensor: Tensor, slot: Slot, axis_sizes: Mapping[str, int], keep: Mapping[str, Tensor]
) -> Tensor:
    """One tensor with the kept indices only, a norm's weight folded.

    A norm that averages over D of which D' stay divides by a root mean square that is sqrt(D/D')
    times what it was with the others at zero: its weight takes that factor, so that cutting equals
    masking (its eps takes D/D', in the config, where it is one value for the cut axis). So does a
    weight that the model multiplies by the root of D.
    """
    smaller = take(tensor, slot.shape, axis_sizes, keep)
    rooted = (*slot.normalizes, *slot.times_root)
    shrunk = prod(axis_sizes[axis] / keep[axis].shape[-1] for axis in rooted if axis in keep)
    if shrunk == 1:
        return smaller
    return ((slot.offset + smaller.float()) * sqrt(shrunk) - slot.offset).to(tensor.dtype)


def student_tensors(
    teacher: Checkpoint, candidate: Candidate, grams: Grams | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The student model's tensors under its names on disk, block by block, in the teacher's dtype.

    ``grams`` are the teacher's; a candidate with repaired blocks needs them.
    """
    yield from cut_outside(teacher, candidate)
    blocks, prefix = candidate.architecture.blocks, family_of(teacher.architecture.family).layer
    for number, block in zip(candidate.keep["blocks"].tolist(), blocks, strict=True):
        target = prefix.format(layer=block.layer)
        for name, tensor in cut_block(teacher, candidate, number, grams):
            yield target + name, tensor


def cut_outside(
    teacher: Checkpoint, candidate: Candidate, device: torch.device | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What a candidate keeps of its teacher outside the blocks, cut on ``device``."""
    architecture, keep = teacher.architecture, candidate.keep
    shared = {"hidden": architecture.hidden, "vocab": architecture.vocab}
    hidden = {"hidden": keep["hidden"]} if "hidden" in keep else {}
    for name, slot in outside(architecture):
        tensor = teacher[name]
        yield name, cut(tensor.to(device or tensor.device), slot, shared, hidden)


def cut_block(
    teacher: Checkpoint,
    candidate: Candidate,
    number: int,
    grams: Grams | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """What a candidate keeps of the teacher's block ``number``, by names within its layer.

    In the teacher's dtype; cut on ``device``, None: where the tensors are.
    """
    architecture = teacher.architecture
    block, family = architecture.blocks[number], family_of(architecture.family)
    source = family.layer.format(layer=block.layer)
    axis_sizes = sizes(block) | {"hidden": architecture.hidden}
    repaired = projections(architecture, block) if number in candidate.repaired else ()
    refitted = {projection.name: projection for projection in repaired}
    for each in cuts_of(candidate, architecture, number):
        if projection := refitted.get(each.source):
            assert grams is not None, "a repaired candidate needs its teacher's Grams"
            student = refitted_weight(teacher, grams, block, projection, each.keep)
        else:
            tensor = teacher[source + each.source]
            student = cut(tensor.to(device or tensor.device), each.slot, axis_sizes, each.keep)
        yield each.name, student.to(device or student.device)


@dataclass(frozen=True)
class Cut:
    """A tensor of a student's block by its name in the layer, and its ``source`` in the teacher's.

    ``keep`` has the kept indices by axis, ``hidden`` among them, of an expert its own.
    """

    name: str
    source: str
    slot: Slot
    keep: Mapping[str, Tensor]


def cuts_of(candidate: Candidate, teacher: Architecture, number: int) -> Iterator[Cut]:
    """What a candidate keeps of the tensors of its teacher's block ``number``."""
    block = teacher.blocks[number]
    kept = block_keep(candidate.keep, block)
    for name, slot in family_of(teacher.family).tensors(block).items():
        parts = ((e, expert_keep(kept, block, e)) for e in experts_of(name, block))
        survivors = [(expert, own) for expert, own in parts if own is not None]
        for row, (expert, own) in enumerate(survivors):
            yield Cut(name.format(expert=row), name.format(expert=expert), slot, own)


def mtp_tensors(teacher: Checkpoint, candidate: Candidate) -> Iterator[tuple[str, Tensor]]:
    """The student's layers that predict further tokens, in the teacher's dtype.

    They are the teacher's, cut along the hidden channels, if the student has them.
    """
    hidden = {axis: index for axis, index in candidate.keep.items() if axis == "hidden"}
    theirs = mtp_parameters(teacher.architecture)
    for own, parameter in zip(mtp_parameters(candidate.architecture), theirs, strict=False):
        yield own.name, cut(teacher[parameter.name], parameter.slot, parameter.sizes, hidden)


def prune(
    teacher: Checkpoint, candidate: Candidate, directory: Path, grams: Grams | None = None
) -> None:
    """Write the candidate's BF16 student to ``directory``, with what it keeps beside it."""
    student = candidate.architecture
    tensors = chain(student_tensors(teacher, candidate, grams), mtp_tensors(teacher, candidate))
    write_checkpoint(
        directory,
        in_bf16(tensors, student),
        student_config(teacher.config, student),
        teacher.path,
        to_json(student),
        lambda partial: save_keep(candidate, partial / KEEP),
    )


def save_keep(candidate: Candidate, file: Path) -> None:
    """Write the kept indices, and which blocks are repaired where any is."""
    tensors = {name: index.contiguous() for name, index in candidate.keep.items()}
    if candidate.repaired:
        tensors[REPAIRED] = torch.tensor(sorted(candidate.repaired))
    save_tensors(tensors, file)


def save_candidate(candidate: Candidate, directory: Path) -> None:
    """Write what a candidate is, without weights; ``prune`` adds those."""
    with atomic_directory(directory) as partial:
        write_text(partial / ARCHITECTURE, to_json(candidate.architecture))
        save_keep(candidate, partial / KEEP)


def load_candidate(directory: Path, kind: str) -> Candidate:
    """The candidate of a directory; its name is the directory's."""
    keep = load_file(directory / KEEP)
    repaired_blocks = keep.pop(REPAIRED, torch.arange(0))
    return Candidate(
        id=directory.name,
        kind=kind,
        architecture=from_json((directory / ARCHITECTURE).read_text(encoding="utf-8")),
        keep=keep,
        repaired=frozenset(repaired_blocks.tolist()),
    )


def same_candidate(candidate: Candidate, directory: Path) -> bool:
    """Whether a directory is that of this very candidate."""
    if not (directory / KEEP).is_file() or not (directory / ARCHITECTURE).is_file():
        return False
    found = load_candidate(directory, candidate.kind)
    return (
        found.architecture == candidate.architecture
        and found.repaired == candidate.repaired
        and found.keep.keys() == candidate.keep.keys()
        and all(torch.equal(found.keep[key], index) for key, index in candidate.keep.items())
    )
