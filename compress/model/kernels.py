"""Fused kernels where tensors are on a GPU, transformers' own torch functions on a CPU.

transformers 5.23 takes what ``mamba-ssm`` and ``causal-conv1d`` offer wherever they can be
imported, and those fail on a CPU: here the device of what they are called with decides.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any

from compress.model.families import family_of


@cache
def modeling(model_type: str) -> ModuleType:
    """The module of a family in transformers, each of whose kernels chooses by device."""
    family = family_of(model_type)
    module = importlib.import_module(family.modules[0])
    for name in family.kernels:
        setattr(module, name, by_device(getattr(module, name)))
    return module


def by_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that is the torch function it stands for where its first tensor is on the CPU."""
    plain = inspect.unwrap(kernel)

    @wraps(kernel)
    def chosen(x: Any, *rest: Any, **named: Any) -> Any:
        return (plain if x.is_cpu else kernel)(x, *rest, **named)

    return chosen
