"""What a terminal shows of a search, an evaluation and a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.core.quantities import format_bytes, format_count, format_tokens
from compress.core.terminal import console, note, table
from compress.memory.budget import Budget
from compress.report.content import (
    MOST_ACROSS,
    Cell,
    Line,
    evaluation_grid,
    lines,
    repairs,
    servings,
    worth_listing,
)
from compress.report.figures import DASH, number, plus_minus, signed, with_error, words
from compress.report.files import RunFiles, read_run
from compress.report.rows import Student, Teacher, front, selected_of


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
            [*(student_cells(student, whole) for student in finalists),
             *([kind, "", "does not fit", *[""] * 5] for kind in unfit)],
            left=2,
        )  # fmt: skip
    if len(budgets) > 1:
        print_front(selected_of(students), whole)
    if gaps := [student.gap for student in students if student.gap is not None]:
        note(f"largest optimality gap of a knapsack: {max(gaps):.1e} of its predicted KL")
    if stock := next((student for student in students if student.stock), None):
        note(
            f"best plain BF16 checkpoint of its family: {stock.id} "
            f"({format_bytes(stock.bytes)}, KL {stock.measured_kl:.4f})"
        )


def print_front(chosen: Sequence[Student], whole: int) -> None:
    """What was chosen for every budget, and whether a smaller one is as good."""
    points = [(student.bytes, student.kl) for student in chosen]
    best, rows = front(points), []
    for student, point in zip(chosen, points, strict=True):
        name, _, size, share, _, *kls = student_cells(student, whole)
        verdict = "yes" if point in best else "dominated"
        rows.append([format_bytes(student.budget), name, size, share, *kls, verdict])
    table(
        "Chosen for every budget: KL against bytes",
        ["budget", "chosen", "bytes", "of teacher", "KL", "KL distilled", "on tokens", "Pareto"],
        rows,
        left=2,
    )


def student_cells(student: Student, whole: int) -> list[str]:
    """A candidate's row."""
    return [
        student.id + (" *" if student.selected else ""),
        words(student.kind),
        format_bytes(student.bytes),
        f"{student.bytes / whole:.1%}",
        format_count(student.parameters),
        plus_minus(student.measured_kl, student.measured_se),
        plus_minus(student.distilled_kl),
        "" if student.distilled_tokens is None else f"{student.distilled_tokens:,}",
    ]


def print_results(found: Mapping[str, Any]) -> None:
    """The evaluation as tables: models, then paired differences with standard errors."""
    tasks = sorted({task for row in found["models"].values() for task in row["tasks"]})
    text = found["text"]
    table(
        f"Held-out text: {text['tokens']} tokens in {text['sequences']} sequences",
        ["model", "bytes", "KL", "nats/token", "bits/byte", *tasks],
        [[name, *model_cells(row, tasks)] for name, row in found["models"].items()],
    )
    pairs = [
        [f"{pair['b']} - {pair['a']}", pair["metric"], plus_minus(pair["difference"], None, 4, "+"),
         plus_minus(pair["stderr"])]
        for pair in found["paired"] if pair["metric"] in ("kl", "nats_per_token")
        or pair["metric"].endswith(("acc", "acc_norm"))
    ]  # fmt: skip
    if pairs:
        table("Paired differences", ["models", "metric", "difference", "stderr"], pairs, left=2)
    for line in found["notes"]:
        note(line)


def model_cells(row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """A model's figures."""
    errors = row["stderr"]
    found = [format_bytes(row["bytes"])]
    found += [plus_minus(row[k], errors[k]) for k in ("kl", "nats_per_token", "bits_per_byte")]
    for metrics in (row["tasks"].get(task, {}) for task in tasks):
        first = next((key for key in metrics if "stderr" not in key), None)
        found.append(plus_minus(metrics[first], metrics["stderr"], 3) if first else "")
    return found


def print_table(
    rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], budget: Budget, whole: int
) -> None:
    """The last table on the terminal, and whether anything beats the joint student."""
    # Where the text gives no rows for the task choice there are no columns for it.
    choice = any(row.get("choice_accuracy") is not None for row in rows)
    columns = ["student", "bytes", "", "KL", "KL distilled", "nats", "nats dist."]
    columns += ["choice", "choice dist."] if choice else []
    figures = (("kl", "kl_se", 4), ("nats_per_token", "", 4), ("choice_accuracy", "choice_se", 3))
    shown = []
    for row in rows:
        kind = words(row["kind"])
        if row["kind"] != "teacher" and not row["fits"]:
            shown.append([kind, "does not fit", *[""] * (len(columns) - 2)])
            continue
        cells = [kind, format_bytes(row["bytes"]), f"{row['bytes'] / whole:.0%}"]
        for key, error, digits in figures:
            for when in ("", "distilled_"):
                cells.append(plus_minus(row.get(when + key), row.get(when + error), digits))
        shown.append(cells[: len(columns)])
    tokens = found["text"]["tokens"]
    table(f"Within {budget.description}, on {tokens} tokens of final text", columns, shown)
    for pair in found["paired"]:
        a, b = pair["a"], pair["b"]
        alike = a.endswith("distilled") == b.endswith("distilled")
        if pair["metric"] == "kl" and b.startswith("joint") and a != "teacher" and alike:
            shift = plus_minus(pair["difference"], pair["stderr"], sign="+")
            note(f"{b} minus {a}: KL {shift}")


def print_report(run_dir: Path) -> None:
    """Print the tables of a run on stdout, those whose files exist."""
    run = read_run(run_dir)
    if run.teacher:
        print_servings(run.teacher, run.selected)
    if run.table:
        print_lines(run)
    elif run.students:
        print_students(run)
    if run.results:
        print_grid(run.results)


def print_servings(teacher: Teacher, selected: Student | None) -> None:
    """What fits where."""
    deployment, rows = teacher.deployment, []
    for serving in servings(teacher, selected):
        taken = serving.bytes
        parts = (
            taken.weights + taken.mtp,
            taken.kv_cache,
            taken.ssm_state + taken.conv_state,
            taken.total,
        )
        verdict = "yes" if serving.fits_budget else "no"
        rows.append([serving.name, *map(format_bytes, parts), verdict])
    served = f"context {format_tokens(deployment.context)}, batch {deployment.batch_size}"
    columns = ["model", "weights", "KV cache", "states", "total", "fits the budget"]
    table(f"{teacher.name}: what fits, {served}", columns, rows)
    if teacher.note:
        console().print(f"teacher: {teacher.note}", markup=False, soft_wrap=True)
    if selected and (said := repairs(selected)):
        console().print(f"student {selected.id}: {said}", markup=False, soft_wrap=True)


def print_lines(run: RunFiles) -> None:
    """The table at equal bytes."""
    columns = ("", "bytes", "KL", "KL distilled", "minus the chosen's", "nats", "choice accuracy")
    title = "at equal bytes (KL and nats per token, ± a standard error)"
    table(title, columns, map(line_cells, lines(run)))


def line_cells(line: Line) -> tuple[str, ...]:
    """A row of the table at equal bytes; the last two figures are after distillation if any."""
    row, behind = line.row, line.behind
    name = words(row["kind"] or row["name"]) + (" *" if line.chosen else "")
    size = DASH if row["bytes"] is None else format_bytes(row["bytes"])
    if row["kl"] is None:
        return (name, size, "does not fit", "", "", "", "")
    after = "" if row["distilled_kl"] is None else "distilled_"
    return (
        name,
        size,
        with_error(row["kl"], row["kl_se"]),
        with_error(row["distilled_kl"], row["distilled_kl_se"]),
        DASH if behind.value is None else f"{signed(behind.value)} ± {number(behind.stderr)}",
        number(row[f"{after}nats_per_token"]),
        with_error(row[f"{after}choice_accuracy"], row[f"{after}choice_se"], 3),
    )


def print_students(run: RunFiles) -> None:
    """The candidates worth listing."""
    title = f"candidates, best first ({len(run.students)} in all; KL in nats per token)"
    columns = ["id", "kind", "bytes", "parameters", "repaired"]
    columns += ["predicted KL", "measured KL", "distilled KL"]
    rows = [
        [student.id, words(student.kind), format_bytes(student.bytes),
         format_count(student.parameters), str(len(student.repaired)),
         number(student.predicted_kl), with_error(student.measured_kl, student.measured_se),
         number(student.distilled_kl)]
        for student in worth_listing(run)
    ]  # fmt: skip
    table(title, columns, rows, left=2)


def print_grid(results: Mapping[str, Any]) -> None:
    """Every metric of every model; if they are few, with paired differences from the first."""
    grid = evaluation_grid(results)
    few = len(results["models"]) <= MOST_ACROSS
    remark = f" (in brackets: paired difference from {grid.reference})" if few else ""
    rows = [(words(label), *(cell_text(cell, few) for cell in cells)) for label, cells in grid.rows]
    table(f"evaluation, ± a standard error{remark}", ("", *map(words, grid.columns)), rows)


def cell_text(cell: Cell, change: bool) -> str:
    """A figure, its standard error and, if asked for, its difference in one line."""
    text = with_error(cell.figure.value, cell.figure.stderr)
    if not change or cell.change.value is None:
        return text
    return f"{text} ({signed(cell.change.value)} ± {number(cell.change.stderr)})"
