"""Qwen2: llama with biases of queries, keys and values.

Windows, where they are used, are those of the layers from one on, or listed.
"""

from typing import Any

from compress.model.architecture import Architecture
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config

READS = (
    shared.READS
    | shared.WINDOW
    | {"use_sliding_window": settings.SWITCH, "max_window_layers": settings.COUNT}
)
DEFAULTS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    own = DEFAULTS | dict(config)
    return own if own["use_sliding_window"] else own | {"sliding_window": None}


def read(config: Config, family: str = "qwen2") -> Architecture:
    """Architecture of a config; without a list the window begins with ``max_window_layers``."""
    kinds = config.get("layer_types")
    if kinds is None:
        first = config["max_window_layers"]
        seen = config["sliding_window"] is not None
        layers = range(config["num_hidden_layers"])
        kinds = [shared.TYPES[seen and layer >= first] for layer in layers]
    return shared.read({**config, "layer_types": kinds}, family)


QWEN2 = shared.decoder(
    "qwen2",
    "Qwen2",
    shared.by_kind(attention=shared.ATTENTION | shared.QKV_BIASES, ffn=shared.FFN),
    read=read,
    reads=READS,
    normal=normal,
    lists=shared.layer_types,
)
