"""The tables of ``compress plan``: blocks, formats, what fits."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from compress.core.quantities import format_bytes, format_count, format_tokens
from compress.core.terminal import console, table
from compress.export.serving import kernels, serving
from compress.export.targets import LOADERS
from compress.formats.table import FORMATS, KV_FORMATS, formats_text
from compress.memory.devices import DEVICES
from compress.memory.footprint import (
    Deployment,
    block_bytes,
    mtp_bytes,
    mtp_weight_bytes,
    outside_bytes,
    state_bytes,
)
from compress.memory.machine import PROCESS, Machine
from compress.memory.plan import Option, Plan, refusals
from compress.memory.work import Work
from compress.model.architecture import Architecture, kv_format_of, sizes
from compress.model.config import read_config
from compress.model.families import (
    block_count,
    count_active,
    count_parameters,
    mtp_parameters,
    outside_count,
)


def print_plan(name: str, plan: Plan, batches: bool = False) -> None:
    """Print a plan on stdout; ``batches`` says how many sequences fit, too."""
    architecture, deployment = plan.architecture, plan.deployment
    total, active = count_parameters(architecture), count_active(architecture)
    served = f"context {format_tokens(deployment.context)}, batch {deployment.batch_size}"
    table(
        f"{name}: {architecture.family}, {architecture.layers} layers, {format_count(total)} "
        f"parameters{f' ({format_count(active)} active)' if active < total else ''}, {served}",
        ("block", "sizes", "format", "count", "layers", "parameters", "weights", "cache, state"),
        [
            *block_rows(plan),
            outside_row(architecture),
            *mtp_rows(architecture, deployment),
            total_row(plan, total),
        ],
        left=3,
    )
    headings = ["weights, KV", "weights", "KV cache", "states", "total"]
    headings += ["fits", "largest context"] if plan.budget else ["smallest card"]
    rows = [option_row(option, plan) for option in plan.options]
    if plan.budget and batches:
        headings.append("largest batch")
        found = (limit_text(option.largest_batch) for option in plan.options)
        rows = [(*row, batch) for row, batch in zip(rows, found, strict=True)]
    table("bytes by format", headings, rows)
    dequantized = plan.stored is not None and not plan.quantized
    what = "in BF16, as a search reads it" if dequantized else "as it is"
    lines = [f"{what}: {format_bytes(plan.footprint.total)}"]
    if plan.budget:
        verdict = "fits" if plan.fits else "does not fit"
        lines[0] += f", {verdict}: {plan.budget.description}"
        lines.append(f"largest context that fits: {limit_text(plan.largest_context)}")
        if batches:
            lines.append(f"largest batch that fits: {limit_text(plan.largest_batch)}")
    if dequantized:
        lines.insert(0, stored_line(plan))
    if plan.budget and plan.budget.device:
        kv_formats = {option.kv_format for option in plan.options}
        formats = LOADERS["vllm"].formats
        lines += kernels(plan.budget.device, architecture, formats, kv_formats)
    # What is said of a format that is asked for is among the notes already.
    for line in dict.fromkeys((*lines, *plan.notes, *refusals(architecture, FORMATS))):
        console().print(line, markup=False, soft_wrap=True)


def print_serving(directory: Path, plan: Plan) -> None:
    """Print how servers are started with an export, of one that they load."""
    config = read_config(directory)
    if plan.quantized and "quantization_config" in config:
        device, code = plan.budget.device if plan.budget else None, "auto_map" in config
        lines = serving(
            str(directory), plan.architecture, "vllm", plan.deployment, device, code=code
        )
        for line in lines:
            console().print(line, markup=False, soft_wrap=True)


def stored_line(plan: Plan) -> str:
    """What a quantized model of others takes as it is on disk."""
    assert plan.stored
    line = f"as it is on disk, {plan.stored.formats}: "
    if plan.served is None:
        return line + "unknown without its weights or their index"
    line += f"{format_bytes(plan.served.total)}, weights {format_bytes(plan.served.weights)}"
    if plan.budget is None:
        return line
    return line + (", fits" if plan.served.total <= plan.budget.bytes else ", does not fit")


def print_work(works: Sequence[Work], machine: Machine) -> None:
    """Print what every stage takes on a machine, on stdout."""
    rate = f"{machine.flops / 1e9:,.0f} GFLOP/s"
    table(
        f"the work on {machine.name}: {format_bytes(machine.memory)}, "
        f"{8 * machine.number_bytes} bits, {rate}",
        ("stage", "at least", "takes here", "fits", "about", "most of it"),
        [
            (
                work.stage,
                format_bytes(work.least),
                format_bytes(work.takes(machine)),
                "yes" if work.least <= machine.memory else "no",
                duration(work.seconds(machine)),
                max(work.parts, key=lambda part: work.parts[part]),
            )
            for work in works
        ],
    )
    own = format_bytes(PROCESS)
    lines = [f"the process itself takes {own} more; what does not stay in memory is read again"]
    if host := max(work.host for work in works):
        lines.append(f"beside it up to {format_bytes(host)} of the host's memory")
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A rough time in words."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def block_rows(plan: Plan) -> Iterable[tuple[str, ...]]:
    """One row for all blocks that are alike, in the order of their first layer."""
    architecture, deployment = plan.architecture, plan.deployment
    hidden, family = architecture.hidden, architecture.family
    alike: dict[tuple[str, str, str], list[int]] = {}
    for number, block in enumerate(architecture.blocks):
        text = ", ".join(f"{axis} {size}" for axis, size in sizes(block).items())
        kv_format = kv_format_of(block)
        cache = f", {kv_format} KV" if kv_format not in (None, KV_FORMATS[0]) else ""
        alike.setdefault((block.kind, text, formats_text(block.formats) + cache), []).append(number)
    for (kind, text, format), numbers in alike.items():
        blocks = [architecture.blocks[number] for number in numbers]
        held = sum(sum(state_bytes(block, deployment)) for block in blocks)
        weights = sum(block_bytes(block, hidden, family) for block in blocks)
        count = format_count(sum(block_count(block, hidden, family) for block in blocks))
        layers = ranges([block.layer for block in blocks])
        cache = format_bytes(held) if held else "-"
        yield kind, text, format, str(len(blocks)), layers, count, format_bytes(weights), cache


def outside_row(architecture: Architecture) -> tuple[str, ...]:
    """What is outside the blocks."""
    count = outside_count(architecture)
    what = "tied" if architecture.tied else "untied"
    text = f"vocab {architecture.vocab}, hidden {architecture.hidden}, {what}"
    weights = format_bytes(outside_bytes(architecture))
    formats = formats_text(architecture.outside_formats)
    return ("embedding, head", text, formats, "", "", format_count(count), weights, "-")


def mtp_rows(architecture: Architecture, served: Deployment) -> Iterable[tuple[str, ...]]:
    """The layers that predict further tokens, if there are such."""
    if mtp := architecture.mtp:
        kinds = ", ".join(dict.fromkeys(block.kind for block in mtp))
        count = sum(each.count for each in mtp_parameters(architecture))
        weights = mtp_weight_bytes(architecture)
        held = mtp_bytes(architecture, served) - weights
        name, numbers = "MTP", (format_count(count), format_bytes(weights), format_bytes(held))
        yield name, f"{kinds}; vllm drafts with it", "bf16", str(len(mtp)), "", *numbers


def total_row(plan: Plan, parameters_total: int) -> tuple[str, ...]:
    """The sum of the rows above it."""
    stored = plan.footprint.weights + mtp_weight_bytes(plan.architecture)
    held = plan.footprint.total - stored - plan.footprint.workspace
    weights = format_bytes(stored)
    count = format_count(parameters_total)
    return ("total", "", "", "", "", count, weights, format_bytes(held))


def option_row(option: Option, plan: Plan) -> tuple[str, ...]:
    """One line of the table of formats."""
    taken, further = option.footprint, mtp_weight_bytes(plan.architecture)
    parts = (
        taken.weights + further,
        taken.kv_cache + taken.mtp - further,
        taken.ssm_state + taken.conv_state,
        taken.total,
    )
    row = (f"{option.format}, {option.kv_format}", *map(format_bytes, parts))
    if plan.budget is None:
        return (*row, smallest_card(taken.total))
    fits = "yes" if taken.total <= plan.budget.bytes else "no"
    return (*row, fits, limit_text(option.largest_context))


def smallest_card(taken: int) -> str:
    """The smallest card that has so many bytes."""
    cards = sorted(DEVICES.values(), key=lambda device: device.visible_bytes)
    return next((card.name for card in cards if taken <= card.visible_bytes), "none alone")


def limit_text(most: int | None) -> str:
    """A largest context or batch in words."""
    return "no limit" if most is None else f"{most:,}"


def ranges(numbers: Sequence[int], most: int = 8) -> str:
    """Ascending numbers as "0-3, 7, 9-11", with "..." after ``most`` parts."""
    breaks = [index + 1 for index, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    parts = [
        f"{numbers[start]}" if end - start == 1 else f"{numbers[start]}-{numbers[end - 1]}"
        for start, end in zip([0, *breaks], [*breaks, len(numbers)], strict=True)
    ]
    return ", ".join(parts[:most]) + (", ..." if len(parts) > most else "")
