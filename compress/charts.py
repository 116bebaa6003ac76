"""Charts as inline SVG that follows the page: its fonts, and its colours in light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from compress.run_files import Rows, Student

# Colours that stand for variables of the page's style sheet while matplotlib draws.
TOKENS: Mapping[str, str] = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "accent": "#040404",
    "series1": "#050505",
    "series2": "#060606",
    "series3": "#070707",
    "series4": "#080808",
    "surface": "#090909",
}
# Any: matplotlib types the keys as a literal of all its settings.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compress",
    "font.size": 11,
    "axes.edgecolor": TOKENS["line"],
    "axes.labelcolor": TOKENS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": TOKENS["line"],
    "grid.linewidth": 0.6,
    "text.color": TOKENS["ink"],
    "xtick.color": TOKENS["line"],
    "ytick.color": TOKENS["line"],
    "xtick.labelcolor": TOKENS["muted"],
    "ytick.labelcolor": TOKENS["muted"],
}
# What a search is compared with; everything else it finds itself.
BASELINES = ("uniform", "random", "prune", "formats", "prune_then_quantize")
MARKERS: Mapping[str, str] = {
    "uniform": "s", "random": "X", "prune": "^", "formats": "v", "prune_then_quantize": "P",
}  # fmt: skip
MIB, GIB = 2**20, 2**30


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element; its ids begin with ``name``, so that several share a page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns:xlink="[^"]*"| xmlns="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for variable, colour in TOKENS.items():
        text = text.replace(colour, f"var(--{variable})")
    # Sizes in points would fix the width; the view box keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def kl_against_bytes(students: Sequence[Student], budget: int | None) -> str | None:
    """Every measured candidate and baseline; an arrow leads to its KL after distillation."""
    measured = [student for student in students if student.measured_kl and student.measured_kl > 0]
    if not measured:
        return None
    largest = max([student.bytes for student in measured] + ([budget] if budget else []))
    unit, unit_name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    with rc_context(STYLE):
        figure = Figure(figsize=(9.4, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log")
        found = [student for student in measured if student.kind not in BASELINES]
        for student in found:
            strong = student.selected or student.finalist
            draw_student(axes, student, unit, "o", "accent" if strong else "muted", strong)
        for number, student in enumerate(s for s in measured if s.kind in BASELINES):
            colour = f"series{1 + number % 4}"
            draw_student(axes, student, unit, MARKERS[student.kind], colour, True)
        label_points(axes, measured, unit)
        if budget:
            axes.axvline(budget / unit, color=TOKENS["ink"], linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                "budget", (budget / unit, 1), xycoords=("data", "axes fraction"),
                xytext=(-5, -4), textcoords="offset points", ha="right", va="top",
                color=TOKENS["ink"],
            )  # fmt: skip
        axes.set_xlabel(f"bytes in this deployment, {unit_name}")
        axes.set_ylabel("KL to the teacher, nats per token")
        plain_log_ticks(axes)
        axes.margins(x=0.12, y=0.12)
        return inline_svg(figure, "kl", "KL to the teacher against bytes, logarithmic")


def draw_student(
    axes: Axes, student: Student, unit: int, marker: str, colour: str, strong: bool
) -> None:
    """One candidate: hollow before distillation if there is an after, filled otherwise."""
    assert student.measured_kl is not None
    x, y = student.bytes / unit, student.measured_kl
    ink = TOKENS[colour]
    hollow = student.distilled_kl is not None
    if student.measured_se and strong:
        axes.errorbar(x, y, student.measured_se, color=ink, linewidth=1.2, capsize=3, zorder=2)
    axes.plot(
        x, y, marker, markersize=9 if strong else 5, alpha=1.0 if strong else 0.45, color=ink,
        markerfacecolor=TOKENS["surface"] if hollow else ink,
        markeredgewidth=1.6 if strong else 0, zorder=3,
    )  # fmt: skip
    if student.distilled_kl:
        axes.annotate(
            "", (x, student.distilled_kl), (x, y),
            arrowprops={"arrowstyle": "-", "color": ink, "linestyle": ":", "shrinkA": 6},
        )  # fmt: skip
        axes.plot(x, student.distilled_kl, marker, markersize=9, color=ink, zorder=4)


def label_points(axes: Axes, students: Sequence[Student], unit: int) -> None:
    """Name the best of each kind beside its last point, moved apart where they would overlap."""
    best: dict[str, Student] = {}
    for student in students:
        if student.kind in BASELINES or student.selected:
            best.setdefault(student.kind, student)
    if not any(student.selected for student in best.values()) and students:
        best.setdefault(students[0].kind, students[0])
    named = sorted(best.values(), key=lambda student: student.kl or 0)
    last = float("-inf")
    axes.autoscale_view()
    low, high = axes.get_ylim()
    for student in named:
        # 18 points between labels, on an axes about 260 points high.
        assert student.kl is not None
        at = axes.transScale.transform((1, student.kl))[1]
        span = axes.transScale.transform((1, high))[1] - axes.transScale.transform((1, low))[1]
        placed = max(at, last + 0.06 * span)
        last = placed
        axes.annotate(
            student.kind.replace("_", " "), (student.bytes / unit, student.kl),
            xytext=(11, (placed - at) / span * 260 - 4), textcoords="offset points",
            color=TOKENS["ink"], fontweight="bold" if student.selected else "normal",
        )  # fmt: skip


def distillation_curve(curves: Mapping[str, Rows], selected: str | None) -> str | None:
    """Loss of every distilled candidate against tokens; the selected one stands out."""
    curves = {name: rows for name, rows in curves.items() if rows}
    if not curves:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log")
        for number, (name, rows) in enumerate(curves.items()):
            strong = name == selected or len(curves) == 1
            colour = TOKENS["accent" if strong else f"series{1 + number % 4}"]
            tokens = [row["tokens"] for row in rows]
            losses = [row["loss"] for row in rows]
            if len(rows) > 40:
                axes.plot(tokens, losses, color=colour, linewidth=0.8, alpha=0.3)
                losses = smooth(losses, window=len(rows) // 20)
            axes.plot(tokens, losses, color=colour, linewidth=2.2 if strong else 1.4)
            axes.annotate(
                name, (tokens[-1], losses[-1]), xytext=(6, 0), textcoords="offset points",
                va="center", color=TOKENS["ink"] if strong else TOKENS["muted"],
            )  # fmt: skip
        axes.set_xlabel("tokens seen in distillation")
        axes.set_ylabel("KL on training text, nats per token")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        plain_log_ticks(axes)
        axes.margins(x=0.02)
        return inline_svg(figure, "distill", "Distillation loss against tokens, logarithmic")


def smooth(values: Sequence[float], window: int) -> list[float]:
    """A trailing mean, shorter at the beginning."""
    return [
        sum(values[max(0, end - window) : end]) / min(end, window)
        for end in range(1, len(values) + 1)
    ]


def plain_log_ticks(axes: Axes) -> None:
    """Numbers as one writes them, and minor ones only where a decade would show one alone."""
    low, high = axes.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    if high / low < 30:
        axes.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
        )
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())
