"""Blocks that learn their teacher's come closer to it, whatever was cut; a kill changes nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import Keep, candidate, some
from tiny_models import EVERY, write_tiny
from torch import Tensor

from compress.core.errors import InputError
from compress.model.build import student_config
from compress.model.checkpoint import Checkpoint, open_checkpoint
from compress.student.candidate import Candidate
from compress.student.surgery import student_tensors
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack, stack_of
from compress.train.distill import DistillSettings
from compress.train.local import Learned, Pair, local_distill

SETTINGS = DistillSettings(tokens=40 * 64, batch_tokens=64, learning_rate=3e-3)
STREAMED = Placement(memory=0)
LLAMA_CUTS: dict[str, Keep] = {
    "ffn": {"layers.1.ffn/ffn": some(48, of=96)},
    "kv_head": {"layers.0.attention/kv_head": some(1, of=2)},
    "hidden": {"hidden": some(48, of=64)},
}
HYBRID_CUTS: dict[str, Keep] = {
    "ffn": {"layers.3.ffn/ffn": some(48, of=96)},
    "mamba": {"layers.0.mamba/channel": some(8, of=16)},
    "expert": {"layers.1.moe/expert": some(4, of=6)},
}

# Norms behind mixers, mixers that read the residual stream, latent attention.
FAMILY_CUTS: list[tuple[str, Keep]] = [
    ("gemma3", {"layers.1.ffn/ffn": some(48, of=96)}),
    ("olmo2", {"layers.1.attention/kv_head": some(1, of=2)}),
    ("olmo2", {"hidden": some(48, of=64)}),
    ("deepseek_v3", {"layers.1.mla/query": some(2, of=4)}),
]


def rows(count: int = 24) -> Tensor:
    return torch.randint(2, 97, (count, 16), generator=torch.Generator().manual_seed(0))


def pairs_of(cut: Candidate) -> list[Pair]:
    """Every block that survives with itself."""
    return [Pair(number, own) for own, number in enumerate(cut.keep["blocks"].tolist())]


def cut_stack(teacher: Checkpoint, cut: Candidate) -> Stack:
    tensors = dict(student_tensors(teacher, cut))
    config = student_config(teacher.config, cut.architecture)
    return Stack(config, cut.architecture, lambda each: tensors[each.name].clone(), STREAMED)


def learn(
    path: Path, keep: Keep, directory: Path, memory: int | None = None, **more: Any
) -> Iterator[tuple[int, Learned]]:
    checkpoint = open_checkpoint(path)
    cut = candidate(checkpoint.architecture, keep)
    teacher, student = stack_of(checkpoint, Placement(memory=memory)), cut_stack(checkpoint, cut)
    hidden = cut.keep.get("hidden")
    pairs = [p for p in pairs_of(cut) if "hidden" in keep or touched(checkpoint, keep, p.teacher)]
    return local_distill(
        teacher, student, pairs, rows(), SETTINGS, directory, hidden, more.get("known")
    )


def touched(checkpoint: Checkpoint, keep: Keep, number: int) -> bool:
    block = checkpoint.architecture.blocks[number]
    return any(key.startswith(f"layers.{block.layer}.{block.kind}/") for key in keep)


@pytest.mark.parametrize("cut", LLAMA_CUTS)
def test_cut_blocks_come_closer_on_rows_held_out(
    tmp_path: Path, tiny_llama: Path, cut: str
) -> None:
    check_closer(tiny_llama, LLAMA_CUTS[cut], tmp_path)


@pytest.mark.parametrize(("family", "keep"), FAMILY_CUTS, ids=str)
def test_cut_blocks_of_a_family_come_closer_on_rows_held_out(
    tmp_path: Path, family: str, keep: Keep
) -> None:
    check_closer(write_tiny(tmp_path / family, EVERY[family]), keep, tmp_path / "local")


@pytest.mark.parametrize("cut", HYBRID_CUTS)
def test_cut_blocks_of_a_hybrid_come_closer_on_rows_held_out(
    tmp_path: Path, tiny_hybrid: Path, cut: str
) -> None:
    check_closer(tiny_hybrid, HYBRID_CUTS[cut], tmp_path)


def check_closer(path: Path, keep: Keep, directory: Path) -> None:
    found = dict(learn(path, keep, directory))
    errors = [pair for layer in found.values() for pair in layer.errors.values()]
    assert errors
    assert all(0 < after < before for before, after in errors)
    assert sum(len(layer.tensors) for layer in found.values()) >= len(errors)
    assert not list(directory.iterdir())


def test_a_block_that_is_its_teachers_stays_as_it_is(tmp_path: Path, tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    cut = candidate(checkpoint.architecture, {})
    student, teacher = cut_stack(checkpoint, cut), stack_of(checkpoint)
    found = dict(local_distill(teacher, student, pairs_of(cut), rows(), SETTINGS, tmp_path))
    errors = [pair for layer in found.values() for pair in layer.errors.values()]
    assert len(errors) == len(checkpoint.architecture.blocks)
    assert max(before for before, _ in errors) < 1e-10
    assert not any(layer.tensors for layer in found.values())


def test_streamed_and_continued_is_resident_and_whole(tmp_path: Path, tiny: Path) -> None:
    keep: Keep = {"hidden": some(48, of=64)}
    whole = dict(learn(tiny, keep, tmp_path))
    begun = learn(tiny, keep, tmp_path, memory=0)
    known = dict(next(begun) for _ in range(2))
    begun.close()
    rest = dict(learn(tiny, keep, tmp_path, memory=0, known=known))
    assert not known.keys() & rest.keys()
    assert (known | rest).keys() == whole.keys()
    for layer, found in (known | rest).items():
        assert found.errors == whole[layer].errors
        assert found.tensors.keys() == whole[layer].tensors.keys()
        assert all(torch.equal(t, whole[layer].tensors[n]) for n, t in found.tensors.items())


def test_one_row_is_not_enough(tmp_path: Path, tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    cut = candidate(checkpoint.architecture, {})
    student, teacher = cut_stack(checkpoint, cut), stack_of(checkpoint)
    with pytest.raises(InputError, match="two rows"):
        next(local_distill(teacher, student, pairs_of(cut), rows(1), SETTINGS, tmp_path))
