"""Proposals: from outer variables and the knapsack's answers to candidates worth measuring."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from compress.core.errors import Infeasible
from compress.core.quantities import format_bytes, format_count
from compress.formats.table import KV_FORMATS
from compress.searches.knapsack import Overlap, Solution, diverse, smallest, solve
from compress.searches.problem import Choice, Globals, Problem
from compress.student.candidate import Candidate

SEEDS = 4
# Log of a multiplier's range: scores of a kind of block may be off by a factor of two.
MULTIPLIER = math.log(2.0)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A decoded ask: the groups' options, the choice among them and the outer variables.

    ``gap`` is the relative optimality gap of the inner solution.
    """

    groups: list[list[Choice]]
    choice: tuple[int, ...]
    chosen: Globals
    predicted: float
    gap: float

    @property
    def picked(self) -> list[Choice]:
        """The chosen option of every group."""
        return [options[i] for options, i in zip(self.groups, self.choice, strict=True)]


def distributions(problem: Problem) -> dict[str, BaseDistribution]:
    """The outer variables of a problem."""
    found: dict[str, BaseDistribution] = {}
    if len(problem.space.kv_formats) > 1:
        found["kv_format"] = CategoricalDistribution(problem.space.kv_formats)
    for axis, choice in problem.space.axes.items():
        if choice.scope == "global":
            found[f"share_{axis}"] = CategoricalDistribution((1.0, *choice.keep))
    kinds: list[str] = sorted({block.kind for block in problem.teacher.blocks})
    scaled = kinds if problem.space.prunes else []
    if len(problem.space.formats) > 1 and problem.space.prunes:
        scaled = [*kinds, "format"]
    # One kind is the unit of the others.
    for name in scaled[1:]:
        found[f"log_{name}"] = FloatDistribution(-MULTIPLIER, MULTIPLIER)
    return found


def globals_of(problem: Problem, params: Mapping[str, Any]) -> Globals:
    """The outer choice that a trial's parameters spell."""
    return Globals(
        kv_format=params.get("kv_format", problem.space.kv_formats[0]),
        shares={k.removeprefix("share_"): v for k, v in params.items() if k.startswith("share_")},
        multipliers={
            k.removeprefix("log_"): math.exp(v) for k, v in params.items() if k.startswith("log_")
        },
    )


def neutral(problem: Problem) -> dict[str, Any]:
    """Parameters that change nothing: whole widths, multipliers 1, the first KV format."""
    return {
        name: 0.0 if name.startswith("log_") else getattr(d, "choices", (0.0,))[0]
        for name, d in distributions(problem).items()
    }


def decode(
    problem: Problem, params: Mapping[str, Any], overlaps: Sequence[Overlap] = ()
) -> Proposal | None:
    """The knapsack's answer to an outer choice; None if nothing fits."""
    chosen = globals_of(problem, params)
    groups = problem.groups(chosen)
    solution = solve(problem.knapsack(groups, chosen), overlaps)
    return None if solution is None else as_proposal(problem, groups, solution, chosen)


def as_proposal(
    problem: Problem, groups: list[list[Choice]], solution: Solution, chosen: Globals
) -> Proposal:
    """A solution with its predicted KL."""
    return Proposal(
        groups=groups,
        choice=solution.choice,
        chosen=chosen,
        predicted=predicted_kl(problem, groups, solution.choice, chosen),
        gap=solution.gap,
    )


def predicted_kl(
    problem: Problem, groups: list[list[Choice]], choice: Sequence[int], chosen: Globals
) -> float:
    """The KL of a choice under the scores as they are, multipliers aside."""
    plain = problem.knapsack(groups, replace(chosen, multipliers={}))
    cost = sum(float(c[i]) for c, i in zip(plain.costs, choice, strict=True))
    return cost + problem.global_cost(chosen)


def outer_variants(problem: Problem) -> list[dict[str, Any]]:
    """Outer choices to begin with: nothing changed, every single global change, all together."""
    variants = [neutral(problem)]
    shares = sorted({s for a in problem.space.axes.values() if a.scope == "global" for s in a.keep})
    dims = distributions(problem)
    for kv_format in problem.space.kv_formats:
        base = neutral(problem) | ({"kv_format": kv_format} if "kv_format" in dims else {})
        variants.append(base)
        for axis, choice in problem.space.axes.items():
            if choice.scope == "global":
                variants += [base | {f"share_{axis}": share} for share in choice.keep]
        for share in shares:
            # All global widths together, each at its nearest share.
            every = {
                f"share_{axis}": min((1.0, *c.keep), key=lambda s: abs(s - share))
                for axis, c in problem.space.axes.items()
                if c.scope == "global"
            }
            variants.append(base | every)
    return [v for i, v in enumerate(variants) if v not in variants[:i]]


def require_feasible(problem: Problem) -> None:
    """Refuse bounds that nothing in the space reaches; needs no scores.

    Raises:
        Infeasible: the message names the smallest reachable size, or number of active parameters.
    """
    variants = outer_variants(problem)
    floor = min(floor_bytes(problem, variant) for variant in variants)
    if floor > problem.budget:
        raise Infeasible(infeasible(problem, floor))
    if problem.active is not None:
        fewest = fewest_active(problem, variants)
        if fewest > problem.active:
            raise Infeasible(
                f"active_parameters {format_count(problem.active)} is below the fewest that this "
                f"space reaches within the budget, {format_count(fewest)} ({fewest} active "
                "parameters); what would help: more --active-parameters, a larger --budget, a "
                "space with smaller choices"
            )


def seeds(problem: Problem) -> list[tuple[dict[str, Any], Proposal]]:
    """First proposals: of one format each, best of every single global change, diverse ones of it.

    Those of one format come first, the most promising before the others: what is stopped early is
    no place to go on from.

    Raises:
        Infeasible: none of them fits; the message names the smallest reachable size.
    """
    require_feasible(problem)
    decoded = [(v, p) for v in outer_variants(problem) if (p := decode(problem, v)) is not None]
    decoded.sort(key=lambda pair: pair[1].predicted)
    new: dict[str, tuple[dict[str, Any], Proposal]] = {}
    for pair in decoded:
        new.setdefault(key_of(problem, pair[1]), pair)
    decoded = list(new.values())
    params, best = decoded[0]
    knapsack = problem.knapsack(best.groups, best.chosen)
    others = [
        (params, as_proposal(problem, best.groups, solution, best.chosen))
        for solution in diverse(knapsack, SEEDS // 2)[1:]
    ]
    alone = [(params, proposal) for proposal in single_formats(problem, params, best)]
    more = max(0, SEEDS - 1 - len(others) - len(alone))
    return [*alone, decoded[0], *others, *decoded[1 : 1 + more]]


def single_formats(problem: Problem, params: Mapping[str, Any], best: Proposal) -> list[Proposal]:
    """The best choice with one format for every block, for each format, best first.

    Predicted costs of cuts and of rounding are not equally wrong: these are cut blind to rounding,
    as when one prunes, then quantizes.
    """
    formats = problem.space.formats
    if len(formats) == 1 or not problem.space.prunes:
        return []
    found = []
    for format in formats:
        space = problem.space.model_copy(update={"formats": (format,)})
        alone = decode(replace(problem, space=space, blind_to_rounding=True), params)
        if alone is None:
            continue
        pairs = list(zip(best.groups, alone.picked, strict=True))
        # A shape that takes no format but BF16 has no such option where BF16 is not offered.
        if all(picked in options for options, picked in pairs):
            choice = tuple(options.index(picked) for options, picked in pairs)
            predicted = predicted_kl(problem, best.groups, choice, best.chosen)
            found.append(replace(alone, groups=best.groups, choice=choice, predicted=predicted))
    return sorted(found, key=lambda proposal: proposal.predicted)


def floor_bytes(problem: Problem, params: Mapping[str, Any]) -> int:
    """The smallest total size under an outer choice."""
    chosen = globals_of(problem, params)
    knapsack = problem.knapsack(problem.groups(chosen), chosen, priced=False)
    return smallest(knapsack) + problem.budget - knapsack.budget


def fewest_active(problem: Problem, variants: Sequence[Mapping[str, Any]]) -> int:
    """The fewest active parameters within the budget, exactly, if they exceed the bound.

    Otherwise those of the first outer choice that keeps it.
    """
    assert problem.active is not None
    found: list[int] = []
    for params in variants:
        chosen = globals_of(problem, params)
        knapsack = problem.knapsack(problem.groups(chosen), chosen, priced=False)
        [limit] = knapsack.limits
        least = solve(replace(knapsack, costs=limit.amounts, limits=()), relative_gap=0.0)
        if least is not None:
            found.append(problem.active - limit.bound + round(least.cost))
            if found[-1] <= problem.active:
                break
    return min(found)


def infeasible(problem: Problem, floor: int) -> str:
    """What does not fit, by how much, and what would."""
    hints = ["a larger --budget", "a shorter --context"]
    if set(KV_FORMATS) - set(problem.space.kv_formats):
        hints.append("a space with an FP8 KV cache")
    if len(problem.space.formats) == 1 or not problem.space.prunes:
        hints.append("--space joint")
    return (
        f"budget {format_bytes(problem.budget)} is below the smallest size this space reaches, "
        f"{format_bytes(floor)} ({floor} bytes); what would help: {', '.join(hints)}"
    )


def key_of(problem: Problem, proposal: Proposal) -> str:
    """What makes two proposals the same candidate, however their asks differ."""
    what = [
        (number, option.target, option.format, option.removed, option.repaired)
        for choice in proposal.picked
        for number, option in choice
    ]
    return repr((proposal.chosen.kv_format, problem.hidden(proposal.chosen), sorted(what)))


def named(problem: Problem, kind: str, number: int, proposal: Proposal) -> Candidate:
    """The candidate of a proposal: the kind and the number of its trial."""
    return problem.candidate(f"{kind}-{number:03}", kind, proposal.picked, proposal.chosen)
