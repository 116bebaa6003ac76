"""The recipe of a teacher: what ``compress pretrain`` reads."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.core.errors import InputError


class TokenizerRecipe(BaseModel):
    """A byte-level BPE to be trained on the train split."""

    model_config = ConfigDict(extra="forbid")
    vocab_size: int = Field(ge=257)


class PretrainRecipe(BaseModel):
    """What a teacher is made from; ``steps``, ``warmup`` and ``decay`` count steps, ``batch`` rows.

    ``tokenizer`` may be the path of a directory that has one; ``model`` is a Hugging Face config;
    ``data`` is a JSONL file, null the embedded text. Paths are relative to the working directory.
    """

    model_config = ConfigDict(extra="forbid")
    tokenizer: TokenizerRecipe | Path
    model: dict[str, Any]
    data: Path | None = None
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    length: int = Field(ge=2)
    learning_rate: float = Field(gt=0)
    warmup: int = Field(ge=0)
    decay: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    seed: int = 0
    checkpoint_every: int = Field(default=100, ge=1)


def read_recipe(path: Path) -> PretrainRecipe:
    """The recipe of a YAML file; InputError names the key that is wrong and what it may be."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; a pretraining recipe is a YAML file")
    try:
        return PretrainRecipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the recipe"
        close = difflib.get_close_matches(key, PretrainRecipe.model_fields, n=1)
        hint = f"; did you mean {close[0]}?" if close and first["type"] == "extra_forbidden" else ""
        raise InputError(f"{path}: {key}: {first['msg'].lower()}{hint}") from error
