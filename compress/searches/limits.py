"""What binds a search besides bytes: active parameters, and the seconds that a profile predicts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from compress.formats.table import GroupFormats
from compress.memory.latency import Profile, SpeedBound
from compress.model.architecture import Architecture, Block
from compress.model.families import block_active, outside_count
from compress.searches.knapsack import Limit
from compress.searches.space import Option, resized


@dataclass(frozen=True)
class Bound:
    """The most of a resource: whole numbers that a block takes, and what is outside by formats."""

    most: int
    of_block: Callable[[Block], int]
    of_outside: Callable[[GroupFormats], int]


def bounds(narrow: Architecture, active: int | None, speed: SpeedBound | None) -> list[Bound]:
    """Active parameters first, then nanoseconds, where they are bounded.

    ``narrow`` has the family, the hidden size and the vocabulary of the students.
    """
    found = []
    if active is not None:
        count = outside_count(narrow)
        of_block = partial(block_active, hidden=narrow.hidden, family=narrow.family)
        found.append(Bound(active, of_block, lambda _: count))
    for name, most in (speed.bounds if speed else {}).items():
        assert speed is not None
        found.append(
            Bound(
                math.floor(most * 1e9),
                partial(block_nanoseconds, speed.profile, name, narrow),
                partial(outside_nanoseconds, speed.profile, name, narrow),
            )
        )
    return found


def block_nanoseconds(profile: Profile, name: str, narrow: Architecture, block: Block) -> int:
    """What a block takes, rounded up, so that no sum is too small."""
    seconds: float = getattr(profile.block(block, narrow.hidden, narrow.family), name)
    return math.ceil(seconds * 1e9)


def outside_nanoseconds(
    profile: Profile, name: str, narrow: Architecture, formats: GroupFormats
) -> int:
    """What is outside the blocks takes, rounded up."""
    seconds: float = getattr(profile.outside(replace(narrow, outside_formats=formats)), name)
    return math.ceil(seconds * 1e9)


def limit(
    bound: Bound,
    teacher: Architecture,
    groups: Sequence[Sequence[Sequence[tuple[int, Option]]]],
) -> Limit:
    """What options of groups take of a resource; the number after the last block is outside."""
    outside = len(teacher.blocks)

    def amount(number: int, option: Option) -> int:
        if number == outside:
            return bound.of_outside(option.formats)
        return 0 if option.removed else bound.of_block(resized(teacher.blocks[number], option))

    amounts = [
        np.array([float(sum(amount(n, o) for n, o in choice)) for choice in options])
        for options in groups
    ]
    listed = any(choice[0][0] == outside for choice in groups[-1])
    return Limit(amounts, bound.most - (0 if listed else bound.of_outside(())))
