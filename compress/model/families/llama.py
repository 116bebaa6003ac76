"""Llama: every layer is a grouped-query attention block and a gated FFN block."""

from compress.model.architecture import Architecture
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config


def read(config: Config) -> Architecture:
    """Architecture of a llama config."""
    settings.require_divides(config, ("hidden_size", "num_attention_heads"))
    return shared.read(config, "llama")


LLAMA = shared.decoder(
    "llama",
    "Llama",
    shared.by_kind(attention=shared.ATTENTION, ffn=shared.FFN),
    read=read,
    refused={"attention_bias": True, "mlp_bias": True},
    stock=shared.heads_divide,
)
