"""What a report says, apart from how it looks: figures in words, rows, tiles."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.core.quantities import format_bytes
from compress.formats.table import WEIGHT_ONLY
from compress.memory.budget import in_format, teacher_bytes
from compress.memory.devices import DEVICES
from compress.memory.footprint import Footprint, footprint, largest_context
from compress.report.figures import MINUS, number, words
from compress.report.files import RunFiles
from compress.report.rows import Student, Teacher
from compress.student.candidate import repair_note

TEXT_METRICS: Mapping[str, str] = {
    "kl": "KL to the teacher",
    "nats_per_token": "nats per token",
    "bits_per_byte": "bits per byte",
}
# Two standard errors: what it takes to call a difference one.
CLEAR = 2.0
# More models than this go down the page rather than across.
MOST_ACROSS = 4
# The baseline of the headline.
RIVAL = "uniform"
# KL before and after distillation.
KLs = tuple[float | None, float | None]


@dataclass(frozen=True)
class Serving:
    """One way to serve a model: its bytes, and the largest context by device; None: no limit."""

    name: str
    bytes: Footprint
    fits_budget: bool
    contexts: Mapping[str, int | None]


def servings(teacher: Teacher, selected: Student | None) -> Iterator[Serving]:
    """The teacher in every format, then the student, each in the run's deployment."""
    served = [(f"teacher, {f.upper()}", in_format(teacher.architecture, f)) for f in WEIGHT_ONLY]
    if selected:
        served.append((f"student {selected.id}", selected.architecture))
    alone = replace(teacher.deployment, context=1)
    for name, architecture in served:
        taken = footprint(architecture, teacher.deployment)
        contexts = {
            device.name: largest_context(architecture, alone, device.visible_bytes)
            for device in DEVICES.values()
        }
        yield Serving(name, taken, taken.total <= teacher.budget, contexts)


def repairs(student: Student) -> str:
    """How many blocks of a student are repaired and what that means, empty if none is."""
    blocks = len(student.architecture.blocks)
    return repair_note(len(student.repaired), blocks) if student.repaired else ""


def verdict(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """Tiles (label, figure, remark) with what the run came to, as far as it has come."""
    if run.teacher:
        share = run.teacher.budget / teacher_bytes(run.teacher.architecture, run.teacher.deployment)
        yield "budget", format_bytes(run.teacher.budget), f"{share:.0%} of the teacher in BF16"
    if (selected := run.selected) is None:
        return
    left = run.teacher.budget - selected.bytes if run.teacher else None
    remark = "" if left is None else f"{format_bytes(left)} to spare" if left >= 0 else "over"
    yield "student", format_bytes(selected.bytes), remark
    text, ours, theirs = compared(run, selected)
    # Both after distillation, or both before it: anything else compares two things.
    stages = list(zip(("before", "after"), ours, theirs, strict=True))
    if known := [(when, kl) for when, kl, _ in stages if kl is not None]:
        when, kl = known[-1]
        remark = f"per token, {when} distillation, {text} text"
        yield "KL to the teacher", f"{number(kl)} nats", remark
    both = [(when, kl / rival) for when, kl, rival in stages if kl is not None and rival]
    if both and selected.kind != RIVAL:
        when, ratio = both[-1]
        change = f"{ratio - 1:+.0%}".replace("-", MINUS)
        yield "KL against a uniform cut", change, f"same budget, both {when} distillation"


def compared(run: RunFiles, selected: Student) -> tuple[str, KLs, KLs]:
    """Which text KL is from, and KL before and after distillation: the selected's, the rival's."""
    final = {row["kind"]: (row["kl"], row["distilled_kl"]) for row in reversed(run.table)}
    for row in run.table:
        if row["name"] == selected.id:
            return "final", (row["kl"], row["distilled_kl"]), final.get(RIVAL, (None, None))
    found = {s.kind: (s.measured_kl, s.distilled_kl) for s in reversed(run.students)}
    ours = (selected.measured_kl, selected.distilled_kl)
    return "selection", ours, found.get(RIVAL, (None, None))


@dataclass(frozen=True)
class Figure:
    """A figure, as of a metric or of a difference, and its standard error."""

    value: float | None = None
    stderr: float | None = None

    @property
    def clear(self) -> bool:
        """Whether a difference is more than two of its standard errors."""
        return bool(self.value and self.stderr and abs(self.value) > CLEAR * self.stderr)


@dataclass(frozen=True)
class Line:
    """A row of the table at equal bytes; ``behind`` is its KL minus that of the chosen, paired."""

    row: Mapping[str, Any]
    chosen: bool
    behind: Figure


def lines(run: RunFiles) -> list[Line]:
    """The table at equal bytes, each row compared with the chosen student on the same sequences."""
    chosen = [row for row in run.table if run.selected and row["name"] == run.selected.id]
    changes: dict[tuple[str, str], Figure] = {}
    for pair in run.results["paired"] if run.results and chosen else ():
        if pair["metric"] == "kl":
            changes[pair["b"], pair["a"]] = Figure(pair["difference"], pair["stderr"])
            changes[pair["a"], pair["b"]] = Figure(-pair["difference"], pair["stderr"])
    against = model_of(chosen[0]) if chosen else ""
    behind = [changes.get((model_of(row), against), Figure()) for row in run.table]
    return [Line(row, row in chosen, change) for row, change in zip(run.table, behind, strict=True)]


def model_of(row: Mapping[str, Any]) -> str:
    """What the evaluation calls the model of a table's row, in its latest state."""
    kind: str = row["kind"]
    return kind if row["distilled_kl"] is None else f"{kind} distilled"


@dataclass(frozen=True)
class Cell:
    """A metric of a model, and its paired difference from the first model."""

    figure: Figure
    change: Figure


@dataclass(frozen=True)
class Grid:
    """The evaluation: models across and metrics down, or the other way if models are many."""

    reference: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


def evaluation_grid(results: Mapping[str, Any]) -> Grid:
    """Every metric of every model; tasks whose group is listed are left to ``results.json``."""
    models: Mapping[str, Any] = results["models"]
    reference = next(iter(models))
    changes = {
        (pair["b"], pair["metric"]): Figure(pair["difference"], pair["stderr"])
        for pair in results["paired"]
        if pair["a"] == reference
    }
    metrics = metrics_of(models[reference])

    def cell(name: str, metric: str) -> Cell:
        return Cell(figure_of(models[name], metric), changes.get((name, metric), Figure()))

    if len(models) > MOST_ACROSS:
        by_model = [(name, [cell(name, metric) for metric in metrics]) for name in models]
        return Grid(reference, list(metrics.values()), by_model)
    by_metric = [(metrics[metric], [cell(name, metric) for name in models]) for metric in metrics]
    return Grid(reference, list(models), by_metric)


def metrics_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Label of every metric of a model, by the name that paired differences use."""
    found = {metric: label for metric, label in TEXT_METRICS.items() if metric in model}
    tasks: Mapping[str, Any] = model["tasks"]
    for task, metrics in tasks.items():
        if any(task.startswith(f"{group}_") for group in tasks):
            continue
        found |= {f"{task}/{m}": f"{task}, {words(m)}" for m in metrics if not m.endswith("stderr")}
    return found


def figure_of(model: Mapping[str, Any], metric: str) -> Figure:
    """A metric's value and standard error."""
    if "/" not in metric:
        return Figure(model.get(metric), model.get("stderr", {}).get(metric))
    task, _, name = metric.partition("/")
    metrics = model["tasks"].get(task, {})
    first = next(iter(metrics), None)
    return Figure(metrics.get(name), metrics.get("stderr" if name == first else f"{name}_stderr"))


def worth_listing(run: RunFiles, most: int = 10) -> list[Student]:
    """The best candidates, the finalists, the best of every kind and the selected one."""
    first: dict[str, Student] = {}
    for student in run.students:
        first.setdefault(student.kind, student)
    kept = [run.selected, *run.students[:most], *first.values()]
    return [s for s in run.students if s.finalist or any(s is other for other in kept)]
