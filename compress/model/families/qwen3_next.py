"""Qwen3-Next: gated delta nets, gated attention in every fourth layer, experts and a shared one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Block, DeltaNet, Moe
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config, Family, Site, by_layer, fixed_keys
from compress.model.layout import Slot


def centered(table: Mapping[str, Slot]) -> dict[str, Slot]:
    """A table whose norm weights act as one plus what is stored."""
    return {
        name: replace(slot, offset=1.0) if slot.normalizes else slot for name, slot in table.items()
    }


MODEL = centered(shared.MODEL)
# Of every head the query and then its gate, which multiplies what goes into the output projection.
GATED = {"self_attn.q_proj.weight": Slot(shape="(kv_head query 2 head_dim) hidden", fused="qkv")}
ATTENTION = centered(shared.ATTENTION | shared.QK_NORMS) | GATED
NORM = {"input_layernorm.weight": ATTENTION["input_layernorm.weight"]}
VALUES = "(key_head value value_dim)"
QKV = f"[(key_head key_dim) | (key_head key_dim) | {VALUES}]"
# What all delta nets have besides the projections of what they read.
STATE = NORM | {
    "linear_attn.A_log": Slot(shape="(key_head value)"),
    "linear_attn.dt_bias": Slot(shape="(key_head value)"),
    "linear_attn.conv1d.weight": Slot(shape=f"{QKV} 1 kernel"),
    # Of every head alone, and not centered.
    "linear_attn.norm.weight": Slot(shape="value_dim", normalizes=("value_dim",)),
    "linear_attn.out_proj.weight": Slot(shape=f"hidden {VALUES}", fused="out"),
}
QKVZ = "(key_head [key_dim | key_dim | (value value_dim) | (value value_dim)])"
DELTA = STATE | {
    "linear_attn.in_proj_qkvz.weight": Slot(shape=f"{QKVZ} hidden", fused="in"),
    "linear_attn.in_proj_ba.weight": Slot(shape="(key_head [value | value]) hidden"),
}
FFN = centered(shared.FFN)
SHARED = "mlp.shared_expert"
MOE = (
    centered(shared.FFN_NORM)
    | {"mlp.gate.weight": Slot(shape="expert hidden")}
    | shared.EXPERTS
    | {
        f"{SHARED}.gate_proj.weight": Slot(shape="shared_ffn hidden", fused="shared_up"),
        f"{SHARED}.up_proj.weight": Slot(shape="shared_ffn hidden", fused="shared_up"),
        f"{SHARED}.down_proj.weight": Slot(shape="hidden shared_ffn", fused="shared_down"),
        "mlp.shared_expert_gate.weight": Slot(shape="1 hidden"),
    }
)
SITES = shared.SITES | {"delta": Site(mixer="linear_attn", norm="input_layernorm")}
KERNELS = (
    *("causal_conv1d_fn", "causal_conv1d_update"),
    *("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
)
LINEAR, FULL = "linear_attention", "full_attention"
KINDS = {LINEAR: "delta", FULL: "attention"}
HEADS = ("num_key_value_heads", "head_dim", "linear_num_key_heads", "linear_num_value_heads")
DIMS = ("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim")
READS = shared.READS | dict.fromkeys((*HEADS, *DIMS), settings.SIZE)
EXPERTS = (
    *("num_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)
DEFAULTS = {
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
MOE_DEFAULTS = {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
NEXT = MOE_DEFAULTS | {
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


def with_types(config: Config, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A config that lists its layers' types, with what transformers takes where it is silent."""
    own: dict[str, Any] = {**DEFAULTS, **defaults, **config}
    every, layers = own.pop("full_attention_interval", 4), own.get("num_hidden_layers", 0)
    settings.require({"full_attention_interval": every}, {"full_attention_interval": settings.SIZE})
    if own.get("layer_types") is None and settings.LAYERS.takes(layers):
        own["layer_types"] = [FULL if (n + 1) % every == 0 else LINEAR for n in range(layers)]
    return own


def read_layers(config: Config, family: str, second: Callable[[int], str]) -> Architecture:
    """Architecture of a config whose layers begin with a delta net or attention, as it lists."""
    types = config.get("layer_types", [])
    if unknown := [name for name in types if name not in KINDS]:
        known = ", ".join(KINDS)
        raise InputError(f"layer type {unknown[0]!r} is not supported; known: {known}")
    settings.require_divides(config, ("linear_num_value_heads", "linear_num_key_heads"))
    if "num_experts" in config:
        settings.require_least(config, ("num_experts", "num_experts_per_tok"))
        named = {
            "n_routed_experts": config["num_experts"],
            "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        }
        config = {**config, **named}
    return shared.read(
        config,
        family,
        partial=tuple(settings.ROPES),
        first=lambda layer: KINDS[types[layer]],
        second=second,
    )


def read(config: Config) -> Architecture:
    """Architecture of a Qwen3-Next config."""
    dense, every = config.get("mlp_only_layers") or [], config["decoder_sparse_step"]

    def second(layer: int) -> str:
        return "ffn" if layer in dense or (layer + 1) % every else "moe"

    return read_layers(config, "qwen3_next", second)


def fixed(block: Block) -> dict[str, Any]:
    """Config keys that one block fixes."""
    if not isinstance(block, Moe):
        return fixed_keys(block)
    return {
        "num_experts": block.expert,
        "moe_intermediate_size": block.expert_ffn,
        "shared_expert_intermediate_size": block.shared_ffn,
    }


def layer_types(architecture: Architecture) -> dict[str, list[Any]]:
    """``layer_types`` as the blocks say; a layer that lost its first one has none that matters."""

    def kind(blocks: Sequence[Block]) -> str:
        return LINEAR if any(isinstance(block, DeltaNet) for block in blocks) else FULL

    return {"layer_types": by_layer(architecture, kind)}


def lists(architecture: Architecture) -> dict[str, Any]:
    """The type of every layer, and which have no experts."""
    routed = {block.layer for block in architecture.blocks if isinstance(block, Moe)}
    dense = [layer for layer in range(architecture.layers) if layer not in routed]
    return layer_types(architecture) | {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def write(config: Config, student: Architecture) -> dict[str, Any]:
    """Config keys of the whole student.

    The eps stays when the hidden size is cut: it is also that of the delta nets' norms, whose
    inputs are so small that it matters there, and hardly in the residual stream.
    """
    return {"hidden_size": student.hidden, "num_hidden_layers": student.layers}


def family(
    model_type: str, prefix: str, module: str, tables: Mapping[str, Mapping[str, Slot]], **own: Any
) -> Family:
    """A family whose layers are delta nets or gated attention, in transformers' ``module``."""
    path = f"transformers.models.{module}.modeling_{module}"
    base = shared.decoder(
        model_type, prefix, shared.by_kind(**tables), refused={"attention_bias": True}, **own
    )
    return replace(
        base,
        model=MODEL,
        write=write,
        sites=SITES,
        kernels=KERNELS,
        modules=(path, *base.modules[1:]),
        # Layers that predict further tokens.
        unread=("mtp.",),
    )


QWEN3_NEXT = family(
    "qwen3_next",
    "Qwen3Next",
    "qwen3_next",
    {"attention": ATTENTION, "delta": DELTA, "ffn": FFN, "moe": MOE},
    read=read,
    reads=READS
    | dict.fromkeys((*EXPERTS, "decoder_sparse_step"), settings.SIZE)
    | {"norm_topk_prob": settings.SWITCH, "mlp_only_layers": settings.NUMBERS.or_null},
    normal=lambda config: with_types(config, NEXT),
    fixed=fixed,
    lists=lists,
)
