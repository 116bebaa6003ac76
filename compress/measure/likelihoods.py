"""Log-likelihoods of answers after their contexts, by sweeps over a model's layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.measure.losses import CHUNK, log_probabilities
from compress.model.modules import Head
from compress.sweep.stack import Stack, final_states

BATCH_TOKENS = 2048
# Inputs are padded to a multiple of so many tokens: masks and positions are made once a shape.
ROUND = 16
# Of a placement's memory, what hidden states of one sweep may take where layers come and go.
SHARE = 1 / 8

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """What the model reads, and the tokens that are to follow its last ones."""

    read: Tokens
    answer: Tokens


def asked(context: Sequence[int], answer: Sequence[int], window: int) -> Asked:
    """A context, cut from the left to what the window holds, and its answer."""
    return Asked(tuple([*context, *answer][-(window + 1) : -1]), tuple(answer))


@torch.no_grad()
def likelihoods(stack: Stack, requests: Sequence[Asked]) -> list[tuple[float, bool]]:
    """Log-likelihood in nats of every answer, and whether each of its tokens is the likeliest.

    Inputs that several answers share are read once. Where the layers do not stay in memory, as many
    batches as it holds are carried through each.
    """
    at: dict[Tokens, list[int]] = {}
    for number, request in enumerate(requests):
        at.setdefault(request.read, []).append(number)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for wave in waves(stack, list(in_batches(list(at)))):
        states = final_states(stack, [padded(batch) for batch in wave])
        with stack.head() as head:
            for batch, hidden_BTD in zip(wave, states, strict=True):
                numbers = [(row, number) for row, read in enumerate(batch) for number in at[read]]
                own = [(row, requests[number]) for row, number in numbers]
                for (_, number), value in zip(
                    numbers, answered(hidden_BTD, head, own), strict=True
                ):
                    found[number] = value
    return found


def in_batches(inputs: list[Tokens]) -> Iterator[list[Tokens]]:
    """Inputs of about one length together, the longest first."""
    inputs.sort(key=len, reverse=True)
    start = 0
    while start < len(inputs):
        count = max(1, BATCH_TOKENS // rounded_up(len(inputs[start])))
        yield inputs[start : start + count]
        start += count


def rounded_up(length: int) -> int:
    """A length as it is padded."""
    return -(-length // ROUND) * ROUND


def padded(batch: Sequence[Tokens]) -> Tensor:
    """Token ids [B, T] of inputs; what is behind an input's end changes nothing before it."""
    longest = rounded_up(len(batch[0]))
    return torch.tensor([[*read, *[0] * (longest - len(read))] for read in batch])


def waves(stack: Stack, batches: list[list[Tokens]]) -> Iterator[list[list[Tokens]]]:
    """The batches of each sweep."""
    place = stack.placement
    if place.memory is None or stack.stays.issuperset(stack.parts):
        yield from ([batch] for batch in batches)
        return
    batch_bytes = BATCH_TOKENS * stack.architecture.hidden * place.dtype.itemsize
    count = max(1, int(SHARE * place.memory) // batch_bytes)
    yield from (batches[at : at + count] for at in range(0, len(batches), count))


def answered(
    hidden_BTD: Tensor, head: Head, own: Sequence[tuple[int, Asked]]
) -> list[tuple[float, bool]]:
    """``likelihoods`` of answers from final hidden states; each is of a row of the batch."""
    rows = torch.tensor([row for row, request in own for _ in request.answer])
    places = torch.tensor(
        [
            place
            for _, request in own
            for place in range(len(request.read) - len(request.answer), len(request.read))
        ]
    )
    answers = torch.tensor([token for _, request in own for token in request.answer])
    device = hidden_BTD.device
    states_ND = hidden_BTD[rows.to(device), places.to(device)]
    values, likeliest = list[Tensor](), list[Tensor]()
    for states, tokens in zip(
        torch.split(states_ND, CHUNK), torch.split(answers, CHUNK), strict=True
    ):
        logs_NV = log_probabilities(states, head)
        tokens_N = tokens.to(device)
        values.append(logs_NV.gather(1, tokens_N[:, None])[:, 0].double().cpu())
        likeliest.append((logs_NV.argmax(1) == tokens_N).cpu())
    lengths = [len(request.answer) for _, request in own]
    sums = torch.split(torch.cat(values), lengths)
    exact = torch.split(torch.cat(likeliest), lengths)
    return [(float(v.sum()), bool(e.all())) for v, e in zip(sums, exact, strict=True)]
