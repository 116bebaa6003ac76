"""What of a model decides the work on it: weights by layer and outside, and widths; no torch."""

from dataclasses import dataclass
from math import prod

from compress.model.architecture import (
    Architecture,
    Attention,
    Block,
    DeltaNet,
    Ffn,
    Mamba,
    Mla,
    ShortConv,
    sizes,
)
from compress.model.families import parameters
from compress.model.layout import Parameter

# Numbers kept for a backward pass for each that a matrix reads or gives.
KEPT = 2
# Positions of a chunk of a scan, Mamba's or the delta rule's, which has that many numbers per head
# and token, thrice.
SCAN_CHUNK, SCAN_ARRAYS = 64, 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a model decides its work: weights by layer and outside, and widths.

    Of what takes a number format in the blocks ``widest`` is the largest number of inputs,
    ``together`` the weights that are rounded at once, ``columns`` the sum of weights times inputs.
    """

    layers: tuple[int, ...]
    outside: int
    hidden: int
    vocab: int
    units: int
    active: int
    activations: tuple[int, ...]
    widest: int
    together: int
    columns: int

    @property
    def weights(self) -> int:
        """All weights."""
        return sum(self.layers) + self.outside

    @property
    def largest(self) -> int:
        """Weights of the largest part that is brought in at once."""
        return max(*self.layers, self.outside)


def sizes_of(architecture: Architecture) -> Sizes:
    """The sizes of a model."""
    blocks = architecture.blocks
    layers, kept = [0] * architecture.layers, [0] * architecture.layers
    outside, active, columns = 0, 0.0, 0
    groups: dict[tuple[int, str, int | None], list[Parameter]] = {}
    for each in parameters(architecture):
        if each.block is None:
            outside += each.count
            continue
        block = blocks[each.block]
        used = 1.0 if each.expert is None else getattr(block, "top_k", 1) / sizes(block)["expert"]
        layers[block.layer] += each.count
        active += each.count * used
        if each.slot.fused:
            groups.setdefault((each.block, each.slot.fused, each.expert), []).append(each)
            columns += each.count * each.shape[-1]
        if len(each.shape) > 1:
            kept[block.layer] += round(KEPT * (each.shape[0] + each.shape[-1]) * used)
    for block in blocks:
        if isinstance(block, Mamba):
            kept[block.layer] += SCAN_ARRAYS * SCAN_CHUNK * block.group * block.head
        elif isinstance(block, DeltaNet):
            kept[block.layer] += SCAN_ARRAYS * SCAN_CHUNK * block.key_head * block.value
    return Sizes(
        layers=tuple(layers), outside=outside, hidden=architecture.hidden,
        vocab=architecture.vocab, units=architecture.hidden + sum(map(units_of, blocks)),
        active=round(active), activations=tuple(kept),
        widest=max(each.shape[-1] for own in groups.values() for each in own),
        together=max(sum(each.count for each in own) for own in groups.values()), columns=columns,
    )  # fmt: skip


def units_of(block: Block) -> int:
    """About how many units of a block have contributions of their own."""
    own = sizes(block)
    if isinstance(block, Attention):
        return own["kv_head"] * own["query"]
    if isinstance(block, Mla):
        return own["query"]
    if isinstance(block, Ffn):
        return own["ffn"]
    if isinstance(block, Mamba):
        return prod(own[axis] for axis in ("group", "head", "channel"))
    if isinstance(block, ShortConv):
        return own["inner"]
    if isinstance(block, DeltaNet):
        return prod(own[axis] for axis in ("key_head", "value", "value_dim"))
    return own["expert"] * own["expert_ffn"] + own.get("shared_ffn", 0) + own.get("latent", 0)
