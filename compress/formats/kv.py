"""KV-cache formats, layer by layer: attention over keys and values as their cache gives them.

E4M3 with scale 1, which is what servers use for a checkpoint without KV scales; values beyond 448
saturate. Keys are rounded after RoPE, as they are stored; of latent attention the latent is, which
keys and values are made from, and the keys with positions that heads share.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from compress.formats.fp8 import E4M3_MAX
from compress.formats.table import KV_FORMATS, KvFormat

# What transformers is to call the attention of modules that say which format their cache has, by
# what it calls the one that they have without: where there are sinks it is the model code's own.
ATTENTION: Mapping[str, str] = {"sdpa": "compress_kv", "eager": "compress_kv_eager"}
# The method with which latent attention there makes keys and values from what a cache holds.
EXPAND = "expand_kv"


def stored(x: Tensor) -> Tensor:
    """A key or value after a round trip through the FP8 cache; the gradient passes straight on."""
    rounded = x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    return x + (rounded - x).detach()


def attention_over(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over a module's keys and values in the format of its cache."""
    if format_of(module) == "fp8":
        key, value = stored(key), stored(value)
    return sdpa_attention_forward(module, query, key, value, *others, **options)


def own_attention_over(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """The attention of a layer's own model code over the same."""
    own: Callable[..., tuple[Tensor, Tensor]] = sys.modules[
        type(module).__module__
    ].eager_attention_forward
    if format_of(module) == "fp8":
        key, value = stored(key), stored(value)
    return own(module, query, key, value, *others, **options)


def format_of(attention: Any) -> KvFormat:
    """The format that an attention module reads its cache in."""
    found: KvFormat = getattr(attention, "kv_format", KV_FORMATS[0])
    return found


def set_kv_format(attention: Any, kv_format: KvFormat) -> None:
    """Make one attention module read its cache in a format."""
    # The masks have to be registered under the same names, or padding is ignored without a word.
    AttentionInterface.register(ATTENTION["sdpa"], attention_over)
    AttentionMaskInterface.register(ATTENTION["sdpa"], sdpa_mask)
    AttentionInterface.register(ATTENTION["eager"], own_attention_over)
    AttentionMaskInterface.register(ATTENTION["eager"], eager_mask)
    attention.kv_format = kv_format
    if hasattr(attention, EXPAND):
        vars(attention).pop(EXPAND, None)
        if kv_format == "fp8":
            setattr(attention, EXPAND, partial(expanded, getattr(attention, EXPAND)))
    else:
        # Layers of this config whose module says nothing go on as they did.
        before = attention.config._attn_implementation
        attention.config._attn_implementation = ATTENTION.get(before, before)


def expanded(expand: Callable[..., tuple[Tensor, Tensor]], *held: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values from an FP8 cache of what they are made from."""
    return expand(*map(stored, held))


@contextmanager
def with_kv_format(attention: Any, kv_format: KvFormat) -> Iterator[None]:
    """An attention module that reads its cache in a format for a while."""
    before = format_of(attention)
    set_kv_format(attention, kv_format)
    try:
        yield
    finally:
        set_kv_format(attention, before)
