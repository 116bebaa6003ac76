"""LFM2: short convolutions in most layers, attention in the others; a gated FFN in every one."""

from collections.abc import Sequence
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Block, Ffn, ShortConv
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config, Family, Site, by_layer, fixed_keys
from compress.model.layout import Slot

NORM = Slot(shape="hidden", normalizes=("hidden",))
HEAD_NORM = Slot(shape="head_dim", normalizes=("head_dim",))
TENSORS = {
    "attention": {
        "operator_norm.weight": NORM,
        "self_attn.q_proj.weight": Slot(shape="(kv_head query head_dim) hidden", fused="qkv"),
        "self_attn.k_proj.weight": Slot(shape="(kv_head head_dim) hidden", fused="qkv"),
        "self_attn.v_proj.weight": Slot(shape="(kv_head head_dim) hidden", fused="qkv"),
        "self_attn.out_proj.weight": Slot(shape="hidden (kv_head query head_dim)", fused="o"),
        "self_attn.q_layernorm.weight": HEAD_NORM,
        "self_attn.k_layernorm.weight": HEAD_NORM,
    },
    "conv": {
        "operator_norm.weight": NORM,
        "conv.in_proj.weight": Slot(shape="[inner | inner | inner] hidden", fused="in"),
        "conv.conv.weight": Slot(shape="inner 1 kernel"),
        "conv.out_proj.weight": Slot(shape="hidden inner", fused="out"),
    },
    "ffn": {
        "ffn_norm.weight": NORM,
        "feed_forward.w1.weight": Slot(shape="ffn hidden", fused="gate_up"),
        "feed_forward.w3.weight": Slot(shape="ffn hidden", fused="gate_up"),
        "feed_forward.w2.weight": Slot(shape="hidden ffn", fused="down"),
    },
}
SITES = {
    "attention": Site(mixer="self_attn", norm="operator_norm", pair=True),
    "conv": Site(mixer="conv", norm="operator_norm"),
    "ffn": Site(mixer="feed_forward", norm="ffn_norm"),
}
KINDS = {"conv": "conv", "full_attention": "attention"}
ADJUST = "block_auto_adjust_ff_dim"
READS = (
    {key: kind for key, kind in shared.READS.items() if key != "rms_norm_eps"}
    | dict.fromkeys(("num_key_value_heads", "conv_L_cache", "block_multiple_of"), settings.SIZE)
    | dict.fromkeys(("conv_bias", ADJUST), settings.SWITCH)
    | {
        "norm_eps": settings.REAL,
        "head_dim": settings.SIZE,
        "block_ffn_dim_multiplier": settings.POSITIVE.or_null,
        "full_attn_idxs": settings.NUMBERS.or_null,
    }
)
DEFAULTS = {
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    ADJUST: True,
}
# Older names of the same keys, which transformers takes before the own ones.
ALIASES = {"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    own: dict[str, Any] = DEFAULTS | dict(config)
    return own | {name: own.pop(alias) for alias, name in ALIASES.items() if alias in own}


def read(config: Config) -> Architecture:
    """Architecture of an LFM2 config."""
    kinds = config.get("layer_types")
    if kinds is None:
        layers, full = range(config["num_hidden_layers"]), config.get("full_attn_idxs")
        kinds = ["full_attention" if full is None or n in full else "conv" for n in layers]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"unknown layer type {unknown[0]!r}; known: {', '.join(KINDS)}")
    named = {**config, "layer_types": kinds, "intermediate_size": ffn_of(config)}
    if not named["intermediate_size"]:
        raise InputError(f"intermediate_size {config['intermediate_size']} leaves no FFN")
    return shared.read(named, "lfm2", first=lambda layer: KINDS[kinds[layer]])


def ffn_of(config: Config) -> int:
    """The width of the FFN, which a config may let the model code adjust."""
    width: int = config["intermediate_size"]
    if not config[ADJUST]:
        return width
    width = int(2 * width / 3)
    if (factor := config["block_ffn_dim_multiplier"]) is None:
        return width
    multiple: int = config["block_multiple_of"]
    return -(-int(factor * width) // multiple) * multiple


def fixed(block: Block) -> dict[str, Any]:
    """Config keys that one block fixes; the width of an FFN is then its own."""
    return fixed_keys(block) | ({ADJUST: False} if isinstance(block, Ffn) else {})


def write(config: Config, student: Architecture) -> dict[str, Any]:
    """Config keys of the whole student."""
    return {"hidden_size": student.hidden, "num_hidden_layers": student.layers}


def lists(architecture: Architecture) -> dict[str, Any]:
    """The type of every layer; one whose mixer went is attention, which hears of its tokens."""

    def kind(blocks: Sequence[Block]) -> str:
        has_conv = any(isinstance(block, ShortConv) for block in blocks)
        return "conv" if has_conv else "full_attention"

    kinds = by_layer(architecture, kind)
    full = [layer for layer, name in enumerate(kinds) if name == "full_attention"]
    return {"layer_types": kinds, "full_attn_idxs": full}


LFM2 = Family(
    model_type="lfm2",
    normal=normal,
    reads=READS,
    refused={"conv_bias": True},
    read=read,
    model={
        "model.embed_tokens.weight": Slot(shape="vocab hidden", fused="embedding"),
        "model.embedding_norm.weight": NORM,
        "lm_head.weight": Slot(shape="vocab hidden", fused="head"),
    },
    head="lm_head.weight",
    embedding="model.embed_tokens.weight",
    layer="model.layers.{layer}.",
    tensors=shared.by_kind(**TENSORS),
    write=write,
    modules=("transformers.models.lfm2.modeling_lfm2", "Lfm2ForCausalLM", "Lfm2DecoderLayer"),
    final_norm="embedding_norm",
    sites=SITES,
    fixed=fixed,
    kernels=("causal_conv1d_fn", "causal_conv1d_update"),
    lists=lists,
    whole_hidden="its convolutions have as many channels of their own, in the model code",
)
