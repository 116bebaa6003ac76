"""From scores and a space to knapsacks, and from a choice back to a candidate."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from compress.formats.table import KV_FORMATS, Format, GroupFormats, KvFormat, used_in
from compress.memory.footprint import (
    Deployment,
    block_bytes,
    footprint,
    mtp_bytes,
    outside_bytes,
    state_bytes,
)
from compress.memory.latency import SpeedBound
from compress.model.architecture import Architecture, block_name
from compress.scores.costs import (
    Scores,
    choose,
    cut_cost,
    kl_of,
    priority,
    removed,
    rounding_rows,
    top,
)
from compress.searches.knapsack import Knapsack
from compress.searches.limits import bounds, limit
from compress.searches.space import (
    REMOVED,
    Option,
    Space,
    block_options,
    counts,
    last_attention_must_stay,
    outside_options,
    resized,
)
from compress.student.candidate import Candidate, Ranking, student_architecture

# The share of a block's squared error that repair leaves, from its number and kept indices; those
# of its other cuts are made at once.
Repairs = Callable[[int, Sequence[Mapping[str, Tensor]]], list[float]]
# Counts of a cut by axis.
Target = tuple[tuple[str, int], ...]
# Summed contributions [rows] of a block's cut in a format of a group, or ("", BF16) of the cut.
Parts = dict[tuple[int, Target, str, Format], Tensor]
# One option of a group: what each of its blocks does.
Choice = tuple[tuple[int, Option], ...]


@dataclass(frozen=True)
class Globals:
    """What one value decides for the whole model: the outer problem's variables.

    ``shares`` of axes whose width is one for all blocks; an axis that is not named stays whole.
    ``kv_format`` is None where every block has a choice of its own.
    """

    kv_format: KvFormat | None = None
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Problem:
    """A teacher, its scores, a space and a budget; costs of options are computed once.

    Without scores it only answers what fits. ``blind_to_rounding`` leaves the cost of formats out
    of the choice (prune, then quantize). ``active`` bounds the parameters that one token uses and
    ``speed`` the seconds that a profile predicts,
    ``ranking`` decides which units stay, not what they cost. With ``repair_ratios`` every cut block
    is repaired. Where only whole layers may go, one costs the sum of what its blocks cost alone.
    """

    teacher: Architecture
    scores: Scores | None
    space: Space
    deployment: Deployment
    budget: int
    blind_to_rounding: bool = False
    active: int | None = None
    ranking: Ranking = "contribution"
    repair_ratios: Repairs | None = None
    speed: SpeedBound | None = None
    costs: dict[tuple[int, Option], tuple[float, float]] = field(default_factory=dict)
    keeps: dict[tuple[int, Option], dict[str, Tensor]] = field(default_factory=dict)
    ratios: dict[tuple[int, Target], float] = field(default_factory=dict)
    cuts: dict[tuple[int, Target], float] = field(default_factory=dict)
    rows: Parts = field(default_factory=dict)

    @property
    def known(self) -> Scores:
        """The scores; a problem without them knows bytes only."""
        assert self.scores is not None
        return self.scores

    @property
    def outside(self) -> int:
        """The number that embedding and head have among the blocks, where they have a choice."""
        return len(self.teacher.blocks)

    def hidden(self, globals_: Globals) -> int:
        """Hidden size under its share."""
        share = globals_.shares.get("hidden", 1.0)
        size = self.teacher.hidden
        return size if share == 1 else counts("hidden", size, (share,))[-1]

    def may_go(self, numbers: Sequence[int]) -> bool:
        """Whether the space offers to remove these blocks, which go together."""
        begins = numbers == [0] and self.teacher.blocks[0].kind == self.space.first
        return self.space.remove != "none" and not begins

    def groups(self, globals_: Globals, here: Sequence[Option] = ()) -> list[list[Choice]]:
        """Options of every group: a block, or a layer where only whole layers may go.

        Of the formats of one cut those that cost less the more bytes they take, those where all
        linear groups agree, and those of the options ``here`` of all blocks.
        """
        hidden, members = self.hidden(globals_), dict[int, list[int]]()
        for number, block in enumerate(self.teacher.blocks):
            key = block.layer if self.space.remove == "layer" else number
            members.setdefault(key, []).append(number)

        def kept(number: int) -> list[tuple[int, Option]]:
            chosen = globals_.shares, hidden, globals_.kv_format
            options = list(block_options(self.teacher, number, self.space, *chosen))
            if self.space.format_scope == "group":
                always = set(here[number].formats for number in [number] if here)
                options = self.undominated(number, options, globals_, always)
            return [(number, option) for option in options]

        found: list[list[Choice]] = []
        for numbers in members.values():
            gone = [tuple((n, REMOVED) for n in numbers)] if self.may_go(numbers) else []
            found.append([*itertools.product(*map(kept, numbers)), *gone])
        beside = outside_options(self.teacher, hidden, self.space)
        # BF16 alone is no choice.
        if len(beside) > 1 or beside[0].formats:
            found.append([((self.outside, option),) for option in beside])
        return found

    def undominated(
        self, number: int, options: Sequence[Option], globals_: Globals, always: Set[GroupFormats]
    ) -> list[Option]:
        """Options of a block without those of which another of the same cut costs no more.

        That is, of no more bytes.
        """
        cuts: dict[Option, list[tuple[int, float, int]]] = {}
        for at, option in enumerate(options):
            cost = self.cost(number, option)[1] if self.scores and option.formats else 0.0
            taken = self.option_bytes(number, option, globals_)
            cuts.setdefault(replace(option, formats=()), []).append((taken, cost, at))
        kept = set[int]()
        for found in cuts.values():
            least = math.inf
            for _, cost, at in sorted(found):
                formats = options[at].formats
                if cost < least or len(used_in(formats)) == 1 or formats in always:
                    kept.add(at)
                least = min(least, cost)
        return [option for at, option in enumerate(options) if at in kept]

    def keep_of(self, number: int, option: Option) -> dict[str, Tensor]:
        """Kept indices of a block under an option."""
        key = (number, Option(option.target))
        if key not in self.keeps:
            block = self.teacher.blocks[number]
            self.keeps[key] = choose(self.known, block, dict(option.target), self.ranking)
        return self.keeps[key]

    def cost(self, number: int, option: Option) -> tuple[float, float]:
        """Predicted KL of an option's structure and cache, and what its weights' format adds."""
        if (number, option) in self.costs:
            return self.costs[number, option]
        structure = rounding = 0.0
        if number == self.outside:
            structure = self.exact_cost(number, option)
        elif option.removed:
            structure = removed(self.known, self.teacher.blocks[number])
        else:
            structure = self.cut(number, option) + self.exact_cost(number, option)
            # Weights are rounded alike whatever the cache is.
            alike = replace(option, kv_format=KV_FORMATS[0])
            if alike != option:
                rounding = self.cost(number, alike)[1]
            elif (rows := self.rounding(number, option)) is not None:
                rounding = kl_of(rows, self.known.length)
        self.costs[number, option] = structure, rounding
        return structure, rounding

    def cut(self, number: int, option: Option) -> float:
        """Predicted KL of an option's cut, as its repair leaves it."""
        key = (number, option.target)
        if key not in self.cuts:
            keep = self.keep_of(number, option)
            cost = cut_cost(self.known, self.teacher.blocks[number], keep) if keep else 0.0
            self.cuts[key] = cost * self.share_left_by_repair(number, option)
        return self.cuts[key]

    def rounding(self, number: int, option: Option) -> Tensor | None:
        """Summed contributions [rows] of an option's formats; None in BF16."""
        found = []
        for group, format in option.formats:
            key = (number, option.target, group, format)
            if format != "bf16" and key not in self.rows:
                own = self.teacher.blocks[number], self.keep_of(number, option), group, format
                self.rows[key] = rounding_rows(self.known, *own)
            found += [self.rows[key]] if format != "bf16" else []
        return torch.stack(found).sum(0) if found else None

    def exact_cost(self, number: int, option: Option) -> float:
        """Measured KL of the KV format of an option, or of the formats of embedding and head."""
        if number == self.outside:
            asked = (f"{group}/{format}" for group, format in option.formats if format != "bf16")
            return sum(self.known.outside[key] for key in asked)
        if option.removed or option.kv_format == KV_FORMATS[0]:
            return 0.0
        return self.known.kv[f"{block_name(self.teacher.blocks[number])}/{option.kv_format}"]

    def price(self, choice: Choice) -> float:
        """Predicted KL of one option of a group, as far as the choice of options sees it."""
        pairs = [self.cost(number, option) for number, option in choice]
        return sum(cut + (0.0 if self.blind_to_rounding else bits) for cut, bits in pairs)

    def predicted(self, options: Sequence[Option], globals_: Globals) -> float:
        """Predicted KL of the options of all blocks, by number, and of the global choice."""
        return self.price(tuple(enumerate(options))) + self.global_cost(globals_)

    def share_left_by_repair(self, number: int, option: Option) -> float:
        """The share of an option's structure cost that its repair leaves; 1 without repair."""
        if self.repair_ratios is None or not option.target:
            return 1.0
        if (number, option.target) not in self.ratios:
            # All cuts of a block at once.
            known = block_options(self.teacher, number, self.space, {}, self.teacher.hidden)
            targets = dict.fromkeys(o.target for o in (option, *known) if o.target)
            keeps = [self.keep_of(number, Option(target)) for target in targets]
            found = self.repair_ratios(number, keeps)
            self.ratios |= {(number, t): r for t, r in zip(targets, found, strict=True)}
        return self.ratios[number, option.target]

    def option_bytes(self, number: int, option: Option, globals_: Globals) -> int:
        """Bytes that a block takes under an option: weights, KV cache and states."""
        if option.removed:
            return 0
        if number == self.outside:
            narrow = replace(self.teacher, hidden=self.hidden(globals_))
            return outside_bytes(replace(narrow, outside_formats=option.formats))
        block = resized(self.teacher.blocks[number], option)
        held = sum(state_bytes(block, self.deployment))
        return block_bytes(block, self.hidden(globals_), self.teacher.family) + held

    def knapsack(
        self, groups: Sequence[Sequence[Choice]], globals_: Globals, *, priced: bool = True
    ) -> Knapsack:
        """The inner problem under a global choice; not ``priced``, with bytes only."""
        narrow = replace(self.teacher, hidden=self.hidden(globals_))
        beside = mtp_bytes(narrow, self.deployment)
        if not any(choice[0][0] == self.outside for choice in groups[-1]):
            beside += outside_bytes(narrow)
        attention = set(last_attention_must_stay(self.teacher))
        survivors = [
            (g, o)
            for g, options in enumerate(groups)
            for o, choice in enumerate(options)
            if any(n in attention and not option.removed for n, option in choice)
        ]

        def taken_by(choice: Choice) -> float:
            return float(sum(self.option_bytes(n, o, globals_) for n, o in choice))

        return Knapsack(
            costs=[np.array([self.price(c) if priced else 0.0 for c in group]) for group in groups],
            bytes=[np.array([taken_by(choice) for choice in group]) for group in groups],
            room=self.budget - beside - self.deployment.workspace_bytes,
            at_least_one=[survivors] if survivors else [],
            limits=[
                limit(b, self.teacher, groups) for b in bounds(narrow, self.active, self.speed)
            ],
        )

    def global_cost(self, globals_: Globals) -> float:
        """Predicted KL of the hidden size."""
        if (hidden := self.hidden(globals_)) == self.teacher.hidden:
            return 0.0
        gone = torch.ones(self.teacher.hidden).index_fill_(0, self.hidden_keep(hidden), 0)
        return kl_of(self.known.contributions["hidden"] @ gone, self.known.length)

    def hidden_keep(self, hidden: int) -> Tensor:
        """The most important hidden channels."""
        return top(priority(self.known, None, "hidden", self.ranking), hidden)

    def candidate(
        self, name: str, kind: str, options: Sequence[Option], globals_: Globals
    ) -> Candidate:
        """The candidate of an option for every block, by number."""
        inside, beside = options[: self.outside], options[self.outside :]
        alive = [n for n, option in enumerate(inside) if not option.removed]
        keep: dict[str, Tensor] = {"blocks": torch.tensor(alive, dtype=torch.long)}
        if (hidden := self.hidden(globals_)) < self.teacher.hidden:
            keep["hidden"] = self.hidden_keep(hidden)
        for number in alive:
            prefix = block_name(self.teacher.blocks[number])
            own = self.keep_of(number, options[number])
            keep |= {f"{prefix}/{axis}": index for axis, index in own.items()}
        formats = {number: options[number].formats for number in alive}
        kv_formats = {number: options[number].kv_format for number in alive}
        student = student_architecture(self.teacher, keep, formats, kv_formats)
        if beside:
            student = replace(student, outside_formats=beside[0].formats)
        cut = frozenset(number for number in alive if options[number].target)
        repaired = cut if self.repair_ratios else frozenset()
        return Candidate(id=name, kind=kind, architecture=student, keep=keep, repaired=repaired)


def taken(groups: Sequence[Sequence[Choice]], choice: Sequence[int]) -> tuple[Option, ...]:
    """The option of every block, by number, where each group takes the option of this index."""
    picked = dict(pair for options, i in zip(groups, choice, strict=True) for pair in options[i])
    return tuple(picked[number] for number in range(len(picked)))


def total_bytes(candidate: Candidate, deployment: Deployment) -> int:
    """Bytes that serving a candidate takes."""
    return footprint(candidate.architecture, deployment).total
