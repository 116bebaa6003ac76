"""What each target takes, and what it is told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exports import CARD, architecture_of
from quantized import with_formats
from tiny_models import EVERY, HYBRID, write_tiny

from compress.core.errors import InputError
from compress.export.accepted import check_target
from compress.export.serving import serving
from compress.export.student import export_student
from compress.export.targets import Target, restricted
from compress.formats.table import Format
from compress.memory.devices import find_device
from compress.memory.footprint import Deployment
from compress.model.architecture import from_json, in_kv_format
from compress.model.checkpoint import open_checkpoint
from compress.searches.space import load_space


def test_readers_of_experts_take_them_in_few_formats(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", HYBRID)
    taken: dict[Format, list[Target]] = {"fp8": ["transformers"], "nvfp4": ["vllm"]}
    readers: list[Target] = ["transformers", "vllm"]
    for format, targets in taken.items():
        for target in readers:
            architecture = with_formats(open_checkpoint(path).architecture, [format])
            space = restricted(load_space("joint"), target, "nemotron_h", tied=False)
            assert (format in (space.expert_formats or ())) == (target in targets)
            if target in targets:
                check_target(architecture, target)
                continue
            with pytest.raises(InputError, match=f"routed experts in bf16.*{format} ones; use --"):
                check_target(architecture, target)
    onnx: Any = "onnx"
    with pytest.raises(InputError, match=r"'onnx'.*vllm"):
        export_student(path, tmp_path / "out", open_checkpoint(path).architecture, onnx, CARD)
    assert not (tmp_path / "out").exists()


def test_servers_take_no_quantized_experts_that_they_know_stacked_only(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY["gpt_oss"])
    space = restricted(load_space("joint"), "vllm", "gpt_oss", tied=False)
    assert space.formats == ("bf16",)
    with pytest.raises(InputError, match=r"'vllm' takes bf16 only.*use --target compress$"):
        export_student(path, tmp_path / "out", architecture_of(path, ["fp8"]), "vllm", CARD)


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


def test_spaces_offer_the_kv_formats_that_a_target_takes() -> None:
    joint = load_space("joint")
    assert restricted(joint, "compress", "llama", tied=True).kv_scope == "block"
    assert restricted(joint, "vllm", "llama", tied=True).kv_scope == "global"


def test_serving_says_what_the_device_runs_and_a_command(tiny_llama: Path) -> None:
    architecture = in_kv_format(architecture_of(tiny_llama, ["nvfp4"]), "fp8")
    served = Deployment(context=4096, batch_size=2)
    room, weights, caches, command = serving(
        "a b", architecture, "vllm", served, find_device("a10g"), code=True
    )
    assert "room for a context of" in room
    assert "nvfp4 stay so in memory, Marlin" in weights
    assert "FP8 caches by FlashInfer only" in caches
    assert command == (
        "vllm serve 'a b' --max-model-len 4096 --max-num-seqs 2 --kv-cache-dtype fp8 "
        "--attention-backend FLASHINFER --trust-remote-code"
    )
    lines = serving("a", architecture, "vllm", served, find_device("l4"))
    assert len(lines) == 3
    assert lines[-1].endswith("--kv-cache-dtype fp8")
    assert serving("a", architecture, "compress", served) == []
