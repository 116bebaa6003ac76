"""A checkpoint's safetensors by their headers, checked against its family's table; no torch."""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.model.architecture import Architecture
from compress.model.config import ARCHITECTURE, architecture_of
from compress.model.families import family_of, parameters
from compress.model.families.wrapper import text_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")
# Old llama checkpoints carry this buffer; it is recomputed and means nothing.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
PIECE_BYTES = 2**24


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its name there, type, shape and bytes [start, end)."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(path: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files that transformers reads: the single one where it is there, else the index's."""
    named = config.get("transformers_weights")
    single = (path / SINGLE).is_file() or not (path / INDEX).is_file()
    if named not in (None, SINGLE if single else INDEX):
        raise InputError(f"{path}: transformers_weights {named!r} is not read here; remove the key")
    if single:
        return [path / SINGLE]
    index = read_json(path / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path / INDEX} has no weight_map")
    return [path / str(name) for name in sorted(set(map(str, weight_map.values())))]


def stored_tensors(path: Path, config: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor of a checkpoint directory by name; InputError on missing or corrupt files."""
    found: dict[str, Stored] = {}
    for file in weight_files(path, config):
        if not file.is_file():
            raise InputError(f"{file} does not exist; weights are read from safetensors only")
        try:
            found |= {tensor.name: tensor for tensor in read_header(file)}
        except (AttributeError, KeyError, TypeError, ValueError, struct.error) as error:
            raise InputError(f"{file} is corrupt: {error}") from error
    return found


def read_header(file: Path) -> Iterator[Stored]:
    """The tensors of a safetensors file; ValueError and others where it is none."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    ends = [entry["data_offsets"][1] for entry in header.values()]
    if size != 8 + length + max(ends, default=0):
        raise ValueError(f"{size} bytes instead of {8 + length + max(ends, default=0)}")
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        yield Stored(file, name, entry["dtype"], tuple(entry["shape"]), start, end)


def checked_weights(
    path: Path, config: Mapping[str, Any], architecture: Architecture
) -> tuple[Architecture, dict[str, Stored]]:
    """The architecture as the weights tell it, and every parameter's tensor.

    As in transformers, tied matrices that are stored with different values are not tied, and
    either of them is enough where they are. Of a multimodal model only the text model's are read.
    InputError on a quantized checkpoint, and on a tensor
    that is unknown, missing or misshaped.
    """
    stored = text_tensors(stored_tensors(path, config), config)
    try:
        return check_tensors(path, stored, architecture)
    except InputError as error:
        if method := quantization(config, stored):
            said = f"this checkpoint is quantized ({method}); take the one in BF16"
            raise InputError(f"{path}: {said}") from error
        raise


def planned_architecture(path: Path, config: Mapping[str, Any]) -> Architecture:
    """The architecture that a search would find: as the weights tell it where they are at hand.

    InputError on what a search would refuse of a config, or of weights that are all here.
    """
    architecture = architecture_of(path, config)
    if not path.is_dir() or (path / ARCHITECTURE).is_file() or not any(path.glob("*.safetensors")):
        return architecture
    from_hub = path.parent.name == "snapshots"
    if from_hub and not all(file.is_file() for file in weight_files(path, config)):
        return architecture  # a download that was broken off; a search would go on with it
    return checked_weights(path, config, architecture)[0]


def quantization(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> str | None:
    """What a checkpoint that does not fit its table says or shows that it is quantized by."""
    said = config.get("quantization_config") or config.get("quantization")
    if isinstance(said, dict):
        return str(said.get("quant_method") or said.get("quant_algo") or "by quantization_config")
    return next((each.dtype for each in stored.values() if each.dtype not in FLOATS), None)


def check_tensors(
    path: Path, stored: dict[str, Stored], architecture: Architecture
) -> tuple[Architecture, dict[str, Stored]]:
    """``checked_weights`` of tensors that are at hand."""
    family = family_of(architecture.family)
    head, embedding = stored.get(family.head), stored.get(family.embedding)
    if architecture.tied and head and embedding and not same_bytes(head, embedding):
        architecture = replace(architecture, tied=False)
    if architecture.tied and head and not embedding:
        stored[family.embedding] = head
    unread = tuple(start.format(layers=architecture.layers) for start in family.unread)
    left = {name: tensor for name, tensor in stored.items() if not name.startswith(unread)}
    found: dict[str, Stored] = {}
    for parameter in parameters(architecture):
        if parameter.name not in left:
            raise InputError(f"{path} has no tensor {parameter.name}")
        tensor = found[parameter.name] = left.pop(parameter.name)
        if tensor.shape != parameter.shape:
            raise InputError(
                f"tensor {parameter.name} in {path} has shape {list(tensor.shape)}, "
                f"its config says {list(parameter.shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise InputError(f"tensor {parameter.name} in {path} is stored as {tensor.dtype}")
    if architecture.tied:
        left.pop(family.head, None)
    if unknown := [name for name in sorted(left) if not name.endswith(IGNORED_SUFFIX)]:
        knows = f"which no table of {architecture.family} knows"
        raise InputError(f"{path} holds tensor {unknown[0]}, {knows}")
    return architecture, found


def same_bytes(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same values, read a piece at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        sizes = (min(PIECE_BYTES, one.end - at) for at in range(one.start, one.end, PIECE_BYTES))
        return all(a.read(size) == b.read(size) for size in sizes)
