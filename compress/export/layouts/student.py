"""A student as layouts take it: its config, and its weights one after another as they are stored.

On ``meta`` the same weights tell types and shapes before any is read, so that a layout's functions
give the headers of its files and what is in them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.formats.packed import stored_names, stored_specs
from compress.formats.table import KV_SCALE_BYTES, Format
from compress.model.architecture import Architecture
from compress.model.build import weight_formats
from compress.model.checkpoint import plain_specs
from compress.model.families import family_of, parameters
from compress.model.stacks import stacked


@dataclass(frozen=True)
class Weight:
    """A tensor of a student under its family's name on disk, as its format stores it.

    ``parts`` are codes, then scales, in the order of ``stored_names``; BF16 (and what a table
    keeps in fp32, and stacks of experts) is one part, as it is.
    """

    name: str
    format: Format
    parts: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Student:
    """What a layout writes.

    Attributes:
        source: where tokenizer and generation config are.
        config: a plain config.json of the family, with the sizes of the first block of each kind.
        architecture: the student's.
        weights: all of it, each once, a fused group one after another; read from disk as they come.
    """

    source: Path
    config: Mapping[str, Any]
    architecture: Architecture
    weights: Iterable[Weight]


def weights_of(
    tensors: Iterable[tuple[str, Tensor]], architecture: Architecture
) -> Iterator[Weight]:
    """Weights of tensors by the tables' names, those of a quantized weight one after another.

    What tables do not have, scales of caches, comes first.
    """
    yield from kv_scales(architecture)
    formats = weight_formats(architecture)
    owners = {part: n for n, format in formats.items() for part in stored_names(n, format)}
    parts: dict[str, Tensor] = {}
    for name, tensor in stacked(tensors, architecture, formats):
        if (owner := owners.get(name)) is None:
            yield Weight(name, "bf16", (tensor,))
            continue
        parts[name], names = tensor, stored_names(owner, formats[owner])
        if len(parts) == len(names):
            yield Weight(owner, formats[owner], tuple(parts[each] for each in names))
            parts = {}
    assert not parts, f"{next(iter(parts))} is not whole"


def kv_scales(architecture: Architecture, device: str = "cpu") -> Iterator[Weight]:
    """The scales of FP8 caches, of keys and of values, beside the attention that they are of.

    They are 1, as caches are measured (``formats/kv.py``): E4M3 has a range of 2^17.
    """
    family = family_of(architecture.family)
    for number, kv_format in architecture.kv_formats.items():
        if KV_SCALE_BYTES[kv_format]:
            block = architecture.blocks[number]
            table = family.tensors(block)
            linear = next(name for name, slot in table.items() if slot.fused)
            module = family.layer.format(layer=block.layer) + linear.rsplit(".", 2)[0]
            for name in ("k_scale", "v_scale"):
                yield Weight(f"{module}.{name}", "bf16", (torch.ones(1, device=device),))


def weight_specs(architecture: Architecture) -> Iterator[Weight]:
    """Every weight of a student on ``meta``."""
    yield from kv_scales(architecture, "meta")
    formats = weight_formats(architecture)
    for name, spec in plain_specs(architecture, quantized=formats).items():
        yield Weight(name, "bf16", (spec,))
    for each in parameters(architecture):
        if (format := formats.get(each.name)) is not None:
            found = stored_specs(each.name, each.shape, format)
            yield Weight(each.name, format, tuple(found.values()))
