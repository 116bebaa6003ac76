"""Nemotron-H: every layer is one block: Mamba-2, attention, squared-ReLU FFN or MoE."""

from collections.abc import Mapping
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Attention, Block, Ffn, Mamba, Moe
from compress.model.families.family import Config, Family, Site
from compress.model.families.settings import (
    ACTIVATION,
    NAMES,
    NUMBER,
    REAL,
    SIZE,
    SWITCH,
    TOKEN,
    TOKENS,
    optional,
    require_divides,
)
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
# The same as one letter a layer: what servers and transformers below 5.13 read.
LETTERS = {"mamba": "M", "attention": "*", "ffn": "-", "moe": "E"}
UNSUPPORTED = ("mlp_bias", "use_bias")
# Other names of the same keys, which transformers takes before the own ones.
ALIASES = {
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
}
# What transformers takes where a config is silent; no tensor's shape tells the last two.
DEFAULTS = {
    "n_groups": 8,
    "conv_kernel": 4,
    "num_key_value_heads": 8,
    "n_group": 1,
    "num_experts_per_tok": 2,
}
READS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "layers_block_type": NAMES,
    "intermediate_size": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "sliding_window": optional(SIZE),
    "mamba_num_heads": SIZE,
    "mamba_head_dim": SIZE,
    "n_groups": SIZE,
    "ssm_state_size": SIZE,
    "conv_kernel": SIZE,
    "chunk_size": SIZE,
    "time_step_min": REAL,
    "n_routed_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "moe_intermediate_size": SIZE,
    "moe_shared_expert_intermediate_size": SIZE,
    "moe_latent_size": optional(SIZE),
    "n_group": SIZE,
    "topk_group": SIZE,
    "norm_topk_prob": SWITCH,
    "routed_scaling_factor": NUMBER,
    "mlp_hidden_act": ACTIVATION,
    "mamba_hidden_act": ACTIVATION,
    "layer_norm_epsilon": REAL,
    "max_position_embeddings": SIZE,
    "attention_dropout": NUMBER,
    "use_conv_bias": SWITCH,
    "use_bias": SWITCH,
    "mlp_bias": SWITCH,
    "tie_word_embeddings": SWITCH,
    "pad_token_id": TOKEN,
    "bos_token_id": TOKEN,
    "eos_token_id": TOKENS,
}


def normal(config: Config) -> dict[str, Any]:
    """A config under today's names, with a list of layer types instead of the pattern."""
    own = DEFAULTS | dict(config)
    own |= {name: own.pop(alias) for alias, name in ALIASES.items() if alias in own}
    pattern, listed = own.pop("hybrid_override_pattern", None), own.get("layers_block_type")
    if listed is None and not isinstance(pattern, str):
        raise InputError("config.json has neither layers_block_type nor hybrid_override_pattern")
    layers = pattern if listed is None else listed
    if unknown := [item for item in layers if item not in KINDS]:
        raise InputError(f"unknown layer type {unknown[0]!r}; known: {', '.join(KINDS)}")
    if not isinstance(listed, str):
        own["layers_block_type"] = [LAYER_TYPES[KINDS[item]] for item in layers]
    if "attention_head_dim" in own:
        own.setdefault("head_dim", own["attention_head_dim"])
    return own


def read_block(config: Config, kind: str, layer: int) -> Block:
    """One block of a Nemotron-H config."""
    if kind == "attention":
        kv_heads = config["num_key_value_heads"]
        return Attention(
            layer=layer,
            kv_head=kv_heads,
            query=config["num_attention_heads"] // kv_heads,
            head_dim=config["head_dim"],
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
        routing_group=config["n_group"],
        latent=config.get("moe_latent_size"),
    )


def read(config: Config) -> Architecture:
    """Architecture of a Nemotron-H config; multi-token prediction heads are not counted."""
    for key in UNSUPPORTED:
        if config.get(key):
            raise InputError(f"{key}=true is not supported for nemotron_h models")
    if config.get("use_conv_bias") is False:
        raise InputError("use_conv_bias=false is not supported for nemotron_h models")
    require_divides(
        config,
        [
            ("num_attention_heads", "num_key_value_heads"),
            ("mamba_num_heads", "n_groups"),
            ("n_routed_experts", "n_group"),
        ],
    )
    kinds = [KINDS[name] for name in config["layers_block_type"]]
    if "moe" in kinds:
        require_routing(config)
    return Architecture(
        family="nemotron_h",
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        # transformers 5.23 ties nothing here, whatever tie_word_embeddings says.
        tied=False,
        blocks=tuple(read_block(config, kind, layer) for layer, kind in enumerate(kinds)),
    )


def require_routing(config: Config) -> None:
    """InputError where a router would have to choose more than there is."""
    experts, groups = config["n_routed_experts"], config["n_group"]
    if (chosen := config["num_experts_per_tok"]) > experts:
        raise InputError(f"num_experts_per_tok {chosen} is above n_routed_experts {experts}")
    if (taken := config.get("topk_group", 1)) > groups:
        raise InputError(f"topk_group {taken} is above n_group {groups}")
    if experts < 2 * groups:
        raise InputError(f"n_group {groups} leaves n_routed_experts {experts} no two of a group")


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
        "hybrid_override_pattern": "".join(LETTERS[block.kind] for block in student.blocks),
        "layer_norm_epsilon": eps * config["hidden_size"] / student.hidden,
    }


NEMOTRON_H = Family(
    model_type="nemotron_h",
    normal=normal,
    reads=READS,
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
    # Layers that predict further tokens.
    unread=("mtp.",),
)
