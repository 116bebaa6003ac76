"""ModelOpt's checkpoint layout: which tensors it holds, read back to plain ones, its JSON repaired.

========  ==========================  ==========================  =====================
format    ``weight``                  ``weight_scale``            ``weight_scale_2``
========  ==========================  ==========================  =====================
FP8       E4M3 [out, in]              F32 [] of the tensor        -
NVFP4     U8 [out, in/2], two codes   E4M3 [out, in/16]           F32 [] of the tensor
========  ==========================  ==========================  =====================

Both have ``input_scale`` F32 [], which servers that quantize activations use and reading back does
not. Everything else is stored as it is, under the family's names.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.core.errors import InputError
from compress.formats import fp8, nvfp4
from compress.formats.table import Format
from compress.model.layout import Parameter

SCALES: dict[Format, tuple[str, ...]] = {
    "bf16": (),
    "fp8": ("weight_scale", "input_scale"),
    "nvfp4": ("weight_scale", "weight_scale_2", "input_scale"),
}
SUFFIXES = tuple("." + scale for scale in SCALES["nvfp4"])


def stored_names(parameter: Parameter, format: Format) -> list[str]:
    """The tensors that hold one parameter of a block of this format: itself, then its scales."""
    stem = parameter.name.removesuffix("weight")
    scales = SCALES[format] if parameter.slot.fused else ()
    return [parameter.name, *(stem + scale for scale in scales)]


def dequantized_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of an export under its plain name, quantized ones as FP32 values.

    Raises:
        InputError: no safetensors file, a corrupt one, or a quantized weight without its scale.
    """
    with ExitStack() as stack:
        files = open_files(directory, stack)

        def scale(name: str, suffix: str) -> Tensor:
            scale_name = name.removesuffix("weight") + suffix
            if scale_name not in files:
                raise InputError(f"{directory} has no tensor {scale_name}, which {name} needs")
            tensor: Tensor = files[scale_name].get_tensor(scale_name)
            return tensor

        for name, file in files.items():
            if name.endswith(SUFFIXES):
                continue
            tensor: Tensor = file.get_tensor(name)
            if tensor.dtype == torch.uint8:
                scales, second = scale(name, "weight_scale"), scale(name, "weight_scale_2")
                tensor = nvfp4.unpack(tensor, scales, second)
            elif tensor.dtype == torch.float8_e4m3fn:
                tensor = fp8.unpack(tensor, scale(name, "weight_scale"))
            yield name, tensor


def open_files(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """The open safetensors file of every tensor of a directory; ``stack`` closes them."""
    found: dict[str, Any] = {}
    # By pattern, not by index: exports for servers carry none (see export.py).
    for path in sorted(directory.glob("*.safetensors")):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise InputError(f"{path} is corrupt: {error}") from error
        found |= dict.fromkeys(file.keys(), file)
    if not found:
        raise InputError(f"{directory} holds no safetensors file")
    return found


def repaired(value: Any) -> Any:
    """ModelOpt's JSON with the module names of Nemotron-H mended, in keys and values.

    ModelOpt 0.47.0 maps names back to those on disk with a sentinel that it does not take out
    again: a dot, a NUL character and ``backbone.pt_name_sentinel``. Servers then match nothing.
    """
    if isinstance(value, dict):
        return {repaired(key): repaired(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [repaired(entry) for entry in value]
    return re.sub(r"\.\x00[^*]*", "", value) if isinstance(value, str) else value
