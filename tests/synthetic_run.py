"""A run directory made of invented figures, to show every part of a report."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from compress.formats.table import by_group
from compress.memory.footprint import Deployment, footprint
from compress.model.architecture import (
    Architecture,
    Attention,
    Block,
    Ffn,
    Mamba,
    Moe,
    block_name,
    to_json,
)
from compress.model.families import count_parameters, linear_groups
from compress.student.units import axes_in

CONTEXT = 2048
LLAMA = Architecture(
    family="llama",
    vocab=4096,
    hidden=256,
    tied=True,
    blocks=tuple(
        block
        for layer in range(12)
        for block in (
            Attention(layer=layer, kv_head=4, query=2, head_dim=32),
            Ffn(layer=layer, ffn=768, gated=True),
        )
    ),
)


def hybrid_block(layer: int, letter: str) -> Block:
    if letter == "M":
        return Mamba(layer=layer, group=2, head=4, channel=16, state=16, kernel=4)
    if letter == "*":
        return Attention(layer=layer, kv_head=2, query=4, head_dim=32)
    if letter == "-":
        return Ffn(layer=layer, ffn=768, gated=False)
    return Moe(layer=layer, expert=8, expert_ffn=128, shared_ffn=256, top_k=2)


HYBRID = Architecture(
    family="nemotron_h",
    vocab=1024,
    hidden=192,
    tied=False,
    blocks=tuple(hybrid_block(n, letter) for n, letter in enumerate("MEM*M-MEM*M-ME")),
)
TEACHERS = {"llama": LLAMA, "hybrid": HYBRID}
SETTINGS = Deployment(context=CONTEXT)


def cut(teacher: Architecture, seed: int) -> tuple[Architecture, dict[str, np.ndarray]]:
    """A student of random sizes and formats, and what it kept."""
    draw = np.random.default_rng(seed)
    keep: dict[str, np.ndarray] = {}
    blocks: list[Block] = []
    numbers = [n for n in range(len(teacher.blocks)) if n == 3 or draw.random() > 0.15]
    layers: dict[int, int] = {}
    for number in numbers:
        block = teacher.blocks[number]
        changes: dict[str, object] = {
            "layer": layers.setdefault(block.layer, len(layers)),
            "formats": by_group(
                {
                    group: draw.choice(["bf16", "fp8", "nvfp4"]).item()
                    for group in linear_groups(block, teacher.family)
                }
            ),
        }
        if block.kind == "attention":
            changes["kv_format"] = str(draw.choice(["bf16", "fp8"]))
        for axis in axes_in(block):
            whole = getattr(block, axis)
            step = 16 if whole % 16 == 0 else 1
            kept = max(
                step * (2 if axis == "expert" else 1),
                int(whole * draw.uniform(0.4, 1.1)) // step * step,
            )
            if axis in ("ffn", "kv_head", "head", "expert", "shared_ffn") and kept < whole:
                changes[axis] = kept
                keep[f"{block_name(block)}/{axis}"] = np.arange(kept)
        blocks.append(dataclasses.replace(block, **changes))
    keep["blocks"] = np.array(numbers)
    return dataclasses.replace(teacher, blocks=tuple(blocks)), keep


def write_run(directory: Path, family: str) -> Path:
    """A run directory as the stages write it, with invented figures."""
    directory.mkdir(parents=True)
    teacher = TEACHERS[family]
    student, keep = cut(teacher, seed=3)
    size = footprint(student, SETTINGS).total
    budget = int(size * 1.004)
    draw = np.random.default_rng(0)
    (directory / "recipe.yaml").write_text(
        yaml.safe_dump({"model": "embedded", "budget": "45%", "seed": 0})
    )
    write(
        directory / "teacher.json",
        {
            "name": "SmolLM2-135M-Instruct" if family == "llama" else "embedded",
            "path": "teachers/embedded",
            "files": {},
            "architecture": json.loads(to_json(teacher)),
            "bytes": dataclasses.asdict(footprint(teacher, SETTINGS)),
            "budget": budget,
            "deployment": dataclasses.asdict(SETTINGS),
            "note": "SmolLM2-135M-Instruct dequantized from Q4_1" if family == "llama" else "",
        },
    )
    kinds = ["joint"] * 40 + ["uniform", "random", "prune", "prune_then_quantize"]
    levels = {
        "joint": 0.35,
        "uniform": 1.7,
        "random": 3.2,
        "prune": 0.9,
        "prune_then_quantize": 0.52,
    }
    rows = []
    for number, kind in enumerate(kinds):
        level = (
            0.11
            if number == 0
            else levels[kind] * float(np.exp(0.5 * draw.normal() ** 2 if kind == "joint" else 0))
        )
        finalist = number < 3 or kind != "joint"
        rows.append(
            {
                "id": f"{kind}-{number:03d}" if kind == "joint" else kind,
                "kind": kind,
                "bytes": int(budget * (1 - 0.03 * draw.random() ** 2)) if number else size,
                "budget": budget,
                "parameters": count_parameters(student),
                "active_parameters": count_parameters(student),
                "predicted_kl": level * 0.8,
                "measured_kl": level,
                "measured_se": level * 0.06,
                "measured_sequences": 16,
                "distilled_kl": level * 0.45 if finalist else None,
                "architecture": json.loads(to_json(student)),
                "finalist": finalist,
                "selected": number == 0,
                "repaired": [1, 3, 4] if number == 0 else [],
            }
        )
    rows.sort(key=lambda row: (not row["finalist"], row["distilled_kl"] or row["measured_kl"]))
    write(directory / "candidates.json", rows)
    unfit = {"kind": "formats", "fits": False, "reason": "all in NVFP4 is too big"}
    write(directory / "baselines.json", [unfit | {"floor_bytes": int(budget * 1.2)}])
    folder = directory / "candidates" / "joint-000"
    folder.mkdir(parents=True)
    save_file(keep, folder / "keep.safetensors")
    for name, floor in (
        ("joint-000", 0.05),
        ("joint-000.short", 0.08),
        ("joint-001.short", 0.09),
        ("uniform.short", 0.7),
    ):
        curve = directory / "distill" / name / "curve.jsonl"
        curve.parent.mkdir(parents=True)
        losses = [floor * (1 + 4 / (1 + n / 12)) for n in range(1, 200)] * np.exp(
            0.1 * draw.normal(size=199)
        )
        points = [
            {"step": n, "tokens": 512 * n, "lr": 1e-4, "loss": loss}
            for n, loss in enumerate(losses.tolist(), start=1)
        ]
        curve.write_text("".join(json.dumps(point) + "\n" for point in points))
    whole = footprint(teacher, SETTINGS).total
    # Kind, name, bytes, and KL before and after distillation.
    table = [
        ("teacher", "teacher", whole, 0.0, None),
        ("uniform", "uniform", budget, 1.7, 0.74),
        ("prune_then_quantize", "prune_then_quantize", budget, 0.52, 0.23),
        ("joint", "joint-000", size, 0.11, 0.051),
    ]
    models: dict[str, dict[str, Any]] = {}
    lines: list[dict[str, object]] = []
    for kind, name, amount, *kls in table:
        line: dict[str, object] = {"name": name, "kind": kind, "bytes": amount}
        line["fits"] = kind != "teacher"
        for state, prefix, kl in zip(("", " distilled"), ("", "distilled_"), kls, strict=True):
            if kl is not None:
                models[kind + state] = figures(amount, kl)
                line |= {f"{prefix}kl": kl, f"{prefix}kl_se": kl / 30}
                line |= {f"{prefix}choice_accuracy": 0.71 - kl / 5, f"{prefix}choice_se": 0.03}
                line |= {f"{prefix}nats_per_token": 3.1 + kl}
        lines.append(line)
    lines.append({"name": "formats", "kind": "formats", "fits": False})
    write(directory / "table.json", lines)
    paired = [
        {"a": a, "b": b, "metric": "kl", "stderr": 0.01}
        | {"difference": models[b]["kl"] - models[a]["kl"]}
        for a, b in itertools.combinations(models, 2)
    ]
    text = {"sequences": 128, "tokens": 16384, "bytes": 52110}
    write(directory / "eval" / "results.json", {"models": models, "paired": paired, "text": text})
    write(directory / "scores" / "sensitivity.json", sensitivity())
    return directory


def sensitivity() -> dict[str, Any]:
    """What scoring says of number formats."""
    group = {"kind": "ffn", "format": "nvfp4", "blocks": 3, "kl": 0.02, "most": 0.01}
    mixed = [(16.0, 0.0), (8.0, 0.001), (4.5, 0.1)]
    curve = [{"bits": b, "bytes": int(b * 1e6), "kl": kl, "format": None} for b, kl in mixed]
    return {
        "groups": [
            group | {"group": name, "saved": 2**20, "where": "layers.1.ffn"}
            for name in ("gate_up", "down")
        ],
        "curve": [*curve, {"bits": 4.5, "bytes": 4_500_000, "kl": 0.1, "format": "nvfp4"}],
    }


def figures(amount: int, kl: float) -> dict[str, Any]:
    """What an evaluation says about a model."""
    choice = {"acc": 0.71 - kl / 5, "stderr": 0.02}
    rolling = {"bits_per_byte": 1.4 + kl / 2, "stderr": 0.01}
    return {
        "bytes": amount,
        "kl": kl,
        "nats_per_token": 3.1 + kl,
        "bits_per_byte": 1.4 + kl / 2,
        "stderr": {"kl": kl / 30, "nats_per_token": 0.03, "bits_per_byte": 0.01},
        "tasks": {"choice": choice, "rolling": rolling},
    }


def write(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
