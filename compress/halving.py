"""Successive halving: finalists train in rungs, and only the better half of each goes on.

Jamieson and Talwalkar 2016, algorithm 1, with the rungs counted back from the whole distance. What
trains is one schedule (warmup, linear decay to zero) over the whole distance that a rung stops on
its way: rates of candidates compared are the same at every rung, one that goes on continues its own
checkpoint, and whoever reaches the end is, bit for bit, what training it alone would have given.
Decaying in every rung would need a warmup after each and another schedule than the distillation
that follows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.candidate import Candidate
from compress.errors import InputError
from compress.runs import fingerprint, read_json, write_json
from compress.searches.measure import Reference
from compress.session import Session
from compress.show import note
from compress.students import (
    SHORT,
    STUDENT,
    in_formats,
    is_cut,
    kl_of,
    pruned,
    train_inputs,
    train_until,
)
from compress.train import forget

RUNGS = "rungs.json"


@dataclass(frozen=True)
class Trained:
    """A candidate's KL on fresh text, nats per token, and the tokens it was trained on before."""

    kl: float
    tokens: int


def rungs(finalists: int, tokens: int) -> list[int]:
    """Tokens that a candidate has seen at the end of each rung.

    They double up to ``tokens``, and the last rung has two candidates (or all, if they are fewer):
    the choice is between equals that went the whole distance. All rungs together cost less than
    ``finalists * tokens``, since nobody trains for more than ``tokens``.
    """
    count = max(1, (finalists - 1).bit_length())
    return [-(-tokens // 2**left) for left in reversed(range(count))]


def halve(
    names: Sequence[str], ends: Sequence[int], train: Callable[[str, int], Trained]
) -> tuple[dict[str, Trained], list[str]]:
    """Train all to the first rung's end, the better half of them (rounded up) to the next, ...

    Args:
        names: the candidates; of equals the earlier is better.
        ends: tokens seen at the end of each rung.
        train: continues a candidate to so many tokens and measures it.

    Returns:
        The last figures of every candidate, and those who reached the end, best first.
    """
    found: dict[str, Trained] = {}
    going = list(names)
    for number, end in enumerate(ends):
        if number:
            going = going[: (len(going) + 1) // 2]
        for name in going:
            found[name] = train(name, end)
        going.sort(key=lambda name: found[name].kl)
    return found, going


def finals(
    session: Session, searched: Sequence[Candidate], others: Sequence[Candidate], fresh: Reference
) -> tuple[dict[str, Trained], list[str]]:
    """Halving among the searched kind's finalists; the best of other kinds go all the way.

    Returns:
        Figures by id, and the ids of all candidates that reached the end.
    """
    tokens = session.recipe.short_distill_tokens
    ends = rungs(len(searched), tokens)
    by_id = {candidate.id: candidate for candidate in (*searched, *others)}

    def train(name: str, end: int) -> Trained:
        reached = rung(session, by_id[name], end, fresh)
        if end == tokens:
            forget(session.run.path / "distill" / (name + SHORT))
        return reached

    names = [candidate.id for candidate in searched]
    found, survivors = halve(names, ends, train)
    for candidate in searched:
        last = found[candidate.id]
        goes_on = candidate.id in survivors
        note(
            f"finalist {candidate.id}: KL {last.kl:.4f} after {last.tokens} tokens"
            + ("" if goes_on else ", left behind")
        )
        forget(session.run.path / "distill" / (candidate.id + SHORT))
    for candidate in others:
        found[candidate.id] = train(candidate.id, tokens)
        note(f"finalist {candidate.id}: KL {found[candidate.id].kl:.4f}")
    return found, [*survivors, *(candidate.id for candidate in others)]


def rung(session: Session, candidate: Candidate, end: int, fresh: Reference) -> Trained:
    """The candidate trained up to ``end`` tokens of the short distillation, and its KL after.

    What was measured before a kill is read from ``rungs.json``; a rung that is trained anew takes
    back what later ones said.
    """
    if not is_cut(session, candidate):
        # In BF16 it is the teacher: there is nothing to train, its KL is that of its formats.
        whole = in_formats(session, candidate, pruned(session, candidate))
        return Trained(kl_of(whole, fresh), 0)
    name = candidate.id + SHORT
    directory = session.run.path / "distill" / name
    tokens = session.recipe.short_distill_tokens
    inputs = fingerprint(
        train_inputs(session, candidate, tokens) | {"select": session.recipe.select_tokens}
    )
    said = [row for row in read_rungs(directory / RUNGS) if row["inputs"] == inputs]
    known = next((row for row in said if row["tokens"] == end), None)
    if known is None or not (directory / STUDENT).is_dir():
        earlier = [row for row in said if row["tokens"] < end]
        write_json(directory / RUNGS, earlier)
        student = train_until(session, candidate, tokens, name, end)
        kl = kl_of(in_formats(session, candidate, student), fresh)
        known = {"tokens": end, "inputs": inputs, "kl": kl}
        write_json(directory / RUNGS, [*earlier, known])
    return Trained(known["kl"], end)


def read_rungs(file: Path) -> list[Mapping[str, Any]]:
    """What the rungs of a candidate came to, none if there is no such file."""
    rows = read_json(file) if file.is_file() else []
    if not (
        isinstance(rows, list) and all({"tokens", "inputs", "kl"} <= row.keys() for row in rows)
    ):
        raise InputError(f"{file} does not list rungs; delete it to train this finalist again")
    return rows
