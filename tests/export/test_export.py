"""Exports: what was read back is what was meant, in bytes and in logits, or nothing is left."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quantized import fake_quantized_logits, uneven, with_formats, write_student
from safetensors.torch import load_file, save_file
from tiny_models import HYBRID, LLAMA
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.core.errors import InputError, VerificationFailed
from compress.export.modelopt import dequantized_tensors
from compress.export.quantize import token_rows
from compress.export.student import export_student
from compress.formats import fp8, nvfp4
from compress.formats.fake import group_amax
from compress.formats.table import Format
from compress.memory.footprint import Deployment, footprint
from compress.model.architecture import Architecture, from_json
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.families import read_architecture

FORMATS: list[Sequence[Format]] = [["bf16"], ["fp8"], ["nvfp4"], ["nvfp4", "fp8", "bf16"]]
CARD = {"command": "compress export tiny", "budget": "1 MiB", "measurements": {"measured_kl": 0.25}}


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory as stored."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def architecture_of(path: Path, formats: Sequence[Format]) -> Architecture:
    return with_formats(open_checkpoint(path).architecture, formats)


@pytest.mark.parametrize("target", ["compress", "vllm"])
@pytest.mark.parametrize("formats", FORMATS)
def test_an_export_has_the_planned_bytes_and_the_meant_logits(
    tiny: Path, tmp_path: Path, formats: Sequence[Format], target: str
) -> None:
    architecture, out = architecture_of(tiny, formats), tmp_path / "out"
    facts = export_student(tiny, out, architecture, target, CARD)
    found = stored(out)
    planned = footprint(architecture, Deployment(context=0)).weights
    assert sum(tensor.nbytes for tensor in found.values()) == planned == facts["bytes"]
    rows = token_rows(architecture, seed=2)
    expected = fake_quantized_logits(tiny, architecture, rows)
    torch.testing.assert_close(load_model(out)(rows).logits, expected)
    assert from_json((out / "architecture.json").read_text()) == architecture
    assert (out / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("formats", [["bf16"], ["nvfp4", "fp8", "nvfp4"]])
@pytest.mark.parametrize("config", [LLAMA, HYBRID], ids=["llama", "hybrid"])
def test_uneven_students_export_and_stock_loaders_refuse_them(
    tmp_path: Path, config: dict[str, object], formats: Sequence[Format]
) -> None:
    architecture, out = with_formats(uneven(config), formats), tmp_path / "out"
    path = write_student(tmp_path / "student", config, architecture)
    export_student(path, out, architecture, "compress", CARD)
    rows = token_rows(architecture, seed=2)
    expected = fake_quantized_logits(path, architecture, rows)
    torch.testing.assert_close(load_model(out)(rows).logits, expected)
    with pytest.raises((ValueError, KeyError), match="compress"):
        AutoModelForCausalLM.from_pretrained(out)
    for target in ("vllm", "transformers"):
        with pytest.raises(InputError, match="--target compress"):
            export_student(path, tmp_path / "no", architecture, target, CARD)
    assert not (tmp_path / "no").exists()


def test_plain_bf16_exports_load_with_stock_transformers(tiny: Path, tmp_path: Path) -> None:
    architecture = architecture_of(tiny, ["bf16"])
    facts = export_student(tiny, tmp_path / "out", architecture, "transformers", CARD)
    rows = token_rows(architecture, seed=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model(rows).logits, load_model(tiny)(rows).logits)
    assert "AutoModelForCausalLM" in facts["reader"]


@pytest.mark.parametrize("target", ["compress", "vllm"])
@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_stock_transformers_refuses_quantized_exports(
    tiny: Path, tmp_path: Path, format: Format, target: str
) -> None:
    export_student(tiny, tmp_path / "out", architecture_of(tiny, [format]), target, CARD)
    with pytest.raises((ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_transformers_takes_no_quantized_student(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nvfp4"):
        export_student(
            tiny, tmp_path / "out", architecture_of(tiny, ["nvfp4"]), "transformers", CARD
        )
    with pytest.raises(InputError, match=r"'onnx'.*vllm"):
        export_student(tiny, tmp_path / "out", architecture_of(tiny, ["bf16"]), "onnx", CARD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_packed_tensors_are_those_of_the_reference(
    tiny_hybrid: Path, tmp_path: Path, format: Format
) -> None:
    export_student(
        tiny_hybrid, tmp_path / "out", architecture_of(tiny_hybrid, [format]), "vllm", CARD
    )
    found, source = stored(tmp_path / "out"), stored(tiny_hybrid)
    prefix = "backbone.layers.1.mixer.experts"
    for projection in ("up_proj", "down_proj"):
        names = [f"{prefix}.{expert}.{projection}.weight" for expert in range(6)]
        amax = group_amax([source[name] for name in names])
        for name in names:
            if format == "fp8":
                codes, scale = fp8.pack(source[name], amax)
                assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8))
                assert torch.equal(found[name + "_scale"], scale)
            else:
                codes, block, scale = nvfp4.pack(source[name], amax)
                assert torch.equal(found[name], codes)
                assert torch.equal(found[name + "_scale"].float(), block.float())
                assert torch.equal(found[name + "_scale_2"], scale)
            assert float(found[name.replace("weight", "input_scale")]) > 0


def test_what_is_not_quantized_is_stored_as_it_was(tiny: Path, tmp_path: Path) -> None:
    architecture = architecture_of(tiny, ["nvfp4", "fp8"])
    export_student(tiny, tmp_path / "out", architecture, "compress", CARD)
    found, source = stored(tmp_path / "out"), stored(tiny)
    same = [name for name in source if found[name].dtype == source[name].dtype]
    assert any("embed" in name for name in same)
    assert all(torch.equal(found[name], source[name]) for name in same)


@pytest.mark.parametrize("formats", FORMATS[1:])
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
    architecture = dataclasses.replace(architecture_of(tiny_llama, ["fp8"]), kv_format="fp8")
    out = tmp_path / "out"
    export_student(tiny_llama, out, architecture, "vllm", CARD)
    details = json.loads((out / "hf_quant_config.json").read_text())
    assert details["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert "fp8" in (out / "README.md").read_text()


def test_the_model_card_tells_command_budget_and_measurements(tiny: Path, tmp_path: Path) -> None:
    export_student(tiny, tmp_path / "out", architecture_of(tiny, ["bf16"]), "compress", CARD)
    text = (tmp_path / "out" / "README.md").read_text()
    for expected in ("compress export tiny", "1 MiB", "measured_kl | 0.25", "AutoModelForCausalLM"):
        assert expected in text


@pytest.mark.parametrize("formats", FORMATS)
def test_a_failed_verification_leaves_nothing(
    tiny_llama: Path,
    tmp_path: Path,
    formats: Sequence[Format],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise VerificationFailed("logits")

    architecture = architecture_of(tiny_llama, formats)
    monkeypatch.setattr("compress.export.student.verify", fail)
    with pytest.raises(VerificationFailed):
        export_student(tiny_llama, tmp_path / "out", architecture, "compress", CARD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["fp8", "nvfp4"])
def test_a_wrong_scale_is_noticed(
    tiny_llama: Path, tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats: list[Format] = ["nvfp4", "fp8"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier").write_text("stays")
    right = {"fp8": fp8.unpack, "nvfp4": nvfp4.unpack}[module]
    wrong = SimpleNamespace(unpack=lambda *stored: right(*stored) * 1.01)
    monkeypatch.setattr(f"compress.export.modelopt.{module}", wrong)
    with pytest.raises(VerificationFailed, match="logits"):
        export_student(
            tiny_llama, tmp_path / "out", architecture_of(tiny_llama, formats), "compress", CARD
        )
    assert [entry.name for entry in tmp_path.rglob("*")] == ["out", "earlier"]


def test_wrong_bytes_are_noticed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.export.student.tensor_bytes", lambda files: 1)
    with pytest.raises(VerificationFailed, match="planned"):
        export_student(
            tiny_llama, tmp_path / "out", architecture_of(tiny_llama, ["bf16"]), "compress", CARD
        )
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_architecture_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="architecture"):
        export_student(tiny_llama, tmp_path / "out", uneven(LLAMA), "compress", CARD)


def test_damaged_exports_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_student(tiny_llama, out, architecture_of(tiny_llama, ["nvfp4"]), "compress", CARD)
    tensors = stored(out)
    lost = next(name for name in tensors if name.endswith("weight_scale_2"))
    del tensors[lost]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(InputError, match=lost):
        dict(dequantized_tensors(out))
    (out / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(InputError, match="corrupt"):
        dict(dequantized_tensors(out))
    (out / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no safetensors"):
        dict(dequantized_tensors(out))


@pytest.mark.parametrize("formats", [["bf16"], ["nvfp4", "fp8"]])
def test_sharded_exports_are_read_whole(
    tmp_path: Path, formats: Sequence[Format], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.model.checkpoint.SHARD_BYTES", 30_000)
    config = {**HYBRID, "moe_latent_size": 32}
    architecture = with_formats(read_architecture(config), formats)
    path, out = write_student(tmp_path / "student", config, architecture), tmp_path / "out"
    export_student(path, out, architecture, "vllm", CARD)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    rows = token_rows(architecture, seed=2)
    expected = fake_quantized_logits(path, architecture, rows)
    torch.testing.assert_close(load_model(out)(rows).logits, expected)
