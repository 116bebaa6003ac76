"""Which units a student's sizes keep, chosen again where the student stands.

Scores rank units at the teacher, where nothing else is missing. In a student that has lost a third
of its teacher other units matter, and the KL has a slope there, for units that are gone too
(``tangent``): what a change costs is no longer its curvature alone. Sizes, formats and bytes stay.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from scipy.stats import wilcoxon
from torch import Tensor

from compress.measure.kl import Reference
from compress.model.architecture import Architecture, block_name
from compress.scores.costs import Scores, saliency, top, unit_saliency
from compress.scores.tangent import Tangent
from compress.student.candidate import Candidate, block_keep
from compress.student.masks import summed, unit_mask
from compress.student.units import Units, unit_key, units_in

# How far slopes are trusted at first and at last. Trusted whole, they prefer units that are better
# for one kind of text and worse for another (measured: runs/LOG.md, "Units chosen again").
MOST_TRUST, LEAST_TRUST = 1 / 2, 1 / 64
# Chance of taking other units for better that are not; lower ones take more text.
CERTAIN = 0.05
# Fewer sequences cannot be that certain: signed ranks are at best, where all agree, at 2^-n.
FEWEST = math.ceil(-math.log2(CERTAIN))
Measure = Callable[[Candidate, Reference], Iterator[Tensor]]


def reselect(
    candidate: Candidate,
    values: Tensor,
    text: Reference,
    slopes: Sequence[Reference],
    measure: Measure,
    linearize: Callable[[Candidate, Reference], Tangent],
    scores: Scores,
) -> tuple[Candidate, Tensor]:
    """The best candidate of some rounds of ``reselected``, and its KL of every sequence.

    ``values`` is what ``measure`` gives for the candidate on ``text``, a batch of sequences at a
    time. A round takes a tangent on its own text of ``slopes`` and one step along it: all that
    slopes promise is too much where many units change together, so trust is halved, from round to
    round too, until the KL falls beyond doubt on ``text``, and on the tangent's text as well. A
    round that finds nothing better is the last. Nor is anything better on fewer sequences than
    ``FEWEST``.
    """
    trust, teacher = MOST_TRUST, text.teacher.architecture
    if len(values) < FEWEST:
        return candidate, values
    for there in slopes:
        at = linearize(candidate, there)
        # Masks compute a student exactly, but for the scales of what is rounded.
        exact = candidate.architecture.formats == {"bf16"}
        before = at.kl if exact else torch.cat(list(measure(candidate, there)))
        while True:
            other = reselected(candidate, at, scores, teacher, trust)
            if trust < LEAST_TRUST or not moved(candidate, other, teacher):
                return candidate, values
            found = lower(measure(other, text), values)
            # Slopes are of the other text: where it gets worse, the step was too long.
            if (
                found is not None
                and certainly_lower(found, values)
                and lower(measure(other, there), before) is not None
            ):
                break
            trust /= 2
        candidate, values = other, found
    return candidate, values


def lower(batches: Iterator[Tensor], values: Tensor) -> Tensor | None:
    """The KL of every sequence if its mean is below that of ``values``, else None.

    Stops as soon as the sequences so far are worse by two standard errors of the paired difference.
    """
    found = values[:0]
    for batch in batches:
        found = torch.cat([found, batch])
        excess = found - values[: len(found)]
        if len(found) > 1 and excess.mean() > 2 * excess.std() / len(found) ** 0.5:
            return None
    return found if found.mean() < values.mean() else None


def certainly_lower(found: Tensor, values: Tensor) -> bool:
    """Whether signed ranks of the differences say so too (Wilcoxon, one-sided).

    A mean is easily misled by a few sequences, for whose sake many units go.
    """
    excess = (found - values).numpy()
    return bool(wilcoxon(excess, alternative="less").pvalue < CERTAIN)


def moved(before: Candidate, after: Candidate, teacher: Architecture) -> int:
    """How many units of a candidate are gone in another one of the same sizes."""
    count = 0
    if "hidden" in before.keep:
        count += int((~torch.isin(before.keep["hidden"], after.keep["hidden"])).sum())
    for number in before.keep["blocks"].tolist():
        for units in units_in(teacher.blocks[number]):
            lost = unit_mask(teacher, before.keep, number, units)
            lost *= 1 - unit_mask(teacher, after.keep, number, units)
            count += int(lost.sum())
    return count


def reselected(
    candidate: Candidate, at: Tangent, scores: Scores, teacher: Architecture, trust: float
) -> Candidate:
    """The candidate with the units that are worth most at its tangent, as many as it had.

    A unit whose gate has the slope s and the curvature c costs -s + c/2 when it goes, and saves
    -s - c/2 when it comes back; c is that of the teacher's scores, divided by ``trust`` (0 to 1),
    since units that change together cost more than alone. Experts stay: those that are gone have no
    gradient, as nothing is routed to them.
    """
    keep = dict(candidate.keep)
    if "hidden" in keep:
        kept = torch.zeros(teacher.hidden).index_fill_(0, keep["hidden"], 1)
        half = saliency(scores, None, "hidden") / trust
        values = gain_of_keeping(at.slope["hidden"], half, kept, at.length)
        keep["hidden"] = top(values, len(keep["hidden"]))
    for number in keep["blocks"].tolist():
        block = teacher.blocks[number]
        own = block_keep(candidate.keep, block)
        for units in units_in(block):
            kept = unit_mask(teacher, candidate.keep, number, units)
            half = unit_saliency(scores, block, units) / trust
            values = gain_of_keeping(at.slope[unit_key(block, units)], half, kept, at.length)
            for axis, index in best_units(units, own, values, kept).items():
                keep[f"{block_name(block)}/{axis}"] = index
    return replace(candidate, keep=keep)


def gain_of_keeping(slope: Tensor, half: Tensor, kept: Tensor, length: int) -> Tensor:
    """How much lower the KL is with a unit than without it, nats per token: highest are kept.

    Of a slope counts what exceeds its standard error over the sequences; of one sequence nothing.
    """
    if len(slope) < 2:
        return half * (2 * kept - 1)
    mean, error = slope.mean(0), slope.std(0) / len(slope) ** 0.5
    known: Tensor = mean.sign() * (mean.abs() - error).clamp(min=0) / length
    return half * (2 * kept - 1) - known


def best_units(
    units: Units, own: Mapping[str, Tensor], values: Tensor, kept: Tensor
) -> dict[str, Tensor]:
    """Indices of the best units of one array by axis, as many as ``own`` has.

    ``values`` and ``kept`` are of the finest units. Those within an axis that shrinks too are
    chosen everywhere, and that axis by what they add up to; where two axes do not depend on each
    other, the units of one are worth what they are in those kept of the other.
    """
    found = dict[str, Tensor]()
    outer = {rule.within for rule in units.cut.values()}
    for axis in (axis for axis in units.cut if axis not in outer):
        others = units.others(axis)
        there = kept.amax([at for at in range(-kept.dim(), 0) if at not in others], True)
        found |= best_of_axis(units, axis, own, summed(values * there, units, axis))
    return found


def best_of_axis(
    units: Units, axis: str, own: Mapping[str, Tensor], values: Tensor
) -> dict[str, Tensor]:
    """The best of an axis, and of the one that it is within where that shrinks too."""
    count = own[axis].shape[-1] if axis in own else values.shape[-1]
    order, found = top(values, count), dict[str, Tensor]()
    outer = units.cut[axis].within
    if outer is not None and outer in own:
        sums = values.gather(-1, order).sum(-1)
        found[outer] = own[outer] if units.cut[outer].routed else top(sums, len(own[outer]))
        order = order[found[outer]]
    return found | ({axis: order} if axis in own else {})
