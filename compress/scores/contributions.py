"""The contribution matrix of a teacher: a forward pass and a backward one per draw of labels."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.formats.table import Format
from compress.measure.losses import require_finite
from compress.model.architecture import Architecture
from compress.model.modules import Head, final_hidden, head_of
from compress.model.tensor_files import save_tensors
from compress.scores.taps import SQUARES, Taps

Contributions = Mapping[str, Tensor]
Progress = Callable[[int, int], None]


def contributions(
    model: Any,
    architecture: Architecture,
    tokens: Tensor,
    draws: int,
    formats: Sequence[Format],
    seed: int = 0,
    batch: int = 8,
    progress: Progress = lambda done, total: None,
    directory: Path | None = None,
) -> dict[str, Tensor]:
    """The contribution matrix [sequences * draws, *units] of every gate, fp32.

    Squares (``taps.SQUARES``) are sums over all rows, [1, *units].

    Args:
        model: the teacher in fp32, frozen, in eval mode.
        architecture: the teacher's.
        tokens: [sequences, T] token ids.
        draws: label draws per sequence; labels depend on the seed and the sequence's own tokens, so
            neither batches nor their order matter.
        formats: formats to score besides the units.
        seed: of the labels.
        batch: sequences per forward pass.
        progress: called with backward passes done and in total.
        directory: keeps every finished batch, so that a killed scoring continues there.
    """
    taps = Taps(model, architecture, formats, squares=True)
    batches = torch.split(tokens, batch)
    collected: dict[str, list[Tensor]] = {}
    for number, rows in enumerate(batches):
        part = directory / f"{number:04}.safetensors" if directory else None
        if part is not None and part.is_file():
            found = load_file(part)
            progress((number + 1) * draws, len(batches) * draws)
        else:
            found = {}
            for draw, drawn in enumerate(draw_rows(taps, rows, draws, seed)):
                for key, value in drawn.items():
                    # Filled in place: small tensors kept from every draw would pin the large freed
                    # ones between them, and memory would grow with the draws.
                    if key not in found:
                        found[key] = value.new_zeros(draws, *value.shape)
                    found[key][draw] = value
                progress(number * draws + draw + 1, len(batches) * draws)
            for key, value in found.items():
                squares = key.endswith(SQUARES)
                found[key] = value.sum((0, 1))[None] if squares else value.flatten(0, 1)
            if part:
                save_tensors(found, part)
        for key, value in found.items():
            collected.setdefault(key, []).append(value)
    joined = ((key, torch.cat(values)) for key, values in collected.items())
    return {k: rows.sum(0, keepdim=True) if k.endswith(SQUARES) else rows for k, rows in joined}


def draw_rows(taps: Taps, rows: Tensor, draws: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Contributions of one batch, a dictionary per draw of the labels."""
    head = head_of(taps.model)
    with taps.attached(len(rows)), torch.enable_grad():
        hidden = final_hidden(taps.model, rows)
        for draw, gradient in enumerate(label_gradients(hidden.detach(), head, rows, draws, seed)):
            yield taps.backward(hidden, gradient, again=draw < draws - 1)


@torch.no_grad()
def label_gradients(
    hidden_BTD: Tensor, head: Head, rows_BT: Tensor, draws: int, seed: int
) -> Iterator[Tensor]:
    """Gradients [B, T, D] of the log-likelihood of drawn labels at the final hidden states.

    No graph over the vocabulary is needed. The labels of a sequence depend on the seed and on its
    own tokens only.
    """
    labels = torch.empty(draws, *rows_BT.shape, dtype=torch.long)
    expected = torch.empty_like(hidden_BTD)
    slopes = torch.empty(draws, *rows_BT.shape)
    for row, sequence in enumerate(rows_BT):
        generator = torch.Generator().manual_seed(seed + zlib.crc32(sequence.numpy().tobytes()))
        logits = require_finite(head.logits(hidden_BTD[row]), "the teacher's logits")
        probability, slope = logits.softmax(-1), head.slope(logits)
        labels[:, row] = torch.multinomial(probability, draws, True, generator=generator).T
        slopes[:, row] = slope.expand_as(logits).gather(1, labels[:, row].T).T
        expected[row] = (probability * slope) @ head.weight
    for drawn, slope in zip(labels, slopes, strict=True):
        yield head.weight[drawn] * slope[..., None] - expected
