"""A checkpoint's config.json and the architecture it describes; no torch, no weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.model.architecture import Architecture, from_json
from compress.model.families import read_architecture

CONFIG = "config.json"
ARCHITECTURE = "architecture.json"


def read_config(path: Path) -> dict[str, Any]:
    """The config of a checkpoint directory, or of a config.json itself."""
    file = path if path.suffix == ".json" else path / CONFIG
    if not file.is_file():
        cached = sorted(each.parent for each in path.glob(f"snapshots/*/{CONFIG}"))
        hint = f"; of this folder of the hub's cache take {cached[-1]}" if cached else ""
        known = f"a model is a directory with {CONFIG}{hint}"
        raise InputError(f"{file} does not exist; {known}")
    config = read_json(file)
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no settings")
    return config


def beside(path: Path) -> Path:
    """Where the architecture of a model is written, if it is: beside its config."""
    return (path.parent if path.suffix == ".json" else path) / ARCHITECTURE


def is_export(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether a model is one of our quantized exports, whose architecture names the formats."""
    named = config.get("quantization") or config.get("quantization_config")
    return bool(named) and beside(path).is_file()


def architecture_of(path: Path, config: Mapping[str, Any]) -> Architecture:
    """The architecture of a model: the file beside its config, else what the config says."""
    if (file := beside(path)).is_file():
        try:
            return from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is not JSON: {error}") from error
    if config.get("model_type") == "compress":
        raise InputError(f"{path} has no {ARCHITECTURE}, which model_type 'compress' needs")
    try:
        return read_architecture(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
