"""Hugging Face checkpoints: lazy safetensors in, atomic sharded safetensors out."""

import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.core.errors import InputError
from compress.core.files import atomic_directory, write_text
from compress.model.architecture import Architecture, from_json, without_formats
from compress.model.config import ARCHITECTURE, CONFIG, architecture_of, read_config
from compress.model.families import (
    mtp_parameters,
    parameters,
    read_architecture,
    stored_parameters,
)
from compress.model.headers import INDEX, SINGLE, Stored
from compress.model.quantized import Quantized
from compress.model.stacks import stacked, stored_shapes
from compress.model.tensor_files import Write, tensor_writer
from compress.model.weights import Slice, checked_weights

SHARD_BYTES = 4 * 2**30
GENERATION = "generation_config.json"
# What makes a checkpoint usable besides its weights, as patterns; copied, never interpreted.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template.json", "*.jinja", "additional_chat_templates/*.jinja"),
    *(GENERATION, "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint directory; ``checkpoint[name]`` reads one tensor from disk."""

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    tensors: Mapping[str, Stored | Quantized | Slice] = field(repr=False)
    finite: set[str] = field(default_factory=set, repr=False)
    readers: dict[Path, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, as stored and mapped, fp32 where it was quantized.

        InputError if it holds a NaN or an infinity.
        """
        stored = self.tensors[name]
        if isinstance(stored, Slice):
            [own] = self.values(stored.stack, stored.expert)
            tensor = stored.part.view(own).contiguous()
        else:
            tensor = self.values(stored)
        if name not in self.finite:
            # Extremes pass NaN on, and take no memory.
            extremes = torch.aminmax(tensor) if tensor.numel() else ()
            if not all(map(torch.isfinite, extremes)):
                raise InputError(f"tensor {name} in {self.path} holds NaN or infinite values")
            self.finite.add(name)
        return tensor

    def values(self, stored: Stored | Quantized, row: int | None = None) -> Tensor:
        """A tensor dequantized, or of a stack one row, [1, ...]."""
        return (
            stored.values(self.read, row)
            if isinstance(stored, Quantized)
            else self.read(stored, row)
        )

    def read(self, stored: Stored, row: int | None = None) -> Tensor:
        """A tensor as it is on disk, or one row of it, [1, ...]."""
        if stored.file not in self.readers:
            # Kept open: a header is parsed once, and pages of the file are no memory of ours.
            opened: Any = safe_open(stored.file, framework="pt")
            self.readers[stored.file] = opened
        reader = self.readers[stored.file]
        found: Tensor
        if row is None:
            found = reader.get_tensor(stored.name)
        else:
            found = reader.get_slice(stored.name)[row : row + 1]
        return found

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model, by name."""
        return ((each.name, self[each.name]) for each in parameters(self.architecture))

    def mtp(self) -> Iterator[tuple[str, Tensor]]:
        """Those of layers that predict further tokens."""
        return ((each.name, self[each.name]) for each in mtp_parameters(self.architecture))


def in_bf16(
    tensors: Iterable[tuple[str, Tensor]], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors as they are stored: BF16, but what the tables keep in fp32."""
    wide = {each.name for each in stored_parameters(architecture) if each.slot.float32}
    for name, tensor in tensors:
        yield name, tensor.to(torch.float32 if name in wide else torch.bfloat16)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint whose tensors are those of the family's table and have their shapes.

    Quantized ones come dequantized. InputError on a missing or corrupt file, an unknown family, an
    unknown quantization, and a tensor that is unknown, missing or misshaped, by name.
    """
    config = read_config(path)
    architecture = without_formats(architecture_of(path, config))
    weights = checked_weights(path, config, architecture)
    return Checkpoint(path, config, weights.architecture, weights.tensors)


def write_checkpoint(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    source: Path | None,
    architecture_json: str | None = None,
    finish: Callable[[Path], None] = lambda partial: None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a checkpoint beside ``directory`` and rename it into place when it is whole.

    ``tensors`` are all of the architecture's, in ``dtype`` but what the tables keep in fp32; one is
    held at a time. ``source`` gives tokenizer and generation config; ``architecture_json`` is
    written where given; ``finish`` may add files to the directory before it is renamed. An existing
    directory is replaced, and left alone when anything fails.
    """
    read = from_json(architecture_json) if architecture_json else read_architecture(config)
    with atomic_directory(directory) as partial:
        specs, whole = plain_specs(read, dtype), stacked(tensors, read)
        write_files(partial, whole, specs, config, source, architecture_json)
        finish(partial)


def plain_specs(
    architecture: Architecture, dtype: torch.dtype = torch.bfloat16, quantized: Container[str] = ()
) -> dict[str, Tensor]:
    """Type and shape of every tensor of a checkpoint that is not ``quantized``, on ``meta``."""
    return {
        name: torch.empty(shape, dtype=torch.float32 if one.slot.float32 else dtype, device="meta")
        for name, shape, one in stored_shapes(architecture, quantized)
    }


def write_files(
    partial: Path,
    tensors: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: Path | None,
    architecture_json: str | None,
) -> None:
    """Shards, index, config, architecture, and what ``source`` has besides weights.

    ``specs`` are type and shape of all ``tensors``, on ``meta``.
    """
    shards = list(in_shards(specs))
    files = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE]
    with ExitStack() as stack:
        writers: dict[str, Write] = {}
        for file, shard in zip(files, shards, strict=True):
            write = stack.enter_context(tensor_writer(partial / file, shard, {"format": "pt"}))
            writers |= dict.fromkeys(shard, write)
        for name, tensor in tensors:
            writers[name](name, tensor)
    if len(shards) > 1:
        weight_map: dict[str, str] = {}
        for file, shard in zip(files, shards, strict=True):
            weight_map |= dict.fromkeys(shard, file)
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(partial / INDEX, json.dumps(index, indent=1))
    write_text(partial / CONFIG, json.dumps(dict(config), indent=2))
    if architecture_json is not None:
        write_text(partial / ARCHITECTURE, architecture_json)
    if source:
        for companion in (each for pattern in COMPANIONS for each in source.glob(pattern)):
            copy = partial / companion.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(companion, copy)


def in_shards(specs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Group tensors into shards of at most ``SHARD_BYTES`` (or one tensor)."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, spec in specs.items():
        if shard and held + spec.nbytes > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = spec
        held += spec.nbytes
    yield shard
