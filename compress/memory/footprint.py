"""Exact bytes of a model as served: weights, KV cache, states and workspace; no torch.

::

    weights    = sum over tensors of elements * bytes in its format + scales; tied embeddings once
    KV cache   = sum over attention blocks of numbers * bytes * tokens * batch,
                numbers = 2 * kv_head * head_dim, of latent attention kv_rank + rope_dim
    SSM state  = sum over Mamba blocks of group * head * channel * state * bytes * batch
               + sum over delta nets of key_head * value * key_dim * value_dim * bytes * batch
    conv state = sum over these of channels * (kernel - 1) * 2 * batch,
                channels = group * head * channel + 2 * group * state
                        or key_head * value * value_dim + 2 * key_head * key_dim
                        or of a short convolution inner
    MTP        = the same of layers that predict further tokens, in BF16
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Literal

from compress.formats.table import FORMATS, KV_BYTES, KV_FORMATS, KV_SCALE_BYTES, Format
from compress.model.architecture import (
    Architecture,
    Block,
    DeltaNet,
    Mamba,
    ShortConv,
    cached,
    group_format,
    kv_format_of,
    sizes,
    window,
)
from compress.model.families import experts_of, family_of, linear_groups, outside
from compress.model.layout import Slot, shape

SsmFormat = Literal["fp32", "bf16"]

BF16_BYTES = 2
FP32_BYTES = 4
SSM_BYTES: dict[SsmFormat, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How a model is served; KV formats belong to the architecture."""

    context: int
    batch_size: int = 1
    ssm_format: SsmFormat = "fp32"
    workspace_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a deployed model, by what they hold.

    ``mtp`` are weights and caches of layers that predict further tokens; the others are without.
    """

    weights: int
    kv_cache: int
    ssm_state: int
    conv_state: int
    workspace: int
    mtp: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        held = self.kv_cache + self.ssm_state + self.conv_state
        return self.weights + held + self.workspace + self.mtp


def tensor_bytes(slot: Slot, dimensions: tuple[int, ...], format: Format = "bf16") -> int:
    """Bytes of one tensor on disk."""
    if slot.float32:
        return prod(dimensions) * FP32_BYTES
    return FORMATS[format].bytes(dimensions)


# A search asks for the same few hundred blocks hundreds of thousands of times.
@lru_cache(maxsize=2**16)
def block_bytes(block: Block, hidden: int, family: str) -> int:
    """Bytes of the weights of one block in its formats, with the scales of its KV cache."""
    axis_sizes = {"hidden": hidden} | sizes(block)
    kv_format = kv_format_of(block)
    beside = 0 if kv_format is None else KV_SCALE_BYTES[kv_format]
    return beside + sum(
        len(experts_of(name, block))
        * tensor_bytes(slot, shape(slot.shape, axis_sizes), group_format(block, slot.fused))
        for name, slot in family_of(family).tensors(block).items()
    )


def group_bytes(block: Block, group: str, hidden: int, family: str, format: Format) -> int:
    """Bytes of the weights of a linear group of a block in a format."""
    axis_sizes = {"hidden": hidden} | sizes(block)
    return sum(
        len(experts_of(name, block)) * FORMATS[format].bytes(shape(slot.shape, axis_sizes))
        for name, slot in family_of(family).tensors(block).items()
        if slot.fused == group
    )


@lru_cache(maxsize=2**16)
def group_takes(block: Block, group: str, hidden: int, family: str, format: Format) -> bool:
    """Whether every weight of a linear group of a block can be stored in the format."""
    axis_sizes = {"hidden": hidden} | sizes(block)
    return all(
        FORMATS[format].takes(shape(slot.shape, axis_sizes))
        for slot in family_of(family).tensors(block).values()
        if slot.fused == group
    )


def block_takes(block: Block, hidden: int, family: str, format: Format) -> bool:
    """Whether every linear group of a block can be stored in the format."""
    groups = linear_groups(block, family)
    return all(group_takes(block, group, hidden, family, format) for group in groups)


def outside_bytes(architecture: Architecture) -> int:
    """Bytes of the tensors outside the blocks: embedding, head unless tied, final norm."""
    axis_sizes = {"hidden": architecture.hidden, "vocab": architecture.vocab}
    formats = dict(architecture.outside_formats)
    return sum(
        tensor_bytes(slot, shape(slot.shape, axis_sizes), formats.get(slot.fused or "", "bf16"))
        for _, slot in outside(architecture)
    )


def weight_bytes(architecture: Architecture) -> int:
    """Bytes of all tensors of a model, file headers not counted."""
    hidden, family = architecture.hidden, architecture.family
    inside = sum(block_bytes(block, hidden, family) for block in architecture.blocks)
    return outside_bytes(architecture) + inside


def mtp_weight_bytes(architecture: Architecture) -> int:
    """Bytes of the tensors of layers that predict further tokens, which stay in BF16."""
    outside = {"hidden": architecture.hidden, "vocab": architecture.vocab}
    return sum(
        len(experts_of(name, block))
        * tensor_bytes(slot, shape(slot.shape, outside | (sizes(block) if block else {})))
        for _, table, block in family_of(architecture.family).mtp(architecture)
        for name, slot in table.items()
    )


def mtp_bytes(architecture: Architecture, served: Deployment) -> int:
    """Bytes of layers that predict further tokens, with what each holds of the tokens."""
    held = (state_bytes(block, served) for block in architecture.mtp)
    return mtp_weight_bytes(architecture) + sum(map(sum, held))


def state_bytes(block: Block, served: Deployment) -> tuple[int, int, int]:
    """Bytes of one block's keys and values, recurrent state and convolution state.

    A window limits the tokens held; of the convolution servers hold kernel - 1 columns.
    """
    cache = recurrent = conv = 0
    if numbers := cached(block):
        tokens = min(served.context, window(block) or served.context)
        cache = numbers * KV_BYTES[kv_format_of(block) or KV_FORMATS[0]] * tokens
    elif isinstance(block, Mamba):
        channels = block.group * block.head * block.channel
        recurrent = channels * block.state * SSM_BYTES[served.ssm_format]
        conv = (channels + 2 * block.group * block.state) * (block.kernel - 1) * BF16_BYTES
    elif isinstance(block, DeltaNet):
        channels = block.key_head * block.value * block.value_dim
        recurrent = channels * block.key_dim * SSM_BYTES[served.ssm_format]
        conv = (channels + 2 * block.key_head * block.key_dim) * (block.kernel - 1) * BF16_BYTES
    elif isinstance(block, ShortConv):
        conv = block.inner * (block.kernel - 1) * BF16_BYTES
    return cache * served.batch_size, recurrent * served.batch_size, conv * served.batch_size


def footprint(architecture: Architecture, deployment: Deployment) -> Footprint:
    """Bytes that serving the model takes."""
    held = [state_bytes(block, deployment) for block in architecture.blocks]
    return Footprint(
        weights=weight_bytes(architecture),
        kv_cache=sum(cache for cache, _, _ in held),
        ssm_state=sum(recurrent for _, recurrent, _ in held),
        conv_state=sum(conv for _, _, conv in held),
        workspace=deployment.workspace_bytes,
        mtp=mtp_bytes(architecture, deployment),
    )


def largest_context(
    architecture: Architecture, deployment: Deployment, budget_bytes: int
) -> int | None:
    """The longest context whose footprint is within the budget.

    0 if not even the weights fit; None if the cache stops growing (no attention block, or windows
    only) and it fits, so that no context is too long.
    """

    def total(context: int) -> int:
        return footprint(architecture, replace(deployment, context=context)).total

    every = (*architecture.blocks, *architecture.mtp)
    windows = [window(block) for block in every if cached(block)]
    longest_window = max((each or 0 for each in windows), default=0)
    if all(windows) and total(longest_window) <= budget_bytes:
        return None
    # Bisection, because windows make the growth piecewise linear. A token takes at least a byte.
    low, high = 0, budget_bytes + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= budget_bytes else (low, middle)
    return low


def largest_batch(
    architecture: Architecture, deployment: Deployment, budget_bytes: int
) -> int | None:
    """The most sequences of the deployment's context whose footprint is within the budget.

    0 if not even one fits; None if a sequence takes no memory, so that no batch is too large.
    """
    one, none = (
        footprint(architecture, replace(deployment, batch_size=count)).total for count in (1, 0)
    )
    if one == none and one <= budget_bytes:
        return None
    return max(0, (budget_bytes - none) // max(1, one - none))
