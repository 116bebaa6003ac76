"""Exports: a Hugging Face directory that was read back and computes what it should.

BF16 students are plain checkpoints. Quantized ones have ModelOpt's layout, packed by us a block at
a time under the family's names; what is not quantized is in BF16 as it was. ``target`` decides who
may read the result:

- ``transformers``: plain BF16, nothing else.
- ``vllm``: the stock ``model_type`` with ModelOpt's quantization config. Stock transformers would
  load FP8 codes without their scales, so these exports have no file it looks for: shards without an
  index, which servers find by pattern.
- ``compress``: anything; what is not plain BF16 says ``model_type: "compress"``, so that stock
  loaders refuse it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.core.errors import InputError, VerificationFailed
from compress.core.files import atomic_directory, write_text
from compress.export.card import model_card
from compress.export.inputs import Group, input_ranges, token_rows
from compress.export.modelopt import quantization_json
from compress.export.targets import LOADERS, Loader, Target
from compress.formats.packed import pack_block
from compress.memory.budget import in_format
from compress.memory.footprint import Deployment, footprint
from compress.model.architecture import Architecture, to_json
from compress.model.build import build_model, is_plain, load_model, student_config
from compress.model.checkpoint import Checkpoint, in_bf16, open_checkpoint, write_files
from compress.model.weights import INDEX, SINGLE
from compress.student.surgery import by_block, quantized

QUANT_CONFIG = "hf_quant_config.json"
# Written and read models run the same arithmetic; a wrong scale or a lost tensor is far above this.
TOLERANCE = 1e-3


def export_student(
    student: Path,
    out: Path,
    architecture: Architecture,
    target: Target,
    card: Mapping[str, Any],
    calibration: Tensor | None = None,
) -> dict[str, Any]:
    """Write the BF16 student at ``student`` to ``out`` in the formats of ``architecture``.

    ``card`` is what the model card tells: command, budget, measurements. ``calibration`` are the
    token rows that input scales are taken from. Returns what was verified. ``out`` appears whole
    and verified, or not at all.

    Raises:
        InputError: the target cannot express this student, or the checkpoint is not its own.
        VerificationFailed: what was read back differs in bytes or in logits.
    """
    check_target(architecture, target)
    checkpoint = open_checkpoint(student)
    if without_formats(checkpoint.architecture) != without_formats(architecture):
        raise InputError(f"the checkpoint at {student} does not have the architecture to export")
    rows = token_rows(architecture, seed=1)
    calibration = token_rows(architecture) if calibration is None else calibration
    with atomic_directory(out) as directory:
        expected = write_student(checkpoint, architecture, directory, target, rows, calibration)
        facts = {"target": target, "formats": sorted(architecture.formats)}
        facts |= verify(directory, architecture, expected, rows)
        write_text(directory / "README.md", model_card(out.name, architecture, facts, card))
    return {"path": str(out), **facts}


def check_target(architecture: Architecture, target: Target) -> None:
    """InputError when no reader of ``target`` could load this student."""
    if target not in LOADERS:
        raise InputError(f"target {target!r} is not among {', '.join(LOADERS)}")
    loader = LOADERS[target]
    if not loader.uneven and not is_plain(architecture):
        raise InputError(
            f"target {target!r} takes students whose blocks all have the same sizes; "
            "export this one with --target compress"
        )

    def takes(other: Loader) -> bool:
        known = architecture.formats <= set(other.formats)
        return known and architecture.kv_format in other.kv_formats

    if not takes(loader):
        formats = ", ".join(sorted(architecture.formats))
        others = " or ".join(name for name, other in LOADERS.items() if takes(other))
        raise InputError(
            f"target {target!r} takes {', '.join(loader.formats)} only, this student has {formats} "
            f"weights and {architecture.kv_format} KV; use --target {others}"
        )


def without_formats(architecture: Architecture) -> Architecture:
    """The architecture with every number format set to BF16."""
    return replace(in_format(architecture, "bf16"), kv_format="bf16")


def logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Logits of token rows, fp32."""
    with torch.no_grad():
        found: Tensor = model(input_ids=rows, use_cache=False).logits.float()
    return found


def write_student(
    checkpoint: Checkpoint,
    architecture: Architecture,
    directory: Path,
    target: Target,
    rows: Tensor,
    calibration: Tensor,
) -> Tensor:
    """Write a student in its formats; returns the logits that reading it back has to give."""

    def stored() -> Iterator[tuple[str, Tensor]]:
        return in_bf16(checkpoint.items(), checkpoint.architecture)

    nested = student_config(checkpoint.config, architecture)
    base = nested.get("base_config", nested) | {"dtype": "bfloat16"}
    own = {"model_type": "compress", "architectures": base["architectures"], "base_config": base}
    config = base if is_plain(architecture) else own
    inputs: Mapping[Group, Tensor] = {}
    details: Mapping[str, Any] = {}
    if architecture.formats != {"bf16"}:
        plain = build_model(checkpoint.config, architecture, stored())
        inputs = input_ranges(plain, architecture, calibration)
        del plain
        quantization, details = quantization_json(architecture)
        served = {**base, "quantization_config": quantization}
        config = served if target == "vllm" else {**own, "quantization": quantization}
    made = quantized(stored(), architecture)
    expected = logits(build_model(checkpoint.config, architecture, made), rows)
    tensors = packed(stored(), architecture, inputs)
    write_files(directory, tensors, config, checkpoint.path, to_json(architecture))
    if details:
        write_text(directory / QUANT_CONFIG, json.dumps(details, indent=2))
    if "quantization_config" in config:  # hidden from stock loaders
        (directory / INDEX).unlink(missing_ok=True)
        if (whole := directory / SINGLE).is_file():
            whole.rename(directory / "model-00001-of-00001.safetensors")
    return expected


def packed(
    tensors: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    inputs: Mapping[Group, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors in their formats; ``inputs`` is what ``input_ranges`` gives."""
    for number, found, fused in by_block(tensors, architecture):
        format = "bf16" if number is None else architecture.blocks[number].format
        own = {group: amax for (block, group), amax in inputs.items() if block == number}
        yield from pack_block(found, fused, format, own)


def verify(
    directory: Path, architecture: Architecture, expected: Tensor, rows: Tensor
) -> dict[str, Any]:
    """Read an export back and compare its bytes with the plan and its logits with ``expected``."""
    planned = footprint(architecture, Deployment(context=0)).weights
    if (found := tensor_bytes(directory.glob("*.safetensors"))) != planned:
        raise VerificationFailed(f"the export holds {found} bytes of tensors, planned {planned}")
    stock = architecture.formats == {"bf16"} and is_plain(architecture)
    read: Any = AutoModelForCausalLM.from_pretrained
    options = {"dtype": torch.float32, "trust_remote_code": False}
    model = read(directory, **options) if stock else load_model(directory)
    difference = float((logits(model, rows) - expected).abs().max() / expected.abs().max())
    # Written so that NaN fails.
    if not difference <= TOLERANCE:
        raise VerificationFailed(
            f"logits of the export differ by {difference:.2e} of their range, "
            f"more than {TOLERANCE:.0e}"
        )
    reader = "transformers AutoModelForCausalLM" if stock else "compress.load"
    return {"bytes": found, "logit_difference": difference, "reader": reader}


def tensor_bytes(files: Iterable[Path]) -> int:
    """Bytes of the tensors in safetensors files, their headers not counted."""
    total = 0
    for file in files:
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        total += file.stat().st_size - 8 - header
    return total
