"""ModelOpt's JSON: which layers of a checkpoint are in which format, for the servers that read it.

The layout is that of ModelOpt 0.47.0, with the names on disk: what it writes itself for Nemotron-H
matches no module (a sentinel stays in its names).
"""

from collections.abc import Mapping
from typing import Any

from compress.formats.table import FORMATS, KV_BYTES, KV_FORMATS, Format
from compress.model.architecture import Architecture
from compress.model.families import family_of, stored_parameters

# Servers know the layout by this.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def layer_formats(architecture: Architecture) -> dict[str, Format]:
    """The format of every module on disk with a matrix; a layer's experts are one module."""
    found: dict[str, Format] = {family_of(architecture.family).head.removesuffix(".weight"): "bf16"}
    for each in stored_parameters(architecture):
        if len(each.shape) > 1:
            module = each.name.removesuffix(".weight")
            if each.expert is not None:
                module = module.rpartition(f".{each.expert}.")[0]
            quantized = each.block is not None and each.slot.fused
            found[module] = architecture.blocks[each.block or 0].format if quantized else "bf16"
    return found


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
    group = {"group_size": FORMATS[format].group} if FORMATS[format].group > 1 else {}
    return {"quant_algo": format.upper()} | group


def config_group(format: Format, targets: list[str]) -> dict[str, Any]:
    """An entry of ``config_groups``: how weights, and inputs if they have scales, are rounded."""
    row = FORMATS[format]
    group = {"group_size": row.group} if row.group > 1 else {}
    numbers = {"dynamic": False, "num_bits": row.bits, "type": row.kind} | group
    inputs = {"input_activations": numbers} if row.modelopt else {}
    return {**inputs, "weights": numbers, "targets": targets}


def quantization_json(architecture: Architecture) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quantization of config.json, and hf_quant_config.json, of a student with formats.

    With formats that ModelOpt's loaders do not know the layout is ours, and there is one file.
    """
    layers, kv_formats = layer_formats(architecture), set(architecture.kv_formats.values())
    used = list(dict.fromkeys(format for format in layers.values() if format != "bf16"))
    details: dict[str, Any] = {"kv_cache_quant_algo": None}
    config: dict[str, Any] = {}
    if len(used) == 1:
        details |= algorithm(used[0]) | {"exclude_modules": excluded(layers)}
        config["config_groups"] = {"group_0": config_group(used[0], ["Linear"])}
    else:
        quantized = {name: algorithm(f) for name, f in layers.items() if f != "bf16"}
        details |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": quantized}
        config["config_groups"] = {
            f"group_{number}": config_group(f, sorted(n for n in layers if layers[n] == f))
            for number, f in enumerate(used)
        }
        config["quantized_layers"] = quantized
    config |= {"ignore": details.get("exclude_modules", []), "quant_algo": details["quant_algo"]}
    # The layout has one for all layers; what differs only we read, in architecture.json.
    if len(kv_formats) == 1 and kv_formats != {KV_FORMATS[0]}:
        [kv_format] = kv_formats
        # Without calibrated scales: servers then use 1.
        details["kv_cache_quant_algo"] = kv_format.upper()
        bits = 8 * KV_BYTES[kv_format]
        config["kv_cache_scheme"] = {"dynamic": False, "num_bits": bits, "type": "float"}
    if not all(FORMATS[format].modelopt for format in used):
        return config | {"quant_method": "compress"}, {}
    config |= {"producer": PRODUCER, "quant_method": "modelopt"}
    return config, {"producer": PRODUCER, "quantization": details}
