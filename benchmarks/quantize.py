"""What rounding by inputs buys, and training in formats after it: KL to the teacher on fresh text.

    python -m benchmarks.quantize --model smollm2-135m --data texts.jsonl
    python -m benchmarks.quantize --model embedded --formats nvfp4 --train-tokens 262144

Every block in one format. KL in nats per token on final text, +- one standard error over sequences;
``ratio`` is that to the first way, rounding to nearest, whose difference is paired over the same
sequences. Formats that no block of the model takes are left out, blocks that do not take one stay
BF16.
"""

import tempfile
from pathlib import Path
from typing import get_args

import torch

from benchmarks.common import Clock, Subject, arguments, report, subject
from compress.core.terminal import note
from compress.export.student import round_student, store_student
from compress.formats.table import FORMATS, Rounding
from compress.measure.estimates import difference, mean_of
from compress.measure.kl import sequence_kl
from compress.memory.budget import in_format
from compress.model.architecture import Architecture
from compress.model.build import disk_tensors, load_model
from compress.model.checkpoint import in_bf16
from compress.student.grids import grids_of, on_grids
from compress.sweep.stack import stack_at
from compress.sweep.states import stored_states
from compress.train.distill import DistillSettings, Teacher, distill
from compress.train.masters import roundings


def main() -> None:
    """Round to every format in every way, train what is best, write ``quantize.json``."""
    settings = arguments(
        __doc__ or "",
        "smollm2-135m",
        formats={"default": "nvfp4,fp8,mxfp4,int4"},
        ways={"default": ",".join(get_args(Rounding))},
        calibration_tokens={"type": int, "default": 8192},
        train_tokens={"type": int, "default": 0, "help": "of training in formats; 0: none"},
        learning_rate={"type": float, "default": 3e-4},
        final_tokens={"type": int, "default": 16384},
    )
    found = subject(settings)
    teacher = found.checkpoint.architecture
    rows = found.rows("train", settings.calibration_tokens, 256)
    final = found.reference(found.rows("final", settings.final_tokens))
    ways = settings.ways.split(",") + ["trained"] * (settings.train_tokens > 0)
    shown = []
    for format in (name for name in FORMATS if name in settings.formats.split(",")):
        architecture, nearest = in_format(teacher, format), None
        with tempfile.TemporaryDirectory() as folder:
            begins = found.path
            for way in ways:
                out, clock = Path(folder) / way, Clock()
                if way == "trained":
                    trained(found, architecture, begins, out)
                else:
                    round_student(found.path, out, architecture, rows, way)
                seconds, begins = clock.seconds, out
                kl = mean_of(torch.cat(list(sequence_kl(stack_at(out), final))).numpy())
                nearest = nearest or kl
                change, error = difference(nearest, kl)
                shown.append(
                    {
                        "format": format,
                        "blocks": sum(bool(block.formats) for block in architecture.blocks),
                        "rounding": way,
                        "kl": kl.value,
                        "se": kl.stderr,
                        "ratio": kl.value / nearest.value,
                        "change": change,
                        "change se": error,
                        "seconds": seconds,
                    }
                )
                note(f"{format}, {way}: {kl.value:.4f}")
    report("quantize", settings, {"calibration tokens": rows.numel()}, list(shown[0]), shown)


def trained(found: Subject, architecture: Architecture, begins: Path, out: Path) -> None:
    """Write the rounded student of a directory after a training in its formats."""
    asked = found.settings
    settings = DistillSettings(
        tokens=asked.train_tokens, batch_tokens=1024, learning_rate=asked.learning_rate,
        seed=asked.seed,
    )  # fmt: skip
    rows = found.rows("train", settings.tokens, 256)
    states = stored_states(found.stack, rows, out.with_suffix(".safetensors"))
    student, grids = load_model(begins), grids_of(begins, architecture, torch.device("cpu"))
    how = roundings(architecture, grids)
    with found.stack.head() as head:
        distill(Teacher(states, head), student, rows, settings, roundings=how)
    tensors = in_bf16(disk_tensors(student, architecture), architecture)
    store_student(begins, out, architecture, on_grids(tensors, grids))


if __name__ == "__main__":
    main()
