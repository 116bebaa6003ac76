"""What each target takes, and what it is told."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exports import CARD, SERVED_MIXES, architecture_of
from quantized import stored
from tiny_models import EVERY, write_tiny

from compress.core.errors import InputError
from compress.export.student import export_student
from compress.export.targets import restricted, served_by
from compress.formats.table import Format
from compress.memory.devices import find_device
from compress.model.architecture import from_json, in_kv_format
from compress.searches.space import load_space


def test_transformers_takes_no_quantized_student(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bf16 only.*nvfp4.*--target vllm or compress"):
        export_student(
            tiny, tmp_path / "out", architecture_of(tiny, ["nvfp4"]), "transformers", CARD
        )
    onnx: Any = "onnx"
    with pytest.raises(InputError, match=r"'onnx'.*vllm"):
        export_student(tiny, tmp_path / "out", architecture_of(tiny, ["bf16"]), onnx, CARD)
    assert not list(tmp_path.iterdir())


def test_servers_take_no_quantized_experts_that_they_know_stacked_only(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY["gpt_oss"])
    space = restricted(load_space("joint"), "vllm", "gpt_oss", tied=False)
    assert space.formats == ("bf16",)
    with pytest.raises(InputError, match=r"'vllm' takes bf16 only.*use --target compress$"):
        export_student(path, tmp_path / "out", architecture_of(path, ["fp8"]), "vllm", CARD)


@pytest.mark.parametrize("formats", SERVED_MIXES[1:])
def test_module_names_in_the_json_files_are_those_on_disk(
    tiny_hybrid: Path, tmp_path: Path, formats: Sequence[Format]
) -> None:
    out = tmp_path / "out"
    export_student(tiny_hybrid, out, architecture_of(tiny_hybrid, formats), "vllm", CARD)
    details = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    modules = {name.removesuffix(".weight") for name in stored(out)}
    listed = [
        *details.get("exclude_modules", []),
        *details.get("quantized_layers", {}),
        *config.get("ignore", []),
        *config.get("quantized_layers", {}),
    ]
    assert listed
    for name in listed:
        assert any(module == name or module.startswith(name + ".") for module in modules), name


def test_the_kv_format_is_told_to_servers(tiny_llama: Path, tmp_path: Path) -> None:
    architecture = in_kv_format(architecture_of(tiny_llama, ["fp8"]), "fp8")
    out = tmp_path / "out"
    export_student(tiny_llama, out, architecture, "vllm", CARD)
    details = json.loads((out / "hf_quant_config.json").read_text())
    assert details["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert "fp8" in (out / "README.md").read_text()


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_kv_formats_that_differ_are_exported_for_us_alone(
    tiny_llama: Path, tmp_path: Path, format: Format
) -> None:
    architecture = architecture_of(tiny_llama, [format])
    first = in_kv_format(architecture, "fp8").blocks[0]
    architecture = replace(architecture, blocks=(first, *architecture.blocks[1:]))
    with pytest.raises(InputError, match=r"fp8 in 1 of 3 blocks KV; use --target compress$"):
        export_student(tiny_llama, tmp_path / "out", architecture, "vllm", CARD)
    export_student(tiny_llama, tmp_path / "out", architecture, "compress", CARD)
    read = from_json((tmp_path / "out" / "architecture.json").read_text())
    assert read.kv_formats == architecture.kv_formats
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fp8 in 1 of 3 blocks" in card
    assert f"layers.0.attention | {format}; fp8 KV; kv_head 2" in card


def test_spaces_offer_the_kv_formats_that_target_and_device_take() -> None:
    joint = load_space("joint")
    assert restricted(joint, "compress", "llama", tied=False).kv_scope == "block"
    assert restricted(joint, "vllm", "llama", tied=False).kv_scope == "global"
    assert served_by(joint, None) == (joint, None)
    assert served_by(joint, find_device("l4")) == (joint, None)
    space, line = served_by(joint, find_device("8xa100-80"))
    assert (space.kv_formats, line) == (
        ("bf16",),
        "fp8 KV caches are left out: no backend is sure to run them on 8xa100-80",
    )
    asked = joint.model_copy(update={"kv_formats": ("fp8",)})
    with pytest.raises(InputError, match=r"asks for fp8 KV caches.*on a10g; list bf16"):
        served_by(asked, find_device("a10g"))
