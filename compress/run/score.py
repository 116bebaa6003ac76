"""The score stage: contributions, exact removals and KV formats, once per teacher and text.

What other rankings go by is a stage of its own, only where the recipe asks for one. Gram matrices
are another, only for spaces that repair what they cut. The teacher in every format is a third, only
where rounding goes by what weights read.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from compress.core.files import fingerprint, write_json
from compress.core.terminal import progress
from compress.formats.table import FORMATS, Format
from compress.model.architecture import Architecture
from compress.model.tensor_files import save_tensors
from compress.run.recipe import Recipe, keep_recipe
from compress.run.session import Session
from compress.run.work import require_stage
from compress.scores.contributions import Progress, contributions
from compress.scores.costs import Scores, load_scores
from compress.scores.kv import kv_costs
from compress.scores.outside import outside_costs
from compress.scores.ranking import activation_scores
from compress.scores.replay import Stop, removal_costs
from compress.scores.sensitivity import sensitivities
from compress.searches.curve import format_curve
from compress.searches.space import load_space
from compress.student.grams import HALVES, RIDGE, Grams, save_grams
from compress.student.rounded_teacher import RoundedTeacher, round_teacher
from compress.sweep.stack import Stack

Advance = Callable[[int, str], None]

STAGE = "score"
SENSITIVITY = "sensitivity.json"
RANKING = "ranking"
REPAIR = "repair"
ROUNDING = "rounding"
DEFAULT_SPACE = "joint"
# A replayed mean is known well enough once its standard error is this much of it: an estimate from
# 256 rows has hardly less, and blocks of one kind differ by more.
STOP = Stop(relative=0.15)
# Replays cost at most so many forward passes of the teacher over the scored text, if a removal has
# the fewest rows that tell its error or more.
REPLAY_FORWARDS = 20


def score_inputs(session: Session) -> dict[str, object]:
    """What decides the scores."""
    recipe, rounded = session.recipe, rounding_inputs(session)
    return ({"rounding": fingerprint(rounded)} if rounded else {}) | {
        "session": session.identity(),
        "tokens": [recipe.score_tokens, recipe.score_length, recipe.draws],
        "replay": recipe.replay_tokens,
        "formats": scored_formats(recipe),
        "version": 5,
    }


def scored_formats(recipe: Recipe) -> list[Format]:
    """Formats to score: those of the recipe's space, or of the default one where it has none.

    Of a space that only prunes those of the default one, if it is to be compared with formats.
    """
    space = load_space(recipe.space or DEFAULT_SPACE)
    used = {*space.formats, *space.head_formats}
    if used == {"bf16"} and recipe.baselines not in (None, "none"):
        used = set(load_space(DEFAULT_SPACE).formats)
    return [format for format in FORMATS if format in used and format != "bf16"]


def score(session: Session) -> Scores:
    """The scores of the session's teacher, computed where missing."""
    run, recipe, inputs = session.run, session.recipe, score_inputs(session)
    file = run.path / "scores" / "scores.safetensors"
    _ = session.placement  # a device that is not there leaves no run
    keep_recipe(recipe, run)
    if run.stage_done(STAGE, inputs, file):
        return load_scores(file)
    require_stage("score", session.architecture, recipe, session.placement)
    rows = session.rows("score", recipe.score_tokens, recipe.score_length)
    # Its own directory for these inputs: parts of another scoring are never mixed in.
    parts = run.path / "scores" / f"parts-{fingerprint(inputs)[:12]}"
    scores = scores_of(session.stack, rows, recipe, parts, rounded_teacher(session))
    scores.save(file)
    write_json(file.with_name(SENSITIVITY), sensitivity_json(session.architecture, scores, recipe))
    run.sign(STAGE, inputs)
    # Those of an interrupted scoring under other settings go too.
    for directory in file.parent.glob("parts-*"):
        shutil.rmtree(directory)
    return scores


def sensitivity_json(
    architecture: Architecture, scores: Scores, recipe: Recipe
) -> dict[str, list[dict[str, Any]]]:
    """What formats cost and save, by kind of linear group, and what they reach together."""
    curve = format_curve(architecture, scores, {*scored_formats(recipe)})
    return {
        "groups": [asdict(row) for row in sensitivities(architecture, scores)],
        "curve": [asdict(point) for point in curve],
    }


def ranked(session: Session, scores: Scores) -> Scores:
    """The scores with what the recipe's ranking goes by besides them, computed where missing."""
    run, recipe = session.run, session.recipe
    if recipe.ranking == "contribution":
        return scores
    asked = recipe.score_tokens, recipe.score_length
    inputs = {"session": session.identity(), "tokens": asked}
    file = run.path / "scores" / "rankings.safetensors"
    if not run.stage_done(RANKING, inputs, file):
        rows = session.rows("score", *asked)
        save_tensors(activation_scores(session.stack, rows), file)
        run.sign(RANKING, inputs)
    return replace(scores, rankings=load_file(file))


def scores_of(
    stack: Stack,
    rows: Tensor,
    recipe: Recipe,
    directory: Path,
    rounded: RoundedTeacher | None = None,
) -> Scores:
    """The scores of a teacher on rows of tokens [sequences, T].

    ``recipe`` says how many draws and what is replayed; ``directory`` keeps finished parts, so that
    a killed scoring continues there. Formats cost what is left of them in ``rounded``, if given.
    """
    architecture = stack.architecture
    formats = scored_formats(recipe)
    with progress("score: contributions", len(rows)) as advance:
        found = contributions(
            stack, rows, recipe.draws, formats, recipe.seed,
            progress=stepwise(advance, len(rows)), directory=directory, rounded=rounded,
        )  # fmt: skip
    replayed = rows[: replay_rows(architecture, rows, recipe.replay_tokens)]
    blocks = len(architecture.blocks)
    with progress("score: exact costs of removals", blocks) as advance:
        known, step = directory / "replays.json", stepwise(advance, blocks)
        removals = removal_costs(stack, replayed, STOP, step, known)
    with progress("score: exact costs of KV formats", blocks) as advance:
        known, step = directory / "kv.json", stepwise(advance, blocks)
        kv = kv_costs(stack, replayed, STOP, step, known)
    with progress("score: exact costs of embedding and head formats", blocks) as advance:
        beside = outside_costs(stack, replayed, formats, stepwise(advance, blocks), rounded)
    return Scores(found, removals, kv, rows.shape[1], beside)


def replay_rows(architecture: Architecture, rows: Tensor, tokens: int) -> int:
    """Rows that removals are replayed on at most: of so many tokens, and at least one.

    Fewer for a deep model, but enough to tell an error: one costs the share of the depth that comes
    after it, so that all of them at a fixed number of tokens cost the square of the depth.
    """
    forwards = sum(1 - block.layer / architecture.layers for block in architecture.blocks)
    affordable = int(REPLAY_FORWARDS * len(rows) / forwards)
    return max(1, min(tokens // rows.shape[1], max(STOP.least, affordable)))


def gram_inputs(session: Session) -> dict[str, object]:
    """What decides the Gram matrices, and every student that is made with them."""
    tokens = session.recipe.repair_tokens
    return {"session": session.identity(), "tokens": tokens, "ridge": RIDGE, "version": 2}


def gram_file(session: Session) -> Grams:
    """Gram matrices of the session's teacher on score text, computed where missing."""
    run, inputs = session.run, gram_inputs(session)
    grams = Grams(run.path / "scores" / "grams.safetensors", placement=session.placement)
    if run.stage_done(REPAIR, inputs, grams.file):
        return grams
    rows, stack = session.rows("score", repair_tokens(session)), session.stack
    halves = {half: rows[start::2] for start, half in enumerate(HALVES)}
    with progress("score: what output projections read", stack.layers) as advance:
        save_grams(stack, halves, grams.file, progress=lambda layers: advance(layers, ""))
    run.sign(REPAIR, inputs)
    return grams


def repair_tokens(session: Session) -> int:
    """Tokens that Gram matrices take: a row for each half at least."""
    return max(session.recipe.repair_tokens, 2 * session.recipe.sequence_length)


def rounding_inputs(session: Session) -> dict[str, object] | None:
    """What decides the rounded teacher; None where everything is rounded to nearest."""
    recipe, formats = session.recipe, scored_formats(session.recipe)
    if recipe.rounding == "nearest" or not formats:
        return None
    return {
        "session": session.identity(),
        "rounding": [recipe.rounding, recipe.calibration_tokens, recipe.distill_length],
        "check": [recipe.score_tokens, recipe.score_length],
        "formats": formats,
        "version": 2,
    }


def rounded_teacher(session: Session) -> RoundedTeacher | None:
    """The session's teacher rounded on training text, computed where missing.

    None where everything is rounded to nearest.
    """
    run, recipe, inputs = session.run, session.recipe, rounding_inputs(session)
    if inputs is None:
        return None
    directory = run.path / "scores" / f"rounded-{fingerprint(inputs)[:12]}"
    found = RoundedTeacher(directory, recipe.rounding, session.placement)
    if not run.stage_done(ROUNDING, inputs, directory):
        rows = session.training_rows(recipe.calibration_tokens, recipe.distill_length)
        check, stack = (
            session.rows("score", recipe.score_tokens, recipe.score_length),
            session.stack,
        )
        with progress("score: the teacher in every format", stack.layers) as advance:
            round_teacher(
                stack, rows, check, scored_formats(recipe), recipe.rounding, directory,
                lambda layers: advance(layers, ""),
            )  # fmt: skip
        for other in directory.parent.glob("rounded-*"):
            if other != directory:
                shutil.rmtree(other)
        run.sign(ROUNDING, inputs)
    return found


def stepwise(advance: Advance, steps: int) -> Progress:
    """Progress given as (done, total) on a bar that counts ``steps``."""
    reached = counted(advance)
    return lambda done, total: reached(done * steps // total, "")


def counted(advance: Advance) -> Advance:
    """An ``advance`` that is told how many are done in all, not how many more."""
    seen = 0

    def reached(done: int, status: str) -> None:
        nonlocal seen
        advance(done - seen, status)
        seen = done

    return reached
