"""A device without hardware: shapes, types and devices of real runs, no values.

As a program it runs the functions of ``CASES`` on it and prints a JSON object: the errors by case.
Operands of two devices are refused as CUDA would, and so is what waits for a value of the device
(``item``, ``nonzero``). Not covered for that: routed experts, which are looped over by such values;
masks of Mamba's units and the checks that a result is finite, which count; the embedding of token
ids, which are on the CPU; the seed of labels; an optimizer's step. It is a
process of its own, because torch knows the device from then on.
"""

import itertools
import json
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_students import (
    CONFIGS,
    NAME,
    SHAPE,
    FakedCheckpoint,
    candidate_of,
    in_formats,
    masks_of,
    outside_formats,
    rows,
    stack_of,
    states,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from compress.formats.fake import shared
from compress.formats.table import FORMATS
from compress.measure.losses import kl_from_hidden, nll_from_hidden
from compress.measure.predictions import kl_gradient_to, kl_to, predictions
from compress.memory.budget import in_format
from compress.model.architecture import in_kv_format
from compress.model.build import set_kv_formats
from compress.model.families import parameters
from compress.model.layout import Parameter
from compress.model.modules import Head, mixers_of
from compress.scores.contributions import drawn
from compress.scores.gated import Gated
from compress.scores.gradients import gate_gradients
from compress.scores.ranking import activation_scores
from compress.scores.replay import sweep as replayed_sweep
from compress.scores.replay import variant
from compress.scores.taps import Taps
from compress.student.assemble import BlockStore
from compress.student.calibration import quantized
from compress.student.candidate import block_keep
from compress.student.grams import tapped
from compress.student.rounded import rounded
from compress.student.rounding import Inputs, round_group
from compress.sweep.stack import Stack
from compress.train.distill import Lesson, Teacher, recompute
from compress.train.local import block_error, watched
from compress.train.precision import numerics_of

DTYPES = ("float32", "bfloat16")


def sweep(stack: Stack) -> None:
    """Forward, through every layer, final norm and head."""
    hidden = states(stack)
    for number, layer in stack.visits(range(stack.layers)):
        hidden = stack.run(number, layer, hidden)
    with stack.head() as head:
        at_home(head.logits(stack.normed(hidden).flatten(0, 1)))


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


def contributions(stack: Stack) -> None:
    """Gates of the teacher and of a student, of units and of formats, and drawn labels."""
    keep, mixed = masks_of(stack.architecture), in_formats(stack.architecture, 1, "nvfp4", "fp8")
    for gated in (Gated(stack), Gated(stack, keep, {1: mixed})):
        taps = Taps(gated, draws=2, squares=True)

        def upstream(batch: int, hidden: Tensor, head: Head) -> list[Tensor]:
            return [torch.zeros_like(hidden)] * 2

        [found] = gate_gradients(gated, taps, [rows()], ["fp8", "nvfp4"], upstream)
        assert {each.device.type for each in found.values()} == {"cpu"}
    with stack.head() as head:
        probability = head.logits(states(stack)[0]).softmax(-1)
    at_home(drawn(probability, torch.rand(SHAPE[1], 3, dtype=torch.float64).to(NAME)))


def replay(stack: Stack) -> None:
    """Removals and masks of every block, carried through the layers."""
    blocks = stack.architecture.blocks
    variants = {f"-{n}": variant(stack, n, None) for n in range(len(blocks))}
    keep = masks_of(stack.architecture)
    for number, block in enumerate(blocks):
        if own := {k: i for k, i in block_keep(keep, block).items() if k != "hidden"}:
            variants[f"{number}"] = variant(stack, number, own)
    with torch.no_grad():
        found = replayed_sweep(stack, rows(), variants)
    assert {kl.device.type for kl in found.values()} == {"cpu"}


@torch.no_grad()
def measured(stack: Stack) -> None:
    """An assembled student against the teacher's predictions."""
    candidate = candidate_of(stack.architecture)
    teacher: Any = FakedCheckpoint(stack.architecture.family)
    with stack.head() as head:
        predicted = predictions(states(stack).flatten(0, 1), head)
    assert predicted is not None
    student = BlockStore(teacher, stack).student(candidate)
    width = candidate.architecture.hidden
    hidden = torch.zeros((*SHAPE, width), device=NAME, dtype=stack.placement.dtype)
    for number in range(student.layers):
        with student.layer(number) as layer:
            hidden = student.run(number, layer, hidden)
    with student.head() as head:
        normed = student.normed(hidden).flatten(0, 1)
        seen = predicted.channels(torch.zeros(width, dtype=torch.long))
        at_home(kl_to(seen, normed, head))
        at_home(kl_gradient_to(seen, normed, head)[1])


def rankings(stack: Stack) -> None:
    """Activations of every unit."""
    scores = activation_scores(stack, rows())
    assert {score.device.type for score in scores.values()} == {"cpu"}


@torch.no_grad()
def grams(stack: Stack) -> None:
    """Gram matrices of every layer, with a KV cache in FP8."""
    hidden = states(stack)
    set_kv_formats(stack.model, in_kv_format(stack.architecture, "fp8"))
    for number, layer in stack.visits(range(stack.layers)):
        with tapped(stack, number) as found:
            hidden = stack.run(number, layer, hidden)
        for gram in found.values():
            at_home(gram)


def local(stack: Stack) -> None:
    """The error of a student's block and its gradients."""
    student, hidden = stack_of(stack.architecture.family, torch.float32), states(stack)
    for block in stack.architecture.blocks:
        with stack.layer(block.layer) as layer, student.layer(block.layer):
            with watched(stack.model, block) as seen, torch.no_grad():
                stack.run(block.layer, layer, hidden)
            for mixer in mixers_of(student.model, block):
                mixer.requires_grad_(True)
            block_error(student, block, seen, None).backward()


@torch.no_grad()
def export(stack: Stack) -> None:
    """Weights rounded and packed, on text and to nearest."""

    def moved(parameter: Parameter) -> Tensor:
        return stack.read(parameter).to(NAME)

    architecture = in_format(stack.architecture, "nvfp4")
    give = rounded(moved, architecture)
    for parameter in parameters(architecture):
        at_home(give(parameter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.student.rounding.require_read", lambda gram: None)
        # Of the first block and beside the blocks; also what rounds what it reads.
        own = in_formats(stack.architecture, 0, "nvfp4_a4", "fp8_a8")
        first = replace(stack.architecture.blocks[0], formats=own)
        stack.architecture = replace(
            stack.architecture,
            blocks=(first, *stack.architecture.blocks[1:]),
            outside_formats=outside_formats(architecture),
        )
        for _, tensor in quantized(stack, moved, rows(), "scales"):
            at_home(tensor)
        # Column by column is slow here: few of them.
        few = torch.ones(4, 32, device=NAME)
        [found] = round_group([few], "nvfp4", [Inputs(lambda: few.T @ few, 4)])
        for tensor in (*found.stored, found.values):
            at_home(tensor)
    weight = torch.zeros(32, 128, device=NAME)
    for format in (row for name, row in FORMATS.items() if name != "bf16"):
        for tensor in format.numerics.pack(weight, *shared([weight], format.name)):
            at_home(tensor)


def distillation(stack: Stack) -> None:
    """A step's loss and gradients, with layers that are computed again and with ones that are not.

    The steps of the optimizer wait for the loss, and are not in it.
    """
    whole = replace(stack.placement, memory=None)
    student = stack_of(stack.architecture.family, whole.dtype, memory=None)
    for _ in student.visits(range(student.layers)):
        pass
    with student.head() as head:
        teacher = Teacher(states(stack).cpu(), head)
        student.model.requires_grad_(True)
        for again in (False, True):
            recompute(student.model, again)
            Lesson(student.model, teacher.head, whole, numerics_of(None, False, whole))(
                rows(), teacher.states
            ).backward()
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
    "contributions": contributions, "replay": replay, "measured": measured, "grams": grams,
    "rankings": rankings, "local": local, "export": export, "distillation": distillation,
}  # fmt: skip


def case_name(family: str, dtype: str, case: str) -> str:
    """How the result of a case is called."""
    return f"{family} {dtype} {case}"


def error_of(family: str, dtype: str, case: str) -> str:
    """What goes wrong in a case, with the places, the last of them last; empty if nothing does."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
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
