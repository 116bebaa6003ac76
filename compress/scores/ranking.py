"""Named alternatives to our importance: which units stay, ranked by what others measure.

Forward statistics only. Published aggregation throughout (Muralidharan et al. 2024, Minitron,
section 2.2, best of its table): mean of |activation| over the tokens of a sequence, then the L2
norm over sequences. What a decision costs is still predicted from contributions (``costs``).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.model.architecture import Architecture, Block, block_name
from compress.model.experts import Experts, experts_of_block
from compress.model.layout import parse
from compress.model.modules import after, final_norm, layer_of, seeing, slots_of
from compress.student.candidate import Ranking
from compress.student.units import Projection, array_of, axes_in, projections, unit_key
from compress.sweep.stack import Stack, final_states


def activation_scores(stack: Stack, tokens: Tensor, batch: int = 8) -> dict[str, Tensor]:
    """What one sweep over [sequences, T] tokens says of every unit, fp32.

    Keys and shapes, ``<block>`` being the block's name:

    - ``hidden`` [hidden]: outputs of every residual norm, summed over the norms.
    - of the finest units, by ``unit_key``: neurons; an expert's are 0 at tokens that are not routed
      to it. L2 norm of a query head's output at a token. Mamba's x of ``[z x B C dt] =
      in_proj(norm(X))``, which heads and channels are made from (Taghibakhshi et al. 2025,
      Minitron-SSM).
    - ``<block>/expert`` [expert]: router weight times L2 norm of an expert's output at a token.
    - ``<block>/router`` [expert]: the same averaged over the tokens that are routed to the expert
      (Lasby et al. 2025, REAP); 0 for one that has none.

    Sums are in fp64: neither the batch size nor the order of sequences matters.
    """
    found = Forward(stack.architecture, tokens.shape[1])
    with found.attached(stack.model):
        final_states(stack, torch.split(tokens, batch))
    return found.scores()


class Forward:
    """Hooks that add up, over the batches of a forward pass, what ``activation_scores`` returns."""

    def __init__(self, architecture: Architecture, length: int) -> None:
        self.architecture, self.length = architecture, length
        self.squares: dict[str, Tensor] = {}
        self.routed: dict[str, tuple[Tensor, Tensor]] = {}

    def scores(self) -> dict[str, Tensor]:
        """The sums as scores."""
        found = {key: square.sqrt() for key, square in self.squares.items()}
        norms = [found.pop(key) for key in self.squares if key.startswith("hidden@")]
        found["hidden"] = torch.stack(norms).sum(0)
        for key, (total, count) in self.routed.items():
            found[key] = total / count.clamp(min=1)
        return {key: value.float().cpu() for key, value in found.items()}

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Hooks in place."""
        blocks = self.architecture.blocks
        with ExitStack() as stack:
            stack.callback(after(final_norm(model), self.tap_reading(len(blocks))).remove)
            for number, block in enumerate(blocks):
                for handle in seeing(model, block, self.tap_reading(number)):
                    stack.callback(handle.remove)
                for projection in projections(self.architecture, block):
                    if projection.expert is None:
                        name, tap = self.tap_units(block, projection)
                        module = layer_of(model, block).get_submodule(name)
                        stack.callback(module.register_forward_hook(tap).remove)
                if experts := experts_of_block(model, self.architecture, block):
                    tap = self.tap_experts(block, experts)
                    stack.callback(experts.module.register_forward_pre_hook(tap).remove)
            yield

    def add(self, key: str, means: Tensor) -> None:
        """Add sequences' means [b, *units]."""
        self.add_squares(key, means.double().square().sum(0))

    def add_squares(self, key: str, squares: Tensor) -> None:
        """Add means of sequences that are squared and summed, [*units] in fp64."""
        self.squares[key] = self.squares[key] + squares if key in self.squares else squares

    def tap_reading(self, number: int) -> Callable[[Tensor], None]:
        """What sees what a block or the head reads."""

        def see(hidden_BTD: Tensor) -> None:
            self.add(f"hidden@{number}", hidden_BTD.abs().mean(1, dtype=torch.float32))

        return see

    def tap_units(self, block: Block, projection: Projection) -> tuple[str, Callable[..., None]]:
        """The module where the units of an output projection are seen, and its hook.

        After a gated norm over all of them they are what went into it: of the weight that writes
        them twice, the gate and what it gates, the second half.
        """
        units, shape = projection.units, projection.units.shape(block)
        table = slots_of(self.architecture, block, experts=False)
        writers = [
            n for n, slot in table.items() if parse(slot.shape)[0].products.count(units.axes) == 2
        ]
        gated = projection.norm is not None and not projection.alike

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            value = output[..., prod(shape) : 2 * prod(shape)] if gated else args[0]
            value = value.float().reshape(-1, self.length, *shape, projection.features)
            size = value[..., 0].abs() if units.scalar else l2(value, -1)
            self.add(unit_key(block, units), size.mean(1))

        return (writers[0] if gated else projection.module), hook

    def tap_experts(self, block: Block, experts: Experts) -> Callable[..., None]:
        """Hook of the fused experts, which see flattened tokens; their outputs are made again."""
        name, units = block_name(block), array_of(block, "expert")
        shape = units.shape(block)

        def hook(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
            x = args[0]
            sequences = len(x) // self.length
            squares = x.new_zeros(shape, dtype=torch.float64)
            saliency = x.new_zeros(sequences, shape[0], dtype=torch.float32)
            count = x.new_zeros(shape[0], dtype=torch.float64)
            for expert, (token, inner, weight) in enumerate(experts.routed(*args)):
                row = token // self.length
                norm = l2(experts.write(inner, expert).float(), -1)
                neurons = saliency.new_zeros(sequences, shape[1])
                neurons.index_add_(0, row, inner.float().abs())
                squares[expert] = (neurons / self.length).double().square().sum(0)
                saliency[:, expert].index_add_(0, row, norm * weight[:, 0])
                count[expert] = len(token)
            self.add_squares(unit_key(block, units), squares)
            self.add(f"{name}/expert", saliency / self.length)
            total, before = self.routed.get(f"{name}/router", (0.0, 0.0))
            self.routed[f"{name}/router"] = saliency.double().sum(0) + total, count + before

        return hook


def activation_importance(
    found: Mapping[str, Tensor], block: Block | None, axis: str, keep: Mapping[str, Tensor]
) -> Tensor:
    """Scores of the units of an axis from ``activation_scores``, shaped as ``importance`` is.

    What has none of its own is the L2 norm of its finest units: a KV group that of its heads
    (Minitron ranks none), a Mamba channel that over all heads, which share the ranking, and a Mamba
    head that over the kept channels.
    """
    if block is None:
        return found["hidden"]
    if (own := found.get(f"{block_name(block)}/{axis}")) is not None:
        return own
    units = array_of(block, axis)
    values, others = found[unit_key(block, units)], units.others(axis)
    for at in others:
        index = keep.get(units.axes[at])
        if index is not None and index.dim() == 1:
            values = values.index_select(at, index)
    return values.square().sum(others).sqrt() if others else values


def l2(values: Tensor, dim: int) -> Tensor:
    """L2 norm over one dimension."""
    return values.square().sum(dim).sqrt()


def require_ranked(architecture: Architecture, ranking: Ranking) -> None:
    """Refuse a ranking that has nothing to rank in a model; InputError says which do."""
    axes = [axis for block in architecture.blocks for axis in axes_in(block).values()]
    if ranking == "router" and not any(axis.routed for axis in axes):
        raise InputError(
            "ranking router ranks experts and this teacher has none; "
            "--ranking contribution and activation rank every axis"
        )
