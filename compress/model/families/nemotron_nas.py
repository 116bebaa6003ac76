"""Nemotron-NAS (DeciLM): llama layers of sizes of their own, as Puzzle found them, or of one half.

transformers has no class for it: it is computed by llama's. Students are ``compress`` checkpoints.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Attention, Block, Ffn
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config, by_layer, heads_wide
from compress.model.families.llama import LLAMA
from compress.model.families.settings import Kind

BLOCKS = "block_configs"
# Widths that a multiplier gives are rounded up to a multiple of this.
WIDTH = 256
TABLES = Kind(
    "a list of tables of attention and ffn",
    lambda value: (
        settings.is_list(value, of=dict)
        and all(isinstance(each.get(half), dict) for each in value for half in ("attention", "ffn"))
    ),
)
READS = shared.READS | {BLOCKS: TABLES, "intermediate_size": settings.SIZE.or_null}
# What a half may be that llama's classes do not compute.
REFUSED = (
    *("replace_with_linear", "num_sink_tokens", "window_length", "sparsify", "unshifted_sink"),
    *("use_prefill_window_in_sink_attention", "moe", "mamba", "llama4"),
)
SWITCH = {"no_op": settings.SWITCH}
WRITTEN = SWITCH | {"n_heads_in_group": settings.SIZE.or_null}
FFN = SWITCH | {
    "intermediate_size": settings.SIZE.or_null,
    "ffn_mult": settings.POSITIVE.or_null,
    "hidden_act": settings.ACTIVATION.or_null,
}


def read(config: Config) -> Architecture:
    """Architecture of a config; halves that are left out are no blocks."""
    layers, listed = config["num_hidden_layers"], config[BLOCKS]
    if len(listed) != layers:
        raise InputError(f"{BLOCKS} lists {len(listed)} layers, num_hidden_layers is {layers}")
    alike = shared.read({**config, "num_key_value_heads": None, "intermediate_size": 1}, FAMILY)
    blocks = [sized(block, config, listed[block.layer]) for block in alike.blocks]
    kept = tuple(block for block in blocks if block is not None)
    if missing := set(range(layers)) - {block.layer for block in kept}:
        raise InputError(f"layer {min(missing)} of {BLOCKS} has neither attention nor ffn")
    return replace(alike, blocks=kept)


def sized(block: Block, config: Config, layer: Mapping[str, Any]) -> Block | None:
    """A block with the sizes of its layer's entry; None where that leaves it out.

    InputError on what llama's classes do not compute.
    """
    own = layer[block.kind]
    settings.require(own, FFN if isinstance(block, Ffn) else WRITTEN)
    if refused := [key for key in REFUSED if own.get(key)]:
        raise InputError(f"{block.kind} of layer {block.layer} has {refused[0]}: not supported")
    if own.get("no_op"):
        return None
    if isinstance(block, Attention):
        heads, query = config["num_attention_heads"], own.get("n_heads_in_group")
        if query is None or heads % query:
            raise InputError(
                f"n_heads_in_group {query} does not divide num_attention_heads {heads}"
            )
        return replace(block, kv_head=heads // query, query=query)
    if own.get("hidden_act") not in (None, config.get("hidden_act", "silu")):
        raise InputError(f"ffn of layer {block.layer} has a hidden_act of its own: not supported")
    width, times = own.get("intermediate_size"), own.get("ffn_mult")
    if width is None and times is None:
        raise InputError(f"ffn of layer {block.layer} has neither intermediate_size nor ffn_mult")
    if width is None:
        width = -(-int(2 * times * config["hidden_size"] / 3) // WIDTH) * WIDTH
    assert isinstance(block, Ffn)
    return replace(block, ffn=width)


def lists(architecture: Architecture) -> dict[str, Any]:
    """The sizes of every layer."""

    def entry(blocks: list[Block]) -> dict[str, dict[str, Any]]:
        halves: dict[str, dict[str, Any]] = {"attention": {"no_op": True}, "ffn": {"no_op": True}}
        for block in blocks:
            wide = {"n_heads_in_group": block.query} if isinstance(block, Attention) else {}
            wide |= {"intermediate_size": block.ffn} if isinstance(block, Ffn) else {}
            halves[block.kind] = {"no_op": False, **wide}
        return halves

    return {BLOCKS: by_layer(architecture, entry)}


def taken(own: dict[str, Any]) -> dict[str, Any]:
    """What llama's config class takes."""
    return heads_wide({key: value for key, value in own.items() if key != BLOCKS})


FAMILY = "nemotron-nas"
NEMOTRON_NAS = replace(
    LLAMA,
    model_type=FAMILY,
    reads=READS,
    read=read,
    lists=lists,
    taken=taken,
    classes="llama",
    stock=lambda _: False,
)
