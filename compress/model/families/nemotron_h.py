"""Nemotron-H: every layer is one block: Mamba-2, attention, squared-ReLU FFN or MoE."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Block, Moe
from compress.model.families import settings
from compress.model.families.family import Config, Family, Section, Site, read_block
from compress.model.layout import Slot

NORM = {"norm.weight": Slot(shape="hidden", normalizes=("hidden",))}
MODEL = {
    "backbone.embeddings.weight": Slot(shape="vocab hidden", fused="embedding"),
    "backbone.norm_f.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "lm_head.weight": Slot(shape="vocab hidden", fused="head"),
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


def experts(stream: str) -> dict[str, Slot]:
    """The rows of routed experts; ``stream`` is the axis that they read and write."""
    at = "mixer.experts"
    up = Slot(shape=f"expert_ffn {stream}", fused="experts_up", place=f"{at}.up_proj")
    down = Slot(shape=f"{stream} expert_ffn", fused="experts_down", place=f"{at}.down_proj")
    return {f"{at}.{{expert}}.up_proj.weight": up, f"{at}.{{expert}}.down_proj.weight": down}


MOE = NORM | {
    "mixer.gate.weight": Slot(shape="expert hidden"),
    "mixer.gate.e_score_correction_bias": Slot(shape="expert", float32=True),
    "mixer.shared_experts.up_proj.weight": Slot(shape="shared_ffn hidden", fused="shared_up"),
    "mixer.shared_experts.down_proj.weight": Slot(shape="hidden shared_ffn", fused="shared_down"),
}
LATENT = {
    "mixer.fc1_latent_proj.weight": Slot(shape="latent hidden"),
    "mixer.fc2_latent_proj.weight": Slot(shape="hidden latent"),
}
# Layers that predict further tokens: the first joins the last hidden state and the next token.
MTP_FIRST = {
    "enorm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "hnorm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "eh_proj.weight": Slot(shape="hidden (2 hidden)"),
}
MTP_LAST = {"final_layernorm.weight": Slot(shape="hidden", normalizes=("hidden",))}
LATENT_MOE = MOE | LATENT | experts("latent")
SITE = Site(mixer="mixer", norm="norm")
SITES = dict.fromkeys(("attention", "ffn", "mamba"), SITE) | {
    "moe": replace(SITE, router="mixer.gate")
}
TENSORS: Mapping[str, Mapping[str, Slot]] = {
    "attention": ATTENTION, "ffn": FFN, "mamba": MAMBA, "moe": MOE | experts("hidden"),
}  # fmt: skip
KINDS = {
    "M": "mamba", "mamba": "mamba", "mamba2": "mamba", "linear_attention": "mamba",
    "*": "attention", "attention": "attention", "full_attention": "attention",
    "-": "ffn", "mlp": "ffn",
    "E": "moe", "moe": "moe",
}  # fmt: skip
TYPES = {"mamba": "linear_attention", "attention": "full_attention", "ffn": "mlp", "moe": "moe"}
# The same as one letter a layer: what servers and transformers below 5.13 read.
LETTERS = {"mamba": "M", "attention": "*", "ffn": "-", "moe": "E"}
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
MTP_TYPES = "mtp_layers_block_type"
SIZES = (
    *("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    *("chunk_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("moe_shared_expert_intermediate_size", "n_group", "topk_group"),
)
READS = (
    settings.COMMON
    | dict.fromkeys(("num_key_value_heads", "head_dim", *SIZES), settings.SIZE)
    | dict.fromkeys(("sliding_window", "moe_latent_size"), settings.SIZE.or_null)
    | dict.fromkeys(("norm_topk_prob", "use_conv_bias", "use_bias"), settings.SWITCH)
    | dict.fromkeys(("time_step_min", "layer_norm_epsilon"), settings.REAL)
    | dict.fromkeys(("routed_scaling_factor", "attention_dropout"), settings.NUMBER)
    | dict.fromkeys(("mlp_hidden_act", "mamba_hidden_act"), settings.ACTIVATION)
    | {"layers_block_type": settings.NAMES, MTP_TYPES: settings.NAMES.or_null}
    | {"num_nextn_predict_layers": settings.COUNT}
)


def normal(config: Config) -> dict[str, Any]:
    """A config under today's names, with lists of layer types instead of patterns."""
    own = DEFAULTS | dict(config)
    own |= {name: own.pop(alias) for alias, name in ALIASES.items() if alias in own}
    layers, listed = own.pop("hybrid_override_pattern", None), own.get("layers_block_type")
    if listed is None and not isinstance(layers, str):
        raise InputError("config.json has neither layers_block_type nor hybrid_override_pattern")
    own["layers_block_type"] = named(layers) if listed is None else listed_names(listed)
    further, listed = own.pop("mtp_hybrid_override_pattern", "*E"), own.pop(MTP_TYPES, None)
    if own.get("num_nextn_predict_layers"):
        pattern = listed is None and isinstance(further, str)
        own[MTP_TYPES] = named(further) if pattern else listed_names(listed or further)
    if "attention_head_dim" in own:
        own.setdefault("head_dim", own["attention_head_dim"])
    return own


def named(layers: Sequence[str]) -> list[str]:
    """Layer types by today's names; InputError on one that is not known."""
    if unknown := [item for item in layers if item not in KINDS]:
        raise InputError(f"unknown layer type {unknown[0]!r}; known: {', '.join(KINDS)}")
    return [TYPES[KINDS[item]] for item in layers]


def listed_names(layers: Any) -> Any:
    """Layer types of a list by today's names; what is none as it is, to be refused for it."""
    return named(layers) if settings.NAMES.takes(layers) else layers


def read(config: Config) -> Architecture:
    """Architecture of a Nemotron-H config."""
    settings.require_divides(
        config,
        ("num_attention_heads", "num_key_value_heads"),
        ("mamba_num_heads", "n_groups"),
        ("n_routed_experts", "n_group"),
    )
    kinds = [KINDS[name] for name in config["layers_block_type"]]
    # Servers take one step of further tokens; transformers none.
    steps = config.get("num_nextn_predict_layers", 0)
    further = [KINDS[name] for name in config[MTP_TYPES]] if steps == 1 else []
    if "moe" in (*kinds, *further):
        settings.require_routing(config)
    return Architecture(
        family="nemotron_h",
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        # transformers 5.23 ties nothing here, whatever tie_word_embeddings says.
        tied=False,
        blocks=tuple(read_block(config, kind, n, gated=False) for n, kind in enumerate(kinds)),
        mtp=tuple(read_block(config, kind, n, gated=False) for n, kind in enumerate(further)),
    )


def tensors(block: Block) -> Mapping[str, Slot]:
    """The table of a block; experts on a latent stream have their own."""
    latent = isinstance(block, Moe) and block.latent is not None
    return LATENT_MOE if latent else TENSORS[block.kind]


def write(config: Config, student: Architecture) -> dict[str, Any]:
    """Config keys of the whole student; the norm's eps follows a hidden cut."""
    eps = config.get("layer_norm_epsilon", 1e-5)
    return {
        "hidden_size": student.hidden,
        "num_hidden_layers": student.layers,
        "layer_norm_epsilon": eps * config["hidden_size"] / student.hidden,
    }


def lists(architecture: Architecture) -> dict[str, Any]:
    """The kind of every layer, and of those that predict further tokens."""
    blocks, mtp = architecture.blocks, architecture.mtp
    found = {
        "layers_block_type": [TYPES[block.kind] for block in blocks],
        "hybrid_override_pattern": "".join(LETTERS[block.kind] for block in blocks),
        "num_nextn_predict_layers": int(bool(mtp)),
    }
    if mtp:
        found[MTP_TYPES] = [TYPES[block.kind] for block in mtp]
        found["mtp_hybrid_override_pattern"] = "".join(LETTERS[block.kind] for block in mtp)
    return found


def mtp(architecture: Architecture) -> Iterator[Section]:
    """The layers that predict further tokens."""
    last = len(architecture.mtp) - 1
    for number, block in enumerate(architecture.mtp):
        first = MTP_FIRST if number == 0 else {}
        table = {**first, **tensors(block), **(MTP_LAST if number == last else {})}
        yield f"mtp.layers.{number}.", table, block


NEMOTRON_H = Family(
    model_type="nemotron_h",
    normal=normal,
    reads=READS,
    refused={"mlp_bias": True, "use_bias": True, "use_conv_bias": False},
    read=read,
    model=MODEL,
    head="lm_head.weight",
    embedding="backbone.embeddings.weight",
    layer="backbone.layers.{layer}.",
    tensors=tensors,
    write=write,
    lists=lists,
    modules=(
        "transformers.models.nemotron_h.modeling_nemotron_h",
        "NemotronHForCausalLM",
        "NemotronHBlock",
    ),
    final_norm="norm_f",
    sites=SITES,
    kernels=(
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba2_split_conv1d_scan_combined",
        "mamba2_selective_state_update",
        "mamba2_chunk_scan",
    ),
    mtp=mtp,
    unread=("mtp.",),
)
