"""Multimodal checkpoints: which part of their config and which tensors are the text model's.

Students are checkpoints of the text model alone, of its own model type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from compress.core.errors import InputError

Config = Mapping[str, Any]
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A multimodal model type.

    ``text`` is the model type of a ``text_config`` that names none; ``towers`` begin the names of
    tensors that are not the text model's.
    """

    text: str
    towers: tuple[str, ...]


EYES = ("vision_tower.", "multi_modal_projector.")
TOWERS = (*EYES, *(f"model.{name}" for name in EYES))
WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper(text="gemma3_text", towers=TOWERS),
    "mistral3": Wrapper(text="mistral", towers=TOWERS),
    "qwen3_5": Wrapper(text="qwen3_5_text", towers=("model.visual.",)),
    "qwen3_5_moe": Wrapper(text="qwen3_5_moe_text", towers=("model.visual.",)),
}
# How names begin there, and in a checkpoint of the text model.
PREFIXES = {"language_model.": "", "model.language_model.": "model."}
# What holds for the text model too where its own config is silent.
SHARED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"),
    *("quantization_config", "compression_config", "quantization", "transformers_weights"),
)


def text_config(config: Config) -> Config:
    """The config of a multimodal model's text model; any other is its own.

    InputError where it has none.
    """
    if (wrapper := wrapper_of(config)) is None:
        return config
    own = config.get("text_config")
    if not isinstance(own, Mapping):
        raise InputError(f"config.json of a {config['model_type']} model has no text_config")
    shared = {key: config[key] for key in SHARED if key in config}
    text = {"model_type": wrapper.text} | shared | dict(own)
    text.pop("architectures", None)
    # transformers ties as the whole says, whatever the part says.
    if "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text


def text_tensors(stored: Mapping[str, Found], config: Config) -> dict[str, Found]:
    """Of a checkpoint's tensors those of the text model, by the names that its own tables have."""
    if (wrapper := wrapper_of(config)) is None:
        return dict(stored)
    return {
        text_name(name): tensor
        for name, tensor in stored.items()
        if not name.startswith(wrapper.towers)
    }


def text_name(name: str) -> str:
    """What the text model's own checkpoint calls a tensor."""
    for prefix, own in PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def text_note(config: Config) -> str:
    """What a reader has to know of a multimodal model; empty of any other."""
    if wrapper_of(config) is None:
        return ""
    return f"the text model of a {config['model_type']} checkpoint, whose other parts are left out"


def wrapper_of(config: Config) -> Wrapper | None:
    """The multimodal model type of a config."""
    kind = config.get("model_type")
    return WRAPPERS.get(kind) if isinstance(kind, str) else None
