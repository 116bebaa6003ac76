"""An optimizer that saves memory is AdamW, resumes bit for bit, or is refused before anything."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.sweep.placement import Placement
from compress.train.loop import CurvePoint, TrainSettings, train
from compress.train.optimizers import optimizer_of, require, weights_dtype
from compress.train.recipes import OptimizerName

SETTINGS = TrainSettings(
    steps=6, batch_tokens=4, learning_rate=0.02, warmup=1, decay=2, weight_decay=0.1, seed=0
)
ON_GPU = Placement(torch.device("meta"), torch.bfloat16)


class Interrupted(Exception):
    """Stands for a kill."""


def fit(
    name: OptimizerName, dtype: torch.dtype, directory: Path | None = None, stop: int = 0
) -> tuple[nn.Module, list[CurvePoint]]:
    """A network trained for six steps; enough weights in a matrix for moments in 8 bits."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
    x = torch.randn(6, 30, 64).to(dtype)

    def loss_of(trained: nn.Module, step: int) -> Tensor:
        return (trained(x[step]).float() - x[step].float().sum(-1, keepdim=True)).square().mean()

    def stopped(done: int, steps: int, figures: dict[str, float]) -> None:
        if done == stop:
            raise Interrupted

    settings = dataclasses.replace(SETTINGS, optimizer=name)
    return model, train(model, loss_of, settings, directory=directory, progress=stopped)


def test_offloaded_is_adamw() -> None:
    (plain, curve), (offloaded, same) = (fit(name, torch.float32) for name in ("adamw", "offload"))
    assert curve == same
    for one, two in zip(plain.parameters(), offloaded.parameters(), strict=True):
        assert torch.equal(one, two)


def test_offloaded_weights_in_bf16_do_not_lose_small_steps() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = optimizer_of(nn.ParameterList([weight]), "offload", 1e-4, 0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.item() == pytest.approx(0.99, abs=0.004)


@pytest.mark.parametrize("name", ["adamw", "offload", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    tmp_path: Path, name: OptimizerName, dtype: torch.dtype
) -> None:
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        whole, curve = fit(name, dtype)
        with pytest.raises(Interrupted):
            fit(name, dtype, tmp_path, stop=3)
        resumed, same = fit(name, dtype, tmp_path)
    assert same == curve
    assert curve[-1].loss < curve[0].loss
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require("adamw", Placement())
    require("offload", ON_GPU)
    with pytest.raises(InputError, match="offload keeps weights and moments on the CPU"):
        require("offload", Placement())
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(InputError, match=r"adamw8bit needs torchao.*\[optim\]"):
        require("adamw8bit", Placement())


def test_only_optimizers_that_know_how_train_bf16_weights() -> None:
    assert weights_dtype("adamw", ON_GPU) == torch.float32
    assert weights_dtype("offload", ON_GPU) == torch.bfloat16
    assert weights_dtype("adamw8bit", Placement()) == torch.float32
