"""A checkpoint's config.json and the architecture it describes; no torch, no weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.model.architecture import Architecture, from_json
from compress.model.families import read_architecture

CONFIG = "config.json"
ARCHITECTURE = "architecture.json"


def read_config(path: Path) -> dict[str, Any]:
    """The config of a checkpoint directory, or of a config.json itself."""
    file = path if path.suffix == ".json" else path / CONFIG
    if not file.is_file():
        raise InputError(f"{file} does not exist; a model is a directory with config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no settings")
    return config


def is_export(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether a model is one of our quantized exports, whose architecture names the formats."""
    beside = (path.parent if path.suffix == ".json" else path) / ARCHITECTURE
    return beside.is_file() and bool(
        config.get("quantization") or config.get("quantization_config")
    )


def architecture_of(path: Path, config: Mapping[str, Any]) -> Architecture:
    """The architecture of a model: the file beside its config, else what the config says."""
    beside = (path.parent if path.suffix == ".json" else path) / ARCHITECTURE
    if beside.is_file():
        try:
            return from_json(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{beside} is not JSON: {error}") from error
    if config.get("model_type") == "compress":
        raise InputError(f"{path} has no {ARCHITECTURE}, which model_type 'compress' needs")
    try:
        return read_architecture(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
