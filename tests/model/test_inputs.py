"""Layers that round what they read: values are ModelOpt's, and what is stored is what is loaded."""

from pathlib import Path

import pytest
import torch
from quantized import with_formats
from torch import Tensor

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.export.accepted import check_target
from compress.export.student import export_student, round_student
from compress.export.targets import served_by
from compress.formats.table import FORMATS, Format
from compress.memory.devices import find_device
from compress.model.build import input_scales, load, load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.inputs import Inputs, round_inputs
from compress.model.modules import final_hidden
from compress.searches.space import load_space
from compress.sweep.placement import Placement
from compress.sweep.stack import final_states, stack_at

ROUNDING: list[Format] = [name for name, row in FORMATS.items() if row.rounds_inputs]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, count: int = 8) -> Tensor:
    return torch.randint(2, 97, (count, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_values_are_those_that_modelopt_packs(size: float) -> None:
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    x = drawn(0, 32, 64) * drawn(1, 32, 1).exp() * size
    for format in ROUNDING:
        # A scale from other text: what is larger saturates.
        scale = FORMATS[format].numerics.tensor_scale(x.abs().amax() * 0.9)
        if format == "fp8_a8":
            codes, _ = FP8QTensor.quantize(x.clamp(-448 * scale, 448 * scale), scale)
            theirs = codes._quantized_data.float() * scale
        else:
            packed, block, _ = NVFP4QTensor.quantize(x.clone(), 16, None, scale)
            theirs = packed.dequantize(
                torch.float32, scale=block, double_scale=scale, block_sizes={-1: 16}
            )
        torch.testing.assert_close(Inputs(format, scale)(x), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", ROUNDING)
def test_gradients_pass_as_if_nothing_was_rounded(format: Format) -> None:
    x, slope = drawn(0, 4, 32).requires_grad_(), drawn(1, 4, 32)
    Inputs(format)(x).backward(slope)
    assert x.grad is not None
    assert torch.equal(x.grad, slope)


@pytest.mark.parametrize("tiny", ["llama", "hybrid"], indirect=True)
def test_a_student_computes_the_same_stored_streamed_loaded_and_exported(
    tiny: Path, tmp_path: Path
) -> None:
    architecture = with_formats(open_checkpoint(tiny).architecture, ROUNDING)
    round_student(tiny, tmp_path / "student", architecture, tokens(0, 32), "second-order")
    rows = tokens(1)
    [found] = final_states(stack_at(tmp_path / "student"), [rows])
    [streamed] = final_states(stack_at(tmp_path / "student", Placement(memory=0)), [rows])
    assert torch.equal(found, streamed)
    with torch.no_grad():
        assert torch.equal(final_hidden(load(tmp_path / "student"), rows), found)
        # Scales count, and so does rounding inputs at all.
        weights = load_model(tmp_path / "student")
        assert not torch.allclose(final_hidden(weights, rows), found, atol=1e-3)
        scales = input_scales(open_checkpoint(tmp_path / "student"), architecture)
        round_inputs(weights, architecture, {name: 4 * scale for name, scale in scales.items()})
        assert not torch.equal(final_hidden(weights, rows), found)
    facts = export_student(tmp_path / "student", tmp_path / "out", architecture, "compress", {})
    assert facts["logit_difference"] < 1e-6
    export_student(tiny, tmp_path / "nearest", architecture, "compress", {})


def test_a_device_is_offered_what_its_kernels_run() -> None:
    space = load_space("joint")
    listed = space.model_copy(update={"formats": ("bf16", "nvfp4", *ROUNDING)})
    runs = {"a10g": set(), "h100": {"fp8_a8"}, "l4": {"fp8_a8"}, "b200": set(ROUNDING)}
    for name, formats in runs.items():
        served, line = served_by(listed, find_device(name))
        assert set(served.formats) == {"bf16", "nvfp4"} | formats
        assert (line is None) == (formats == set(ROUNDING))
    with pytest.raises(InputError, match=r"nvfp4_a4.*a10g has no products"):
        served_by(space.model_copy(update={"formats": ("nvfp4_a4",)}), find_device("a10g"))


@pytest.mark.parametrize("format", ROUNDING)
def test_servers_get_modelopts_layout_which_transformers_does_not_find(
    tiny_llama: Path, tmp_path: Path, format: Format
) -> None:
    architecture = with_formats(open_checkpoint(tiny_llama).architecture, [format])
    round_student(tiny_llama, tmp_path / "student", architecture, tokens(0, 32), "second-order")
    export_student(tmp_path / "student", tmp_path / "out", architecture, "vllm", {})
    told = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert told["quant_algo"] == format.partition("_")[0].upper()
    assert "input_activations" in told["config_groups"]["group_0"]
    [file] = (tmp_path / "out").glob("*.safetensors")
    assert file.name != "model.safetensors"
    mixed = with_formats(architecture, [format, "int4"])
    with pytest.raises(InputError, match=r"round inputs or formats that do not"):
        check_target(mixed, "vllm")
