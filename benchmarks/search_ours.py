"""Our search under a limit of token-forwards: the product's study, stopped when it is spent."""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import BACKWARD
from benchmarks.search_methods import Trials
from compress.candidate import Candidate
from compress.searches.measure import measure
from compress.searches.study import StudySettings, explore
from compress.tangent import Tangent, tangent, turn

# More than any limit pays for.
MANY = 10_000


class SpentError(Exception):
    """The next step would cost more than is left."""


def ours(trials: Trials) -> Candidate:
    """Seeds, samples and steps until the limit; the best complete trial."""

    def measured(candidate: Candidate) -> Iterator[Tensor]:
        pay(trials, 0, trials.whole)
        values = []
        for batch in measure(candidate, trials.text, trials.grams):
            trials.cost.add(len(batch) * trials.text.tokens.shape[1])
            values.append(batch)
            yield batch
        trials.offer(float(torch.cat(values).mean()), candidate)

    # Tangents are of other text than the trials.
    slopes_text = trials.more()
    trials.cost.add(slopes_text.tokens.numel())

    def linearize(candidate: Candidate, number: int) -> Tangent:
        text = turn(slopes_text, number)
        # A forward and a backward pass.
        price = (1 + BACKWARD) * text.tokens.numel()
        pay(trials, price, price + trials.whole)
        return tangent(trials.model, candidate, text, [], trials.grams)

    with tempfile.TemporaryDirectory() as folder:
        settings = StudySettings(
            name="ours", kind="ours", trials=MANY, journal=Path(folder) / "journal.log",
            tokens_per_sequence=trials.text.tokens.shape[1],
        )  # fmt: skip
        with suppress(SpentError):
            explore(trials.problem, settings, measured, linearize=linearize)
    assert trials.best is not None, "the limit pays for no measurement"
    return trials.best[1]


def pay(trials: Trials, price: float, needed: float) -> None:
    """Count a price if what is needed is left."""
    if trials.left < needed:
        raise SpentError
    trials.cost.add(price)
