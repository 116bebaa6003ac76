"""Our search under a limit of token-forwards: the product's study, stopped when it is spent.

As in the product, the best few are measured on fresh text too, which the limit pays for.
"""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import BACKWARD
from benchmarks.search_methods import Trials
from compress.measure.kl import measure
from compress.scores.tangent import Tangent, tangent, turn
from compress.searches.study import StudySettings, explore
from compress.student.candidate import Candidate

# More than any limit pays for.
MANY = 10_000
# Candidates that are measured on fresh text as well.
FINALISTS = 3


class SpentError(Exception):
    """The next step would cost more than is left."""


def ours(trials: Trials) -> Candidate:
    """Seeds, samples and steps until the limit; of the best few the best on all text."""
    found: list[tuple[float, Candidate]] = []
    # Of the teacher and of the finalists.
    kept = (1 + FINALISTS) * trials.whole

    def measured(candidate: Candidate) -> Iterator[Tensor]:
        pay(trials, 0, trials.whole + kept)
        values = []
        for batch in measure(candidate, trials.text, trials.grams):
            trials.cost.add(len(batch) * trials.text.tokens.shape[1])
            values.append(batch)
            yield batch
        found.append((float(torch.cat(values).mean()), candidate))

    # Tangents are of other text than the trials.
    slopes_text = trials.slopes_text()

    def linearize(candidate: Candidate, number: int) -> Tangent:
        text = turn(slopes_text, number)
        # A forward and a backward pass.
        price = (1 + BACKWARD) * text.tokens.numel()
        pay(trials, price, price + trials.whole + kept)
        return tangent(trials.stack, candidate, text, [], trials.grams)

    with tempfile.TemporaryDirectory() as folder:
        settings = StudySettings(
            name="ours", kind="ours", trials=MANY, journal=Path(folder) / "journal.log",
            tokens_per_sequence=trials.text.tokens.shape[1],
        )  # fmt: skip
        with suppress(SpentError):
            explore(trials.problem, settings, measured, linearize=linearize)
    assert found, "the limit pays for no measurement"
    fresh = trials.fresh()
    trials.cost.add(fresh.tokens.numel())
    for kl, candidate in sorted(found, key=lambda pair: pair[0])[:FINALISTS]:
        trials.cost.add(fresh.tokens.numel())
        again = torch.cat(list(measure(candidate, fresh, trials.grams)))
        trials.offer((kl + float(again.mean())) / 2, candidate)
    assert trials.best is not None
    return trials.best[1]


def pay(trials: Trials, price: float, needed: float) -> None:
    """Count a price if what is needed is left."""
    if trials.left < needed:
        raise SpentError
    trials.cost.add(price)
