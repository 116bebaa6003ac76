"""Measured KL: streamed, resumed from the best candidate so far and in full are one number."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuts import candidate, some
from torch import Tensor

from compress.measure import kl as measuring
from compress.measure.kl import Reference, mean_kl, measure, reference
from compress.measure.prefix import Incumbent
from compress.model.architecture import in_kv_format
from compress.model.checkpoint import open_checkpoint
from compress.student.candidate import Candidate
from compress.sweep.placement import Placement
from compress.sweep.stack import stack_of

TOKENS = torch.randint(0, 128, (10, 16), generator=torch.Generator().manual_seed(4))
# The block that shrinks, and to what: the last one, the first one.
LAST = {
    "llama": {"layers.2.ffn/ffn": some(64, of=96)},
    "nemotron_h": {"layers.4.mamba/channel": some(8, of=16)},
}
FIRST = {
    "llama": {"layers.0.attention/kv_head": some(1, of=2)},
    "nemotron_h": {"layers.0.mamba/channel": some(8, of=16)},
}


def text_of(path: Path, placement: Placement | None = None) -> Reference:
    checkpoint = open_checkpoint(path)
    return reference(checkpoint, stack_of(checkpoint, placement or Placement()), TOKENS)


def students(text: Reference) -> list[Candidate]:
    """Students that differ early, late and in their cache, one with fewer layers and channels."""
    teacher = text.teacher.architecture
    late, early = LAST[teacher.family], FIRST[teacher.family]
    fewer = torch.arange(len(teacher.blocks) - 1)
    keeps = [late, early, early | late, {"blocks": fewer}, late | {"hidden": some(48, of=64)}]
    found = [candidate(teacher, keep) for keep in (late, *keeps)]
    found[0] = replace(found[0], architecture=in_kv_format(found[0].architecture, "fp8"))
    return found


def measured(student: Candidate, text: Reference) -> Tensor:
    return torch.cat(list(measure(student, text)))


@pytest.mark.parametrize("memory", [0, 300_000, None])
def test_streamed_and_from_where_the_best_one_differs_the_kl_is_that_of_a_full_run(
    memory: int | None, tiny: Path
) -> None:
    text = text_of(tiny, Placement(memory=memory))
    for student in students(text) * 2:
        alone = measured(student, text_of(tiny))
        assert torch.equal(measured(student, text), alone)
    assert text.best.kl < torch.inf


def test_a_candidate_starts_where_it_differs_from_the_best_one(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, begun = text_of(tiny), list[int]()

    def begin(self: Incumbent, layers: Sequence[object], size: int) -> object:
        walk = begin_of(self, layers, size)
        begun.append(max((layer for _, layer in walk.states), default=0))
        return walk

    begin_of = Incumbent.begin
    monkeypatch.setattr(measuring.Incumbent, "begin", begin)
    teacher = text.teacher.architecture
    late = candidate(teacher, LAST[teacher.family])
    whole = candidate(teacher, {})
    for student in (late, late, whole, candidate(teacher, FIRST[teacher.family])):
        measured(student, text)
    assert begun == [0, teacher.layers, teacher.layers - 1, 0]


def test_one_that_stops_early_is_no_incumbent(tiny: Path) -> None:
    text = text_of(tiny)
    next(measure(students(text)[1], text))
    assert text.best.walk is None


def test_kept_states_stay_within_their_limit(tiny_llama: Path) -> None:
    text = text_of(tiny_llama)
    student = students(text)[1]
    for limit in (0, 20_000, 60_000, 10**9):
        own = replace(text, best=Incumbent(limit))
        measured(student, own)
        assert own.best.walk is not None
        assert sum(state.nbytes for state in own.best.walk.states.values()) <= limit / 2


def test_bf16_is_near_the_reference(tiny: Path) -> None:
    text, other = text_of(tiny), text_of(tiny, Placement(dtype=torch.bfloat16))
    for student in students(text):
        exact, found = measured(student, text).mean(), measured(student, other).mean()
        assert abs(found - exact) < max(0.002, 0.03 * exact)


def test_a_students_own_stack_measures_the_same(tiny: Path) -> None:
    text = text_of(tiny)
    for student in students(text):
        whole = mean_kl(text.store.student(student), text)
        assert float(measured(student, text).mean()) == pytest.approx(whole, abs=1e-6)
