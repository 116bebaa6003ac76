"""Nemotron-H: every layer is one block: Mamba-2, attention, squared-ReLU FFN or MoE."""

from collections.abc import Mapping
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Attention, Block, Ffn, Mamba, Moe
from compress.model.families.family import Config, Family, Site
from compress.model.layout import Slot

NORM = {"norm.weight": Slot(shape="hidden", normalizes=("hidden",))}
MODEL = {
    "backbone.embeddings.weight": Slot(shape="vocab hidden"),
    "backbone.norm_f.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "lm_head.weight": Slot(shape="vocab hidden"),
}
ATTENTION = NORM | {
    "mixer.q_proj.weight": Slot(shape="(kv_head query head_dim) hidden", fused="qkv"),
    "mixer.k_proj.weight": Slot(shape="(kv_head head_dim) hidden", fused="qkv"),
    "mixer.v_proj.weight": Slot(shape="(kv_head head_dim) hidden", fused="qkv"),
    "mixer.o_proj.weight": Slot(shape="hidden (kv_head query head_dim)", fused="o"),
}
FFN = NORM | {
    "mixer.up_proj.weight": Slot(shape="ffn hidden", fused="up"),
    "mixer.down_proj.weight": Slot(shape="hidden ffn", fused="down"),
}
ZXBCDT = (
    "[(group head channel) | (group head channel) | (group state) | (group state) | (group head)]"
)
XBC = "[(group head channel) | (group state) | (group state)]"
MAMBA = NORM | {
    "mixer.A_log": Slot(shape="(group head)"),
    "mixer.D": Slot(shape="(group head)"),
    "mixer.dt_bias": Slot(shape="(group head)"),
    "mixer.conv1d.weight": Slot(shape=f"{XBC} 1 kernel"),
    "mixer.conv1d.bias": Slot(shape=XBC),
    "mixer.in_proj.weight": Slot(shape=f"{ZXBCDT} hidden", fused="in"),
    "mixer.norm.weight": Slot(shape="(group head channel)", normalizes=("head", "channel")),
    "mixer.out_proj.weight": Slot(shape="hidden (group head channel)", fused="out"),
}
ROUTER = {
    "mixer.gate.weight": Slot(shape="expert hidden"),
    "mixer.gate.e_score_correction_bias": Slot(shape="expert", float32=True),
}
SHARED_EXPERT = {
    "mixer.shared_experts.up_proj.weight": Slot(shape="shared_ffn hidden", fused="shared_up"),
    "mixer.shared_experts.down_proj.weight": Slot(shape="hidden shared_ffn", fused="shared_down"),
}
UP, DOWN = "mixer.experts.{expert}.up_proj.weight", "mixer.experts.{expert}.down_proj.weight"
MOE = (
    NORM
    | ROUTER
    | SHARED_EXPERT
    | {
        UP: Slot(shape="expert_ffn hidden", fused="experts_up"),
        DOWN: Slot(shape="hidden expert_ffn", fused="experts_down"),
    }
)
LATENT_MOE = (
    NORM
    | ROUTER
    | SHARED_EXPERT
    | {
        "mixer.fc1_latent_proj.weight": Slot(shape="latent hidden"),
        "mixer.fc2_latent_proj.weight": Slot(shape="hidden latent"),
        UP: Slot(shape="expert_ffn latent", fused="experts_up"),
        DOWN: Slot(shape="latent expert_ffn", fused="experts_down"),
    }
)
TENSORS: Mapping[str, Mapping[str, Slot]] = {"attention": ATTENTION, "ffn": FFN, "mamba": MAMBA}
KINDS = {
    "M": "mamba", "mamba": "mamba", "mamba2": "mamba", "linear_attention": "mamba",
    "*": "attention", "attention": "attention", "full_attention": "attention",
    "-": "ffn", "mlp": "ffn",
    "E": "moe", "moe": "moe",
}  # fmt: skip
LAYER_TYPES = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "ffn": "mlp",
    "moe": "moe",
}
UNSUPPORTED = ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias")


def layer_kinds(config: Config) -> list[str]:
    """Block kind of every layer, from ``layers_block_type`` or the pattern string."""
    listed = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    if not listed:
        raise InputError("config.json has neither layers_block_type nor hybrid_override_pattern")
    if unknown := sorted({item for item in listed if item not in KINDS}):
        raise InputError(f"unknown layer type {unknown[0]!r}; known: {', '.join(KINDS)}")
    return [KINDS[item] for item in listed]


def read_block(config: Config, kind: str, layer: int) -> Block:
    """One block of a Nemotron-H config."""
    if kind == "attention":
        kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return Attention(
            layer=layer,
            kv_head=kv_heads,
            query=config["num_attention_heads"] // kv_heads,
            head_dim=config.get("head_dim") or config["attention_head_dim"],
            window=config.get("sliding_window"),
        )
    if kind == "ffn":
        return Ffn(layer=layer, ffn=config["intermediate_size"], gated=False)
    if kind == "mamba":
        groups = config["n_groups"]
        return Mamba(
            layer=layer,
            group=groups,
            head=config["mamba_num_heads"] // groups,
            channel=config["mamba_head_dim"],
            state=config["ssm_state_size"],
            kernel=config["conv_kernel"],
        )
    return Moe(
        layer=layer,
        expert=config["n_routed_experts"],
        expert_ffn=config["moe_intermediate_size"],
        shared_ffn=config["moe_shared_expert_intermediate_size"],
        top_k=config["num_experts_per_tok"],
        routing_group=config.get("n_group", 1),
        latent=config.get("moe_latent_size"),
    )


def read(config: Config) -> Architecture:
    """Architecture of a Nemotron-H config; multi-token prediction heads are not counted."""
    for key in UNSUPPORTED:
        if config.get(key):
            raise InputError(f"{key}=true is not supported for nemotron_h models")
    if config.get("use_conv_bias") is False:
        raise InputError("use_conv_bias=false is not supported for nemotron_h models")
    kinds = layer_kinds(config)
    return Architecture(
        family="nemotron_h",
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        tied=config.get("tie_word_embeddings", False),
        blocks=tuple(read_block(config, kind, layer) for layer, kind in enumerate(kinds)),
    )


def tensors(block: Block) -> Mapping[str, Slot]:
    """The table of a block; experts on a latent stream have their own."""
    if isinstance(block, Moe):
        return MOE if block.latent is None else LATENT_MOE
    return TENSORS[block.kind]


def settings(block: Block) -> dict[str, Any]:
    """Config keys that one block fixes."""
    if isinstance(block, Attention):
        return {
            "num_attention_heads": block.kv_head * block.query,
            "num_key_value_heads": block.kv_head,
            "head_dim": block.head_dim,
        }
    if isinstance(block, Ffn):
        return {"intermediate_size": block.ffn}
    if isinstance(block, Mamba):
        return {"mamba_num_heads": block.group * block.head, "mamba_head_dim": block.channel}
    return {
        "n_routed_experts": block.expert,
        "moe_intermediate_size": block.expert_ffn,
        "moe_shared_expert_intermediate_size": block.shared_ffn,
    }


def write(config: Config, student: Architecture) -> dict[str, Any]:
    """Config keys of the whole student; the norm's eps follows a hidden cut."""
    eps = config.get("layer_norm_epsilon", 1e-5)
    kinds = [LAYER_TYPES[block.kind] for block in student.blocks]
    return {
        "hidden_size": student.hidden,
        "num_hidden_layers": student.layers,
        "layers_block_type": kinds,
        "layer_norm_epsilon": eps * config["hidden_size"] / student.hidden,
    }


NEMOTRON_H = Family(
    model_type="nemotron_h",
    read=read,
    model=MODEL,
    head="lm_head.weight",
    embedding="backbone.embeddings.weight",
    layer="backbone.layers.{layer}.",
    tensors=tensors,
    settings=settings,
    write=write,
    modules=(
        "transformers.models.nemotron_h.modeling_nemotron_h",
        "NemotronHForCausalLM",
        "NemotronHBlock",
    ),
    final_norm="norm_f",
    sites={
        "attention": Site(mixer="mixer", norm="norm"),
        "ffn": Site(mixer="mixer", norm="norm"),
        "mamba": Site(mixer="mixer", norm="norm"),
        "moe": Site(mixer="mixer", norm="norm"),
    },
)
