"""gpt-oss: attention sinks, windows in turns, and clamped gated experts with biases in every layer.

Experts are stacked on disk as in the torch model: each as its transpose, gate and up in turns.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.model.architecture import Architecture, Attention, Block, Moe
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config, fixed_keys
from compress.model.layout import Part, Slot

EXPERTS = "mlp.experts"
EXPERT = f"{EXPERTS}.{{expert}}"


def stacked(name: str, shape: str, part: Part, fused: str | None = None) -> Slot:
    """A part of one of the layer's stacks of experts."""
    place = f"{EXPERTS}.{name}"
    return Slot(shape=shape, fused=fused, place=place, part=part, stack=place)


def turn(number: int, name: str) -> dict[str, Slot]:
    """Weight and bias of gate or up, which are every other channel from their number on."""
    part = Part(number=number, of=2, interleaved=True)
    rows = replace(part, transposed=True)
    weight = stacked("gate_up_proj", "expert_ffn hidden", rows, "experts_up")
    bias = stacked("gate_up_proj_bias", "expert_ffn", part)
    return {f"{EXPERT}.{name}.weight": weight, f"{EXPERT}.{name}.bias": bias}


DOWN = {
    f"{EXPERT}.down_proj.weight": stacked(
        "down_proj", "hidden expert_ffn", Part(transposed=True), "experts_down"
    ),
    f"{EXPERT}.down_proj.bias": stacked("down_proj_bias", "hidden", Part()),
}
MOE = (
    shared.FFN_NORM
    | {"mlp.router.weight": Slot(shape="expert hidden"), "mlp.router.bias": Slot(shape="expert")}
    | turn(0, "gate_proj")
    | turn(1, "up_proj")
    | DOWN
)
ATTENTION = shared.ATTENTION | {"self_attn.sinks": Slot(shape="(kv_head query)")}
BIASES = shared.QKV_BIASES | {"self_attn.o_proj.bias": Slot(shape="hidden")}
SITES = {
    "attention": shared.SITES["attention"],
    "moe": replace(shared.SITES["moe"], pair=True, router="mlp.router"),
}
SIZES = ("num_local_experts", "num_experts_per_tok", "num_key_value_heads", "head_dim")
READS = (
    shared.READS
    | shared.WINDOW
    | dict.fromkeys(SIZES, settings.SIZE)
    | dict.fromkeys(("swiglu_alpha", "swiglu_limit"), settings.REAL)
)
DEFAULTS = {
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent; windows take turns then."""
    own: dict[str, Any] = DEFAULTS | dict(config)
    if "num_experts" in own:
        own["num_local_experts"] = own.pop("num_experts")
    if own.get("layer_types") is None and settings.LAYERS.takes(own.get("num_hidden_layers")):
        layers = range(own["num_hidden_layers"])
        own["layer_types"] = [shared.TYPES[layer % 2 == 0] for layer in layers]
    return own


def read(config: Config) -> Architecture:
    """Architecture of a gpt-oss config."""
    settings.require_least(config, ("num_local_experts", "num_experts_per_tok"))
    named = {
        **config,
        "qkv_bias": config["attention_bias"],
        "n_routed_experts": config["num_local_experts"],
        "moe_intermediate_size": config["intermediate_size"],
        "moe_shared_expert_intermediate_size": None,
    }
    return shared.read(named, "gpt_oss", second=lambda layer: "moe")


def tensors(block: Block) -> Mapping[str, Slot]:
    """The table of a block; biases of projections are a config's choice."""
    if isinstance(block, Attention):
        return ATTENTION | (BIASES if block.qkv_bias else {})
    return MOE


def fixed(block: Block) -> dict[str, Any]:
    """Config keys that one block fixes."""
    if not isinstance(block, Moe):
        return fixed_keys(block)
    return {"num_local_experts": block.expert, "intermediate_size": block.expert_ffn}


GPT_OSS = replace(
    shared.decoder(
        "gpt_oss",
        "GptOss",
        tensors,
        read=read,
        reads=READS,
        normal=normal,
        fixed=fixed,
        lists=shared.layer_types,
    ),
    sites=SITES,
    # transformers' sdpa knows no sinks.
    attention="eager",
    # vLLM takes experts stacked, in MXFP4 or BF16, and passes over others without a word.
    served_quantized=False,
)
