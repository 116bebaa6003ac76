"""Cutting equals masking, for every axis: the student is the teacher with the units at zero."""

from pathlib import Path

import pytest
import torch
from cuts import CASES, FFN, candidate
from tiny_models import EVERY, write_tiny
from transformers import AutoModelForCausalLM

from compress.core.errors import InputError
from compress.model.build import build_model, is_plain, load_model, student_config
from compress.model.checkpoint import open_checkpoint
from compress.model.layout import Slot
from compress.student.surgery import cut, prune, student_tensors


@pytest.mark.parametrize("case", CASES)
def test_cutting_equals_masking(case: str, tmp_path: Path) -> None:
    name, keep, mask = CASES[case]
    # fp32 on disk, so that folded norms are not rounded to bf16.
    path = write_tiny(tmp_path / name, EVERY[name], dtype=torch.float32)
    teacher = open_checkpoint(path)
    tokens = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    gated = load_model(path)
    whole = gated(input_ids=tokens).logits
    mask(gated)
    expected = gated(input_ids=tokens).logits
    student = candidate(teacher.architecture, keep)
    config = student_config(teacher.config, student.architecture)
    model = build_model(config, student.architecture, student_tensors(teacher, student))
    found = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    assert (expected - whole).abs().max() > 1e-2, "the cut must matter for the law to say something"


def test_a_norm_that_adds_to_its_weight_is_folded_as_a_whole() -> None:
    slot = Slot(shape="hidden", normalizes=("hidden",), offset=1.0)
    kept = {"hidden": torch.tensor([0, 2])}
    found = cut(torch.tensor([0.5, 9.0, -1.0, 9.0]), slot, {"hidden": 4}, kept)
    torch.testing.assert_close(1 + found, torch.tensor([1.5, 0.0]) * 2**0.5)


def test_a_written_student_is_the_student_in_memory(tiny: Path, tmp_path: Path) -> None:
    teacher = open_checkpoint(tiny)
    keep = {"blocks": torch.tensor([0, 1, 2, 3])}
    student = candidate(teacher.architecture, keep)
    prune(teacher, student, tmp_path / "student")
    config = student_config(teacher.config, student.architecture)
    memory = build_model(config, student.architecture, student_tensors(teacher, student))
    tokens = torch.randint(0, 128, (2, 20), generator=torch.Generator().manual_seed(6))
    disk = load_model(tmp_path / "student")
    assert torch.equal(disk(input_ids=tokens).logits, memory(input_ids=tokens).logits)
    assert is_plain(student.architecture)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    # Its grouped product of all experts rounds in another order than a loop over them.
    stock.set_experts_implementation("eager")
    assert torch.equal(stock(input_ids=tokens).logits, memory(input_ids=tokens).logits)


def test_stock_loaders_refuse_what_they_cannot_represent(tiny_llama: Path, tmp_path: Path) -> None:
    teacher = open_checkpoint(tiny_llama)
    student = candidate(teacher.architecture, {"layers.1.ffn/ffn": FFN})
    assert not is_plain(student.architecture)
    prune(teacher, student, tmp_path / "student")
    with pytest.raises(ValueError, match="compress"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    load_model(tmp_path / "student")


def test_generation_with_a_cache_equals_generation_without(tiny_llama: Path) -> None:
    teacher = open_checkpoint(tiny_llama)
    student = candidate(teacher.architecture, {"blocks": torch.tensor([1, 2, 3, 5])})
    config = student_config(teacher.config, student.architecture)
    model = build_model(config, student.architecture, student_tensors(teacher, student))
    prompt = torch.randint(1, 128, (1, 9))
    cached, plain = (
        model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=flag)
        for flag in (True, False)
    )
    assert torch.equal(cached, plain)


def test_nan_in_the_weights_is_an_error_naming_the_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_model(tmp_path)
