"""What rounding by inputs buys: every block in one format, KL to the teacher on fresh text.

    python -m benchmarks.quantize --model smollm2-135m --data texts.jsonl
    python -m benchmarks.quantize --model embedded

KL in nats per token on final text, +- one standard error over sequences; ``ratio`` is that to
rounding to nearest, whose difference is paired over the same sequences. Formats that no block of
the model takes are left out, blocks that do not take one stay BF16.
"""

import tempfile
from pathlib import Path
from typing import get_args

import torch

from benchmarks.common import Clock, arguments, report, subject
from compress.core.terminal import note
from compress.export.student import round_student
from compress.formats.table import FORMATS, Rounding
from compress.measure.estimates import difference, mean_of
from compress.measure.kl import sequence_kl
from compress.memory.budget import in_format
from compress.sweep.stack import stack_at


def main() -> None:
    """Round to every format in every way, write ``quantize.json``."""
    settings = arguments(
        __doc__ or "",
        "smollm2-135m",
        formats={"default": "nvfp4,fp8,mxfp4,int4"},
        calibration_tokens={"type": int, "default": 8192},
        final_tokens={"type": int, "default": 16384},
    )
    found = subject(settings)
    teacher = found.checkpoint.architecture
    rows = found.rows("train", settings.calibration_tokens, 256)
    final = found.reference(found.rows("final", settings.final_tokens))
    shown = []
    for format in (name for name in FORMATS if name in settings.formats.split(",")):
        architecture, nearest = in_format(teacher, format), None
        for rounding in get_args(Rounding):
            with tempfile.TemporaryDirectory() as folder:
                out, clock = Path(folder) / "rounded", Clock()
                round_student(found.path, out, architecture, rows, rounding)
                seconds = clock.seconds
                kl = mean_of(torch.cat(list(sequence_kl(stack_at(out), final))).numpy())
            nearest = nearest or kl
            change, error = difference(nearest, kl)
            shown.append(
                {
                    "format": format,
                    "blocks": sum(bool(block.formats) for block in architecture.blocks),
                    "rounding": rounding,
                    "kl": kl.value,
                    "se": kl.stderr,
                    "ratio": kl.value / nearest.value,
                    "change": change,
                    "change se": error,
                    "seconds": seconds,
                }
            )
            note(f"{format}, {rounding}: {kl.value:.4f}")
    report("quantize", settings, {"calibration tokens": rows.numel()}, list(shown[0]), shown)


if __name__ == "__main__":
    main()
