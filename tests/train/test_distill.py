"""A student equal to its teacher stays, another one comes closer, and a kill changes nothing."""

from pathlib import Path

import pytest
import torch
from tiny_models import LLAMA, write_tiny
from torch import Tensor

from compress.core.errors import InputError
from compress.model.build import load_model
from compress.train.distill import DistillSettings, distill

SETTINGS = DistillSettings(tokens=320, batch_tokens=64, learning_rate=1e-3, checkpoint_every=2)


class Interrupted(Exception):
    """Stands for a kill."""


def quiet(done: int, steps: int, figures: dict[str, float]) -> None:
    pass


def stop_at_three(done: int, steps: int, figures: dict[str, float]) -> None:
    if done == 3:
        raise Interrupted


def tokens(count: int = 20, length: int = 16) -> Tensor:
    return torch.randint(2, 97, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A llama of another width with the same vocabulary."""
    return write_tiny(tmp_path / "narrow", LLAMA | {"hidden_size": 32, "num_hidden_layers": 2}, 1)


def test_a_student_equal_to_its_teacher_stays_put(tiny: Path) -> None:
    teacher, student = load_model(tiny), load_model(tiny)
    curve = distill(teacher, student, tokens(), SETTINGS, progress=quiet)
    assert max(point.loss for point in curve) < 1e-6
    for name, weight in teacher.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], weight, atol=2e-3, rtol=0)


def test_fifty_steps_bring_a_narrower_student_closer(tiny_llama: Path, narrow: Path) -> None:
    teacher, student = load_model(tiny_llama), load_model(narrow)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    settings = DistillSettings(tokens=50 * 64, batch_tokens=64, learning_rate=3e-3)
    curve = distill(teacher, student, tokens(), settings, progress=quiet)
    assert len(curve) == 50
    assert curve[-1].tokens == 3200
    assert curve[-1].loss < 0.7 * curve[0].loss
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert not student.training


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    tmp_path: Path, tiny_llama: Path, narrow: Path
) -> None:
    teacher = load_model(tiny_llama)
    whole, resumed = load_model(narrow), load_model(narrow)
    curve = distill(teacher, whole, tokens(), SETTINGS, progress=quiet)
    with pytest.raises(Interrupted):
        distill(teacher, load_model(narrow), tokens(), SETTINGS, tmp_path / "d", stop_at_three)
    assert distill(teacher, resumed, tokens(), SETTINGS, tmp_path / "d", quiet) == curve
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_checkpoint_of_other_text_is_not_continued(
    tmp_path: Path, tiny_llama: Path, narrow: Path
) -> None:
    teacher = load_model(tiny_llama)
    distill(teacher, load_model(narrow), tokens(), SETTINGS, tmp_path, quiet)
    other = tokens(21)
    fresh = distill(teacher, load_model(narrow), other, SETTINGS, None, quiet)
    assert distill(teacher, load_model(narrow), other, SETTINGS, tmp_path, quiet) == fresh


def test_bf16_students_are_trained_in_fp32(tiny_llama: Path, narrow: Path) -> None:
    teacher = load_model(tiny_llama)
    student = load_model(narrow, torch.bfloat16)
    distill(teacher, student, tokens(), SETTINGS, progress=quiet)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_different_vocabularies_and_no_text_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    teacher = load_model(tiny_llama)
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
        teacher, student = load_model(tiny_llama), load_model(tiny_llama)
        torch.nn.init.normal_(
            student.lm_head.weight, std=0.2, generator=torch.Generator().manual_seed(1)
        )
        curve = distill(teacher, student, rows, settings, progress=lambda *_: None)
        trained.append((curve[-1].loss, student.model.norm.weight.detach().clone()))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-5)
    torch.testing.assert_close(trained[0][1], trained[1][1], rtol=1e-4, atol=1e-6)
