"""Search quality without training: KL to the teacher at equal bytes and equal cost, by method.

python -m benchmarks.search_quality --data TRAIN.jsonl --eval-data VAL.jsonl     # SmolLM2-135M
python -m benchmarks.search_quality --model embedded --name search_hybrid        # the hybrid

Every method searches the same space (``thin.yaml``: blocks kept, thinned or removed; BF16) with the
same ranking of units, under the same budget (a share of the bytes of the blocks), for at most
``--cost`` token-forwards: a replay counts by its share of the depth, a backward pass as two
forwards. It selects on the select split; figures are on the final split. The contributions that
rank the units, and removals replayed with ``--replay-tokens``, cost ours, which uses them as
scores; the others get the ranking for nothing.
With ``+ repair`` every cut is repaired, for everybody. With ``+ reselect`` a method keeps back
what choosing the units of its student again costs, within the same limit.
Finished methods are kept: the same command continues.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import BACKWARD, Clock, Cost, Subject, arguments, metered, report, subject
from benchmarks.search_methods import METHODS, Trials
from benchmarks.search_ours import ours
from compress.core.files import read_json, write_json
from compress.measure.estimates import mean_of
from compress.measure.kl import Reference, measure
from compress.memory.budget import teacher_bytes
from compress.memory.footprint import Deployment, outside_bytes
from compress.scores.contributions import contributions
from compress.scores.costs import Scores
from compress.scores.ranking import activation_scores
from compress.scores.replay import removal_costs
from compress.scores.reselect import reselect
from compress.scores.tangent import Tangent, tangent, turn
from compress.searches.problem import Problem
from compress.searches.space import load_space
from compress.student.candidate import Candidate
from compress.student.grams import HALVES, Grams, save_grams
from compress.student.repair import repair_ratios

SPACE = Path(__file__).parent / "thin.yaml"
OURS, REPAIR, RESELECT = "ours", " + repair", " + reselect"
BASELINE = "additive knapsack"
# Rounds of choosing units again, and how many measurements of a round are kept the cost of; those
# that are given up early cost less.
ROUNDS, TRIED = 2, 4
DEPLOYMENT = Deployment(context=1)
SAME = ("model", "data", "eval_data", "seed", "cost", "select_tokens", "final_tokens",
        "score_tokens", "score_length", "draws", "replay_tokens", "repair_tokens",
        "length")  # fmt: skip


def main() -> None:
    """Run what is missing and report."""
    methods = [*METHODS, OURS, *(m + REPAIR for m in ("uniform width", BASELINE, OURS))]
    methods += [m + RESELECT for m in (BASELINE, OURS, BASELINE + REPAIR, OURS + REPAIR)]
    settings = arguments(
        __doc__ or "",
        "smollm2-135m",
        shares={"default": "0.7,0.5", "help": "of the bytes of the blocks"},
        cost={"type": float, "default": 100e3, "help": "token-forwards of a method"},
        select_tokens={"type": int, "default": 2048},
        final_tokens={"type": int, "default": 32768},
        score_tokens={"type": int, "default": 2048},
        draws={"type": int, "default": 2},
        score_length={"type": int, "default": 64, "help": "of the sequences that are scored"},
        replay_tokens={"type": int, "default": 0, "help": "for exact removals, ours only"},
        repair_tokens={"type": int, "default": 4096},
        length={"type": int, "default": 128},
        methods={"default": ",".join(methods), "help": "comma-separated"},
        name={"default": "search_quality"},
    )
    found = subject(settings)
    rows = []
    with prepared(found) as (scores, spent, grams):
        final = text_of(found, "final", settings.final_tokens)
        for share in map(float, settings.shares.split(",")):
            for method in settings.methods.split(","):
                trials = trials_of(found, share, scores, grams if REPAIR in method else None)
                trials.cost.add(spent if method.startswith(OURS) else 0)
                rows.append(row(trials, method, share, settings, final))
    baseline = {r["share"]: r["kl"] for r in rows if r["method"] == BASELINE}
    for r in rows:
        r["over additive"] = r["kl"] / baseline[r["share"]] if r["share"] in baseline else None
    columns = ["share", "method", "kl", "error", "over additive", "select kl", "cost", "seconds"]
    facts = {"cost of scores": spent, "text": "score, select and final splits, seeds 0"}
    report(settings.name, settings, facts, columns, rows)


@contextmanager
def prepared(found: Subject) -> Iterator[tuple[Scores, float, Grams]]:
    """Scores, what they cost in token-forwards, and the Gram matrices of repair."""
    settings, cost = found.settings, Cost()
    rows = found.rows("score", settings.score_tokens, settings.score_length)
    with metered(found.stack.model, cost):
        made = contributions(found.stack, rows, settings.draws, [], settings.seed)
        replayed = rows[: settings.replay_tokens // settings.score_length]
        exact = removal_costs(found.stack, replayed) if len(replayed) else {}
    text = found.rows("score", settings.repair_tokens, settings.length, settings.seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "grams.safetensors"
        halves = {half: text[start::2] for start, half in enumerate(HALVES)}
        save_grams(found.stack, halves, file)
        rankings = activation_scores(found.stack, rows)
        yield (
            Scores(made, exact, {}, settings.score_length, rankings=rankings),
            cost.token_forwards,
            Grams(file),
        )


def text_of(found: Subject, split: str, tokens: int) -> Reference:
    """The teacher on a split."""
    return found.reference(found.rows(split, tokens, found.settings.length))


def fresh_text(found: Subject, tokens: int) -> Reference:
    """The teacher on as much selection text as trials see, none of which they see."""
    rows = found.rows("select", 2 * tokens, found.settings.length)
    return found.reference(rows[len(rows) // 2 :])


def trials_of(found: Subject, share: float, scores: Scores, grams: Grams | None) -> Trials:
    """What a method gets."""
    settings, architecture = found.settings, found.checkpoint.architecture
    outside = outside_bytes(architecture)
    whole = teacher_bytes(architecture, DEPLOYMENT)
    space = load_space(str(SPACE)).model_copy(update={"repair": grams is not None})
    ratio = partial(repair_ratios, found.checkpoint, grams) if grams else None
    budget = int(outside + share * (whole - outside))
    problem = Problem(architecture, scores, space, DEPLOYMENT, budget, repair_ratios=ratio)
    text = text_of(found, "select", settings.select_tokens)
    more = partial(text_of, found, "train", 2 * settings.select_tokens)
    fresh = partial(fresh_text, found, settings.select_tokens)
    trials = Trials(problem, found.stack, text, settings.cost, more, fresh, grams)
    trials.cost.add(settings.repair_tokens if grams else 0)
    return trials


def row(
    trials: Trials, method: str, share: float, settings: Any, final: Reference
) -> dict[str, Any]:
    """One method's row, from the file of an earlier run where it is there."""
    same = {key: str(getattr(settings, key)) for key in SAME}
    file = settings.out / settings.name / f"{method.replace(' ', '-')}-{share}.json"
    if file.is_file() and read_json(file)["settings"] == same:
        return dict(read_json(file)["row"])
    clock = Clock()
    search = {**METHODS, OURS: ours}[method.replace(REPAIR, "").replace(RESELECT, "")]
    candidate = with_reselection(trials, search) if RESELECT in method else search(trials)
    seconds = clock.seconds
    kl = mean_of(torch.cat(list(measure(candidate, final, trials.grams))).tolist())
    made = {
        "share": share, "method": method, "kl": kl.value, "error": kl.stderr,
        "select kl": trials.best[0] if trials.best else None,
        "cost": trials.cost.token_forwards, "seconds": seconds,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"settings": same, "row": made})
    return made


def with_reselection(trials: Trials, search: Callable[[Trials], Candidate]) -> Candidate:
    """What a method finds with its units chosen again, in rounds that its limit pays for."""
    problem, text, whole = trials.problem, trials.slopes_text(), trials.whole
    tangents = ROUNDS * (1 + BACKWARD) * text.tokens.numel() / 2
    others = ROUNDS * TRIED * whole
    found = search(replace(trials, limit=trials.limit - tangents - others))
    trials.cost.add(tangents)

    def measured(candidate: Candidate, on: Reference) -> Iterator[Tensor]:
        if trials.left < whole:
            # Not paid for, so no better than anything.
            yield torch.tensor([torch.inf])
            return
        for batch in measure(candidate, on, trials.grams):
            trials.cost.add(len(batch) * on.tokens.shape[1])
            yield batch

    def at(candidate: Candidate, on: Reference) -> Tangent:
        return tangent(trials.stack, candidate, on, [], trials.grams)

    # The search has measured it, as the others that it chose from.
    before = torch.cat(list(measure(found, trials.text, trials.grams)))
    rounds = [turn(text, number, 2) for number in range(ROUNDS)]
    made, values = reselect(found, before, trials.text, rounds, measured, at, problem.known)
    trials.best = (float(values.mean()), made)
    return made


if __name__ == "__main__":
    main()
