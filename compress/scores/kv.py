"""What number formats of KV caches cost, block by block, measured."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from compress.formats.kv import with_kv_format
from compress.formats.table import KV_FORMATS, KvFormat
from compress.model.architecture import block_name
from compress.model.modules import attention_of
from compress.scores.contributions import Progress
from compress.scores.replay import NEVER, Stop, Variant, replayed
from compress.sweep.stack import Stack


def kv_costs(
    stack: Stack,
    tokens: Tensor,
    stop: Stop = NEVER,
    progress: Progress = lambda done, total: None,
    known: Path | None = None,
) -> dict[str, float]:
    """KL of storing each block's cache in a format by ``layers.3.attention/fp8``, nats per token.

    That of all caches in the format together, shared out by what each costs alone: alone they are
    small enough for the noise of BF16 arithmetic to count in every one. Arguments are those of
    ``replayed``, which carries all of them along at once.
    """
    numbers = list(stack.architecture.kv_formats)
    if not numbers:
        return {}
    names = [block_name(stack.architecture.blocks[number]) for number in numbers]
    variants: dict[str, Variant] = {}
    for format in KV_FORMATS[1:]:
        variants[format] = variant(stack, numbers, format)
        variants |= {
            f"{name}/{format}": variant(stack, [number], format)
            for name, number in zip(names, numbers, strict=True)
        }
    found = replayed(stack, tokens, variants, stop, progress, known)
    means = {name: float(kl.mean()) for name, kl in found.items()}
    costs: dict[str, float] = {}
    for format in KV_FORMATS[1:]:
        alone = {f"{name}/{format}": means[f"{name}/{format}"] for name in names}
        # Without a cache that costs anything there is nothing to share out.
        share = means[format] / (sum(alone.values()) or 1.0)
        costs |= {name: share * cost for name, cost in alone.items()}
    return costs


def variant(stack: Stack, numbers: Sequence[int], kv_format: KvFormat) -> Variant:
    """The teacher with the caches of these blocks in a format."""
    blocks = [stack.architecture.blocks[number] for number in numbers]
    return Variant(
        {block.layer: partial(with_kv_format, attention_of(stack.model, block), kv_format)
         for block in blocks}
    )  # fmt: skip
