"""What a run found, as one self-contained page and as tables; reads only the run directory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from compress.architecture import FORMATS, Architecture
from compress.charts import BASELINES, distillation_curve, inline_svg, kl_against_bytes
from compress.devices import DEVICES
from compress.families import count_parameters
from compress.layer_map import layer_map
from compress.memory import Deployment, Footprint, footprint, largest_context
from compress.plan import in_format
from compress.run_files import RunFiles, Student, Teacher, read_run
from compress.runs import write_text
from compress.show import console, table
from compress.units import format_bytes, format_count, format_tokens

PARTS = ("weights", "kv_cache", "ssm_state", "conv_state", "workspace")
TEXT_METRICS: Mapping[str, str] = {
    "kl": "KL to the teacher",
    "nats_per_token": "nats per token",
    "bits_per_byte": "bits per byte",
}
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
# What a row of table.json may leave out.
TABLE_ROW: dict[str, Any] = {
    "kind": "",
    "bytes": None,
    "fits": True,
    "kl": None,
    "kl_se": None,
    "distilled_kl": None,
    "distilled_kl_se": None,
    "nats_per_token": None,
    "choice_accuracy": None,
    "choice_se": None,
}
# Two standard errors: what it takes to call a difference one.
CLEAR = 2.0


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One way to serve a model: its bytes and where it fits."""

    name: str
    bytes: Footprint
    fits_budget: bool | None
    contexts: Mapping[str, int | None]


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
    selected = run.selected
    drawn = {
        "kl": kl_against_bytes(run.students, run.teacher.budget if run.teacher else None),
        "distillation": distillation_curve(run.curves, selected.id if selected else None),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def render(run: RunFiles, figures: Mapping[str, Figure]) -> str:
    """The page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bytes": format_bytes,
        "count": format_count,
        "tokens": format_tokens,
        "figure": number,
        "signed": signed,
        "words": words,
        "short": short,
    }
    template = environment.from_string((files("compress") / "report.html.j2").read_text())
    selected = run.selected
    picture = (
        layer_map(run.teacher.architecture, selected.architecture, run.keep)
        if run.teacher and selected
        else None
    )
    return template.render(
        run=run,
        teacher=run.teacher,
        selected=selected,
        verdict=verdict(run),
        servings=list(servings(run.teacher, selected)) if run.teacher else [],
        devices=sorted(DEVICES.values(), key=lambda device: device.visible_bytes),
        parts=PARTS,
        table=[TABLE_ROW | row for row in run.table],
        candidates=worth_listing(run),
        picture=picture,
        charts={name: Markup(inline_svg(chart, name)) for name, chart in figures.items()},
        evaluation=evaluation_rows(run.results) if run.results else None,
        reference=next(iter(run.results["models"])) if run.results else None,
        parameters=count_parameters(run.teacher.architecture) if run.teacher else None,
    )


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with its digits, a dash where there is none."""
    if value is None:
        return DASH
    return f"{value:.3g}" if value and abs(value) < 10**-digits else f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign; a true minus sign."""
    if value is None:
        return DASH
    return f"{value:+,.{digits}f}".replace("-", MINUS)


def words(name: str) -> str:
    """A name of the files as a person writes it."""
    return name.replace("_", " ")


def short(tokens: int) -> str:
    """A number of tokens in three digits, k and M being powers of two: "348k"."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size:
            return (
                f"{tokens / size:,.3g}{unit}"
                if tokens < 1000 * size
                else f"{tokens // size:,}{unit}"
            )
    return str(tokens)


def servings(teacher: Teacher, selected: Student | None) -> Iterator[Serving]:
    """The teacher in every format, then the student, each in the run's deployment."""
    served = [(f"teacher, {f.upper()}", in_format(teacher.architecture, f)) for f in FORMATS]
    if selected:
        served.append((f"student {selected.id}", selected.architecture))
    for name, architecture in served:
        taken = footprint(architecture, teacher.deployment)
        yield Serving(
            name=name,
            bytes=taken,
            fits_budget=None if teacher.budget is None else taken.total <= teacher.budget,
            contexts={
                device.name: context_on(architecture, teacher.deployment, device.visible_bytes)
                for device in DEVICES.values()
            },
        )


def context_on(architecture: Architecture, deployment: Deployment, visible: int) -> int | None:
    """The largest context in so much memory; None: no limit."""
    return largest_context(architecture, replace(deployment, context=1), visible)


def verdict(run: RunFiles) -> list[tuple[str, str, str]]:
    """Tiles (label, figure, remark) with what the run came to, as far as it has come."""
    tiles: list[tuple[str, str, str]] = []
    if run.teacher and run.teacher.budget is not None:
        share = run.teacher.budget / teacher_total(run.teacher)
        tiles.append(
            ("budget", format_bytes(run.teacher.budget), f"{share:.0%} of the teacher in BF16")
        )
    if (selected := run.selected) is None:
        return tiles
    left = run.teacher.budget - selected.bytes if run.teacher and run.teacher.budget else None
    remark = "" if left is None else f"{format_bytes(left)} to spare" if left >= 0 else "over"
    tiles.append(("student", format_bytes(selected.bytes), remark))
    if selected.kl is not None:
        after = "before distillation" if selected.distilled_kl is None else "after distillation"
        tiles.append(("KL to the teacher", f"{number(selected.kl)} nats", f"per token, {after}"))
    if (rival := best_of(run.students, "uniform")) and rival is not selected:
        # Both before distillation unless both are after it: anything else compares two things.
        pairs = (
            (selected.distilled_kl, rival.distilled_kl, "both distilled"),
            (selected.measured_kl, rival.measured_kl, "neither distilled"),
        )
        for ours, theirs, how in pairs:
            if ours is not None and theirs:
                change = f"{ours / theirs - 1:+.0%}".replace("-", MINUS)
                tiles.append(("KL against a uniform cut", change, f"same budget, {how}"))
                break
    return tiles


def teacher_total(teacher: Teacher) -> int:
    """Bytes of the teacher in BF16 in the run's deployment: what a percentage is of."""
    whole = replace(in_format(teacher.architecture, "bf16"), kv_format="bf16")
    return footprint(whole, teacher.deployment).total


def best_of(students: Sequence[Student], kind: str) -> Student | None:
    """The first student of a kind; the list is best first."""
    return next((student for student in students if student.kind == kind), None)


def evaluation_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per metric: a cell per model, with its difference from the first model.

    A cell is ``{"value", "stderr", "difference", "error", "clear"}``; ``clear`` says whether the
    difference is more than two of its standard errors.
    """
    models: Mapping[str, Any] = results["models"]
    reference = next(iter(models))
    changes = {(row["b"], row["metric"]): row for row in results["paired"] if row["a"] == reference}
    rows = []
    for metric, label in metrics_of(models[reference]).items():
        cells = []
        for name, model in models.items():
            value, stderr = cell_value(model, metric)
            change = changes.get((name, metric), {"difference": None, "stderr": None})
            difference, error = change["difference"], change["stderr"]
            cells.append(
                {
                    "value": value,
                    "stderr": stderr,
                    "difference": difference,
                    "error": error,
                    "clear": bool(error and abs(difference) > CLEAR * error),
                }
            )
        rows.append({"metric": label, "cells": cells})
    return rows


def metrics_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Label of every metric of a model, by the name that paired differences use."""
    found = dict(TEXT_METRICS)
    for task, metrics in model["tasks"].items():
        found |= {f"{task}/{m}": f"{task}, {words(m)}" for m in metrics if not m.endswith("stderr")}
    return found


def cell_value(model: Mapping[str, Any], metric: str) -> tuple[float | None, float | None]:
    """Value and standard error of a metric."""
    if "/" not in metric:
        return model[metric], model.get("stderr", {}).get(metric)
    task, _, name = metric.partition("/")
    metrics = model["tasks"].get(task, {})
    first = next(iter(metrics), None)
    return metrics.get(name), metrics.get("stderr" if name == first else f"{name}_stderr")


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
            (
                serving.name,
                format_bytes(serving.bytes.weights),
                format_bytes(serving.bytes.kv_cache),
                format_bytes(serving.bytes.ssm_state + serving.bytes.conv_state),
                format_bytes(serving.bytes.total),
                {None: DASH, True: "yes", False: "no"}[serving.fits_budget],
            )
            for serving in servings(teacher, selected)
        ],
    )
    if teacher.note:
        console().print(f"teacher: {teacher.note}", markup=False, soft_wrap=True)


def print_table(run: RunFiles) -> None:
    """The table at equal bytes."""
    columns = ("", "bytes", "KL", "KL distilled", "nats per token", "choice accuracy")
    table("at equal bytes (KL in nats per token, ± a standard error)", columns, [
        (
            words(row["name"]),
            format_bytes(row["bytes"]) if row.get("bytes") is not None else DASH,
            *(
                ("does not fit", "", "", "")
                if row.get("kl") is None and not row.get("fits", True)
                else (
                    with_error(row.get("kl"), row.get("kl_se")),
                    with_error(row.get("distilled_kl"), row.get("distilled_kl_se")),
                    number(row.get("nats_per_token")),
                    with_error(row.get("choice_accuracy"), row.get("choice_se"), 3),
                )
            ),
        )
        for row in run.table
    ])  # fmt: skip


def with_error(value: float | None, error: float | None, digits: int = 4) -> str:
    """A value and its standard error."""
    text = number(value, digits)
    return text if value is None or error is None else f"{text} ± {number(error, digits)}"


def worth_listing(run: RunFiles, most: int = 10) -> list[Student]:
    """The best candidates, every baseline and the selected one, best first."""
    return [
        student
        for rank, student in enumerate(run.students)
        if rank < most or student.kind in BASELINES or student is run.selected
    ]


def print_candidates(run: RunFiles) -> None:
    """The candidates worth listing."""
    table(
        f"candidates, best first ({len(run.students)} in all; KL in nats per token)",
        ("id", "kind", "bytes", "parameters", "predicted KL", "measured KL", "distilled KL"),
        [
            (
                student.id,
                words(student.kind),
                format_bytes(student.bytes),
                format_count(student.parameters),
                number(student.predicted_kl),
                with_error(student.measured_kl, student.measured_se),
                number(student.distilled_kl),
            )
            for student in worth_listing(run)
        ],
        left=2,
    )


def print_evaluation(results: Mapping[str, Any]) -> None:
    """Every metric of every model; differences from the first model in brackets."""
    rows = [
        (
            row["metric"],
            *(
                with_error(cell["value"], cell["stderr"])
                + ("" if cell["difference"] is None else f" ({signed(cell['difference'])}")
                + ("" if cell["difference"] is None else f" ± {number(cell['error'])})")
                for cell in row["cells"]
            ),
        )
        for row in evaluation_rows(results)
    ]
    names = list(results["models"])
    table(f"evaluation (in brackets: paired difference from {names[0]})", ("", *names), rows)
