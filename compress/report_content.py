"""What a report says, apart from how it looks: figures in words, rows, tiles."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.architecture import FORMATS, Architecture
from compress.charts import BASELINES
from compress.devices import DEVICES
from compress.memory import Deployment, Footprint, footprint, largest_context
from compress.plan import in_format, teacher_bytes
from compress.run_files import RunFiles, Student, Teacher
from compress.units import format_bytes

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
TEXT_METRICS: Mapping[str, str] = {
    "kl": "KL to the teacher",
    "nats_per_token": "nats per token",
    "bits_per_byte": "bits per byte",
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


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with its digits, a dash where there is none."""
    if value is None:
        return DASH
    return f"{value:.3g}" if value and abs(value) < 10**-digits else f"{value:,.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int = 4) -> str:
    """A value and its standard error."""
    text = number(value, digits)
    return text if value is None or error is None else f"{text} ± {number(error, digits)}"


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
        share = run.teacher.budget / teacher_bytes(run.teacher.architecture, run.teacher.deployment)
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


def worth_listing(run: RunFiles, most: int = 10) -> list[Student]:
    """The best candidates, every baseline and the selected one, best first."""
    return [
        student
        for rank, student in enumerate(run.students)
        if rank < most or student.kind in BASELINES or student is run.selected
    ]
