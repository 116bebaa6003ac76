"""What every decision costs, in nats per token: estimated from contributions, exact for blocks.

With the contribution C[s, u] of every unit and format (``taps``), the KL of a change is about
1/(2T) times the mean over sequences and draws of (sum over changed gates of change * C)^2, the
Fisher form of the second-order expansion. It underrates big cuts, so removing a whole block is
scored exactly by ``replay``, and the estimates of its thinner cuts lead there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from compress.core.errors import InputError
from compress.formats.table import Format, GroupFormats
from compress.model.architecture import Block, block_name, sizes
from compress.model.tensor_files import save_tensors
from compress.scores.contributions import Contributions
from compress.scores.ranking import activation_importance
from compress.scores.taps import SQUARES
from compress.student.candidate import Ranking
from compress.student.masks import alive, summed
from compress.student.units import Units, array_of, axes_in, number_of, unit_key, units_in


@dataclass(frozen=True)
class Scores:
    """Contributions [rows, *units] of sequences of ``length`` tokens, and exact costs.

    ``removals`` is the KL of removing a block alone by its name, ``kv`` that of storing a block's
    KV cache in a format (``layers.3.attention/fp8``), ``outside`` that of the embedding or the head
    in one (``head/nvfp4``), nats per token; what costs nothing is left out.
    ``rankings`` is what ``activation_scores`` gives, for the other rankings; no part of the file.
    """

    contributions: Contributions
    removals: Mapping[str, float]
    kv: Mapping[str, float]
    length: int
    outside: Mapping[str, float] = field(default_factory=dict)
    rankings: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write everything as named tensors, whole or not at all."""
        tensors = {f"contributions/{k}": v.contiguous() for k, v in self.contributions.items()}
        for block, kl in self.removals.items():
            tensors[f"removals/{block}"] = torch.tensor(kl, dtype=torch.float64)
        for kind, costs in (("kv", self.kv), ("outside", self.outside)):
            tensors |= {f"{kind}/{key}": torch.tensor(kl) for key, kl in costs.items()}
        save_tensors(tensors | {"length": torch.tensor(self.length)}, file)


def load_scores(file: Path) -> Scores:
    """Read what ``Scores.save`` wrote."""
    exact = ("removals", "kv", "outside")
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in ("contributions", *exact)}
    with safe_open(file, framework="pt") as reader:
        length = int(reader.get_tensor("length"))
        for key in reader.offset_keys():
            group, _, name = key.partition("/")
            if group in groups:
                groups[group][name] = reader.get_tensor(key)
    removals, kv, outside = ({k: float(v) for k, v in groups[name].items()} for name in exact)
    return Scores(groups["contributions"], removals, kv, length, outside)


def kl_of(rows: Tensor, length: int) -> float:
    """Predicted KL in nats per token of a change whose summed contributions are ``rows``."""
    return float(rows.square().mean() / (2 * length))


def kl_of_each(rows: Tensor, length: int) -> Tensor:
    """Predicted KL of each unit's change alone, from its rows [rows, *units]."""
    return rows.square().mean(0) / (2 * length)


def importance(scores: Scores, block: Block | None, axis: str) -> Tensor:
    """Predicted KL of losing each unit of an axis alone; None and "hidden" for the channels.

    Shapes: hidden [hidden], kv_head [kv_head], query [kv_head, query] or of latent attention
    [query], ffn and shared_ffn [width], head [group, head], channel [channel], expert [expert],
    expert_ffn [expert, expert_ffn], latent [latent].
    """
    if block is None:
        return kl_of_each(scores.contributions["hidden"], scores.length)
    units = array_of(block, axis)
    rows = scores.contributions[unit_key(block, units)]
    return kl_of_each(summed(rows, units, axis), scores.length)


def saliency(scores: Scores, block: Block | None, axis: str) -> Tensor:
    """What orders units: ``importance`` with far less noise, where a unit is numbers of its own.

    ``importance`` has one number per sequence and draw, ``kfac_diagonal`` all tokens. Query heads
    and KV groups keep the former.
    """
    if block is None:
        found = scores.contributions
        norms = sorted({key.partition("/")[0] for key in found if key.startswith("hidden@")})
        return torch.stack([kfac_diagonal(scores, norm) for norm in norms]).sum(0)
    units = array_of(block, axis)
    if not units.scalar:
        return importance(scores, block, axis)
    return summed(kfac_diagonal(scores, unit_key(block, units)), units, axis)


def unit_saliency(scores: Scores, block: Block, units: Units) -> Tensor:
    """The same of a block's finest units, [*units.axes]."""
    key = unit_key(block, units)
    if units.scalar:
        return kfac_diagonal(scores, key)
    return kl_of_each(scores.contributions[key], scores.length)


def kfac_diagonal(scores: Scores, key: str) -> Tensor:
    """Predicted KL of losing each unit [*units] if its activation and gradient are independent.

    Tokens times the mean square of the one times the mean square of the other: the diagonal of
    K-FAC's Fisher (Martens and Grosse 2015).
    """
    activation, slope, tokens = (scores.contributions[key + suffix][0] for suffix in SQUARES)
    rows = len(scores.contributions["hidden"])
    return activation * slope / tokens.clamp(min=1) / (2 * rows * scores.length)


def priority(
    scores: Scores,
    block: Block | None,
    axis: str,
    ranking: Ranking = "contribution",
    keep: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What orders the units of an axis under a ranking, highest kept; shapes as ``importance``.

    ``router`` ranks routed units, and is ``contribution`` elsewhere. ``keep`` is what the block
    keeps on axes that are decided already.
    """
    if ranking == "router" and block is not None and axes_in(block)[axis].routed:
        return scores.rankings[f"{block_name(block)}/router"]
    if ranking != "activation":
        return saliency(scores, block, axis)
    return activation_importance(scores.rankings, block, axis, keep or {})


def top(values: Tensor, count: int, groups: int = 1) -> Tensor:
    """Indices of the ``count`` highest values of the last axis, ascending; ties to the lower.

    Each of ``groups`` runs of equal length keeps equally many.
    """
    grouped: Tensor = torch.unflatten(values, -1, (groups, -1))
    order = grouped.argsort(dim=-1, descending=True, stable=True)[..., : count // groups]
    first = torch.arange(groups)[:, None] * grouped.shape[-1]
    kept: Tensor = (order.sort(-1).values + first).flatten(-2)
    return kept


def choose(
    scores: Scores, block: Block, target: Mapping[str, int], ranking: Ranking = "contribution"
) -> dict[str, Tensor]:
    """Kept indices of a block by axis, the most important units of each; whole axes are left out.

    ``target`` gives counts by axis. What is within others comes after what all share: it is chosen
    in those that are kept, and some rankings add it up over what is.
    """
    keep: dict[str, Tensor] = {}
    for axis, rule in sorted(axes_in(block).items(), key=lambda item: item[1].within is not None):
        count = target.get(axis, sizes(block)[axis])
        values = priority(scores, block, axis, ranking, keep)
        if rule.within in keep:
            values = values[keep[rule.within]]
        if count < values.shape[-1]:
            # A router chooses among groups, which it takes to be equally large.
            keep[axis] = top(values, count, number_of(block, rule.multiple))
    return keep


def cut_rows(scores: Scores, block: Block, keep: Mapping[str, Tensor]) -> Tensor:
    """Summed contributions [rows] of cutting a block to ``keep``: a unit that goes costs -C."""
    total = torch.zeros(len(scores.contributions["hidden"]))
    for units in units_in(block) if keep else ():
        gone = 1 - alive(block, units, keep).flatten()
        total -= scores.contributions[unit_key(block, units)].flatten(1) @ gone
    return total


def rounding_rows(
    scores: Scores, block: Block, keep: Mapping[str, Tensor], group: str, format: Format
) -> Tensor:
    """Summed contributions [rows] of storing a linear group of a block in a format.

    Of units that ``keep`` leaves: what is cut is not charged for bits. InputError where the group
    was not scored in the format.
    """
    found, ending = scores.contributions, f"/{group}/{format}"
    # What only other groups are made of has no rows of this one.
    rows = {units: unit_key(block, units) + ending for units in units_in(block)}
    parts = [
        found[key].flatten(1) @ alive(block, units, keep).flatten()
        for units, key in rows.items()
        if key in found
    ]
    if (rest := f"{block_name(block)}/rest{ending}") in found:
        parts.append(found[rest])
    if not parts:
        raise InputError(
            f"{group} of {block_name(block)} was not scored in {format}; "
            "score it with a space that lists this format"
        )
    return sum(parts, torch.zeros_like(parts[0]))


def change(
    scores: Scores, block: Block, keep: Mapping[str, Tensor], formats: GroupFormats
) -> Tensor:
    """Summed contributions [rows] of cutting a block to ``keep`` and storing it in ``formats``."""
    total = cut_rows(scores, block, keep)
    for group, format in formats:
        if format != "bf16":
            total += rounding_rows(scores, block, keep, group, format)
    return total


def removed(scores: Scores, block: Block) -> float:
    """Exact KL of removing a block; the estimate where it was not replayed."""
    found = scores.removals.get(block_name(block))
    return kl_of(whole(scores, block), scores.length) if found is None else found


def whole(scores: Scores, block: Block) -> Tensor:
    """Summed contributions [rows] of losing all units of a block."""
    rows = [scores.contributions[unit_key(block, u)].flatten(1).sum(1) for u in units_in(block)]
    return torch.stack(rows).sum(0)


def option_cost(
    scores: Scores, block: Block, keep: Mapping[str, Tensor], formats: GroupFormats
) -> float:
    """Predicted KL of one option of a block, nats per token.

    Rounding of what stays has nothing to do with what went: their product is noise, of which a
    search over many options would find the most negative. So it is left out.
    """
    rounding = change(scores, block, keep, formats) - cut_rows(scores, block, keep)
    return cut_cost(scores, block, keep) + kl_of(rounding, scores.length)


def cut_cost(scores: Scores, block: Block, keep: Mapping[str, Tensor]) -> float:
    """Predicted KL of cutting a block to ``keep``, nats per token.

    The second-order estimate is right for small cuts and low for whole blocks: the ratio of exact
    to estimated cost is interpolated linearly over the estimate, from a cut of nothing to the
    removal, and its root taken: of what makes a removal dearer than its estimate a cut has only a
    part (measured: runs/LOG.md, "Fidelity of scores"). None is dearer than the removal.
    """
    estimate = kl_of(cut_rows(scores, block, keep), scores.length)
    largest, exact = kl_of(whole(scores, block), scores.length), removed(scores, block)
    if largest > 0:
        ratio = 1 + (exact / largest - 1) * min(1.0, estimate / largest)
        estimate = min(exact, estimate * math.sqrt(ratio))
    return estimate
