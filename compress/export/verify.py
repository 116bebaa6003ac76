"""An export against the student that was measured: files, tensors, log-probabilities, tokens.

``export`` leaves in a directory what the measured student predicts and what every tensor is
(``predictions.py``, ``record.py``), so that it can be verified alone, by every reader there is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import InputError, VerificationFailed
from compress.export.layouts import gguf
from compress.export.predictions import (
    PROMPT,
    ROWS,
    Comparison,
    Predictions,
    compare,
    continued,
    from_json,
    logits,
    predictions,
)
from compress.export.readers import Reader
from compress.export.readers.table import OWN, ask
from compress.export.record import read_record, require_recorded, write_record
from compress.memory.footprint import mtp_weight_bytes, weight_bytes
from compress.model.architecture import Architecture
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import Stack, stack_at


def meant_by(student: Stack, rows_RT: Tensor) -> tuple[Tensor, Predictions]:
    """Rows that begin as these, and what a student that is measured predicts on them."""
    rows = continued(student, rows_RT[:ROWS, :PROMPT])
    return rows, predictions(OWN, logits(student, rows), rows, PROMPT)


def sign(directory: Path, rows_RT: Tensor, meant: Predictions) -> None:
    """Leave in an export what it has to be: its tensors as they are now, and ``meant``."""
    write_record(directory, {"rows": rows_RT.tolist(), **meant.to_json()})


def require_planned(directory: Path, architecture: Architecture) -> int:
    """Bytes of the tensors of an export; VerificationFailed if they are not those planned."""
    if (directory / gguf.FILE).is_file():
        planned, found = gguf.planned_bytes(architecture), gguf.tensor_bytes(directory)
    else:
        planned = weight_bytes(architecture) + mtp_weight_bytes(architecture)
        found = tensor_bytes(directory.glob("*.safetensors"))
    if found != planned:
        raise VerificationFailed(f"the export holds {found} bytes of tensors, planned {planned}")
    return found


def verify(
    directory: Path,
    readers: Mapping[Reader, Path | None],
    placement: Placement = REFERENCE,
) -> list[Comparison]:
    """Compare a directory with what it was when it was exported; a comparison a reader.

    ``readers`` has the Python of each, if not this one.

    Raises:
        InputError: the directory is no export, or a reader is not there.
        VerificationFailed: what differs, by name.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory; compress verify takes that of an export")
    record = read_record(directory)
    require_recorded(directory, record)
    said: Any = record["predictions"]
    rows, meant = torch.tensor(said["rows"]), from_json(said)
    return [
        compare(meant, read(name, directory, rows, python, placement))
        for name, python in readers.items()
    ]


def read(
    name: Reader, directory: Path, rows_RT: Tensor, python: Path | None, placement: Placement
) -> Predictions:
    """What a reader predicts on rows from a directory."""
    if name != "compress":
        return ask(name, directory, rows_RT, PROMPT, python, str(placement.device))
    in_fp32 = replace(placement, dtype=torch.float32)
    if (directory / gguf.FILE).is_file():
        own, stack = "the package gguf", gguf.stack_in(directory, in_fp32)
    else:
        own, stack = OWN, stack_at(directory, in_fp32)
    return predictions(own, logits(stack, rows_RT), rows_RT, PROMPT)


def tensor_bytes(files: Iterable[Path]) -> int:
    """Bytes of the tensors in safetensors files, their headers not counted."""
    total = 0
    for file in files:
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        total += file.stat().st_size - 8 - header
    return total
