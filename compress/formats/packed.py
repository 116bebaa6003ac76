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

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.core.errors import InputError
from compress.formats.fake import fused_groups, shared
from compress.formats.table import FORMATS, INPUT_SCALE, Format


def stored_names(name: str, format: Format) -> list[str]:
    """The tensors that hold a weight of this format: itself, then its scales."""
    stem = name.removesuffix("weight")
    return [name, *(stem + suffix for suffix in FORMATS[format].suffixes)]


def pack_block(
    tensors: Mapping[str, Tensor],
    fused: Mapping[str, str | None],
    format: Format,
    inputs: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """A block's tensors as they are stored, those of fused groups in ``format``.

    ``fused`` has the fused group of every name, None where it stays; ``inputs`` the largest
    magnitude that the layers of a group read, for formats with an input scale.
    """
    row = FORMATS[format]
    common: dict[str, tuple[Tensor, ...]] = {}
    for names in fused_groups(tensors, fused):
        common |= dict.fromkeys(names, shared([tensors[name] for name in names], format))
    for name, tensor in tensors.items():
        group = fused[name]
        if group is None or format == "bf16":
            yield name, tensor
            continue
        row.require(tensor.shape)
        stored = row.numerics.pack(tensor, *common[name])
        if INPUT_SCALE in row.suffixes:
            stored = (*stored, row.numerics.tensor_scale(inputs[group]))
        yield from zip(stored_names(name, format), stored, strict=True)


def dequantized_tensors(
    directory: Path, formats: Mapping[str, Format]
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of an export under its plain name, quantized ones as FP32 values.

    ``formats`` has the format of every weight that is quantized. InputError on no safetensors
    file, a corrupt one, or a quantized weight without its scale.
    """
    with ExitStack() as stack:
        files = open_files(directory, stack)

        def read(name: str, owner: str) -> Tensor:
            if name not in files:
                raise InputError(f"{directory} has no tensor {name}, which {owner} needs")
            tensor: Tensor = files[name].get_tensor(name)
            return tensor

        beside = {each for name in formats for each in stored_names(name, formats[name])[1:]}
        for name in files:
            if (format := formats.get(name, "bf16")) != "bf16":
                names = [n for n in stored_names(name, format) if not n.endswith(INPUT_SCALE)]
                yield name, FORMATS[format].numerics.unpack(*(read(n, name) for n in names))
            elif name not in beside:
                yield name, read(name, name)


def open_files(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """The open safetensors file of every tensor of a directory; ``stack`` closes them."""
    found: dict[str, Any] = {}
    # By pattern, not by index: exports for servers carry none (see export/student.py).
    for path in sorted(directory.glob("*.safetensors")):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise InputError(f"{path} is corrupt: {error}") from error
        found |= dict.fromkeys(file.keys(), file)
    if not found:
        raise InputError(f"{directory} holds no safetensors file")
    return found
