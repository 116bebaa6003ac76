"""Ministral 3: Mistral whose queries grow with the logarithm of a far position."""

from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture
from compress.model.families import decoder as shared
from compress.model.families import mistral, settings
from compress.model.families.family import Config

DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 11,
    "sliding_window": None,
}
# By how much, and from where on.
GROWTH = ("llama_4_scaling_beta", "original_max_position_embeddings")


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent; one window serves all layers."""
    return DEFAULTS | {key: value for key, value in config.items() if key != "layer_types"}


def read(config: Config) -> Architecture:
    """Architecture of a Ministral 3 config."""
    if (rope := config.get("rope_parameters") or config.get("rope_scaling")) is not None:
        for key in GROWTH:
            if not settings.POSITIVE.takes(rope.get(key)):
                raise InputError(f"{key} of the rope parameters is {rope.get(key)!r}, not a number")
    return shared.read(config, "ministral3")


MINISTRAL3 = shared.decoder(
    "ministral3",
    "Ministral3",
    mistral.TENSORS,
    read=read,
    reads=mistral.READS | {"head_dim": settings.SIZE},
    normal=normal,
)
