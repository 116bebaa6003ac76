"""Proposals: from a global choice and the knapsack's answer to what is worth measuring."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from compress.core.errors import Infeasible
from compress.core.quantities import format_bytes, format_count
from compress.formats.table import KV_FORMATS, KvFormat, by_group
from compress.searches.knapsack import Knapsack, Solution, diverse, smallest, solve
from compress.searches.problem import Choice, Globals, Problem, taken
from compress.searches.space import Option
from compress.student.candidate import Candidate

SEEDS = 4


@dataclass(frozen=True)
class Proposal:
    """What may be measured: the option of every block, by number, and the global choice.

    ``predicted`` is its KL by the scores, nats per token; ``gap`` the relative optimality gap of
    the knapsack that it solves.
    """

    options: tuple[Option, ...]
    globals_: Globals
    predicted: float
    gap: float


def distributions(problem: Problem) -> dict[str, CategoricalDistribution]:
    """The global variables of a problem, as parameters of a trial."""
    found = {}
    if len(of_all := kv_of_all(problem)) > 1:
        found["kv_format"] = CategoricalDistribution(of_all)
    for axis, choice in problem.space.axes.items():
        if choice.scope == "global":
            found[f"share_{axis}"] = CategoricalDistribution((1.0, *choice.keep))
    return found


def kv_of_all(problem: Problem) -> tuple[KvFormat | None, ...]:
    """The KV formats that all blocks may have together; None: each as it chooses."""
    return problem.space.kv_formats if problem.space.kv_scope == "global" else (None,)


def globals_of(problem: Problem, params: Mapping[str, Any]) -> Globals:
    """The global choice that a trial's parameters spell; whole widths where they say nothing."""
    return Globals(
        kv_format=params.get("kv_format", kv_of_all(problem)[0]),
        shares={k.removeprefix("share_"): v for k, v in params.items() if k.startswith("share_")},
    )


def params_of(problem: Problem, globals_: Globals) -> dict[str, Any]:
    """The parameters that spell a global choice."""
    shares = {f"share_{axis}": globals_.shares.get(axis, 1.0) for axis in problem.space.axes}
    found = {"kv_format": globals_.kv_format, **shares}
    return {name: found[name] for name in distributions(problem)}


def attributes_of(proposal: Proposal) -> dict[str, Any]:
    """What the journal keeps of a proposal beside its parameters; needs nothing to be read."""
    choice = [
        asdict(option) | {"target": dict(option.target), "formats": dict(option.formats)}
        for option in proposal.options
    ]
    return {"choice": choice, "predicted": proposal.predicted, "gap": proposal.gap}


def decode_trial(problem: Problem, trial: FrozenTrial) -> Proposal:
    """The proposal that a trial of the journal measures."""
    kept, globals_ = trial.user_attrs, globals_of(problem, trial.params)
    options = tuple(
        Option(
            tuple(sorted(found["target"].items())),
            by_group(found["formats"]),
            found["kv_format"],
            found["removed"],
        )
        for found in kept["choice"]
    )
    return Proposal(options, globals_, kept["predicted"], kept["gap"])


def complete(trial: FrozenTrial) -> bool:
    """Whether a trial was measured on all sequences."""
    return trial.state == TrialState.COMPLETE


def incumbent(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The best of those that were measured on all sequences."""
    return min(filter(complete, trials), key=lambda trial: trial.value or 0.0, default=None)


def decode(problem: Problem, globals_: Globals) -> Proposal | None:
    """The knapsack's answer to a global choice; None if nothing fits."""
    groups = problem.groups(globals_)
    solution = solve(problem.knapsack(groups, globals_))
    return None if solution is None else as_proposal(problem, groups, solution, globals_)


def as_proposal(
    problem: Problem, groups: Sequence[Sequence[Choice]], solution: Solution, globals_: Globals
) -> Proposal:
    """A solution with its predicted KL."""
    options = taken(groups, solution.choice)
    return Proposal(options, globals_, problem.predicted(options, globals_), solution.gap)


def variants(problem: Problem) -> list[Globals]:
    """Global choices to begin with: nothing changed, every single change, all widths together."""
    keeps = {a: axis.keep for a, axis in problem.space.axes.items() if axis.scope == "global"}
    widths: list[dict[str, float]] = [{}]
    widths += [{axis: share} for axis, keep in keeps.items() for share in keep]
    for share in sorted({share for keep in keeps.values() for share in keep}):
        # All of them together, each at its nearest share.
        near = ((a, min((1.0, *keep), key=lambda s: abs(s - share))) for a, keep in keeps.items())
        widths.append(dict(near))
    different = [shares for i, shares in enumerate(widths) if shares not in widths[:i]]
    return [Globals(kv, shares) for kv in kv_of_all(problem) for shares in different]


def require_feasible(problem: Problem) -> None:
    """Refuse bounds that nothing in the space reaches; needs no scores.

    Raises:
        Infeasible: the message names the smallest reachable size, or number of active parameters.
    """
    space, choices = problem.space, variants(problem)
    knapsacks = [one for one in (unpriced(problem, choice) for choice in choices) if one.possible]
    floor = min(smallest(one) + problem.budget - one.room for one in knapsacks)
    if floor > problem.budget:
        hints = ["a larger --budget", "a shorter --context"]
        if set(KV_FORMATS) - set(space.kv_formats):
            hints.append("a space with an FP8 KV cache, where the device runs one")
        if len(space.formats) == 1 or not space.prunes:
            hints.append("--space joint")
        if space.stock or space.kv_scope == "global":
            hints.append("--target compress, which takes more than servers do")
        raise Infeasible(
            f"budget {format_bytes(problem.budget)} is below the smallest size this space reaches, "
            f"{format_bytes(floor)} ({floor} bytes); what would help: {', '.join(hints)}"
        )
    if problem.active is not None and (
        (fewest := least_of(0, problem.active, knapsacks)) > problem.active
    ):
        raise Infeasible(
            f"active_parameters {format_count(problem.active)} is below the fewest that this "
            f"space reaches within the budget, {format_count(fewest)} ({fewest} active "
            "parameters); what would help: more --active-parameters, a larger --budget, a "
            "space with smaller choices"
        )
    bounds = problem.speed.bounds if problem.speed else {}
    for at, (name, most) in enumerate(bounds.items(), 0 if problem.active is None else 1):
        least = least_of(at, math.floor(most * 1e9), knapsacks) / 1e9
        if least > most:
            raise Infeasible(
                f"the fastest that this space reaches within the budget takes {least * 1e3:.2f} ms "
                f"of a {name} by the profile, more than the {most * 1e3:.2f} ms that are asked; "
                "what would help: a lower bound on the speed, a space with smaller choices"
            )


def seeds(problem: Problem) -> list[Proposal]:
    """First proposals: of one format each, best of every single global change, diverse ones of it.

    Those of one format come first, the most promising before the others: what is stopped early is
    no place to go on from.

    Raises:
        Infeasible: none of them fits; the message names the smallest reachable size.
    """
    require_feasible(problem)
    decoded = [found for choice in variants(problem) if (found := decode(problem, choice))]
    decoded.sort(key=lambda proposal: proposal.predicted)
    different: dict[tuple[object, ...], Proposal] = {}
    for proposal in decoded:
        different.setdefault(identity(problem, proposal), proposal)
    best, *others = different.values()
    groups, globals_ = problem.groups(best.globals_), best.globals_
    apart = diverse(problem.knapsack(groups, globals_), SEEDS // 2)[1:]
    alone = single_formats(problem, globals_)
    first = [*alone, best, *(as_proposal(problem, groups, found, globals_) for found in apart)]
    return first + others[: max(0, SEEDS - len(first))]


def single_formats(problem: Problem, globals_: Globals) -> list[Proposal]:
    """The best choice with one format for every block, for each format, best first.

    Predicted costs of cuts and of rounding are not equally wrong: these are cut blind to rounding,
    as when one prunes, then quantizes.
    """
    formats = problem.space.formats
    if len(formats) == 1 or not problem.space.prunes:
        return []
    offered = [set(options) for options in problem.groups(globals_)]
    found = []
    for format in formats:
        space = problem.space.model_copy(update={"formats": (format,)})
        blind = replace(problem, space=space, blind_to_rounding=True)
        groups = blind.groups(globals_)
        solution = solve(blind.knapsack(groups, globals_))
        # A shape that takes no format but BF16 has no such option where BF16 is not offered.
        if solution is not None and all(
            options[i] in others
            for options, i, others in zip(groups, solution.choice, offered, strict=True)
        ):
            found.append(as_proposal(problem, groups, solution, globals_))
    return sorted(found, key=lambda proposal: proposal.predicted)


def unpriced(problem: Problem, globals_: Globals) -> Knapsack:
    """The knapsack of a global choice without costs."""
    return problem.knapsack(problem.groups(globals_), globals_, priced=False)


def least_of(at: int, bound: int, knapsacks: Sequence[Knapsack]) -> int:
    """The least that is taken of a limit within the budget, exactly, if it exceeds the bound.

    Otherwise that of the first knapsack, one per global choice, that keeps it.
    """
    found: list[int] = []
    for knapsack in knapsacks:
        limit = knapsack.limits[at]
        least = solve(replace(knapsack, costs=limit.amounts, limits=()), relative_gap=0.0)
        if least is not None:
            found.append(bound - limit.bound + round(least.cost))
            if found[-1] <= bound:
                break
    return min(found)


def identity(problem: Problem, proposal: Proposal) -> tuple[object, ...]:
    """What makes two proposals the same candidate, however their global choices are spelled."""
    return problem.hidden(proposal.globals_), proposal.options


def candidate_of(problem: Problem, kind: str, number: int, proposal: Proposal) -> Candidate:
    """The candidate of a proposal: the kind and the number of its trial."""
    return problem.candidate(f"{kind}-{number:03}", kind, proposal.options, proposal.globals_)
