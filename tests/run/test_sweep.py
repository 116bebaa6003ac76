"""A sweep is its searches one by one, with one set of scores; what needs one budget asks which."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write, write_run

from compress.core.errors import InputError
from compress.report.page import report
from compress.report.rows import front
from compress.run.directory import Run
from compress.run.guide import next_step
from compress.run.recipe import check
from runs import again, command, rows_of, same, stamps


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_point_betters(seed: int) -> None:
    draw = random.Random(seed)
    points = [(float(draw.randrange(6)), float(draw.randrange(6))) for _ in range(12)]
    best = front(points)
    beaten = {
        (x, y) for x, y in points for a, b in points if a <= x and b <= y and (a, b) != (x, y)
    }
    assert best == sorted(set(points) - beaten)


@pytest.mark.parametrize(
    ("budget", "message"),
    [("70%,50%,70%", "twice"), ("70%,x", "not understood"), (",", "not understood")],
)
def test_a_wrong_sweep_is_refused(budget: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check({"budget": budget}, "x")


def test_a_sweep_is_its_searches_with_one_set_of_scores(
    alone_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, scores = rows_of(alone_copy), stamps(alone_copy, "scores/*")
    capsys.readouterr()
    again(alone_copy, budget="50%, 36%")
    printed = capsys.readouterr().out
    rows = rows_of(alone_copy)
    assert stamps(alone_copy, "scores/*") == scores
    assert len({row["id"] for row in rows}) == len(rows)
    by_budget: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_budget.setdefault(row["budget"], []).append(row)
        assert row["bytes"] <= row["budget"]
    large, small = sorted(by_budget, reverse=True)
    found = [row | {"id": row["id"].removeprefix("36-")} for row in by_budget[small]]
    assert same(found, alone)
    for members in by_budget.values():
        assert [row["selected"] for row in members].count(True) == 1
    chosen = {row["budget"]: row["id"] for row in rows if row["selected"]}
    assert chosen[large].startswith("50-")
    assert "Chosen for every budget" in printed
    # What stands for a run needs one budget, and says between which.
    for words in (("distill",), ("export",), ("eval",), ("prune",), ("quantize",)):
        with pytest.raises(InputError, match=f"{chosen[large]}.*{chosen[small]}"):
            command(*words, alone_copy)
    assert next_step(Run(alone_copy)).endswith(f":{chosen[large]}")
    command("distill", f"{alone_copy}:{chosen[small]}")
    command("export", f"{alone_copy}:{chosen[small]}")
    command("report", alone_copy)
    # Back to one of its budgets: nothing of the other is left, once it may go.
    with pytest.raises(InputError, match=f"distill/{chosen[small]}, export/{chosen[small]}"):
        again(alone_copy, budget="36%")
    shutil.rmtree(alone_copy / "distill" / chosen[small])
    shutil.rmtree(alone_copy / "export")
    again(alone_copy, budget="36%")
    assert same(rows_of(alone_copy), alone)


def test_the_front_of_a_sweep_is_in_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", "llama")
    assert "Pareto front" not in report(run).read_text()
    rows = json.loads((run / "candidates.json").read_text())
    for number, row in enumerate(rows):
        row["budget"] = row["bytes"] // (1 + number % 2) + 1
        row["bytes"] = row["bytes"] // (1 + number % 2)
    write(run / "candidates.json", rows)
    assert "Pareto front" in report(run).read_text()
