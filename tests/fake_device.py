"""A device without hardware: shapes, types and devices of real runs, no values.

As a program it runs the functions of ``CASES`` on it and prints a JSON object: the errors by case.
Operands of two devices are refused as CUDA would, and so is what waits for a value of the device
(``item``, ``nonzero``): routed experts are looped over by such values and are left out here.
It is a process of its own, because torch knows the device from then on.
"""

import itertools
import json
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import HYBRID, LLAMA
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from compress.measure.losses import kl_from_hidden, nll_from_hidden
from compress.model.families import parameters, read_architecture
from compress.model.layout import Parameter
from compress.sweep.placement import Placement
from compress.sweep.stack import Stack
from compress.train.distill import Teacher, kl, recompute

# "linear_attention", "full_attention", "mlp": all kinds but the routed experts.
KINDS = ["linear_attention", "full_attention", "mlp", "linear_attention"]
CONFIGS = {"llama": LLAMA, "nemotron_h": HYBRID | {"layers_block_type": KINDS}}
NAME = "gpu"
DTYPES = ("float32", "bfloat16")
SHAPE = (2, 16)


def stack_of(family: str, dtype: torch.dtype) -> Stack:
    """A stack on the device, streamed, of tensors as a checkpoint has them: on the CPU."""
    architecture = read_architecture(CONFIGS[family])
    # Made here: the thread that reads ahead is not in the mode.
    tensors = {
        each.name: torch.empty(
            each.shape, dtype=torch.float32 if each.slot.float32 else torch.bfloat16
        )
        for each in parameters(architecture)
    }

    def read(parameter: Parameter) -> Tensor:
        return tensors[parameter.name]

    place = Placement(torch.device(NAME), dtype, memory=0)
    return Stack(CONFIGS[family], architecture, read, place)


def states(stack: Stack) -> Tensor:
    """Hidden states as ``embed`` would give them; it asks for the values of ids on the CPU."""
    shape = (*SHAPE, stack.architecture.hidden)
    return torch.zeros(shape, device=stack.placement.device, dtype=stack.placement.dtype)


def sweep(stack: Stack) -> None:
    """Forward, through every layer, final norm and head."""
    hidden = states(stack)
    for number, layer in stack.visits(range(stack.layers)):
        hidden = stack.run(number, layer, hidden)
    with stack.head() as head:
        at_home(head.logits(stack.normed(hidden)))


def backward(stack: Stack) -> None:
    """Back through every layer, computed again from its input, with a hook on its mixer."""
    inputs = [states(stack).requires_grad_() for _ in range(stack.layers)]
    gradient = states(stack)
    for number, layer in stack.visits(range(stack.layers)[::-1]):
        handle = layer.register_forward_hook(lambda module, args, output: output * 1.0)
        stack.run(number, layer, inputs[number]).backward(gradient)
        handle.remove()
        found = inputs[number].grad
        assert found is not None
        gradient = found
    at_home(gradient)


def losses(stack: Stack) -> None:
    """KL and NLL from hidden states, and their gradients."""
    hidden = states(stack).flatten(0, 1).requires_grad_()
    targets = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    with stack.head() as head:
        loss = kl_from_hidden(hidden, head, hidden, head, chunk=8).mean()
        (loss + nll_from_hidden(hidden, head, targets, chunk=8).mean()).backward()
    assert hidden.grad is not None
    at_home(hidden.grad)


def distillation(stack: Stack) -> None:
    """A step's loss and gradients, with layers that are computed again and with ones that are not.

    The steps of the optimizer wait for the loss, and are not in it.
    """
    whole = replace(stack.placement, memory=None)
    student = Stack(CONFIGS[stack.architecture.family], stack.architecture, stack.read, whole)
    for _ in student.visits(range(student.layers)):
        pass
    with student.head() as head:
        rows = torch.zeros(SHAPE, dtype=torch.long)
        teacher = Teacher(states(stack).cpu(), head)
        student.model.requires_grad_(True)
        for again in (False, True):
            recompute(student.model, again)
            kl(teacher, student.model, torch.arange(len(rows)), rows, whole).backward()
    for parameter in student.model.parameters():
        at_home(parameter.grad)


def mixed(stack: Stack) -> None:
    """What has to fail."""
    hidden = states(stack)
    with pytest.raises(RuntimeError, match="two devices"):
        hidden + torch.zeros(hidden.shape)


def at_home(tensor: Tensor) -> None:
    """What is on the device."""
    assert tensor.device.type == NAME, tensor.device


CASES: dict[str, Callable[[Stack], None]] = {
    "mixed": mixed, "sweep": sweep, "backward": backward, "losses": losses,
    "distillation": distillation,
}  # fmt: skip


def case_name(family: str, dtype: str, case: str) -> str:
    """How the result of a case is called."""
    return f"{family} {dtype} {case}"


def error_of(family: str, dtype: str, case: str) -> str:
    """What goes wrong in a case, with the places, the last of them last; empty if nothing does."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=False):
            CASES[case](stack_of(family, getattr(torch, dtype)))
    except Exception:
        return traceback.format_exc(limit=-12)
    return ""


def main() -> None:
    """Run every case, for both families and both number types of placements."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    module: Any = torch.get_device_module(NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    # Autocast is taken and casts nothing.
    autocast: Any = torch.library.Library("_", "IMPL")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    asked = itertools.product(CONFIGS, DTYPES, CASES)
    print(json.dumps({case_name(*each): error_of(*each) for each in asked}))


if __name__ == "__main__":
    main()
