"""Which layout a student gets, by target, family and what its blocks are like."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from compress.export.layouts.directory import PLAIN, Quantization, Structure, write_directory
from compress.export.layouts.modelopt import MODELOPT
from compress.export.layouts.stock import OWN, OWN_FORMATS, STOCK
from compress.export.layouts.student import Student
from compress.export.layouts.uneven import DECILM, PUZZLE
from compress.export.targets import Target
from compress.model.architecture import Architecture
from compress.model.build import is_plain, weight_formats

# Writes a student into a directory that is there, or as a file there.
Layout = Callable[[Student, Path], None]

# Of students that no stock class builds, by family; the target table lists the same families.
UNEVEN: Mapping[str, Structure] = {
    "llama": DECILM,
    "mistral": DECILM,
    "qwen2": DECILM,
    "nemotron_h": PUZZLE,
}


def layout_of(target: Target, architecture: Architecture) -> Layout:
    """The layout for a student that the target takes (``accepted.check_target``)."""
    plain, quantized = is_plain(architecture), bool(weight_formats(architecture))
    if target == "compress":
        structure = STOCK if plain and not quantized else OWN
        return partial(write_directory, structure, OWN_FORMATS if quantized else PLAIN)
    structure = STOCK if plain else UNEVEN[architecture.family]
    return partial(write_directory, structure, quantization_of(architecture))


def quantization_of(architecture: Architecture) -> Quantization:
    """How servers are told of the formats of a student."""
    return MODELOPT if weight_formats(architecture) else PLAIN
