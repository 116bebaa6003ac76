"""Checkpoints as people have them: dtypes, buffers, twins and files of other libraries."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.core.errors import InputError
from compress.model.build import load_model
from compress.model.checkpoint import in_bf16, open_checkpoint, write_checkpoint
from compress.text.tokenizer import load_tokenizer

FILE = "model.safetensors"
TOKENS = torch.arange(24).view(2, 12)
Tensors = dict[str, Tensor]


def every(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def mixed(tensors: Tensors) -> Tensors:
    """Norms in FP32, attention in FP16, the rest in BF16."""
    kinds = {"norm": torch.float32, "self_attn": torch.float16}
    return {
        name: tensor.to(next((kinds[kind] for kind in kinds if kind in name), torch.bfloat16))
        for name, tensor in tensors.items()
    }


def buffered(tensors: Tensors) -> Tensors:
    layers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(3)}
    return tensors | layers | {"model.rotary_emb.inv_freq": torch.ones(8)}


@pytest.mark.parametrize(
    "change",
    [every(torch.float32), every(torch.float16), every(torch.float64), mixed, buffered],
    ids=["fp32", "fp16", "fp64", "mixed", "buffers"],
)
def test_what_transformers_loads_computes_the_same(
    change: Callable[[Tensors], Tensors], tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    shutil.copytree(tiny_llama, path)
    save_file(change(load_file(path / FILE)), path / FILE, {"format": "pt"})
    (path / "pytorch_model.bin").write_bytes(b"a twin that nobody reads")
    (path / "pytorch_model.bin.index.json").write_text("{")
    auto: Any = AutoModelForCausalLM
    stock = auto.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(TOKENS).logits, stock(TOKENS).logits)
    checkpoint = open_checkpoint(path)
    tensors = in_bf16(checkpoint.items(), checkpoint.architecture)
    write_checkpoint(tmp_path / "out", tensors, checkpoint.config, path)
    written = load_file(tmp_path / "out" / FILE)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert not [name for name in written if "inv_freq" in name]


TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("tokenizer_config.json", json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE})),
    ],
)
def test_a_chat_template_is_read_wherever_it_is_and_goes_along(
    file: str, content: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    shutil.copytree(tiny_llama, path)
    (path / file).write_text(content)
    checkpoint = open_checkpoint(path)
    write_checkpoint(tmp_path / "out", checkpoint.items(), checkpoint.config, path)
    for model in (path, tmp_path / "out"):
        said = load_tokenizer(model).apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False
        )
        assert said == "user: hi"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("tokenizer.model",), "AutoTokenizer.from_pretrained reads its tokenizer.model"),
        (("vocab.json", "merges.txt"), "AutoTokenizer.from_pretrained reads its vocab.json"),
        ((), "copy the tokenizer of the model into it"),
    ],
)
def test_a_tokenizer_of_another_kind_is_one_line_that_says_what_to_do(
    files: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"\x0a")
    with pytest.raises(InputError, match=said) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
