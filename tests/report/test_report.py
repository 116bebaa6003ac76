import json
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from synthetic_run import TEACHERS, figures, write, write_run

from compress.core.errors import InputError
from compress.formats.table import FORMATS, Format
from compress.report.content import evaluation_grid, worth_listing
from compress.report.files import read_run
from compress.report.page import charts, render, report
from compress.report.tables import print_report


@pytest.fixture(scope="module", params=TEACHERS)
def reported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report, to read."""
    made = write_run(tmp_path_factory.mktemp("reported") / request.param, request.param)
    report(made)
    return made


@pytest.fixture
def run(reported: Path, tmp_path: Path) -> Path:
    """A run without a report, to change."""
    ignored = shutil.ignore_patterns("report")
    return Path(shutil.copytree(reported, tmp_path / reported.name, ignore=ignored))


def page_of(run: Path) -> str:
    """The page of a run's report."""
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def rendered(run: Path, **figures: Figure) -> str:
    """The page of a run as it is now."""
    return render(read_run(run), figures)


def test_the_page_shows_every_section(reported: Path) -> None:
    page = page_of(reported)
    for section in (
        "table",
        "fits",
        "kept",
        "candidates",
        "sensitivity",
        "distillation",
        "evaluation",
        "recipe",
    ):
        assert f'<section id="{section}">' in page
    assert page.count("<svg") == 4
    files = {file.name for file in (reported / "report").iterdir()}
    assert files == {"index.html", "kl.png", "distillation.png", "formats.png"}


def test_the_page_refers_to_nothing_outside(reported: Path) -> None:
    page = page_of(reported)
    assert not re.findall(r"https?://|//\w+\.\w+|@import|<script|<link|<img", page)
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_of_the_page_are_unique(reported: Path) -> None:
    found = re.findall(r'\bid="([^"]*)"', page_of(reported))
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    "missing",
    [
        "candidates.json",
        "baselines.json",
        "candidates",
        "distill",
        "eval",
        "table.json",
        "recipe.yaml",
        "teacher.json",
    ],
)
def test_what_has_not_run_yet_is_left_out(run: Path, missing: str) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "</html>" in rendered(run, **charts(read_run(run)))
    print_report(run)


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: embedded\n")
    page = report(tmp_path).read_text()
    assert "model: embedded" in page
    assert '<section id="kept">' not in page


def test_removed_blocks_and_formats_are_in_the_picture(reported: Path) -> None:
    page = page_of(reported)
    student = read_run(reported).selected
    teacher = read_run(reported).teacher
    assert student is not None
    assert teacher is not None
    removed = len(teacher.architecture.blocks) - len(student.architecture.blocks)
    assert removed > 0
    assert len(set(re.findall(r"<title>(\S+): removed", page))) == removed
    for format in student.architecture.formats:
        assert f'fill="var(--{format})"' in page


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_a_colour_in_light_and_in_dark(reported: Path, format: Format) -> None:
    assert (reported / "report" / "index.html").read_text().count(f"--{format}: #") == 2


def test_text_of_the_run_is_escaped(run: Path) -> None:
    teacher = json.loads((run / "teacher.json").read_text())
    write(run / "teacher.json", teacher | {"note": "<script>alert(1)</script>"})
    assert "<script" not in rendered(run)


def test_tables_on_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(run)
    printed = capsys.readouterr().out
    assert "at equal bytes" in printed
    assert "does not fit" in printed
    assert "0.0510 ± 0.0017" in printed
    # The uniform cut minus the chosen student, both distilled: .74 - .051.
    assert "+0.6890 ± 0.0100" in printed


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("without", ["", "table.json"])
def test_tables_keep_names_and_figures_at_every_width(
    run: Path,
    width: int,
    without: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run / (without or "baselines.json")).unlink()
    monkeypatch.setattr("compress.core.terminal.PIPE_WIDTH", width)
    print_report(run)
    printed = capsys.readouterr().out
    assert "…" not in printed
    tables = [line for line in printed.splitlines() if line[:1] in tuple("┏┡│┃└")]
    assert max(map(len, tables)) <= width
    names = [student.id for student in worth_listing(read_run(run))] if without else ["uniform"]
    assert all(f"│ {name} " in printed for name in names)
    assert "± 0.0017" in printed


def test_cards_are_listed_where_they_limit_something(run: Path) -> None:
    assert "room for twenty" in rendered(run)
    teacher = json.loads((run / "teacher.json").read_text())
    teacher["deployment"]["context"] = 2**22
    write(run / "teacher.json", teacher)
    page = rendered(run)
    assert "room for twenty" not in page
    assert "rtx5090</th>" in page


def test_few_models_go_across_and_many_down(run: Path) -> None:
    results = json.loads((run / "eval" / "results.json").read_text())
    many = evaluation_grid(results)
    few = evaluation_grid(results | {"models": dict(list(results["models"].items())[:3])})
    assert [label for label, _ in many.rows] == list(results["models"])
    assert len(few.columns) == 3
    assert [cell.figure for cell in few.rows[0][1]] == [row[0].figure for _, row in many.rows[:3]]


def test_members_of_a_group_are_not_listed_beside_it() -> None:
    model = figures(1, 0.1)
    model["tasks"] |= {"blimp": {"acc": 0.8, "stderr": 0.01}, "blimp_passive_1": {"acc": 0.7}}
    grid = evaluation_grid({"models": {"a": model}, "paired": []})
    labels = [label for label, _ in grid.rows]
    assert "blimp, acc" in labels
    assert not any("passive" in label for label in labels)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("teacher.json", "{}"),
        ("candidates.json", "{}"),
        ("candidates.json", "[{}]"),
        ("table.json", "["),
        ("table.json", "[{}]"),
        ("eval/results.json", '{"models": {}, "paired": []}'),
        ("eval/results.json", "[]"),
        ("distill/uniform.short/curve.jsonl", "{}"),
        ("distill/uniform.short/curve.jsonl", "x\n{}"),
        ("candidates/joint-000/keep.safetensors", "x"),
    ],
)
def test_broken_files_are_named(run: Path, name: str, text: str) -> None:
    (run / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(name)):
        report(run)


def test_a_curve_cut_short_by_a_kill_is_read(run: Path) -> None:
    curve = run / "distill" / "joint-000" / "curve.jsonl"
    lines = curve.read_text()
    curve.write_text(lines + lines[:20])
    assert read_run(run).curves["joint-000"][-1]["step"] == 199


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run"):
        report(tmp_path)


def test_the_report_says_how_many_blocks_were_repaired(
    reported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = read_run(reported).selected
    assert student is not None
    said = f"3 of {len(student.architecture.blocks)} blocks are repaired"
    print_report(reported)
    assert said in capsys.readouterr().out
    assert said in page_of(reported)


def test_a_run_without_repair_says_nothing_of_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((run / "candidates.json").read_text())
    write(run / "candidates.json", [row | {"repaired": []} for row in rows])
    print_report(run)
    assert "blocks are repaired" not in capsys.readouterr().out
    assert "blocks are repaired" not in rendered(run)


def test_what_formats_cost_is_a_chart_and_a_table(reported: Path) -> None:
    page = (reported / "report" / "index.html").read_text()
    assert "What number formats cost" in page
    assert 'id="formats-' in page
    assert "ffn gate up" in page
