"""A resumed training is the uninterrupted one."""

import dataclasses
import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.train.care import BAD_STEPS, EVENTS, is_spike
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

    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell began it in the background
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, progress=send)
    # The one that is asked for in a step ends with the next one.
    assert (tmp_path / "training-0000007.safetensors").is_file()
    assert signal.getsignal(signal.SIGINT) is before
    whole, resumed = fit(None)[0], fit(tmp_path)[0]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_step_that_is_not_finite_changes_nothing_and_a_run_of_them_ends(tmp_path: Path) -> None:
    model, _, _ = problem()
    weight, seen = next(model.parameters()), list[Tensor]()

    def loss_of(trained: nn.Module, step: int, bad: tuple[int, ...] = (2,)) -> Tensor:
        seen.append(weight.detach().clone())
        return weight.square().sum() * (float("nan") if step in bad else 1.0)

    curve = train(model, loss_of, SETTINGS, directory=tmp_path, progress=quiet)
    assert torch.equal(seen[3], seen[2])
    assert not torch.equal(seen[4], seen[3])
    assert [point.step for point in curve] == [1, 2, *range(4, 13)]
    events = map(json.loads, (tmp_path / EVENTS).read_text().splitlines())
    assert [(event["event"], event["step"]) for event in events] == [("skipped", 3)]
    bad = tuple(range(4, 4 + BAD_STEPS))
    with pytest.raises(InputError, match=r"nan at step 9 of 12"):
        train(model, partial(loss_of, bad=bad), SETTINGS, progress=quiet)


def test_a_loss_far_above_the_last_ones_is_a_spike() -> None:
    usual = [2.0 + 0.01 * (step % 3) for step in range(40)]
    assert is_spike([*usual, 3.0])
    assert not is_spike([*usual, 2.03])
    assert not is_spike([*usual[:5], 3.0])


@pytest.mark.parametrize("stop", [0, 7])
def test_where_validation_turns_the_best_weights_are_kept(tmp_path: Path, stop: int) -> None:
    validations = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.5}
    settings = dataclasses.replace(SETTINGS, validate_every=2, patience=2)
    weights = dict[int, Tensor]()

    def fitted(progress: Progress) -> tuple[nn.Module, list[CurvePoint]]:
        model, x, y = problem()
        done = list[int]()

        def loss_of(trained: nn.Module, step: int) -> Tensor:
            weights[step] = trained[0].weight.detach().clone()
            done[:] = [step + 1]
            return ((trained(x) - y) ** 2).mean()

        def validate(trained: nn.Module) -> dict[str, float]:
            return {"kl": validations[done[0]]}

        return model, train(
            model, loss_of, settings, directory=tmp_path, progress=progress, validate=validate
        )

    if stop:
        with pytest.raises(Interrupted):
            fitted(stop_at(stop))
    model, curve = fitted(quiet)
    assert curve[-1].step == 8
    assert torch.equal(model[0].weight, weights[4])
    # Asked again it is the same, at once.
    assert torch.equal(fitted(stop_at(1))[0][0].weight, weights[4])


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
