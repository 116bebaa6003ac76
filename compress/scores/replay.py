"""Exact costs of single decisions: the teacher and all that differ from it, in sweeps.

A variant is the teacher up to the first layer that it changes, and is carried through the rest.
Sequences are added until a variant's mean is known well enough.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.files import read_json, write_json
from compress.measure.losses import kl_of_many
from compress.model.architecture import block_name
from compress.model.modules import mixers_of
from compress.scores.contributions import Progress
from compress.student.masks import masked
from compress.sweep.stack import Stack

# What an option keeps of its block by axis; None when the block goes.
Keep = Mapping[str, Tensor] | None
# Sequences of a sweep; after each one a variant may be known well enough.
CHUNK = 4


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a mean is known well enough: its standard error is below either bound.

    ``absolute`` is in nats per token, ``relative`` a share of the mean; never before ``least``
    sequences, of which one standard deviation can be told.
    """

    absolute: float = 0.0
    relative: float = 0.0
    least: int = 4

    def reached(self, kl: Tensor) -> bool:
        """Whether the sequences' KLs [n] are enough."""
        if len(kl) < max(self.least, 2):
            return False
        error = float(kl.std()) / math.sqrt(len(kl))
        return error <= max(self.absolute, self.relative * float(kl.mean()))


NEVER = Stop(least=2**31)


@dataclass(frozen=True)
class Variant:
    """A teacher with layers changed, each as it is while its change is open in the layer's visit.

    It is the teacher up to the first of ``changes``, by layer number.
    """

    changes: Mapping[int, Callable[[], AbstractContextManager[object]]]


def variant(stack: Stack, number: int, keep: Keep) -> Variant:
    """The teacher with one block's option as a mask, or without the block."""
    block = stack.architecture.blocks[number]
    if keep is None:
        return Variant({block.layer: partial(without, mixers_of(stack.model, block))})
    own = {f"{block_name(block)}/{axis}": index for axis, index in keep.items()}
    return Variant({block.layer: partial(masked, stack, block.layer, own)})


@contextmanager
def without(mixers: Sequence[nn.Module]) -> Iterator[None]:
    """Mixers that add nothing to the residual stream."""

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        # Attention also returns its weights, which nobody reads.
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    with ExitStack() as hooks:
        for mixer in mixers:
            hooks.callback(mixer.register_forward_hook(nothing).remove)
        yield


def removal_costs(
    stack: Stack,
    tokens: Tensor,
    stop: Stop = NEVER,
    progress: Progress = lambda done, total: None,
    known: Path | None = None,
) -> dict[str, float]:
    """Exact KL of removing each block of the teacher alone by its name, nats per token.

    Arguments are those of ``replayed``.
    """
    blocks = stack.architecture.blocks
    variants = {block_name(b): variant(stack, number, None) for number, b in enumerate(blocks)}
    found = replayed(stack, tokens, variants, stop, progress, known)
    return {name: float(kl.mean()) for name, kl in found.items()}


@torch.no_grad()
def replayed(
    stack: Stack,
    tokens: Tensor,
    variants: Mapping[str, Variant],
    stop: Stop = NEVER,
    progress: Progress = lambda done, total: None,
    known: Path | None = None,
) -> dict[str, Tensor]:
    """KL(teacher || variant) [sequences run] of variants by name, fp32, nats per token.

    One that ``stop`` never settles is run on all ``tokens`` [sequences, T]. ``progress`` is called
    with the work done and in total; ``known`` is a JSON file of what every sweep found, so that a
    killed replay continues there.
    """
    before = read_json(known) if known is not None and known.is_file() else {}
    found = {name: torch.tensor(before.get(name, [])) for name in variants}
    total = len(variants) * len(tokens)

    def settled(name: str) -> bool:
        return len(found[name]) == len(tokens) or stop.reached(found[name])

    def passed(extra: int = 0) -> None:
        done = sum(len(tokens) if settled(name) else len(kl) for name, kl in found.items())
        progress(done * stack.layers + extra, total * stack.layers)

    passed()
    for number, rows in enumerate(torch.split(tokens, CHUNK)):
        left = [n for n, kl in found.items() if len(kl) == number * CHUNK and not settled(n)]
        most = in_flight(stack, rows)
        for start in range(0, len(left), most):
            chosen = {name: variants[name] for name in left[start : start + most]}
            for name, kl in sweep(stack, rows, chosen, passed).items():
                found[name] = torch.cat([found[name], kl])
            if known is not None:
                write_json(known, {name: kl.tolist() for name, kl in found.items()})
            passed()
    return found


def in_flight(stack: Stack, ids_BT: Tensor) -> int:
    """How many variants one sweep carries: their hidden states are a quarter of the memory."""
    place = stack.placement
    if place.memory is None:
        return 2**31
    one = ids_BT.numel() * stack.architecture.hidden * place.dtype.itemsize
    return max(1, place.memory // 4 // one)


def sweep(
    stack: Stack,
    ids_BT: Tensor,
    variants: Mapping[str, Variant],
    passed: Callable[[int], None] = lambda work: None,
) -> dict[str, Tensor]:
    """KL [B] of variants on a batch; ``passed`` is told layers times sequences of variants."""
    teacher, students = stack.embed(ids_BT), dict[str, Tensor]()
    for number, layer in stack.visits(range(stack.layers)):
        entering, teacher = teacher, stack.run(number, layer, teacher)
        for name, each in variants.items():
            if number in each.changes or name in students:
                with each.changes.get(number, nullcontext)():
                    students[name] = stack.run(number, layer, students.get(name, entering))
        passed((number + 1) * len(variants) * len(ids_BT))
    with stack.head() as head:
        finals = (stack.normed(hidden).flatten(0, 1) for hidden in students.values())
        kls = kl_of_many(finals, stack.normed(teacher).flatten(0, 1), head)
    means = (kl.view(ids_BT.shape).mean(1).float().cpu() for kl in kls)
    return dict(zip(students, means, strict=True))
