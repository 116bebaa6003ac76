"""Experts that a checkpoint stacks in one tensor: read one by one, quantized or not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EVERY, write_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.core.errors import InputError
from compress.formats import mxfp4 as format
from compress.memory.footprint import block_bytes
from compress.model.architecture import Moe
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.families import count_active, count_parameters, in_one_format, read_architecture

AUTO: Any = AutoModelForCausalLM
TOKENS = torch.randint(1, 128, (2, 30), generator=torch.Generator().manual_seed(1))
STACK = "model.layers.1.block_sparse_moe.input_linear.weight"


def test_an_expert_is_some_rows_of_its_stack(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY["granitemoehybrid_moe"])
    checkpoint, stored = open_checkpoint(path), load_file(path / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.experts.4"
    assert torch.equal(checkpoint[f"{prefix}.gate_proj.weight"], stored[STACK][4, :32])
    assert torch.equal(checkpoint[f"{prefix}.up_proj.weight"], stored[STACK][4, 32:])
    path = write_tiny(tmp_path / "n", EVERY["gpt_oss"])
    checkpoint, stored = open_checkpoint(path), load_file(path / "model.safetensors")
    stack, prefix = stored["model.layers.2.mlp.experts.gate_up_proj"], "model.layers.2.mlp.experts."
    assert torch.equal(checkpoint[f"{prefix}3.up_proj.weight"], stack[3, :, 1::2].T)


@pytest.mark.parametrize("family", ["granitemoehybrid_moe", "gpt_oss"])
def test_a_token_uses_its_experts_of_a_stack_and_each_has_scales(family: str) -> None:
    architecture = read_architecture(EVERY[family])
    moes = [block for block in architecture.blocks if isinstance(block, Moe)]
    one = sum(3 * block.expert_ffn * architecture.hidden for block in moes)
    biases = sum(2 * m.expert_ffn + architecture.hidden for m in moes) if family == "gpt_oss" else 0
    idle = (moes[0].expert - moes[0].top_k) * (one + biases)
    assert count_parameters(architecture) - count_active(architecture) == idle
    block = Moe(layer=0, expert=4, expert_ffn=32, shared_ffn=None, top_k=2, gated=True)
    formats: list[Any] = ["bf16", "fp8", "nvfp4"]
    own = (in_one_format(block, "gpt_oss", f) for f in formats)
    stored = [dataclasses.replace(block, formats=each) for each in own]
    taken = [block_bytes(each, 64, "gpt_oss") for each in stored]
    weights, matrices = 4 * 3 * 32 * 64, 4 * 3
    # A scale in FP32 each: formats of weights alone have none of inputs.
    assert taken[0] - taken[1] == weights - matrices * 4
    assert taken[0] - taken[2] == 2 * weights - (weights // 2 + weights // 16 + matrices * 4)


def mxfp4(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and scales of experts [expert, in, out], each packed as its transpose."""
    codes, scales = format.pack(stack.transpose(1, 2).float().contiguous())
    return codes.view(*scales.shape, 16), scales


def write_released(path: Path) -> Path:
    """A checkpoint as gpt-oss is released: experts in MXFP4, all else in BF16."""
    config = EVERY["gpt_oss"]
    write_tiny(path, config)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensors.pop(name))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return path


def test_released_experts_in_mxfp4_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    path = write_released(tmp_path / "m")
    stock = AUTO.from_pretrained(path, dtype=torch.float32).eval()
    for layer in range(4):
        ours = load_model(path).model.layers[layer].mlp.experts
        theirs = stock.model.layers[layer].mlp.experts
        assert torch.equal(ours.gate_up_proj, theirs.gate_up_proj.float())
        assert torch.equal(ours.down_proj, theirs.down_proj.float())
    torch.testing.assert_close(load_model(path)(TOKENS).logits, stock(TOKENS).logits)


def restacked(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors with the experts of every layer in two, as in the torch model."""
    found, experts = dict[str, Tensor](), dict[str, dict[str, list[Tensor]]]()
    for name in sorted(stored):  # ten experts and fewer come in their order
        at, is_one, matrix = name.partition(".experts.")
        if is_one:
            of_layer = experts.setdefault(at, {})
            of_layer.setdefault(matrix.split(".")[1], []).append(stored[name])
        else:
            found[name] = stored[name]
    for at, own in experts.items():
        both = [torch.stack(own[name]) for name in ("gate_proj", "up_proj")]
        found[f"{at}.experts.gate_up_proj"] = torch.cat(both, 1)
        found[f"{at}.experts.down_proj"] = torch.stack(own["down_proj"])
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe_text"])
def test_experts_may_be_stacked_as_in_the_torch_model(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY[family])
    model = load_model(path)
    file = path / "model.safetensors"
    save_file(restacked(load_file(file)), file, {"format": "pt"})
    theirs = AUTO.from_pretrained(path, dtype=torch.float32).eval()
    found = load_model(path)(TOKENS).logits
    assert torch.equal(found, model(TOKENS).logits)
    assert torch.equal(found, theirs(TOKENS).logits)


def test_qwen3_5_is_read_as_it_is_released(tmp_path: Path) -> None:
    text = EVERY["qwen3_5_moe_text"]
    path = write_tiny(tmp_path / "m", text)
    model, file = load_model(path), path / "model.safetensors"
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in restacked(load_file(file)).items()
    }
    beside = ("model.visual.blocks.0.attn.qkv.weight", "mtp.layers.0.input_layernorm.weight")
    save_file(tensors | {name: torch.zeros(4) for name in beside}, file, {"format": "pt"})
    whole = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {}}
    (path / "config.json").write_text(json.dumps(whole))
    assert torch.equal(load_model(path)(TOKENS).logits, model(TOKENS).logits)


def test_a_stack_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY["granitemoehybrid_moe"])
    tensors = load_file(path / "model.safetensors")
    tensors[STACK] = tensors[STACK][:5].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"input_linear.weight in .* has shape \[5, 64, 64\]"):
        open_checkpoint(path)
    del tensors[STACK]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"has no tensor .*sparse_moe.input_linear"):
        open_checkpoint(path)
