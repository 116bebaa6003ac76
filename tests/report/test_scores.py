"""The tables of a scoring."""

from pathlib import Path

import pytest

from compress.report.scores import print_scores
from teachers import Teacher


def test_a_row_for_every_axis_in_80_columns(
    tiny_hybrid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Teacher(tiny_hybrid)
    print_scores(teacher.architecture, teacher.scores, None)
    lines = capsys.readouterr().out.splitlines()
    for axis in ("attention/query", "moe/expert_ffn", "mamba/head", "hidden"):
        [row] = [line for line in lines if line.startswith(f"│ {axis} ")]
        assert row.count("e-") + row.count("e+") == 2
        assert len(row.rstrip()) <= 80
