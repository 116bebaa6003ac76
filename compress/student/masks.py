"""The gated teacher: a student's structure as masks on its teacher, equal to the cut on every axis.

Dead units are computed and then multiplied by zero, so that a gradient still says what bringing
them back would change. Experts that are gone are never routed to; theirs has no gradient.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.architecture import Architecture, Block, Mamba, Moe, block_name, sizes
from compress.model.modules import final_norm, mixer_of, norm_of
from compress.student.candidate import block_keep

BIAS = "e_score_correction_bias"


def alive(block: Block, axes: Sequence[str], keep: Mapping[str, Tensor]) -> Tensor:
    """Mask over a unit array: 1 where the unit is kept."""
    axis_sizes = sizes(block)
    mask = torch.ones([axis_sizes[axis] for axis in axes])
    if isinstance(block, Mamba):
        if "head" in keep:
            mask *= torch.zeros(mask.shape[:2]).scatter_(1, keep["head"], 1)[..., None]
        if "channel" in keep:
            mask *= torch.zeros(mask.shape[2]).index_fill_(0, keep["channel"], 1)
        return mask
    outer, inner = (axes[0], axes[-1]) if len(axes) > 1 else (None, axes[0])
    parents = keep.get(outer) if outer else None
    if inner in keep and outer is None:
        return torch.zeros_like(mask).index_fill_(0, keep[inner], 1)
    if inner in keep:
        rows = torch.arange(len(mask)) if parents is None else parents
        mask = torch.zeros_like(mask)
        mask[rows] = mask[rows].scatter(1, keep[inner], 1)
    elif parents is not None:
        mask = torch.zeros_like(mask).index_fill_(0, parents, 1)
    return mask


def is_alive(architecture: Architecture, keep: Mapping[str, Tensor], number: int) -> bool:
    """Whether a block of the teacher survives."""
    return "blocks" not in keep or number in keep["blocks"].tolist()


def unit_mask(
    architecture: Architecture, keep: Mapping[str, Tensor], number: int, axes: Sequence[str]
) -> Tensor:
    """Mask over one of a block's unit arrays; all zero where the block is gone."""
    block = architecture.blocks[number]
    if not is_alive(architecture, keep, number):
        return torch.zeros([sizes(block)[axis] for axis in axes])
    return alive(block, axes, block_keep(keep, block))


class Unmasked:
    """What masked modules were given before the mask, from their last forward."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}

    def mask(self, module: Any, values: Tensor, count: float = 1.0) -> Any:
        """Multiply a module's first input by ``values`` [features]; the handle takes it off.

        All of it is multiplied by ``count`` before.
        """

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            given = args[0] if count == 1 else args[0] * count
            self.inputs[module] = given.detach()
            return (given * values, *args[1:])

        return module.register_forward_pre_hook(hook)


@contextmanager
def masked(
    model: Any, architecture: Architecture, keep: Mapping[str, Tensor]
) -> Iterator[Unmasked]:
    """The teacher as the student of ``keep``, all but the widths of routed experts.

    Those are inside a fused module, whose forward ``gates.Taps`` replaces anyway.
    """
    unmasked, handles = Unmasked(), []
    biases: list[tuple[Tensor, Tensor]] = []
    norms = [final_norm(model), *(norm_of(model, block) for block in architecture.blocks)]
    for number, block in enumerate(architecture.blocks):
        whole = is_alive(architecture, keep, number)
        if whole and not any(key.startswith(block_name(block) + "/") for key in keep):
            continue
        mixer = mixer_of(model, block)
        for module, axes, repeat in masked_inputs(block):
            values = unit_mask(architecture, keep, number, axes).flatten()
            path, count = module, 1.0
            if isinstance(block, Mamba):
                # Surgery scales the gated norm's weight by this where fewer units are averaged;
                # before the norm it does the same, eps included. A whole block leaves none.
                path = module if whole else "out_proj"
                count = float(len(values) / values.sum()) ** 0.5 if whole else 1.0
            values = values.repeat_interleave(repeat)
            handles.append(unmasked.mask(mixer.get_submodule(path), values, count))
        if isinstance(block, Moe) and f"{block_name(block)}/expert" in keep and whole:
            bias = getattr(mixer.gate, BIAS)
            biases.append((bias, bias.clone()))
            survivors = keep[f"{block_name(block)}/expert"]
            bias[dropped(survivors, block.expert)] = -torch.inf
    if "hidden" in keep:
        kept = torch.zeros(architecture.hidden).index_fill_(0, keep["hidden"], 1)
        # Only norms read the residual stream; surgery folds their changed width (prune.cut).
        handles += [unmasked.mask(norm, kept) for norm in norms]
    try:
        yield unmasked
    finally:
        for handle in handles:
            handle.remove()
        for bias, before in biases:
            bias.copy_(before)


def masked_inputs(block: Block) -> list[tuple[str, tuple[str, ...], int]]:
    """Modules of a mixer whose input is made of units: path, unit axes, features of a unit."""
    if block.kind == "attention":
        return [("o_proj", ("kv_head", "query"), sizes(block)["head_dim"])]
    if block.kind == "ffn":
        return [("down_proj", ("ffn",), 1)]
    if block.kind == "moe":
        return [("shared_experts.down_proj", ("shared_ffn",), 1)]
    # Before the gated norm, which averages over a group's channels.
    return [("norm", ("group", "head", "channel"), 1)]


def dropped(kept: Tensor, size: int) -> Tensor:
    """Indices that are not kept."""
    return torch.ones(size, dtype=torch.bool).index_fill_(0, kept, False).nonzero().flatten()
