"""Which units should stay: contributions, activations or the router, at the same counts.

    python -m benchmarks.rankings
    python -m benchmarks.rankings --model smollm2-135m --data train.jsonl --eval-data val.jsonl

One axis at a time is cut in every block that has it, to the same counts under every ranking; KL to
the teacher in nats per token, with standard errors over sequences, paired for the difference.
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.common import Clock, Subject, arguments, report, subject
from compress.measure.estimates import Estimate, difference, mean_of
from compress.measure.kl import Reference, measure
from compress.model.architecture import Architecture, block_name, sizes
from compress.scores.contributions import contributions
from compress.scores.costs import Scores, choose, priority, top
from compress.scores.ranking import activation_scores
from compress.student.candidate import Candidate, Ranking, student_architecture
from compress.student.units import axes_in

# What is kept of an axis.
CUTS = {
    "ffn": 0.5, "query": 0.5, "kv_head": 0.5, "expert": 0.5, "expert_ffn": 0.5, "shared_ffn": 0.5,
    "head": 0.5, "channel": 0.5, "key_head": 0.5, "value": 0.5, "value_dim": 0.5, "hidden": 0.8,
}  # fmt: skip
RANKINGS: tuple[Ranking, ...] = ("contribution", "activation", "router")


def cut(architecture: Architecture, scores: Scores, axis: str, ranking: Ranking) -> Candidate:
    """The student that keeps the first units of one axis under a ranking, in every block."""
    keep = {"blocks": torch.arange(len(architecture.blocks))}
    if axis == "hidden":
        count = round(CUTS[axis] * architecture.hidden)
        keep["hidden"] = top(priority(scores, None, axis, ranking), count)
    for block in architecture.blocks:
        if axis in axes_in(block):
            target = {axis: max(1, round(CUTS[axis] * sizes(block)[axis]))}
            found = choose(scores, block, target, ranking)
            keep |= {f"{block_name(block)}/{name}": index for name, index in found.items()}
    student = student_architecture(architecture, keep, {}, {})
    return Candidate(id=f"{axis}-{ranking}", kind=ranking, architecture=student, keep=keep)


def scored(what: Subject) -> Scores:
    """Contributions and activations on the same rows of the score split."""
    settings = what.settings
    rows = what.rows("score", settings.score_tokens)
    found = contributions(what.stack, rows, settings.draws, [], settings.seed)
    rankings = activation_scores(what.stack, rows)
    return Scores(found, {}, {}, rows.shape[1], rankings=rankings)


def compared(
    architecture: Architecture, scores: Scores, axis: str, text: Reference
) -> Iterator[dict[str, Any]]:
    """KL of every ranking that decides the axis, and how far ours is below each of the others."""
    kl: dict[Ranking, Estimate] = {}
    for ranking in RANKINGS if axis == "expert" else RANKINGS[:2]:
        candidate = cut(architecture, scores, axis, ranking)
        kl[ranking] = mean_of(torch.cat(list(measure(candidate, text))).numpy())
        found = {"axis": axis, "kept": CUTS[axis], "ranking": ranking}
        yield found | {
            "kl": kl[ranking].value,
            "stderr": kl[ranking].stderr,
            **paired(kl["contribution"], kl[ranking] if len(kl) > 1 else None),
        }


def paired(ours: Estimate, other: Estimate | None) -> dict[str, float | None]:
    """Our KL minus another ranking's, paired over sequences."""
    if other is None:
        return {}
    change, error = difference(other, ours)
    return {"ours_minus_it": change, "its_stderr": error}


def main() -> None:
    """Measure every axis that the teacher has."""
    settings = arguments(
        __doc__ or "",
        "embedded",
        score_tokens={"type": int, "default": 2048},
        draws={"type": int, "default": 16},
        split={"choices": ("select", "final"), "default": "final"},
        tokens={"type": int, "default": 16384, "help": "tokens that KL is measured on"},
        axes={"nargs": "*", "choices": list(CUTS), "help": "default: all that the teacher has"},
    )
    what, clock = subject(settings), Clock()
    architecture = what.checkpoint.architecture
    scores = scored(what)
    scoring = clock.seconds
    text = what.reference(what.rows(settings.split, settings.tokens))
    own = {"hidden"} | {axis for block in architecture.blocks for axis in axes_in(block)}
    axes = [axis for axis in settings.axes or CUTS if axis in own]
    rows = [found for axis in axes for found in compared(architecture, scores, axis, text)]
    columns = ["axis", "kept", "ranking", "kl", "stderr", "ours_minus_it", "its_stderr"]
    facts = {"seconds to score": scoring, "seconds": clock.seconds}
    report("rankings", settings, facts, columns, rows)


if __name__ == "__main__":
    main()
