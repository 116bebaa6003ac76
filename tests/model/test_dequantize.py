"""A quantized teacher is what its layout says: codes times scales, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA, write_tiny
from torch import Tensor

from compress.core.errors import InputError
from compress.memory.footprint import Deployment
from compress.memory.plan import make_plan
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint

FILE = "model.safetensors"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Stored = dict[str, Tensor]
Packer = Callable[[Tensor], tuple[Stored, Tensor]]


def drawn(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(len(shape)))


def scale_of(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 0.1 + 0.01


def over(scale: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    """The scale of every number, one at a time."""
    return torch.stack([
        torch.stack([scale[i // rows, j // columns] for j in range(weight.shape[1])])
        for i in range(weight.shape[0])
    ])  # fmt: skip


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


def quantized(directory: Path, settings: dict[str, Any], pack: Packer) -> dict[str, Tensor]:
    """A tiny llama whose layers are packed, and the values of their weights."""
    write_tiny(directory, LLAMA)
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


@pytest.mark.parametrize("name", CASES)
def test_values_are_codes_times_scales(name: str, tmp_path: Path) -> None:
    values = quantized(tmp_path, *CASES[name])
    checkpoint = open_checkpoint(tmp_path)
    assert len(values) == 21
    for weight, expected in values.items():
        found = checkpoint[weight]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), weight
    norm = checkpoint["model.norm.weight"]
    assert norm.dtype == torch.bfloat16


def test_the_model_is_that_of_the_values(tmp_path: Path) -> None:
    values = quantized(tmp_path / "q", *CASES["NVFP4 by modelopt"])
    plain = write_tiny(tmp_path / "plain", LLAMA)
    stored = {k: t.float() for k, t in load_file(plain / FILE).items()}
    save_file(stored | values, plain / FILE)
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(load_model(tmp_path / "q")(tokens).logits, load_model(plain)(tokens).logits)


def packed_by(name: str, method: dict[str, Any], damage: Callable[[Stored], Any], to: Path) -> Path:
    quantized(to, method, CASES[name][1])
    stored = load_file(to / FILE)
    damage(stored)
    save_file(stored, to / FILE)
    return to


UP = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (
            "FP8 by fp8",
            lambda s: s.update({f"{UP}weight_scale_inv": torch.ones(5, 2)}),
            "model.layers.1.mlp.up_proj.weight_scale_inv [5, 2] in",
        ),
        (
            "NVFP4 by modelopt",
            lambda s: s.update({f"{UP}weight_scale_2": torch.ones(3)}),
            "hold no [96, 64] in NVFP4 by modelopt",
        ),
        (
            "INT4 by compressed-tensors",
            lambda s: s.update({f"{UP}weight_packed": torch.zeros(96, 9, dtype=torch.int32)}),
            "up_proj.weight_packed [96, 9]",
        ),
        (
            "INT4 with zero points",
            lambda s: s.update({f"{UP}weight_zero_point": torch.zeros(96, 9, dtype=torch.int32)}),
            "up_proj.weight_zero_point [96, 9]",
        ),
        (
            "INT4 by modelopt",
            lambda s: s.update({f"{UP}pre_quant_scale": torch.ones(63)}),
            "up_proj.pre_quant_scale [63]",
        ),
        ("INT4 by compressed-tensors", lambda s: s.pop(f"{UP}weight_scale"), f"no tensor {UP}"),
        (
            "FP8 by fp8",
            lambda s: s.update({f"{UP}lora_a": torch.ones(3)}),
            "up_proj.lora_a, which no table",
        ),
    ],
)
def test_what_does_not_hold_a_weight_is_one_line(
    name: str, damage: Callable[[Stored], Any], said: str, tmp_path: Path
) -> None:
    path = packed_by(name, CASES[name][0], damage, tmp_path)
    for door in (open_checkpoint, lambda path: make_plan(path, Deployment(context=64))):
        with pytest.raises(InputError) as error:
            door(path)
        assert said in str(error.value)
        assert "\n" not in str(error.value)
        assert "take the one in BF16" in str(error.value)


def test_codes_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    def damage(stored: Stored) -> None:
        stored[f"{UP}weight"].view(torch.uint8)[3, 4] = 0x7F

    path = packed_by("FP8 by fp8", BLOCKS, damage, tmp_path)
    with pytest.raises(InputError, match=f"tensor {UP}weight in .* holds NaN"):
        open_checkpoint(path)[f"{UP}weight"]


def test_experts_of_gpt_oss_equal_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from compress.model.dequantize import experts

    blocks, scales = drawn(0, 256, 3, 8, 2, 16).byte(), drawn(110, 130, 3, 8, 2).byte()
    found = experts({"{name}_blocks": blocks, "{name}_scales": scales}, (3, 64, 8), (1, 1))
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(found, theirs)


@pytest.mark.parametrize("name", ["NVFP4 by modelopt", "INT4 by modelopt", "MXFP4 by modelopt"])
def test_what_modelopt_packs_is_what_it_would_dequantize(name: str, tmp_path: Path) -> None:
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    def pack(weight: Tensor) -> tuple[Stored, Tensor]:
        if name.startswith("NVFP4"):
            held, scale, second = NVFP4QTensor.quantize(weight, 16)
            values = held.dequantize(
                torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16}
            )
            return {
                "weight": held._quantized_data,
                "weight_scale": scale,
                "weight_scale_2": second,
            }, values
        if name.startswith("MXFP4"):
            held, scale = MXFP4QTensor.quantize(weight, 32)
            values = held.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
            return {
                "weight": held._quantized_data,
                "weight_scale": scale.view(len(weight), -1),
            }, values
        scale = weight.view(len(weight), -1, 32).abs().amax(-1) / 7
        whole = scale.repeat_interleave(32, -1)
        values = (weight / whole).round().clamp(-8, 7) * whole
        return {"weight": pack_int4_in_uint8(weight, scale, 32), "weight_scale": scale}, values

    for weight, values in quantized(tmp_path, MODELOPT, pack).items():
        torch.testing.assert_close(open_checkpoint(tmp_path)[weight], values, atol=0, rtol=1e-7)


OF_CT = {
    "FP8 by compressed-tensors": ("naive-quantized", {"num_bits": 8, "type": "float"}),
    "FP8 by structure": (
        "naive-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 32]},
    ),
    "INT8 by compressed-tensors": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "NVFP4 by compressed-tensors": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "MXFP4 by compressed-tensors": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
    "INT4 by compressed-tensors": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    ),
    "INT4 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "INT8 in words": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_CT)
def test_compressed_tensors_says_the_same(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    format, settings = OF_CT[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(3))
    stored, values = CASES[name][1](weight)
    theirs = BaseCompressor.get_value_from_registry(format).decompress(stored, scheme)["weight"]
    assert torch.equal(values.to(theirs.dtype), theirs)
