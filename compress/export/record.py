"""What an export says of itself, and how what is there differs: files, tensors, config.

``verification.json`` holds every tensor's file, type, shape and digest, the config, and what the
student that was measured predicts (``predictions.py``). A difference is named for what it looks
like, so that one who finds it knows what happened.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compress.core.errors import InputError, VerificationFailed
from compress.core.files import read_json, write_json
from compress.model.headers import INDEX

RECORD = "verification.json"
# What a GGUF file says before its tensors: sizes, tokenizer, names.
HEADER = "metadata"
JSON = ("config.json", "architecture.json")


@dataclass(frozen=True)
class Fact:
    """A tensor of an export."""

    file: str
    dtype: str
    shape: list[int]
    sha256: str


def facts_of(directory: Path) -> dict[str, Fact]:
    """Every tensor in the files of a directory; VerificationFailed on a broken file."""
    found: dict[str, Fact] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            try:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                ends = [entry["data_offsets"][1] for entry in header.values()]
            except (
                ValueError,
                KeyError,
                AttributeError,
                TypeError,
                OverflowError,
                MemoryError,
            ) as e:
                raise VerificationFailed(f"broken file: the header of {file.name} is none") from e
            there, meant = file.stat().st_size, 8 + length + max(ends, default=0)
            if there != meant:
                kind = "truncated" if there < meant else "longer"
                raise VerificationFailed(
                    f"{kind} file: {file.name} has {there} bytes, its header says {meant}"
                )
            for name, entry in header.items():
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                digest = digest_of(stream, start, end)
                if name in found:
                    raise VerificationFailed(
                        f"extra tensor: {name} is in {found[name].file} and {file.name}"
                    )
                found[name] = Fact(file.name, entry["dtype"], entry["shape"], digest)
    for file in sorted(directory.glob("*.gguf")):
        found |= facts_of_gguf(file)
    return found


def facts_of_gguf(file: Path) -> dict[str, Fact]:
    """Every tensor of a GGUF file, and what is before them; VerificationFailed on a broken file."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as e:
        raise VerificationFailed(f"broken file: {file.name} is cut off, or no GGUF file") from e
    first = min(int(each.data_offset) for each in tensors)
    with file.open("rb") as stream:
        found = {HEADER: Fact(file.name, "U8", [first], digest_of(stream, 0, first))}
        for each in tensors:
            start, end = int(each.data_offset), int(each.data_offset + each.n_bytes)
            shape = [int(size) for size in each.shape]
            digest = digest_of(stream, start, end)
            found[each.name] = Fact(file.name, each.tensor_type.name, shape, digest)
    return found


def digest_of(stream: Any, start: int, end: int) -> str:
    """The sha256 of bytes [start, end) of a file."""
    digest = hashlib.sha256()
    stream.seek(start)
    while start < end:
        piece = stream.read(min(2**24, end - start))
        digest.update(piece)
        start += len(piece)
    return digest.hexdigest()


def write_record(directory: Path, meant: Mapping[str, Any]) -> None:
    """Write ``verification.json``: what is there now, and what it has to predict."""
    files = {name: read_json(directory / name) for name in JSON if (directory / name).is_file()}
    tensors = {name: asdict(fact) for name, fact in facts_of(directory).items()}
    write_json(directory / RECORD, {"predictions": meant, "json": files, "tensors": tensors})


def read_record(directory: Path) -> Mapping[str, Any]:
    """What ``write_record`` wrote; InputError where there is none."""
    if not (directory / RECORD).is_file():
        raise InputError(
            f"{directory} has no {RECORD}: it is not an export of this version; export it anew"
        )
    record: Mapping[str, Any] = read_json(directory / RECORD)
    return record


def require_recorded(directory: Path, record: Mapping[str, Any]) -> None:
    """VerificationFailed with the first differences between a directory and its record, by name."""
    meant = {name: Fact(**fact) for name, fact in record["tensors"].items()}
    found = facts_of(directory)
    differences = [
        *indexed(directory, found),
        *present(meant, found),
        *layout(meant, found),
        *contents(directory, meant, found),
        *settings(directory, record["json"]),
    ]
    if differences:
        more = f"; {len(differences) - 3} more differences" if len(differences) > 3 else ""
        raise VerificationFailed("; ".join(differences[:3]) + more)


def indexed(directory: Path, found: Mapping[str, Fact]) -> Iterator[str]:
    """Where the index speaks of tensors that are elsewhere or nowhere, or is silent."""
    if not (directory / INDEX).is_file():
        return
    index = read_json(directory / INDEX).get("weight_map", {})
    for name in index.keys() | found.keys():
        said, there = index.get(name), found[name].file if name in found else None
        if said != there:
            yield f"stale index: {name} is in {there or 'no file'}, the index says {said}"


def present(meant: Mapping[str, Fact], found: Mapping[str, Fact]) -> Iterator[str]:
    """Tensors that lack, and that nobody wrote."""
    for name in sorted(meant.keys() - found.keys()):
        yield f"missing {'scale' if 'scale' in name.rpartition('.')[2] else 'tensor'}: {name}"
    for name in sorted(found.keys() - meant.keys()):
        yield f"extra tensor: {name} in {found[name].file}"


def layout(meant: Mapping[str, Fact], found: Mapping[str, Fact]) -> Iterator[str]:
    """Tensors of another type or shape."""
    for name in sorted(meant.keys() & found.keys()):
        one, other = meant[name], found[name]
        if one.dtype != other.dtype:
            yield f"wrong dtype: {name} is {other.dtype}, exported as {one.dtype}"
        elif one.shape != other.shape:
            turned = "transposed" if one.shape == other.shape[::-1] else "misshaped"
            yield f"{turned} tensor: {name} is {other.shape}, exported as {one.shape}"


def contents(
    directory: Path, meant: Mapping[str, Fact], found: Mapping[str, Fact]
) -> Iterator[str]:
    """Tensors with other numbers: those of another, turned around, a whole file's, or changed."""
    alike = {n for n in meant.keys() & found.keys() if meant[n].shape == found[n].shape}
    alike = {name for name in alike if meant[name].dtype == found[name].dtype}
    changed = {name for name in alike if meant[name].sha256 != found[name].sha256}
    owners = {fact.sha256: name for name, fact in meant.items()}
    moved = {name: owners[found[name].sha256] for name in changed if found[name].sha256 in owners}
    for file in sorted({meant[name].file for name in changed}):
        whole = {name for name in alike if meant[name].file == file}
        # One that is constant in every student, such as a scale of ones, may be the same.
        if len(whole) > 2 and whole <= changed and not whole & moved.keys():
            yield f"another student's: all {len(whole)} tensors of {file} are other ones"
            changed -= whole
    for name in sorted(changed):
        if name in moved:
            other = moved[name]
            same = name.rpartition(".layers.")[2].partition(".")[2]
            kind = "swapped tensors"
            if same and other.endswith(f".{same}"):
                kind = "wrong layer order"
            yield f"{kind}: {name} holds {other}"
        elif turned(directory / found[name].file, name) == meant[name].sha256:
            yield f"transposed tensor: {name}"
        else:
            part = name.rpartition(".")[2]
            yield f"changed {'scale' if 'scale' in part else 'tensor'}: {name} has other numbers"


def turned(file: Path, name: str) -> str | None:
    """The digest of a square matrix's transpose, where types are those of torch."""
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, framework="pt") as reader:
        tensor = torch.as_tensor(reader.get_tensor(name))
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1]:
        return None
    plain = tensor.t().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(plain.tobytes()).hexdigest()


def settings(directory: Path, meant: Mapping[str, Any]) -> Iterator[str]:
    """Keys of the JSON files that say something else."""
    for name, keys in meant.items():
        found = read_json(directory / name)
        for key in sorted(keys.keys() | found.keys()):
            if keys.get(key) != found.get(key):
                yield (
                    f"other settings: {key} in {name} is {short(found.get(key))}, "
                    f"exported as {short(keys.get(key))}"
                )


def short(value: Any) -> str:
    """A value in at most 40 characters."""
    said = json.dumps(value)
    return said if len(said) <= 40 else f"{said[:37]}..."
