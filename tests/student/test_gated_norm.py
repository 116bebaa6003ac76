"""A gated norm that averages over fewer units."""

import torch
from torch import Tensor

from compress.student.repair import (
    energy_scale,
)


def test_a_gated_norm_is_larger_by_the_energy_it_lost() -> None:
    x = torch.randn(4096, 2, 8, generator=torch.Generator().manual_seed(0))
    weight, kept = torch.tensor([1.0, -2.0]).repeat(8), torch.tensor([0, 1, 2, 3, 8, 9])

    def normed(part: Tensor, width: int) -> Tensor:
        return part / (part.square().sum(-1, keepdim=True) / width).sqrt()

    whole = normed(x, 8).flatten(1) * weight
    mask = torch.zeros(16).index_fill_(0, kept, 1)
    alone = normed(x * mask.view(2, 8), 8).flatten(1) * weight
    found = energy_scale((whole.T @ whole).double(), weight, 2, kept)
    expected = (alone[:, kept].square().sum(0) / whole[:, kept].square().sum(0)).sqrt()
    assert float((expected - found).abs().max() / expected.min()) < 0.25
    assert len(set(found.tolist())) == 2, "one per group"
