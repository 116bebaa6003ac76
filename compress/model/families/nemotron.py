"""Nemotron-4 and Minitron: llama with LayerNorm and an ungated squared-ReLU FFN."""

from dataclasses import replace
from typing import Any

from compress.model.architecture import Architecture
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config
from compress.model.layout import Slot


def norm(name: str) -> dict[str, Slot]:
    """A LayerNorm: it subtracts the mean, and has a bias; its weight acts as one plus it."""
    return {
        f"{name}.weight": Slot(shape="hidden", normalizes=("hidden",), offset=1.0),
        f"{name}.bias": Slot(shape="hidden"),
    }


MODEL = shared.MODEL | norm("model.norm")
ATTENTION = shared.ATTENTION | norm("input_layernorm")
FFN = norm("post_attention_layernorm") | {
    "mlp.up_proj.weight": Slot(shape="ffn hidden", fused="up"),
    "mlp.down_proj.weight": Slot(shape="hidden ffn", fused="down"),
}
DEFAULTS = {"partial_rotary_factor": 0.5, "norm_eps": 1e-5}
READS = {key: kind for key, kind in shared.READS.items() if key != "rms_norm_eps"}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    return DEFAULTS | {key: value for key, value in config.items() if key != "layer_types"}


def read(config: Config) -> Architecture:
    """Architecture of a Nemotron config."""
    _ = config["num_key_value_heads"]  # which transformers takes from nowhere else
    return shared.read(config, "nemotron", gated=False)


def write(config: Config, student: Architecture) -> dict[str, Any]:
    """Config keys of the whole student."""
    return {"hidden_size": student.hidden, "num_hidden_layers": student.layers}


NEMOTRON = replace(
    shared.decoder(
        "nemotron",
        "Nemotron",
        shared.by_kind(attention=ATTENTION, ffn=FFN),
        read=read,
        reads=READS | {"norm_eps": settings.REAL, "num_key_value_heads": settings.SIZE},
        normal=normal,
        refused={"attention_bias": True, "mlp_bias": True},
    ),
    model=MODEL,
    write=write,
    whole_hidden="its LayerNorms subtract a mean, which no weights make that of fewer channels",
)
