"""The door to Transformer Engine: fused FP8 and NVFP4 products on CUDA devices that have units.

Not measured on any device yet. What it computes is meant to be the reference's, to the rounding of
its sums; engines keep a state for every layer, which is none of a checkpoint's.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.core.errors import InputError
from compress.train.recipes import Precision

PACKAGE = "transformer_engine"
# What the package calls the recipes, with what differs from its defaults.
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8-hybrid": ("Float8CurrentScaling", {}),
    "fp8-block": ("Float8BlockScaling", {}),
    "nvfp4": ("NVFP4BlockScaling", {}),
}


def require(precision: Precision, device: torch.device) -> None:
    """InputError where a device lacks the units of a recipe, or the package is not installed."""
    asked = f"precision {precision.name}"
    assert precision.capability
    needed = ".".join(map(str, precision.capability))
    emulate = "--emulate computes the same numbers slowly"
    if device.type != "cuda":
        raise InputError(
            f"{asked} needs a CUDA device of compute capability {needed}, and the work is on "
            f"{device.type}; {emulate}"
        )
    if (found := torch.cuda.get_device_capability(device)) < precision.capability:
        has = ".".join(map(str, found))
        raise InputError(
            f"{asked} needs compute capability {needed}, this device has {has}; {emulate}"
        )
    package()


def package() -> tuple[Any, Any]:
    """The package's modules of layers and of recipes; InputError where it is not installed."""
    try:
        layers = importlib.import_module(f"{PACKAGE}.pytorch")
        return layers, importlib.import_module(f"{PACKAGE}.common.recipe")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != PACKAGE:
            raise
        raise InputError(
            "this precision needs Transformer Engine: pip install 'compress-workbench[gpu]'; "
            "--emulate computes the same numbers slowly"
        ) from error


@contextmanager
def linears(
    model: nn.Module, chosen: Mapping[str, nn.Module], precision: Precision,
    plain: Callable[[], bool],
) -> Iterator[None]:  # fmt: skip
    """A model with the engine's layers in the place of its own, whose weights they share.

    While ``plain`` they compute in BF16, forward and (unlike the reference) backward. InputError
    on routed experts, which no layer of the engine stands for here.
    """
    layers, recipes = package()
    name, settings = NAMES[precision.name]
    recipe = getattr(recipes, name)(**settings)
    if others := [path for path, module in chosen.items() if not isinstance(module, nn.Linear)]:
        raise InputError(
            f"{others[0]} holds routed experts, which precision {precision.name} computes only "
            "with --emulate"
        )
    for path, module in chosen.items():
        put(model, path, fused(layers, recipe, module, plain))
    try:
        yield
    finally:
        for path, module in chosen.items():
            put(model, path, module)


def fused(layers: Any, recipe: Any, linear: Any, plain: Callable[[], bool]) -> nn.Module:
    """A layer of the engine with the weight and bias of ours."""
    found = layers.Linear(
        linear.in_features, linear.out_features, bias=linear.bias is not None,
        params_dtype=linear.weight.dtype, device="meta",
    )  # fmt: skip
    found.weight = linear.weight
    if linear.bias is not None:
        found.bias = linear.bias
    kind = type(found)

    def forward(self: nn.Module, x: torch.Tensor) -> Any:
        with layers.fp8_autocast(enabled=not plain(), fp8_recipe=recipe):
            return kind.forward(self, x)

    found.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    # What it keeps of scales is none of a checkpoint's.
    found.register_state_dict_post_hook(without_state)
    module: nn.Module = found
    return module


def without_state(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    """Take what an engine keeps of its scales out of a state dict."""
    state.pop(f"{prefix}_extra_state", None)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Make a module another one's part."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
