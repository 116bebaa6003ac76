"""Quantized checkpoints in every layout, packed one number at a time, and their values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA, write_tiny
from torch import Tensor

FILE = "model.safetensors"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Stored = dict[str, Tensor]
Packer = Callable[[Tensor], tuple[Stored, Tensor]]


def drawn(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(len(shape)))


def scale_of(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 0.1 + 0.01


def over(scale: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    """The scale of every number."""
    row, column = (torch.arange(size) for size in weight.shape)
    return scale[row[:, None] // rows, column // columns]


def fp8(*shape: int) -> Callable[[Tensor], tuple[Stored, Tensor]]:
    def pack(weight: Tensor) -> tuple[Stored, Tensor]:
        codes = (weight * 50).to(torch.float8_e4m3fn)
        scale = scale_of(*(len(weight) if size < 0 else size for size in shape))
        each = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
        return {"weight": codes, "weight_scale": scale}, codes.float() * each

    return pack


def fp8_blocks(name: str, rows: int, columns: int) -> Packer:
    def pack(weight: Tensor) -> tuple[Stored, Tensor]:
        codes = (weight * 50).to(torch.float8_e4m3fn)
        scale = scale_of(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        return {"weight": codes, name: scale}, codes.float() * over(scale, weight, rows, columns)

    return pack


def int8(weight: Tensor) -> tuple[Stored, Tensor]:
    codes, zero = drawn(-128, 128, *weight.shape).char(), drawn(-9, 9, len(weight), 1).char()
    scale = scale_of(len(weight), 1).bfloat16()
    values = (codes.float() - zero.float()) * scale.float()
    return {"weight": codes, "weight_scale": scale, "weight_zero_point": zero}, values


def nvfp4(one: bool) -> Packer:
    def pack(weight: Tensor) -> tuple[Stored, Tensor]:
        codes = drawn(0, 16, *weight.shape)
        pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).byte()
        scale = (scale_of(len(weight), weight.shape[1] // 16) * 900).to(torch.float8_e4m3fn)
        whole = torch.tensor(0.003) if one else torch.tensor([350.0])
        each = scale.float() * whole if one else scale.float() / whole
        values = E2M1[codes] * over(each, weight, 1, 16)
        names = ("weight", "weight_scale_2") if one else ("weight_packed", "weight_global_scale")
        return {names[0]: pairs, "weight_scale": scale, names[1]: whole}, values

    return pack


def mxfp4(name: str) -> Packer:
    def pack(weight: Tensor) -> tuple[Stored, Tensor]:
        codes = drawn(0, 16, *weight.shape)
        pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).byte()
        scale = drawn(118, 126, len(weight), weight.shape[1] // 32).byte()
        values = E2M1[codes] * over(2.0 ** (scale.float() - 127), weight, 1, 32)
        return {name: pairs, "weight_scale": scale}, values

    return pack


def in_words(codes: Tensor, bits: int) -> Tensor:
    """Words of 32 bits, the lowest bits first, the last one filled up with zeros."""
    each = 32 // bits
    words = [[0] * -(-codes.shape[1] // each) for _ in codes]
    for row, line in zip(words, codes.tolist(), strict=True):
        for place, code in enumerate(line):
            row[place // each] |= (code + 2 ** (bits - 1)) << bits * (place % each)
    return torch.tensor(words).to(torch.int32)


def packed(bits: int, group: int | None, zero: bool = False, order: bool = False) -> Packer:
    def pack(weight: Tensor) -> tuple[Stored, Tensor]:
        rows, inputs = weight.shape
        half, size = 2 ** (bits - 1), group or inputs
        codes = drawn(-half, half, rows, inputs)
        scale, zeros = scale_of(rows, inputs // size).bfloat16(), drawn(-3, 4, rows, inputs // size)
        place = torch.arange(inputs) // size
        place = place.flip(0) if order else place
        values = (codes - (zeros[:, place] if zero else 0)).float() * scale.float()[:, place]
        stored = {"weight_packed": in_words(codes, bits), "weight_scale": scale}
        stored["weight_shape"] = torch.tensor([rows, inputs])
        if zero:
            stored["weight_zero_point"] = in_words(zeros.T, bits).T.contiguous()
        if order:
            stored["weight_g_idx"] = place.to(torch.int32)
        return stored, values

    return pack


def awq(weight: Tensor) -> tuple[Stored, Tensor]:
    codes = drawn(-8, 8, *weight.shape)
    bytes_ = ((codes[0::2] & 15) | (codes[1::2] & 15) << 4).byte()
    scale, inputs = scale_of(len(weight), weight.shape[1] // 16), scale_of(weight.shape[1])
    values = codes.float() * over(scale, weight, 1, 16) * inputs
    return {"weight": bytes_, "weight_scale": scale, "pre_quant_scale": inputs}, values


CT, MODELOPT = {"quant_method": "compressed-tensors"}, {"quant_method": "modelopt"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 48]}
GROUPS = {"config_groups": {"group_0": {"weights": {"block_structure": [48, 32]}}}}
CASES: dict[str, tuple[dict[str, Any], Packer]] = {
    "FP8 by compressed-tensors": (CT, fp8(1)),
    "FP8 by modelopt": (MODELOPT, fp8()),
    "FP8 by fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, fp8(-1, 1)),
    "FP8 by channels": (MODELOPT, fp8(-1)),
    "FP8 by fp8": (BLOCKS, fp8_blocks("weight_scale_inv", 32, 48)),
    "FP8 by default blocks": ({"quant_method": "fp8"}, fp8_blocks("weight_scale_inv", 128, 128)),
    "FP8 by structure": (CT | GROUPS, fp8_blocks("weight_scale", 48, 32)),
    "FP8 by groups": (CT, fp8_blocks("weight_scale", 1, 32)),
    "INT8 by compressed-tensors": (CT, int8),
    "NVFP4 by modelopt": ({"quant_algo": "NVFP4"}, nvfp4(True)),
    "NVFP4 by compressed-tensors": (CT, nvfp4(False)),
    "MXFP4 by modelopt": (MODELOPT, mxfp4("weight")),
    "MXFP4 by compressed-tensors": (CT, mxfp4("weight_packed")),
    "INT4 by compressed-tensors": (CT, packed(4, 32)),
    "INT4 by rows": (CT, packed(4, None)),
    "INT4 with zero points": (CT, packed(4, 16, zero=True)),
    "INT4 in order of activations": (CT, packed(4, 32, zero=True, order=True)),
    "INT8 in words": (CT, packed(8, 32, zero=True)),
    "INT4 by modelopt": (MODELOPT, awq),
}


def write_quantized(
    directory: Path, settings: dict[str, Any], pack: Packer, model: dict[str, Any] = LLAMA
) -> dict[str, Tensor]:
    """A tiny model whose layers are packed, and the values of their weights."""
    write_tiny(directory, model)
    stored, values = load_file(directory / FILE), {}
    for name in [name for name in stored if "proj" in name]:
        parts, values[name] = pack(stored.pop(name).float())
        stored |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
        stored[name.replace("weight", "input_scale")] = torch.tensor(2.0)
    stored["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(stored, directory / FILE)
    config = json.loads((directory / "config.json").read_text())
    written = json.dumps(config | {"quantization_config": settings})
    (directory / "config.json").write_text(written)
    return values
