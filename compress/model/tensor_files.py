"""Writing safetensors: tensor by tensor, whole or not at all, readable by whom the user lets read.

A file is the length of its header (8 bytes), the header in JSON, and the tensors' bytes. With types
and shapes known before, the header is written first and every tensor goes to its place as it comes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from compress.core.files import PARTIAL

Write = Callable[[str, Tensor], None]
# As the format calls them, of those that are written here.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.int32: "I32", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT = 8


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are at hand to a file."""
    with tensor_writer(file, tensors, metadata) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


@contextmanager
def tensor_writer(
    file: Path, specs: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[Write]:
    """What writes the tensors of a file, one at a time and in any order; none is kept.

    ``specs`` has a tensor of each one's type and shape, which may be on ``meta``. At the end the
    file is there whole, with the permissions of one that ``open`` makes here; after an error what
    was there stays. ValueError on a tensor that is not as its spec says, and on one that is missing
    at the end.
    """
    header, places = header_of(specs, metadata or {})
    left = dict(specs)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + PARTIAL)
    # What a killed process left may have other permissions.
    partial.unlink(missing_ok=True)
    try:
        with partial.open("wb") as stream:
            stream.write(header)

            def write(name: str, tensor: Tensor) -> None:
                spec = left.pop(name)
                if (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
                    raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
                stream.seek(len(header) + places[name])
                plain = tensor.detach().cpu().contiguous().view(-1)
                stream.write(plain.view(torch.uint8).numpy().data)

            yield write
        if left:
            raise ValueError(f"{file} lacks {next(iter(left))}")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def header_of(
    specs: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and where every tensor begins after them.

    Wide numbers come first, so that each tensor begins at a multiple of its numbers' size.
    """
    places: dict[str, int] = {}
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(specs, key=lambda name: (-specs[name].itemsize, name)):
        spec = specs[name]
        places[name], end = end, end + spec.nbytes
        entries[name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [places[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places
