"""The table of units agrees with the families' tables, and nothing else knows a kind of block."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from tiny_models import EVERY
from torch import Tensor

import compress
from compress.model.architecture import Architecture, Block, sizes
from compress.model.families import family_of, read_architecture
from compress.model.layout import axes
from compress.student.candidate import expert_keep
from compress.student.masks import alive, summed
from compress.student.repair import kept_columns
from compress.student.units import AXES, array_of, axes_in, projections, units_in

TEACHERS = {
    name: read_architecture(EVERY[name])
    for name in ("llama", "hybrid", "nemotron_h_latent", "qwen3_next", "qwen3_5_text")
}
CASES = [
    pytest.param(teacher, block, id=f"{name}-{block.layer}.{block.kind}")
    for name, teacher in TEACHERS.items()
    for block in teacher.blocks
]


def halved(block: Block, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Half of the units of these axes, another half in every row."""
    draw, keep, own = torch.Generator().manual_seed(1), {}, sizes(block)
    for name in sorted(names, key=lambda name: AXES[block.kind][name].within is not None):
        parent = AXES[block.kind][name].within
        rows = 1 if parent is None else len(keep.get(parent, range(own[parent])))
        drawn = torch.stack([torch.randperm(own[name], generator=draw) for _ in range(rows)])
        kept = drawn[:, : own[name] // 2].sort(-1).values
        keep[name] = kept[0] if parent is None else kept
    return keep


@pytest.mark.parametrize(("teacher", "block"), CASES)
def test_a_mask_keeps_the_columns_that_surgery_takes(teacher: Architecture, block: Block) -> None:
    names = tuple(axes_in(block))
    for some in itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in range(len(names) + 1)
    ):
        keep = halved(block, some)
        for projection in projections(teacher, block):
            own = expert_keep(keep, block, projection.expert)
            mask = alive(block, projection.units, keep)
            if projection.expert is not None:
                mask = mask[projection.expert]
            columns = mask.flatten().repeat_interleave(projection.features).nonzero().flatten()
            expected = torch.arange(0) if own is None else kept_columns(projection, block, own)
            assert torch.equal(columns, expected.sort().values)


@pytest.mark.parametrize(("teacher", "block"), CASES)
def test_families_have_every_axis_and_read_every_array(teacher: Architecture, block: Block) -> None:
    table = family_of(teacher.family).tensors(block)
    declared = {axis for slot in table.values() for axis in axes(slot.shape)}
    assert axes_in(block).keys() <= declared
    assert {p.units for p in projections(teacher, block)} == set(units_in(block))


@pytest.mark.parametrize(("teacher", "block"), CASES)
def test_units_of_an_axis_are_sums_of_the_finest_ones(teacher: Architecture, block: Block) -> None:
    for axis, rule in axes_in(block).items():
        units = array_of(block, axis)
        values = torch.rand(3, *units.shape(block), dtype=torch.float64)
        found = summed(values, units, axis)
        expected = [sizes(block)[name] for name in (rule.within, axis) if name]
        assert list(found.shape) == [3, *expected]
        torch.testing.assert_close(found.flatten(1).sum(1), values.flatten(1).sum(1))


def test_no_other_file_knows_a_kind_of_block() -> None:
    root = Path(compress.__file__).parent
    named = re.compile(r"import .*\b(Mamba|Moe|Ffn)\b|\bkind [!=]= \"(mamba|moe|ffn|attention)")
    for package in ("scores", "student", "searches"):
        for file in sorted((root / package).glob("*.py")):
            assert not named.search(file.read_text()), file
