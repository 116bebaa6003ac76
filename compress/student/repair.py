"""Repair without labels: the output projection of a cut block, refitted to its teacher's output.

A block's output is X W^T, where X [tokens, d] is what its output projection W [out, d] reads. With
only the columns k kept and r gone, the weight whose output is nearest to the teacher's is

    argmin |X_k W'^T - X W^T|^2 + lambda |W' - W_k|^2 = W_k + W_r G_rk (G_kk + lambda I)^-1

with the Gram matrix G = X^T X: one matrix per projection serves every cut of its block. It is the
channel reconstruction of He et al. 2017 (arXiv 1707.06168, eq. 1) with the ridge toward the
teacher's weights, and the cheap counterpart of Puzzle's blockwise local distillation (arXiv
2411.19146). Rows of W' do not depend on each other: a cut of the hidden size only leaves some out.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.model.architecture import Architecture, Block, sizes
from compress.model.checkpoint import Checkpoint
from compress.model.families import family_of
from compress.model.layout import kept_positions, parse, take
from compress.student.candidate import expert_keep
from compress.student.grams import HALVES, Grams
from compress.student.units import Projection, projections


def refit(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float, scale: Tensor) -> Tensor:
    """W' [out, k] in fp64 for W [out, d], its Gram matrix [d, d] and the kept columns [k].

    ``scale`` [k] is how much larger the student's columns are than the teacher's, 1 but after a
    norm. Kept columns that were never active keep their weights.
    """
    weight, gram = weight.double(), gram.double()
    seen = gram[kept][:, kept] * scale[:, None] * scale
    damping = ridge * seen.diagonal().mean()
    if damping == 0:
        return weight[:, kept]
    missing = weight @ gram[:, kept] * scale - weight[:, kept] @ seen
    factor = torch.linalg.cholesky(seen + damping * torch.eye(len(kept), dtype=seen.dtype))
    return weight[:, kept] + torch.cholesky_solve(missing.T, factor).T


def squared_error(
    weight: Tensor, student: Tensor, gram: Tensor, kept: Tensor, scale: Tensor
) -> float:
    """|X_k W'^T - X W^T|^2 of a student's weight on the text of a Gram matrix."""
    difference = -weight.double()
    difference[:, kept] += student.double() * scale
    return float(((difference @ gram) * difference).sum())


def energy_scale(gram: Tensor, norm: Tensor, groups: int, kept: Tensor) -> Tensor:
    """How much larger the kept columns [k] of a gated norm's output are in the student.

    The norm divides by the root mean square of a group. Without the dropped columns, which surgery
    makes count as zeros (it folds sqrt(D/D') into the weight), that is smaller by the root of the
    share of the group's energy that stays. Taken here over the whole text: it differs from token to
    token, which no Gram matrix knows.
    """
    before = gram.diagonal() / norm.double().square()
    energy = torch.where(norm == 0, 0.0, before).view(groups, -1)
    stays = torch.zeros(len(norm), dtype=gram.dtype).index_fill_(0, kept, 1).view(groups, -1)
    share = (energy * stays).sum(1) / energy.sum(1)
    # A group that is never active, or keeps nothing that is, has nothing to scale.
    scale = torch.where(share > 0, share.rsqrt(), 1.0)
    return scale.repeat_interleave(energy.shape[1])[kept]


def scale_of(
    teacher: Checkpoint, block: Block, projection: Projection, gram: Tensor, kept: Tensor
) -> Tensor:
    """How much larger the kept inputs [k] of a projection are in the student, on average."""
    if projection.norm is None:
        return torch.ones(len(kept), dtype=gram.dtype)
    norm = teacher[prefix_of(teacher.architecture, block) + projection.norm]
    return energy_scale(gram, norm, projection.groups, kept)


def prefix_of(architecture: Architecture, block: Block) -> str:
    """What names of a block's tensors begin with on disk."""
    return family_of(architecture.family).layer.format(layer=block.layer)


def kept_columns(projection: Projection, block: Block, keep: Mapping[str, Tensor]) -> Tensor:
    """The inputs [k] of a projection that survive; ``keep`` is the block's, or one expert's."""
    return kept_positions(parse(projection.slot.shape)[1], sizes(block), keep)


def refitted_weight(
    teacher: Checkpoint,
    grams: Grams,
    block: Block,
    projection: Projection,
    keep: Mapping[str, Tensor],
) -> Tensor:
    """A projection's weight [kept outputs, kept inputs] refitted on the whole text, as stored.

    ``keep`` has the kept indices of the block (of one expert where it is one's) and of ``hidden``.
    """
    weight = teacher[prefix_of(teacher.architecture, block) + projection.name]
    axis_sizes = sizes(block) | {"hidden": teacher.architecture.hidden}
    rows = {axis: index for axis, index in keep.items() if axis == "hidden"}
    weight = take(weight, projection.slot.shape, axis_sizes, rows)
    kept = kept_columns(projection, block, keep)
    if len(kept) == weight.shape[1]:
        return weight

    def fitted() -> Tensor:
        gram = grams.both(projection.key)
        scale = scale_of(teacher, block, projection, gram, kept)
        return refit(weight, gram, kept, grams.ridge, scale).to(weight.dtype)

    channels = tuple(rows["hidden"].tolist()) if rows else None
    return grams.remembered((projection.key, tuple(kept.tolist()), channels), fitted)


def repair_ratio(
    teacher: Checkpoint, grams: Grams, number: int, keep: Mapping[str, Tensor]
) -> float:
    """|block's output - teacher's|^2 after repair over that before it, on text not fitted on.

    ``keep`` has the kept indices of the teacher's block ``number`` by axis. Projections are summed
    as if their errors had nothing to do with each other. Experts that go are lost in both: their
    tokens then go elsewhere, which is not repaired.
    """
    block = teacher.architecture.blocks[number]
    before = after = 0.0
    for projection in projections(teacher.architecture, block):
        own = expert_keep(keep, block, projection.expert)
        kept = torch.arange(0) if own is None else kept_columns(projection, block, own)
        key = (projection.key, tuple(kept.tolist()))
        if key not in grams.errors:
            grams.errors[key] = errors(teacher, grams, block, projection, kept)
        cut, fitted = grams.errors[key]
        before, after = before + cut, after + fitted
    return after / before if before > 0 else 1.0


def errors(
    teacher: Checkpoint, grams: Grams, block: Block, projection: Projection, kept: Tensor
) -> tuple[float, float]:
    """Squared error of a projection's output on the check half: cut, and fitted on the other."""
    prefix = prefix_of(teacher.architecture, block)
    weight = teacher[prefix + projection.name].double()
    if len(kept) == weight.shape[1]:
        return 0.0, 0.0
    if projection.after:
        weight = teacher[prefix + projection.after].double() @ weight
    fit, check = (grams.half(half, projection.key) for half in HALVES)
    scale = scale_of(teacher, block, projection, fit, kept)
    cut = squared_error(weight, weight[:, kept], check, kept, scale)
    if not len(kept):
        return cut, cut
    fitted = refit(weight, fit, kept, grams.ridge, scale)
    return cut, squared_error(weight, fitted, check, kept, scale)
