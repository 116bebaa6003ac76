"""Where weights, experts, head and norms sit in a torch model."""

from typing import Any

from torch import Tensor

from compress.model.architecture import Architecture, Block, Moe
from compress.model.families import family_of
from compress.model.layout import Slot


def weights_of(
    model: Any, architecture: Architecture, block: Block
) -> dict[str, tuple[Tensor, Slot]]:
    """The block's quantizable weights [out, in] with their slots, by module name in the layer."""
    layer = model.model.layers[block.layer]
    found = {
        name: (layer.get_submodule(name).weight, slot)
        for name, slot in slots_of(architecture, block, experts=False).items()
    }
    if isinstance(block, Moe):
        for name, slot in slots_of(architecture, block, experts=True).items():
            path, _, matrix = name.partition(".{expert}.")
            stacked = getattr(layer.get_submodule(path), matrix)
            for expert in range(block.expert):
                found[name.format(expert=expert)] = (stacked[expert], slot)
    return found


def slots_of(architecture: Architecture, block: Block, *, experts: bool) -> dict[str, Slot]:
    """The block's quantizable weights by module name in the layer: the experts' or all others."""
    table = family_of(architecture.family).tensors(block)
    return {
        name.removesuffix(".weight"): slot
        for name, slot in table.items()
        if slot.fused is not None and ("{expert}" in name) == experts
    }
