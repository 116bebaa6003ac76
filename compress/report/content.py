"""What a report says, apart from how it looks: figures in words, rows, tiles."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.core.quantities import format_bytes
from compress.formats.table import FORMATS
from compress.memory.budget import in_format, teacher_bytes
from compress.memory.devices import DEVICES
from compress.memory.footprint import Deployment, Footprint, footprint, largest_context
from compress.model.architecture import Architecture
from compress.report.files import RunFiles
from compress.report.rows import Student, Teacher
from compress.student.candidate import repair_note

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
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
    # Adding zero takes the sign off a zero.
    return f"{round(value, digits) + 0.0:+,.{digits}f}".replace("-", MINUS)


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


def repairs(student: Student) -> str:
    """How many blocks of a student are repaired and what that means, empty if none is."""
    blocks = len(student.architecture.blocks)
    return repair_note(len(student.repaired), blocks) if student.repaired else ""


def cards_matter(shown: Sequence[Serving]) -> bool:
    """Whether the size of a card limits anything: the smallest is not twenty times too big."""
    largest = max(serving.bytes.total for serving in shown)
    return largest * 20 > min(device.visible_bytes for device in DEVICES.values())


def context_on(architecture: Architecture, deployment: Deployment, visible: int) -> int | None:
    """The largest context in so much memory; None: no limit."""
    return largest_context(architecture, replace(deployment, context=1), visible)


def verdict(run: RunFiles) -> list[tuple[str, str, str]]:
    """Tiles (label, figure, remark) with what the run came to, as far as it has come."""
    tiles: list[tuple[str, str, str]] = []
    if run.teacher and run.teacher.budget is not None:
        teacher = run.teacher
        share = run.teacher.budget / teacher_bytes(teacher.architecture, teacher.deployment)
        tiles.append(
            ("budget", format_bytes(run.teacher.budget), f"{share:.0%} of the teacher in BF16")
        )
    if (selected := run.selected) is None:
        return tiles
    left = run.teacher.budget - selected.bytes if run.teacher and run.teacher.budget else None
    remark = "" if left is None else f"{format_bytes(left)} to spare" if left >= 0 else "over"
    tiles.append(("student", format_bytes(selected.bytes), remark))
    ours, text = chosen_figures(run)
    if (latest := ours[1] if ours[1] is not None else ours[0]) is not None:
        after = "after" if ours[1] is not None else "before"
        remark = f"per token, {after} distillation, {text} text"
        tiles.append(("KL to the teacher", f"{number(latest)} nats", remark))
    # Both after distillation, or both before it: anything else compares two things.
    pairs = zip(ours, rival_figures(run), ("before", "after"), strict=True)
    both = [(mine / theirs, how) for mine, theirs, how in pairs if mine is not None and theirs]
    if both and selected.kind != RIVAL:
        ratio, how = both[-1]
        change = f"{ratio - 1:+.0%}".replace("-", MINUS)
        tiles.append(("KL against a uniform cut", change, f"same budget, both {how} distillation"))
    return tiles


def chosen_figures(run: RunFiles) -> tuple[tuple[float | None, float | None], str]:
    """KL of the selected student before and after distillation, and the text it is from."""
    selected = run.selected
    assert selected is not None
    for row in run.table:
        if row["name"] == selected.id:
            return (row["kl"], row["distilled_kl"]), "final"
    return (selected.measured_kl, selected.distilled_kl), "selection"


def rival_figures(run: RunFiles) -> tuple[float | None, float | None]:
    """KL of the uniform cut before and after distillation, on the text of the selected one's."""
    if run.selected and any(row["name"] == run.selected.id for row in run.table):
        rows = [row for row in run.table if row["kind"] == RIVAL]
        return (rows[0]["kl"], rows[0]["distilled_kl"]) if rows else (None, None)
    rival = next((student for student in run.students if student.kind == RIVAL), None)
    return (rival.measured_kl, rival.distilled_kl) if rival else (None, None)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table at equal bytes; ``behind`` is its KL minus that of the chosen, paired."""

    row: Mapping[str, Any]
    chosen: bool
    behind: float | None
    behind_error: float | None

    @property
    def clear(self) -> bool:
        """Whether the paired difference is more than two of its standard errors."""
        return is_clear(self.behind, self.behind_error)


def lines(run: RunFiles) -> list[Line]:
    """The table at equal bytes, each row compared with the chosen student on the same sequences."""
    chosen = [row for row in run.table if run.selected and row["name"] == run.selected.id]
    changes: dict[tuple[str, str], tuple[float, float | None]] = {}
    for pair in run.results["paired"] if run.results else ():
        if pair["metric"] == "kl":
            changes[pair["b"], pair["a"]] = (pair["difference"], pair["stderr"])
            changes[pair["a"], pair["b"]] = (-pair["difference"], pair["stderr"])
    found = []
    for row in run.table:
        against = (model_of(row), model_of(chosen[0])) if chosen else None
        behind, error = changes.get(against, (None, None)) if against else (None, None)
        found.append(Line(row=row, chosen=row in chosen, behind=behind, behind_error=error))
    return found


def model_of(row: Mapping[str, Any]) -> str:
    """What the evaluation calls the model of a table's row, in its latest state."""
    kind: str = row["kind"]
    return kind if row["distilled_kl"] is None else f"{kind} distilled"


def is_clear(change: float | None, error: float | None) -> bool:
    """Whether a difference is more than two of its standard errors."""
    return change is not None and bool(error) and abs(change) > CLEAR * (error or 0)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric of a model, with its paired difference from the first model."""

    value: float | None
    stderr: float | None
    difference: float | None
    error: float | None

    @property
    def clear(self) -> bool:
        """Whether the difference is more than two of its standard errors."""
        return is_clear(self.difference, self.error)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The evaluation: models across and metrics down, or the other way if models are many."""

    reference: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


def evaluation_grid(results: Mapping[str, Any]) -> Grid:
    """Every metric of every model; tasks whose group is listed are left to ``results.json``."""
    models: Mapping[str, Any] = results["models"]
    reference = next(iter(models))
    changes = {(row["b"], row["metric"]): row for row in results["paired"] if row["a"] == reference}
    metrics = metrics_of(models[reference])
    cells: dict[tuple[str, str], Cell] = {}
    for name, model in models.items():
        for metric in metrics:
            value, stderr = cell_value(model, metric)
            change = changes.get((name, metric), {"difference": None, "stderr": None})
            cells[name, metric] = Cell(
                value=value, stderr=stderr, difference=change["difference"], error=change["stderr"]
            )
    if len(models) <= MOST_ACROSS:
        down = [(metrics[metric], [cells[name, metric] for name in models]) for metric in metrics]
        return Grid(reference=reference, columns=list(models), rows=down)
    down = [(name, [cells[name, metric] for metric in metrics]) for name in models]
    return Grid(reference=reference, columns=list(metrics.values()), rows=down)


def metrics_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Label of every metric of a model, by the name that paired differences use."""
    found = {metric: label for metric, label in TEXT_METRICS.items() if metric in model}
    tasks: Mapping[str, Any] = model["tasks"]
    for task, metrics in tasks.items():
        if any(task.startswith(f"{group}_") for group in tasks):
            continue
        found |= {f"{task}/{m}": f"{task}, {words(m)}" for m in metrics if not m.endswith("stderr")}
    return found


def cell_value(model: Mapping[str, Any], metric: str) -> tuple[float | None, float | None]:
    """Value and standard error of a metric."""
    if "/" not in metric:
        return model.get(metric), model.get("stderr", {}).get(metric)
    task, _, name = metric.partition("/")
    metrics = model["tasks"].get(task, {})
    first = next(iter(metrics), None)
    return metrics.get(name), metrics.get("stderr" if name == first else f"{name}_stderr")


def worth_listing(run: RunFiles, most: int = 10) -> list[Student]:
    """The best candidates, the finalists, the best of every kind and the selected one."""
    first: dict[str, Student] = {}
    for student in run.students:
        first.setdefault(student.kind, student)
    return [
        student
        for rank, student in enumerate(run.students)
        if rank < most
        or student.finalist
        or student is first[student.kind]
        or student is run.selected
    ]
