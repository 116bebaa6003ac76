"""AdamW, with what it keeps in fp32, in 8 bits, or on the CPU.

Bytes that a parameter takes where the model is, with its gradient:

=========  ===========================================================================  =====
adamw      fp32 weights, gradients and moments                                             16
adamw8bit  weights and gradients as the model has them, moments in 8 bits (torchao)      6-10
offload    weights and gradients as the model has them; fp32 weights and moments (12)     4-8
           are on the CPU
=========  ===========================================================================  =====

In a model of BF16 weights, ``adamw8bit`` rounds every update stochastically (its mean is exact).
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.sweep.placement import Placement
from compress.train.recipes import OptimizerName

BETAS = (0.9, 0.95)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# Of an offloaded parameter besides its moments.
MASTER = "master"


class Offloaded:
    """AdamW whose fp32 weights and moments are on the CPU, whatever the model is and where.

    Gradients go there at every step and rounded weights come back.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], **settings: Any) -> None:
        self.masters: dict[Tensor, Tensor] = {
            p: p.detach().to("cpu", torch.float32, copy=True) for g in groups for p in g["params"]
        }
        own = [{**g, "params": [self.masters[p] for p in g["params"]]} for g in groups]
        self.inner = torch.optim.AdamW(own, **settings)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """One update of masters and model."""
        for parameter, master in self.masters.items():
            if parameter.grad is not None:
                master.grad = parameter.grad.to("cpu", torch.float32)
                parameter.grad = None
        self.inner.step()
        self.inner.zero_grad()
        for parameter, master in self.masters.items():
            parameter.copy_(master)

    def zero_grad(self) -> None:
        """Let gradients go; after a step they are gone already."""
        for parameter in self.masters:
            parameter.grad = None


Optimizer = torch.optim.Optimizer | Offloaded


def require(name: OptimizerName, placement: Placement) -> None:
    """InputError where an optimizer cannot run on a placement, or its package is missing."""
    if name == "offload" and placement.device.type == "cpu":
        raise InputError(
            "optimizer offload keeps weights and moments on the CPU, where everything is: adamw "
            "is the same"
        )
    if name == "adamw8bit":
        torchao()


def torchao() -> Any:
    """The module with 8-bit optimizers; InputError where it is not installed."""
    try:
        return importlib.import_module("torchao.optim")
    except ImportError as error:
        raise InputError(
            f"optimizer adamw8bit needs torchao ({error}): pip install 'compress-workbench[optim]'"
        ) from error


def weights_dtype(name: OptimizerName, placement: Placement) -> torch.dtype:
    """The type of the weights that are trained: fp32 unless an optimizer does without."""
    return torch.float32 if name == "adamw" else placement.dtype


def bytes_of(name: OptimizerName, placement: Placement) -> int:
    """Bytes that a trained parameter takes on the placement, with all that trains it."""
    if name == "adamw":
        return 16
    return 2 * placement.dtype.itemsize + (2 if name == "adamw8bit" else 0)


def optimizer_of(
    model: nn.Module, name: OptimizerName, learning_rate: float, weight_decay: float
) -> Optimizer:
    """An optimizer that decays matrices only: norms, biases and Mamba's scalars are left alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "offload":
        return Offloaded(groups, lr=learning_rate, betas=BETAS)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS)
    settings = {"lr": learning_rate, "betas": BETAS, "bf16_stochastic_round": True}
    found: torch.optim.Optimizer = torchao().AdamW8bit(groups, **settings)
    return found


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Make the learning rate of every group another one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """All that an optimizer knows of a parameter, as plain tensors; empty before its first step."""
    if isinstance(optimizer, Offloaded):
        master = optimizer.masters[parameter]
        return state_of(optimizer.inner, master) | {MASTER: master}
    found: dict[str, Tensor] = {}
    state = optimizer.state.get(parameter) or {}
    for key in MOMENTS if state else ():
        value = state[key]
        if hasattr(value, "codes"):
            found |= {f"{key}.{part}": getattr(value, part) for part in ("codes", "scale")}
        else:
            found[key] = value
    return found


def restore(optimizer: Optimizer, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
    """Give an optimizer back what ``state_of`` said of a parameter."""
    if isinstance(optimizer, Offloaded):
        master = optimizer.masters[parameter]
        master.data.copy_(state[MASTER])
        restore(optimizer.inner, master, {k: v for k, v in state.items() if k != MASTER})
        return
    if not state:
        return
    own: dict[str, Any] = {"step": state["step"]}
    for key in MOMENTS[1:]:
        if key in state:
            # Moments are beside the parameter; the count of steps is on the CPU.
            own[key] = state[key].to(parameter.device)
        else:
            own[key] = quantized_moment(parameter, key, state)
    optimizer.state[parameter] = own


def quantized_moment(parameter: Tensor, key: str, state: Mapping[str, Tensor]) -> Tensor:
    """A moment in 8 bits of its codes and scales."""
    codes, scale = (state[f"{key}.{part}"] for part in ("codes", "scale"))
    kind = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    block = codes.numel() // scale.numel()
    own = {"device": parameter.device, "dtype": parameter.dtype}
    found: Tensor = kind.zeros(parameter.shape, key == "exp_avg", block, **own)
    for part, tensor in (("codes", codes), ("scale", scale)):
        getattr(found, part).copy_(tensor)
    return found
