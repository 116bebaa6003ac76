"""Packing to FP8 and NVFP4: a BF16 model to a directory that servers load, by us and by ModelOpt.

``OMP_NUM_THREADS=2 python -m benchmarks.packing`` (needs nvidia-modelopt): the same weights, all
linear layers in one format, weights to nearest. ``GiB/s`` are BF16 bytes of those layers by the
seconds from the model to the directory that is whole, verification and calibration left out: ours
reads the files and streams, ModelOpt's ``export_hf_checkpoint`` begins with the model in memory
and its ranges known (once: its model is packed then; ours the faster of ``--repeats``). ``group
MiB`` is what packing the largest fused group takes beside it.
"""

import importlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, report
from benchmarks.served import in_turn
from compress.core.terminal import note
from compress.export.layouts.student import weights_of
from compress.export.layouts.table import layout_of
from compress.export.student import rounded_tensors, student_of
from compress.formats.fake import shared
from compress.formats.table import FORMATS, Format
from compress.model.architecture import Architecture
from compress.model.build import load_model, weight_formats
from compress.model.checkpoint import open_checkpoint
from compress.model.families import parameters
from compress.model.find import resolve_model
from compress.sweep.placement import REFERENCE

RULES: dict[Format, dict[str, Any]] = {
    "fp8": {"num_bits": (4, 3), "axis": None},
    "nvfp4": {"num_bits": (2, 1), "axis": None,
              "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
}  # fmt: skip
COLUMNS = ["format", "MiB", "ours GiB/s", "ModelOpt GiB/s", "ratio", "group MiB", "of MiB"]


def main() -> None:
    """Measure and report."""
    settings = arguments(__doc__ or "", "smollm2-135m", repeats={"type": int, "default": 2})
    path = resolve_model(settings.model)
    rows = [row_of(path, format, settings.repeats) for format in RULES]
    report("packing", settings, {}, COLUMNS, rows)


def row_of(path: Path, format: Format, repeats: int) -> dict[str, Any]:
    """The figures of a format."""
    checkpoint = open_checkpoint(path)
    made = in_turn(checkpoint.architecture, [format])
    formats = weight_formats(made)
    bytes = sum(2 * each.count for each in parameters(made) if each.name in formats)
    text = torch.zeros(1, 2, dtype=torch.long)

    def ours(out: Path) -> None:
        tensors = rounded_tensors(checkpoint, made, text, "nearest", REFERENCE)
        weights = weights_of(tensors, made)
        layout_of("vllm", made)(student_of(checkpoint.config, path, weights, made), out)

    model = with_modelopt(path, format)
    export: Any = importlib.import_module("modelopt.torch.export")

    def theirs(out: Path) -> None:
        with torch.no_grad():
            export.export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)

    # A second export of the same model would find its weights packed.
    seconds = {"ours": min(timed(ours) for _ in range(repeats)), "theirs": timed(theirs)}
    speed = {name: bytes / 2**30 / taken for name, taken in seconds.items()}
    group, beside = of_group(checkpoint.architecture, format)
    note(f"{format}: seconds {seconds}")
    return {
        "format": format, "MiB": bytes / 2**20, "ours GiB/s": speed["ours"],
        "ModelOpt GiB/s": speed["theirs"], "ratio": speed["ours"] / speed["theirs"],
        "group MiB": beside / 2**20, "of MiB": group / 2**20,
    }  # fmt: skip


def with_modelopt(path: Path, format: Format) -> Any:
    """The model with ModelOpt's ranges of weights."""
    rules: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": RULES[format]},
        {"quantizer_name": "*lm_head*", "enable": False},
    ]
    quantization: Any = importlib.import_module("modelopt.torch.quantization")
    model = load_model(path, torch.bfloat16)
    return quantization.quantize(model, {"quant_cfg": rules, "algorithm": "max"})


def timed(write: Callable[[Path], None]) -> float:
    """Seconds that writing a directory takes."""
    home = Path(tempfile.mkdtemp())
    try:
        (home / "out").mkdir()
        begun = time.monotonic()
        write(home / "out")
        return time.monotonic() - begun
    finally:
        shutil.rmtree(home)


def of_group(architecture: Architecture, format: Format) -> tuple[int, int]:
    """Bytes in BF16 of the largest fused group, and the most that packing it takes beside it."""
    groups: dict[tuple[int, str], int] = {}
    for each in parameters(architecture):
        if each.block is not None and each.slot.fused:
            key = each.block, each.slot.fused
            groups[key] = groups.get(key, 0) + each.count
    weight = torch.randn(max(groups.values()) // 512, 512).bfloat16()
    # The peak begins anew (Linux).
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status("VmRSS")
    FORMATS[format].numerics.pack(weight, *shared([weight], format))
    return weight.nbytes, status("VmHWM") - before


def status(key: str) -> int:
    """A size of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


if __name__ == "__main__":
    main()
