"""Steps from a measured student: the knapsack again, with every option priced where it stands.

Costs at the teacher add up poorly once a third of it is gone: what a block is worth depends on what
is left around it. A tangent at the incumbent prices every option of every block against the one it
has now; a step changes few blocks, because the prices are local.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compress.scores import Scores, change, whole
from compress.searches.knapsack import Floats, Knapsack
from compress.searches.problem import Choice, Problem
from compress.space import Option
from compress.tangent import Tangent

# The share of the Gauss-Newton curvature that predicts finite changes best. Drawn labels overrate
# large steps; on SmolLM2 at 50 % of its blocks .5 to .6 had the least error (runs/README.md).
CURVATURE = 0.55


@dataclass(frozen=True)
class Stand:
    """Where a step begins: a tangent and the option of every block of the teacher."""

    point: Tangent
    options: dict[int, Option]


def stand(point: Tangent, picked: Sequence[Choice]) -> Stand:
    """The tangent at a choice of one option per group."""
    return Stand(point, dict(pair for choice in picked for pair in choice))


def step_cost(problem: Problem, at: Stand, number: int, option: Option) -> float:
    """Predicted change of the KL, nats per token, if one block takes another option."""
    if option == at.options[number]:
        return 0.0
    length = at.point.length
    slope, curvature = (
        option_rows(problem, scores, number, option)
        - option_rows(problem, scores, number, at.options[number])
        for scores in (
            Scores(at.point.slope, {}, 0.0, length),
            Scores(at.point.curvature, {}, 0.0, length),
        )
    )
    second = curvature.square().mean() / (2 * length)
    return float(slope.mean() / length + CURVATURE * second)


def option_rows(problem: Problem, scores: Scores, number: int, option: Option) -> Tensor:
    """Summed contributions [rows] of a block's option, against the whole block in BF16."""
    block = problem.teacher.blocks[number]
    if option.removed:
        return -whole(scores, block)
    return change(scores, block, problem.keep_of(number, option), option.format)


def step_knapsack(
    problem: Problem, at: Stand, knapsack: Knapsack, groups: Sequence[Sequence[Choice]]
) -> Knapsack:
    """The inner problem with the costs of steps: zero for the options that are taken now."""
    costs: list[Floats] = [
        np.array(
            [
                sum(step_cost(problem, at, number, option) for number, option in choice)
                for choice in options
            ]
        )
        for options in groups
    ]
    return Knapsack(costs, knapsack.bytes, knapsack.budget, knapsack.at_least_one)
