"""Gates and the contribution matrix: what every unit and every format is worth, in one pass.

A gate is a multiplier at 1 on a unit's activation, or 0 -> 1 on a linear group's rounding error.
Its gradient needs no gate in the graph: at an activation z it is the sum over tokens of z * dL/dz,
at a linear layer y = W x with rounding error dW it is the sum of dL/dy * (dW x). So hooks read
activations and their gradients, and one backward gives one row per sequence for every gate.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats.table import Format
from compress.model.architecture import Block, block_name, sizes
from compress.model.experts import Experts, experts_of_block
from compress.model.layout import Slot, parse, size_of, split
from compress.model.modules import after, final_norm, layer_of, seeing, slots_of
from compress.scores.gated import Errors, Gated
from compress.scores.shifts import Shift
from compress.student.masks import (
    Unmasked,
    is_alive,
    masked_final,
    numbered,
    replaced_forward,
    unit_mask,
)
from compress.student.units import Units, array_of, projections, unit_key, units_of

# What is kept of those besides contributions: sums over tokens of the squares of activations and of
# gradients, and how many tokens there were.
SQUARES = ("/activation", "/slope", "/tokens")
Gather = Callable[[Tensor], Tensor]  # [tokens, features] -> [sequences, features], summed in fp32
Expert = tuple[int, int] | None  # one of so many


class Taps:
    """Hooks on one layer of a gated teacher at a time, or on its final norm.

    ``backward`` maps every key of what they are on to [draws, sequences, *unit shape], in fp32:
    ``hidden``, ``<block>/<units>``, and for each linear group and format whose errors are given
    ``<block>/<units>/<group>/<format>`` and ``<block>/rest/<group>/<format>``. With ``squares``
    also, for units that are one number z per token, ``<block>/<units>/activation`` and
    ``.../slope``, the sums over sequences, draws and tokens of the squares of z and of dL/dz, with
    ``.../tokens``, [1, *units];
    for the hidden channels at every norm, ``hidden@<number>/...``.

    Where the teacher computes a student, contributions are the derivatives there, of units that are
    gone too, formats still against BF16.
    """

    def __init__(self, gated: Gated, draws: int = 1, *, squares: bool = False) -> None:
        self.gated, self.stack, self.draws, self.squares = gated, gated.stack, draws, squares
        self.rows: dict[str, Tensor] = {}
        self.unmasked = Unmasked(self.stack.placement)
        self.draw = self.sequences = 0  # of the backward pass that is under way

    @contextmanager
    def on_layer(
        self, layer: int, unmasked: Unmasked, errors: Mapping[int, Errors]
    ) -> Iterator[None]:
        """Hooks on a layer, inside ``Gated.layer``, which gives the other arguments."""
        model, architecture, self.unmasked = self.stack.model, self.stack.architecture, unmasked
        with ExitStack() as hooks:
            for number, block in numbered(architecture, layer):
                inside, own = layer_of(model, block), errors.get(number, {})
                for handle in seeing(model, block, self.tap_reading(number)):
                    hooks.callback(handle.remove)
                for name, slot in slots_of(architecture, block, experts=False).items():
                    tap = self.tap_linear(block, name, slot, own)
                    module = inside.get_submodule(name)
                    hooks.callback(module.register_forward_hook(tap).remove)
                for projection in projections(architecture, block):
                    if projection.slot.fused is None:
                        module = inside.get_submodule(projection.module)
                        tap = self.tap_linear(block, projection.module, projection.slot, {})
                        hooks.callback(module.register_forward_hook(tap).remove)
                    if projection.averaged:
                        norm = inside.get_submodule(projection.averaged)
                        tap = self.tap_gated_norm(number, projection.units)
                        hooks.callback(norm.register_forward_pre_hook(tap).remove)
                if experts := experts_of_block(model, architecture, block):
                    forward = self.experts_forward(number, experts, own)
                    hooks.enter_context(replaced_forward(experts.module, forward))
            yield

    @contextmanager
    def on_final(self) -> Iterator[None]:
        """Hooks on the final norm, inside ``Stack.head``."""
        stack = self.stack
        tap = self.tap_reading(len(stack.architecture.blocks))
        with masked_final(stack, self.gated.keep) as self.unmasked, ExitStack() as hooks:
            hooks.callback(after(final_norm(stack.model), tap).remove)
            yield

    def backward(
        self,
        run: Callable[[Tensor], Tensor],
        input_BTD: Tensor,
        gradients: Callable[[Tensor], Iterable[Tensor]],
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Gradients at the input of what is run, one for each draw, and the rows of every gate.

        ``gradients`` gives those at its output, which it is called with.
        """
        self.rows, self.sequences = {}, len(input_BTD)
        leaf = input_BTD.detach().requires_grad_(True)
        with torch.enable_grad():
            output = run(leaf)
        found = []
        for self.draw, gradient in enumerate(gradients(output.detach())):
            last = self.draw == self.draws - 1
            [at_input] = torch.autograd.grad(output, leaf, gradient, retain_graph=not last)
            found.append(at_input)
        rows, self.rows = self.rows, {}
        return found, rows

    def add(self, key: str, rows: Tensor, expert: Expert = None, *, once: bool = False) -> None:
        """Add rows [sequences, *shape] of the draw that is under way to a key's.

        Several norms share the hidden channels, several matrices a unit's rounding. Those of one
        expert are a part of the key's. What there is ``once`` is [1, *shape], for all sequences and
        draws.
        """
        if key not in self.rows:
            leading = (1,) if once else (self.draws, self.sequences)
            several = () if expert is None else (expert[1],)
            self.rows[key] = rows.new_zeros(*leading, *several, *rows.shape[1:])
        own = self.rows[key] if once else self.rows[key][self.draw]
        (own if expert is None else own[:, expert[0]]).add_(rows)

    def tap_reading(self, number: int) -> Callable[[Tensor], None]:
        """What sees what a block or the head reads: the hidden channels."""
        activation, slope, tokens = (f"hidden@{number}{suffix}" for suffix in SQUARES)

        def see(hidden_BTD: Tensor) -> None:
            value = hidden_BTD.detach()

            def rows(grad: Tensor) -> None:
                self.add("hidden", of_sequences(value * grad))
                if self.squares:
                    self.add(slope, squares_of(grad), once=True)

            if self.squares:
                self.add(activation, squares_of(value) * self.draws, once=True)
                self.add(tokens, tokens_of(value) * self.draws, once=True)
            on_gradient(hidden_BTD, rows)

        return see

    def tap_gated_norm(self, number: int, units: Units) -> Callable[..., None]:
        """Hook for dead units before a norm: the output projection after it never sees them."""
        architecture, keep = self.stack.architecture, self.gated.keep
        key = unit_key(architecture.blocks[number], units)
        gone = 1 - unit_mask(architecture, keep, number, units).to(self.stack.placement.device)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if (value := self.unmasked.inputs.get(module)) is None:
                return

            def rows(grad: Tensor) -> None:
                # A norm of every head alone sees them one below the other.
                shift = (value * grad).reshape(self.sequences, -1, gone.numel())
                self.add(key, of_sequences(shift).reshape(-1, *gone.shape) * gone)

            on_gradient(args[0], rows)

        return hook

    def tap_linear(
        self, block: Block, name: str, slot: Slot, errors: Errors
    ) -> Callable[..., None]:
        """Hook for a linear module, whose tokens are those of all sequences in turn."""
        own = {format: error[name] for format, error in errors.items() if name in error}

        def gather(values: Tensor) -> Tensor:
            return of_sequences(values.reshape(self.sequences, -1, values.shape[-1]))

        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            value = self.unmasked.inputs.get(module, args[0].detach())
            self.tap(block, slot, module.weight, own, value, args[0], output, gather)

        return hook

    def tap(
        self,
        block: Block,
        slot: Slot,
        weight: Tensor,
        errors: Mapping[Format, Tensor],
        value: Tensor,
        x: Tensor,
        y: Tensor,
        gather: Gather,
        expert: Expert = None,
    ) -> None:
        """Tap y = W x, where ``value`` is x before its mask.

        Taken are the units that the input is made of, and what formats of W cost.
        """
        units = units_of(parse(slot.shape)[1].products[0], block)
        reads_units = units is not None
        squares = self.squares and units is not None and units.scalar
        activation, slope, tokens = SQUARES

        def add(side: int, rows: Tensor, suffix: str, *, once: bool = False) -> None:
            self.add_units(block, slot, side, rows, suffix, expert, once=once)

        def read(grad: Tensor) -> None:
            add(1, gather(value * grad), "")
            if squares:
                add(1, squares_of(grad), slope, once=True)

        if reads_units and x.requires_grad:
            if squares:
                add(1, squares_of(value) * self.draws, activation, once=True)
            if squares and units:
                count = tokens_of(value) * self.draws
                self.add(unit_key(block, units) + tokens, count, expert, once=True)
            on_gradient(x, read)
        if not errors:
            return
        # The side that is made of units keeps its index; of two such sides the one that is made of
        # an expert's own.
        by_input = units is not None and (expert is None or "expert" in units.axes)
        shifts = [Shift(value, weight.detach(), error, f) for f, error in errors.items()]

        def rounding(grad: Tensor) -> None:
            for shift in shifts:
                cost = shift.cost(grad, by_input=by_input)
                add(int(by_input), gather(cost), f"/{slot.fused}/{shift.format}")

        on_gradient(y, rounding)

    def add_units(
        self,
        block: Block,
        slot: Slot,
        side: int,
        rows: Tensor,
        suffix: str,
        expert: Expert,
        *,
        once: bool = False,
    ) -> None:
        """Add [sequences, features of one side of a weight] to the unit arrays they belong to."""
        axis_sizes = sizes(block) | {"hidden": self.stack.architecture.hidden}
        for product, part in split(rows, parse(slot.shape)[side], axis_sizes):
            units = units_of(product, block)
            if units is None:
                self.add(f"{block_name(block)}/rest{suffix}", part.sum(1), once=once)
                continue
            own = expert if "expert" in units.axes else None
            if own is None:
                part = to_units(part, product, units.axes, axis_sizes)
            self.add(unit_key(block, units) + suffix, part, own, once=once)

    def experts_forward(
        self, number: int, experts: Experts, errors: Errors
    ) -> Callable[..., Tensor]:
        """The experts' forward, one by one, with taps on each one's matrices."""
        architecture = self.stack.architecture
        block = architecture.blocks[number]
        down, down_slot = experts.writing
        alive = is_alive(self.gated.keep, number)
        kept = unit_mask(architecture, self.gated.keep, number, array_of(block, "expert"))
        kept = kept.to(self.stack.placement.device, self.stack.placement.dtype)

        def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            length, unmasked = len(x) // self.sequences, self.unmasked.inputs.get(experts.module)
            output = torch.zeros_like(x, dtype=weight.dtype)
            for expert, (token, choice) in enumerate(sent(index, len(kept))):
                if not len(token):
                    continue
                row = token // length

                def gather(value: Tensor, row: Tensor = row) -> Tensor:
                    rows = value.new_zeros(self.sequences, value.shape[-1], dtype=torch.float32)
                    return rows.index_add_(0, row, value.float())

                def tapped(
                    name: str, slot: Slot, value: Tensor, seen: Tensor, put: Tensor,
                    expert: int = expert, gather: Gather = gather,
                ) -> None:  # fmt: skip
                    module = name.format(expert=expert)
                    own = {f: error[module] for f, error in errors.items() if module in error}
                    matrix, which = experts.weight(name, expert), (expert, len(kept))
                    self.tap(block, slot, matrix, own, value, seen, put, gather, which)

                seen = x[token]
                read = experts.read(seen, expert)
                for (name, slot), before in zip(experts.reading, read, strict=True):
                    value = seen.detach() if unmasked is None else unmasked[token]
                    tapped(name, slot, value, seen, before)
                inner = experts.neurons(read)
                value, inner = inner.detach(), inner * kept[expert]
                after = experts.write(inner, expert, bias=alive)
                tapped(down, down_slot, value, inner, after)
                share = after * weight[token, choice, None]
                output = output.index_add(0, token, share.to(output.dtype))
            return output.to(x.dtype)

        return forward


def sent(index: Tensor, experts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each expert its tokens [t], and which of a token's choices [t] it is."""
    order = index.flatten().argsort(stable=True)
    counts = torch.bincount(index.flatten(), minlength=experts).tolist()
    for own in torch.split(order, counts):
        yield own // index.shape[1], own % index.shape[1]


def of_sequences(values: Tensor) -> Tensor:
    """[sequences, *tokens, features] summed over tokens, in fp32."""
    return values.flatten(1, -2).sum(1, dtype=torch.float32)


def squares_of(values: Tensor) -> Tensor:
    """Sums [1, features] of the squares of values [..., features], in fp32."""
    return values.flatten(0, -2).float().square().sum(0, keepdim=True)


def tokens_of(values: Tensor) -> Tensor:
    """How many tokens values [..., features] have, [1, 1]."""
    count = values[..., 0].numel()
    return torch.full((1, 1), float(count), device=values.device)


def on_gradient(tensor: Any, hook: Callable[[Tensor], None]) -> None:
    """Call ``hook`` with the gradient of a tensor if there is one; it stays as it is."""
    if tensor.requires_grad:
        tensor.register_hook(hook)


def to_units(
    rows: Tensor, product: Sequence[str], axes: Sequence[str], axis_sizes: Mapping[str, int]
) -> Tensor:
    """[B, product of axes] as [B, *units]: other axes are summed, missing ones share equally."""
    shaped = rows.reshape(len(rows), *(size_of(axis, axis_sizes) for axis in product))
    others = [number + 1 for number, axis in enumerate(product) if axis not in axes]
    shaped = shaped.sum(others) if others else shaped
    shape = [axis_sizes[axis] for axis in axes]
    known = [axis_sizes[axis] if axis in product else 1 for axis in axes]
    return (shaped.reshape(-1, *known) / (prod(shape) // prod(known))).expand(-1, *shape)
