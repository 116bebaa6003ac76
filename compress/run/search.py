"""The search stage: candidates of every kind at the same bytes, measured, the best ones trained."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from compress.core.errors import Infeasible
from compress.core.files import fingerprint, write_json
from compress.core.quantities import format_bytes
from compress.core.terminal import note
from compress.export.targets import has_windows, restricted, served_by
from compress.measure.kl import Reference
from compress.memory.budget import in_format
from compress.memory.footprint import footprint
from compress.memory.work import STUDENT
from compress.model.architecture import in_kv_format
from compress.report.rows import (
    CANDIDATES,
    Student,
    Teacher,
    read_students,
    write_students,
    write_teacher,
)
from compress.run import score as scoring
from compress.run.bench import Bench, Row
from compress.run.finalists import best_of, with_finalists
from compress.run.recipe import Recipe
from compress.run.session import Session
from compress.run.students import forget_states, keep_students, require_replaceable
from compress.run.together import alone, helped, joined
from compress.run.work import require_stage
from compress.scores.ranking import require_ranked
from compress.scores.reselect import FEWEST
from compress.searches import baselines
from compress.searches.problem import Problem
from compress.searches.proposals import require_feasible
from compress.searches.space import Space, load_space, of_teacher
from compress.train.optimizers import require as require_optimizer
from compress.train.precision import numerics_of

STAGE = "search"
# A searched baseline gets this share of the trials, and at least so many.
BASELINE_SHARE, BASELINE_TRIALS = 10, 4


def comparisons(session: Session, space: Space) -> tuple[dict[str, Space], list[str]]:
    """The spaces of all searched kinds by study name, and the kinds to compare with."""
    recipe, offered = session.recipe, space
    if len(space.formats) == 1:
        formats = ("bf16", *scoring.scored_formats(recipe))
        offered = restricted(
            space.model_copy(update={"formats": formats}),
            recipe.target,
            session.architecture.family,
            tied=session.architecture.tied,
            windowed=has_windows(session.architecture),
        )
    named = baselines.variants(space, offered.formats, space.kv_formats)
    asked = recipe.baselines or (None if recipe.space else "all")
    return named, baselines.baselines(space, named, asked)


def chosen_space(session: Session) -> Space | None:
    """The space to search; None where the teacher fits as it is and no space was asked for."""
    recipe, budget = session.recipe, session.budget.bytes
    if recipe.space is not None:
        return loaded(session, recipe.space)
    whole, few = session.served_bytes, session.teacher_is_small
    if whole <= budget and few:
        note(
            f"the teacher fits as it is: {format_bytes(whole)} within "
            f"{session.budget.description}; --space joint makes a smaller one all the same"
        )
        return None
    formats = loaded(session, "formats")
    # Formats make no parameter less.
    for format, kv_format in product(formats.formats, formats.kv_formats) if few else ():
        made = in_kv_format(in_format(session.whole, format), kv_format)
        size = footprint(made, session.recipe.deployment).total
        if size <= budget:
            note(
                f"number formats suffice: {format} weights with a {kv_format} KV cache take "
                f"{format_bytes(size)}; searching which blocks need how many bits "
                "(--space joint prunes as well)"
            )
            return formats
    return loaded(session, scoring.DEFAULT_SPACE)


def loaded(session: Session, name: str) -> Space:
    """A space as teacher, target and device take it; lines say what the first and last lack."""
    space, lines = of_teacher(load_space(name), session.whole)
    space, missing = served_by(space, session.recipe.preset)
    for line in (*lines, *([missing] if missing else [])):
        note(line)
    architecture = session.architecture
    return restricted(
        space,
        session.recipe.target,
        architecture.family,
        tied=architecture.tied,
        windowed=has_windows(architecture),
    )


def search_inputs(session: Session, space: Space) -> dict[str, Any]:
    """What decides the candidates."""
    recipe = session.recipe
    keys = ("target", "mtp", "ranking", "trials", "reselect_rounds", "finalists",
            "short_distill_tokens", "select_tokens", "distill_length", "distill_batch_tokens",
            "learning_rate", "optimizer", "rounding", "calibration_tokens")  # fmt: skip
    return {
        "score": fingerprint(scoring.score_inputs(session)),
        "repair": fingerprint(scoring.gram_inputs(session)) if space.repair else None,
        "space": space.model_dump(mode="json"),
        "baselines": comparisons(session, space)[1],
        "budget": [one.budget.bytes for one in session.at_each_budget()],
        "active": recipe.active,
        "speed": asdict(recipe.speed) if recipe.speed else None,
        "deployment": asdict(session.recipe.deployment),
        "version": 4,
        **{key: getattr(recipe, key) for key in keys},
    }


def search(session: Session) -> tuple[Student, ...]:
    """The candidates, best first, in ``candidates.json`` with the finalists' students beside it.

    None where the teacher fits as it is and no space was asked for.

    Of several processes on one run all measure; one at a time scores, and writes what was found.

    Raises:
        Infeasible: nothing of the space fits the budget.
        InputError: another process searches the run with other settings.
    """
    # A teacher that cannot be read and a device that is not there leave no run.
    _ = session.checkpoint, session.placement
    run, sweep = session.run, session.at_each_budget()
    # One space for a sweep: what the smallest budget needs.
    space = chosen_space(min(sweep, key=lambda one: one.budget.bytes))
    if space is None:
        require_replaceable(run)
        with joined(run, session.recipe):
            begin_again(session)
        return ()
    require_searchable(session, space)
    inputs = search_inputs(session, space)
    candidates = run.path / CANDIDATES
    if not run.stage_done(STAGE, inputs, candidates):
        require_replaceable(run)
    with joined(run, session.recipe) as first:
        with alone(run):
            scores = scoring.ranked(session, scoring.score(session))
            if space.repair:
                scoring.gram_file(session)
            if not (over := run.stage_done(STAGE, inputs, candidates)):
                begin_again(session)
        if not over:
            text, fresh = selection_text(session)
            note_little_text(session.recipe, text)
            benches = [Bench(one, scores, text) for one in sweep]
            with helped(run, session.recipe.workers - 1 if first else 0):
                found = [studied(bench, space) for bench in benches]
            with alone(run):
                if not run.stage_done(STAGE, inputs, candidates):
                    conclude(session, space, benches, found, fresh)
                    run.sign(STAGE, inputs)
        return read_students(run.path)


def require_searchable(session: Session, space: Space) -> None:
    """Refuse before the long work what can be refused: the budget, and too little text."""
    recipe = session.recipe
    for one in session.at_each_budget():
        sizes = one.whole, None, space, one.recipe.deployment, one.budget.bytes
        require_feasible(Problem(*sizes, active=recipe.active, speed=recipe.speed))
        share = min(STUDENT, one.budget.bytes / one.teacher_bytes)
        require_stage("search", one.architecture, recipe, session.placement, share)
    require_ranked(session.architecture, recipe.ranking)
    require_optimizer(recipe.optimizer, session.placement)
    numerics_of(recipe.precision, recipe.emulate, session.placement)
    session.rows("score", recipe.score_tokens)
    session.rows("final", recipe.final_tokens)
    if space.repair:
        session.rows("score", scoring.repair_tokens(session))
    session.rows("select", 2 * recipe.select_tokens)


def note_little_text(recipe: Recipe, text: Reference) -> None:
    """Say where the selection text is too little to choose units again."""
    sequences, length = text.tokens.shape
    again = recipe.reselect_rounds and recipe.ranking == "contribution"
    if again and sequences < FEWEST:
        note(
            f"units are not chosen again: {sequences} sequences of select text prove nothing "
            f"better; --select-tokens {FEWEST * length} would"
        )


def conclude(
    session: Session,
    space: Space,
    benches: Sequence[Bench],
    studies: Sequence[tuple[list[Row], list[dict[str, Any]]]],
    fresh: Reference,
) -> None:
    """Write the candidates of each budget's studies: best units, baselines, finalists trained."""
    run, found, unfit = session.run, list[tuple[Session, list[Row]]](), list[dict[str, Any]]()
    for bench, (rows, missing) in zip(benches, studies, strict=True):
        one = bench.session
        rows, unsearched = compared(bench, space, rows)
        found.append((one, rows if len(benches) == 1 else named_by_budget(one, rows)))
        unfit += [{**row, "budget": one.budget.bytes} for row in (*missing, *unsearched)]
    keep_students(run, [row.trial.candidate for _, rows in found for row in rows])
    write_json(run.path / "baselines.json", unfit)
    final = [row for one, rows in found for row in with_finalists(one, space, rows, fresh)]
    forget_states(run)
    write_students([row.student() for row in final], run.path)


def named_by_budget(session: Session, rows: Sequence[Row]) -> list[Row]:
    """The rows of one budget of a sweep, which their names begin with: ``50-joint-003``."""
    [budget] = session.recipe.budgets
    prefix = budget.lower().replace("%", "").replace(" ", "")

    def named(row: Row) -> Row:
        candidate = replace(row.trial.candidate, id=f"{prefix}-{row.trial.candidate.id}")
        return replace(row, trial=replace(row.trial, candidate=candidate))

    return [named(row) for row in rows]


def begin_again(session: Session) -> None:
    """Take back what an earlier search of the run said, and write what is searched for.

    ``teacher.json`` says what is compressed, for which deployment, into how many bytes.
    """
    run, made = session.run, footprint(session.whole, session.recipe.deployment)
    if (run.path / CANDIDATES).is_file():
        note(f"{run.path} was searched with other settings: its candidates are replaced")
    for name in (CANDIDATES, "baselines.json", "table.json", "eval/results.json"):
        (run.path / name).unlink(missing_ok=True)
    # Of a sweep the largest; every candidate says which one it is for.
    budget = max(one.budget.bytes for one in session.at_each_budget())
    teacher = Teacher(
        name=session.name, path=str(session.path), files=session.files, note=session.note,
        architecture=session.whole, bytes={**asdict(made), "total": made.total},
        budget=budget, deployment=session.recipe.deployment,
    )  # fmt: skip
    write_teacher(teacher, run.path)


def studied(bench: Bench, space: Space) -> tuple[list[Row], list[dict[str, Any]]]:
    """Measured candidates of the space and of searched baselines, and baselines that do not fit."""
    recipe, main = bench.session.recipe, baselines.main_kind(space)
    named, kinds = comparisons(bench.session, space)
    missing: list[dict[str, Any]] = []
    rows = bench.explored(bench.problem(space), main, recipe.trials)
    for name, variant in named.items():
        kind = baselines.kind_of(name)
        if kind == main or kind not in kinds:
            continue
        problem = bench.problem(variant, blind_to_rounding=kind == "prune_then_quantize")
        trials = max(BASELINE_TRIALS, recipe.trials // BASELINE_SHARE)
        try:
            rows += bench.explored(problem, name, trials)
        except Infeasible as error:
            missing.append({"kind": kind, "fits": False, "reason": str(error)})
    return rows, missing


def compared(
    bench: Bench, space: Space, rows: Sequence[Row]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows, units of the best chosen again, with cuts without a search; those that fit not."""
    recipe, (named, kinds) = bench.session.recipe, comparisons(bench.session, space)
    best = best_of(rows, baselines.main_kind(space), recipe.finalists)
    again = {row.trial.candidate.id for row in best}
    found = [bench.reselected(row) if row.trial.candidate.id in again else row for row in rows]
    missing: list[dict[str, Any]] = []
    # What people do without a search, they do without repair.
    plain = bench.problem(named["prune"].model_copy(update={"repair": False}))
    for kind in [kind for kind in kinds if kind in baselines.FREE]:
        if kind == "uniform":
            cuts = baselines.uniform(plain)
        else:
            cuts = baselines.randomly(plain, BASELINE_TRIALS, recipe.seed)
        if not cuts:
            missing.append({"kind": kind, "fits": False, "reason": f"no {kind} cut fits"})
        found += [bench.measured(candidate, predicted) for candidate, predicted in cuts]
    return found, missing


def selection_text(session: Session) -> tuple[Reference, Reference]:
    """The teacher on the text that trials see, and on fresh text for the finalists."""
    tokens = session.rows("select", 2 * session.recipe.select_tokens)
    text, half = session.reference(tokens), len(tokens) // 2
    return text.part(0, half), text.part(half, len(tokens))
