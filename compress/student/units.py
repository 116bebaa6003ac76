"""What a block is made of: the one table of units that can go, and the weights that read them.

A kind of block is an entry here and the tables of its families; no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from compress.model.architecture import Architecture, Block, block_name, sizes
from compress.model.families import experts_of, family_of
from compress.model.layout import Product, Slot, axes, parse


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis that may shrink: its size is a number of indices into the teacher's.

    Every kept position of the axis ``within``, the one before it, has kept indices of its own;
    None: all share them. A ``width`` is rounded to what matrix products like. A ``whole`` axis does
    not shrink after all: its units say what their block is worth. ``routed`` units see
    the tokens that a router sends them and, once gone, none: no mask on what they put out cuts
    them. ``least`` and ``multiple`` name numbers of the block that bound and that divide a count.
    """

    within: str | None = None
    width: bool = False
    whole: bool = False
    routed: bool = False
    least: str | None = None
    multiple: str | None = None


@dataclass(frozen=True)
class Units:
    """The finest units that a block can lose, an array over ``axes``; coarser ones are their sums.

    ``cut`` are the axes that may shrink. ``scalar`` units are one number per token each, and number
    formats may group them along the last axis; a query head is many.
    """

    axes: tuple[str, ...]
    cut: Mapping[str, Axis] = field(hash=False)
    scalar: bool = True

    def shape(self, block: Block) -> tuple[int, ...]:
        """Sizes of the array."""
        axis_sizes = sizes(block)
        return tuple(axis_sizes[axis] for axis in self.axes)

    def others(self, axis: str) -> list[int]:
        """Dimensions, from the last, over which the units of an axis add up the finest ones."""
        own = (axis, self.cut[axis].within)
        return [at - len(self.axes) for at, name in enumerate(self.axes) if name not in own]


HIDDEN = parse("hidden")
UNITS: Mapping[str, tuple[Units, ...]] = {
    "attention": (
        Units(
            ("kv_head", "query"), {"kv_head": Axis(), "query": Axis(within="kv_head")}, scalar=False
        ),
    ),
    "mla": (Units(("query",), {"query": Axis()}, scalar=False),),
    "ffn": (Units(("ffn",), {"ffn": Axis(width=True)}),),
    "moe": (
        Units(
            ("expert", "expert_ffn"),
            {
                "expert": Axis(routed=True, least="fewest_experts", multiple="routing_group"),
                "expert_ffn": Axis(within="expert", width=True),
            },
        ),
        Units(("shared_ffn",), {"shared_ffn": Axis(width=True)}),
        # What experts read and what they put out: two numbers per token.
        Units(("latent",), {"latent": Axis(width=True)}, scalar=False),
    ),
    "mamba": (
        Units(("group", "head", "channel"), {"head": Axis(within="group"), "channel": Axis()}),
    ),
    "conv": (Units(("inner",), {"inner": Axis(whole=True)}),),
    "delta": (
        Units(
            ("key_head", "value", "value_dim"),
            {
                "key_head": Axis(),
                "value": Axis(within="key_head"),
                "value_dim": Axis(width=True),
            },
        ),
    ),
}
AXES: Mapping[str, Mapping[str, Axis]] = {
    kind: {n: axis for units in arrays for n, axis in units.cut.items() if not axis.whole}
    for kind, arrays in UNITS.items()
}


# A search asks for the same few hundred blocks hundreds of thousands of times.
@lru_cache(maxsize=2**16)
def units_in(block: Block) -> tuple[Units, ...]:
    """The unit arrays of a block; without a shared expert or a latent width it has none of it."""
    own = sizes(block)
    return tuple(units for units in UNITS[block.kind] if own.keys() >= set(units.axes))


@lru_cache(maxsize=2**16)
def axes_in(block: Block) -> Mapping[str, Axis]:
    """The axes of a block that may shrink."""
    found = (item for units in units_in(block) for item in units.cut.items())
    return {name: axis for name, axis in found if not axis.whole}


def number_of(block: Block, name: str | None) -> int:
    """A number of a block that an axis names; 1 where it names none."""
    number: int = getattr(block, name) if name else 1
    return number


def mtp_axes(architecture: Architecture) -> set[str]:
    """The axes that could shrink in layers that predict further tokens, if there are such."""
    return {axis for block in architecture.mtp for axis in axes_in(block)}


def unit_key(block: Block, units: Units) -> str:
    """Name of a unit array: ``layers.7.attention/kv_head.query``."""
    return f"{block_name(block)}/{'.'.join(units.axes)}"


def array_of(block: Block, axis: str) -> Units:
    """The unit array that an axis is one of."""
    return next(units for units in units_in(block) if axis in units.axes)


def units_of(product: Sequence[str], block: Block) -> Units | None:
    """The unit array that a product of axes belongs to: the one with an axis that can be cut."""
    return next((u for u in units_in(block) if not u.cut.keys().isdisjoint(product)), None)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """An output projection: ``name`` is its tensor's in the layer, ``key`` its Gram matrix's.

    It reads ``units`` of ``features`` numbers each. ``norm`` is the gated norm whose output it
    reads, in ``groups``, the same weight for all units of the axes ``alike``; ``after`` the
    projection that its own output goes through on its way to the residual stream, and ``post`` the
    norm behind that; None where there is none.
    """

    key: str
    name: str
    slot: Slot
    units: Units
    features: int
    expert: int | None
    norm: str | None
    groups: int
    alike: tuple[str, ...]
    after: str | None
    post: str | None

    @property
    def module(self) -> str:
        """Its module in the layer; an expert's is a part of the fused one."""
        return self.name.removesuffix(".weight")

    @property
    def averaged(self) -> str | None:
        """The module of its norm, before which dead units are zero, as it averages over them."""
        return self.norm and self.norm.removesuffix(".weight")


def read_by_experts(architecture: Architecture, block: Block) -> Units | None:
    """The units that routed experts read, where it is not the residual stream that they read."""
    table = family_of(architecture.family).tensors(block)
    columns = (
        parse(slot.shape)[-1].products[0] for name, slot in table.items() if "{expert}" in name
    )
    found = (units_of(product, block) for product in columns)
    return next((units for units in found if units and "expert" not in units.axes), None)


def projections(architecture: Architecture, block: Block) -> Iterator[Projection]:
    """The output projections of a block: the weights that read the units it can lose.

    What they put out is added to the residual stream, or goes there through another one.
    """
    table, axis_sizes = family_of(architecture.family).tensors(block), sizes(block)
    matrices = {name: parse(slot.shape) for name, slot in table.items()}
    several = len(units_in(block)) > 1 or "expert" in axis_sizes
    post = family_of(architecture.family).sites[block.kind].post
    for name, slot in table.items():
        rows, columns = matrices[name][0], matrices[name][1:]
        if not columns or (units := units_of(read := columns[0].products[0], block)) is None:
            continue
        after = next((n for n, m in matrices.items() if m == (*HIDDEN, rows)), None)
        if after is None and (rows,) != HIDDEN:
            continue
        norm = next((n for n in table if averages(table[n], read, units)), None)
        normalized = table[norm].normalizes if norm else read
        weighted = [*axes(table[norm].shape)] if norm else read
        for expert in experts_of(name, block):
            part = f"/{units.axes[-1]}" if expert is None else f"/expert.{expert}"
            yield Projection(
                key=block_name(block) + (part if several else ""),
                name=name.format(expert=expert),
                slot=slot,
                units=units,
                features=prod(axis_sizes[axis] for axis in read if axis not in units.axes),
                expert=expert,
                norm=norm,
                groups=prod(axis_sizes[axis] for axis in read if axis not in normalized),
                alike=tuple(axis for axis in units.axes if axis not in weighted),
                after=after,
                post=post and f"{post}.weight",
            )


def averages(slot: Slot, read: Product, units: Units) -> bool:
    """Whether a weight is that of a norm over units that a projection ``read`` can lose.

    A projection may read many of its outputs side by side.
    """
    [own, *others] = parse(slot.shape)
    lost = not slot.over_heads and not units.cut.keys().isdisjoint(slot.normalizes)
    return lost and not others and read[-len(own.products[0]) :] == own.products[0]
