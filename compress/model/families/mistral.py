"""Mistral: llama whose layers may all see a window only. Ministral: layer by layer."""

from typing import Any

from compress.model.architecture import Architecture
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config

TENSORS = shared.by_kind(attention=shared.ATTENTION, ffn=shared.FFN)
READS = shared.READS | shared.WINDOW | {"num_key_value_heads": settings.SIZE}
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent; one window serves all layers."""
    return DEFAULTS | {key: value for key, value in config.items() if key != "layer_types"}


def read(config: Config) -> Architecture:
    """Architecture of a Mistral config."""
    return shared.read(config, "mistral")


def normal_ministral(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    return DEFAULTS | dict(config)


def read_ministral(config: Config) -> Architecture:
    """Architecture of a Ministral config; without a list all layers have the window, if any."""
    return shared.read(config, "ministral")


MISTRAL = shared.decoder("mistral", "Mistral", TENSORS, read=read, reads=READS, normal=normal)
MINISTRAL = shared.decoder(
    "ministral",
    "Ministral",
    TENSORS,
    read=read_ministral,
    reads=READS,
    normal=normal_ministral,
    lists=shared.layer_types,
)
