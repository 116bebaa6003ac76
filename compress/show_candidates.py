"""The tables of a search."""

from collections.abc import Iterator, Mapping
from typing import Any

from compress.runs import read_json
from compress.session import Session
from compress.show import note, table
from compress.units import format_bytes, format_count


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
    gaps = [row["gap"] for row in found if row["gap"] is not None]
    if gaps:
        note(f"largest optimality gap of a knapsack: {max(gaps):.1e} of its predicted KL")
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
