"""Repair without labels: the output projection of a cut block, refitted to its teacher's output.

A block's output is X W^T, where X [tokens, d] is what its output projection W [out, d] reads. With
only the columns k kept and r gone, the weight whose output is nearest to the teacher's is

    argmin |X_k V^T - X W^T|^2 + lambda |V - W_k|^2 = W_k + W_r G_rk (G_kk + lambda I)^-1

with the Gram matrix G = X^T X: one matrix per projection serves every cut of its block, and one
factor all that lie in each other (``refits``). It is the channel reconstruction of He et al. 2017
(arXiv 1707.06168, eq. 1) with the ridge toward the teacher's weights, and the cheap counterpart of
Puzzle's blockwise local distillation (arXiv 2411.19146). Rows of V do not depend on each other: a
cut of the hidden size only leaves some out. Where the student's columns are larger than the
teacher's, as after a norm, its weight is V over that.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.model.architecture import Architecture, Block, sizes
from compress.model.checkpoint import Checkpoint
from compress.model.families import family_of
from compress.model.layout import kept_positions, parse
from compress.student.candidate import expert_keep
from compress.student.grams import Grams
from compress.student.refits import chains, cut_errors, refit, refit_errors
from compress.student.units import Projection, projections, read_by_experts

# Of a block or an expert: kept indices by axis; those of ``hidden`` may be among them.
Keep = Mapping[str, Tensor]


def energy_scale(gram: Tensor, norm: Tensor, groups: int, kept: Tensor) -> Tensor:
    """How much larger the kept columns [k] of a gated norm's output are in the student.

    The norm divides by the root mean square of a group. Without the dropped columns, which surgery
    makes count as zeros (it folds sqrt(D/D') into the weight), that is smaller by the root of the
    share of the group's energy that stays. Taken here over the whole text: it differs from token to
    token, which no Gram matrix knows.
    """
    before = gram.diagonal().double().cpu() / norm.double().square()
    energy = torch.where(norm == 0, 0.0, before).view(groups, -1)
    stays = torch.zeros(len(norm)).double().index_fill_(0, kept, 1).view(groups, -1)
    share = (energy * stays).sum(1) / energy.sum(1)
    # A group that is never active, or keeps nothing that is, has nothing to scale.
    scale = torch.where(share > 0, share.rsqrt(), 1.0)
    return scale.repeat_interleave(energy.shape[1])[kept]


def scale_of(
    teacher: Checkpoint, block: Block, projection: Projection, gram: Tensor, kept: Tensor
) -> Tensor:
    """How much larger the kept inputs [k] of a projection are in the student, on average; fp64."""
    if projection.norm is None:
        return torch.ones(len(kept)).double()
    norm = teacher[prefix_of(teacher.architecture, block) + projection.norm]
    repeated = norm.repeat(len(gram) // len(norm))
    return energy_scale(gram, repeated, projection.groups, kept)


def prefix_of(architecture: Architecture, block: Block) -> str:
    """What names of a block's tensors begin with on disk."""
    return family_of(architecture.family).layer.format(layer=block.layer)


def kept_columns(projection: Projection, block: Block, keep: Mapping[str, Tensor]) -> Tensor:
    """The inputs [k] of a projection that survive; ``keep`` is the block's, or one expert's."""
    return kept_positions(parse(projection.slot.shape)[1], sizes(block), keep)


def kept_rows(
    architecture: Architecture, projection: Projection, block: Block, keep: Keep
) -> Tensor:
    """The outputs of a projection that survive; ``keep`` is as in ``kept_columns``."""
    own = sizes(block) | {"hidden": architecture.hidden}
    return kept_positions(parse(projection.slot.shape)[0], own, keep)


def refitted_weight(
    teacher: Checkpoint, grams: Grams, block: Block, projection: Projection, keep: Keep
) -> Tensor:
    """A projection's weight [kept outputs, kept inputs] refitted on the whole text, as stored.

    ``keep`` has the kept indices of the block (of one expert where it is one's) and of ``hidden``.
    """
    weight = teacher[prefix_of(teacher.architecture, block) + projection.name]
    kept = kept_columns(projection, block, keep)

    def fitted() -> Tensor:
        gram = grams.both(projection.key)
        scale = scale_of(teacher, block, projection, gram, kept)
        found = refit(weight.to(gram), gram, kept, grams.ridge).cpu()
        return (found / scale).to(weight.dtype)

    if len(kept) < weight.shape[1]:
        weight = grams.remembered(cut_key(projection, kept), fitted)
    return weight[kept_rows(teacher.architecture, projection, block, keep)]


def repair_ratios(
    teacher: Checkpoint, grams: Grams, number: int, cuts: Sequence[Keep]
) -> list[float]:
    """|block's output - teacher's|^2 after repair over that before it, on text not fitted on.

    Of each cut, the kept indices of the teacher's block ``number`` by axis; many cost hardly more
    than one. Projections are summed as if their errors had nothing to do with each other. Experts
    that go are lost in both: their tokens then go elsewhere, which is not repaired.
    """
    block = teacher.architecture.blocks[number]
    sums = torch.zeros(len(cuts), 2, dtype=torch.float64)
    for projection in projections(teacher.architecture, block):
        kept = [columns(projection, block, cut) for cut in cuts]
        keys = [cut_key(projection, each) for each in kept]
        new = {key: each for key, each in zip(keys, kept, strict=True) if key not in grams.errors}
        if new:
            made = errors(teacher, grams, block, projection, list(new.values()))
            grams.errors.update(zip(new, made, strict=True))
        found = torch.tensor([grams.errors[key] for key in keys], dtype=torch.float64)
        if projection.units == read_by_experts(teacher.architecture, block):
            # Experts lose as much of what they read, which nothing repairs.
            found = found + found[:, :1]
        sums += found
    return [float(after / before) if before > 0 else 1.0 for before, after in sums]


def columns(projection: Projection, block: Block, keep: Keep) -> Tensor:
    """The inputs [k] of a projection that survive in a block; none of an expert that goes."""
    own = expert_keep(keep, block, projection.expert)
    return torch.zeros(0, dtype=torch.long) if own is None else kept_columns(projection, block, own)


def cut_key(projection: Projection, kept: Tensor) -> tuple[str, bytes]:
    """What a refit is known by."""
    return projection.key, kept.numpy().tobytes()


def errors(
    teacher: Checkpoint, grams: Grams, block: Block, projection: Projection, cuts: Sequence[Tensor]
) -> list[tuple[float, float]]:
    """Squared errors of a projection's output on the check half: cut, and fitted on the other."""
    prefix = prefix_of(teacher.architecture, block)
    fit, check = grams.half("fit", projection.key), grams.half("check", projection.key)
    weight = teacher[prefix + projection.name].to(fit)
    if projection.after:
        weight = teacher[prefix + projection.after].to(fit) @ weight
    if projection.post:
        # What it divides by is taken as the teacher's.
        slot = family_of(teacher.architecture.family).tensors(block)[projection.post]
        weight = (slot.offset + teacher[prefix + projection.post].to(fit))[:, None] * weight
    changes = torch.full((len(cuts), len(fit)), -1.0).double()
    for change, kept in zip(changes, cuts, strict=True):
        change[kept] += scale_of(teacher, block, projection, fit, kept)
    before = cut_errors(weight, check, changes.to(fit.device))
    after = list(before)  # of an expert that goes
    for chain in chains(cuts):
        some = [number for number in chain if len(cuts[number])]
        fitted = refit_errors(weight, fit, check, [cuts[n] for n in some], grams.ridge)
        for number, error in zip(some, fitted, strict=True):
            after[number] = error
    return list(zip(before, after, strict=True))
