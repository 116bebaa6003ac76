"""Routed experts as a torch model has them: one module, the weights of all stacked in it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.model.architecture import Architecture, Block
from compress.model.families import family_of
from compress.model.layout import Slot
from compress.model.modules import layer_of

# n tokens of all sequences, t those of one expert, D hidden.

BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block, whose ``module`` computes all of them.

    It is called with tokens [n, D], chosen experts and their weights [n, top-k]. ``matrices`` are
    the slots of an expert's weights by module name in the layer, those that read before the one
    that writes; ``biases`` those of their biases, by the same names.
    """

    module: Any
    matrices: Mapping[str, Slot]
    biases: Mapping[str, Slot]

    @property
    def reading(self) -> list[tuple[str, Slot]]:
        """What an expert reads with: up, or gate and up."""
        return list(self.matrices.items())[:-1]

    @property
    def writing(self) -> tuple[str, Slot]:
        """What it writes with."""
        return list(self.matrices.items())[-1]

    def __len__(self) -> int:
        """How many there are."""
        return len(stacked(self.module, self.writing[1]))

    def weight(self, name: str, expert: int) -> Tensor:
        """One expert's matrix [out, in] of this name, as a view."""
        slot = self.matrices[name]
        return slot.part.view(stacked(self.module, slot)[expert])

    def linear(self, name: str, expert: int, x: Tensor, *, bias: bool = True) -> Tensor:
        """What the matrix of this name makes of x [t, in]."""
        found = x @ self.weight(name, expert).T
        if not bias or (slot := self.biases.get(name)) is None:
            return found
        return found + slot.part.view(stacked(self.module, slot)[expert])

    def read(self, x: Tensor, expert: int) -> list[Tensor]:
        """What an expert reads of its tokens [t, D], matrix by matrix."""
        return [self.linear(name, expert, x) for name, _ in self.reading]

    def write(self, neurons: Tensor, expert: int, *, bias: bool = True) -> Tensor:
        """An expert's output [t, D] of its neurons."""
        return self.linear(self.writing[0], expert, neurons, bias=bias)

    def neurons(self, read: Sequence[Tensor]) -> Tensor:
        """Neurons of an expert [t, width] from what ``read`` gives."""
        if len(read) == 2 and self.reading[0][1].part.interleaved:
            # Its own function of gate and up in turns.
            together = torch.stack(tuple(read), -1).flatten(-2)
            gated: Tensor = self.module._apply_gate(together)
            return gated
        first: Tensor = self.module.act_fn(read[0])
        return first if len(read) == 1 else first * read[1]

    def routed(
        self, x: Tensor, index: Tensor, weight: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each expert its tokens [t], their neurons [t, width] and weights [t, 1].

        The arguments are those that the module is called with.
        """
        for expert in range(len(self)):
            token, choice = torch.where(index == expert)
            neurons = self.neurons(self.read(x[token], expert))
            yield token, neurons, weight[token, choice, None]


def stacked(module: Any, slot: Slot) -> Tensor:
    """The tensor of the experts' module that holds what a slot declares, of all of them."""
    assert slot.place is not None, "experts' weights are not where a checkpoint has them"
    found: Tensor = getattr(module, slot.place.rpartition(".")[2])
    return found


def experts_of_block(model: Any, architecture: Architecture, block: Block) -> Experts | None:
    """The routed experts of a block of a model; None if it has none."""
    table = family_of(architecture.family).tensors(block)
    own = {name: slot for name, slot in table.items() if "{expert}" in name}
    if not own:
        return None
    matrices = {n.removesuffix(".weight"): s for n, s in own.items() if n.endswith(".weight")}
    biases = {n.removesuffix(".bias"): s for n, s in own.items() if n.endswith(".bias")}
    place = next(iter(matrices.values())).place
    assert place is not None
    module = layer_of(model, block).get_submodule(place.rpartition(".")[0])
    return Experts(module, matrices, biases)


@contextmanager
def routing_among(router: Any, kept: Tensor) -> Iterator[None]:
    """A router whose other experts are not there, as their score before the choice is -inf.

    Inside the visit of its layer: it changes what the layer's weights are.
    """
    correction: Tensor | None = getattr(router, BIAS, None)
    if correction is not None:
        gone = torch.ones_like(correction, dtype=torch.bool)
        gone[kept.to(correction.device)] = False
        setattr(router, BIAS, correction.masked_fill(gone, -torch.inf))
    else:
        # Weights of the chosen may be a softmax over all, which has to be over fewer.
        whole = dict(router._parameters)

        def among(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            index = kept.to(hidden.device)
            router._parameters.update({name: tensor[index] for name, tensor in whole.items()})
            try:
                logits, scores, chosen = type(router).forward(router, hidden)
            finally:
                router._parameters.update(whole)
            return logits, scores, index[chosen]

        router.forward = among
    try:
        yield
    finally:
        if correction is not None:
            setattr(router, BIAS, correction)
        else:
            del router.forward  # the class's own shows again
