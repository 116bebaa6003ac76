"""A quantized teacher is what its layout says: codes times scales, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packers import BLOCKS, CASES, FILE, MODELOPT, Stored, drawn, fp8_blocks, write_quantized
from safetensors.torch import load_file, save_file
from tiny_models import EVERY, LLAMA, write_tiny
from torch import Tensor

from compress.core.errors import InputError
from compress.memory.footprint import Deployment
from compress.memory.plan import make_plan
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.config import read_config
from compress.model.families import parameters


@pytest.mark.parametrize("name", CASES)
def test_values_are_codes_times_scales(name: str, tmp_path: Path) -> None:
    values = write_quantized(tmp_path, *CASES[name])
    checkpoint = open_checkpoint(tmp_path)
    assert len(values) == 21
    for weight, expected in values.items():
        found = checkpoint[weight]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), weight
    norm = checkpoint["model.norm.weight"]
    assert norm.dtype == torch.bfloat16


def test_the_model_is_that_of_the_values(tmp_path: Path) -> None:
    values = write_quantized(tmp_path / "q", *CASES["NVFP4 by modelopt"])
    plain = write_tiny(tmp_path / "plain", LLAMA)
    stored = {k: t.float() for k, t in load_file(plain / FILE).items()}
    save_file(stored | values, plain / FILE)
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(load_model(tmp_path / "q")(tokens).logits, load_model(plain)(tokens).logits)


def test_deepseek_is_read_as_it_is_released(tmp_path: Path) -> None:
    config = EVERY["deepseek_v3"] | {"num_nextn_predict_layers": 1}
    values = write_quantized(tmp_path / "q", *CASES["FP8 by fp8"], config)
    plain = write_tiny(tmp_path / "plain", config)
    whole = {k: t.float() for k, t in load_file(plain / FILE).items()}
    # What predicts further tokens is a layer more and a projection, quantized as the others are.
    assert len(values) == 5 * 5 + 2 * 3 + 3 * (6 + 1) * 3 + 1
    save_file(whole | values, plain / FILE)
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(load_model(tmp_path / "q")(tokens).logits, load_model(plain)(tokens).logits)


def packed_by(name: str, method: dict[str, Any], damage: Callable[[Stored], Any], to: Path) -> Path:
    write_quantized(to, method, CASES[name][1])
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
            "INT4 with zero points",
            lambda s: s.update({f"{UP}weight_zero_point": torch.zeros(12, 4, dtype=torch.int64)}),
            "tensor model.layers.1.mlp.up_proj.weight",
        ),
        (
            "FP8 by fp8",
            lambda s: s.update({f"{UP}weight_scale_inv": torch.ones(96, 0)}),
            "up_proj.weight_scale_inv [96, 0]",
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

    for weight, values in write_quantized(tmp_path, MODELOPT, pack).items():
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


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_read_dequantized(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY[family])
    plain = open_checkpoint(path)
    expected = {name: plain[name].float() for name in plain.tensors}
    stored = load_file(path / FILE)
    for each in parameters(plain.architecture):
        if each.slot.fused and each.name in stored:
            weight = stored.pop(each.name).float()
            parts, expected[each.name] = fp8_blocks("weight_scale_inv", 32, 48)(weight)
            stored |= {each.name.replace("weight", part): t for part, t in parts.items()}
    save_file(stored, path / FILE)
    config = read_config(path) | {"quantization_config": BLOCKS}
    (path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(path)
    assert found.architecture == plain.architecture
    for name, values in expected.items():
        assert torch.equal(found[name].float(), values), name
