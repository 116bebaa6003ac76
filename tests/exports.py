"""What exports are made of in tests: formats, by who serves them, and what their card tells."""

from collections.abc import Sequence
from pathlib import Path

from quantized import with_formats

from compress.formats.table import FORMATS, Format
from compress.model.architecture import Architecture
from compress.model.checkpoint import open_checkpoint

QUANTIZED = [name for name in FORMATS if name != "bf16"]
SERVED = [name for name in QUANTIZED if FORMATS[name].modelopt]
MIXES: list[Sequence[Format]] = [*([name] for name in QUANTIZED), [*QUANTIZED, "bf16"]]
SERVED_MIXES: list[Sequence[Format]] = [["bf16"], *([name] for name in SERVED), [*SERVED, "bf16"]]
CARD = {"command": "compress export tiny", "budget": "1 MiB", "measurements": {"measured_kl": 0.25}}


def architecture_of(path: Path, formats: Sequence[Format]) -> Architecture:
    return with_formats(open_checkpoint(path).architecture, formats)
