"""compressed-tensors: weights in formats, activations in BF16, for transformers and vLLM alike.

compressed-tensors 0.20, of each weight [out, in]::

    FP8     naive-quantized        weight E4M3, weight_scale F32 [1]
    NVFP4   nvfp4-pack-quantized   weight_packed U8 [out, in/2], weight_scale E4M3 [out, in/16],
                                   weight_global_scale F32 [1]: one over our tensor scale
    INT4    pack-quantized         weight_packed I32 [out, in/8], the first column in the lowest
                                   bits, plus 8; weight_scale BF16 [out, in/128], weight_shape

Codes and scales are those that were measured: nothing is rounded here. Modules are named one by
one, so that formats may differ by linear layer; all experts of a layer are a regular expression.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.export.layouts.directory import Quantization, as_stored, shape_of
from compress.export.layouts.student import Weight
from compress.formats.table import KV_FORMATS, Format
from compress.model.architecture import Architecture

FP8_NUMBERS = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """How a format is called here, what its numbers are, and its tensors by what ends their names.

    ``parts`` takes codes and scales as they are stored in a run.
    """

    name: str
    numbers: Mapping[str, Any]
    parts: Callable[..., Mapping[str, Tensor]]


def fp8(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of FP8."""
    return {"weight": codes, "weight_scale": scale.reshape(1)}


def nvfp4(pairs: Tensor, scales: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of NVFP4."""
    inverse = (1 / scale).reshape(1)
    return {"weight_packed": pairs, "weight_scale": scales, "weight_global_scale": inverse}


def int4(pairs: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The tensors of INT4; a code plus 8 is its two's complement with the highest bit turned."""
    return {"weight_packed": (pairs ^ 0x88).view(torch.int32), "weight_scale": scales}


FORMATS: Mapping[Format, Packed] = {
    "fp8": Packed(name="naive-quantized", numbers=FP8_NUMBERS, parts=fp8),
    "nvfp4": Packed(
        name="nvfp4-pack-quantized",
        numbers={
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
        parts=nvfp4,
    ),
    "int4": Packed(
        name="pack-quantized",
        numbers={"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
        parts=int4,
    ),
}  # fmt: skip
CONSTANT = {"symmetric": True, "dynamic": False}
# transformers (5.23) takes the first group with such an expression for that of all experts, and
# else the first group: of one in FP8 it leaves those in BF16 alone. No module has this name.
NO_EXPERTS = "re:^no experts$"


def tensors(weight: Weight) -> dict[str, Tensor]:
    """The tensors that hold a weight."""
    if weight.format == "bf16":
        return as_stored(weight)
    stem = weight.name.removesuffix("weight")
    parts = FORMATS[weight.format].parts(*weight.parts)
    return {stem + end: tensor for end, tensor in parts.items()} | shape_of(weight)


def target(module: str) -> str:
    """How a group names a module, or all experts of a layer, which no loader has as one."""
    return f"re:^{re.escape(module)}\\.\\d+\\..*" if is_experts(module) else module


def is_experts(module: str) -> bool:
    """Whether a module is all experts of a layer."""
    return module.endswith(".experts")


def config(modules: Mapping[str, Format], architecture: Architecture) -> dict[str, Any]:
    """The quantization of config.json."""
    by_format: dict[Format, list[str]] = {}
    for module, format in modules.items():
        if format != "bf16":
            by_format.setdefault(format, []).append(target(module))
    if {format for module, format in modules.items() if is_experts(module)} == {"bf16"}:
        by_format.setdefault("fp8", []).append(NO_EXPERTS)
    groups = [
        {
            "targets": by_format[format],
            "format": FORMATS[format].name,
            "weights": {**FORMATS[format].numbers, **CONSTANT},
            "input_activations": None,
            "output_activations": None,
        }
        for format in FORMATS
        if format in by_format
    ]
    kv_formats = set(architecture.kv_formats.values()) - {KV_FORMATS[0]}
    names = {group["format"] for group in groups}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": names.pop() if len(names) == 1 else "mixed-precision",
            # Without it transformers computes NaN and says nothing.
            "quantization_status": "compressed",
            "ignore": [],
            "config_groups": {f"group_{n}": group for n, group in enumerate(groups)},
            "kv_cache_scheme": {**FP8_NUMBERS, **CONSTANT} if kv_formats else None,
        }
    }


COMPRESSED_TENSORS = Quantization(tensors=tensors, config=config)
