"""What number formats of the KV cache cost, measured."""

import torch
from torch import Tensor

from compress.formats.kv import set_kv_format
from compress.formats.table import KV_FORMATS, KvFormat
from compress.measure.losses import kl_of_many, require_finite
from compress.sweep.stack import Stack

BATCH = 4


@torch.no_grad()
def kv_costs(stack: Stack, tokens: Tensor) -> dict[str, float]:
    """KL(teacher || teacher with its cache in a format) on [sequences, T] by format.

    Nats per token; one sweep carries the teacher and every format. InputError where it is not
    finite.
    """
    batches = [stack.embed(rows) for rows in torch.split(tokens, BATCH)]
    states: dict[KvFormat, list[Tensor]] = {format: list(batches) for format in KV_FORMATS}
    try:
        for number, layer in stack.visits(range(stack.layers)):
            for format, hidden in states.items():
                set_kv_format(stack.model, format)
                for batch, entering in enumerate(hidden):
                    hidden[batch] = stack.run(number, layer, entering)
    finally:
        set_kv_format(stack.model, KV_FORMATS[0])
    kls: list[list[Tensor]] = []
    with stack.head() as head:
        for finals in zip(*states.values(), strict=True):
            teacher, *others = (stack.normed(hidden).flatten(0, 1) for hidden in finals)
            kls.append(kl_of_many(others, teacher, head))
    found = (torch.cat(parts) for parts in zip(*kls, strict=True))
    return {
        format: float(require_finite(kl, f"logits with a {format} KV cache").mean())
        for format, kl in zip(KV_FORMATS[1:], found, strict=True)
    }
