"""What number formats of the embedding and of the head cost, measured."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.formats.fake import fake_quantize
from compress.formats.table import FORMATS, WEIGHT_ONLY, Format
from compress.measure.losses import kl_from_hidden
from compress.model.families import outside_groups
from compress.scores.contributions import Progress
from compress.student.rounded_teacher import RoundedTeacher
from compress.student.surgery import Cut
from compress.sweep.stack import Stack

# Sequences that go through a layer together.
BATCH = 4


@torch.no_grad()
def outside_costs(
    stack: Stack,
    tokens: Tensor,
    formats: Sequence[Format],
    progress: Progress = lambda done, total: None,
    teacher: RoundedTeacher | None = None,
) -> dict[str, float]:
    """KL of storing the embedding or the head alone in a format, by ``head/nvfp4``, nats per token.

    A tied embedding is both. One sweep over ``tokens`` [sequences, T] carries all embeddings along;
    a rounded one is there only while it is used. Rounded as in ``teacher``, or to nearest.
    """
    architecture, place = stack.architecture, stack.placement
    shape = architecture.vocab, architecture.hidden
    taken = [f for f in formats if f in WEIGHT_ONLY and FORMATS[f].takes(shape)]

    def rounded(group: str, format: Format) -> Tensor:
        each = stack.outside(group)
        table = stack.read(each).to(place.device).float()
        if teacher is None:
            return fake_quantize([table], format)[0].to(place.dtype)
        number, whole = len(architecture.blocks), Cut(each.name, each.name, each.slot, {})
        [found] = teacher.group(number, [whole], {each.name: table}, each.sizes, format)
        return found.to(place.dtype)

    batches = torch.split(tokens, BATCH)
    hidden = {"": [stack.embed(ids) for ids in batches]}
    for format in taken:
        table = rounded("embedding", format)
        hidden[f"embedding/{format}"] = [stack.embed(ids, table) for ids in batches]
    for number, layer in stack.visits(range(stack.layers)):
        for states in hidden.values():
            states[:] = [stack.run(number, layer, entering) for entering in states]
        progress(number + 1, stack.layers)
    with stack.head() as head:
        final = {
            name: torch.cat([stack.normed(each).flatten(0, 1) for each in states])
            for name, states in hidden.items()
        }

        def kl(name: str, weight: Tensor) -> float:
            own = replace(head, weight=weight)
            return float(kl_from_hidden(final[name], own, final[""], head).mean())

        costs = {}
        for group in outside_groups(architecture):
            for format in taken:
                both = group == "head" or architecture.tied
                weight = rounded(group, format) if both else head.weight
                name = "" if group == "head" else f"embedding/{format}"
                costs[f"{group}/{format}"] = kl(name, weight)
        return costs
