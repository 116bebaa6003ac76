"""Phi-3 and Phi-4-mini: llama with q, k and v in one matrix, gate and up in another."""

from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture
from compress.model.families import decoder as shared
from compress.model.families.family import Config
from compress.model.layout import Slot

QKV = "[(kv_head query head_dim) | (kv_head head_dim) | (kv_head head_dim)] hidden"
ATTENTION = {
    "input_layernorm.weight": shared.ATTENTION["input_layernorm.weight"],
    "self_attn.qkv_proj.weight": Slot(shape=QKV, fused="qkv"),
    "self_attn.o_proj.weight": shared.ATTENTION["self_attn.o_proj.weight"],
}
FFN = shared.FFN_NORM | {
    "mlp.gate_up_proj.weight": Slot(shape="[ffn | ffn] hidden", fused="gate_up"),
    "mlp.down_proj.weight": shared.FFN["mlp.down_proj.weight"],
}
DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "pad_token_id": 32000,
    "original_max_position_embeddings": 4096,
}
ROPES = ("default", "longrope")


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent; old names of a rope type go."""
    own = DEFAULTS | {key: value for key, value in config.items() if key != "layer_types"}
    for key in ("rope_scaling", "rope_parameters"):
        rope = own.get(key)
        if isinstance(rope, dict) and (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):
            named = {name: value for name, value in rope.items() if name != "type"}
            own[key] = named | {"rope_type": "longrope"}
    return own


def read(config: Config) -> Architecture:
    """Architecture of a Phi-3 config."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) not in ROPES:
        raise InputError(f"rope type {kind!r} is not one of phi3 models: {', '.join(ROPES)}")
    return shared.read(config, "phi3", partial=ROPES)


PHI3 = shared.decoder(
    "phi3",
    "Phi3",
    shared.by_kind(attention=ATTENTION, ffn=FFN),
    read=read,
    reads=shared.READS | shared.WINDOW,
    normal=normal,
    stock=shared.heads_fill,
)
