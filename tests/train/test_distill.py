"""A student equal to its teacher stays, another one comes closer, and a kill changes nothing."""

import dataclasses
from pathlib import Path

import pytest
import torch
from cuts import candidate
from tiny_models import LLAMA, write_tiny
from torch import Tensor

from compress.core.errors import InputError
from compress.model.build import build_model, load_model, student_config
from compress.model.checkpoint import open_checkpoint
from compress.model.modules import final_hidden, head_of
from compress.student.surgery import student_tensors
from compress.sweep.placement import Placement
from compress.sweep.stack import stack_of
from compress.sweep.states import stored_states
from compress.train.distill import DistillSettings, Lesson, Teacher, distill
from compress.train.precision import numerics_of

SETTINGS = DistillSettings(tokens=320, batch_tokens=64, learning_rate=1e-3, checkpoint_seconds=0)


class Interrupted(Exception):
    """Stands for a kill."""


def quiet(done: int, steps: int, figures: dict[str, float]) -> None:
    pass


def stop_at_three(done: int, steps: int, figures: dict[str, float]) -> None:
    if done == 3:
        raise Interrupted


def tokens(count: int = 20, length: int = 16) -> Tensor:
    return torch.randint(2, 97, (count, length), generator=torch.Generator().manual_seed(0))


def taught(path: Path, rows: Tensor) -> Teacher:
    """The model of a directory as a teacher of rows, its states as they are computed."""
    model = load_model(path)
    with torch.no_grad():
        states = final_hidden(model, rows) if len(rows) else torch.zeros(0)
    return Teacher(states, head_of(model))


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A llama of another width with the same vocabulary."""
    return write_tiny(tmp_path / "narrow", LLAMA | {"hidden_size": 32, "num_hidden_layers": 2}, 1)


def test_a_student_equal_to_its_teacher_stays_put(tiny: Path) -> None:
    student = load_model(tiny)
    curve = distill(taught(tiny, tokens()), student, tokens(), SETTINGS, progress=quiet)
    assert max(point.loss for point in curve) < 1e-6
    for name, weight in load_model(tiny).state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], weight, atol=2e-3, rtol=0)


def test_fifty_steps_bring_a_narrower_student_closer(tiny_llama: Path, narrow: Path) -> None:
    teacher, student = taught(tiny_llama, tokens()), load_model(narrow)
    settings = DistillSettings(tokens=50 * 64, batch_tokens=64, learning_rate=3e-3)
    curve = distill(teacher, student, tokens(), settings, progress=quiet)
    assert len(curve) == 50
    assert curve[-1].tokens == 3200
    assert curve[-1].loss < 0.7 * curve[0].loss
    assert torch.equal(teacher.head.weight, load_model(tiny_llama).lm_head.weight)
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert not student.training


@pytest.mark.parametrize("memory", [None, 0])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    tmp_path: Path, tiny_llama: Path, narrow: Path, memory: int | None
) -> None:
    # Without memory every layer is computed again in the backward pass.
    asked = taught(tiny_llama, tokens()), tokens(), SETTINGS, Placement(memory=memory)
    teacher, *more = asked
    whole, resumed = load_model(narrow), load_model(narrow)
    curve = distill(teacher, whole, *more, progress=quiet)
    with pytest.raises(Interrupted):
        distill(teacher, load_model(narrow), *more, tmp_path / "d", stop_at_three)
    assert distill(teacher, resumed, *more, tmp_path / "d", quiet) == curve
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_bf16_are_near_those_in_fp32(tiny: Path, dtype: torch.dtype) -> None:
    curves = []
    for place in (Placement(), Placement(dtype=torch.bfloat16, memory=0)):
        student = load_model(tiny, torch.float32 if place.memory is None else dtype)
        torch.nn.init.normal_(
            student.lm_head.weight, std=0.2, generator=torch.Generator().manual_seed(1)
        )
        curve = distill(taught(tiny, tokens()), student, tokens(), SETTINGS, place, progress=quiet)
        curves.append([point.loss for point in curve])
    assert curves[1] == pytest.approx(curves[0], rel=0.03)


def test_computing_layers_again_changes_nothing(tiny: Path) -> None:
    trained = []
    for memory in (None, 0):
        student = load_model(tiny)
        torch.nn.init.normal_(
            student.lm_head.weight, std=0.2, generator=torch.Generator().manual_seed(1)
        )
        place = Placement(memory=memory)
        curve = distill(taught(tiny, tokens()), student, tokens(), SETTINGS, place, progress=quiet)
        trained.append((curve, student.state_dict()))
        assert not student.is_activation_checkpointing
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(w, trained[1][1][name]) for name, w in trained[0][1].items())


def test_nor_does_it_where_layers_differ_and_blocks_are_gone(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    keep = {"blocks": torch.tensor([0, 1, 3, 4]), "layers.0.ffn/ffn": torch.arange(48)}
    cut = candidate(checkpoint.architecture, keep)
    trained = []
    for memory in (None, 0):
        config = student_config(checkpoint.config, cut.architecture)
        student = build_model(config, cut.architecture, student_tensors(checkpoint, cut))
        asked = tokens(), SETTINGS, Placement(memory=memory)
        curve = distill(taught(tiny_llama, tokens()), student, *asked, progress=quiet)
        trained.append((curve, student.state_dict()))
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(w, trained[1][1][name]) for name, w in trained[0][1].items())


@pytest.mark.parametrize("memory", [None, 0])
def test_stored_states_are_the_live_ones_rounded(
    tmp_path: Path, tiny: Path, memory: int | None
) -> None:
    rows, live = tokens(7), taught(tiny, tokens(7)).states
    seen: list[int] = []
    stack = stack_of(open_checkpoint(tiny), Placement(memory=memory))
    stored = stored_states(stack, rows, tmp_path / "states.safetensors", seen.append)
    index = torch.tensor([6, 0, 3])
    assert isinstance(live, Tensor)
    assert torch.equal(stored[index], live[index].to(torch.bfloat16))
    assert sum(seen) == 7
    # Another one finds them.
    stored_states(stack, rows, tmp_path / "states.safetensors", seen.append)
    assert sum(seen) == 7


def test_the_kl_of_stored_states_is_the_live_one(tmp_path: Path, tiny: Path) -> None:
    stack = stack_of(open_checkpoint(tiny))
    stored = stored_states(stack, tokens(), tmp_path / "states.safetensors")
    student, index = load_model(tiny), torch.arange(20)
    torch.nn.init.normal_(
        student.lm_head.weight, std=0.2, generator=torch.Generator().manual_seed(1)
    )
    live = taught(tiny, tokens())
    found, expected = (
        Lesson(student, teacher.head, Placement(), numerics_of(None, False, Placement()))(
            tokens(), teacher.states[index]
        ).item()
        for teacher in (Teacher(stored, live.head), live)
    )
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_of_other_text_is_not_continued(
    tmp_path: Path, tiny_llama: Path, narrow: Path
) -> None:
    place, other = Placement(), tokens(21)
    teacher, another = taught(tiny_llama, tokens()), taught(tiny_llama, other)
    distill(teacher, load_model(narrow), tokens(), SETTINGS, place, tmp_path, quiet)
    fresh = distill(another, load_model(narrow), other, SETTINGS, progress=quiet)
    found = distill(another, load_model(narrow), other, SETTINGS, place, tmp_path, quiet)
    assert found == fresh


def test_checkpoints_wait_for_their_time(tmp_path: Path, tiny_llama: Path, narrow: Path) -> None:
    teacher = taught(tiny_llama, tokens())
    seldom = dataclasses.replace(SETTINGS, checkpoint_seconds=1e6)
    with pytest.raises(Interrupted):
        distill(teacher, load_model(narrow), tokens(), seldom, Placement(), tmp_path, stop_at_three)
    assert not list(tmp_path.glob("training*"))
    # One that is there is continued whenever checkpoints are due.
    with pytest.raises(Interrupted):
        distill(
            teacher, load_model(narrow), tokens(), SETTINGS, Placement(), tmp_path, stop_at_three
        )
    seen: list[int] = []
    distill(
        teacher, load_model(narrow), tokens(), seldom, Placement(), tmp_path,
        lambda done, steps, figures: seen.append(done),
    )  # fmt: skip
    assert seen == [4, 5]


def test_different_vocabularies_and_no_text_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    teacher = taught(tiny_llama, tokens())
    other = load_model(write_tiny(tmp_path / "other", LLAMA | {"vocab_size": 112}))
    with pytest.raises(InputError, match=r"128.*112"):
        distill(teacher, other, tokens(), SETTINGS)
    with pytest.raises(InputError, match="rows of tokens"):
        distill(teacher, load_model(tiny_llama), tokens(0), SETTINGS)


def test_a_batch_in_parts_is_the_whole_batch(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(5))
    settings = DistillSettings(tokens=128, batch_tokens=128, learning_rate=1e-3)
    trained = []
    for micro in (128, 32):
        monkeypatch.setattr("compress.train.distill.MICRO_TOKENS", micro)
        student = load_model(tiny_llama)
        torch.nn.init.normal_(
            student.lm_head.weight, std=0.2, generator=torch.Generator().manual_seed(1)
        )
        curve = distill(taught(tiny_llama, rows), student, rows, settings, progress=quiet)
        trained.append((curve[-1].loss, student.model.norm.weight.detach().clone()))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-5)
    torch.testing.assert_close(trained[0][1], trained[1][1], rtol=1e-4, atol=1e-6)
