"""The safetensors of a checkpoint directory by their headers; no torch, no values."""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
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

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start


def weight_files(path: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files that transformers reads: the single one where it is there, else the index's.

    Without either, all that there are: exports for servers have no index (export/student.py).
    InputError where there is none.
    """
    named = config.get("transformers_weights")
    shards = sorted(path.glob("*.safetensors"))
    single = (path / SINGLE).is_file() or not (path / INDEX).is_file()
    if named not in (None, SINGLE if single else INDEX):
        raise InputError(f"{path}: transformers_weights {named!r} is not read here; remove the key")
    if single and shards:
        return [path / SINGLE] if path / SINGLE in shards else shards
    if single:
        raise InputError(f"{path} holds no safetensors file{other_weights(path)}")
    index = read_json(path / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path / INDEX} has no weight_map")
    return [path / str(name) for name in sorted(set(map(str, weight_map.values())))]


def other_weights(path: Path) -> str:
    """What to do about weights in files that are never read, if there are such."""
    pickled = sorted(file.name for end in PICKLED for file in path.glob(f"*{end}"))
    if pickled:
        return (
            f": {pickled[0]} is pickled code, which is never run here; save_pretrained of the "
            "model that transformers loads from it writes safetensors"
        )
    if any(path.glob("*.gguf")):
        return ": take the model that its GGUF file was made of"
    if path.parent.name == "snapshots":
        return ": pickled ones (.bin) of the hub are never read; take a model with safetensors"
    return ""


def stored_tensors(path: Path, config: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor of a checkpoint directory by name; InputError on missing or corrupt files."""
    found: dict[str, Stored] = {}
    for file in weight_files(path, config):
        if not file.is_file():
            raise InputError(f"{file} does not exist; get it, or the whole model anew")
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


def same_bytes(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same values, read a piece at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        sizes = (min(PIECE_BYTES, one.end - at) for at in range(one.start, one.end, PIECE_BYTES))
        return all(a.read(size) == b.read(size) for size in sizes)
