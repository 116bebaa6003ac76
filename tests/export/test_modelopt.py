"""Exports in ModelOpt's layout are what ModelOpt itself writes, tensor by tensor and key by key."""

import importlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import architecture_of, with_experts
from quantized import stored
from torch import Tensor
from transformers import PreTrainedModel

from compress.export.student import export_student, token_rows
from compress.formats.fake import group_amax
from compress.formats.table import FORMATS, INPUT_SCALE, Format
from compress.model.architecture import Architecture, group_format
from compress.model.build import load_model
from compress.model.families import family_of, parameters

NUMBERS: dict[str, dict[str, Any]] = {
    "fp8_a8": {"num_bits": (4, 3), "axis": None},
    "nvfp4_a4": {
        "num_bits": (2, 1), "axis": None,
        "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
    },
}  # fmt: skip


# What a tensor scale is the range's share of.
LARGEST: dict[Format, int] = {"fp8_a8": 448, "nvfp4_a4": 6 * 448}
ENDS = torch.tensor([math.inf, -math.inf])


def modules(architecture: Architecture) -> Iterator[tuple[list[str], Format]]:
    """Paths in memory of the layers of every quantized fused group, with its format."""
    layer = family_of(architecture.family).layer
    groups: dict[tuple[int, str], list[str]] = {}
    for each in parameters(architecture):
        if each.block is not None and each.slot.fused:
            number = architecture.blocks[each.block].layer
            path = each.name.removeprefix(layer.format(layer=number)).removesuffix(".weight")
            groups.setdefault((each.block, each.slot.fused), []).append(
                f"model.layers.{number}.{path}"
            )
    for (number, group), names in groups.items():
        if (format := group_format(architecture.blocks[number], group)) != "bf16":
            yield names, format


def quantizers(path: str) -> tuple[str, str]:
    """Names of the weight and the input quantizer of a linear layer or of a fused expert."""
    if match := re.match(r"(.*\.experts)\.(\d+)\.(\w+)$", path):
        stem = f"{match[1]}.{match[3]}"
        return f"{stem}_weight_quantizers.{match[2]}", f"{stem}_input_quantizer"
    return f"{path}.weight_quantizer", f"{path}.input_quantizer"


def range_of(amax: Tensor, format: Format) -> Tensor:
    """The range by which ModelOpt comes to our tensor scale, which kernels do not round."""
    scale, largest = FORMATS[format].numerics.tensor_scale(amax), LARGEST[format]
    near = [scale * largest, *(torch.nextafter(scale * largest, end) for end in ENDS)]
    return next(each for each in near if torch.equal(each / largest, scale))


def with_modelopt(path: Path, architecture: Architecture) -> PreTrainedModel:
    """The model quantized by ModelOpt, with one range for every fused group."""
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for names, format in modules(architecture):
        for quantizer in {q for name in names for q in quantizers(name)}:
            rules.append({"quantizer_name": quantizer, "cfg": NUMBERS[format]})
    quantization: Any = importlib.import_module("modelopt.torch.quantization")
    model: PreTrainedModel = quantization.quantize(
        load_model(path),
        {"quant_cfg": rules, "algorithm": "max"},
        forward_loop=lambda model: model(input_ids=token_rows(architecture), use_cache=False),
    )
    found: dict[str, Any] = dict(model.named_modules())
    for names, format in modules(architecture):
        group = [found[quantizers(name)[0]] for name in names]
        amax = range_of(group_amax([quantizer.amax for quantizer in group]), format)
        for quantizer in group:
            quantizer.amax = amax
    return model


def mended(value: Any) -> Any:
    """ModelOpt's JSON without the sentinel that it leaves in Nemotron-H's names, lists sorted."""
    if isinstance(value, dict):
        return {mended(key): mended(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return sorted(mended(entry) for entry in value)
    return re.sub(r"\.\x00[^*]*", "", value) if isinstance(value, str) else value


@pytest.mark.parametrize(
    "formats", [["fp8_a8"], ["nvfp4_a4", "bf16"], ["nvfp4_a4", "fp8_a8", "bf16"]]
)
def test_an_export_is_what_modelopt_writes(
    tiny_hybrid: Path, tmp_path: Path, formats: Sequence[Format]
) -> None:
    architecture = with_experts(architecture_of(tiny_hybrid, formats), formats[0])
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    export_student(tiny_hybrid, ours, architecture, "vllm", {})
    with torch.no_grad():
        export: Any = importlib.import_module("modelopt.torch.export")
        # In BF16 it would round FP8 weights twice.
        model = with_modelopt(tiny_hybrid, architecture)
        export.export_hf_checkpoint(model, dtype=torch.float32, export_dir=theirs)
    found, expected = stored(ours), stored(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if tensor.dtype == torch.bfloat16:
            assert torch.equal(tensor.float(), expected[name])
        else:
            assert tensor.dtype == expected[name].dtype
            if name.endswith(INPUT_SCALE):
                # Ours are of what the student reads whose layers before are rounded already.
                assert 0.7 < float(tensor) / float(expected[name]) < 1.4
                continue
            assert torch.equal(tensor.float(), expected[name].float()), name
    for file, key in (
        ("hf_quant_config.json", "quantization"),
        ("config.json", "quantization_config"),
    ):
        one, other = (mended(json.loads((path / file).read_text())[key]) for path in (ours, theirs))
        assert one == other
