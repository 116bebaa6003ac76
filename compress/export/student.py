"""Exports: a Hugging Face directory that was read back and computes what it should.

A run rounds its students on text first and exports the very tensors that it measured; a BF16
student that is given here is rounded to nearest. ``target`` decides who may read the result, and
with the family and what blocks are like the layout (``layouts/table.py``).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.core.errors import InputError
from compress.core.files import atomic_directory, write_text
from compress.export.accepted import check_target, reason
from compress.export.card import model_card
from compress.export.layouts.student import Student, Weight, weight_specs, weights_of
from compress.export.layouts.table import layout_of
from compress.export.readers import Reader
from compress.export.readers.table import installed
from compress.export.targets import Target, loader_of
from compress.export.verify import meant_by, require_planned, sign, verify
from compress.formats.packed import stored_names
from compress.formats.table import FORMATS, Rounding
from compress.model.architecture import Architecture, without_formats
from compress.model.build import is_plain, student_config
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.model.config import architecture_of, read_config
from compress.model.families import (
    count_parameters,
    mtp_parameters,
    stored_parameters,
)
from compress.model.headers import weight_files
from compress.model.layout import Parameter
from compress.student.assemble import stack_in_formats
from compress.student.calibration import quantized
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import Stack, stack_at

# Sequences and tokens of what is verified, and calibrated on where there is no text.
ROWS = (8, 64)


def round_student(
    student: Path,
    out: Path,
    architecture: Architecture,
    rows_RT: Tensor,
    rounding: Rounding,
    placement: Placement = REFERENCE,
    progress: Callable[[int], None] = lambda layers: None,
) -> None:
    """Write the BF16 student at ``student`` to ``out``, rounded to its formats on token rows.

    What is written is what is measured (``stack_at``) and exported. ``out`` appears whole or not at
    all; a layer at a time is held, in fp32 on the placement's device. ``progress`` is called with
    every layer done.

    Raises:
        InputError: the checkpoint does not have this architecture.
    """
    checkpoint = own_checkpoint(student, architecture)
    tensors = rounded_tensors(checkpoint, architecture, rows_RT, rounding, placement, progress)
    store_student(student, out, architecture, tensors)


def store_student(
    source: Path, out: Path, architecture: Architecture, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write tensors as formats store them to ``out``, as a student like the one at ``source``.

    ``out`` appears whole or not at all.
    """
    with atomic_directory(out) as directory:
        weights = weights_of(tensors, architecture)
        written = student_of(read_config(source), source, weights, architecture)
        layout_of("compress", architecture)(written, directory)


def export_student(
    student: Path,
    out: Path,
    architecture: Architecture,
    target: Target,
    card: Mapping[str, Any],
    calibration: Tensor | None = None,
    placement: Placement = REFERENCE,
    python: Path | None = None,
) -> dict[str, Any]:
    """Write the student at ``student`` to ``out`` in the formats of ``architecture``.

    It is one that ``round_student`` wrote, or a BF16 one that is rounded to nearest now, with input
    scales from the token rows of ``calibration``. ``card`` is what the model card tells: command,
    budget, measurements. Returns what was verified. ``out`` appears whole and verified, or not at
    all. A layer at a time is held, in fp32 on the placement's device. It is read back by us, by
    stock transformers where that fits into the placement's memory, and by vLLM where it is
    installed, or by the Python ``python`` that has it.

    Raises:
        InputError: the target cannot express this student, or the checkpoint is not its own.
        VerificationFailed: what was read back differs in bytes or in logits.
    """
    check_target(architecture, target)
    in_fp32, config = replace(placement, dtype=torch.float32), read_config(student)
    rows = token_rows(architecture, seed=1)
    if "quantization" in config:
        require_same(student, architecture_of(student, config), architecture)
        weights = as_stored(student, architecture)
        measured = stack_at(student, in_fp32)
    elif any(FORMATS[format].rounds_inputs for format in architecture.formats):
        # What is measured rounds inputs by the scales that are stored.
        with TemporaryDirectory() as folder:
            rounded = Path(folder) / student.name
            texts = token_rows(architecture) if calibration is None else calibration
            round_student(student, rounded, architecture, texts, "nearest", placement)
            return export_student(rounded, out, architecture, target, card, placement=placement)
    else:
        checkpoint = own_checkpoint(student, architecture)
        texts = token_rows(architecture) if calibration is None else calibration
        tensors = rounded_tensors(checkpoint, architecture, texts, "nearest", placement)
        weights = weights_of(tensors, architecture)
        measured = stack_in_formats(checkpoint, architecture, in_fp32)
    rows, meant = meant_by(measured, rows)
    del measured
    with atomic_directory(out) as directory:
        layout_of(target, architecture)(
            student_of(config, student, weights, architecture), directory
        )
        facts: dict[str, Any] = {"target": target, "formats": sorted(architecture.formats)}
        facts["bytes"] = require_planned(directory, architecture)
        sign(directory, rows, meant)
        readers = readers_of(target, architecture, placement, python)
        found = verify(directory, readers, placement)
        facts["reader"] = " and ".join(one.reader for one in found)
        facts["logit_difference"] = max(one.difference for one in found)
        write_text(directory / "README.md", model_card(out.name, architecture, facts, card))
    return {"path": str(out), **facts}


def own_checkpoint(student: Path, architecture: Architecture) -> Checkpoint:
    """The BF16 student of an architecture; InputError where it is another's."""
    checkpoint = open_checkpoint(student)
    found, meant = (without_formats(each) for each in (checkpoint.architecture, architecture))
    require_same(student, found, meant)
    return checkpoint


def require_same(student: Path, found: Architecture, architecture: Architecture) -> None:
    """InputError where a student is not of the architecture to export."""
    if found != architecture:
        raise InputError(f"the checkpoint at {student} does not have the architecture to export")


def rounded_tensors(
    checkpoint: Checkpoint,
    architecture: Architecture,
    rows_RT: Tensor,
    rounding: Rounding,
    placement: Placement,
    progress: Callable[[int], None] = lambda layers: None,
) -> Iterator[tuple[str, Tensor]]:
    """A BF16 student's tensors as its formats store them."""

    def stored(parameter: Parameter) -> Tensor:
        wide = parameter.slot.float32
        dtype = torch.float32 if wide else torch.bfloat16
        return checkpoint[parameter.name].to(placement.device, dtype)

    if architecture.formats == {"bf16"}:
        return ((each.name, stored(each)) for each in stored_parameters(architecture))
    stack = Stack(checkpoint.config, architecture, stored, once(placement))
    beside = ((each.name, stored(each)) for each in mtp_parameters(architecture))
    return itertools.chain(quantized(stack, stored, rows_RT, rounding, progress), beside)


def as_stored(directory: Path, architecture: Architecture) -> Iterator[Weight]:
    """Every weight of a rounded student."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in weight_files(directory, {})
        ]
        owners = {name: file for file in files for name in file.offset_keys()}
        for weight in weight_specs(architecture):
            names = stored_names(weight.name, weight.format)
            parts = tuple(torch.as_tensor(owners[name].get_tensor(name)) for name in names)
            yield replace(weight, parts=parts)


def token_rows(architecture: Architecture, seed: int = 0) -> Tensor:
    """Token rows drawn uniformly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(architecture.vocab, ROWS, generator=generator)


def once(placement: Placement) -> Placement:
    """The placement of a sweep that visits every layer once, so that none has to stay; in fp32."""
    return replace(placement, dtype=torch.float32, memory=0)


def student_of(
    config: Mapping[str, Any], source: Path, weights: Iterable[Weight], architecture: Architecture
) -> Student:
    """What a layout writes, of weights; ``config`` is that of their source."""
    nested = student_config(config, architecture)
    base = nested.get("base_config", nested) | {"dtype": "bfloat16"}
    return Student(source=source, config=base, architecture=architecture, weights=weights)


def readers_of(
    target: Target, architecture: Architecture, placement: Placement, python: Path | None
) -> dict[Reader, Path | None]:
    """Who reads an export back here, each with its Python if not this one.

    We do, and stock readers that are there and take it; ``python`` has the target's.
    """
    room, family = placement.memory, architecture.family
    stock = is_plain(architecture) and architecture.formats == {"bf16"}
    names: list[Reader] = ["transformers", "vllm"] if target != "compress" or stock else []
    if target == "llama.cpp":
        names = ["llama.cpp"]
    elif not (room is None or 4 * count_parameters(architecture) < room):
        names = [name for name in names if name != "transformers"]
    found: dict[Reader, Path | None] = {"compress": None}
    for name in names:
        own = python if name == target else None
        if installed(name, own) and reason(architecture, loader_of(name, family)) is None:
            found[name] = own
    return found
