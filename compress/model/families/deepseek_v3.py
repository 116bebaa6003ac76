"""DeepSeek-V3 and R1: latent attention; dense layers, then experts as GLM-4.5 has them."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Block, Mla
from compress.model.families import decoder as shared
from compress.model.families import glm4_moe, settings
from compress.model.families.family import Config
from compress.model.layout import Slot

# Heads share what k and v are made from, the latent, and the keys that have positions.
LATENT = {
    "input_layernorm.weight": Slot(shape="hidden", normalizes=("hidden",)),
    "self_attn.kv_a_proj_with_mqa.weight": Slot(shape="[kv_rank | rope_dim] hidden", fused="a"),
    "self_attn.kv_a_layernorm.weight": Slot(shape="kv_rank", normalizes=("kv_rank",)),
    "self_attn.kv_b_proj.weight": Slot(shape="(query [nope_dim | v_dim]) kv_rank", fused="kv_b"),
    "self_attn.o_proj.weight": Slot(shape="hidden (query v_dim)", fused="o"),
}
QUERIES = {
    "self_attn.q_proj.weight": Slot(shape="(query [nope_dim | rope_dim]) hidden", fused="q"),
}
LATENT_QUERIES = {
    "self_attn.q_a_proj.weight": Slot(shape="q_rank hidden", fused="a"),
    "self_attn.q_a_layernorm.weight": Slot(shape="q_rank", normalizes=("q_rank",)),
    "self_attn.q_b_proj.weight": Slot(shape="(query [nope_dim | rope_dim]) q_rank", fused="q_b"),
}
RANKS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
READS = (
    {key: kind for key, kind in glm4_moe.READS.items() if key not in ("head_dim", "use_qk_norm")}
    | dict.fromkeys(RANKS, settings.SIZE)
    | {"q_lora_rank": settings.SIZE.or_null, "rope_interleave": settings.SWITCH}
)
DEFAULTS = {
    "num_key_value_heads": 128,
    "attention_bias": False,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    own = DEFAULTS | {key: value for key, value in config.items() if key != "layer_types"}
    if "num_local_experts" in own:
        own["n_routed_experts"] = own.pop("num_local_experts")
    # What transformers turns by positions, whatever the other key says.
    if (turned := own.pop("head_dim", None)) not in (None, own["qk_rope_head_dim"]):
        said = f"is not qk_rope_head_dim {own['qk_rope_head_dim']!r}"
        raise InputError(f"head_dim {turned!r} {said}")
    return own


def read(config: Config) -> Architecture:
    """Architecture of a DeepSeek-V3 config."""
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    if heads != keys:
        raise InputError(f"num_key_value_heads {keys} is not num_attention_heads {heads}")
    if config["qk_rope_head_dim"] % 2:
        raise InputError(f"qk_rope_head_dim {config['qk_rope_head_dim']} is odd")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("mscale_all_dim") and not rope.get("factor"):
        raise InputError("mscale_all_dim of the rope parameters needs their factor")
    # Positions turn a part of a head, which is whole for them.
    named = glm4_moe.with_experts(config) | {"head_dim": config["qk_rope_head_dim"]}
    dense = config["first_k_dense_replace"]
    whole = shared.read(
        glm4_moe.one_more(named),
        "deepseek_v3",
        partial=(),
        first=lambda layer: "mla",
        second=lambda layer: "ffn" if layer < dense else "moe",
    )
    return glm4_moe.split(whole, config["num_hidden_layers"])


def tensors(block: Block) -> Mapping[str, Slot]:
    """The table of a block."""
    if isinstance(block, Mla):
        return LATENT | (QUERIES if block.q_rank is None else LATENT_QUERIES)
    return glm4_moe.tensors(block)


DEEPSEEK_V3 = shared.decoder(
    "deepseek_v3",
    "DeepseekV3",
    tensors,
    read=read,
    reads=READS,
    normal=normal,
    refused={"attention_bias": True},
    fixed=glm4_moe.fixed,
    parts=glm4_moe.parts,
    lists=glm4_moe.lists,
    stock=glm4_moe.stock,
    mtp=partial(glm4_moe.mtp, tensors),
    unread=("model.layers.{layers}.",),
)
