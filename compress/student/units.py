"""What a block is made of: the axes it can lose, and its finest units."""

from collections.abc import Mapping, Sequence

from compress.model.architecture import Block, block_name

# The finest units a block can lose, as the axes of their array; coarser ones are sums of these.
UNITS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "attention": (("kv_head", "query"),),
    "ffn": (("ffn",),),
    "mamba": (("group", "head", "channel"),),
    "moe": (("expert", "expert_ffn"), ("shared_ffn",)),
}


# Last axes of unit arrays whose units are one number per token each; a query head is many.
SCALARS = ("ffn", "shared_ffn", "expert_ffn", "channel")


def unit_key(block: Block, axes: Sequence[str]) -> str:
    """Name of a unit array: ``layers.7.attention/kv_head.query``."""
    return f"{block_name(block)}/{'.'.join(axes)}"


def units_of(product: Sequence[str], block: Block) -> tuple[str, ...] | None:
    """The unit array that a product of axes belongs to: the one with an axis that can be cut."""
    for axes in UNITS[block.kind]:
        if any(axis in AXES[block.kind] and axis in axes for axis in product):
            return axes
    return None


# Which sizes are indices into the teacher's axis, and so may shrink.
AXES: Mapping[str, tuple[str, ...]] = {
    "attention": ("kv_head", "query"),
    "ffn": ("ffn",),
    "moe": ("expert", "expert_ffn", "shared_ffn"),
    "mamba": ("head", "channel"),
}
