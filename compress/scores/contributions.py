"""The contribution matrix of a teacher: one sweep forward, and one back with all label draws."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from compress.formats.table import Format
from compress.measure.losses import require_finite
from compress.model.modules import Head
from compress.model.tensor_files import save_tensors
from compress.scores.gated import Gated
from compress.scores.gradients import gate_gradients
from compress.scores.taps import SQUARES, Taps
from compress.student.rounded_teacher import RoundedTeacher
from compress.sweep.stack import Stack

Contributions = Mapping[str, Tensor]
Progress = Callable[[int, int], None]
# What the inputs of all layers may take of the placement's memory.
INPUTS_SHARE = 0.25
# Labels are found in a block of the vocabulary, then inside it.
BLOCK = 256


def contributions(
    stack: Stack,
    tokens: Tensor,
    draws: int,
    formats: Sequence[Format],
    seed: int = 0,
    batch: int = 8,
    progress: Progress = lambda done, total: None,
    directory: Path | None = None,
    rounded: RoundedTeacher | None = None,
) -> dict[str, Tensor]:
    """The contribution matrix [sequences * draws, *units] of every gate, fp32, on the CPU.

    Squares (``taps.SQUARES``) are sums over all rows, [1, *units]. Activations and gradients are in
    the placement's number type, sums over tokens in fp32: BF16 moves the rows of a gradient by 5 %
    of their norm, 16 % at most (SmolLM2-135M and the embedded teacher).

    Args:
        stack: the teacher.
        tokens: [sequences, T] token ids.
        draws: label draws per sequence; labels depend on the seed and the sequence's own tokens, so
            neither batches, their order nor the device matter.
        formats: formats to score besides the units.
        seed: of the labels.
        batch: sequences that a layer runs on at a time.
        progress: called with layers done and in total, counted in every wave.
        directory: keeps every finished wave, and how far the current one is, so that a killed
            scoring continues there.
        rounded: what formats leave is as this says; None: as rounding to nearest does.
    """
    batches = torch.split(tokens, batch)
    together = wave_batches(stack, batches[0], draws)
    waves = [batches[start : start + together] for start in range(0, len(batches), together)]
    layers = stack.layers + 1
    collected: dict[str, list[Tensor]] = {}
    for number, wave in enumerate(waves):

        def advance(done: int, _: int, before: int = number * layers) -> None:
            progress(before + done, len(waves) * layers)

        # Another memory makes other waves.
        name = f"{number * together * batch:06}-{sum(map(len, wave)):06}.safetensors"
        part = directory / name if directory else None
        if part is not None and part.is_file():
            found = load_file(part)
            advance(layers, layers)
        else:
            saved = part.with_suffix(".unfinished") if part else None
            gated = Gated(stack, rounded=rounded)
            found = wave_rows(gated, wave, draws, formats, seed, advance, saved)
            if part and saved:
                save_tensors(found, part)
                saved.unlink(missing_ok=True)
        for key, value in found.items():
            collected.setdefault(key, []).append(value)
    joined = ((key, torch.cat(values)) for key, values in collected.items())
    return {k: rows.sum(0, keepdim=True) if k.endswith(SQUARES) else rows for k, rows in joined}


def wave_batches(stack: Stack, batch_BT: Tensor, draws: int) -> int:
    """How many batches go through the layers together: as many as the layers' inputs fit."""
    place = stack.placement
    if place.memory is None:
        return 2**31
    states = stack.layers + 1 + draws
    held = states * batch_BT.numel() * stack.architecture.hidden * place.dtype.itemsize
    return max(1, int(INPUTS_SHARE * place.memory) // held)


def wave_rows(
    gated: Gated,
    batches: Sequence[Tensor],
    draws: int,
    formats: Sequence[Format],
    seed: int,
    progress: Progress,
    saved: Path | None,
) -> dict[str, Tensor]:
    """Rows [sequences * draws, *units] of one wave; squares are a row for each batch."""

    def upstream(batch: int, hidden: Tensor, head: Head) -> Iterator[Tensor]:
        return label_gradients(hidden, head, batches[batch], draws, seed)

    taps = Taps(gated, draws, squares=True)
    found = gate_gradients(gated, taps, batches, formats, upstream, progress, saved)

    def joined(key: str) -> Tensor:
        own = [each[key] for each in found]
        return torch.cat(own if key.endswith(SQUARES) else [rows.flatten(0, 1) for rows in own])

    return {key: joined(key) for key in found[0]}


@torch.no_grad()
def label_gradients(
    hidden_BTD: Tensor, head: Head, rows_BT: Tensor, draws: int, seed: int
) -> Iterator[Tensor]:
    """Gradients [B, T, D] of the log-likelihood of drawn labels at the final hidden states.

    No graph over the vocabulary is needed. The labels of a sequence depend on the seed and on its
    own tokens only.
    """
    labels = torch.empty(draws, *rows_BT.shape, dtype=torch.long, device=hidden_BTD.device)
    slopes = torch.empty(labels.shape, device=hidden_BTD.device)
    expected = torch.empty_like(hidden_BTD)
    for row, sequence in enumerate(rows_BT):
        logits = require_finite(head.logits(hidden_BTD[row]), "the teacher's logits")
        probability, slope = logits.softmax(-1), head.slope(logits)
        generator = torch.Generator().manual_seed(seed + zlib.crc32(sequence.numpy().tobytes()))
        uniform = torch.rand(len(sequence), draws, generator=generator, dtype=torch.float64)
        labels[:, row] = drawn(probability, uniform.to(probability.device)).T
        slopes[:, row] = slope.expand_as(logits).gather(1, labels[:, row].T).T
        expected[row] = (probability * slope).to(head.weight.dtype) @ head.weight
    for label, slope in zip(labels, slopes, strict=True):
        yield (head.weight[label] * slope[..., None]).to(expected.dtype) - expected


def drawn(probability_NV: Tensor, uniform_NK: Tensor) -> Tensor:
    """Labels [N, K]: where the cumulative distribution passes uniform numbers in [0, 1).

    Sums are fp64, first of blocks of the vocabulary: then a rounding of probabilities hardly ever
    moves a label.
    """
    vocab = probability_NV.shape[1]
    blocks = pad(probability_NV, (0, -vocab % BLOCK)).view(len(probability_NV), -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform_NK * sums[:, -1:]
    block = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = pad(sums, (1, 0)).gather(1, block)
    own = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).double().cumsum(-1)
    inside = torch.searchsorted(own, (target - before)[..., None], right=True)[..., 0]
    return (block * BLOCK + inside.clamp_(max=BLOCK - 1)).clamp_(max=vocab - 1)
