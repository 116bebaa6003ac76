"""What a run found, as one self-contained page and as tables; reads only the run directory."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from compress.core.files import write_text
from compress.core.quantities import format_bytes, format_count, format_tokens
from compress.core.terminal import console, table
from compress.memory.devices import DEVICES
from compress.model.families import count_parameters
from compress.report.charts import distillation_curve, inline_svg, kl_against_bytes
from compress.report.content import (
    MOST_ACROSS,
    Cell,
    Line,
    cards_matter,
    evaluation_grid,
    lines,
    repairs,
    servings,
    verdict,
    worth_listing,
)
from compress.report.figures import DASH, number, short, signed, with_error, words
from compress.report.files import RunFiles, read_run
from compress.report.layer_map import layer_map
from compress.report.rows import Student, Teacher

PARTS = ("weights", "kv_cache", "ssm_state", "conv_state", "workspace")


def report(run_dir: Path) -> Path:
    """Write ``report/index.html`` of a run; sections appear when their files exist.

    Raises:
        InputError: the directory is no run, or a file in it is not what it should be.
    """
    run = read_run(run_dir)
    page = run_dir / "report" / "index.html"
    figures = charts(run)
    page.parent.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(page.with_name(f"{name}.png"), dpi=160, facecolor="white")
    write_text(page, render(run, figures))
    return page


def charts(run: RunFiles) -> dict[str, Figure]:
    """The charts that the run has files for, by name."""
    drawn = {
        "kl": kl_against_bytes(run.students, run.teacher.budget if run.teacher else None),
        "distillation": distillation_curve(run.curves, run.students, run.selected),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def render(run: RunFiles, figures: Mapping[str, Figure]) -> str:
    """The page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bytes": format_bytes, "count": format_count, "tokens": format_tokens, "figure": number,
        "signed": signed, "words": words, "short": short,
    }  # fmt: skip
    page = (files("compress.report") / "page.html.j2").read_text(encoding="utf-8")
    selected, picture = run.selected, None
    if run.teacher and selected:
        picture = layer_map(run.teacher.architecture, selected.architecture, run.keep)
    shown = list(servings(run.teacher, selected)) if run.teacher else []
    return environment.from_string(page).render(
        run=run,
        teacher=run.teacher,
        selected=selected,
        verdict=list(verdict(run)),
        servings=shown,
        cards_matter=bool(shown) and cards_matter(shown),
        devices=sorted(DEVICES.values(), key=lambda device: device.visible_bytes),
        parts=PARTS,
        lines=lines(run),
        candidates=worth_listing(run),
        picture=picture,
        repairs=repairs(selected) if selected else "",
        charts={name: Markup(inline_svg(chart, name)) for name, chart in figures.items()},
        evaluation=evaluation_grid(run.results) if run.results else None,
        parameters=count_parameters(run.teacher.architecture) if run.teacher else None,
    )


def print_report(run_dir: Path) -> None:
    """Print the tables of a run on stdout, those whose files exist."""
    run = read_run(run_dir)
    if run.teacher:
        print_servings(run.teacher, run.selected)
    if run.table:
        print_table(run)
    elif run.students:
        print_candidates(run)
    if run.results:
        print_evaluation(run.results)


def print_servings(teacher: Teacher, selected: Student | None) -> None:
    """What fits where."""
    deployment = teacher.deployment
    served = f"context {format_tokens(deployment.context)}, batch {deployment.batch_size}"
    table(
        f"{teacher.name}: what fits, {served}",
        ("model", "weights", "KV cache", "states", "total", "fits the budget"),
        [
            [
                serving.name,
                *map(format_bytes, (serving.bytes.weights, serving.bytes.kv_cache)),
                format_bytes(serving.bytes.ssm_state + serving.bytes.conv_state),
                format_bytes(serving.bytes.total),
                "yes" if serving.fits_budget else "no",
            ]
            for serving in servings(teacher, selected)
        ],
    )
    if teacher.note:
        console().print(f"teacher: {teacher.note}", markup=False, soft_wrap=True)
    if selected and (note := repairs(selected)):
        console().print(f"student {selected.id}: {note}", markup=False, soft_wrap=True)


def print_table(run: RunFiles) -> None:
    """The table at equal bytes."""
    columns = ("", "bytes", "KL", "KL distilled", "minus the chosen's", "nats", "choice accuracy")
    table(
        "at equal bytes (KL and nats per token, ± a standard error)",
        columns,
        [table_cells(line) for line in lines(run)],
    )


def table_cells(line: Line) -> tuple[str, ...]:
    """A row of the table at equal bytes; the last two figures are after distillation if any."""
    row = line.row
    name = words(row["kind"] or row["name"]) + (" *" if line.chosen else "")
    size = DASH if row["bytes"] is None else format_bytes(row["bytes"])
    if row["kl"] is None:
        return (name, size, "does not fit", "", "", "", "")
    after = "" if row["distilled_kl"] is None else "distilled_"
    behind = line.behind
    return (
        name,
        size,
        with_error(row["kl"], row["kl_se"]),
        with_error(row["distilled_kl"], row["distilled_kl_se"]),
        DASH if behind.value is None else f"{signed(behind.value)} ± {number(behind.stderr)}",
        number(row[f"{after}nats_per_token"]),
        with_error(row[f"{after}choice_accuracy"], row[f"{after}choice_se"], 3),
    )


def print_candidates(run: RunFiles) -> None:
    """The candidates worth listing."""
    table(
        f"candidates, best first ({len(run.students)} in all; KL in nats per token)",
        ["id", "kind", "bytes", "parameters", "repaired",
         *(f"{when} KL" for when in ("predicted", "measured", "distilled"))],
        [
            [student.id, words(student.kind), format_bytes(student.bytes),
             format_count(student.parameters), str(len(student.repaired)),
             number(student.predicted_kl), with_error(student.measured_kl, student.measured_se),
             number(student.distilled_kl)]
            for student in worth_listing(run)
        ],
        left=2,
    )  # fmt: skip


def print_evaluation(results: Mapping[str, Any]) -> None:
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
