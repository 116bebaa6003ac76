"""Hugging Face checkpoints: lazy safetensors in, atomic sharded safetensors out."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.core.errors import InputError
from compress.core.files import atomic_directory, read_json, write_text
from compress.model.architecture import Architecture
from compress.model.config import ARCHITECTURE, CONFIG, architecture_of, read_config
from compress.model.families import parameters
from compress.model.tensor_files import save_tensors

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"
# What makes a checkpoint usable besides its weights; copied, never interpreted.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
# Old llama checkpoints carry this buffer; it is recomputed and means nothing.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint directory; ``checkpoint[name]`` reads one tensor from disk."""

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    files: Mapping[str, Path] = field(repr=False)
    finite: set[str] = field(default_factory=set, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, as stored; InputError if it holds a NaN or an infinity."""
        with safe_open(self.files[name], framework="pt") as reader:
            tensor: Tensor = reader.get_tensor(name)
        if name not in self.finite:
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(f"tensor {name} in {self.path} holds NaN or infinite values")
            self.finite.add(name)
        return tensor


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint; every tensor must be known to the family's table and have its shape.

    Raises:
        InputError: missing or corrupt file, unknown family, and a tensor that is unknown, missing
            or misshaped, by name.
    """
    config = read_config(path)
    architecture = architecture_of(path, config)
    shapes, files = tensor_shapes(path)
    ignored = {"lm_head.weight"} if architecture.tied else set()
    for parameter in parameters(architecture):
        if parameter.name not in shapes:
            raise InputError(f"{path} has no tensor {parameter.name}")
        if (found := shapes.pop(parameter.name)) != parameter.shape:
            raise InputError(
                f"tensor {parameter.name} in {path} has shape {list(found)}, "
                f"its config says {list(parameter.shape)}"
            )
    for name in sorted(shapes):
        if name not in ignored and not name.endswith(IGNORED_SUFFIX):
            raise InputError(
                f"{path} holds tensor {name}, which no table of {architecture.family} knows"
            )
    return Checkpoint(path, config, architecture, files)


def tensor_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """Shape and file of every tensor of a directory, from the safetensors headers."""
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise InputError(f"{path / INDEX} has no weight_map")
        shards = sorted(set(index["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for shard in shards:
        file = path / shard
        if not file.is_file():
            raise InputError(f"{file} does not exist; weights are read from safetensors only")
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.offset_keys():
                    shapes[name] = tuple(reader.get_slice(name).get_shape())
                    files[name] = file
        except SafetensorError as error:
            raise InputError(f"{file} is corrupt: {error}") from error
    return shapes, files


def write_checkpoint(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    source: Path | None,
    architecture_json: str | None = None,
    finish: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Write a checkpoint beside ``directory`` and rename it into place when it is whole.

    ``source`` gives tokenizer and generation config; ``architecture_json`` is written where given;
    ``finish`` may add files to the directory before it is renamed. An existing directory is
    replaced, and left alone when anything fails. At most one shard is held in memory.
    """
    with atomic_directory(directory) as partial:
        write_files(partial, tensors, config, source)
        if architecture_json is not None:
            write_text(partial / ARCHITECTURE, architecture_json)
        finish(partial)


def write_files(
    partial: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    source: Path | None,
) -> None:
    """Shards, index, config, and what ``source`` has besides weights."""
    shards: list[list[str]] = []
    total = 0
    for shard in in_shards(tensors):
        save_tensors(shard, partial / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (partial / "shard-0").rename(partial / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            (partial / f"shard-{number}").rename(partial / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(partial / INDEX, json.dumps(index, indent=1))
    write_text(partial / CONFIG, json.dumps(dict(config), indent=2))
    for name in COMPANIONS if source else ():
        if source and (source / name).is_file():
            shutil.copyfile(source / name, partial / name)


def in_shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    """Group a stream of tensors into shards of at most ``SHARD_BYTES`` (or one tensor)."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
    yield shard
