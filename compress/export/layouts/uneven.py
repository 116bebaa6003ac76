"""Students whose layers differ, as model types that vLLM has classes for.

DeciLM is llama with sizes by layer, Nemotron-H Puzzle the same of Nemotron-H. transformers has
neither: the directory brings a configuration and a modeling file. vLLM wants the configuration
only, from the directory or, where this package is installed, from there.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from compress.export.layouts.directory import Structure
from compress.model.architecture import Architecture
from compress.model.families import family_of
from compress.model.families.family import by_layer
from compress.model.families.nemotron_nas import NEMOTRON_NAS
from compress.model.find import shipped

# Keys of an even config that are wrong, or say nothing, where layers differ.
EVEN = ("num_key_value_heads", "intermediate_size", "layer_types")


def decilm_config(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The config of a llama-like student with its sizes by layer.

    Query heads are one number for all layers there.
    """
    tables = map(family_of(architecture.family).tensors, architecture.blocks)
    biases = any("self_attn.q_proj.bias" in table for table in tables)
    own = {key: value for key, value in config.items() if key not in EVEN}
    sizes = NEMOTRON_NAS.lists(architecture) | {"qkv_bias": biases, "sliding_window": None}
    return own | sizes | named("nemotron-nas", "DeciLM", "decilm")


def puzzle_config(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The config of a Nemotron-H student with what every layer has of its own."""
    fixed = family_of(architecture.family).fixed
    sizes = by_layer(architecture, lambda blocks: fixed(blocks[0]))
    own = named("nemotron_h_puzzle", "NemotronHPuzzle", "nemotron_h_puzzle")
    return {**config, "block_configs": sizes, **own}


def named(model_type: str, prefix: str, module: str) -> dict[str, Any]:
    """What says which classes read a directory, and in which of its files they are."""
    return {
        "model_type": model_type,
        "architectures": [f"{prefix}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{module}.{prefix}Config",
            "AutoModelForCausalLM": f"modeling_{module}.{prefix}ForCausalLM",
        },
    }


def code(module: str, _: Architecture) -> dict[str, str]:
    """The files of a model type, a text by its name."""
    names = (f"configuration_{module}.py", f"modeling_{module}.py")
    return {name: shipped("remote_code", name).read_text(encoding="utf-8") for name in names}


DECILM = Structure(config=decilm_config, files=partial(code, "decilm"))
PUZZLE = Structure(config=puzzle_config, files=partial(code, "nemotron_h_puzzle"))
