"""How long the inner knapsack takes at the size of a large model, and its optimality gap.

``python -m benchmarks.knapsack``
"""

from typing import Any

import numpy as np

from benchmarks.common import Clock, arguments, report
from compress.searches.knapsack import Knapsack, Limit, Solution, solve

BLOCKS, OPTIONS = 200, 80


def knapsack(seed: int, share: float, *, limited: bool) -> Knapsack:
    """A problem of the size of a large model: costs fall with bytes, convexly, with noise."""
    draw = np.random.default_rng(seed)
    kept = np.sort(draw.random((BLOCKS, OPTIONS)))[:, ::-1]
    worth = np.exp(draw.normal(0, 1.5, (BLOCKS, 1)))
    costs = worth * (1 - kept) ** 2 * np.exp(draw.normal(0, 0.2, kept.shape))
    amounts = np.round(kept * 1e8 * draw.uniform(0.5, 2.0, (BLOCKS, 1)))
    active = np.round(amounts * draw.uniform(0.2, 0.6, kept.shape))

    def bound(values: Any) -> int:
        low, high = values.min(1).sum(), values.max(1).sum()
        return int(low + share * (high - low))

    limits = [Limit(list(active), bound(active))] if limited else []
    return Knapsack(list(costs), list(amounts), bound(amounts), limits=limits)


def solved(seed: int, share: float, *, limited: bool) -> dict[str, Any]:
    """Seconds and gap of one problem."""
    problem, clock = knapsack(seed, share, limited=limited), Clock()
    solution = solve(problem)
    seconds = clock.seconds
    assert isinstance(solution, Solution)
    return {
        "what": f"{BLOCKS} x {OPTIONS}, {'bytes and active' if limited else 'bytes'}, {share:.0%}",
        "seconds": seconds,
        "gap": solution.gap,
    }


def main() -> None:
    """Time knapsacks with one limit and with two."""
    settings = arguments(__doc__ or "", "embedded")
    rows = [
        solved(settings.seed, share, limited=limited)
        for limited in (False, True)
        for share in (0.3, 0.5, 0.7)
    ]
    report("knapsack", settings, {}, ("what", "seconds", "gap"), rows)


if __name__ == "__main__":
    main()
