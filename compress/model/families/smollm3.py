"""SmolLM3: llama whose every fourth layer knows no positions."""

from typing import Any

from compress.model.architecture import Architecture, Attention, Block
from compress.model.families import decoder as shared
from compress.model.families import settings
from compress.model.families.family import Config, by_layer

READS = (
    shared.READS
    | shared.WINDOW
    | {
        "use_sliding_window": settings.SWITCH,
        "no_rope_layers": settings.FLAGS.or_null,
        "no_rope_layer_interval": settings.SIZE,
    }
)
DEFAULTS = {
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "pad_token_id": 128004,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layer_interval": 4,
}


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    return DEFAULTS | dict(config)


def read(config: Config) -> Architecture:
    """Architecture of a SmolLM3 config; windows are those of the layers without positions."""
    layers = range(config["num_hidden_layers"])
    turns = config.get("no_rope_layers")
    if turns is None:
        every = config["no_rope_layer_interval"]
        turns = [int((layer + 1) % every != 0) for layer in layers]
    kinds = config.get("layer_types")
    if kinds is None:
        seen = config["use_sliding_window"] and config["sliding_window"] is not None
        kinds = [shared.TYPES[seen and not turn] for turn in turns]
    return shared.read({**config, "no_rope_layers": turns, "layer_types": kinds}, "smollm3")


def turned(blocks: list[Block]) -> int:
    """1 where a layer knows positions; one without attention has none that matter."""
    return int(not any(isinstance(block, Attention) and not block.rope for block in blocks))


def lists(architecture: Architecture) -> dict[str, Any]:
    """Which layers know positions, and which see all of them."""
    return shared.layer_types(architecture) | {"no_rope_layers": by_layer(architecture, turned)}


SMOLLM3 = shared.decoder(
    "smollm3",
    "SmolLM3",
    shared.by_kind(attention=shared.ATTENTION, ffn=shared.FFN),
    read=read,
    reads=READS,
    normal=normal,
    refused={"attention_bias": True, "mlp_bias": True},
    lists=lists,
)
