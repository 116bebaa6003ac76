"""Qwen3-MoE: Qwen3 whose FFN is, in the layers that a config names, gated experts and a router."""

from typing import Any

from compress.model.architecture import Architecture, Block, Moe
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config, fixed_keys
from compress.model.families.qwen3 import ATTENTION
from compress.model.layout import Slot

MOE = shared.FFN_NORM | {"mlp.gate.weight": Slot(shape="expert hidden")} | shared.EXPERTS
SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
READS = (
    shared.READS
    | shared.WINDOW
    | dict.fromkeys((*SIZES, "num_key_value_heads"), settings.SIZE)
    | {
        "use_sliding_window": settings.SWITCH,
        "norm_topk_prob": settings.SWITCH,
        "mlp_only_layers": settings.NUMBERS.or_null,
    }
)
DEFAULTS = {
    "num_key_value_heads": 4,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    own = DEFAULTS | {key: value for key, value in config.items() if key != "layer_types"}
    if "num_local_experts" in own:
        own["num_experts"] = own.pop("num_local_experts")
    return own if own["use_sliding_window"] else own | {"sliding_window": None}


def read(config: Config) -> Architecture:
    """Architecture of a Qwen3-MoE config."""
    settings.require_least(config, ("num_experts", "num_experts_per_tok"))
    dense, every = config.get("mlp_only_layers") or [], config["decoder_sparse_step"]

    def second(layer: int) -> str:
        return "ffn" if layer in dense or (layer + 1) % every else "moe"

    named = {**config, "n_routed_experts": config["num_experts"]}
    named["moe_shared_expert_intermediate_size"] = None
    return shared.read(named, "qwen3_moe", second=second)


def fixed(block: Block) -> dict[str, Any]:
    """Config keys that one block fixes."""
    if not isinstance(block, Moe):
        return fixed_keys(block)
    return {"num_experts": block.expert, "moe_intermediate_size": block.expert_ffn}


def lists(architecture: Architecture) -> dict[str, Any]:
    """Which layers have no experts."""
    routed = {block.layer for block in architecture.blocks if isinstance(block, Moe)}
    dense = [layer for layer in range(architecture.layers) if layer not in routed]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


QWEN3_MOE = shared.decoder(
    "qwen3_moe",
    "Qwen3Moe",
    shared.by_kind(attention=ATTENTION, ffn=shared.FFN, moe=MOE),
    read=read,
    reads=READS,
    normal=normal,
    refused={"attention_bias": True},
    fixed=fixed,
    lists=lists,
)
