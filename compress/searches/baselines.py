"""What people do without a search, at the same bytes: uniform cuts, random cuts, one lever only."""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from compress.formats.table import FORMATS, KV_FORMATS, Format, KvFormat
from compress.model.architecture import kv_format_of, sizes
from compress.model.families import count_active
from compress.searches.knapsack import Limit, excesses
from compress.searches.problem import Globals, Problem, taken, total_bytes
from compress.searches.program import Floats
from compress.searches.proposals import kv_of_all
from compress.searches.space import (
    KINDS,
    Option,
    Space,
    admissible,
    asked_kinds,
    last_attention_must_stay,
    offered_formats,
    resized,
)
from compress.student.candidate import Candidate
from compress.student.units import AXES, UNITS, axes_in, mtp_axes

FFN_AXES = {a for axes in AXES.values() for a, axis in axes.items() if axis.width}
# Shares of the uniform cut, in steps of 1/256 of a width.
STEPS = 256
# Grouped matrix products, which stock loaders run experts with, want rows of 16 bytes.
EXPERT_STEP, EXPERT_AXES = 8, ("expert_ffn", "latent")
# Axes that groups run along: a width that is no multiple of a group stays BF16.
GROUPED_AXES = {
    u.axes[-1] for arrays in UNITS.values() for u in arrays if u.scalar or u.cut[u.axes[-1]].width
}
# Kinds that need no search, only cuts.
FREE = ("uniform", "random")


def main_kind(space: Space) -> str:
    """What a search of this space produces."""
    if not space.prunes:
        return "formats"
    return "joint" if len(space.formats) > 1 else "prune"


def variants(space: Space, offered: Sequence[Format], kv: Sequence[KvFormat]) -> dict[str, Space]:
    """The spaces of the searched kinds, by study name: the same structure with other formats.

    ``offered`` are the formats of the target. Prune-then-quantize has a study per format.
    """
    whole = {"axes": {}, "remove": "none"}

    def stored(formats: Sequence[Format], structure: Mapping[str, object]) -> Space:
        heads = tuple(f for f in space.head_formats if f in {"bf16", *formats}) or ("bf16",)
        found = {
            "formats": tuple(formats), "kv_formats": tuple(kv), "head_formats": heads, **structure
        }  # fmt: skip
        return space.model_copy(update=found)

    cut = {} if space.prunes else {"remove": "block"}
    found = {"joint": stored(offered, cut), "prune": stored(["bf16"], cut)}
    found["formats"] = stored(offered, whole)
    rounded = [format for format in offered if format != "bf16"]
    return found | {f"prune_then_quantize-{format}": stored([format], cut) for format in rounded}


def baselines(space: Space, named: Mapping[str, Space], asked: str | None) -> list[str]:
    """The kinds to compare with: ``all``, ``none`` or some, separated by commas.

    Not asked for: those whose space (of ``named``, by study) is a part of the searched one, and
    the free ones.
    """
    if asked == "none":
        return []
    if asked not in (None, "all"):
        return [kind for kind in KINDS if kind in asked_kinds(asked)]
    parts = {
        kind_of(name)
        for name, part in named.items()
        if set(part.formats) <= set(space.formats) and (space.prunes or not part.prunes)
    }
    return [kind for kind in KINDS if asked == "all" or kind in {*parts, *FREE}]


def kind_of(study: str) -> str:
    """The kind of a study's candidates: studies are named ``kind`` or ``kind-variant``."""
    return study.partition("-")[0]


def uniform(problem: Problem, format: Format = "bf16") -> list[tuple[Candidate, float]]:
    """The widest uniform cut that fits with every block in one format, per KV format.

    One share for all FFN widths; where that is not enough, for every axis that can be cut. With
    another format than BF16 that is cut first, then quantize, without a search.

    Returns:
        Candidates with their predicted KL; none where no cut fits.
    """
    kind = "uniform" if format == "bf16" else f"uniform_then_{format}"
    found: list[tuple[Candidate, float]] = []
    for kv_format in problem.space.kv_formats:
        for axes in (FFN_AXES, {axis for found in AXES.values() for axis in found}):
            fitting = widest(problem, axes, format, kv_format)
            if fitting is not None:
                found.append(made(problem, kind, len(found), fitting, Globals()))
                break
    return found


def widest(
    problem: Problem, axes: Collection[str], format: Format, kv_format: KvFormat
) -> list[Option] | None:
    """The largest uniform share of the axes that is within the budget."""
    low, high = 0, STEPS
    while low < high:
        middle = (low + high + 1) // 2
        options = at_share(problem, middle / STEPS, axes, format, kv_format)
        low, high = (middle, high) if fits(problem, options) else (low, middle - 1)
    options = at_share(problem, low / STEPS, axes, format, kv_format)
    return options if fits(problem, options) else None


def at_share(
    problem: Problem,
    share: float,
    axes: Collection[str],
    format: Format = "bf16",
    kv_format: KvFormat = "bf16",
) -> list[Option]:
    """Every block with this share of its axes, at least one unit (top-k experts) of each.

    A block whose shapes refuse the format stays BF16.
    """
    teacher, options = problem.teacher, list[Option]()
    axes = set(axes) - mtp_axes(teacher)
    space = problem.space.model_copy(update={"formats": (format,)})
    for block in teacher.blocks:
        target = {}
        for axis in axes_in(block):
            size, step = sizes(block)[axis], step_of(axis, format)
            count = max(step, int(share * size) // step * step)
            if axis in axes and count < size and admissible(block, {axis: count}):
                target[axis] = count
        cut = Option(tuple(sorted(target.items())))
        [offered] = offered_formats(teacher, block, resized(block, cut), teacher.hidden, space)
        own = KV_FORMATS[0] if kv_format_of(block) is None else kv_format
        options.append(replace(cut, formats=offered, kv_format=own))
    return options


def step_of(axis: str, format: Format) -> int:
    """What counts of an axis are multiples of, so that the format and stock loaders take them."""
    group = FORMATS[format].group if axis in GROUPED_AXES else 1
    return math.lcm(group, EXPERT_STEP if axis in EXPERT_AXES else 1)


def fits(problem: Problem, options: Sequence[Option]) -> bool:
    """Whether a choice is within the budget, and the bounds on active parameters and speed."""
    candidate = problem.candidate("x", "x", options, Globals())
    few = problem.active is None or count_active(candidate.architecture) <= problem.active
    fast = problem.speed is None or problem.speed.kept(candidate.architecture)
    return few and fast and total_bytes(candidate, problem.deployment) <= problem.budget


def randomly(problem: Problem, count: int, seed: int) -> list[tuple[Candidate, float]]:
    """Random cuts of a problem's space: groups take random smaller options until all fits."""
    found: list[tuple[Candidate, float]] = []
    for number in range(count):
        draw = random.Random(seed * 7919 + number)
        globals_ = Globals(kv_format=draw.choice(kv_of_all(problem)))
        groups = problem.groups(globals_)
        knapsack = problem.knapsack(groups, globals_, priced=False)
        choice = [0] * len(groups)
        takes = knapsack.resources
        left = -np.array(excesses(knapsack, choice))
        smaller = [(g, o) for g, options in enumerate(groups) for o in range(1, len(options))]
        draw.shuffle(smaller)
        for group, option in smaller:
            if left.min() >= 0:
                break
            more = changed(takes, group, choice[group], option)
            if more.max() <= 0 and more.min() < 0:
                choice[group], left = option, left - more
        # What the last step cut too much is given back where it fits, again at random.
        for group, option in sorted(smaller, key=lambda pair: draw.random()):
            more = changed(takes, group, choice[group], option)
            if more.min() >= 0 and more.max() > 0 and (more <= left).all():
                choice[group], left = option, left - more
        options = taken(groups, choice)
        attention = last_attention_must_stay(problem.teacher)
        alive = any(not options[number].removed for number in attention)
        if left.min() >= 0 and alive:
            found.append(made(problem, "random", number, options, globals_))
    return found


def changed(takes: Sequence[Limit], group: int, before: int, after: int) -> Floats:
    """What a group takes more of every resource with another option."""
    return np.array([limit.amounts[group][after] - limit.amounts[group][before] for limit in takes])


def made(
    problem: Problem, kind: str, number: int, options: Sequence[Option], globals_: Globals
) -> tuple[Candidate, float]:
    """A baseline's candidate and its predicted KL."""
    candidate = problem.candidate(f"{kind}-{number:03}", kind, options, globals_)
    return candidate, problem.predicted(options, globals_)
