"""Llama: every layer is a grouped-query attention block and a gated FFN block."""

from collections.abc import Mapping
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Attention, Block, Ffn
from compress.model.families.family import Config, Family, Site
from compress.model.families.settings import (
    ACTIVATION,
    NAMES,
    NUMBER,
    REAL,
    SIZE,
    SWITCH,
    TABLE,
    TOKEN,
    TOKENS,
    optional,
    require_divides,
    require_rope,
)
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
READS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": optional(SIZE),
    "head_dim": optional(SIZE),
    "hidden_act": ACTIVATION,
    "max_position_embeddings": SIZE,
    "rms_norm_eps": REAL,
    "pad_token_id": TOKEN,
    "bos_token_id": TOKEN,
    "eos_token_id": TOKENS,
    "tie_word_embeddings": SWITCH,
    "rope_parameters": optional(TABLE),
    "rope_scaling": optional(TABLE),
    "rope_theta": NUMBER,
    "partial_rotary_factor": optional(NUMBER),
    "original_max_position_embeddings": NUMBER,
    "attention_bias": SWITCH,
    "mlp_bias": SWITCH,
    "attention_dropout": optional(NUMBER),
    "layer_types": optional(NAMES),
}


def read(config: Config) -> Architecture:
    """Architecture of a llama config; biases are not in the tables and are refused."""
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise InputError(f"{key}=true is not supported for llama models")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    # Its own key: hidden // heads is only the default.
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    require_divides(
        config,
        [("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")],
    )
    require_rope(config, head_dim)
    if not -config["vocab_size"] <= (pad := config.get("pad_token_id") or 0) < config["vocab_size"]:
        raise InputError(f"pad_token_id {pad} is beyond vocab_size {config['vocab_size']}")
    kinds = config.get("layer_types")
    if kinds is not None and len(kinds) != config["num_hidden_layers"]:
        raise InputError(
            f"layer_types lists {len(kinds)} layers, num_hidden_layers is "
            f"{config['num_hidden_layers']}"
        )
    blocks: list[Block] = []
    for layer in range(config["num_hidden_layers"]):
        blocks.append(
            Attention(
                layer=layer,
                kv_head=kv_heads,
                query=heads // kv_heads,
                head_dim=head_dim,
            )
        )
        blocks.append(Ffn(layer=layer, ffn=config["intermediate_size"], gated=True))
    return Architecture(
        family="llama",
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        tied=config.get("tie_word_embeddings", False),
        blocks=tuple(blocks),
    )


def settings(block: Block) -> dict[str, Any]:
    """Config keys that one block fixes."""
    if isinstance(block, Attention):
        return {
            "num_attention_heads": block.kv_head * block.query,
            "num_key_value_heads": block.kv_head,
            "head_dim": block.head_dim,
        }
    assert isinstance(block, Ffn)
    return {"intermediate_size": block.ffn}


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
    read=read,
    model=MODEL,
    head="lm_head.weight",
    embedding="model.embed_tokens.weight",
    layer="model.layers.{layer}.",
    tensors=lambda block: TENSORS[block.kind],
    settings=settings,
    write=write,
    modules=(
        "transformers.models.llama.modeling_llama",
        "LlamaForCausalLM",
        "LlamaDecoderLayer",
    ),
    final_norm="norm",
    sites={
        "attention": Site(mixer="self_attn", norm="input_layernorm"),
        "ffn": Site(mixer="mlp", norm="post_attention_layernorm"),
    },
)
