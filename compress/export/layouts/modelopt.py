"""ModelOpt's JSON: which layers of a checkpoint are in which format, for the servers that read it.

The layout is that of ModelOpt 0.47.0, with the names on disk: what it writes itself for Nemotron-H
matches no module (a sentinel stays in its names).
"""

import json
from collections.abc import Mapping
from typing import Any

from compress.export.layouts.directory import Quantization, as_stored
from compress.formats.table import FORMATS, KV_BYTES, KV_FORMATS, Format, KvFormat
from compress.model.architecture import Architecture
from compress.model.quantized import QUANT_CONFIG

# Servers know the layout by this.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def excluded(layers: Mapping[str, Format]) -> list[str]:
    """The BF16 modules, by the shortest path of theirs that no quantized one begins with, starred.

    The head comes first.
    """
    quantized = [name for name, format in layers.items() if format != "bf16"]
    found: set[str] = set()
    for name in (name for name, format in layers.items() if format == "bf16"):
        parts = name.split(".")
        paths = (".".join(parts[:count]) for count in range(1, len(parts)))
        free = (path for path in paths if not any(each.startswith(path) for each in quantized))
        shortest = next(free, None)
        found.add(name if shortest is None else f"{shortest}*")
    return sorted(found, key=lambda name: ("." in name, name))


def algorithm(format: Format) -> dict[str, Any]:
    """How the layout calls a format."""
    row = FORMATS[format]
    group = {"group_size": row.group} if row.group > 1 else {}
    return {"quant_algo": str(row.weights or format).upper()} | group


def config_group(format: Format, targets: list[str]) -> dict[str, Any]:
    """An entry of ``config_groups``: how weights, and inputs if they have scales, are rounded."""
    row = FORMATS[format]
    group = {"group_size": row.group} if row.group > 1 else {}
    numbers = {"dynamic": False, "num_bits": row.bits, "type": row.kind} | group
    inputs = {"input_activations": numbers} if row.rounds_inputs else {}
    return {**inputs, "weights": numbers, "targets": targets}


def details_of(modules: Mapping[str, Format], architecture: Architecture) -> dict[str, Any]:
    """What hf_quant_config.json says."""
    used = formats_in(modules)
    found: dict[str, Any] = {"kv_cache_quant_algo": None}
    if len(used) == 1:
        found |= algorithm(used[0]) | {"exclude_modules": excluded(modules)}
    else:
        quantized = {name: algorithm(f) for name, f in modules.items() if f != "bf16"}
        found |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": quantized}
    if (kv_format := kv_format_of(architecture)) is not None:
        # Without calibrated scales: servers then use 1.
        found["kv_cache_quant_algo"] = kv_format.upper()
    return found


def config_of(modules: Mapping[str, Format], architecture: Architecture) -> dict[str, Any]:
    """What config.json says besides."""
    used, details = formats_in(modules), details_of(modules, architecture)
    alone = len(used) == 1
    config: dict[str, Any] = {
        "config_groups": {
            f"group_{number}": config_group(
                f, ["Linear"] if alone else sorted(n for n in modules if modules[n] == f)
            )
            for number, f in enumerate(used)
        },
        "ignore": details.get("exclude_modules", []),
        "quant_algo": details["quant_algo"],
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    if not alone:
        config["quantized_layers"] = details["quantized_layers"]
    if (kv_format := kv_format_of(architecture)) is not None:
        bits = 8 * KV_BYTES[kv_format]
        config["kv_cache_scheme"] = {"dynamic": False, "num_bits": bits, "type": "float"}
    return {"quantization_config": config}


def files_of(modules: Mapping[str, Format], architecture: Architecture) -> dict[str, str]:
    """The file that older servers read instead."""
    said = {"producer": PRODUCER, "quantization": details_of(modules, architecture)}
    return {QUANT_CONFIG: json.dumps(said, indent=2)}


def formats_in(modules: Mapping[str, Format]) -> list[Format]:
    """The formats that are used, in the order of their first module."""
    return list(dict.fromkeys(format for format in modules.values() if format != "bf16"))


def kv_format_of(architecture: Architecture) -> KvFormat | None:
    """The one KV format of all blocks that is not BF16; the layout has none by layer."""
    found = set(architecture.kv_formats.values())
    return found.pop() if len(found) == 1 and found != {KV_FORMATS[0]} else None


MODELOPT = Quantization(
    tensors=as_stored, config=config_of, files=files_of, disk_names=True, hidden=True
)
