"""What a run found, as one self-contained page; reads only the run directory."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from compress.core.files import write_text
from compress.core.quantities import format_bytes, format_count, format_tokens
from compress.formats.table import FORMATS, used_in
from compress.memory.devices import DEVICES
from compress.model.architecture import Architecture, kv_text
from compress.model.families import count_parameters
from compress.report.charts import distillation_curve, formats_curve, inline_svg, kl_against_bytes
from compress.report.content import (
    evaluation_grid,
    lines,
    repairs,
    servings,
    verdict,
    worth_listing,
)
from compress.report.figures import number, short, signed, words
from compress.report.files import RunFiles, read_run
from compress.report.layer_map import layer_map


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
        "formats": formats_curve(run.sensitivity["curve"]) if run.sensitivity else None,
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def used_formats(architecture: Architecture) -> set[str]:
    """Formats of weights and of KV caches."""
    return {*architecture.formats, *architecture.kv_formats.values()}


def outside_text(architecture: Architecture) -> str:
    """The formats of embedding and head, if they are not BF16."""
    formats = architecture.outside_formats
    if len(used := used_in(formats)) == 1:
        return f"embedding and head in {min(used).upper()}" if formats else ""
    return ", ".join(f"{group} in {format.upper()}" for group, format in formats)


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
    teacher, selected, picture = run.teacher, run.selected, None
    if teacher and selected:
        picture = layer_map(teacher.architecture, selected.architecture, run.keep)
    return environment.from_string(page).render(
        run=run,
        verdict=list(verdict(run)),
        servings=list(servings(teacher, selected)) if teacher else [],
        devices=sorted(DEVICES.values(), key=lambda device: device.visible_bytes),
        lines=lines(run),
        candidates=worth_listing(run),
        picture=picture,
        formats=[f for f in FORMATS if selected and f in used_formats(selected.architecture)],
        kv=kv_text(selected.architecture) if selected else "",
        outside=outside_text(selected.architecture) if selected else "",
        repairs=repairs(selected) if selected else "",
        charts={name: Markup(inline_svg(chart, name)) for name, chart in figures.items()},
        evaluation=evaluation_grid(run.results) if run.results else None,
        parameters=count_parameters(teacher.architecture) if teacher else None,
    )
