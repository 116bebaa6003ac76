"""Students whose layers differ, in layouts that servers know: read back by stock transformers.

The code that it runs is ours, from the export.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import CARD
from quantized import write_student
from tiny_models import HYBRID, LLAMA, MORE
from transformers import AutoModelForCausalLM

from compress.core.errors import InputError
from compress.export.student import export_student, token_rows
from compress.memory.footprint import weight_bytes
from compress.model.architecture import Architecture, Ffn
from compress.model.build import load_model
from compress.model.families import read_architecture

QWEN2 = {key: value for key, value in MORE["qwen2"].items() if key != "layer_types"}
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"num_hidden_layers": 4},
    "mistral": MORE["mistral"] | {"sliding_window": None},
    "qwen2": QWEN2 | {"use_sliding_window": False},
    "nemotron_h": HYBRID
    | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "moe"]},
}


def uneven(teacher: Architecture) -> Architecture:
    """FFNs that are each narrower than the one before; of llamas, two halves of layers are gone."""
    blocks = [
        dataclasses.replace(block, ffn=96 - 16 * block.layer) if isinstance(block, Ffn) else block
        for block in teacher.blocks
    ]
    if teacher.family != "nemotron_h":
        del blocks[5], blocks[2]
    return dataclasses.replace(teacher, blocks=tuple(blocks))


@pytest.mark.parametrize("family", TEACHERS)
def test_stock_transformers_computes_what_the_student_does(family: str, tmp_path: Path) -> None:
    student = uneven(read_architecture(TEACHERS[family]))
    source = write_student(tmp_path / "student", TEACHERS[family], student)
    out = tmp_path / "out"
    facts = export_student(source, out, student, "vllm", CARD)
    assert facts["bytes"] == weight_bytes(student)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    rows, meant = token_rows(student, seed=2), load_model(source)
    assert torch.equal(model(rows).logits, meant(rows).logits)
    asked = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(rows[:1], **asked), meant.generate(rows[:1], **asked))
    assert torch.equal(load_model(out)(rows).logits, meant(rows).logits)


def test_what_servers_cannot_express_is_refused_with_the_reason(tmp_path: Path) -> None:
    teacher = read_architecture(TEACHERS["llama"])
    first, *others = teacher.blocks
    narrow = dataclasses.replace(first, kv_head=1)
    refused = {"kv_head, which differs": (narrow, *others), "begin with attention": others}
    for reason, blocks in refused.items():
        student = dataclasses.replace(teacher, blocks=tuple(blocks))
        source = write_student(tmp_path / reason, TEACHERS["llama"], student)
        with pytest.raises(InputError, match=rf"{reason}.*--target compress$"):
            export_student(source, tmp_path / "out", student, "vllm", CARD)
    assert not (tmp_path / "out").exists()
