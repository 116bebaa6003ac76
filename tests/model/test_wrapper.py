"""The text model inside a multimodal checkpoint, as transformers writes those."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import candidate
from safetensors.torch import load_file, save_file
from tiny_models import EVERY
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from compress.core.errors import InputError
from compress.memory.footprint import Deployment
from compress.memory.plan import make_plan
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.families import read_architecture
from compress.student.surgery import prune

TEXT: Any = AutoModelForCausalLM
WHOLE: Any = AutoModelForImageTextToText
TOKENS = torch.randint(1, 128, (2, 30), generator=torch.Generator().manual_seed(1))
EYES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PIXTRAL = {"vision_config": EYES | {"model_type": "pixtral", "head_dim": 16}}
VISUAL = {
    "vision_config": {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 64, "num_position_embeddings": 16,
    }
}  # fmt: skip
# A multimodal model type, its text model among the tiny ones, and the rest of its config.
WRAPPED: list[tuple[str, str, dict[str, Any]]] = [
    ("gemma3", "gemma3", {"mm_tokens_per_image": 4, "vision_config": EYES}),
    ("mistral3", "mistral", PIXTRAL),
    ("mistral3", "ministral3", PIXTRAL),
    ("qwen3_5", "qwen3_5_text", VISUAL),
    ("qwen3_5_moe", "qwen3_5_moe_text", VISUAL),
]


@pytest.fixture(params=WRAPPED, ids=lambda each: "-".join(each[:2]))
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A multimodal checkpoint of random weights."""
    kind, text, rest = request.param
    torch.manual_seed(0)
    inside = EVERY[text] | {"tie_word_embeddings": True}
    config = AutoConfig.for_model(kind, text_config=inside, **rest)
    model = WHOLE.from_config(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / kind)
    return tmp_path / str(kind)


def test_it_is_what_the_whole_makes_of_text(whole: Path) -> None:
    theirs = WHOLE.from_pretrained(whole, dtype=torch.float32).eval()
    torch.testing.assert_close(load_model(whole)(TOKENS).logits, theirs(input_ids=TOKENS).logits)


def test_a_student_is_a_checkpoint_of_the_text_model_alone(whole: Path, tmp_path: Path) -> None:
    teacher = open_checkpoint(whole)
    keep = {"blocks": torch.arange(len(teacher.architecture.blocks) - 2)}
    prune(teacher, candidate(teacher.architecture, keep), tmp_path / "student")
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert written["model_type"] == teacher.architecture.family
    assert "text_config" not in written
    stock = TEXT.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    assert type(stock).__name__ == written["architectures"][0]
    assert torch.equal(load_model(tmp_path / "student")(TOKENS).logits, stock(TOKENS).logits)


def test_a_quantized_whole_has_a_quantized_text_model(whole: Path) -> None:
    before = open_checkpoint(whole)
    name = next(name for name in before.tensors if name.endswith("o_proj.weight"))
    weight, stored = before[name], load_file(whole / "model.safetensors")
    [disk] = [key for key in stored if key.endswith(name.removeprefix("model."))]
    scale = weight.abs().max() / 448
    stored[disk], stored[f"{disk}_scale_inv"] = (weight / scale).to(torch.float8_e4m3fn), scale
    save_file(stored, whole / "model.safetensors")
    config = json.loads((whole / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None}
    (whole / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(whole)[name]
    assert float((found - weight).norm()) < 0.05 * float(weight.norm())


def test_a_plan_says_what_it_counts(whole: Path) -> None:
    plan = make_plan(whole, Deployment(context=64))
    assert plan.architecture == open_checkpoint(whole).architecture
    assert f"the text model of a {whole.name} checkpoint" in plan.notes[0]


def test_a_multimodal_config_without_a_text_model_is_refused() -> None:
    with pytest.raises(InputError, match="gemma3 model has no text_config"):
        read_architecture({"model_type": "gemma3"})
