"""The search stage: candidates of every kind at the same bytes, measured, the best ones trained."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from compress.core.errors import Infeasible
from compress.core.files import fingerprint, write_json
from compress.core.quantities import format_bytes
from compress.core.terminal import note
from compress.export.targets import restricted
from compress.measure.kl import Reference, reference
from compress.memory.budget import in_format
from compress.memory.footprint import footprint
from compress.report.rows import (
    CANDIDATES,
    Student,
    Teacher,
    read_students,
    write_students,
    write_teacher,
)
from compress.run.bench import Bench, Row, open_bench
from compress.run.directory import Run
from compress.run.finalists import best_of, with_finalists
from compress.run.recipe import keep_recipe
from compress.run.score import (
    DEFAULT_SPACE,
    depth_file,
    depth_inputs,
    gram_file,
    gram_inputs,
    ranked,
    repair_tokens,
    score,
    score_inputs,
    scored_formats,
)
from compress.run.session import Session
from compress.run.students import keep_students, require_replaceable
from compress.scores.ranking import require_ranked
from compress.scores.reselect import FEWEST
from compress.searches.baselines import (
    FREE,
    baselines,
    kind_of,
    main_kind,
    randomly,
    uniform,
    variants,
)
from compress.searches.problem import Problem
from compress.searches.proposals import require_feasible
from compress.searches.space import Space, load_space

STAGE = "search"
# A searched baseline gets this share of the trials, and at least so many.
BASELINE_SHARE, BASELINE_TRIALS = 10, 4


def comparisons(session: Session, space: Space) -> tuple[dict[str, Space], list[str]]:
    """The spaces of all searched kinds by study name, and the kinds to compare with."""
    recipe, offered = session.recipe, space
    if len(space.formats) == 1:
        formats = ("bf16", *scored_formats(recipe))
        offered = restricted(space.model_copy(update={"formats": formats}), recipe.target)
    named = variants(space, offered.formats, space.kv_formats)
    asked = recipe.baselines or (None if recipe.space else "all")
    return named, baselines(space, named, asked)


def chosen_space(session: Session) -> Space | None:
    """The space to search; None where the teacher fits as it is and no space was asked for."""
    recipe, budget = session.recipe, session.budget.bytes
    if recipe.space is not None:
        return restricted(load_space(recipe.space), recipe.target)
    whole, few = session.teacher_bytes, session.teacher_is_small
    if whole <= budget and few:
        note(
            f"the teacher fits as it is: {format_bytes(whole)} within "
            f"{session.budget.description}; --space joint makes a smaller one all the same"
        )
        return None
    formats = restricted(load_space("formats"), recipe.target)
    # Formats make no parameter less.
    for format in formats.formats if few else ():
        for kv_format in formats.kv_formats:
            made = replace(in_format(session.architecture, format), kv_format=kv_format)
            size = footprint(made, session.deployment).total
            if size <= budget:
                note(
                    f"number formats suffice: {format} weights with a {kv_format} KV cache take "
                    f"{format_bytes(size)}; searching which blocks need how many bits "
                    "(--space joint prunes as well)"
                )
                return formats
    return restricted(load_space(DEFAULT_SPACE), recipe.target)


def search_inputs(session: Session, space: Space) -> dict[str, Any]:
    """What decides the candidates."""
    recipe = session.recipe
    keys = ("target", "ranking", "trials", "reselect_rounds", "finalists", "short_distill_tokens",
            "select_tokens", "distill_length", "distill_batch_tokens", "learning_rate")  # fmt: skip
    return {
        "score": fingerprint(score_inputs(session)),
        "repair": fingerprint(gram_inputs(session)) if space.repair else None,
        "depth": fingerprint(depth_inputs(session)) if space.remove == "layer" else None,
        "space": space.model_dump(mode="json"),
        "baselines": comparisons(session, space)[1],
        "budget": [one.budget.bytes for one in session.at_each_budget()],
        "active": recipe.active,
        "deployment": asdict(session.deployment),
        "version": 2,
        **{key: getattr(recipe, key) for key in keys},
    }


def search(session: Session) -> tuple[Student, ...]:
    """The candidates, best first, in ``candidates.json`` with the finalists' students beside it.

    None where the teacher fits as it is and no space was asked for.

    Raises:
        Infeasible: nothing of the space fits the budget.
    """
    run, sweep = session.run, session.at_each_budget()
    # One space for a sweep: what the smallest budget needs.
    space = chosen_space(min(sweep, key=lambda one: one.budget.bytes))
    if space is None:
        require_replaceable(run)
        keep_recipe(session.recipe, run)
        forget_results(run)
        write_teacher(teacher_of(session), run.path)
        return ()
    # What can be refused is refused before the long work: the budget, and too little text.
    for one in sweep:
        require_feasible(
            Problem(
                one.architecture,
                None,
                space,
                one.deployment,
                one.budget.bytes,
                active=one.recipe.active,
            )
        )
    require_ranked(session.architecture, session.recipe.ranking)
    session.rows("score", session.recipe.score_tokens)
    session.rows("select", 2 * session.recipe.select_tokens)
    session.rows("final", session.recipe.final_tokens)
    if space.repair:
        session.rows("score", repair_tokens(session))
    inputs = search_inputs(session, space)
    done = run.stage_done(STAGE, inputs) and (run.path / CANDIDATES).is_file()
    if not done:
        require_replaceable(run)
    scores = ranked(session, score(session))
    if space.repair:
        gram_file(session)
    if space.remove == "layer":
        depth_file(session)
    if not done:
        forget_results(run)
        write_teacher(teacher_of(session), run.path)
        text, fresh = selection_text(session)
        recipe, (sequences, length) = session.recipe, text.tokens.shape
        again = recipe.reselect_rounds and recipe.ranking == "contribution"
        if again and sequences < FEWEST:
            note(
                f"units are not chosen again: {sequences} sequences of select text prove nothing "
                f"better; --select-tokens {FEWEST * length} would"
            )
        found: list[tuple[Session, list[Row]]] = []
        unfit: list[dict[str, Any]] = []
        for one in session.at_each_budget():
            with open_bench(one, scores, text) as bench:
                rows, missing = candidates(bench, space)
            found.append((one, rows if len(sweep) == 1 else named_by_budget(one, rows)))
            unfit += [{**row, "budget": one.budget.bytes} for row in missing]
        keep_students(run, [row.trial.candidate for _, rows in found for row in rows])
        write_json(run.path / "baselines.json", unfit)
        ranked = [row for one, rows in found for row in with_finalists(one, space, rows, fresh)]
        write_students([row.student() for row in ranked], run.path)
        run.sign(STAGE, inputs)
    return read_students(run.path)


def named_by_budget(session: Session, rows: Sequence[Row]) -> list[Row]:
    """The rows of one budget of a sweep, which their names begin with: ``50-joint-003``."""
    [budget] = session.recipe.budgets
    prefix = budget.lower().replace("%", "").replace(" ", "")

    def named(row: Row) -> Row:
        candidate = replace(row.trial.candidate, id=f"{prefix}-{row.trial.candidate.id}")
        return replace(row, trial=replace(row.trial, candidate=candidate))

    return [named(row) for row in rows]


def forget_results(run: Run) -> None:
    """Take back what an earlier search of the run said: its students are about to be replaced."""
    if (run.path / CANDIDATES).is_file():
        note(f"{run.path} was searched with other settings: its candidates are replaced")
    for name in (CANDIDATES, "baselines.json", "table.json", "eval/results.json"):
        (run.path / name).unlink(missing_ok=True)


def teacher_of(session: Session) -> Teacher:
    """What is compressed, for which deployment, into how many bytes."""
    made = footprint(session.architecture, session.deployment)
    return Teacher(
        name=session.name,
        path=str(session.path),
        files=session.files,
        note=session.note,
        architecture=session.architecture,
        bytes={**asdict(made), "total": made.total},
        # Of a sweep the largest; every candidate says which one it is for.
        budget=max(one.budget.bytes for one in session.at_each_budget()),
        deployment=session.deployment,
    )


def candidates(bench: Bench, space: Space) -> tuple[list[Row], list[dict[str, Any]]]:
    """Measured candidates of the space and of every baseline, and the baselines that do not fit."""
    session = bench.session
    recipe, main = session.recipe, main_kind(space)
    named, kinds = comparisons(session, space)
    missing: list[dict[str, Any]] = []
    rows = bench.explored(bench.problem(space), main, recipe.trials)
    for name, variant in named.items():
        kind = kind_of(name)
        if kind == main or kind not in kinds:
            continue
        problem = bench.problem(variant, blind_to_rounding=kind == "prune_then_quantize")
        trials = max(BASELINE_TRIALS, recipe.trials // BASELINE_SHARE)
        try:
            rows += bench.explored(problem, name, trials)
        except Infeasible as error:
            missing.append({"kind": kind, "fits": False, "reason": str(error)})
    again = {row.trial.candidate.id for row in best_of(rows, main, recipe.finalists)}
    rows = [bench.reselected(row) if row.trial.candidate.id in again else row for row in rows]
    # What people do without a search, they do without repair.
    plain = bench.problem(named["prune"].model_copy(update={"repair": False}))
    for kind in [kind for kind in kinds if kind in FREE]:
        random = kind == "random"
        found = randomly(plain, BASELINE_TRIALS, recipe.seed) if random else uniform(plain)
        if not found:
            missing.append({"kind": kind, "fits": False, "reason": f"no {kind} cut fits"})
        rows += [bench.measured(candidate, predicted) for candidate, predicted in found]
    return rows, missing


def selection_text(session: Session) -> tuple[Reference, Reference]:
    """The teacher on the text that trials see, and on fresh text for the finalists."""
    recipe = session.recipe
    tokens = session.rows("select", 2 * recipe.select_tokens)
    text = reference(session.checkpoint, session.model, tokens)
    half = len(tokens) // 2
    return text.part(0, half), text.part(half, len(tokens))
