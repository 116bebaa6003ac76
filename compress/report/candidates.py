"""The tables of a search."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress.core.quantities import format_bytes, format_count
from compress.core.terminal import note, table
from compress.memory.budget import Budget
from compress.report.figures import plus_minus, words
from compress.report.pareto import front
from compress.report.rows import Student, selected_of


def print_candidates(
    students: Sequence[Student],
    missing: Sequence[Mapping[str, Any]],
    budgets: Sequence[Budget],
    whole: int,
) -> None:
    """The finalists, the baselines that do not fit, and what stock loaders read.

    Of a sweep also what was chosen for every budget. ``whole`` are the teacher's bytes.
    """
    for budget in budgets:
        finalists = [s for s in students if s.finalist and s.budget == budget.bytes]
        unfit = [row["kind"] for row in missing if row["budget"] == budget.bytes]
        table(
            f"Best of each kind within {budget.description} (KL to the teacher, nats per token)",
            ["candidate", "kind", "bytes", "of teacher", "parameters", "KL", "KL distilled",
             "on tokens"],
            [*([*line(student, whole)] for student in finalists),
             *([kind, "", "does not fit", *[""] * 5] for kind in unfit)],
            left=2,
        )  # fmt: skip
    if len(budgets) > 1:
        print_front(selected_of(students), whole)
    if gaps := [student.gap for student in students if student.gap is not None]:
        note(f"largest optimality gap of a knapsack: {max(gaps):.1e} of its predicted KL")
    if stock := next((student for student in students if student.stock), None):
        note(
            f"best that stock transformers loads: {stock.id} "
            f"({format_bytes(stock.bytes)}, KL {stock.measured_kl:.4f})"
        )


def print_front(chosen: Sequence[Student], whole: int) -> None:
    """What was chosen for every budget, and whether a smaller one is as good."""
    points = [(student.bytes, student.kl) for student in chosen]
    best, rows = front(points), []
    for student, point in zip(chosen, points, strict=True):
        name, _, size, share, _, *kls = line(student, whole)
        verdict = "yes" if point in best else "dominated"
        rows.append([format_bytes(student.budget), name, size, share, *kls, verdict])
    table(
        "Chosen for every budget: KL against bytes",
        ["budget", "chosen", "bytes", "of teacher", "KL", "KL distilled", "on tokens", "Pareto"],
        rows,
        left=2,
    )


def line(student: Student, whole: int) -> Iterator[str]:
    """Cells of a candidate's row."""
    yield student.id + (" *" if student.selected else "")
    yield words(student.kind)
    yield format_bytes(student.bytes)
    yield f"{student.bytes / whole:.1%}"
    yield format_count(student.parameters)
    yield plus_minus(student.measured_kl, student.measured_se)
    yield plus_minus(student.distilled_kl)
    yield "" if student.distilled_tokens is None else f"{student.distilled_tokens:,}"
