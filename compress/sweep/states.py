"""A model's final hidden states of a text on disk: all that distillation needs of its teacher.

In BF16 they take 2 bytes x hidden size for every token of the text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.model.tensor_files import tensor_writer
from compress.sweep.stack import Stack, final_states

# N rows, T tokens, D hidden.

# Tokens that run through a layer together; what is computed does not depend on the memory.
BATCH_TOKENS = 1024
# States in flight where nothing bounds them.
WAVE_BYTES = 2**30


@dataclass(frozen=True)
class StoredStates:
    """Final hidden states of rows of tokens, in a file; ``states[index]`` reads some rows."""

    reader: Any

    def __getitem__(self, index: Tensor) -> Tensor:
        """The states [n, T, D] of these rows [n], in BF16."""
        return torch.stack([self.reader.get_tensor(name_of(row)) for row in index.tolist()])


def stored_states(
    stack: Stack, rows_NT: Tensor, file: Path, progress: Callable[[int], None] = lambda rows: None
) -> StoredStates:
    """The final hidden states of rows of token ids in BF16, computed where there is no ``file``.

    Rows go through the stack in waves: as many as a quarter of its memory holds the states of.
    The file is written beside and renamed when whole. ``progress`` is told of the rows of a wave.
    """
    if not file.is_file():
        shape = (rows_NT.shape[1], stack.architecture.hidden)
        spec = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        with tensor_writer(file, {name_of(row): spec for row in range(len(rows_NT))}) as write:
            for first, states in waves(stack, rows_NT):
                for row, state_TD in enumerate(states, first):
                    write(name_of(row), state_TD.to(torch.bfloat16))
                progress(len(states))
    opened: Any = safe_open
    return StoredStates(opened(file, framework="pt"))


def waves(stack: Stack, rows_NT: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first row of every wave and the final states [n, T, D] of its rows."""
    batch = max(BATCH_TOKENS // rows_NT.shape[1], 1)
    place = stack.placement
    free = WAVE_BYTES if place.memory is None else place.memory // 4
    batch_bytes = batch * rows_NT.shape[1] * stack.architecture.hidden * place.dtype.itemsize
    wave = batch * max(free // batch_bytes, 1)
    for first in range(0, len(rows_NT), wave):
        batches = torch.split(rows_NT[first : first + wave], batch)
        yield first, torch.cat(final_states(stack, batches))


def name_of(row: int) -> str:
    """The tensor of a row in the file."""
    return f"{row:09}"
