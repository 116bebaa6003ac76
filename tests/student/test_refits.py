"""Refits of cuts that lie in each other: one factor gives what solving each by itself does."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compress.student.refits import chains, cut_errors, damping, refit, refit_errors

OUT, WIDTH = 24, 64
DRAW = torch.Generator().manual_seed(2)
WEIGHT = torch.randn(OUT, WIDTH, generator=DRAW).double()
MIXED = torch.randn(WIDTH, WIDTH, generator=DRAW).double() / 8
FIT, CHECK = (torch.randn(200, WIDTH, generator=DRAW).double() @ MIXED for _ in range(2))
ORDER = torch.randperm(WIDTH, generator=DRAW)
NESTED = [ORDER[:width].sort().values for width in (60, 8, 32, 48)]
RIDGE = 0.1


def directly(kept: Tensor) -> Tensor:
    """V [out, k] from the normal equations."""
    gram = FIT.T @ FIT
    ridge = damping(gram, RIDGE)
    seen = gram[kept][:, kept] + ridge * torch.eye(len(kept)).double()
    return torch.linalg.solve(seen, (WEIGHT @ gram[:, kept] + ridge * WEIGHT[:, kept]).T).T


def missed(kept: Tensor, text: Tensor) -> float:
    """What the direct refit misses on a text."""
    return float((text[:, kept] @ directly(kept).T - text @ WEIGHT.T).square().sum())


@pytest.mark.parametrize("kept", NESTED, ids=len)
def test_a_refit_is_the_direct_solution(kept: Tensor) -> None:
    found = refit(WEIGHT, FIT.T @ FIT, kept, RIDGE)
    torch.testing.assert_close(found, directly(kept), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cuts", [NESTED, NESTED[:1], [torch.arange(5)], [torch.arange(WIDTH)]])
def test_errors_on_other_text_are_those_of_the_direct_solutions(cuts: Sequence[Tensor]) -> None:
    [chain] = chains(cuts)
    some = [cuts[number] for number in chain]
    found = refit_errors(WEIGHT, FIT.T @ FIT, CHECK.T @ CHECK, some, RIDGE)
    expected = [missed(kept, CHECK) for kept in some]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_cuts_that_do_not_lie_in_each_other_have_factors_of_their_own() -> None:
    cuts = [torch.tensor(kept) for kept in ([0, 1, 2], [0, 1], [3], [1, 2, 3], [0, 1, 2, 5])]
    found = chains(cuts)
    assert sorted(number for chain in found for number in chain) == [0, 1, 2, 3, 4]
    for chain in found:
        sets = [set(cuts[number].tolist()) for number in chain]
        assert all(small <= large for small, large in itertools.pairwise(sets))
    assert len(found) == 2


def test_fp32_is_enough() -> None:
    gram, check = FIT.T @ FIT, CHECK.T @ CHECK
    small = WEIGHT.float(), gram.float(), check.float()
    for kept in NESTED:
        found = refit(small[0], small[1], kept, RIDGE).double()
        torch.testing.assert_close(found, directly(kept), rtol=0, atol=1e-5)
    cuts = [NESTED[number] for number in chains(NESTED)[0]]
    found = refit_errors(*small, cuts, RIDGE)
    assert found == pytest.approx(refit_errors(WEIGHT, gram, check, cuts, RIDGE), rel=1e-5)


def test_columns_that_were_never_active_count_neither_for_the_ridge_nor_for_the_refit() -> None:
    dead = torch.tensor([3, 40])
    gram = FIT.T @ FIT
    alive = damping(gram, RIDGE)
    gram[dead], gram[:, dead] = 0, 0
    rest = torch.ones(WIDTH).index_fill_(0, dead, 0).bool()
    assert damping(gram, RIDGE) == pytest.approx(RIDGE * float(gram.diagonal()[rest].mean()))
    assert damping(gram, RIDGE) != alive
    kept = torch.arange(0, 48)
    found = refit(WEIGHT, gram, kept, RIDGE)
    torch.testing.assert_close(found[:, dead], WEIGHT[:, dead])


def test_what_was_never_active_where_it_is_fitted_keeps_its_weights() -> None:
    nothing, check, kept = torch.zeros(WIDTH, WIDTH).double(), CHECK.T @ CHECK, NESTED[2]
    assert torch.equal(refit(WEIGHT, nothing, kept, RIDGE), WEIGHT[:, kept])
    change = torch.full((1, WIDTH), -1.0).double().index_fill_(1, kept, 0)
    found = refit_errors(WEIGHT, nothing, check, [kept], RIDGE)
    assert found == pytest.approx(cut_errors(WEIGHT, check, change))


def test_a_cut_misses_what_its_columns_put_out() -> None:
    changes = torch.randn(3, WIDTH, generator=DRAW).double()
    found = cut_errors(WEIGHT, CHECK.T @ CHECK, changes)
    expected = [float((CHECK * change @ WEIGHT.T).square().sum()) for change in changes]
    assert found == pytest.approx(expected)
