"""OLMo 2 and 3: mixers read the residual stream, norms are behind them and over all heads."""

from dataclasses import replace
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config, Family, Site
from compress.model.families.gemma3 import ropes
from compress.model.layout import Slot


def norm(name: str) -> dict[str, Slot]:
    """A norm of the residual stream's width."""
    return {f"{name}.weight": Slot(shape="hidden", normalizes=("hidden",))}


def norm_over(*heads: str) -> Slot:
    """A norm over all heads together, of queries or keys."""
    return Slot(shape=f"({' '.join(heads)} head_dim)", normalizes=heads, over_heads=True)


ATTENTION = {
    **{name: slot for name, slot in shared.ATTENTION.items() if name.startswith("self_attn.")},
    "self_attn.q_norm.weight": norm_over("kv_head", "query"),
    "self_attn.k_norm.weight": norm_over("kv_head"),
    **norm("post_attention_layernorm"),
}
FFN = {
    **{name: slot for name, slot in shared.FFN.items() if name.startswith("mlp.")},
    **norm("post_feedforward_layernorm"),
}
SITES = {
    "attention": Site(mixer="self_attn", post="post_attention_layernorm", pair=True),
    "ffn": Site(mixer="mlp", post="post_feedforward_layernorm"),
}
READS = shared.READS | {"head_dim": settings.SIZE}
DEFAULTS = {"rms_norm_eps": 1e-5, "pad_token_id": 1}


def normal(config: Config) -> dict[str, Any]:
    """An OLMo 2 config with what transformers takes where it is silent."""
    return DEFAULTS | {key: value for key, value in config.items() if key != "layer_types"}


def read(config: Config) -> Architecture:
    """Architecture of an OLMo 2 config."""
    return shared.read(config, "olmo2")


def normal_olmo3(config: Config) -> dict[str, Any]:
    """An OLMo 3 config with what transformers takes where it is silent."""
    return DEFAULTS | {"sliding_window": 4096} | dict(config)


def read_olmo3(config: Config) -> Architecture:
    """Architecture of an OLMo 3 config; every fourth layer sees all of the text."""
    kinds = config.get("layer_types")
    if kinds is None:
        layers = range(1, config["num_hidden_layers"] + 1)
        kinds = [shared.TYPES[layer % 4 != 0] for layer in layers]
    if (named := config.get("rope_parameters")) and named.keys() - set(shared.TYPES.values()):
        raise InputError("rope_parameters of olmo3 are by layer type")
    for rope in ropes(config):
        settings.require_rope({"rope_parameters": rope}, settings.head_width(config), ())
    return shared.read({**config, "layer_types": kinds}, "olmo3")


def olmo(number: int, **own: Any) -> Family:
    """An OLMo family."""
    family = shared.decoder(
        f"olmo{number}",
        f"Olmo{number}",
        shared.by_kind(attention=ATTENTION, ffn=FFN),
        refused={"attention_bias": True},
        **own,
    )
    return replace(family, sites=SITES)


OLMO2 = olmo(2, read=read, reads=READS, normal=normal)
OLMO3 = olmo(
    3, read=read_olmo3, reads=READS | shared.WINDOW, normal=normal_olmo3, lists=shared.layer_types
)
