"""compressed-tensors: what the library and stock transformers read is what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from exports import CARD, architecture_of
from quantized import stored
from tiny_models import HYBRID, LLAMA, write_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress import load
from compress.export.student import export_student, token_rows
from compress.formats.table import Format
from compress.model.architecture import in_kv_format
from compress.model.checkpoint import open_checkpoint

WIDE = dict.fromkeys(("hidden_size", "intermediate_size"), 128) | {"head_dim": 32}


def quantization(directory: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((directory / "config.json").read_text())
    return found["quantization_config"]


def read_by_the_library(directory: Path) -> dict[str, Tensor]:
    """The weights of every module that a group names, as the library decompresses them."""
    config, tensors = QuantizationConfig.model_validate(quantization(directory)), stored(directory)
    found = {}
    for group in config.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(group.format)
        for module in group.targets:
            own = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if module in n}
            found[f"{module}.weight"] = compressor.decompress(own, group)["weight"]
    return found


@pytest.mark.parametrize("formats", [["fp8"], ["nvfp4"], ["int4"], ["int4", "nvfp4", "fp8"]])
def test_the_library_reads_the_values_that_were_measured(
    tmp_path: Path, formats: list[Format]
) -> None:
    path, out = write_tiny(tmp_path / "m", LLAMA | WIDE), tmp_path / "out"
    architecture = architecture_of(path, formats)
    export_student(path, tmp_path / "own", architecture, "compress", CARD)
    export_student(path, out, architecture, "vllm", CARD)
    measured, read = open_checkpoint(tmp_path / "own"), open_checkpoint(out)
    theirs = read_by_the_library(out)
    assert len(theirs) == 7 * 3
    for name, tensor in theirs.items():
        assert torch.equal(read[name], measured[name])
        # The library computes in the type of its scales, but for FP8.
        assert torch.equal(tensor.bfloat16(), measured[name].bfloat16())
    formats_told = {group["format"] for group in quantization(out)["config_groups"].values()}
    told = quantization(out)["format"]
    assert {told} == formats_told if len(formats) == 1 else told == "mixed-precision"


@torch.no_grad()
@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
@pytest.mark.parametrize("config", [LLAMA, HYBRID], ids=["llama", "hybrid"])
def test_stock_transformers_computes_fp8_students_exactly(
    tmp_path: Path, config: dict[str, object], kv_format: Any
) -> None:
    path, out = write_tiny(tmp_path / "m", config), tmp_path / "out"
    architecture = in_kv_format(architecture_of(path, ["fp8"]), kv_format)
    export_student(path, out, architecture, "transformers", CARD)
    rows = token_rows(architecture, seed=2)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(model(rows).logits, load(out)(rows).logits)
