import itertools

import pytest

from compress.core import terminal
from compress.core.terminal import folded, parts, table

COLUMNS = ["candidate", "kind", "bytes", "of teacher", "KL", "KL distilled", "on tokens"]
ROWS = [
    [
        *("50-prune_then_quantize-003 *", "prune then quantize", "129.883 KiB", "12.1%"),
        *("0.0365 ± 0.0025", "0.0311", "16,384"),
    ],
    ["joint-003", "joint", "1.250 MiB", "does not fit", "", "", ""],
    ["中文名字", "random", "12 B", "100.0%", "12.0365 ± 1.0025", "", ""],
]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("count", range(1, len(COLUMNS) + 1))
def test_a_table_shows_everything_at_every_width(
    width: int, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PIPE_WIDTH", width)
    rows = [row[:count] for row in ROWS]
    table("a title", COLUMNS[:count], rows, left=2)
    printed = capsys.readouterr().out
    assert max(terminal.cell_len(line) for line in printed.splitlines()) <= width
    assert "…" not in printed
    # Names stay on one line; numbers and their units stay together.
    assert all(row[0] in printed for row in rows)
    for cell in itertools.chain(*(row[4:] for row in rows)):
        assert all(part in printed for part in cell.split(" ± "))


def test_columns_go_below_rather_than_away() -> None:
    for width in range(46, 160):
        found = list(parts(COLUMNS, ROWS, width))
        assert sorted(itertools.chain(*found)) == [0] * (len(found) - 1) + [*range(len(COLUMNS))]
        for part in found:
            assert sum(size + 3 for size, _ in part.values()) + 1 <= width
            assert part[0][1][1:] == [row[0] for row in ROWS]
    assert len(list(parts(COLUMNS, ROWS, 160))) == 1


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("0.0365 ± 0.0025", 15, ["0.0365 ± 0.0025"]),
        ("0.0365 ± 0.0025", 14, ["0.0365", "± 0.0025"]),
        ("129.883 KiB", 5, ["129.883 KiB"]),
        ("prune then quantize", 10, ["prune then", "quantize"]),
        ("", 3, [""]),
    ],
)
def test_cells_fold_between_words_and_numbers(text: str, width: int, lines: list[str]) -> None:
    assert folded(text, width).split("\n") == lines
