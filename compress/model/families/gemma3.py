"""Gemma 3: norms before and behind every mixer, a scaled embedding, windows with their own rope."""

from dataclasses import replace
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config, Site
from compress.model.layout import Slot


def norm(name: str, axis: str = "hidden") -> dict[str, Slot]:
    """A norm, whose weight acts as one plus it."""
    return {f"{name}.weight": Slot(shape=axis, normalizes=(axis,), offset=1.0)}


MODEL = (
    shared.MODEL
    | {
        "model.embed_tokens.weight": Slot(
            shape="vocab hidden", fused="embedding", times_root=("hidden",)
        )
    }
    | norm("model.norm")
)
ATTENTION = (
    shared.ATTENTION
    | norm("input_layernorm")
    | norm("self_attn.q_norm", "head_dim")
    | norm("self_attn.k_norm", "head_dim")
    | norm("post_attention_layernorm")
)
FFN = (
    norm("pre_feedforward_layernorm")
    | {name: slot for name, slot in shared.FFN.items() if name.startswith("mlp.")}
    | norm("post_feedforward_layernorm")
)
SITES = {
    "attention": Site(
        mixer="self_attn", norm="input_layernorm", post="post_attention_layernorm", pair=True
    ),
    "ffn": Site(mixer="mlp", norm="pre_feedforward_layernorm", post="post_feedforward_layernorm"),
}
READS = (
    {key: kind for key, kind in shared.READS.items() if key != "hidden_act"}
    | shared.WINDOW
    | dict.fromkeys(("num_key_value_heads", "head_dim", "query_pre_attn_scalar"), settings.SIZE)
    | dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), settings.REAL.or_null)
    | {
        "hidden_activation": settings.ACTIVATION,
        "rope_local_base_freq": settings.POSITIVE,
        "sliding_window_pattern": settings.SIZE,
        "use_bidirectional_attention": settings.SWITCH.or_null,
    }
)
# What released configs leave to transformers.
DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    return DEFAULTS | dict(config)


def read(config: Config) -> Architecture:
    """Architecture of a Gemma 3 config; every so many layers one sees all of the text."""
    kinds = config.get("layer_types")
    if kinds is None:
        every = config["sliding_window_pattern"]
        layers = range(1, config["num_hidden_layers"] + 1)
        kinds = [shared.TYPES[layer % every != 0] for layer in layers]
    for rope in ropes(config):
        settings.require_rope({"rope_parameters": rope}, config["head_dim"], ())
    return shared.read({**config, "layer_types": kinds}, "gemma3_text")


def ropes(config: Config) -> list[dict[str, Any]]:
    """What transformers makes of a config's keys for positions: of whole texts, and of windows."""
    named = config.get("rope_parameters") or {}
    settings.require(named, dict.fromkeys(shared.TYPES.values(), settings.TABLE.or_null))
    whole, windows = (dict(named.get(kind) or {}) for kind in shared.TYPES.values())
    scaled = config.get("rope_scaling")
    if scaled is not None and named and not whole:
        raise InputError("rope_parameters beside rope_scaling has no full_attention")
    return [whole | (scaled or {}), windows]


GEMMA3 = replace(
    shared.decoder(
        "gemma3_text",
        "Gemma3",
        shared.by_kind(attention=ATTENTION, ffn=FFN),
        read=read,
        reads=READS,
        normal=normal,
        refused={"attention_bias": True, "use_bidirectional_attention": True},
        lists=shared.layer_types,
        stock=shared.heads_divide,
        package="gemma3",
    ),
    model=MODEL,
    sites=SITES,
)
