"""The tables of a search."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress.core.files import read_json
from compress.core.quantities import format_bytes, format_count
from compress.core.terminal import note, table
from compress.report.pareto import front
from compress.run.session import Session


def print_candidates(session: Session) -> None:
    """The finalists, the baselines that do not fit, and what stock loaders read.

    Of a sweep also what was chosen for every budget.
    """
    found: list[Mapping[str, Any]] = read_json(session.run.path / "candidates.json")
    missing: list[Mapping[str, Any]] = read_json(session.run.path / "baselines.json")
    sweep, whole = session.at_each_budget(), session.teacher_bytes
    for one in sweep:
        budget = one.budget.bytes
        lines = [
            list(line(row, whole)) for row in found if row["finalist"] and row["budget"] == budget
        ]
        lines += [
            [row["kind"], "", "does not fit", *[""] * 5]
            for row in missing
            if row["budget"] == budget
        ]
        table(
            f"Best of each kind within {one.budget.description} "
            "(KL to the teacher, nats per token)",
            [
                "candidate",
                "kind",
                "bytes",
                "of teacher",
                "parameters",
                "KL",
                "KL distilled",
                "on tokens",
            ],
            lines,
            left=2,
        )
    if len(sweep) > 1:
        print_front(found, whole)
    gaps = [row["gap"] for row in found if row["gap"] is not None]
    if gaps:
        note(f"largest optimality gap of a knapsack: {max(gaps):.1e} of its predicted KL")
    stock = next((row for row in found if row["stock"]), None)
    if stock is not None:
        note(
            f"best that stock transformers loads: {stock['id']} "
            f"({format_bytes(stock['bytes'])}, KL {stock['measured_kl']:.4f})"
        )


def print_front(found: Sequence[Mapping[str, Any]], whole: int) -> None:
    """What was chosen for every budget, and whether a smaller one is as good."""
    chosen = [row for row in found if row["selected"]]
    points = [(row["bytes"], latest_kl(row)) for row in chosen]
    best = front(points)
    table(
        "Chosen for every budget: KL against bytes",
        ["budget", "chosen", "bytes", "of teacher", "KL", "KL distilled", "on tokens", "Pareto"],
        [
            [
                format_bytes(row["budget"]),
                *list(line(row, whole))[:1],
                *list(line(row, whole))[2:4],
                *list(line(row, whole))[5:],
                "yes" if point in best else "dominated",
            ]
            for row, point in zip(chosen, points, strict=True)
        ],
        left=2,
    )


def latest_kl(row: Mapping[str, Any]) -> float:
    """KL of a candidate's row: after distillation if it had any."""
    kl: float = row["measured_kl"] if row["distilled_kl"] is None else row["distilled_kl"]
    return kl


def line(row: Mapping[str, Any], whole: int) -> Iterator[str]:
    """Cells of a candidate's row."""
    yield row["id"] + (" *" if row["selected"] else "")
    yield row["kind"].replace("_", " ")
    yield format_bytes(row["bytes"])
    yield f"{row['bytes'] / whole:.1%}"
    yield format_count(row["parameters"])
    yield f"{row['measured_kl']:.4f} ± {row['measured_se']:.4f}"
    yield "" if row["distilled_kl"] is None else f"{row['distilled_kl']:.4f}"
    yield "" if row["distilled_tokens"] is None else f"{row['distilled_tokens']:,}"
