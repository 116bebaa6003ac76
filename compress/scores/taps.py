"""Gates and the contribution matrix: what every unit and every format is worth, in one pass.

A gate is a multiplier at 1 on a unit's activation, or 0 -> 1 on a block's rounding error. Its
gradient needs no gate in the graph: at an activation z it is the sum over tokens of z * dL/dz, at
a linear layer y = W x with rounding error dW it is the sum of dL/dy * (dW x). So hooks read
activations and their gradients, and one backward gives one row per sequence for every gate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats.fake import fake_quantize_block
from compress.formats.table import Format
from compress.memory.footprint import block_takes
from compress.model.architecture import Architecture, Block, block_name, sizes
from compress.model.layout import Slot, parse
from compress.model.modules import (
    final_norm,
    fused_experts,
    layer_of,
    norm_of,
    slots_of,
    weights_of,
)
from compress.student.masks import masked_model, unit_mask
from compress.student.units import Units, array_of, projections, unit_key, units_of

# What is kept of those besides contributions: sums over tokens of the squares of activations and of
# gradients, and how many tokens there were.
SQUARES = ("/activation", "/slope", "/tokens")
Gather = Callable[[Tensor], Tensor]  # [tokens, features] -> [rows, features]
WHOLE: Mapping[str, Tensor] = MappingProxyType({})  # what a teacher keeps: everything


class Taps:
    """Hooks on a frozen teacher that collect contributions while gradients flow backwards.

    After a forward inside ``attached()``, ``backward`` maps every key to [sequences, *unit shape]:
    ``hidden``, ``<block>/<units>``, and for each format of ``formats`` (for blocks
    whose shapes take it) ``<block>/<units>/<format>`` and ``<block>/rest/<format>``. With
    ``squares`` also, for units that are one number z per token, ``<block>/<units>/activation`` and
    ``.../slope``, the sums over tokens of the squares of z and of dL/dz, with ``.../tokens``; for
    the hidden channels at every norm, ``hidden@<number>/...``.

    With ``keep`` and ``current`` (teacher block numbers to formats, of those in ``formats``) the
    teacher computes that student: contributions are the derivatives there, of units that are gone
    too, formats still against BF16.
    """

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        formats: Sequence[Format],
        keep: Mapping[str, Tensor] = WHOLE,
        current: Mapping[int, Format] = MappingProxyType({}),
        squares: bool = False,
    ) -> None:
        self.model, self.architecture, self.squares = model, architecture, squares
        self.keep, self.current = keep, current
        self.rows: dict[str, Tensor] = {}
        self.errors = {
            (number, format): errors
            for number in range(len(architecture.blocks))
            for format in formats
            if (errors := rounding_errors(model, architecture, number, format))
        }
        self.formats = tuple(formats)

    @contextmanager
    def attached(self, sequences: int) -> Iterator[None]:
        """Hooks in place for a batch of so many sequences.

        The embedding's output becomes the leaf that gradients flow to.
        """
        self.sequences, blocks = sequences, self.architecture.blocks
        with ExitStack() as stack:

            def after(module: Any, hook: Callable[..., Any]) -> None:
                stack.callback(module.register_forward_hook(hook).remove)

            embedding = self.model.get_input_embeddings()
            after(embedding, lambda module, args, output: output.requires_grad_(True))
            after(final_norm(self.model), self.tap_norm(len(blocks)))
            self.unmasked = stack.enter_context(
                masked_model(self.model, self.architecture, self.keep)
            )
            for number, block in enumerate(blocks):
                layer = layer_of(self.model, block)
                after(norm_of(self.model, block), self.tap_norm(number))
                for name, slot in slots_of(self.architecture, block, experts=False).items():
                    after(layer.get_submodule(name), self.tap_linear(number, name, slot))
                for projection in projections(self.architecture, block):
                    if projection.norm:
                        norm = layer.get_submodule(projection.masked)
                        tap = self.tap_gated_norm(number, projection.units)
                        stack.callback(norm.register_forward_pre_hook(tap).remove)
                if experts := fused_experts(self.model, self.architecture, block):
                    experts.forward = self.experts_forward(number, experts)
                    stack.callback(delattr, experts, "forward")  # the class's own shows again
            yield

    def backward(self, hidden: Tensor, gradient: Tensor, *, again: bool) -> dict[str, Tensor]:
        """One row per sequence of every gate, from the gradient at the final hidden states.

        ``again`` keeps the graph for another gradient.
        """
        torch.autograd.backward(hidden, gradient, retain_graph=again)
        found, self.rows = self.rows, {}
        return {key: value.detach() for key, value in found.items()}

    def add(self, key: str, value: Tensor) -> None:
        """Add rows; several norms share the hidden channels, several matrices a unit's rounding."""
        self.rows[key] = self.rows[key] + value if key in self.rows else value

    def tap_norm(self, number: int) -> Callable[..., None]:
        """Hook for a residual norm's output: the hidden channels."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            value = output.detach()

            def rows(grad: Tensor) -> None:
                self.add("hidden", (value * grad).sum(1))
                if self.squares:
                    parts = value.square(), grad.square(), torch.ones_like(value[..., :1])
                    for suffix, part in zip(SQUARES, parts, strict=True):
                        self.add(f"hidden@{number}{suffix}", part.sum(1))

            on_gradient(output, rows)

        return hook

    def tap_gated_norm(self, number: int, units: Units) -> Callable[..., None]:
        """Hook for dead units before a norm: the output projection after it never sees them."""
        key = unit_key(self.architecture.blocks[number], units)
        gone = 1 - unit_mask(self.architecture, self.keep, number, units)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if (value := self.unmasked.inputs.get(module)) is None or not args[0].requires_grad:
                return

            def rows(grad: Tensor) -> None:
                self.add(key, (value * grad).sum(1).reshape(-1, *gone.shape) * gone)

            on_gradient(args[0], rows)

        return hook

    def tap_linear(self, number: int, name: str, slot: Slot) -> Callable[..., Tensor]:
        """Hook for a linear module, whose tokens are [sequences, tokens, features]."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            value = self.unmasked.inputs.get(module, args[0].detach())
            return self.tap(number, name, slot, value, args[0], output, lambda v: v.sum(1))

        return hook

    def tap(
        self,
        number: int,
        name: str,
        slot: Slot,
        value: Tensor,
        x: Tensor,
        y: Tensor,
        gather: Gather,
    ) -> Tensor:
        """Tap y = W x, where ``value`` is x before its mask; y in the block's current format.

        Taken are the units that the input is made of, and what rounding W costs.
        """
        block = self.architecture.blocks[number]
        found = {
            f: self.errors[number, f][name] for f in self.formats if (number, f) in self.errors
        }
        if (current := self.current.get(number, "bf16")) != "bf16":
            y = y + x @ found[current].float().T
        units = units_of(parse(slot.shape)[1][0], block)
        reads_units = units is not None

        def read(grad: Tensor) -> None:
            self.add_units(block, slot, 1, gather(value * grad), "")
            if self.squares and units and units.scalar:
                self.add_units(block, slot, 1, gather(value.square()), SQUARES[0])
                self.add_units(block, slot, 1, gather(grad.square()), SQUARES[1])
                ones = torch.ones_like(value[..., :1])
                self.add(unit_key(block, units) + SQUARES[2], gather(ones))

        if reads_units and x.requires_grad:
            on_gradient(x, read)
        if not found or not y.requires_grad:
            return y
        # The side that is made of units keeps its index; there are no units on the other one.
        shifts = {} if reads_units else {f: value @ error.float().T for f, error in found.items()}

        def rounding(grad: Tensor) -> None:
            for format, error in found.items():
                cost = value * (grad @ error.float()) if reads_units else grad * shifts[format]
                self.add_units(block, slot, int(reads_units), gather(cost), f"/{format}")

        on_gradient(y, rounding)
        return y

    def add_units(self, block: Block, slot: Slot, side: int, rows: Tensor, suffix: str) -> None:
        """Add [rows, features of one side of a weight] to the unit arrays they belong to."""
        axis_sizes, offset = sizes(block) | {"hidden": self.architecture.hidden}, 0
        experts = rows.shape[1:-1]
        for product in parse(slot.shape)[side]:
            length = prod(axis_sizes[axis] for axis in product)
            part, offset = rows[..., offset : offset + length], offset + length
            units = units_of(product, block)
            if units is None:
                self.add(f"{block_name(block)}/rest{suffix}", part.flatten(1).sum(1))
                continue
            shaped = part if experts else to_units(part, product, units.axes, axis_sizes)
            self.add(unit_key(block, units) + suffix, shaped)

    def experts_forward(self, number: int, module: Any) -> Callable[..., Tensor]:
        """The fused experts' forward, expert by expert, with taps on each one's two matrices."""
        block = self.architecture.blocks[number]
        slots = slots_of(self.architecture, block, experts=True)
        (up, up_slot), (down, down_slot) = slots.items()
        kept = unit_mask(self.architecture, self.keep, number, array_of(block, "expert"))

        def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            length = x.shape[0] // self.sequences
            output = torch.zeros_like(x)
            for expert in range(len(kept)):
                token, choice = torch.where(index == expert)
                if not len(token):
                    continue
                row = token // length

                def gather(value: Tensor, expert: int = expert, row: Tensor = row) -> Tensor:
                    rows = value.new_zeros(self.sequences, len(kept), value.shape[-1])
                    rows[:, expert] = rows[:, expert].index_add(0, row, value)
                    return rows

                names = (up.format(expert=expert), down.format(expert=expert))
                seen = x[token]
                before = seen @ module.up_proj[expert].T
                before = self.tap(number, names[0], up_slot, seen.detach(), seen, before, gather)
                inner = module.act_fn(before)
                value, inner = inner.detach(), inner * kept[expert]
                after = inner @ module.down_proj[expert].T
                after = self.tap(number, names[1], down_slot, value, inner, after, gather)
                output = output.index_add(0, token, after * weight[token, choice, None])
            return output

        return forward

    sequences: int = 0  # rows of the batch that is under way; experts see flattened tokens


def on_gradient(tensor: Any, hook: Callable[[Tensor], None]) -> None:
    """Call ``hook`` with the gradient of a tensor; the gradient itself stays as it is."""
    tensor.register_hook(hook)


def to_units(
    rows: Tensor, product: Sequence[str], axes: Sequence[str], axis_sizes: Mapping[str, int]
) -> Tensor:
    """[B, product of axes] as [B, *units]: other axes are summed, missing ones share equally."""
    shaped = rows.reshape(len(rows), *(axis_sizes[axis] for axis in product))
    others = [number + 1 for number, axis in enumerate(product) if axis not in axes]
    shaped = shaped.sum(others) if others else shaped
    shape = [axis_sizes[axis] for axis in axes]
    known = [axis_sizes[axis] if axis in product else 1 for axis in axes]
    return (shaped.reshape(-1, *known) / (prod(shape) // prod(known))).expand(-1, *shape)


def rounding_errors(
    model: Any, architecture: Architecture, number: int, format: Format
) -> dict[str, Tensor]:
    """What a format adds to a block's weights, bf16, by module; empty if a shape refuses it."""
    block = architecture.blocks[number]
    if not block_takes(block, architecture.hidden, architecture.family, format):
        return {}
    weights = weights_of(model, architecture, block)
    exact = {name: weight for name, (weight, _) in weights.items()}
    fused = {name: slot.fused for name, (_, slot) in weights.items()}
    rounded = fake_quantize_block(exact, fused, format)
    return {name: (rounded[name] - exact[name]).bfloat16() for name in exact}
