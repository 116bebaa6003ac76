"""Units chosen again at a student: sizes stay, the KL never rises, and what matters comes back."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuts import CASES, candidate
from tiny_models import EVERY, write_tiny
from torch import Tensor

from compress.measure.kl import Reference, measure, reference
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.scores.contributions import contributions
from compress.scores.costs import Scores
from compress.scores.reselect import FEWEST, certainly_lower, lower, moved, reselect, reselected
from compress.scores.tangent import Tangent, tangent
from compress.student.candidate import Candidate
from compress.student.surgery import student_tensors
from compress.sweep.stack import Stack, stack_of

LENGTH = 16
TOKENS = torch.randint(0, 128, (12, LENGTH), generator=torch.Generator().manual_seed(2))
CUTS = [case for case, (_, keep, _) in CASES.items() if keep.keys() - {"blocks"}]


def prepared(path: Path) -> tuple[Stack, Reference, Scores]:
    """The teacher's stack, its text and its scores."""
    teacher = open_checkpoint(path)
    stack = stack_of(teacher)
    made = contributions(stack, TOKENS, 2, [], 0)
    return stack, reference(teacher, stack, TOKENS), Scores(made, {}, {}, LENGTH)


@pytest.mark.parametrize("trust", [1.0, 1e-9])
@pytest.mark.parametrize("case", CUTS)
def test_sizes_stay_and_no_trust_changes_nothing(case: str, trust: float, tmp_path: Path) -> None:
    name, keep, _ = CASES[case]
    stack, text, scores = prepared(write_tiny(tmp_path / name, EVERY[name], dtype=torch.float32))
    teacher = text.teacher.architecture
    student = candidate(teacher, keep)
    found = reselected(student, tangent(stack, student, text, []), scores, teacher, trust)
    assert found.architecture == student.architecture
    assert found.keep.keys() == student.keep.keys()
    for key, index in found.keep.items():
        assert index.shape == student.keep[key].shape
        assert (index.diff(dim=-1) > 0).all(), "kept indices ascend and differ"
    for parameter, tensor in student_tensors(text.teacher, found):
        assert tensor.isfinite().all(), parameter
    if trust < 1:
        assert moved(student, found, teacher) == 0
        assert all(torch.equal(found.keep[key], index) for key, index in student.keep.items())


def test_a_unit_that_matters_comes_back_for_one_that_is_dead(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY["llama"], dtype=torch.float32)
    model = load_model(path)
    down = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        down[:, 3] = 0
        down[:, 80] *= 4
    model.save_pretrained(path)
    stack, text, scores = prepared(path)
    teacher = text.teacher.architecture
    student = candidate(teacher, {"layers.1.ffn/ffn": torch.arange(64)})
    found = reselected(student, tangent(stack, student, text, []), scores, teacher, 1.0)
    kept = found.keep["layers.1.ffn/ffn"].tolist()
    assert 80 in kept
    assert 3 not in kept
    assert moved(student, found, teacher) == 64 - len(set(kept) & set(range(64)))


def copied(path: Path) -> Path:
    """A model with sixteen copies of one neuron: each matters little alone, all of them a lot."""
    write_tiny(path, EVERY["llama"], dtype=torch.float32)
    model = load_model(path)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[80:] = mlp.gate_proj.weight[79]
        mlp.up_proj.weight[80:] = mlp.up_proj.weight[79]
        mlp.down_proj.weight[:, 80:] = mlp.down_proj.weight[:, 79:80]
    model.save_pretrained(path)
    return path


def test_rounds_bring_back_units_that_are_missed_together(tmp_path: Path) -> None:
    stack, text, scores = prepared(copied(tmp_path / "m"))
    student = candidate(text.teacher.architecture, {"layers.1.ffn/ffn": torch.arange(80)})
    before = torch.cat(list(measure(student, text)))
    kls = [float(before.mean())]
    for rounds in range(1, 4):
        found, values = reselect(
            student, before, text, [text] * rounds, measure,
            lambda other, there: tangent(stack, other, there, []), scores,
        )  # fmt: skip
        assert torch.equal(values, torch.cat(list(measure(found, text))))
        kls.append(float(values.mean()))
    assert kls[1] < 0.5 * kls[0]
    assert kls == sorted(kls, reverse=True)


@pytest.mark.parametrize("worse_on", ["slopes", "select"])
def test_a_round_that_helps_on_one_text_alone_changes_nothing_and_is_the_last(
    worse_on: str, tmp_path: Path
) -> None:
    stack, text, scores = prepared(copied(tmp_path / "m"))
    student = candidate(text.teacher.architecture, {"layers.1.ffn/ffn": torch.arange(80)})
    slopes, tangents, seen = text.part(0, 12), list[Candidate](), list[Reference]()

    def at(other: Candidate, there: Reference) -> Tangent:
        tangents.append(other)
        return replace(tangent(stack, other, there, []), kl=torch.ones(12))

    def measured(other: Candidate, on: Reference) -> Iterator[Tensor]:
        seen.append(on)
        worse = (on is slopes) == (worse_on == "slopes")
        yield torch.ones(12) * (1 if other is student else 2 if worse else 0.5)

    before = torch.ones(12)
    found, values = reselect(student, before, text, [slopes] * 5, measured, at, scores)
    assert found is student
    assert values is before
    assert len(tangents) == 1
    assert any(on is (slopes if worse_on == "slopes" else text) for on in seen)
    # What cannot be proven is not tried.
    few = before[: FEWEST - 1]
    found, values = reselect(student, few, text, [slopes] * 5, measured, at, scores)
    assert found is student
    assert values is few
    assert len(tangents) == 1


def test_a_round_ends_with_the_first_step_that_helps_and_looks_at_the_slopes_text_last(
    tmp_path: Path,
) -> None:
    stack, text, scores = prepared(copied(tmp_path / "m"))
    student = candidate(text.teacher.architecture, {"layers.1.ffn/ffn": torch.arange(80)})
    slopes, seen = text.part(0, 12), list[str]()

    def at(other: Candidate, there: Reference) -> Tangent:
        return replace(tangent(stack, other, there, []), kl=torch.ones(12))

    def measured(other: Candidate, on: Reference) -> Iterator[Tensor]:
        seen.append("slopes" if on is slopes else "select")
        # The first step is too long for select text.
        yield torch.ones(12) * (2.0 if len(seen) == 1 else 0.5)

    found, values = reselect(student, torch.ones(12), text, [slopes], measured, at, scores)
    assert seen == ["select", "select", "slopes"]
    assert found is not student
    assert torch.equal(values, torch.full((12,), 0.5))


def test_one_sequence_says_nothing_of_slopes(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", EVERY["llama"], dtype=torch.float32)
    stack, text, scores = prepared(path)
    teacher = text.teacher.architecture
    student = candidate(teacher, {"layers.1.ffn/ffn": torch.arange(64)})
    one = tangent(stack, student, text.part(0, 1), [])
    assert moved(student, reselected(student, one, scores, teacher, 1.0), teacher) == 0
    some = tangent(stack, student, text, [])
    assert moved(student, reselected(student, some, scores, teacher, 1.0), teacher) > 0


def test_a_hopeless_measurement_stops_and_a_close_one_does_not() -> None:
    values, seen = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), []

    def batches(excess: list[float]) -> Iterator[Tensor]:
        seen.clear()
        for start in range(0, 6, 2):
            seen.append(start)
            yield values[start : start + 2] + torch.tensor(excess[start : start + 2])

    assert lower(batches([0.5, 0.6, -9.0, -9.0, -9.0, -9.0]), values) is None
    assert len(seen) == 1
    assert lower(batches([0.5, -0.4, 0.2, -0.2, 0.1, 0.0]), values) is None
    assert len(seen) == 3
    found = lower(batches([0.5, -0.4, -0.2, -0.2, 0.1, 0.0]), values)
    assert found is not None
    assert len(found) == 6


def test_a_few_sequences_do_not_decide() -> None:
    values = torch.linspace(1, 2, 16)
    few, many = torch.full((16,), 0.01), torch.full((16,), -0.05)
    few[:2] = -0.5
    assert few.mean() < many.mean()
    assert not certainly_lower(values + few, values)
    assert certainly_lower(values + many, values)


def test_moved_counts_units_of_heads_and_channels(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "h", EVERY["hybrid"])
    teacher = open_checkpoint(path).architecture
    student = candidate(teacher, {"hidden": torch.arange(48)})
    other = replace(student, keep=student.keep | {"hidden": torch.arange(2, 50)})
    assert moved(student, other, teacher) == 2
    heads = candidate(teacher, {"layers.2.attention/query": torch.tensor([[0], [0]])})
    fewer = candidate(teacher, {"layers.2.attention/query": torch.tensor([[0], [1]])})
    assert moved(heads, fewer, teacher) == 1
