"""KV-cache formats: attention that reads its keys and values as an FP8 cache would give them.

E4M3 with scale 1, which is what servers use for a checkpoint without KV scales; values beyond 448
saturate. Keys are rounded after RoPE, as they are stored; of latent attention the latent is, which
keys and values are made from, and the keys with positions that heads share.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from compress.formats.fp8 import E4M3_MAX
from compress.formats.table import KvFormat

# What transformers is to call the attention over a cache of each format, by what it calls the one
# that a model has without a decision: where there are sinks it is the model code's own.
ATTENTION: Mapping[str, Mapping[KvFormat, str]] = {
    "sdpa": {"bf16": "sdpa", "fp8": "compress_kv_fp8"},
    "eager": {"bf16": "eager", "fp8": "compress_kv_fp8_eager"},
}
# The method with which latent attention there makes keys and values from what a cache holds.
EXPAND = "expand_kv"


def stored(x: Tensor) -> Tensor:
    """A key or value after a round trip through the FP8 cache; the gradient passes straight on."""
    rounded = x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    return x + (rounded - x).detach()


def fp8_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over FP8 keys and values."""
    return sdpa_attention_forward(module, query, stored(key), stored(value), *others, **options)


def fp8_eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """The attention of a layer's own model code over FP8 keys and values."""
    own: Callable[..., tuple[Tensor, Tensor]] = sys.modules[
        type(module).__module__
    ].eager_attention_forward
    return own(module, query, stored(key), stored(value), *others, **options)


def set_kv_format(model: Any, kv_format: KvFormat) -> None:
    """Make every attention layer of the model read its cache in a format."""
    # The masks have to be registered under the same names, or padding is ignored without a word.
    AttentionInterface.register(ATTENTION["sdpa"]["fp8"], fp8_attention)
    AttentionMaskInterface.register(ATTENTION["sdpa"]["fp8"], sdpa_mask)
    AttentionInterface.register(ATTENTION["eager"]["fp8"], fp8_eager)
    AttentionMaskInterface.register(ATTENTION["eager"]["fp8"], eager_mask)
    for module in model.modules():
        if hasattr(module, EXPAND):
            vars(module).pop(EXPAND, None)
            if kv_format == "fp8":
                setattr(module, EXPAND, partial(expanded, getattr(module, EXPAND)))
    latent = any(hasattr(module, EXPAND) for module in model.modules())
    eager = model.config._attn_implementation in ATTENTION["eager"].values()
    attention = ATTENTION["eager" if eager else "sdpa"]["bf16" if latent else kv_format]
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = attention


def expanded(expand: Callable[..., tuple[Tensor, Tensor]], *held: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values from an FP8 cache of what they are made from."""
    return expand(*map(stored, held))
