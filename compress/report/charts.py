"""Charts as inline SVG that follows the page: its fonts, and its colours in light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from compress.report.figures import words
from compress.report.files import Rows
from compress.report.rows import Student, front

# The page's colours in light, by the name of its style variable; unique, because the SVG gets the
# variables in their place.
COLOURS: Mapping[str, str] = {
    "ink": "#17191c", "muted": "#5b626b", "line": "#e2e3df", "card": "#ffffff",
    "accent": "#0b57a4", "series1": "#4b5a66", "series2": "#a02060", "series3": "#6b3fa0",
    "series4": "#1f7a6d", "series5": "#b3540a",
}  # fmt: skip
INK, MUTED, LINE = COLOURS["ink"], COLOURS["muted"], COLOURS["line"]
# Any: matplotlib types the keys as a literal of all its settings.
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "compress", "font.size": 11, "text.color": INK,
    "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.axisbelow": True, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": LINE, "grid.linewidth": 0.6,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
}  # fmt: skip
# What a search is compared with, each with its mark and colour; the rest it found itself.
BASELINES: Mapping[str, tuple[str, str]] = {
    "uniform": ("s", "series1"),
    "random": ("X", "series2"),
    "prune": ("^", "series3"),
    "formats": ("v", "series4"),
    "prune_then_quantize": ("P", "series5"),
}
FOUND = ("o", "accent")
DESCRIPTIONS: Mapping[str, str] = {
    "kl": "KL to the teacher against bytes, logarithmic; the table below has the numbers",
    "distillation": "KL on training text against tokens, logarithmic",
    "formats": "predicted KL against bits a weight, logarithmic; the table below has the numbers",
}
MIB, GIB = 2**20, 2**30
LABEL_POINTS = 14
SHORT = ".short"


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element; its ids begin with ``name``, so that several share a page."""
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(?::xlink)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    # The element's sizes, in points, would fix the width; the view box keeps the proportions.
    text = re.sub(r' (?:width|height)="[^"]*"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{DESCRIPTIONS[name]}"', 1)


def kl_against_bytes(students: Sequence[Student], budget: int | None) -> Figure | None:
    """Every measured candidate and baseline; an arrow leads to its KL after distillation."""
    measured = [student for student in students if student.measured_kl and student.measured_kl > 0]
    if not measured:
        return None
    largest = max([student.bytes for student in measured] + ([budget] if budget else []))
    unit, unit_name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    with rc_context(STYLE):
        axes = log_axes(4.6, f"bytes in this deployment, {unit_name}", "KL to the teacher")
        for student in measured:
            draw_student(axes, student, unit)
        label_best(axes, measured, unit)
        if len({student.budget for student in measured}) > 1:
            draw_front(axes, measured, unit)
        if budget:
            axes.axvline(budget / unit, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                "budget", (budget / unit, 1), xycoords=("data", "axes fraction"), xytext=(-5, -4),
                textcoords="offset points", ha="right", va="top", color=INK,
            )  # fmt: skip
        plain_log_ticks(axes)
        axes.margins(x=0.12, y=0.12)
        return axes.get_figure(root=True)


def log_axes(height: float, x: str, y: str) -> Axes:
    """Axes of a new figure so many inches high; ``y`` is in nats per token and logarithmic."""
    axes = Figure(figsize=(9.4, height), layout="constrained").subplots()
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(f"{y}, nats per token")
    return axes


def draw_student(axes: Axes, student: Student, unit: int) -> None:
    """One candidate: hollow before distillation if there is an after, filled otherwise."""
    assert student.measured_kl is not None
    strong = student.selected or student.finalist
    marker, colour = mark_of(student)
    x, y, ink = student.bytes / unit, student.measured_kl, COLOURS[colour]
    hollow = student.distilled_kl is not None
    if student.measured_se and strong:
        axes.errorbar(x, y, student.measured_se, color=ink, linewidth=1.2, capsize=3, zorder=2)
    axes.plot(
        x, y, marker, markersize=9 if strong else 5, alpha=1.0 if strong else 0.45, color=ink,
        markerfacecolor=COLOURS["card"] if hollow else ink,
        markeredgewidth=1.6 if strong else 0, zorder=3,
    )  # fmt: skip
    if student.distilled_kl:
        axes.annotate(
            "", (x, student.distilled_kl), (x, y),
            arrowprops={"arrowstyle": "-", "color": ink, "linestyle": ":", "shrinkA": 6},
        )  # fmt: skip
        axes.plot(x, student.distilled_kl, marker, markersize=9, color=ink, zorder=4)


def draw_front(axes: Axes, students: Sequence[Student], unit: int) -> None:
    """A line through the students that no other betters in both bytes and latest KL."""
    best = front([(student.bytes / unit, student.kl) for student in students if student.kl])
    axes.plot(
        *zip(*best, strict=True), color=COLOURS["accent"], linewidth=1.4, alpha=0.7, zorder=2,
        label="Pareto front", drawstyle="steps-post",
    )  # fmt: skip
    axes.legend(frameon=False, labelcolor=INK)


def mark_of(student: Student) -> tuple[str, str]:
    """Marker and colour of a candidate."""
    found = FOUND if student.finalist or student.selected else ("o", "muted")
    return found if student.selected else BASELINES.get(student.kind, found)


def label_best(axes: Axes, students: Sequence[Student], unit: int) -> None:
    """Name the best of each baseline and the student that the run stands for."""
    best: dict[str, Student] = {}
    for s in students:
        if s.kind in BASELINES or s.selected:
            best.setdefault(s.kind, s)
    named = [(words(s.kind), s.bytes / unit, s.kl, s.selected) for s in best.values() if s.kl]
    label_points(axes, named, 11, color=INK)


def label_points(
    axes: Axes, points: Sequence[tuple[str, float, float, bool]], right: int, **style: Any
) -> None:
    """Write names to the right of points (name, x, y, bold), none on another."""
    shifts = label_shifts(axes, [y for _, _, y, _ in points])
    for (name, x, y, bold), shift in zip(points, shifts, strict=True):
        weight = {"fontweight": "bold", "color": INK} if bold else {}
        place: Any = {"xytext": (right, shift), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (x, y), **place, **style | weight)


def label_shifts(axes: Axes, values: Sequence[float]) -> list[float]:
    """How far up, in points, each label at a value moves so that none lies on another."""
    axes.autoscale_view()
    points = [axes.transData.transform((0, value))[1] * 72 / axes.figure.dpi for value in values]
    shifts = [0.0] * len(values)
    last = float("-inf")
    for number in sorted(range(len(values)), key=points.__getitem__):
        last = max(points[number], last + LABEL_POINTS)
        shifts[number] = last - points[number]
    return shifts


def distillation_curve(
    curves: Mapping[str, Rows], students: Sequence[Student], selected: Student | None
) -> Figure | None:
    """Loss of every distilled candidate against tokens; the selected one stands out.

    A candidate's short distillation, which chose among finalists, has ``.short`` after its id.
    """
    # A student that was only quantized is its teacher in BF16: a loss of 0 has no logarithm.
    positive = {name: [row for row in rows if row["loss"] > 0] for name, rows in curves.items()}
    drawn = {name: rows for name, rows in positive.items() if rows}
    if not drawn:
        return None
    by_id = {student.id: student for student in students}
    with rc_context(STYLE):
        axes = log_axes(3.8, "tokens seen in distillation", "KL on training text")
        ends: list[tuple[str, float, float, bool]] = []
        for name, rows in drawn.items():
            student = by_id.get(name.removesuffix(SHORT))
            strong = student is not None and student is selected
            colour = COLOURS[mark_of(student)[1] if student else "muted"]
            tokens, losses = [row["tokens"] for row in rows], [row["loss"] for row in rows]
            if len(rows) > 40:
                axes.plot(tokens, losses, color=colour, linewidth=0.7, alpha=0.25)
                losses = smooth(losses, window=len(rows) // 20)
            axes.plot(tokens, losses, color=colour, linewidth=2.4 if strong else 1.3)
            label = name.removesuffix(SHORT) + (" (short)" if name.endswith(SHORT) else "")
            ends.append((label, tokens[-1], losses[-1], strong))
        label_points(axes, ends, 6, color=MUTED, fontsize=10)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        plain_log_ticks(axes)
        axes.margins(x=0.02)
        return axes.get_figure(root=True)


def formats_curve(points: Rows) -> Figure | None:
    """Predicted KL of formats alone against bits: a line of mixes, a mark for each format alone."""
    # Of a choice that changes nothing the KL has no logarithm.
    drawn = [point for point in points if point["kl"] > 0]
    mixed = [point for point in drawn if point["format"] is None]
    if len(mixed) < 2:
        return None
    marker, colour = BASELINES["formats"]
    with rc_context(STYLE):
        axes = log_axes(3.8, "bits a weight inside the blocks", "predicted KL to the teacher")
        points_of = [p["bits"] for p in mixed], [p["kl"] for p in mixed]
        axes.plot(*points_of, "o-", color=COLOURS["accent"], linewidth=1.6, markersize=5)
        alone = [p for p in drawn if p["format"] is not None]
        for point in alone:
            axes.plot(point["bits"], point["kl"], marker, markersize=9, color=COLOURS[colour])
        named = [(f"all {p['format'].upper()}", p["bits"], p["kl"], False) for p in alone]
        label_points(axes, named, 11, color=INK)
        plain_log_ticks(axes)
        axes.margins(x=0.06, y=0.12)
        return axes.get_figure(root=True)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """A trailing mean, shorter at the beginning."""
    return [
        sum(values[max(0, end - window) : end]) / min(end, window)
        for end in range(1, len(values) + 1)
    ]


def plain_log_ticks(axes: Axes) -> None:
    """Numbers as one writes them, and minor ones only where a decade would show one alone."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    few = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.yaxis.set_minor_formatter(few if high / low < 300 else NullFormatter())
