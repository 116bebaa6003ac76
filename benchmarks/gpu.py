"""A GPU against the CPU: the same numbers, and tokens a second, peak memory and packing speed.

``python -m benchmarks.gpu --device cuda``; ``--device cpu --tiny`` runs the same steps in seconds
on any machine. Models are random. Equality is that of fp32 on the device with fp32 on the CPU
(relative distance of all rows), and of BF16 on the device (difference of a measured KL in nats;
contributions are far apart where rounding draws another label).
Peak memory stands beside what ``compress plan --work`` says.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, report
from benchmarks.scale import GROUP, HYBRID, random_checkpoint
from compress.core.terminal import note
from compress.formats.fake import shared
from compress.formats.table import FORMATS, Format
from compress.measure.kl import measure, reference
from compress.memory.machine import Machine
from compress.model.architecture import block_name, sizes
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.families import in_one_format
from compress.model.modules import Head
from compress.run.recipe import check
from compress.run.work import works_of
from compress.scores.contributions import contributions
from compress.scores.replay import removal_costs
from compress.scores.taps import SQUARES
from compress.student.candidate import Candidate, student_architecture
from compress.sweep.placement import REFERENCE, Placement
from compress.sweep.stack import Stack, final_states, stack_of
from compress.train.distill import DistillSettings, Teacher, distill

FORMATS_SCORED: tuple[Format, ...] = ("fp8", "nvfp4")
DRAWS, LENGTH = 2, 64
CUT = {"ffn": "ffn", "moe": "shared_ffn", "mamba": "channel"}


def llama(hidden: int, ffn: int, layers: int, vocab: int) -> dict[str, Any]:
    """A config."""
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256), "head_dim": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "max_position_embeddings": 4096, "bos_token_id": 0,
        "eos_token_id": 0, "dtype": "bfloat16",
    }  # fmt: skip


SMALL_HYBRID = HYBRID | {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "mamba_num_heads": 8, "n_groups": 2, "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 256, "layers_block_type": GROUP,
}  # fmt: skip
SMALL = {"llama": llama(256, 768, 4, 1024), "hybrid": SMALL_HYBRID}
BIG = {
    "llama 1B": llama(2048, 8192, 16, 32768),
    "hybrid .6B": HYBRID | {"layers_block_type": 6 * GROUP},
}


def written(directory: Path, config: Mapping[str, Any]) -> Path:
    """A random checkpoint."""
    random_checkpoint(directory, config)
    return directory


def halved(stack: Stack) -> Candidate:
    """Every block at half of an axis, formats in turn."""
    blocks = stack.architecture.blocks
    keep = {"blocks": torch.arange(len(blocks))}
    for block in blocks:
        if axis := CUT.get(block.kind):
            keep[f"{block_name(block)}/{axis}"] = torch.arange(0, sizes(block)[axis], 2)
    family = stack.architecture.family
    formats = {
        number: in_one_format(block, family, FORMATS_SCORED[number % 2])
        for number, block in enumerate(blocks)
    }
    student = student_architecture(stack.architecture, keep, formats, {})
    return Candidate(id="half", kind="joint", architecture=student, keep=keep)


def scored(stack: Stack, rows: Tensor) -> dict[str, Tensor]:
    """The contribution matrix."""
    return contributions(stack, rows, DRAWS, list(FORMATS_SCORED))


def replayed(stack: Stack, rows: Tensor) -> dict[str, Tensor]:
    """Exact costs of removals."""
    return {name: torch.tensor(kl) for name, kl in removal_costs(stack, rows).items()}


def measured(stack: Stack, path: Path, rows: Tensor) -> float:
    """The KL of the halved student."""
    text = reference(open_checkpoint(path), stack, rows)
    return float(torch.cat(list(measure(halved(stack), text))).mean())


def gap(found: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> float:
    """The relative distance of two results, their sums of squares left out."""
    keys = [key for key in meant if not key.endswith(SQUARES)]
    off = sum(float((found[key].double() - meant[key].double()).square().sum()) for key in keys)
    whole = sum(float(meant[key].double().square().sum()) for key in keys)
    return float((off / whole) ** 0.5)


def equalities(name: str, path: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """How far the device is from the CPU."""
    rows = torch.randint(1, 1024, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    checkpoint = open_checkpoint(path)
    plain = stack_of(checkpoint, REFERENCE)
    exact, half = (
        stack_of(checkpoint, Placement(device, d)) for d in (torch.float32, torch.bfloat16)
    )
    for what, run in (("contributions", scored), ("removals", replayed)):
        meant = run(plain, rows)
        yield {"model": name, "part": f"{what}, fp32", "gap": gap(run(exact, rows), meant)}
        yield {"model": name, "part": f"{what}, bf16", "gap": gap(run(half, rows), meant)}
    kl = measured(plain, path, rows)
    for label, stack in (("fp32", exact), ("bf16", half)):
        difference = abs(measured(stack, path, rows) - kl)
        yield {"model": name, "part": f"KL {kl:.4f}, {label}", "gap": difference}


def timed(device: torch.device, run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the second run, and peak GB of the device in it."""
    on_gpu = device.type == "cuda"
    run()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0


def packing(device: torch.device, shape: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Whether codes and scales are those of the CPU, and elements a second."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    there = weight.to(device)

    def stored(whole: Tensor, part: Tensor, format: Format) -> list[Tensor]:
        found = FORMATS[format].numerics.pack(part, *shared([whole], format))
        return [each.cpu().reshape(-1).view(torch.uint8) for each in found]

    for name in (format for format in FORMATS if format != "bf16"):
        pairs = zip(stored(there, there[:64], name), stored(weight, weight[:64], name), strict=True)
        equal = all(torch.equal(found, meant) for found, meant in pairs)
        seconds, peak = timed(
            device, partial(FORMATS[name].numerics.pack, there, *shared([there], name))
        )
        rate = weight.numel() / seconds / 1e9
        yield {"part": f"packing {name}, G/s", "equal": equal, "rate": rate, "peak_gb": peak}


def speeds(name: str, path: Path, place: Placement, rows: Tensor) -> Iterator[dict[str, Any]]:
    """Tokens a second and peak memory of what takes the time."""
    checkpoint = open_checkpoint(path)
    stack = stack_of(checkpoint, place)
    text = reference(checkpoint, stack, rows)
    candidate = halved(stack)
    student = load_model(path)
    with stack.head() as head:
        own = Head(head.weight, head.scale, head.softcap)
    lesson = Teacher(text.hidden.cpu(), own)
    settings = DistillSettings(
        tokens=rows.numel(), batch_tokens=rows[:4].numel(), learning_rate=1e-5
    )
    parts: dict[str, Callable[[], object]] = {
        "forward": lambda: final_states(stack, list(torch.split(rows, 4))),
        "score": lambda: scored(stack, rows),
        "search": lambda: list(measure(candidate, text.part(0, len(rows)))),
        "distill": lambda: distill(lesson, student, rows, settings, place),
    }
    recipe = check(
        {"score_tokens": rows.numel(), "score_length": rows.shape[1], "draws": DRAWS,
         "select_tokens": rows.numel(), "distill_length": rows.shape[1], "finalists": 1,
         "short_distill_tokens": 0}, "settings",
    )  # fmt: skip
    machine = Machine(
        name=place.device.type, memory=2**40, flops=1, number_bytes=place.dtype.itemsize,
        accelerator=place.device.type != "cpu",
    )  # fmt: skip
    planned = {
        work.stage: work.takes(machine)
        for work in works_of(stack.architecture, recipe, machine, student=1.0)
    }
    for part, run in parts.items():
        seconds, peak = timed(place.device, run)
        yield {
            "model": name, "part": f"{part}, tokens/s", "rate": rows.numel() / seconds,
            "peak_gb": peak, "planned_gb": planned.get(part, 0) / 1e9,
        }  # fmt: skip


def main() -> None:
    """Equality of every part, then speeds; a part that fails is a row that says so."""
    settings = arguments(
        __doc__ or "",
        "embedded",
        device={"default": "cuda", "choices": ("cuda", "cpu"), "help": "what is compared"},
        tiny={"action": "store_true", "help": "small models only"},
    )
    device = torch.device(settings.device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in SMALL.items():
            rows += equalities(name, written(Path(folder) / name, config), device)
            note(f"{name}: compared")
        rows += packing(device, (128, 512) if settings.tiny else (14336, 4096))
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        text = torch.randint(1, 1000, (8, LENGTH) if settings.tiny else (32, 256))
        for name, config in (SMALL if settings.tiny else BIG).items():
            path = written(Path(folder) / f"{name} timed", config)
            rows += speeds(name, path, Placement(device, dtype), text)
            note(f"{name}: timed")
    facts = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
    columns = ("model", "part", "gap", "equal", "rate", "peak_gb", "planned_gb")
    report("gpu", settings, facts, columns, rows)


if __name__ == "__main__":
    main()
