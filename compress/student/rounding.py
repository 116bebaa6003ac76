"""Rounding weights to a number format by what they are multiplied with.

To nearest, a weight's error counts alike whatever its input does. Here the error that counts is the
layer's output, whose square is a sum over the rows w of a weight (outputs) and their rounded q::

    E = sum over rows of (w - q) H (w - q)^T        H = X^T X, X the layer's inputs [tokens, in]

*Scales* are those of least error among ratios of a group's largest magnitude, inputs weighted by
the diagonal of H. *Second order* rounds column by column and lets the columns that follow make up
for each error (GPTQ: Frantar et al. 2022, arXiv 2210.17323, algorithm 1), a group's scale being
chosen when its first column comes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.formats.blocks import CHUNK
from compress.formats.fake import shared
from compress.formats.table import FORMATS, Format, NumberFormat, Rounding

# Of a group's largest magnitude; above 1 small values get finer codes where the largest is not one.
RATIOS = (1.0, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5)
# Damping: this times sqrt(inputs / tokens) of the mean of H's diagonal is added to all of it. So
# second order is ahead of scales alone with an eighth of a token an input too (runs/LOG.md).
DAMPING = 0.4
# Columns whose errors reach the later ones together.
COLUMNS = 128


@dataclass(frozen=True)
class Rounded:
    """A weight in a format: what is stored, codes then scales, and the fp32 values [out, in]."""

    stored: tuple[Tensor, ...]
    values: Tensor


@dataclass(frozen=True)
class Inputs:
    """What a weight is multiplied with: what gives H [in, in] in fp32, over so many tokens.

    Of zeros alone H is zero, and its diagonal becomes 1 here.
    """

    gram: Callable[[], Tensor]
    tokens: int


# Of a weight that nothing is known about; rounding to nearest asks for no more.
NOTHING = Inputs(lambda: torch.empty(0, 0), 0)


def round_group(
    weights: Sequence[Tensor],
    format: Format,
    inputs: Sequence[Inputs],
    rounding: Rounding = "second-order",
    largest: Tensor | None = None,
) -> list[Rounded]:
    """The weights [out, in] of a fused group in a format; scales that it shares are of all.

    They reach ``largest`` at least, for those of the group that are not given. ``inputs`` are of
    each weight, the same object where weights read the same. A weight that reads nothing (an expert
    that no token came to), or zeros only, has the scales of least squared error. No row's E is
    larger than to nearest.

    Raises:
        InputError: a weight's shape cannot be stored so, or what it reads is not finite.
    """
    row, found = FORMATS[format], dict[int, Rounded]()
    for weight in weights:
        row.require(weight.shape)
    common = shared(weights, format)
    if common and largest is not None:
        common = (torch.maximum(common[0], largest.to(common[0])),)
    for reader in {id(each): each for each in inputs}.values():
        own = [number for number, each in enumerate(inputs) if each is reader]
        rows = torch.cat([weights[number].float() for number in own])
        chosen = by_inputs(rows, row, common, reader, rounding)
        start = 0
        for number in own:
            found[number] = chosen.part(slice(start, start + len(weights[number])), row)
            start += len(weights[number])
    return [found[number] for number in range(len(weights))]


@dataclass(frozen=True)
class Trial:
    """One way to round a weight: its scales as stored, what is coded by them, and the values.

    Both are fp32 [out, in].
    """

    scales: tuple[Tensor, ...]
    coded: Tensor
    values: Tensor

    def where(self, rows: Tensor, other: "Trial") -> "Trial":
        """These rows [out], the other ones of another trial."""

        def picked(one: Tensor, two: Tensor) -> Tensor:
            # FP8 has no ``where``.
            flat = (
                (one, two) if one.itemsize > 1 else (one.view(torch.uint8), two.view(torch.uint8))
            )
            return torch.where(rows[:, None], *flat).view(one.dtype) if one.dim() else one

        scales = tuple(picked(*pair) for pair in zip(self.scales, other.scales, strict=True))
        coded, values = picked(self.coded, other.coded), picked(self.values, other.values)
        return Trial(scales, coded, values)

    def part(self, rows: slice, row: NumberFormat) -> Rounded:
        """Some rows, with their codes."""
        scales = rows_of(self.scales, rows)
        return Rounded((row.numerics.encode(self.coded[rows], *scales), *scales), self.values[rows])


def rows_of(scales: Sequence[Tensor], rows: slice) -> tuple[Tensor, ...]:
    """The scales of some rows; what is one for the tensor stays."""
    return tuple(each[rows] if each.dim() else each for each in scales)


def by_inputs(
    weight: Tensor,
    row: NumberFormat,
    common: tuple[Tensor, ...],
    inputs: Inputs,
    rounding: Rounding,
) -> Trial:
    """The best of what there is for every row of a weight [out, in], fp32."""
    numerics = row.numerics
    best = Trial(numerics.scales(weight, *common), weight, numerics.fake(weight, *common))
    if rounding == "nearest":
        return best
    width, tokens = weight.shape[1], max(1, inputs.tokens)
    gram = inputs.gram().to(weight) if inputs.tokens else weight.new_zeros(width, width)
    require_read(gram)
    # Of a layer that reads nothing but zeros the weight's own squared error counts.
    gram.diagonal().add_((gram.diagonal().sum() == 0).to(gram))
    least = row_errors(weight - best.values, gram)

    def others() -> Iterator[Trial]:
        if row.group > 1:
            scales = best_scales(weight, row, common, gram.diagonal())
            steps = numerics.steps(*scales)[..., None]
            grouped = in_groups(weight, row)
            yield Trial(scales, weight, (numerics.round_(grouped / steps) * steps).flatten(-2))
        if rounding == "second-order":
            yield second_order(weight, row, common, gram, DAMPING * (width / tokens) ** 0.5)

    for trial in others():
        errors = row_errors(weight - trial.values, gram)
        # Of equals the first: what is on the grid stays.
        best, least = best.where(errors >= least, trial), torch.minimum(errors, least)
    return best


def require_read(gram: Tensor) -> None:
    """InputError where H is not finite."""
    if not bool(gram.diagonal().isfinite().all()):
        raise InputError(
            "what a layer reads is not finite on this text (NaN or infinity): nothing can be "
            "rounded by it; the student's weights are damaged, or overflow"
        )


def row_errors(errors: Tensor, gram: Tensor) -> Tensor:
    """E of every row [out], of what rounding changed [out, in]."""
    return ((errors @ gram) * errors).sum(-1)


def best_scales(
    weight: Tensor, row: NumberFormat, common: tuple[Tensor, ...], importance: Tensor
) -> tuple[Tensor, ...]:
    """Scales of least error of a weight [out, in], its inputs weighted by ``importance`` [in]."""
    numerics, count = row.numerics, len(RATIOS)
    ratios = torch.tensor(RATIOS).to(weight.device)
    weights = in_groups(importance, row)
    found = []
    # All ratios at once, of as many rows as stay in the cache.
    for part in torch.split(weight, max(1, CHUNK // (count * weight.shape[1]))):
        many = part.repeat(count, 1)
        own = ratios.repeat_interleave(part.numel() // row.group)[:, None]
        steps = numerics.steps(*numerics.scales(many, *common, ratio=own))[..., None]
        groups = in_groups(many, row)
        errors = numerics.round_(groups / steps).mul_(steps).sub_(groups).square_().mul_(weights)
        best = ratios[errors.sum(-1).view(count, len(part), -1).argmin(0)]
        found.append(numerics.scales(part, *common, ratio=best.view(-1, 1)))
    return side_by_side(found, 0)


def in_groups(weight: Tensor, row: NumberFormat) -> Tensor:
    """The last axis as groups [..., in / group, group]."""
    return weight.reshape(*weight.shape[:-1], -1, row.group)


def side_by_side(parts: Sequence[tuple[Tensor, ...]], axis: int) -> tuple[Tensor, ...]:
    """Scales of parts of a weight as those of the whole."""
    return tuple(
        torch.cat(each, dim=axis) if each[0].dim() else each[0] for each in zip(*parts, strict=True)
    )


def second_order(
    weight: Tensor, row: NumberFormat, common: tuple[Tensor, ...], gram: Tensor, damping: float
) -> Trial:
    """A weight [out, in] rounded a column at a time, what it misses carried on."""
    numerics, width = row.numerics, weight.shape[1]
    factor = inverse_factor(gram, damping)
    importance = gram.diagonal()
    left = weight.T.clone()  # columns of the weight are rows here, one after another in memory
    values, found = torch.empty_like(left), list[tuple[Tensor, ...]]()
    fixed = numerics.scales(weight, *common) if row.group == 1 else ()
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        part, errors = left[start:end], torch.empty_like(left[start:end])
        for column in range(start, end):
            if row.group > 1 and column % row.group == 0:
                group = slice(column - start, column - start + row.group)
                own = part[group].T.contiguous()
                weights = importance[column : column + row.group]
                found.append(best_scales(own, row, common, weights))
            scales = fixed or found[-1]
            step = numerics.steps(*scales)
            step = step if step.dim() == 0 else step[:, 0]
            at = column - start
            value = numerics.round_(part[at] / step).mul_(step)
            values[column] = value
            errors[at] = (part[at] - value) / factor[column, column]
            part[at + 1 :].addr_(factor[column, column + 1 : end], errors[at], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    values = values.T.contiguous()
    return Trial(fixed or side_by_side(found, 1), values, values)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U the inverse of the damped H."""
    # One name, so that two of them at most are in memory beside H.
    factor: Tensor = gram.clone()
    factor.diagonal().add_(damping * gram.diagonal().mean())
    factor = torch.linalg.cholesky(factor)
    factor = torch.cholesky_inverse(factor)
    factor = torch.linalg.cholesky(factor, upper=True)
    return factor
