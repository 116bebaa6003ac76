"""Which layout a student gets, by target, family and what its blocks are like."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from compress.export.layouts.compressed_tensors import COMPRESSED_TENSORS
from compress.export.layouts.directory import PLAIN, Structure, is_told, write_directory
from compress.export.layouts.gguf import write_gguf
from compress.export.layouts.modelopt import MODELOPT
from compress.export.layouts.stock import OWN, OWN_FORMATS, STOCK
from compress.export.layouts.student import Student
from compress.export.layouts.uneven import DECILM, PUZZLE
from compress.export.targets import Target
from compress.formats.table import FORMATS
from compress.model.architecture import Architecture
from compress.model.build import is_plain

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
    plain, told = is_plain(architecture), is_told(architecture)
    if target == "compress":
        structure = STOCK if plain and not told else OWN
        return partial(write_directory, structure, OWN_FORMATS if told else PLAIN)
    if target == "llama.cpp":
        return write_gguf
    structure = STOCK if plain else UNEVEN[architecture.family]
    rounding = any(FORMATS[format].rounds_inputs for format in architecture.formats)
    quantization = MODELOPT if rounding else COMPRESSED_TENSORS
    return partial(write_directory, structure, quantization if told else PLAIN)
