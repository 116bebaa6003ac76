"""What refitting output projections buys: uniform FFN cuts of SmolLM2, cut and repaired.

    python -m benchmarks.repair --data train.jsonl --eval-data val.jsonl

The ridge is chosen on select text, the figures are on final text: KL to the teacher in nats per
token, +- one standard error over sequences. ``predicted`` is the share of the predicted KL that
repair is said to leave, ``measured`` that of the measured KL.
"""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Clock, arguments, report, subject
from compress.measure.estimates import mean_of
from compress.measure.kl import Reference, measure
from compress.memory.footprint import Deployment
from compress.model.architecture import Ffn, sizes
from compress.scores.contributions import contributions
from compress.scores.costs import Scores
from compress.searches.problem import Globals, Problem
from compress.searches.space import Option, load_space
from compress.student.grams import HALVES, Grams, save_grams
from compress.student.repair import repair_ratios

SHARES = (0.75, 0.5, 0.25)
RIDGES = (0.001, 0.01, 0.1, 1.0)
# Columns of the table; the JSON also has every ridge on select text and the paired difference.
SHOWN = ("width", "cut", "cut se", "repaired", "repaired se", "ridge", "measured", "predicted")


def main() -> None:
    """Choose a ridge for every width, measure cut and repaired, write ``repair.json``."""
    settings = arguments(
        __doc__ or "",
        "smollm2-135m",
        score_tokens={"type": int, "default": 1024},
        repair_tokens={"type": int, "default": 4096},
        select_tokens={"type": int, "default": 2048},
        final_tokens={"type": int, "default": 8192},
    )
    found = subject(settings)
    rows = found.rows("score", settings.score_tokens)
    scored = contributions(found.stack, rows, 2, [], settings.seed)
    scores = Scores(scored, {}, {}, rows.shape[1])
    select, final = (
        found.reference(found.rows(split, tokens))
        for split, tokens in (("select", settings.select_tokens), ("final", settings.final_tokens))
    )
    with tempfile.TemporaryDirectory() as folder:
        file, clock = Path(folder) / "grams.safetensors", Clock()
        rows = found.rows("score", settings.repair_tokens)
        halves = {half: rows[start::2] for start, half in enumerate(HALVES)}
        save_grams(found.stack, halves, file)
        facts = {"gram seconds": clock.seconds, "gram bytes": file.stat().st_size}
        fits = {ridge: Grams(file, ridge) for ridge in RIDGES}
        table = [row_of(share, scores, fits, select, final) for share in SHARES]
    report("repair", settings, facts, SHOWN, table)


def row_of(
    share: float,
    scores: Scores,
    fits: Mapping[float, Grams],
    select: Reference,
    final: Reference,
) -> dict[str, float | None]:
    """The figures of one width."""
    tried = {r: float(kl_of(share, scores, grams, select).mean()) for r, grams in fits.items()}
    ridge = min(tried, key=lambda r: tried[r])
    cut, repaired = (kl_of(share, scores, grams, final) for grams in (None, fits[ridge]))
    plain, fitted, gain = (mean_of(kl.tolist()) for kl in (cut, repaired, repaired - cut))
    return {
        "width": share,
        "cut": plain.value,
        "cut se": plain.stderr,
        "repaired": fitted.value,
        "repaired se": fitted.stderr,
        "difference": gain.value,
        "difference se": gain.stderr,
        "ridge": ridge,
        **{f"select, {r:g}": kl for r, kl in tried.items()},
        "measured": fitted.value / plain.value,
        "predicted": predicted(share, scores, fits[ridge], final),
    }


def kl_of(share: float, scores: Scores, grams: Grams | None, text: Reference) -> Tensor:
    """KL [sequences] of the uniform cut; repaired with ``grams``."""
    problem = problem_of(scores, grams, text)
    candidate = problem.candidate("uniform", "uniform", options(problem, share), Globals())
    return torch.cat(list(measure(candidate, text, grams)))


def predicted(share: float, scores: Scores, grams: Grams, text: Reference) -> float:
    """The share of the cut's predicted KL that repair leaves."""
    after, before = (
        sum(
            problem.cost(number, option)[0] for number, option in enumerate(options(problem, share))
        )
        for problem in (problem_of(scores, grams, text), problem_of(scores, None, text))
    )
    return after / before


def problem_of(scores: Scores, grams: Grams | None, text: Reference) -> Problem:
    """The teacher's problem, with repair where there are Gram matrices; its budget is not used."""
    ratio = partial(repair_ratios, text.teacher, grams) if grams else None
    return Problem(
        text.teacher.architecture,
        scores,
        load_space("puzzle"),
        Deployment(context=1),
        0,
        repair_ratios=ratio,
    )


def options(problem: Problem, share: float) -> list[Option]:
    """Every block's option under the cut, by number."""
    found = []
    for block in problem.teacher.blocks:
        whole = not isinstance(block, Ffn)
        target = () if whole else (("ffn", round(share * sizes(block)["ffn"])),)
        found.append(Option(target))
    return found


if __name__ == "__main__":
    main()
