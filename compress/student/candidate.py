"""A candidate: sizes, kept indices and the formats of every block; surgery adds nothing."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.formats.table import KV_FORMATS, GroupFormats, KvFormat
from compress.model.architecture import Architecture, Block, block_name, kv_format_of, sizes
from compress.student.units import axes_in

if TYPE_CHECKING:
    from torch import Tensor

# What decides which units of an axis stay.
Ranking = Literal["contribution", "activation", "router"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A student and what it keeps of its teacher.

    ``keep`` maps ``"blocks"`` to the teacher's block numbers that survive, ``"hidden"`` and
    ``"layers.7.ffn/ffn"`` (the teacher's block name and axis) to kept indices, ascending; an axis
    that is not there is kept whole. Indices of ``query`` are [kept KV heads, kept], of ``head``
    [groups, kept], of ``expert_ffn`` [kept experts, kept]. ``repaired`` are the teacher's block
    numbers whose output projections are refitted (``repair``).
    """

    id: str
    kind: str
    architecture: Architecture
    keep: "Mapping[str, Tensor]"
    repaired: frozenset[int] = frozenset()


def repair_note(repaired: int, blocks: int) -> str:
    """How many of a student's blocks are repaired and what that means, in one line."""
    return (
        f"{repaired} of {blocks} blocks are repaired: after the cut their output projections were "
        "refitted to put out what the teacher's blocks do (closed form, no labels, no training)"
    )


def block_keep(keep: "Mapping[str, Tensor]", teacher_block: Block) -> "dict[str, Tensor]":
    """Kept indices of one teacher block by axis, ``hidden`` among them."""
    prefix = block_name(teacher_block) + "/"
    found = {
        key.removeprefix(prefix): index for key, index in keep.items() if key.startswith(prefix)
    }
    return found | ({"hidden": keep["hidden"]} if "hidden" in keep else {})


def student_architecture(
    teacher: Architecture,
    keep: "Mapping[str, Tensor]",
    formats: Mapping[int, GroupFormats],
    kv_formats: Mapping[int, KvFormat],
) -> Architecture:
    """The student that ``keep`` describes; teacher block numbers have ``formats``, else BF16.

    Layers are renumbered without gaps.
    """
    blocks: list[Block] = []
    layers: dict[int, int] = {}
    for number in keep["blocks"].tolist():
        block = teacher.blocks[number]
        kept = {a: i.shape[-1] for a, i in block_keep(keep, block).items() if a != "hidden"}
        layer = layers.setdefault(block.layer, len(layers))
        changes: dict[str, Any] = {"layer": layer, "formats": formats.get(number, ()), **kept}
        if kv_format_of(block) is not None:
            changes["kv_format"] = kv_formats.get(number, KV_FORMATS[0])
        blocks.append(dataclasses.replace(block, **changes))
    hidden = len(keep["hidden"]) if "hidden" in keep else teacher.hidden
    return dataclasses.replace(teacher, hidden=hidden, blocks=tuple(blocks))


def expert_keep(
    keep: "Mapping[str, Tensor]", block: Block, expert: int | None
) -> "dict[str, Tensor] | None":
    """A block's kept indices as one of its experts sees them; None for an expert that goes."""
    if expert is None:
        return dict(keep)
    survivors = keep["expert"].tolist() if "expert" in keep else range(sizes(block)["expert"])
    if expert not in survivors:
        return None
    own = {axis for axis, rule in axes_in(block).items() if rule.within == "expert"}
    row = survivors.index(expert)
    return {axis: index[row] if axis in own else index for axis, index in keep.items()}
