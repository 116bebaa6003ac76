"""Quantized weights on disk: which tensors hold one, packed block by block and read back.

========  =================  ======================  ================
format    ``weight``         ``weight_scale``        beside them
========  =================  ======================  ================
FP8       E4M3 [out, in]     F32 []                  input_scale
NVFP4     U8 [out, in/2]     E4M3 [out, in/16]       weight_scale_2, input_scale
MXFP4     U8 [out, in/2]     U8 (E8M0) [out, in/32]
INT4      U8 [out, in/2]     F16 [out, in/128]
========  =================  ======================  ================

The names and the first two rows are ModelOpt's layout. ``input_scale`` F32 [] is for servers that
quantize activations; reading back does not need it. Everything else is stored as it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.core.errors import InputError
from compress.formats.blocks import CHUNK
from compress.formats.fake import fused_groups, shared
from compress.formats.table import FORMATS, INPUT_SCALE, Format


def stored_names(name: str, format: Format) -> list[str]:
    """The tensors that hold a weight of this format: itself, then its scales."""
    stem = name.removesuffix("weight")
    return [name, *(stem + suffix for suffix in FORMATS[format].suffixes)]


def stored_specs(name: str, shape: Sequence[int], format: Format) -> dict[str, Tensor]:
    """Type and shape of the tensors that hold a weight, on ``meta``; InputError as ``require``."""
    row, (*outer, width) = FORMATS[format], shape
    row.require(shape)

    def spec(dtype: str, last: int | None) -> Tensor:
        whole = () if last is None else (*outer, last)
        return torch.empty(whole, dtype=getattr(torch, dtype), device="meta")

    codes = width * row.bits // 8 // getattr(torch, row.codes).itemsize
    scales = (spec(s.dtype, width // row.group if s.per_group else None) for s in row.scales)
    return dict(zip(stored_names(name, format), (spec(row.codes, codes), *scales), strict=True))


def pack_block(
    read: Callable[[str], Tensor],
    fused: Mapping[str, str | None],
    format: Format,
    inputs: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """A block's tensors as they are stored, those of fused groups in ``format``, one at a time.

    ``fused`` has the fused group of every name, None where it stays; ``read`` gives the tensor of a
    name, and is asked twice for those of a group that rounds together. ``inputs`` has the largest
    magnitude that the layers of a group read, for formats with an input scale.
    """
    row = FORMATS[format]
    common: dict[str, tuple[Tensor, ...]] = {}
    for names in fused_groups(fused, fused) if format != "bf16" else ():
        common |= dict.fromkeys(names, shared(map(read, names), format))
    for name, group in fused.items():
        if group is None or format == "bf16":
            yield name, read(name)
            continue
        stored = packed(read(name), format, *common[name])
        if INPUT_SCALE in row.suffixes:
            stored = (*stored, row.numerics.tensor_scale(inputs[group]).cpu())
        yield from zip(stored_names(name, format), stored, strict=True)


def packed(weight: Tensor, format: Format, *common: Tensor) -> tuple[Tensor, ...]:
    """The stored form of a weight [out, in], some rows at a time: codes, then scales.

    ``common`` is what its fused group rounds by together. InputError as ``require``.
    """
    row = FORMATS[format]
    row.require(weight.shape)
    rows = max(1, CHUNK // max(1, prod(weight.shape[1:])))
    parts = zip(
        *(row.numerics.pack(part, *common) for part in torch.split(weight, rows)), strict=True
    )
    return tuple(torch.cat(part) if part[0].dim() else part[0] for part in parts)


class Packed:
    """The parameters of an export under their plain names, each read when it is asked for.

    ``formats`` has the format of every weight that is quantized; those come as fp32 values.
    InputError on no safetensors file, a corrupt one, or a quantized weight without its scale.
    """

    def __init__(self, directory: Path, formats: Mapping[str, Format]) -> None:
        self.directory, self.formats, self.files = directory, formats, open_files(directory)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter that is there, by name."""
        beside = {n for name in self.formats for n in stored_names(name, self.formats[name])[1:]}
        return ((name, self[name]) for name in self.files if name not in beside)

    def __getitem__(self, name: str) -> Tensor:
        """A parameter, dequantized."""
        if (format := self.formats.get(name, "bf16")) == "bf16":
            return self.read(name, name)
        names = [n for n in stored_names(name, format) if not n.endswith(INPUT_SCALE)]
        found: Tensor = FORMATS[format].numerics.unpack(*(self.read(n, name) for n in names))
        return found

    def read(self, name: str, owner: str) -> Tensor:
        """A tensor as stored."""
        tensor: Tensor = self.file(name, owner).get_tensor(name)
        return tensor

    def row(self, name: str, owner: str, number: int) -> Tensor:
        """One of those that are stacked in a tensor, as stored."""
        [found] = self.file(name, owner).get_slice(name)[number : number + 1]
        assert isinstance(found, Tensor)
        return found

    def file(self, name: str, owner: str) -> Any:
        """The open file of a tensor."""
        if name not in self.files:
            raise InputError(f"{self.directory} has no tensor {name}, which {owner} needs")
        return self.files[name]


def open_files(directory: Path) -> dict[str, Any]:
    """The open safetensors file of every tensor of a directory."""
    found: dict[str, Any] = {}
    # By pattern, not by index: exports for servers carry none (see export/student.py).
    for path in sorted(directory.glob("*.safetensors")):
        try:
            file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise InputError(f"{path} is corrupt: {error}") from error
        found |= dict.fromkeys(file.keys(), file)
    if not found:
        raise InputError(f"{directory} holds no safetensors file")
    return found
