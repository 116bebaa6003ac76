"""Students put together from blocks that were cut and rounded once, by surgery's own functions.

A step of a search changes a few blocks of a student: the others are in the store.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from threading import RLock

import torch
from torch import Tensor

from compress.formats.fake import fake_quantize_block
from compress.formats.table import GroupFormats
from compress.memory.machine import RESIDENT_SHARE
from compress.model.architecture import Architecture, kv_format_of, sizes
from compress.model.build import generates, student_config
from compress.model.checkpoint import Checkpoint
from compress.model.families import family_of, parameters
from compress.model.fill import fused, inside, place_of
from compress.model.layout import Parameter
from compress.student.candidate import Candidate, block_keep
from compress.student.grams import Grams
from compress.student.rounded import rounded
from compress.student.rounded_teacher import RoundedTeacher
from compress.student.surgery import Cut, cut_block, cut_outside, cuts_of
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack, part_bytes

# Of a placement's memory, what a store may hold; never more than so many whole teachers.
SHARE, TEACHERS = 1 / 8, 2
Tensors = Mapping[str, Tensor]


class BlockStore:
    """Blocks of students of one teacher on its stack's placement, the latest ones kept.

    An eighth of the placement's memory, at most two teachers. ``stack`` is the teacher's. Where
    the teacher is ``rounded`` on text, so are they; otherwise they are rounded to nearest.
    """

    def __init__(self, teacher: Checkpoint, stack: Stack) -> None:
        self.teacher, self.stack = teacher, stack
        self.rounded: RoundedTeacher | None = None
        memory = stack.placement.memory
        most = TEACHERS * part_bytes(parameters(teacher.architecture), stack.placement.dtype)
        self.limit = most if memory is None else min(most, int(SHARE * memory))
        self.held: OrderedDict[Hashable, Tensors] = OrderedDict()
        self.bytes = 0
        # A stack reads its next layer in another thread.
        self.lock = RLock()

    def get(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What ``make`` gives or gave for a key."""
        with self.lock:
            if key not in self.held:
                self.held[key] = made = make()
                self.bytes += size_of(made)
                while self.bytes > self.limit and len(self.held) > 1:
                    self.bytes -= size_of(self.held.popitem(last=False)[1])
            self.held.move_to_end(key)
            return self.held[key]

    def clear(self) -> None:
        """Let all blocks go."""
        with self.lock:
            self.held.clear()
            self.bytes = 0

    def keys(self, candidate: Candidate, grams: Grams | None = None) -> list[Hashable]:
        """Of every block of a candidate what decides its tensors."""
        return [
            (
                number,
                units_of(block_keep(candidate.keep, self.teacher.architecture.blocks[number])),
                block.formats,
                grams and number in candidate.repaired and (str(grams.file), grams.ridge),
            )
            for number, block in zip(
                candidate.keep["blocks"].tolist(), candidate.architecture.blocks, strict=True
            )
        ]

    def layer_keys(self, candidate: Candidate, grams: Grams | None = None) -> list[Hashable]:
        """Of every layer of a candidate what decides what it computes."""
        blocks, formats = candidate.architecture.blocks, candidate.architecture.outside_formats
        # What enters the first layer decides it too.
        found: dict[int, list[Hashable]] = {0: [dict(formats).get("embedding")]}
        for block, key in zip(blocks, self.keys(candidate, grams), strict=True):
            found.setdefault(block.layer, []).append((key, kv_format_of(block)))
        return [tuple(keys) for keys in found.values()]

    def student(self, candidate: Candidate, grams: Grams | None = None) -> Stack:
        """A candidate in its formats; a repaired one needs its teacher's Gram matrices."""
        architecture, keys = candidate.architecture, self.keys(candidate, grams)
        blocks: dict[int | None, list[Parameter]] = {}
        for each in parameters(architecture):
            blocks.setdefault(each.block, []).append(each)

        def read(parameter: Parameter) -> Tensor:
            if (at := parameter.block) is None:
                return self.outside(candidate)[parameter.name]
            found = self.get(keys[at], lambda: self.block(candidate, at, blocks[at], grams))
            return found[local_name(parameter, architecture)]

        place = self.stack.placement
        # What a student's stack keeps is what the store holds.
        memory = None if place.memory is None else int(self.limit / RESIDENT_SHARE)
        config = student_config(self.teacher.config, architecture)
        return Stack(config, architecture, read, replace(place, memory=memory))

    def block(
        self, candidate: Candidate, at: int, own: Sequence[Parameter], grams: Grams | None
    ) -> Tensors:
        """The candidate's block ``at``, whose parameters are ``own``, by names in its layer."""
        architecture, place = candidate.architecture, self.stack.placement
        teacher = self.teacher.architecture
        number, formats = candidate.keep["blocks"].tolist()[at], architecture.blocks[at].formats
        made = dict(cut_block(self.teacher, candidate, number, grams, place.device))
        known = {local_name(each, architecture): each for each in own}
        if formats:
            axis_sizes = sizes(teacher.blocks[number]) | {"hidden": teacher.hidden}
            cuts = [*cuts_of(candidate, teacher, number)]
            made = self.formatted(number, cuts, made, axis_sizes, formats)
        cast = [
            (each, made[name].to(torch.float32 if each.slot.float32 else place.dtype))
            for name, each in known.items()
        ]
        return dict(zip(known, fused(cast, architecture), strict=True))

    def formatted(
        self,
        number: int,
        cuts: Sequence[Cut],
        made: Tensors,
        axis_sizes: Mapping[str, int],
        formats: GroupFormats,
    ) -> dict[str, Tensor]:
        """Tensors that were cut, after their formats and back, fp32; as in ``RoundedTeacher``."""
        wide = {name: tensor.float() for name, tensor in made.items()}
        if self.rounded is None:
            return fake_quantize_block(wide, {each.name: each.slot.fused for each in cuts}, formats)
        return wide | self.rounded.rounded(number, cuts, wide, axis_sizes, formats)

    def outside(self, candidate: Candidate) -> Tensors:
        """Embedding, final norm and head: the teacher's own, or their kept hidden channels.

        In the candidate's formats.
        """
        stack, formats = self.stack, candidate.architecture.outside_formats

        def make() -> Tensors:
            place = stack.placement
            if "hidden" not in candidate.keep and not formats:
                with stack.head():
                    return {
                        each.name: inside(stack.model, place_of(each, stack.architecture))[2]
                        for each in stack.parts[None]
                    }
            found = dict(cut_outside(self.teacher, candidate, place.device))
            if formats:
                teacher, keep = self.teacher.architecture, candidate.keep
                kept = {axis: index for axis, index in keep.items() if axis == "hidden"}
                cuts = [Cut(each.name, each.name, each.slot, kept) for each in stack.parts[None]]
                axis_sizes = {"hidden": teacher.hidden, "vocab": teacher.vocab}
                found = self.formatted(len(teacher.blocks), cuts, found, axis_sizes, formats)
            return {name: tensor.to(place.dtype) for name, tensor in found.items()}

        return self.get((units_of(candidate.keep, "hidden"), formats), make)


def units_of(keep: Tensors, *axes: str) -> Hashable:
    """Kept indices as a key, of these axes or of all."""
    return tuple((axis, keep[axis].numpy().tobytes()) for axis in axes or keep if axis in keep)


def local_name(parameter: Parameter, architecture: Architecture) -> str:
    """What a block's parameter is called within its layer."""
    assert parameter.block is not None
    layer = architecture.blocks[parameter.block].layer
    return parameter.name.removeprefix(family_of(architecture.family).layer.format(layer=layer))


def size_of(tensors: Tensors) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def stack_in_formats(
    checkpoint: Checkpoint, architecture: Architecture, placement: Placement
) -> Stack:
    """A BF16 student on disk as a stack, its blocks rounded to nearest, KV caches in theirs."""

    def stored(parameter: Parameter) -> Tensor:
        return checkpoint[parameter.name].to(placement.device)

    stack = Stack(checkpoint.config, architecture, rounded(stored, architecture), placement)
    generates(stack.model, checkpoint.path)
    return stack
