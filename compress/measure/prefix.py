"""Hidden states on their way through a student, kept for the next one that begins alike.

A search changes a few blocks of the best candidate so far; up to the first of them the next one
computes the very same numbers.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

# Of a placement's memory, what the states of one text may take: the best candidate's and those of
# the one being measured.
SHARE = 1 / 16


@dataclass(frozen=True)
class Walk:
    """A student's way through a text: what decides each layer, and states that entered layers.

    States [b, T, D] are by batch and layer, of every ``step`` th layer; the last one has left all.
    """

    layers: Sequence[Hashable]
    step: int
    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def keep(self, batch: int, layer: int, hidden: Tensor) -> None:
        """Keep what enters a layer, if its turn is kept."""
        if self.step and layer % self.step == 0:
            self.states[batch, layer] = hidden


@dataclass
class Incumbent:
    """The walk of the best candidate measured on a text so far; ``limit`` in bytes."""

    limit: int | None
    walk: Walk | None = None
    kl: float = math.inf

    def begin(self, layers: Sequence[Hashable], bytes_a_layer: int) -> Walk:
        """A new walk, with what it shares with the incumbent's; keeps half of the limit."""
        walk = Walk(layers, self.step(len(layers), bytes_a_layer))
        # With no layer in common, not even what enters the first one need be the same.
        if self.walk is not None and (shared := shared_layers(layers, self.walk.layers)):
            found = self.walk.states.items()
            walk.states.update({at: state for at, state in found if at[1] <= shared})
        return walk

    def step(self, layers: int, bytes_a_layer: int) -> int:
        """Every how many layers the states of a walk are kept; 0: none are."""
        if self.limit is None:
            return 1
        found = math.ceil(2 * (layers + 1) * bytes_a_layer / self.limit) if self.limit else 0
        return found if found < layers else 0

    def offer(self, walk: Walk, kl: float) -> None:
        """Take the place of the incumbent if the KL is lower."""
        if kl < self.kl:
            self.walk, self.kl = walk, kl


def shared_layers(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How many first layers are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
