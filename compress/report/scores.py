"""The tables of a scoring."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from compress.core.quantities import format_bytes
from compress.core.terminal import note, table
from compress.formats.table import KV_FORMATS
from compress.model.architecture import Architecture, block_name
from compress.model.families import family_of
from compress.scores.costs import Scores, importance, removed
from compress.student.units import AXES, axes_in


def print_scores(
    architecture: Architecture, scores: Scores, sensitivity: Mapping[str, Any] | None
) -> None:
    """The most and least important of every kind, in nats per token, and what formats cost."""
    blocks = architecture.blocks
    costs = {block_name(b): removed(scores, b) for b in blocks}
    by_cost = sorted(costs.items(), key=lambda item: item[1])
    removals = [(name, f"{cost:.4f}") for name, cost in by_cost]
    shown = removals if len(removals) <= 12 else [*removals[:5], ("...", ""), *removals[-5:]]
    table("Blocks by what removing them costs (KL, nats per token)", ["block", "KL"], shown)
    table(
        "Units of every axis (KL of losing one alone, nats per token)",
        ["axis", "units", "least", "most"],
        unit_rows(scores, architecture),
    )
    if sensitivity:
        print_sensitivity(sensitivity)
    for format in KV_FORMATS[1:]:
        by_block = {k.rpartition("/")[0]: v for k, v in scores.kv.items() if k.endswith(format)}
        if by_block:
            most = max(by_block, key=by_block.__getitem__)
            note(
                f"{format.upper()} KV caches, measured: {sum(by_block.values()):.5f} nats per token"
                f" for all {len(by_block)}, most of them {most}: {by_block[most]:.5f}"
            )


def print_sensitivity(sensitivity: Mapping[str, Any]) -> None:
    """What formats save and cost by kind of linear group, and what they reach together."""
    table(
        "Number formats of linear groups, all of a kind together (KL in nats per token, predicted; "
        "outside the blocks measured)",
        ["group", "format", "blocks", "saves", "KL", "most of it", "where"],
        [
            (f"{row['kind']} {row['group']}", row["format"], str(row["blocks"]),
             format_bytes(row["saved"]), f"{row['kl']:.5f}", f"{row['most']:.5f}", row["where"])
            for row in sensitivity["groups"]
        ],
    )  # fmt: skip
    table(
        "Formats alone, the best choice for every linear group (KL in nats per token, predicted)",
        ["bits a weight in blocks", "weights", "KL", "format"],
        [
            (f"{p['bits']:.2f}", format_bytes(p["bytes"]), f"{p['kl']:.5f}", p["format"] or "mixed")
            for p in sensitivity["curve"]
        ],
    )


def unit_rows(scores: Scores, architecture: Architecture) -> Iterator[tuple[str, ...]]:
    """A row per kind and axis: how many units, the least and the most important one."""
    for kind, axes in AXES.items():
        for axis in axes:
            found = [b for b in architecture.blocks if b.kind == kind and axis in axes_in(b)]
            if found:
                values = [(f"layer {b.layer}", importance(scores, b, axis)) for b in found]
                yield unit_row(f"{kind}/{axis}", values)
    if not family_of(architecture.family).whole_hidden:
        yield unit_row("hidden", [("", importance(scores, None, "hidden"))])


def unit_row(axis: str, values: Sequence[tuple[str, Tensor]]) -> tuple[str, ...]:
    """The row of an axis, from the importance of its units by layer; a value is beside its unit."""
    least = min(values, key=lambda item: float(item[1].min()))
    most = max(values, key=lambda item: float(item[1].max()))
    count = sum(found.numel() for _, found in values)
    low = f"{least[0]} #{int(least[1].argmin())}".strip()
    high = f"{most[0]} #{int(most[1].argmax())}".strip()
    return (
        axis, str(count), f"{float(least[1].min()):.2e} {low}", f"{float(most[1].max()):.2e} {high}"
    )  # fmt: skip
