"""Search spaces: YAML in, the options of every block out. No torch."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.core.errors import InputError
from compress.core.settings import read_settings
from compress.formats.table import FORMATS, KV_FORMATS, Format, GroupFormats, KvFormat, by_group
from compress.memory.footprint import group_takes
from compress.model.architecture import Architecture, Block, cached, kv_format_of, sizes
from compress.model.families import family_of, in_one_format, linear_groups, outside_groups
from compress.model.find import shipped
from compress.student.units import AXES, axes_in, mtp_axes, number_of

# Widths are multiples of this; of the small one where the width itself is under 1024.
MULTIPLE, SMALL_MULTIPLE, SMALL_WIDTH = 64, 16, 1024
WIDTHS = {"hidden"} | {a for axes in AXES.values() for a, axis in axes.items() if axis.width}
# What the names of routed experts' linear groups begin with, and the group of the embedding.
EXPERTS = "experts_"
EMBEDDING = "embedding"
# What candidates are, in the order of the last table: one kind is searched for, others compare.
KINDS = ("uniform", "random", "prune", "formats", "prune_then_quantize", "joint")


class Axis(BaseModel):
    """Shares of an axis that a student may keep besides all of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scope: Literal["global", "block"]
    keep: tuple[float, ...]


class Space(BaseModel):
    """What a search may change.

    ``remove`` says what may go as a whole; ``repair`` also offers every cut of a block with its
    output projection refitted. ``head_formats`` are those of the head and of the embedding, each
    its own unless they are tied. ``format_scope`` says whether a
    block has one format or each of its linear groups its own, ``kv_scope`` whether every block has
    its own KV format. ``stock`` leaves out what a family's config class refuses.
    A block of the kind ``first`` stays where the model begins with it.
    With ``expert_formats`` those of routed experts are among these, one for all of a block, with
    ``embedding_formats`` those of an embedding that is not the head.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    remove: Literal["none", "layer", "block"]
    axes: Mapping[str, Axis]
    formats: tuple[Format, ...] = Field(min_length=1)
    head_formats: tuple[Format, ...] = Field(("bf16",), min_length=1)
    kv_formats: tuple[KvFormat, ...] = Field(min_length=1)
    format_scope: Literal["block", "group"] = "block"
    kv_scope: Literal["global", "block"] = "block"
    repair: bool = False
    stock: bool = False
    first: str | None = None
    expert_formats: tuple[Format, ...] | None = None
    embedding_formats: tuple[Format, ...] | None = None

    @property
    def prunes(self) -> bool:
        """Whether any structure may go."""
        return bool(self.axes) or self.remove != "none"


def asked_kinds(text: str) -> list[str]:
    """The kinds that a text lists, separated by commas; InputError where one is none."""
    found = [part.strip() for part in text.split(",")]
    if unknown := [kind for kind in found if kind not in KINDS]:
        raise InputError(
            f"baselines {text!r}: {unknown[0]!r} is none; a list has {', '.join(KINDS)}, or it is "
            "all or none"
        )
    return found


def shipped_spaces() -> dict[str, Path]:
    """The spaces that come with the package, by name, in a wheel or a source tree."""
    return {path.stem: path for path in sorted(shipped("search_spaces").glob("*.yaml"))}


def load_space(name: str) -> Space:
    """The space of a shipped name or a YAML file.

    Raises:
        InputError: unknown name, unknown key, unknown axis or a share outside (0, 1).
    """
    shipped = shipped_spaces()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise InputError(f"space {name!r} is neither a file nor one of {', '.join(shipped)}")
    space = read_settings(path, Space, "space")
    known = {"hidden"} | {axis for axes in AXES.values() for axis in axes}
    for axis, choice in space.axes.items():
        if axis not in known:
            raise InputError(f"{path}: unknown axis {axis!r}; known: {', '.join(sorted(known))}")
        if axis == "hidden" and choice.scope != "global":
            raise InputError(f"{path}: hidden is one for all blocks; its scope is global")
        if not all(0 < share < 1 for share in choice.keep):
            raise InputError(f"{path}: shares to keep of {axis} must lie between 0 and 1")
    return space


def of_teacher(space: Space, teacher: Architecture) -> tuple[Space, list[str]]:
    """The space without axes that a teacher does not offer, and lines that say which."""
    axes, lines = dict(space.axes), list[str]()
    reason = family_of(teacher.family).whole_hidden
    if reason is not None and "hidden" in axes:
        del axes["hidden"]
        lines.append(
            f"hidden stays {teacher.hidden}, as in every {teacher.family} student: {reason}"
        )
    if whole := [axis for axis in axes if axis in mtp_axes(teacher)]:
        axes = {axis: choice for axis, choice in axes.items() if axis not in whole}
        lines.append(
            f"{', '.join(whole)} stay whole, as layers that predict further tokens have them too "
            "and servers take one size for all; --mtp drop gives those layers up"
        )
    return space.model_copy(update={"axes": axes}), lines


def counts(axis: str, size: int, shares: tuple[float, ...]) -> list[int]:
    """The sizes an axis may have, largest first, the whole one included.

    Widths round to a multiple of 64 (16 on tiny models), other axes to whole units.
    """
    step = (MULTIPLE if size >= SMALL_WIDTH else SMALL_MULTIPLE) if axis in WIDTHS else 1
    rounded = {max(step, round(share * size / step) * step) for share in shares}
    return [size, *sorted((count for count in rounded if count < size), reverse=True)]


def admissible(block: Block, target: Mapping[str, int]) -> bool:
    """Whether routing still works: enough experts to choose from, as many of every group."""
    rules = axes_in(block)
    return all(
        count >= number_of(block, rules[axis].least)
        and count % number_of(block, rules[axis].multiple) == 0
        for axis, count in target.items()
    )


@dataclasses.dataclass(frozen=True)
class Option:
    """One choice for a block: its counts by axis (whole axes left out) and formats; or removal."""

    target: tuple[tuple[str, int], ...] = ()
    formats: GroupFormats = ()
    kv_format: KvFormat = KV_FORMATS[0]
    removed: bool = False


REMOVED = Option(removed=True)


def block_options(
    architecture: Architecture,
    number: int,
    space: Space,
    globals_: Mapping[str, float],
    hidden: int,
    kv_format: KvFormat | None = None,
) -> Iterator[Option]:
    """Every option of one block but removal.

    ``globals_`` are the chosen shares of global axes, ``kv_format`` is the one of all blocks where
    they have no choice of their own.
    """
    block = architecture.blocks[number]
    kv_formats = space.kv_formats if kv_format is None else (kv_format,)
    if kv_format_of(block) is None:
        kv_formats = KV_FORMATS[:1]
    choices: list[list[tuple[str, int]]] = []
    for axis in axes_in(block):
        size = sizes(block)[axis]
        if axis not in space.axes:
            found = [size]
        elif space.axes[axis].scope == "global":
            share = globals_.get(axis, 1.0)
            found = [size] if share == 1 else counts(axis, size, (share,))[-1:]
        else:
            found = counts(axis, size, space.axes[axis].keep)
        choices.append([(axis, count) for count in found])
    for picked in itertools.product(*choices):
        target = {axis: count for axis, count in picked if count < sizes(block)[axis]}
        if not admissible(block, target):
            continue
        cut = Option(tuple(sorted(target.items())))
        smaller = resized(block, cut)
        if space.stock and not is_stock(architecture.family, smaller, hidden):
            continue
        offered = offered_formats(architecture, block, smaller, hidden, space)
        for formats, own in itertools.product(offered, kv_formats):
            yield dataclasses.replace(cut, formats=formats, kv_format=own)


# A search asks for the same few hundred blocks hundreds of thousands of times.
@lru_cache(maxsize=2**16)
def is_stock(family: str, block: Block, hidden: int) -> bool:
    """Whether the config class of a family takes one of its blocks on a stream of this size."""
    alone = Architecture(family=family, vocab=1, hidden=hidden, tied=False, blocks=(block,))
    return family_of(family).stock(alone)


def offered_formats(
    teacher: Architecture, block: Block, smaller: Block, hidden: int, space: Space
) -> list[GroupFormats]:
    """Formats of the space for a cut of one of the teacher's blocks.

    Its shapes take them, and so do those of the whole block: what is offered was scored. What can
    take none of them stays BF16.
    """
    family, shapes = teacher.family, ((block, teacher.hidden), (smaller, hidden))
    groups = linear_groups(block, family)
    experts = [group for group in groups if group.startswith(EXPERTS)]
    together = [[group] for group in groups]
    if space.expert_formats is not None and experts:
        together = [[group] for group in groups if group not in experts] + [experts]

    def taken(several: list[str], formats: Iterable[Format]) -> list[Format]:
        known = space.formats if several is not experts else space.expert_formats or ()
        return [
            format
            for format in formats
            if format in known
            and all(
                group_takes(each, group, width, family, format)
                for each, width in shapes
                for group in several
            )
        ] or ["bf16"]

    if space.format_scope == "block":
        common = [f for f in space.formats if all(taken(own, [f]) == [f] for own in together)]
        return [in_one_format(block, family, format) for format in common or ["bf16"]]
    choices = itertools.product(*(taken(own, space.formats) for own in together))
    return [
        by_group({group: f for own, f in zip(together, chosen, strict=True) for group in own})
        for chosen in choices
    ]


def outside_options(architecture: Architecture, hidden: int, space: Space) -> list[Option]:
    """Every option of the embedding and the head: formats of the space that their shape takes.

    And took before hidden channels went: what is offered was scored.
    """
    shapes = [(architecture.vocab, width) for width in (architecture.hidden, hidden)]
    found = (f for f in space.head_formats if all(FORMATS[f].takes(shape) for shape in shapes))
    taken = [*found] or ["bf16"]
    groups = outside_groups(architecture)
    few = [f for f in taken if f in (space.embedding_formats or taken)] or ["bf16"]
    choices = itertools.product(*(few if group == EMBEDDING else taken for group in groups))
    made = (by_group(dict(zip(groups, chosen, strict=True))) for chosen in choices)
    return [Option(formats=formats) for formats in made]


def resized(block: Block, option: Option) -> Block:
    """The block with the sizes and formats of an option that keeps it."""
    changes: dict[str, Any] = {**dict(option.target), "formats": option.formats}
    if kv_format_of(block) is not None:
        changes["kv_format"] = option.kv_format
    return dataclasses.replace(block, **changes)


def last_attention_must_stay(architecture: Architecture) -> list[int]:
    """Blocks of which one at least must survive: caches and position need an attention block."""
    return [n for n, block in enumerate(architecture.blocks) if cached(block)]
