"""GLM-4.5 and its kin: dense layers, then gated experts with a shared one, sigmoid routing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from compress.model.architecture import Architecture, Attention, Block, Moe
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config, Section, fixed_keys
from compress.model.layout import Slot

MOE = (
    shared.FFN_NORM
    | {
        "mlp.gate.weight": Slot(shape="expert hidden"),
        "mlp.gate.e_score_correction_bias": Slot(shape="expert", float32=True),
    }
    | shared.EXPERTS
    | {
        "mlp.shared_experts.gate_proj.weight": Slot(shape="shared_ffn hidden", fused="shared_up"),
        "mlp.shared_experts.up_proj.weight": Slot(shape="shared_ffn hidden", fused="shared_up"),
        "mlp.shared_experts.down_proj.weight": Slot(shape="hidden shared_ffn", fused="shared_down"),
    }
)
# A layer that predicts further tokens has besides what joins the last hidden state and the next
# token, and an embedding and a head of its own.
MTP = {
    "enorm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "hnorm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "eh_proj.weight": Slot(shape="hidden (2 hidden)"),
    "embed_tokens.weight": Slot(shape="vocab hidden"),
    "shared_head.norm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "shared_head.head.weight": Slot(shape="vocab hidden"),
}
STEPS = "num_nextn_predict_layers"
SIZES = (
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("n_group", "topk_group", "num_key_value_heads"),
)
READS = (
    shared.READS
    | dict.fromkeys(SIZES, settings.SIZE)
    | {
        **dict.fromkeys(("first_k_dense_replace", STEPS), settings.COUNT),
        "routed_scaling_factor": settings.NUMBER,
        "norm_topk_prob": settings.SWITCH,
        "use_qk_norm": settings.SWITCH,
    }
)
DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "use_qk_norm": False,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    own = DEFAULTS | {key: value for key, value in config.items() if key != "layer_types"}
    if "num_local_experts" in own:
        own["n_routed_experts"] = own.pop("num_local_experts")
    return own


def with_experts(config: Config) -> dict[str, Any]:
    """A config that says how wide its shared expert is; InputError where routing cannot work."""
    settings.require_divides(config, ("n_routed_experts", "n_group"))
    settings.require_routing(config)
    wide = config["moe_intermediate_size"] * config["n_shared_experts"]
    return {**config, "moe_shared_expert_intermediate_size": wide}


def read(config: Config) -> Architecture:
    """Architecture of a GLM-4 MoE config."""
    named = with_experts(config)
    named |= {"qkv_bias": config["attention_bias"], "qk_norm": config["use_qk_norm"]}
    dense = config["first_k_dense_replace"]
    whole = shared.read(
        one_more(named), "glm4_moe", second=lambda layer: "ffn" if layer < dense else "moe"
    )
    return split(whole, config["num_hidden_layers"])


def one_more(config: Config) -> dict[str, Any]:
    """A config that counts the layer that predicts further tokens; servers take one of those."""
    return {**config, "num_hidden_layers": config["num_hidden_layers"] + (config.get(STEPS) == 1)}


def split(whole: Architecture, layers: int) -> Architecture:
    """An architecture whose layers beyond so many predict further tokens."""
    own = tuple(block for block in whole.blocks if block.layer < layers)
    further = (replace(block, layer=0) for block in whole.blocks[len(own) :])
    return replace(whole, blocks=own, mtp=tuple(further))


def mtp(
    tensors: Callable[[Block], Mapping[str, Slot]], architecture: Architecture
) -> Iterator[Section]:
    """The layer that predicts further tokens, which comes after the others."""
    for number, block in enumerate(architecture.mtp):
        table = {**tensors(block), **(MTP if number == 0 else {})}
        yield f"model.layers.{architecture.layers}.", table, block


def tensors(block: Block) -> Mapping[str, Slot]:
    """The table of a block; biases and norms of heads are a config's choice."""
    if isinstance(block, Attention):
        biases = shared.QKV_BIASES if block.qkv_bias else {}
        return shared.ATTENTION | biases | (shared.QK_NORMS if block.qk_norm else {})
    return MOE if isinstance(block, Moe) else shared.FFN


def fixed(block: Block) -> dict[str, Any]:
    """Config keys that one block fixes; the shared expert is as wide as some routed ones."""
    if not isinstance(block, Moe):
        return fixed_keys(block)
    return {
        "n_routed_experts": block.expert,
        "moe_intermediate_size": block.expert_ffn,
        "n_shared_experts": max(1, (block.shared_ffn or 0) // block.expert_ffn),
    }


def parts(block: Block) -> dict[str, dict[str, Any]]:
    """The shared expert of any width."""
    if not isinstance(block, Moe):
        return {}
    wide = {"moe_intermediate_size": block.shared_ffn, "n_shared_experts": 1}
    return {"mlp.shared_experts": wide}


def lists(architecture: Architecture) -> dict[str, Any]:
    """How many layers there are before the first with experts, and that predict further tokens."""
    routed = [block.layer for block in architecture.blocks if isinstance(block, Moe)]
    dense = min(routed, default=architecture.layers)
    return {"first_k_dense_replace": dense, STEPS: int(bool(architecture.mtp))}


def stock(architecture: Architecture) -> bool:
    """Whether shared experts are as wide as whole routed ones."""
    moes = (block for block in architecture.blocks if isinstance(block, Moe))
    return not any((block.shared_ffn or 0) % block.expert_ffn for block in moes)


GLM4_MOE = shared.decoder(
    "glm4_moe",
    "Glm4Moe",
    tensors,
    read=read,
    reads=READS,
    normal=normal,
    fixed=fixed,
    parts=parts,
    lists=lists,
    stock=stock,
    mtp=partial(mtp, tensors),
    unread=("model.layers.{layers}.",),
)
