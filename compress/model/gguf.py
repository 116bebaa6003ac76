"""A GGUF file as a plain checkpoint: BF16 safetensors, config, tokenizer; transformers reads it."""

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from compress.core.errors import InputError
from compress.model.build import disk_tensors
from compress.model.checkpoint import in_bf16, open_checkpoint, write_checkpoint
from compress.model.families import read_architecture

# What transformers notes about the file it read, not about the model.
READER_KEYS = (
    *("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"),
)


def convert(gguf: Path, directory: Path) -> None:
    """Write the model of a GGUF file to ``directory``, dequantized to BF16, and check it.

    InputError where the gguf package is missing, or the result is of no known family.
    """
    if find_spec("gguf") is None:
        raise InputError('reading GGUF needs the package gguf: python -m pip install -e ".[gguf]"')
    # Its bars go to stderr as it is at the call; which stage runs is ours to say.
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    # Without what every config says and what says nothing about this model.
    common = PreTrainedConfig().to_dict()
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in READER_KEYS and (key not in common or common[key] != value)
    }
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    architecture = read_architecture(config)
    tensors = in_bf16(disk_tensors(model, architecture), architecture)
    write_checkpoint(directory, tensors, config, None)
    tokenizer.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    open_checkpoint(directory)
