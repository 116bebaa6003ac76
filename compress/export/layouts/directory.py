"""A Hugging Face directory: a structure with a quantization, written weight by weight."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.files import write_text
from compress.export.layouts.student import Student, Weight, weight_specs
from compress.formats.packed import stored_names
from compress.formats.table import FORMATS, KV_FORMATS, Format
from compress.model.architecture import Architecture, to_json
from compress.model.build import weight_formats
from compress.model.checkpoint import write_files
from compress.model.families import family_of, stored_parameters
from compress.model.headers import INDEX, SINGLE


def in_memory(name: str, architecture: Architecture) -> str:
    """What transformers' and vLLM's models call a module, by its name on disk."""
    own = family_of(architecture.family).embedding.partition(".")[0] + "."
    return "model." + name.removeprefix(own) if name.startswith(own) else name


def on_disk(name: str, architecture: Architecture) -> str:
    """What a module is called by who goes by names on disk."""
    return name


@dataclass(frozen=True, kw_only=True)
class Structure:
    """How a directory tells a reader which blocks there are.

    Attributes:
        config: config.json, of a plain one of the family (``Student.config``) and the architecture.
        weight: a weight as the reader wants it: as it is, renamed, padded (codes and scales), or
            None where it is left out. It is called with weights on ``meta`` too.
        module: what the reader's model calls a module, by its name on disk: by these names a
            quantization speaks of modules.
        files: further files of the directory, such as code for readers without a class of their
            own; a text by its name.
    """

    config: Callable[[Mapping[str, Any], Architecture], dict[str, Any]]
    weight: Callable[[Weight, Architecture], Weight | None] = lambda weight, _: weight
    module: Callable[[str, Architecture], str] = in_memory
    files: Callable[[Architecture], Mapping[str, str]] = lambda _: {}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a directory stores weights in formats, and tells of them.

    Attributes:
        tensors: the tensors that hold a weight, by name; on ``meta`` too.
        config: what config.json says besides: of the modules with a matrix, under the reader's
            names, each with its format, and of the architecture (KV formats).
        files: further files, a text by its name, of the same.
        disk_names: it speaks of modules by their names on disk instead, which servers map.
        hidden: transformers would read codes without their scales, so that there is no file which
            it looks for: shards without an index, which servers find by pattern.
    """

    tensors: Callable[[Weight], Mapping[str, Tensor]]
    config: Callable[[Mapping[str, Format], Architecture], dict[str, Any]]
    files: Callable[[Mapping[str, Format], Architecture], Mapping[str, str]] = lambda *_: {}
    disk_names: bool = False
    hidden: bool = False


def as_stored(weight: Weight) -> dict[str, Tensor]:
    """The tensors of a weight under our own names, which BF16 has everywhere."""
    found = dict(zip(stored_names(weight.name, weight.format), weight.parts, strict=True))
    return found | shape_of(weight)


def shape_of(weight: Weight) -> dict[str, Tensor]:
    """The tensor with a weight's shape, of formats that store it; codes are two a byte."""
    if not FORMATS[weight.format].shape_bytes:
        return {}
    rows, pairs = (codes := weight.parts[0]).shape
    return {f"{weight.name}_shape": torch.tensor([rows, 2 * pairs], device=codes.device)}


def is_told(architecture: Architecture) -> bool:
    """Whether weights or caches are in formats that a directory has to tell of."""
    return bool(weight_formats(architecture)) or bool(
        set(architecture.kv_formats.values()) - {KV_FORMATS[0]}
    )


PLAIN = Quantization(tensors=as_stored, config=lambda *_: {})


def module_formats(
    architecture: Architecture, called: Callable[[str, Architecture], str]
) -> dict[str, Format]:
    """The format of every module with a matrix, ``called`` by its name on disk, the head first.

    A layer's experts are one module.
    """
    formats = weight_formats(architecture)
    matrices = [each for each in stored_parameters(architecture) if len(each.shape) > 1]
    head = family_of(architecture.family).head
    found: dict[str, Format] = {head: formats.get(head, "bf16")}
    for each in matrices:
        module = each.name
        if each.expert is not None:
            module = module.rpartition(f".{each.expert}.")[0]
        found[module] = formats.get(each.name, "bf16")
    return {
        called(name.removesuffix(".weight"), architecture): format for name, format in found.items()
    }


def write_directory(
    structure: Structure, quantization: Quantization, student: Student, directory: Path
) -> None:
    """Write a student into a directory that is there; a weight at a time is held."""
    architecture = student.architecture

    def held(weights: Iterable[Weight]) -> Iterator[tuple[str, Tensor]]:
        for weight in weights:
            if (own := structure.weight(weight, architecture)) is not None:
                yield from quantization.tensors(own).items()

    called = on_disk if quantization.disk_names else structure.module
    modules = module_formats(architecture, called)
    config = structure.config(student.config, architecture)
    config |= quantization.config(modules, architecture)
    specs = dict(held(weight_specs(architecture)))
    json = to_json(architecture)
    write_files(directory, held(student.weights), specs, config, student.source, json)
    if quantization.hidden:
        (directory / INDEX).unlink(missing_ok=True)
        if (whole := directory / SINGLE).is_file():
            whole.rename(directory / "model-00001-of-00001.safetensors")
    further = {**structure.files(architecture), **quantization.files(modules, architecture)}
    for name, text in further.items():
        write_text(directory / name, text)
