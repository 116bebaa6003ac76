"""Cuts and number formats chosen together, against one at a time or in sequence, at equal bytes.

    python -m benchmarks.joint --data TRAIN.jsonl --eval-data VAL.jsonl     # SmolLM2-135M
    python -m benchmarks.joint --model embedded

A deployment is a context, a batch and a budget of total bytes (weights, KV cache, states), such as
``8kx8:35%``. In each, every kind gives one student; all may choose the KV format:

* ``joint``, ``prune`` (BF16) and ``formats`` (no cuts) are searched.
* ``prune then FORMAT``: searched cuts, blind to rounding, at the bytes of one format.
* ``uniform then FORMAT``: the widest uniform cut, no search; the better KV format on select text.

Searched kinds share the structure of ``--space``, the scores and the number of trials, which the
formats of ``prune then`` divide. Of the best three on select text the one that is best on that and
on fresh select text together is the kind's student, its units chosen again. It is measured on final
text in its formats, distilled shortly from its BF16 weights where anything is cut, and measured
again; where training made it worse on fresh text, it stays as it was cut. KL to the teacher in nats
per token; ``diff`` is joint minus that kind, paired over sequences, so negative where joint is
better. Finished rows are kept: the same command continues.
"""

import argparse
import hashlib
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, report, shown
from benchmarks.joint_verdict import STAGES, compared, verdict
from compress.core.errors import Infeasible, InputError
from compress.core.files import fingerprint, read_json, write_json
from compress.core.quantities import format_bytes
from compress.core.terminal import note, table
from compress.formats.table import Format, formats_text
from compress.measure.kl import Reference, mean_kl, measure, sequence_kl
from compress.model.architecture import kv_text
from compress.model.families import count_parameters
from compress.run.bench import Bench, Row
from compress.run.directory import Run
from compress.run.recipe import Recipe, check
from compress.run.rounding import untrained
from compress.run.score import score
from compress.run.search import selection_text
from compress.run.session import Session
from compress.run.students import is_changed, train, train_inputs
from compress.searches.baselines import uniform, variants
from compress.searches.space import Space, load_space
from compress.student.candidate import Candidate
from compress.sweep.stack import Stack, stack_at
from compress.text.splits import Split

# Study by kind, as ``variants`` names its space.
SEARCHED = {
    "joint": "joint",
    "prune": "prune",
    "formats": "formats",
    "prune then fp8": "prune_then_quantize-fp8",
    "prune then nvfp4": "prune_then_quantize-nvfp4",
}
BLIND: Mapping[str, Format] = {"uniform then fp8": "fp8", "uniform then nvfp4": "nvfp4"}
SEQUENCE = "prune_then_quantize"
SEQUENCES = sum(study.startswith(SEQUENCE) for study in SEARCHED.values())
FINALISTS = 3
COLUMNS = ["deployment", "kind", "MiB"]
COLUMNS += [key for stage in STAGES for key in (stage, f"{stage} se")]
COLUMNS += [key for stage in STAGES for key in (f"diff {stage}", f"diff {stage} se")]
CHOICES = ["deployment", "kind", "parameters", "blocks", "hidden", "KV cache", "formats"]
CHOICES += ["trained on", "trials"]
# Keys of the recipe that are flags, with the benchmark's default where it is not the recipe's.
RECIPE: Mapping[str, int | None] = {
    "score_tokens": None, "draws": None, "replay_tokens": None, "repair_tokens": None,
    "select_tokens": None, "final_tokens": None, "trials": 24, "reselect_rounds": None,
    "distill_tokens": 16384,
}  # fmt: skip


def main() -> None:
    """Run what is missing and report."""
    settings = arguments(
        __doc__ or "",
        "smollm2-135m",
        deployments={
            "default": "2k:52%,2k:42%,2k:37%,8kx8:35%",
            "help": "CONTEXT[xBATCH]:BUDGET, commas between",
        },
        space={"default": "joint", "help": "structure that searched kinds share"},
        name={"default": "joint", "help": "of the JSON and of its directory"},
        **recipe_flags(),
    )
    base, space = session_of(settings), load_space(settings.space)
    asked = {text: deployment_of(text) for text in settings.deployments.split(",")}
    for deployment in asked.values():
        base.recipe.changed(**deployment)
    scores = score(base)
    select, fresh = selection_text(base)
    final = text_of(base, "final", settings.final_tokens)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for name, deployment in asked.items():
        session = base.deployed(**deployment)
        bench = Bench(session, scores, select)
        entries = {
            kind: entry_of(bench, space, kind, name, fresh, final) for kind in (*SEARCHED, *BLIND)
        }
        rows += [{"deployment": name, **row} for row in compared(entries)]
        for stage in STAGES:
            facts |= {f"{name} {stage}, {key}": v for key, v in verdict(entries, stage).items()}
    choices = [[shown(row.get(key)) for key in CHOICES] for row in rows]
    table("What was chosen", CHOICES, choices, left=2)
    report(settings.name, settings, facts, COLUMNS, rows)


def recipe_flags() -> dict[str, dict[str, Any]]:
    """Flags that are keys of the recipe."""
    found: dict[str, dict[str, Any]] = {}
    for key, default in RECIPE.items():
        field = Recipe.model_fields[key]
        found[key] = {"type": int, "default": default or field.default, "help": field.description}
    return found


def text_of(session: Session, split: Split, tokens: int) -> Reference:
    """The teacher on a split."""
    return session.reference(session.rows(split, tokens))


def session_of(settings: argparse.Namespace) -> Session:
    """The run that all deployments share: its scores do not depend on how a student is served."""
    if settings.trials < SEQUENCES:
        raise InputError(f"--trials {settings.trials} does not give each format of prune then one")
    keys = ("model", "seed", *RECIPE)
    asked = {key: getattr(settings, key) for key in keys}
    files = {"data": settings.data, "eval_data": settings.eval_data}
    asked |= {key: str(file) for key, file in files.items() if file is not None}
    return Session(Run(settings.out / settings.name / "run"), check(asked, "settings"))


def deployment_of(text: str) -> dict[str, Any]:
    """The recipe keys of ``8kx8:35%``."""
    found = re.fullmatch(r"([^x:]+)(?:x(\d+))?:(.+)", text.strip())
    if not found:
        raise InputError(f"deployment {text!r} is not understood; write it like 2k:42% or 8kx8:35%")
    return {"context": found[1], "batch_size": int(found[2] or 1), "budget": found[3]}


def entry_of(
    bench: Bench, space: Space, kind: str, deployment: str, fresh: Reference, final: Reference
) -> dict[str, Any]:
    """One kind's student and its per-sequence KL, from an earlier run's file where it is there."""
    session = bench.session
    stem = re.sub(r"\W+", "-", f"{deployment} {kind}".lower()).strip("-")
    file = session.run.path.parent / f"{stem}.json"
    inputs = row_inputs(session, space)
    if file.is_file() and (kept := read_json(file))["inputs"] == inputs:
        return dict(kept["entry"])
    note(f"{deployment}, {kind}: begins")
    try:
        rows = explored(bench, space, kind)
    except Infeasible as error:
        note(f"{deployment}, {kind}: does not fit")
        entry: dict[str, Any] = {"fits": False, "reason": str(error)}
    else:
        row = chosen(bench, rows, fresh)
        # What people do without a search keeps the units that it has.
        row = bench.reselected(row) if kind in SEARCHED else row
        entry = {"fits": True, "trials": len(rows), "select kl": row.trial.kl}
        entry |= measured(session, row, stem, fresh, final)
        means = (f"{sum(entry[stage]) / len(entry[stage]):.4f} {stage}" for stage in STAGES)
        note(f"{deployment}, {kind}: KL {', '.join(means)}")
    write_json(file, {"inputs": inputs, "entry": entry})
    # Students are large and quickly made again; also those that a killed run left under this name.
    for folder in ("candidates", "distill"):
        for directory in (session.run.path / folder).glob(f"{stem}.*"):
            shutil.rmtree(directory)
    return entry


def row_inputs(session: Session, space: Space) -> str:
    """The fingerprint of what decides a row besides its kind, the same on every machine.

    Files are known by their content, not by path and time as a run's stages know them.
    """
    recipe = session.recipe
    files = [*sorted(session.path.glob("*.safetensors")), session.path / "config.json"]
    files += [Path(text) for text in (recipe.data, recipe.eval_data) if text]
    return fingerprint(
        {
            "files": [content(file) for file in files],
            "text": None if recipe.data else f"embedded {sys.version_info[:2]}",
            "recipe": recipe.model_dump(exclude={"workers", "model", "data", "eval_data"}),
            "space": space.model_dump(mode="json"),
        }
    )


@cache
def content(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def explored(bench: Bench, space: Space, kind: str) -> list[Row]:
    """What a kind has measured on select text, best first.

    Raises:
        Infeasible: nothing of the kind is within the budget.
    """
    offered = load_space("joint")
    spaces = variants(space, offered.formats, offered.kv_formats)
    if kind in BLIND:
        # What people do without a search, they do without repair.
        problem = bench.problem(spaces["prune"].model_copy(update={"repair": False}))
        found = uniform(problem, BLIND[kind])
        if not found:
            within = format_bytes(problem.budget)
            raise Infeasible(f"no uniform cut with {BLIND[kind]} weights is within {within}")
        return sorted((bench.measured(*pair) for pair in found), key=lambda row: row.trial.kl)
    study, trials = SEARCHED[kind], bench.session.recipe.trials
    blind = study.startswith(SEQUENCE)
    problem = bench.problem(spaces[study], blind_to_rounding=blind)
    return bench.explored(problem, study, trials // SEQUENCES if blind else trials)


def chosen(bench: Bench, rows: Sequence[Row], fresh: Reference) -> Row:
    """The finalist that is best on select and fresh text together."""

    def both(row: Row) -> float:
        candidate = row.trial.candidate
        grams = bench.grams if candidate.repaired else None
        again = torch.cat(list(measure(candidate, fresh, grams)))
        return row.trial.kl + float(again.mean())

    return min([row for row in rows if row.trial.complete][:FINALISTS], key=both)


def measured(
    session: Session, row: Row, stem: str, fresh: Reference, final: Reference
) -> dict[str, Any]:
    """The student of a row: what it is, and its KL per sequence before and after distillation.

    Both are the same where training made it worse on fresh text.
    """
    tokens = session.recipe.distill_tokens
    # A name of its own for every student: what another one left is never taken for it.
    made = fingerprint(train_inputs(session, row.trial.candidate, tokens))[:8]
    candidate = replace(row.trial.candidate, id=f"{stem}.{made}")
    cut = stack_at(untrained(session, candidate), session.placement)
    before = after = values(cut, final)
    trained = 0
    if is_changed(session, candidate):
        student = train(session, candidate, tokens, candidate.id)
        model = stack_at(student, session.placement)
        if mean_kl(model, fresh) < mean_kl(cut, fresh):
            after, trained = values(model, final), tokens
    found: dict[str, Any] = {"candidate": row.trial.candidate.id, "bytes": row.trial.bytes}
    found |= {**choice_of(session, candidate), "trained on": trained}
    return found | {"before": before, "after": after}


def values(model: Stack, final: Reference) -> Sequence[float]:
    """KL of every sequence."""
    kl: list[float] = torch.cat(list(sequence_kl(model, final))).tolist()
    return kl


def choice_of(session: Session, candidate: Candidate) -> dict[str, Any]:
    """What a kind chose, in short."""
    made, whole = candidate.architecture, session.architecture
    formats = Counter(formats_text(block.formats) for block in made.blocks)
    return {
        "parameters": count_parameters(made),
        "blocks": f"{len(made.blocks)} of {len(whole.blocks)}",
        "hidden": f"{made.hidden} of {whole.hidden}",
        "KV cache": kv_text(made),
        "outside": formats_text(made.outside_formats),
        "formats": "; ".join(f"{count} {text}" for text, count in formats.most_common()),
        "repaired": len(candidate.repaired),
    }


if __name__ == "__main__":
    main()
