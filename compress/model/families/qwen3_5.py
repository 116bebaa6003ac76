"""Qwen3.5, dense and with experts: Qwen3-Next whose delta nets read with four matrices."""

from typing import Any

from compress.model.architecture import Architecture
from compress.model.families import qwen3_next as base
from compress.model.families import settings
from compress.model.families.family import Config
from compress.model.layout import Slot

DELTA = base.STATE | {
    "linear_attn.in_proj_qkv.weight": Slot(shape=f"{base.QKV} hidden", fused="in"),
    "linear_attn.in_proj_z.weight": Slot(shape=f"{base.VALUES} hidden", fused="in"),
    "linear_attn.in_proj_b.weight": Slot(shape="(key_head value) hidden"),
    "linear_attn.in_proj_a.weight": Slot(shape="(key_head value) hidden"),
}
MOE_DEFAULTS = base.MOE_DEFAULTS | {"num_experts": 256, "num_experts_per_tok": 8}


def lists(architecture: Architecture) -> dict[str, Any]:
    """The type of every layer; none predicts further tokens."""
    return base.layer_types(architecture) | {"mtp_num_hidden_layers": 0}


def read(config: Config) -> Architecture:
    """Architecture of a dense Qwen3.5 config."""
    return base.read_layers(config, "qwen3_5_text", lambda layer: "ffn")


def read_moe(config: Config) -> Architecture:
    """Architecture of a Qwen3.5 config with experts in every layer."""
    return base.read_layers(config, "qwen3_5_moe_text", lambda layer: "moe")


QWEN3_5 = base.family(
    "qwen3_5_text",
    "Qwen3_5",
    "qwen3_5",
    {"attention": base.ATTENTION, "delta": DELTA, "ffn": base.FFN},
    read=read,
    reads=base.READS,
    normal=lambda config: base.with_types(config, {"num_key_value_heads": 4}),
    lists=lists,
)
QWEN3_5_MOE = base.family(
    "qwen3_5_moe_text",
    "Qwen3_5Moe",
    "qwen3_5_moe",
    {"attention": base.ATTENTION, "delta": DELTA, "moe": base.MOE},
    read=read_moe,
    reads=base.READS | dict.fromkeys(base.EXPERTS, settings.SIZE),
    normal=lambda config: base.with_types(config, MOE_DEFAULTS),
    fixed=base.fixed,
    lists=lists,
)
