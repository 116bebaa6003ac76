"""What rounding by inputs buys, and training in formats after it: KL to the teacher on fresh text.

    python -m benchmarks.quantize --model smollm2-135m --data texts.jsonl
    python -m benchmarks.quantize --model embedded --formats nvfp4 --train-tokens 262144

Every linear group that takes a format in it, the others in BF16. KL in nats per token on final
text, +- one standard error over sequences; ``ratio`` is that to the first way, rounding to nearest,
whose difference is paired over the same sequences. CPU seconds are of making the student and of
measuring it, ``GiB`` is the anonymous memory that making it takes above what is there before, at
its peak.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from benchmarks.common import Subject, arguments, report, subject
from benchmarks.scale import LOOK_SECONDS, anonymous
from compress.core.terminal import note
from compress.export.student import round_student, store_student
from compress.formats.table import FORMATS, Format, GroupFormats, Rounding, by_group
from compress.measure.estimates import difference, mean_of
from compress.measure.kl import sequence_kl
from compress.memory.footprint import group_takes
from compress.model.architecture import Architecture, Block
from compress.model.build import disk_tensors, load_model
from compress.model.checkpoint import in_bf16
from compress.model.families import linear_groups
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
                out = Path(folder) / way
                if way == "trained":
                    work = partial(trained, found, architecture, begins, out)
                else:
                    work = partial(round_student, found.path, out, architecture, rows, way)
                begun, memory = time.process_time(), peak(work)
                made, begins = time.process_time(), out
                kl = mean_of(torch.cat(list(sequence_kl(stack_at(out), final))).numpy())
                nearest = nearest or kl
                change, error = difference(nearest, kl)
                shown.append(
                    {
                        "format": format,
                        "groups": sum(
                            f == format for b in architecture.blocks for _, f in b.formats
                        ),
                        "rounding": way,
                        "kl": kl.value,
                        "se": kl.stderr,
                        "ratio": kl.value / nearest.value,
                        "change": change,
                        "change se": error,
                        "seconds": made - begun,
                        "seconds to measure": time.process_time() - made,
                        "GiB": memory / 2**30,
                    }
                )
                note(f"{format}, {way}: {kl.value:.4f}")
    report("quantize", settings, {"calibration tokens": rows.numel()}, list(shown[0]), shown)


def in_format(teacher: Architecture, format: Format) -> Architecture:
    """The teacher with every linear group that takes a format in it."""
    hidden, family = teacher.hidden, teacher.family

    def own(block: Block) -> GroupFormats:
        groups = linear_groups(block, family)
        taken = {g for g in groups if group_takes(block, g, hidden, family, format)}
        return by_group({group: format if group in taken else "bf16" for group in groups})

    blocks = tuple(replace(block, formats=own(block)) for block in teacher.blocks)
    return replace(teacher, blocks=blocks)


def peak(work: Callable[[], None]) -> int:
    """Bytes of anonymous memory that some work takes at its peak, above what is there before."""
    before = highest = anonymous(os.getpid())
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        while not done.done():
            highest = max(highest, anonymous(os.getpid()))
            time.sleep(LOOK_SECONDS)
        done.result()
    return highest - before


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
