"""What a family has to say: config <-> Architecture, its tensors, and where its modules sit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.model.architecture import Architecture, Block
from compress.model.families.settings import Kind
from compress.model.layout import Slot

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a kind of block sits inside a transformers layer module.

    ``mixer`` computes the branch and ``norm`` feeds it, both attributes of the layer.
    """

    mixer: str
    norm: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family. Tensor names are those of the checkpoint on disk.

    ``normal`` is a config under the family's own names, ``reads`` the keys that its model code
    reads and their kinds: the others are ignored. ``settings`` gives those that the blocks of one
    layer fix (a student is plain when all its layers agree on them), ``write`` those that the whole
    architecture fixes. ``modules`` is where transformers keeps the family: module path, model
    class, layer class.
    """

    model_type: str
    normal: Callable[[Config], dict[str, Any]]
    reads: Mapping[str, Kind]
    read: Callable[[Config], Architecture]
    model: Mapping[str, Slot]
    head: str
    embedding: str
    layer: str
    tensors: Callable[[Block], Mapping[str, Slot]]
    settings: Callable[[Block], dict[str, Any]]
    write: Callable[[Config, Architecture], dict[str, Any]]
    modules: tuple[str, str, str]
    final_norm: str
    sites: Mapping[str, Site]
    # Tensors on disk that transformers leaves out, by the beginning of their names.
    unread: tuple[str, ...] = ()
