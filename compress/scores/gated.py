"""The gated teacher, visited layer by layer: it computes a student, and what formats would add."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats.fake import fake_quantize_block, fused_groups
from compress.formats.table import Format, GroupFormats, by_group
from compress.memory.footprint import group_takes
from compress.model.architecture import Architecture, Block
from compress.model.experts import experts_of_block
from compress.model.families import linear_groups
from compress.model.layout import Slot
from compress.model.modules import layer_of, slots_of, weights_of
from compress.student.masks import Unmasked, masked, numbered
from compress.student.rounded_teacher import RoundedTeacher
from compress.student.units import projections
from compress.sweep.stack import Stack

# What formats add to a block's weights [out, in], by module.
Errors = Mapping[Format, Mapping[str, Tensor]]
# A block's weights [out, in] with their slots, by module.
Weights = Mapping[str, tuple[Tensor, Slot]]
# Changes the weights of a block of this number, by module.
Refit = Callable[[int, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Gated:
    """The teacher of a stack as the student that keeps ``keep``, its blocks in ``current`` formats.

    ``current`` maps teacher block numbers to those of their groups, BF16 where it has none;
    ``refit`` changes the weights of the blocks ``refitted`` before they are rounded. Without any
    of it: the teacher.

    What rounding adds has the size that rounding as in ``rounded`` leaves, where that is given, but
    the pattern of rounding to nearest: errors that make up for each other do so no more once a part
    of them is cut.
    """

    stack: Stack
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    current: Mapping[int, GroupFormats] = field(default_factory=dict)
    refitted: frozenset[int] = frozenset()
    refit: Refit = lambda number, weights: None
    rounded: RoundedTeacher | None = None

    @contextmanager
    def layer(
        self, layer: int, formats: Sequence[Format] = ()
    ) -> Iterator[tuple[Unmasked, dict[int, Errors]]]:
        """A layer as the student's, in its visit, and what ``formats`` add to its blocks.

        Those are by block number, against BF16 weights, of the linear groups that take a format.
        """
        model, architecture = self.stack.model, self.stack.architecture
        errors: dict[int, Errors] = {}
        with ExitStack() as inside:
            unmasked = inside.enter_context(masked(self.stack, layer, self.keep))
            for number, block in numbered(architecture, layer):
                current = self.current.get(number, ())
                if current or number in self.refitted:
                    inside.enter_context(copied(model, architecture, block))
                named = weights_of(model, architecture, block)
                weights = {name: weight for name, (weight, _) in named.items()}
                if number in self.refitted:
                    self.refit(number, weights | output_weights(model, architecture, block))
                errors[number] = {f: self.rounding_errors(number, named, f) for f in formats}
                for name, weight in self.formatted(number, named, current).items():
                    weights[name].copy_(weight)
            yield unmasked, errors

    @torch.no_grad()
    def rounding_errors(self, number: int, weights: Weights, format: Format) -> dict[str, Tensor]:
        """What a format adds to a block's weights, by module, of the groups that take it."""
        hidden, family = self.stack.architecture.hidden, self.stack.architecture.family
        block = self.stack.architecture.blocks[number]
        taking = {
            group: format
            for group in linear_groups(block, family)
            if group_takes(block, group, hidden, family, format)
        }
        made = self.formatted(number, weights, by_group(taking))
        return {name: made[name] - weights[name][0] for name in made}

    def formatted(self, number: int, weights: Weights, formats: GroupFormats) -> dict[str, Tensor]:
        """A block's weights after formats and back, by module, of the groups that have one."""
        own = dict(formats)
        fused = {name: str(slot.fused) for name, (_, slot) in weights.items()}
        exact = {
            name: weight
            for name, (weight, _) in weights.items()
            if own.get(fused[name], "bf16") != "bf16"
        }
        made = fake_quantize_block(exact, fused, formats)
        if self.rounded is not None:
            for names in fused_groups(exact, fused):
                group = fused[names[0]]
                size = self.rounded.share(number, group, own[group]) ** 0.5
                made |= {name: torch.lerp(exact[name], made[name], size) for name in names}
        return made


def output_weights(model: Any, architecture: Architecture, block: Block) -> dict[str, Tensor]:
    """The block's output projections by module, those of experts left out."""
    layer, found = layer_of(model, block), projections(architecture, block)
    modules = [each.module for each in found if each.expert is None]
    return {module: layer.get_submodule(module).weight for module in modules}


@contextmanager
def copied(model: Any, architecture: Architecture, block: Block) -> Iterator[None]:
    """A block's matrices as copies, which may be changed: the own ones come back."""
    layer = layer_of(model, block)
    names = output_weights(model, architecture, block) | slots_of(
        architecture, block, experts=False
    )
    owners = [(layer.get_submodule(name), "weight") for name in names]
    if experts := experts_of_block(model, architecture, block):
        module = experts.module
        owners += [(module, name) for name, _ in module.named_parameters(recurse=False)]
    with ExitStack() as back:
        for module, name in owners:
            own = getattr(module, name)
            back.callback(setattr, module, name, own)
            setattr(module, name, nn.Parameter(own.clone(), requires_grad=False))
        yield
