"""The finalists of a search: trained alike, measured on text that the search has not seen, chosen.

A candidate is trained as it is served, in its formats, and counts for the better of what it was
before and what training made of it: a short one can push away what is close to its teacher.
"""

from collections.abc import Sequence
from dataclasses import replace

from compress.core.terminal import note
from compress.measure.kl import Reference
from compress.run.bench import Row
from compress.run.rounding import pruned
from compress.run.session import Session
from compress.run.students import SHORT, trained
from compress.searches.baselines import main_kind
from compress.searches.space import Space


def with_finalists(
    session: Session, space: Space, rows: Sequence[Row], fresh: Reference
) -> list[Row]:
    """All rows, the finalists' students written and shortly distilled; best first, one selected.

    Finalists are the best of the searched kind and the best of every other.
    """
    main = main_kind(space)
    final = best_of(rows, main, session.recipe.finalists)
    for row in final:
        pruned(session, row.trial.candidate)
    done = [replace(row, finalist=True) for row in final]
    if session.recipe.short_distill_tokens:
        done = [tried(session, row, fresh) for row in done]
    done.sort(key=rank)
    allowed = set(space.formats)
    best = next(row for row in done if row.trial.candidate.architecture.formats <= allowed)
    ids = {row.trial.candidate.id for row in final}
    others = [row for row in sorted(rows, key=rank) if row.trial.candidate.id not in ids]
    return [*(replace(row, selected=row is best) for row in done), *others]


def tried(session: Session, row: Row, fresh: Reference) -> Row:
    """The row with its KL on fresh text, in its formats, and the tokens it was trained on before.

    0 tokens where it is better untrained, and where it is the teacher itself.
    """
    candidate, tokens = row.trial.candidate, session.recipe.short_distill_tokens
    before, after = trained(session, candidate, tokens, candidate.id + SHORT, fresh)
    reached = replace(row, distilled_kl=before, distilled_tokens=0)
    if after is None:
        said = "nothing is changed and nothing to train"
    elif after < before:
        reached = replace(row, distilled_kl=after, distilled_tokens=tokens)
        said = f"after {tokens} tokens"
    else:
        said = "untrained: training made it worse"
    note(f"finalist {candidate.id}: KL {reached.distilled_kl:.4f} {said}")
    return reached


def best_of(rows: Sequence[Row], main: str, count: int) -> list[Row]:
    """The best rows of the searched kind, so many, and the best of every other."""
    ordered = sorted(rows, key=rank)
    found = [row for row in ordered if row.kind == main][:count]
    kinds = {row.kind for row in ordered} - {main}
    return found + [next(row for row in ordered if row.kind == kind) for kind in sorted(kinds)]


def rank(row: Row) -> tuple[bool, float]:
    """Best first, those stopped early last; KL after distillation where they have it."""
    after = row.distilled_kl
    return not row.trial.complete, row.trial.kl if after is None else after
