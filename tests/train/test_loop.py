"""A resumed training is the uninterrupted one."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.train.checkpoints import KEPT, forget
from compress.train.loop import CurvePoint, Progress, TrainSettings, batch_at, rate_at, train

SETTINGS = TrainSettings(
    steps=12, batch_tokens=4, learning_rate=0.05, warmup=3, decay=4, weight_decay=0.1, seed=0,
    checkpoint_every=5,
)  # fmt: skip


Fitted = tuple[dict[str, Tensor], list[CurvePoint]]


class Interrupted(Exception):
    """Stands for a kill: nothing after it runs."""


def stop_at(step: int) -> Progress:
    def progress(done: int, steps: int, figures: dict[str, float]) -> None:
        if done == step:
            raise Interrupted

    return progress


def quiet(done: int, steps: int, figures: dict[str, float]) -> None:
    pass


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    model.register_buffer("counted", torch.zeros(()))
    x = torch.randn(30, 6)
    return model, x, x.sum(-1, keepdim=True)


def fit(
    directory: Path | None, settings: TrainSettings = SETTINGS, stop: int = 0,
    progress: Progress = quiet,
) -> Fitted:  # fmt: skip
    model, x, y = problem()

    def loss_of(trained: nn.Module, step: int) -> Tensor:
        picked = batch_at(torch.arange(30).view(30, 1), step, 4, settings.seed).flatten()
        return ((trained(x[picked]) - y[picked]) ** 2).mean()

    def count(trained: nn.Module, step: int) -> None:
        trained.get_buffer("counted").add_(1)

    progress = stop_at(stop) if stop else progress
    curve = train(
        model, loss_of, settings, directory=directory, progress=progress, after_step=count
    )
    return model.state_dict(), curve


@pytest.mark.parametrize("stop", [3, 5, 8, 12])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole, whole_curve = fit(None)
    with pytest.raises(Interrupted):
        fit(tmp_path, stop=stop)
    resumed, curve = fit(tmp_path)
    assert curve == whole_curve
    assert [point.step for point in curve] == list(range(1, 13))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_finished_training_is_not_redone_and_other_settings_start_over(tmp_path: Path) -> None:
    finished, curve = fit(tmp_path)
    again, same = fit(tmp_path, stop=1)
    assert same == curve
    assert all(torch.equal(finished[name], again[name]) for name in finished)
    other = dataclasses.replace(SETTINGS, learning_rate=0.01)
    assert fit(tmp_path, other)[1] == fit(None, other)[1]


def test_a_checkpoint_of_another_model_is_not_continued(tmp_path: Path) -> None:
    fit(tmp_path)
    wider = nn.Linear(6, 7)
    curve = train(
        wider, lambda model, step: wider.weight.square().sum(), SETTINGS, directory=tmp_path,
        progress=quiet,
    )  # fmt: skip
    assert len(curve) == SETTINGS.steps
    assert curve[0].loss > curve[-1].loss


def test_the_last_checkpoints_stay_and_the_curve_survives_them(tmp_path: Path) -> None:
    _, curve = fit(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("training-*"))] == [
        "training-0000010.safetensors", "training-0000012.safetensors"
    ][-KEPT:]  # fmt: skip
    lines = (tmp_path / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dataclasses.asdict(point) for point in curve]
    forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.jsonl"]


def test_a_truncated_checkpoint_falls_back_to_the_one_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, whole_curve = fit(tmp_path)
    newest, before = sorted(tmp_path.glob("training-*"), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-8])
    resumed, curve = fit(tmp_path)
    assert "is broken" in capsys.readouterr().err
    assert curve == whole_curve
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    for file in (newest, before):
        file.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"is broken .* there is no other"):
        fit(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_its_step(tmp_path: Path, number: signal.Signals) -> None:
    def send(done: int, steps: int, figures: dict[str, float]) -> None:
        if done == 6:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, progress=send)
    # The one that is asked for in a step ends with the next one.
    assert (tmp_path / "training-0000007.safetensors").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    whole, resumed = fit(None)[0], fit(tmp_path)[0]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    model, _, _ = problem()
    weight = next(model.parameters())

    def loss_of(trained: nn.Module, step: int) -> Tensor:
        return weight.sum() * (float("nan") if step == 2 else 1.0)

    with pytest.raises(InputError, match=r"nan at step 3 of 12"):
        train(model, loss_of, SETTINGS, progress=quiet)


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [rate_at(step, SETTINGS) / SETTINGS.learning_rate for step in range(12)]
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates == pytest.approx(expected)


def test_an_epoch_has_every_row_once_and_every_epoch_its_order() -> None:
    rows = torch.arange(20).view(10, 2)
    epochs = [
        torch.cat([batch_at(rows, step, 4, seed=1) for step in range(first, first + 5)])
        for first in (0, 5)
    ]
    for seen in epochs:
        assert sorted(seen[:, 0].tolist()) == sorted([*range(0, 20, 2)] * 2)
        assert torch.equal(seen[:, 1], seen[:, 0] + 1)
    assert not torch.equal(epochs[0], epochs[1])
    shifted = torch.cat([batch_at(rows, step, 5, seed=1, shift=True) for step in range(2)])
    assert sorted(shifted.flatten().tolist()) == list(range(20))
