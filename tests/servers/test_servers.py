"""vLLM and llama.cpp read exports as they were measured (``pytest -m servers``).

``make_environments.sh`` makes their Pythons, which VLLM_PYTHON and LLAMA_PYTHON name.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from exports import CARD, with_words
from quantized import stored, with_formats, write_student
from safetensors.torch import save_file
from tiny_models import HYBRID, LLAMA, write_tiny

from compress.core.errors import VerificationFailed
from compress.core.files import read_json
from compress.export.record import RECORD, write_record
from compress.export.student import export_student
from compress.export.verify import verify
from compress.formats.table import Format
from compress.model.architecture import Ffn
from compress.model.checkpoint import open_checkpoint
from compress.model.families import read_architecture

pytestmark = pytest.mark.servers
VLLM, LLAMA_CPP = (os.environ.get(name, "") for name in ("VLLM_PYTHON", "LLAMA_PYTHON"))
needs_vllm = pytest.mark.skipif(not VLLM, reason="VLLM_PYTHON names no Python")
needs_llama = pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_PYTHON names no Python")
# vLLM's attention on a CPU has heads of 32 and wider.
WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
MIX: list[Format] = ["fp8", "nvfp4", "bf16"]


@needs_vllm
@pytest.mark.parametrize("formats", [["bf16"], ["fp8"], MIX])
def test_vllm_reads_even_students(tmp_path: Path, formats: Sequence[Format]) -> None:
    path = write_tiny(tmp_path / "model", LLAMA | WIDE)
    architecture = with_formats(open_checkpoint(path).architecture, formats)
    out = tmp_path / "out"
    facts = export_student(path, out, architecture, "vllm", CARD, python=Path(VLLM))
    assert "vLLM" in facts["reader"]
    assert facts["logit_difference"] < 1e-4


HYBRIDS = HYBRID | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}


@needs_vllm
@pytest.mark.parametrize("config", [LLAMA, HYBRIDS], ids=["llama", "nemotron_h"])
def test_vllm_reads_students_whose_layers_differ(tmp_path: Path, config: dict[str, object]) -> None:
    even = read_architecture(config | WIDE)
    blocks = [
        dataclasses.replace(block, ffn=256 - 32 * block.layer) if isinstance(block, Ffn) else block
        for block in even.blocks
    ]
    student = with_formats(dataclasses.replace(even, blocks=tuple(blocks)), MIX)
    path = write_student(tmp_path / "student", config | WIDE, with_formats(student, ["bf16"]))
    out = tmp_path / "out"
    facts = export_student(path, out, student, "vllm", CARD, python=Path(VLLM))
    assert "vLLM" in facts["reader"]


@needs_vllm
def test_vllm_finds_a_wrong_scale(tmp_path: Path) -> None:
    path, out = write_tiny(tmp_path / "model", LLAMA | WIDE), tmp_path / "out"
    architecture = with_formats(open_checkpoint(path).architecture, ["fp8"])
    export_student(path, out, architecture, "vllm", CARD)
    tensors = stored(out)
    scale = min(name for name in tensors if name.endswith("weight_scale"))
    save_file(tensors | {scale: tensors[scale] * 2}, out / "model.safetensors")
    write_record(out, read_json(out / RECORD)["predictions"])
    with pytest.raises(VerificationFailed, match=r"logits|greedy tokens"):
        verify(out, {"vllm": Path(VLLM)})


@needs_llama
@pytest.mark.parametrize("formats", [["bf16"], ["q8_0"]])
def test_llama_cpp_reads_even_students(tmp_path: Path, formats: Sequence[Format]) -> None:
    path = with_words(write_tiny(tmp_path / "model", LLAMA | WIDE))
    architecture = with_formats(open_checkpoint(path).architecture, formats)
    facts = export_student(
        path, tmp_path / "out", architecture, "llama.cpp", CARD, python=Path(LLAMA_CPP)
    )
    assert "llama.cpp" in facts["reader"]
