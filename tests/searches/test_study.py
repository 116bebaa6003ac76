"""The study around the knapsack: the same for a seed, whole or interrupted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from compress.searches.study import explore
from compress.student.candidate import Candidate
from teachers import Teacher, invented, settings, shown


@pytest.fixture(scope="module")
def hybrid(tiny_hybrid: Path) -> Teacher:
    return Teacher(tiny_hybrid)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study") / "journal.log"


@pytest.fixture(scope="module")
def uninterrupted(hybrid: Teacher, journal: Path) -> list[object]:
    return shown(explore(hybrid.problem("joint", 0.5), settings(journal, 12), invented))


def test_a_study_measures_as_many_different_candidates_as_asked(uninterrupted: list) -> None:
    assert len({architecture for _, architecture, _, _ in uninterrupted}) == 12
    assert sorted(name for name, *_ in uninterrupted) == [f"joint-{n:03}" for n in range(12)]


def test_the_same_seed_gives_the_same_study(
    hybrid: Teacher, tmp_path: Path, uninterrupted: list
) -> None:
    problem = hybrid.problem("joint", 0.5)
    journal = tmp_path / "journal.log"
    # A shorter study is the start of a longer one, and asking for fewer gives fewer.
    short = shown(explore(problem, settings(journal, 3), invented))
    assert shown(explore(problem, settings(journal, 12), invented)) == uninterrupted
    assert shown(explore(problem, settings(journal, 3), invented)) == short
    assert {row[0] for row in short} == {"joint-000", "joint-001", "joint-002"}


@pytest.mark.parametrize("after", [0, 5, 10])
def test_a_study_that_fails_inside_a_measurement_continues_as_if_it_had_not(
    hybrid: Teacher, tmp_path: Path, uninterrupted: list, after: int
) -> None:
    problem, journal = hybrid.problem("joint", 0.5), tmp_path / "journal.log"
    measured = 0

    def fail_later(candidate: Candidate) -> Iterator[Tensor]:
        nonlocal measured
        batches = invented(candidate)
        yield next(batches)
        if measured == after:
            raise KeyboardInterrupt
        measured += 1
        yield from batches

    with pytest.raises(KeyboardInterrupt):
        explore(problem, settings(journal, 12), fail_later)
    assert shown(explore(problem, settings(journal, 12), invented)) == uninterrupted


@pytest.mark.parametrize("share", [0.02, 0.5, 0.93])
def test_a_journal_cut_off_anywhere_and_left_locked_is_continued(
    hybrid: Teacher, tmp_path: Path, uninterrupted: list, share: float, journal: Path, monkeypatch
) -> None:
    # A relative path, as runs/ is: the lock then points to nothing.
    monkeypatch.chdir(tmp_path)
    problem, left = hybrid.problem("joint", 0.5), Path("study/journal.log")
    left.parent.mkdir()
    whole = journal.read_bytes()
    left.write_bytes(whole[: int(share * len(whole))])
    Path("study/journal.log.lock").symlink_to("study/journal.log")
    assert shown(explore(problem, settings(left, 12), invented)) == uninterrupted


def test_a_small_space_ends_when_there_is_nothing_new(hybrid: Teacher, tmp_path: Path) -> None:
    problem = hybrid.problem("minipuzzle", 0.9)
    problem = replace(problem, space=problem.space.model_copy(update={"axes": {}}))
    found = explore(problem, settings(tmp_path / "journal.log", 100), invented)
    assert 1 < len(found) < 2 ** len(hybrid.architecture.blocks)
    assert len({trial.candidate.architecture for trial in found}) == len(found)
