"""Granite 4: attention or Mamba-2, then a gated FFN or experts beside a shared one, in every layer.

Embeddings, branches, attention scores and logits are multiplied by numbers of the config, none of
which depends on a width. transformers ties Mamba's width to the hidden size by a whole number
(``mamba_expand``): a student that leaves it is one whose blocks differ.
"""

from collections.abc import Mapping
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Attention, Block, Ffn, Mamba, Moe
from compress.model.families import decoder as shared
from compress.model.families import nemotron_h, settings
from compress.model.families.family import Config, Family, Site, by_layer
from compress.model.layout import Slot

MIXER_NORM = {"input_layernorm.weight": shared.ATTENTION["input_layernorm.weight"]}
MAMBA = MIXER_NORM | {
    name.replace("mixer.", "mamba."): slot
    for name, slot in nemotron_h.MAMBA.items()
    if name.startswith("mixer.")
}


def gated(width: str, fused: str) -> dict[str, Slot]:
    """The FFN that every layer has; beside experts it is the shared one."""
    reading = Slot(shape=f"[{width} | {width}] hidden", fused=f"{fused}up")
    writing = Slot(shape=f"hidden {width}", fused=f"{fused}down")
    return {
        "shared_mlp.input_linear.weight": reading,
        "shared_mlp.output_linear.weight": writing,
    }


ROUTER = Slot(shape="expert hidden", place="block_sparse_moe.router.weight")
EXPERTS = shared.experts(
    "block_sparse_moe.experts",
    reading="block_sparse_moe.input_linear.weight",
    writing="block_sparse_moe.output_linear.weight",
)
TENSORS: Mapping[str, Mapping[str, Slot]] = {
    "attention": shared.ATTENTION,
    "mamba": MAMBA,
    "ffn": shared.FFN_NORM | gated("ffn", "gate_"),
    "moe": shared.FFN_NORM
    | {"block_sparse_moe.router.layer.weight": ROUTER}
    | EXPERTS
    | gated("shared_ffn", "shared_"),
}
SECOND = "post_attention_layernorm"
SITES = {
    "attention": Site(mixer="self_attn", norm="input_layernorm", pair=True),
    "mamba": Site(mixer="mamba", norm="input_layernorm"),
    "moe": Site(
        mixer="block_sparse_moe", beside="shared_mlp", norm=SECOND, router="block_sparse_moe.router"
    ),
    "ffn": Site(mixer="shared_mlp", norm=SECOND),
}
# Types of layers as released files say them, and as transformers 5 does.
KINDS = {"mamba": "mamba", "attention": "attention"}
KINDS |= {"linear_attention": "mamba", "full_attention": "attention"}
# What else may be there, and null, are no positions.
ROPE = "rope"
SIZES = (
    *("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv"),
    *("mamba_expand", "mamba_chunk_size", "num_experts_per_tok", "shared_intermediate_size"),
)
READS = (
    shared.READS
    | dict.fromkeys(SIZES, settings.SIZE)
    | dict.fromkeys(("mamba_conv_bias", "mamba_proj_bias"), settings.SWITCH)
    | dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier"), settings.NUMBER
    )
    | {
        "logits_scaling": settings.POSITIVE,
        "num_local_experts": settings.COUNT,
        "position_embedding_type": settings.TEXT.or_null,
        "layer_types": settings.NAMES,
    }
)
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    own: dict[str, Any] = DEFAULTS | dict(config)
    if "layers_block_type" in own:
        own["layer_types"] = own.pop("layers_block_type")
    if own.get("layer_types") is None:
        depth = own.get("num_hidden_layers", 0)
        own["layer_types"] = ["mamba"] * (depth if settings.LAYERS.takes(depth) else 0)
    limits = own.pop("time_step_limit", None) or []
    # JSON has no infinity, and several ways to write it.
    if not isinstance(limits, list) or any(settings.is_number(each) and each for each in limits):
        raise InputError(f"time_step_limit {limits!r} is not supported; it is [0, infinity]")
    sizes: list[Any] = [own.get(key) for key in ("mamba_expand", "hidden_size", "mamba_n_heads")]
    if own["mamba_d_head"] == "auto" and all(map(settings.SIZE.takes, sizes)):
        expand, hidden, heads = sizes
        own["mamba_d_head"] = expand * hidden // heads
    return own


def read(config: Config) -> Architecture:
    """Architecture of a Granite 4 config."""
    listed = config["layer_types"]
    if unknown := [name for name in listed if name not in KINDS]:
        raise InputError(f"unknown layer type {unknown[0]!r}; known: {', '.join(KINDS)}")
    width = config["mamba_n_heads"] * config["mamba_d_head"]
    if width != config["mamba_expand"] * config["hidden_size"]:
        raise InputError(
            f"mamba_n_heads {config['mamba_n_heads']} of mamba_d_head {config['mamba_d_head']} are "
            f"not mamba_expand {config['mamba_expand']} of hidden_size {config['hidden_size']}"
        )
    settings.require_divides(config, ("mamba_n_heads", "mamba_n_groups"))
    routed = config["num_local_experts"] > 0
    if routed:
        settings.require_least(config, ("num_local_experts", "num_experts_per_tok"))
    named = {
        **config,
        "intermediate_size": config["intermediate_size"] if routed else config[DENSE],
        "rope": config.get("position_embedding_type") == ROPE,
        "n_groups": config["mamba_n_groups"],
        "mamba_num_heads": config["mamba_n_heads"],
        "mamba_head_dim": config["mamba_d_head"],
        "ssm_state_size": config["mamba_d_state"],
        "conv_kernel": config["mamba_d_conv"],
        "n_routed_experts": config["num_local_experts"],
        "moe_intermediate_size": config["intermediate_size"] if routed else 0,
        "moe_shared_expert_intermediate_size": config[DENSE],
    }
    return shared.read(
        named,
        "granitemoehybrid",
        first=lambda layer: KINDS[listed[layer]],
        second=lambda layer: "moe" if routed else "ffn",
    )


DENSE = "shared_intermediate_size"


def fixed(block: Block) -> dict[str, Any]:
    """Config keys that one block fixes."""
    if isinstance(block, Attention):
        heads = {"num_attention_heads": block.kv_head * block.query}
        return heads | {"num_key_value_heads": block.kv_head, "head_dim": block.head_dim}
    if isinstance(block, Mamba):
        return {"mamba_n_heads": block.group * block.head, "mamba_d_head": block.channel}
    if isinstance(block, Moe):
        experts = {"num_local_experts": block.expert, "intermediate_size": block.expert_ffn}
        return experts | {DENSE: block.shared_ffn}
    assert isinstance(block, Ffn), "a kind of block that no table has"
    return {DENSE: block.ffn}


def write(config: Config, student: Architecture) -> dict[str, Any]:
    """Config keys of the whole student; without Mamba its width is the hidden size."""
    mamba = next((block for block in student.blocks if isinstance(block, Mamba)), None)
    if mamba is None:
        sizes = {"mamba_n_heads": 1, "mamba_d_head": student.hidden, "mamba_n_groups": 1}
        return shared.write(config, student) | sizes | {"mamba_expand": 1}
    expand = max(1, width_of(mamba) // student.hidden)
    return shared.write(config, student) | {"mamba_expand": expand}


def width_of(mamba: Mamba) -> int:
    """Channels of all heads."""
    return mamba.group * mamba.head * mamba.channel


def lists(architecture: Architecture) -> dict[str, Any]:
    """The type of every layer; one whose mixer went is attention, which hears of its tokens."""

    def kind(blocks: list[Block]) -> str:
        return "mamba" if any(isinstance(block, Mamba) for block in blocks) else "attention"

    return {"layer_types": by_layer(architecture, kind)}


def stock(architecture: Architecture) -> bool:
    """Whether Mamba blocks are a whole number of hidden sizes wide, and heads fill that size.

    Servers read no ``head_dim`` (vLLM takes the hidden size by the number of heads).
    """
    mambas = (block for block in architecture.blocks if isinstance(block, Mamba))
    whole = not any(width_of(block) % architecture.hidden for block in mambas)
    return whole and shared.heads_fill(architecture)


def taken(own: dict[str, Any]) -> dict[str, Any]:
    """Settings with a hidden size that is Mamba's width, which the config class wants."""
    width = own["mamba_n_heads"] * own["mamba_d_head"]
    return own | {"hidden_size": width, "mamba_expand": 1}


def settled(config: Any) -> None:
    """Make Mamba as wide as its heads: ``int(mamba_expand * hidden_size)`` in the model code."""
    width = config.mamba_n_heads * config.mamba_d_head
    # Past the class' check of types, and half a channel more, so that no rounding takes one.
    vars(config)["mamba_expand"] = (width + 0.5) / config.hidden_size


MODULE = "transformers.models.granitemoehybrid.modeling_granitemoehybrid"
GRANITEMOEHYBRID = Family(
    model_type="granitemoehybrid",
    normal=normal,
    reads=READS,
    refused={"attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False},
    read=read,
    model=shared.MODEL,
    head="lm_head.weight",
    embedding="model.embed_tokens.weight",
    layer="model.layers.{layer}.",
    tensors=shared.by_kind(**TENSORS),
    write=write,
    modules=(MODULE, "GraniteMoeHybridForCausalLM", "GraniteMoeHybridDecoderLayer"),
    final_norm="norm",
    sites=SITES,
    fixed=fixed,
    kernels=nemotron_h.NEMOTRON_H.kernels,
    lists=lists,
    stock=stock,
    taken=taken,
    settled=settled,
)
