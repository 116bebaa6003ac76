"""Least squares for cuts of one matrix, and what those that lie in each other miss, at once.

W [out, d] reads X, of which G = X^T X [d, d] is known. Cut to the columns k, r gone, its refit is

    V = argmin |X_k V^T - X W^T|^2 + lambda |V - W_k|^2 = W_k + W_r G_rk (G_kk + lambda I)^-1

With columns ordered so that every cut keeps the first ones, one factor L L^T = G + lambda I serves
all of them, since its leading part is the factor of that part of the matrix:

    V = Z_k L_kk^-1,  [V 0] - W = -[0 Z_r] L^-1  with  Z = W L

On another text, of Gram matrix C, what a cut misses is |X_k V^T - X W^T|^2, the sum of
(Z^T Z * L^-1 C L^-T) over the columns that go: all cuts are read from one matrix.

fp32 is enough: with a ridge of a tenth a refit is within 1e-5 of fp64's, and a weight is then
rounded to BF16, which takes 2e-3 (measured on SmolLM2-135M).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Rows of a product that are made at a time.
ROWS = 512


def chains(cuts: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the cuts [kept columns] in chains: each keeps all that the one before it keeps."""
    found: list[list[int]] = []
    for number in sorted(range(len(cuts)), key=lambda number: len(cuts[number])):
        for chain in found:
            if bool(torch.isin(cuts[chain[-1]], cuts[number]).all()):
                chain.append(number)
                break
        else:
            found.append([number])
    return found


def ordered(cuts: Sequence[Tensor], size: int) -> Tensor:
    """All columns [size], those of the first cut of a chain first, then what each next one adds."""
    order = torch.zeros(0, dtype=torch.long)
    for cut in (*cuts, torch.arange(size)):
        order = torch.cat([order, cut[~torch.isin(cut, order)]])
    return order


def damping(gram: Tensor, ridge: float) -> float:
    """Lambda: so much of the mean of the diagonal of those columns that are ever active.

    Where none is, any ridge leaves the weights.
    """
    diagonal = gram.diagonal()
    alive = diagonal[diagonal > 0]
    return ridge * float(alive.mean()) if len(alive) else ridge


def factor(gram: Tensor, order: Tensor, ridge: float) -> Tensor:
    """L [k, k] of the matrix on some columns, in their order."""
    matrix = gram[order[:, None], order]
    matrix.diagonal().add_(damping(gram, ridge))
    lower: Tensor = torch.linalg.cholesky(matrix)
    return lower


def refit(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """V [out, k]; columns that were never active keep their weights."""
    gone = torch.ones(len(gram)).index_fill_(0, kept, 0).nonzero().flatten()
    missing = weight[:, gone] @ gram[gone[:, None], kept]
    return weight[:, kept] + torch.cholesky_solve(missing.T, factor(gram, kept, ridge)).T


def refit_errors(
    weight: Tensor, gram: Tensor, check: Tensor, cuts: Sequence[Tensor], ridge: float
) -> list[float]:
    """What the refits of a chain of cuts miss on the text of ``check``, squared."""
    order = ordered(cuts, len(gram))
    lower = factor(gram, order, ridge)
    whitened = torch.linalg.solve_triangular(lower, check[order[:, None], order], upper=False)
    whitened = torch.linalg.solve_triangular(lower, whitened.T, upper=False)
    projected = weight[:, order] @ lower
    for rows in pieces(len(order)):
        whitened[rows] *= projected[:, rows].T @ projected
    return [float(whitened[len(cut) :, len(cut) :].sum(dtype=torch.float64)) for cut in cuts]


def cut_errors(weight: Tensor, check: Tensor, changes: Tensor) -> list[float]:
    """|X diag(c) W^T|^2 on the text of ``check`` for every row c [d] of ``changes``, fp64."""
    found = torch.zeros(len(changes), dtype=torch.float64, device=check.device)
    for rows in pieces(len(check)):
        products = ((weight[:, rows].T @ weight) * check[rows]).double()
        found += ((changes[:, rows] @ products) * changes).sum(1)
    return found.tolist()


def pieces(size: int) -> list[slice]:
    """Rows of a matrix of this many columns, some at a time: it is not held once more."""
    return [slice(start, start + ROWS) for start in range(0, size, ROWS)]
