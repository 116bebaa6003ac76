"""Successive halving: finalists train in rungs, and only the better half of each goes on.

Jamieson and Talwalkar 2016, algorithm 1, with the rungs counted back from the whole distance. What
trains is one schedule (warmup, linear decay to zero) over the whole distance that a rung stops on
its way: rates of candidates compared are the same at every rung, one that goes on continues its own
checkpoint, and whoever reaches the end is, bit for bit, what training it alone would have given.
Decaying in every rung would need a warmup after each and another schedule than the distillation
that follows.

A candidate counts for the better of what it was as cut and what training made of it so far: a short
training can push one that is close to its teacher away, and such a one stays as it was cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.core.errors import InputError
from compress.core.files import fingerprint, read_json, write_json
from compress.core.terminal import note
from compress.measure.kl import Reference
from compress.run.session import Session
from compress.run.students import (
    RESULT,
    SHORT,
    STUDENT,
    in_formats,
    is_cut,
    kl_of,
    pruned,
    train_inputs,
    train_until,
)
from compress.student.candidate import Candidate
from compress.train.loop import forget

RUNGS = "halving.json"


@dataclass(frozen=True)
class Trained:
    """A candidate's KL on fresh text, nats per token, and the tokens it was trained on before.

    ``tokens`` is 0 where it is better as it was cut.
    """

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
            f"finalist {candidate.id}: {said(session, candidate, last)}"
            + ("" if goes_on else ", left behind")
        )
        forget(session.run.path / "distill" / (candidate.id + SHORT))
    for candidate in others:
        found[candidate.id] = train(candidate.id, tokens)
        note(f"finalist {candidate.id}: {said(session, candidate, found[candidate.id])}")
    return found, [*survivors, *(candidate.id for candidate in others)]


def said(session: Session, candidate: Candidate, last: Trained) -> str:
    """The figures of a finalist, in words."""
    if not is_cut(session, candidate):
        return f"KL {last.kl:.4f}, nothing is cut and nothing to train"
    if not last.tokens:
        return f"KL {last.kl:.4f} as it was cut, which training made worse"
    return f"KL {last.kl:.4f} after {last.tokens} tokens"


def rung(session: Session, candidate: Candidate, end: int, fresh: Reference) -> Trained:
    """The candidate trained up to ``end`` tokens of the short distillation, and its KL after.

    What was measured before a kill is read from ``halving.json``; a rung that is trained anew takes
    back what later ones said.
    """
    cut = pruned(session, candidate)
    if not is_cut(session, candidate):
        # In BF16 it is the teacher: there is nothing to train, its KL is that of its formats.
        return Trained(kl_of(in_formats(session, candidate, cut), fresh), 0)
    name = candidate.id + SHORT
    directory = session.run.path / "distill" / name
    tokens = session.recipe.short_distill_tokens
    inputs = fingerprint(
        train_inputs(session, candidate, tokens) | {"select": session.recipe.select_tokens}
    )
    known = read_rungs(directory / RUNGS, inputs)
    if 0 not in known:
        known = {0: kl_of(in_formats(session, candidate, cut), fresh)}
    if end not in known or not (directory / STUDENT).is_dir():
        known = {seen: kl for seen, kl in known.items() if seen < end}
        write_rungs(directory / RUNGS, inputs, known)
        student = train_until(session, candidate, tokens, name, end)
        known[end] = kl_of(in_formats(session, candidate, student), fresh)
        write_rungs(directory / RUNGS, inputs, known)
    result = {"before": known[0], "after": known[end], "tokens": end}
    write_json(directory / RESULT, result)
    return min(Trained(known[end], end), Trained(known[0], 0), key=lambda reached: reached.kl)


def write_rungs(file: Path, inputs: str, known: Mapping[int, float]) -> None:
    """Write the KL by tokens of a candidate."""
    write_json(file, {"inputs": inputs, "kl": {str(seen): kl for seen, kl in known.items()}})


def read_rungs(file: Path, inputs: str) -> dict[int, float]:
    """KL by tokens of a candidate, none if there is no such file or it is of other inputs."""
    found = read_json(file) if file.is_file() else {"inputs": None, "kl": {}}
    if not isinstance(found, dict) or {"inputs", "kl"} > found.keys():
        raise InputError(f"{file} does not list rungs; delete it to train this finalist again")
    if found["inputs"] != inputs:
        return {}
    return {int(seen): float(kl) for seen, kl in found["kl"].items()}
