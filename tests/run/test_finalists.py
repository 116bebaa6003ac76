"""Successive halving: who goes on, what it costs, and that a kill in any rung changes nothing."""

import itertools
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA, ONE_THREAD, search_command, write_tiny

from compress.core.errors import InputError
from compress.core.files import read_json
from compress.model.build import load_model
from compress.model.checkpoint import open_checkpoint
from compress.model.families import parameters
from compress.run import students
from compress.run.directory import Run
from compress.run.finalists import Trained, halve, rungs
from compress.run.recipe import read_recipe
from compress.run.search import selection_text
from compress.run.session import Session
from compress.train.distill import DistillSettings, distill
from runs import again, rows_of, same

TOKENS = 1024


def simulated(seed: int, count: int) -> tuple[list[str], dict[str, int], Any]:
    """Candidates whose KL falls with tokens, each in its own way; tokens trained are counted."""
    draw = random.Random(seed)
    names = [f"c{number}" for number in range(count)]
    ends = {name: (draw.random(), draw.uniform(0.2, 1.0)) for name in names}
    seen = dict.fromkeys(names, 0)

    def train(name: str, end: int) -> Trained:
        assert end > seen[name]
        seen[name] = end
        floor, rate = ends[name]
        return Trained(floor + (end / TOKENS) ** -rate, end)

    return names, seen, train


@pytest.mark.parametrize("count", range(1, 12))
def test_the_winner_trains_most_and_all_together_train_no_more_than_all_would(count: int) -> None:
    ends = rungs(count, TOKENS)
    assert ends == sorted(ends)
    assert ends[-1] == TOKENS
    for seed in range(8):
        names, seen, train = simulated(seed, count)
        found, arrived = halve(names, ends, train)
        assert set(found) == set(names)
        assert {name: last.tokens for name, last in found.items()} == seen
        assert arrived == sorted(arrived, key=lambda name: found[name].kl)
        assert {name for name in names if seen[name] == TOKENS} == set(arrived)
        assert len(arrived) == min(count, 2)
        assert sum(seen.values()) <= count * TOKENS
        if count > 2:
            assert sum(seen.values()) < count * TOKENS


@pytest.mark.parametrize("seed", range(8))
def test_nobody_left_behind_was_better_at_that_rung_than_one_who_went_on(seed: int) -> None:
    names, _, train = simulated(seed, 7)
    history: dict[int, dict[str, float]] = {}

    def noted(name: str, end: int) -> Trained:
        found = train(name, end)
        history.setdefault(end, {})[name] = found.kl
        return found

    ends = rungs(7, TOKENS)
    halve(names, ends, noted)
    for end, after in itertools.pairwise(ends):
        on = [history[end][name] for name in history[after]]
        behind = [kl for name, kl in history[end].items() if name not in history[after]]
        assert max(on) <= min(behind)


def test_equals_are_taken_in_order() -> None:
    found, arrived = halve(["a", "b", "c"], [1, 2], lambda name, end: Trained(1.0, end))
    assert arrived == ["a", "b"]
    assert found["c"].tokens == 1


def test_stopping_on_the_way_and_going_on_is_one_training(tmp_path: Path, tiny_llama: Path) -> None:
    narrow = write_tiny(tmp_path / "narrow", LLAMA | {"hidden_size": 32}, 1)
    rows = torch.randint(2, 97, (20, 16), generator=torch.Generator().manual_seed(0))
    settings = DistillSettings(tokens=320, batch_tokens=64, learning_rate=1e-3)
    teacher, whole = load_model(tiny_llama), load_model(narrow)
    curve = distill(teacher, whole, rows, settings, progress=lambda *_: None)
    for until, steps in ((100, 2), (192, 3), (320, 5), (64, 1), (320, 5)):
        # The last but one lies before the checkpoint: the training begins again.
        student = load_model(narrow)
        part = distill(
            teacher, student, rows, settings, tmp_path / "d", lambda *_: None, until=until
        )
        assert part == curve[:steps]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, student.state_dict()[name]), name


@pytest.fixture(scope="module")
def arguments(tiny_hybrid: Path, text_file: Path) -> list[str]:
    command = search_command(tiny_hybrid, Path("RUN"), text_file)
    for flag, value in (("--finalists", "3"), ("--short-distill-tokens", str(TOKENS))):
        command[command.index(flag) + 1] = value
    return command


@pytest.fixture(scope="module")
def halved(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("halved") / "run"
    subprocess.run(at(arguments, run), env=ONE_THREAD, check=True, capture_output=True)
    return run


def tokens_trained(run: Path, name: str) -> int:
    """Tokens that what is on disk has trained for; a step has 128."""
    curve = run / "distill" / f"{name}.short" / "curve.jsonl"
    return 128 * len(curve.read_text().splitlines()) if curve.is_file() else 0


def at(arguments: list[str], run: Path) -> list[str]:
    return [str(run) if part == "RUN" else part for part in arguments]


def test_the_chosen_and_the_best_of_every_kind_trained_for_the_whole_distance(
    halved: Path,
) -> None:
    finalists = [row for row in rows_of(halved) if row["finalist"]]
    assert all(row["distilled_tokens"] is None for row in rows_of(halved) if not row["finalist"])
    seen = {row["id"]: tokens_trained(halved, row["id"]) for row in finalists}
    searched = [row["id"] for row in finalists if row["kind"] == "joint"]
    assert sorted(seen[name] for name in searched) == [TOKENS // 2, TOKENS, TOKENS]
    for row in finalists:
        if row["kind"] != "joint":
            assert seen[row["id"]] == (0 if row["kind"] == "formats" else TOKENS)
        if seen[row["id"]] == TOKENS // 2:
            assert row is finalists[-1]
            assert not row["selected"]
        assert row["distilled_tokens"] in (0, seen[row["id"]])
    assert not list(halved.glob("distill/*/training*"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes of ``ONE_THREAD``: other threads may add numbers in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_winner_is_what_training_it_alone_gives(halved: Path) -> None:
    row = next(row for row in rows_of(halved) if row["kind"] == "joint")
    session = Session(Run(halved), read_recipe(halved / "recipe.yaml"))
    candidate, _ = students.find_candidate(session, row["id"])
    alone = students.train_until(session, candidate, TOKENS, "alone")
    rung = open_checkpoint(halved / "distill" / f"{row['id']}.short" / students.STUDENT)
    single = open_checkpoint(alone)
    for name in (parameter.name for parameter in parameters(candidate.architecture)):
        torch.testing.assert_close(rung[name], single[name], atol=0, rtol=0)


def test_other_finalists_or_tokens_leave_nothing_behind(run_copy: Path) -> None:
    before = rows_of(run_copy)
    tokens = max(tokens_trained(run_copy, row["id"]) for row in before)
    again(run_copy, finalists=3, short_distill_tokens=TOKENS)
    names = [row["id"] for row in rows_of(run_copy) if row["kind"] == "joint"]
    assert {tokens_trained(run_copy, name) for name in names} == {0, TOKENS // 2, TOKENS}
    again(run_copy, finalists=1, short_distill_tokens=tokens)
    assert same(rows_of(run_copy), before)


def test_whom_training_makes_worse_stays_as_it_was_cut(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again(run_copy, learning_rate=0.3, distill_tokens=256)
    assert "as it was cut, which training made worse" in capsys.readouterr().err
    session = Session(Run(run_copy), read_recipe(run_copy / "recipe.yaml"))
    _, fresh = selection_text(session)
    finalists = [row for row in rows_of(run_copy) if row["finalist"]]
    assert [row["distilled_tokens"] for row in finalists] == [0] * len(finalists)
    for row in finalists:
        candidate, _ = students.find_candidate(session, row["id"])
        cut = students.pruned(session, candidate)
        assert students.latest(session, candidate) == cut
        kl = students.kl_of(students.in_formats(session, candidate, cut), fresh)
        assert row["distilled_kl"] == pytest.approx(kl, rel=1e-4)
    # Nor does the whole distance replace it.
    students.distill(session, finalists[0]["id"])
    assert f"training made {finalists[0]['id']} worse" in capsys.readouterr().err
    candidate, _ = students.find_candidate(session, finalists[0]["id"])
    assert students.latest(session, candidate) == students.pruned(session, candidate)


def test_a_student_of_which_nothing_says_whether_training_helped_is_refused(run_copy: Path) -> None:
    session = Session(Run(run_copy), read_recipe(run_copy / "recipe.yaml"))
    trained = next(run_copy.glob("distill/*.short/result.json"))
    name = trained.parent.name.removesuffix(".short")
    candidate, _ = students.find_candidate(session, name)
    trained.unlink()
    with pytest.raises(InputError, match=r"no result\.json.*run compress search again"):
        students.latest(session, candidate)


def rungs_done(run: Path) -> int:
    found = [read_json(file)["kl"] for file in run.glob("distill/*.short/halving.json")]
    return sum(seen != "0" for known in found for seen in known)


def test_killed_in_any_rung_a_search_ends_as_if_it_had_not_been(
    halved: Path, arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    # In the first rung, after it, and in the second.
    moments = (
        lambda: any(run.glob("distill/*.short/training.json")),
        lambda: rungs_done(run) >= 3,
        lambda: rungs_done(run) >= 4,
    )
    for number, reached in enumerate(moments):
        process = subprocess.Popen(at(arguments, run), env=ONE_THREAD, stderr=subprocess.DEVNULL)
        while not reached() and process.poll() is None:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before moment {number}"
        assert not (run / "candidates.json").exists()
    subprocess.run(at(arguments, run), env=ONE_THREAD, check=True, capture_output=True)
    assert same(rows_of(run), rows_of(halved))
    tokens = [row["distilled_tokens"] for row in rows_of(run)]
    assert tokens == [row["distilled_tokens"] for row in rows_of(halved)]
