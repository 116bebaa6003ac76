"""The search stage: candidates of every kind at the same bytes, measured, the best ones trained."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress.architecture import FORMATS, KV_FORMATS, Format, to_json
from compress.candidate import Candidate
from compress.errors import Infeasible
from compress.families import count_parameters
from compress.memory import footprint
from compress.model import is_plain
from compress.planning import in_format
from compress.prune import save_candidate
from compress.runs import read_json, write_json
from compress.scores import Scores
from compress.scoring import STAGE as SCORE
from compress.scoring import score
from compress.searches.baselines import main_kind, randomly, uniform, variants
from compress.searches.measure import Reference, measure, reference
from compress.searches.problem import Problem, total_bytes
from compress.searches.study import Trial, explore
from compress.session import Session
from compress.show import note, progress, table
from compress.space import Space, load_space
from compress.students import pruned, short_distill
from compress.units import format_bytes, format_count

STAGE = "search"
# A searched baseline gets this share of the trials, and at least so many.
BASELINE_SHARE, BASELINE_TRIALS = 10, 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured candidate of a run."""

    trial: Trial
    kind: str
    finalist: bool = False
    selected: bool = False
    distilled_kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A row of ``candidates.json``; KL in nats per token on the selection text."""
        import json

        trial, architecture = self.trial, self.trial.candidate.architecture
        spread = float(torch.tensor(trial.values).std()) if len(trial.values) > 1 else 0.0
        return {
            "id": trial.candidate.id,
            "kind": self.kind,
            "bytes": trial.bytes,
            "parameters": count_parameters(architecture),
            "predicted_kl": trial.predicted,
            "measured_kl": trial.kl,
            "measured_se": spread / len(trial.values) ** 0.5,
            "measured_sequences": len(trial.values),
            "distilled_kl": self.distilled_kl,
            "finalist": self.finalist,
            "selected": self.selected,
            "stock": is_plain(architecture) and architecture.formats == {"bf16"},
            "architecture": json.loads(to_json(architecture)),
        }


def target_formats(session: Session) -> tuple[Format, ...]:
    """Weight formats that the target loads."""
    return ("bf16",) if session.recipe.target == "transformers" else FORMATS


def chosen_space(session: Session) -> Space | None:
    """The space to search; None where the teacher fits as it is and no space was asked for."""
    recipe, budget = session.recipe, session.budget.bytes
    if recipe.space is not None:
        return load_space(recipe.space, recipe.target)
    whole = session.teacher_bytes
    if whole <= budget:
        note(
            f"the teacher fits as it is: {format_bytes(whole)} within "
            f"{session.budget.description}; --space joint makes a smaller one all the same"
        )
        return None
    for format in target_formats(session):
        for kv_format in KV_FORMATS if recipe.target != "transformers" else ("bf16",):
            made = replace(in_format(session.architecture, format), kv_format=kv_format)
            size = footprint(made, session.deployment).total
            if size <= budget:
                note(
                    f"number formats suffice: {format} weights with a {kv_format} KV cache take "
                    f"{format_bytes(size)}; searching which blocks need how many bits "
                    "(--space joint prunes as well)"
                )
                return load_space("formats", recipe.target)
    return load_space("joint", recipe.target)


def search_inputs(session: Session) -> dict[str, Any]:
    """What decides the candidates."""
    recipe = session.recipe
    keys = ("space", "target", "trials", "finalists", "short_distill_tokens", "select_tokens",
            "distill_length", "distill_batch_tokens", "learning_rate")  # fmt: skip
    return {
        "score": session.run.fingerprint(SCORE),
        "budget": session.budget.bytes,
        "deployment": asdict(session.deployment),
        **{key: getattr(recipe, key) for key in keys},
    }


def search(session: Session) -> None:
    """Search, and write ``candidates.json`` with the finalists' students beside it.

    Raises:
        Infeasible: nothing of the space fits the budget.
    """
    run = session.run
    space = chosen_space(session)
    write_teacher(session)
    if space is None:
        return
    scores = score(session)
    inputs = search_inputs(session)
    if not run.stage_done(STAGE, inputs):
        rows, missing = candidates(session, space, scores)
        for row in rows:
            directory = run.path / "candidates" / row.trial.candidate.id
            save_candidate(row.trial.candidate, directory)
        write_json(run.path / "baselines.json", missing)
        rows = finalists(session, space, rows)
        write_json(run.path / "candidates.json", [row.to_json() for row in rows])
        run.sign(STAGE, inputs)
    print_candidates(session)


def write_teacher(session: Session) -> None:
    """Write what is compressed, for which deployment, into how many bytes."""
    import json

    made = footprint(session.architecture, session.deployment)
    write_json(
        session.run.path / "teacher.json",
        {
            "name": session.recipe.model,
            "path": str(session.path),
            "note": session.note,
            "architecture": json.loads(to_json(session.architecture)),
            "bytes": {**asdict(made), "total": made.total},
            "budget": session.budget.bytes,
            "deployment": asdict(session.deployment),
        },
    )


def candidates(
    session: Session, space: Space, scores: Scores
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Measured candidates of the space and of every baseline, and the baselines that do not fit."""
    recipe = session.recipe
    text = selection_text(session)[0]
    main = main_kind(space)
    journal = session.run.path / "study" / f"journal-{session.run.fingerprint(SCORE)[:8]}.log"  # type: ignore[index]
    named = variants(space, target_formats(session), space.kv_formats)
    rows: list[Row] = []
    missing: list[dict[str, Any]] = []
    problem = problem_of(session, space, scores)
    rows += explored(session, problem, main, main, recipe.trials, text, journal)
    for name, variant in named.items():
        kind = name.partition("-")[0]
        if kind == main:
            continue
        other = replace(
            problem_of(session, variant, scores),
            blind_to_rounding=kind == "prune_then_quantize",
        )
        trials = max(BASELINE_TRIALS, recipe.trials // BASELINE_SHARE)
        try:
            rows += explored(session, other, name, kind, trials, text, journal)
        except Infeasible as error:
            missing.append({"kind": kind, "fits": False, "reason": str(error)})
    plain = problem_of(session, named["prune"], scores)
    blind = {"uniform": uniform(plain), "random": randomly(plain, BASELINE_TRIALS, recipe.seed)}
    for kind, found in blind.items():
        if not found:
            missing.append({"kind": kind, "fits": False, "reason": f"no {kind} cut fits"})
        for candidate, predicted in found:
            rows.append(Row(trial=measured(candidate, predicted, session, text), kind=kind))
    return rows, missing


def problem_of(session: Session, space: Space, scores: Scores) -> Problem:
    """The search problem of a space in this session."""
    return Problem(session.architecture, scores, space, session.deployment, session.budget.bytes)


def selection_text(session: Session) -> tuple[Reference, Reference]:
    """The teacher on the text that trials see, and on fresh text for the finalists."""
    recipe = session.recipe
    tokens = session.rows("select", 2 * recipe.select_tokens)
    text = reference(session.checkpoint, session.model, tokens)
    half = len(tokens) // 2
    return text.part(0, half), text.part(half, len(tokens))


def explored(
    session: Session,
    problem: Problem,
    study: str,
    kind: str,
    trials: int,
    text: Reference,
    journal: Path,
) -> list[Row]:
    """The rows of one study."""
    size = session.recipe.sequence_length
    name = f"{study}@{problem.budget}"
    with progress(f"search: {study}", trials) as advance:
        found = explore(
            problem, name, trials, lambda c: measure(c, text), journal, size, session.recipe.seed,
            lambda done, total, best: advance(1, f"best KL {best:.4f}"), label=study,
        )  # fmt: skip
    return [Row(trial=trial, kind=kind) for trial in found]


def measured(candidate: Candidate, predicted: float, session: Session, text: Reference) -> Trial:
    """A candidate measured outside a study."""
    values = torch.cat(list(measure(candidate, text))).tolist()
    return Trial(
        candidate=candidate,
        bytes=total_bytes(candidate, session.deployment),
        predicted=predicted,
        values=tuple(values),
        complete=True,
    )


def finalists(session: Session, space: Space, rows: Sequence[Row]) -> list[Row]:
    """All rows, the finalists' students written and shortly distilled; best first.

    Finalists are the best of the searched kind and the best of every other. All are measured after
    training on text that the search has not seen, in their formats.
    """
    main, recipe = main_kind(space), session.recipe
    ordered = sorted(rows, key=lambda row: (not row.trial.complete, row.trial.kl))
    final: list[Row] = [row for row in ordered if row.kind == main][: recipe.finalists]
    kinds = {row.kind for row in ordered} - {main}
    final += [next(row for row in ordered if row.kind == kind) for kind in sorted(kinds)]
    fresh = selection_text(session)[1]
    done: dict[str, float | None] = {}
    for number, row in enumerate(final):
        candidate = row.trial.candidate
        pruned(session, candidate)
        note(f"finalist {number + 1} of {len(final)}: {candidate.id}")
        done[candidate.id] = short_distill(session, candidate, fresh)
    ids = set(done)
    marked = [
        replace(
            row,
            finalist=row.trial.candidate.id in ids,
            distilled_kl=done.get(row.trial.candidate.id),
        )
        for row in ordered
    ]
    marked.sort(key=rank)
    allowed = set(space.formats)
    best = next(
        row
        for row in marked
        if row.finalist and row.trial.candidate.architecture.formats <= allowed
    )
    return [replace(row, selected=row is best) for row in marked]


def rank(row: Row) -> tuple[Any, ...]:
    """Best first: finalists by their KL after distillation where they have it, then the others."""
    after = row.distilled_kl
    return (not row.finalist, not row.trial.complete, row.trial.kl if after is None else after)


def print_candidates(session: Session) -> None:
    """The finalists, the baselines that do not fit, and what stock loaders read."""
    found: list[Mapping[str, Any]] = read_json(session.run.path / "candidates.json")
    missing: list[Mapping[str, Any]] = read_json(session.run.path / "baselines.json")
    whole = session.teacher_bytes
    lines = [list(line(row, whole)) for row in found if row["finalist"]]
    lines += [[row["kind"], "does not fit", "", "", "", "", ""] for row in missing]
    table(
        f"Best of each kind within {session.budget.description} "
        "(KL to the teacher, nats per token)",
        ["candidate", "kind", "bytes", "of teacher", "parameters", "KL", "KL distilled"],
        [[r[0], "", *r[1:6]] if len(r) == 7 and r[1] == "does not fit" else r for r in lines],
        left=2,
    )
    stock = next((row for row in found if row["stock"]), None)
    if stock is not None:
        note(
            f"best that stock transformers loads: {stock['id']} "
            f"({format_bytes(stock['bytes'])}, KL {stock['measured_kl']:.4f})"
        )


def line(row: Mapping[str, Any], whole: int) -> Iterator[str]:
    """Cells of a candidate's row."""
    yield row["id"] + (" *" if row["selected"] else "")
    yield row["kind"].replace("_", " ")
    yield format_bytes(row["bytes"])
    yield f"{row['bytes'] / whole:.1%}"
    yield format_count(row["parameters"])
    yield f"{row['measured_kl']:.4f} ± {row['measured_se']:.4f}"
    yield "" if row["distilled_kl"] is None else f"{row['distilled_kl']:.4f}"
