"""Llama: every layer is a grouped-query attention block and a gated FFN block."""

import itertools
from collections.abc import Mapping
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture
from compress.model.families import settings
from compress.model.families.family import Config, Family, Site, read_block
from compress.model.layout import Slot

MODEL = {
    "model.embed_tokens.weight": Slot(shape="vocab hidden"),
    "model.norm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "lm_head.weight": Slot(shape="vocab hidden"),
}
ATTENTION = {
    "input_layernorm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "self_attn.q_proj.weight": Slot(shape="(kv_head query head_dim) hidden", fused="qkv"),
    "self_attn.k_proj.weight": Slot(shape="(kv_head head_dim) hidden", fused="qkv"),
    "self_attn.v_proj.weight": Slot(shape="(kv_head head_dim) hidden", fused="qkv"),
    "self_attn.o_proj.weight": Slot(shape="hidden (kv_head query head_dim)", fused="o"),
}
FFN = {
    "post_attention_layernorm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "mlp.gate_proj.weight": Slot(shape="ffn hidden", fused="gate_up"),
    "mlp.up_proj.weight": Slot(shape="ffn hidden", fused="gate_up"),
    "mlp.down_proj.weight": Slot(shape="hidden ffn", fused="down"),
}
TENSORS: Mapping[str, Mapping[str, Slot]] = {"attention": ATTENTION, "ffn": FFN}
READS = (
    settings.COMMON
    | dict.fromkeys(("num_key_value_heads", "head_dim"), settings.SIZE.or_null)
    | dict.fromkeys(("rope_parameters", "rope_scaling"), settings.TABLE.or_null)
    | dict.fromkeys(("partial_rotary_factor", "attention_dropout"), settings.NUMBER.or_null)
    | dict.fromkeys(("rope_theta", "original_max_position_embeddings"), settings.NUMBER)
    | {
        "num_hidden_layers": settings.SIZE,
        "hidden_act": settings.ACTIVATION,
        "rms_norm_eps": settings.REAL,
        "attention_bias": settings.SWITCH,
        "layer_types": settings.NAMES.or_null,
    }
)


def read(config: Config) -> Architecture:
    """Architecture of a llama config."""
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    # Its own key: hidden // heads is only the default.
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    settings.require_divides(config, ("hidden_size", "num_attention_heads"))
    settings.require_divides(config, ("num_attention_heads", "num_key_value_heads"))
    settings.require_rope(config, head_dim)
    if not -config["vocab_size"] <= (pad := config.get("pad_token_id") or 0) < config["vocab_size"]:
        raise InputError(f"pad_token_id {pad} is beyond vocab_size {config['vocab_size']}")
    kinds = config.get("layer_types")
    if kinds is not None and len(kinds) != layers:
        raise InputError(f"layer_types lists {len(kinds)} layers, num_hidden_layers is {layers}")
    kv_heads = config.get("num_key_value_heads") or heads
    whole = {**config, "head_dim": head_dim, "num_key_value_heads": kv_heads}
    places = itertools.product(range(layers), ("attention", "ffn"))
    return Architecture(
        family="llama",
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        tied=config.get("tie_word_embeddings", False),
        blocks=tuple(read_block(whole, kind, layer, gated=True) for layer, kind in places),
    )


def write(config: Config, student: Architecture) -> dict[str, Any]:
    """Config keys of the whole student; the norm's eps follows a hidden cut (cut equals mask)."""
    return {
        "hidden_size": student.hidden,
        "num_hidden_layers": student.layers,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6) * config["hidden_size"] / student.hidden,
    }


LLAMA = Family(
    model_type="llama",
    normal=dict,
    reads=READS,
    refused={"attention_bias": True, "mlp_bias": True},
    read=read,
    model=MODEL,
    head="lm_head.weight",
    embedding="model.embed_tokens.weight",
    layer="model.layers.{layer}.",
    tensors=lambda block: TENSORS[block.kind],
    write=write,
    modules=("transformers.models.llama.modeling_llama", "LlamaForCausalLM", "LlamaDecoderLayer"),
    final_norm="norm",
    sites={
        "attention": Site(mixer="self_attn", norm="input_layernorm"),
        "ffn": Site(mixer="mlp", norm="post_attention_layernorm"),
    },
)
