"""Surgery: a candidate's tensors, cut from the teacher's one by one, safetensors to safetensors."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from math import prod, sqrt
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.core.files import atomic_directory, write_text
from compress.formats.fake import fake_quantize_block
from compress.model.architecture import Architecture, from_json, sizes, to_json
from compress.model.build import student_config
from compress.model.checkpoint import Checkpoint, in_bf16, write_checkpoint
from compress.model.config import ARCHITECTURE
from compress.model.families import experts_of, family_of, parameters
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
    masking (its eps takes D/D', in the config, where it is one value for the cut axis).
    """
    smaller = take(tensor, slot.shape, axis_sizes, keep)
    shrunk = prod(axis_sizes[a] / keep[a].shape[-1] for a in slot.normalizes if a in keep)
    return smaller if shrunk == 1 else (smaller.float() * sqrt(shrunk)).to(tensor.dtype)


def student_tensors(
    teacher: Checkpoint, candidate: Candidate, grams: Grams | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The student's tensors under its names on disk, block by block, in the teacher's dtype.

    ``grams`` are the teacher's; a candidate with repaired blocks needs them.
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
        repaired = projections(architecture, original) if number in candidate.repaired else ()
        refitted = {projection.name: projection for projection in repaired}
        for name, slot in family.tensors(original).items():
            parts = ((e, expert_keep(kept, original, e)) for e in experts_of(name, original))
            survivors = [(expert, own) for expert, own in parts if own is not None]
            for row, (expert, own) in enumerate(survivors):
                if projection := refitted.get(name.format(expert=expert)):
                    assert grams is not None, "a repaired candidate needs its teacher's Grams"
                    student = refitted_weight(teacher, grams, original, projection, own)
                else:
                    tensor = teacher[source + name.format(expert=expert)]
                    student = cut(tensor, slot, axis_sizes, own)
                yield target + name.format(expert=row), student


def quantized(
    tensors: Iterable[tuple[str, Tensor]], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors after every block's format and back, fp32 where it is not BF16.

    Weight-only fake quantization, block by block as ``student_tensors`` and checkpoints stream
    them; scales are those of the export. fp32, as a loader dequantizes: a code times its scale is
    not a bf16 number.
    """
    for number, found, fused in by_block(tensors, architecture):
        if number is None or (format := architecture.blocks[number].format) == "bf16":
            yield from found.items()
            continue
        wide = {name: tensor.float() for name, tensor in found.items()}
        yield from fake_quantize_block(wide, fused, format).items()


def by_block(
    tensors: Iterable[tuple[str, Tensor]], architecture: Architecture
) -> Iterator[tuple[int | None, dict[str, Tensor], dict[str, str | None]]]:
    """A checkpoint's tensors a block at a time: its number, they, and their fused groups."""
    known = {parameter.name: parameter for parameter in parameters(architecture)}

    def block_of(item: tuple[str, Tensor]) -> int | None:
        return known[item[0]].block

    for number, group in itertools.groupby(tensors, block_of):
        found = dict(group)
        yield number, found, {name: known[name].slot.fused for name in found}


def prune(
    teacher: Checkpoint, candidate: Candidate, directory: Path, grams: Grams | None = None
) -> None:
    """Write the candidate's BF16 student to ``directory``, with what it keeps beside it."""
    student = candidate.architecture
    write_checkpoint(
        directory,
        in_bf16(student_tensors(teacher, candidate, grams), student),
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
