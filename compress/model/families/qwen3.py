"""Qwen3: llama with norms of queries and keys, head by head; windows as Qwen2 has them."""

from typing import Any

from compress.model.architecture import Architecture
from compress.model.families import decoder as shared
from compress.model.families import qwen2, settings
from compress.model.families.family import Config

ATTENTION = shared.ATTENTION | shared.QK_NORMS


def normal(config: Config) -> dict[str, Any]:
    """A config with what transformers takes where it is silent."""
    return {"head_dim": 128} | qwen2.normal(config)


def read(config: Config) -> Architecture:
    """Architecture of a Qwen3 config."""
    return qwen2.read(config, "qwen3")


QWEN3 = shared.decoder(
    "qwen3",
    "Qwen3",
    shared.by_kind(attention=ATTENTION, ffn=shared.FFN),
    read=read,
    reads=qwen2.READS | {"head_dim": settings.SIZE},
    normal=normal,
    refused={"attention_bias": True},
    lists=shared.layer_types,
)
