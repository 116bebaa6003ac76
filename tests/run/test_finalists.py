"""Finalists are trained alike, stay untrained where that makes them worse, and survive a kill."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Shared

from compress.core.errors import InputError
from compress.measure.kl import mean_kl
from compress.run import stages, students
from compress.run.directory import Run
from compress.run.recipe import read_recipe
from compress.run.rounding import untrained
from compress.run.search import selection_text
from compress.run.session import Session
from compress.sweep.stack import stack_at
from runs import again, rows_of, same

TOKENS = 512


@pytest.fixture(scope="session")
def three(searched: Path, shared: Shared) -> Path:
    """The searched run with three finalists of the searched kind."""

    def search(run: Path) -> None:
        shutil.copytree(searched, run)
        again(run, finalists=3, short_distill_tokens=TOKENS)

    return shared("three", search)


def session_of(run: Path) -> Session:
    return Session(Run(run), read_recipe(run / "recipe.yaml"))


def tokens_trained(run: Path, name: str) -> int:
    """Tokens that what is on disk has trained for; a step has 128."""
    curve = run / "distill" / f"{name}.short" / "curve.jsonl"
    return 128 * len(curve.read_text().splitlines()) if curve.is_file() else 0


def test_finalists_that_are_changed_train_alike_and_one_is_chosen(three: Path) -> None:
    rows, session = rows_of(three), session_of(three)
    done = [row for row in rows if row["finalist"]]
    assert rows[: len(done)] == done
    assert [row["kind"] for row in done].count("joint") == 3
    assert all(row["distilled_tokens"] is None for row in rows[len(done) :])
    for row in done:
        candidate, _ = students.find_candidate(session, row["id"])
        trained = TOKENS if students.is_changed(session, candidate) else 0
        assert tokens_trained(three, row["id"]) == trained
        assert row["distilled_tokens"] in (0, trained)
    after = [row["distilled_kl"] for row in done]
    assert after == sorted(after)
    assert [row["selected"] for row in rows].count(True) == 1
    assert done[0]["selected"]
    assert not list(three.glob("distill/*/training*"))


def test_other_finalists_or_tokens_leave_nothing_behind(alone_copy: Path) -> None:
    before = rows_of(alone_copy)
    tokens = max(tokens_trained(alone_copy, row["id"]) for row in before)
    again(alone_copy, finalists=2, short_distill_tokens=TOKENS)
    names = [row["id"] for row in rows_of(alone_copy) if row["kind"] == "joint"]
    assert sorted(tokens_trained(alone_copy, name) for name in names)[-3:] == [0, TOKENS, TOKENS]
    again(alone_copy, finalists=1, short_distill_tokens=tokens)
    assert same(rows_of(alone_copy), before)


def test_finalists_share_their_teachers_states(
    alone_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, seen = students.stored_states, list[tuple[Path, bool]]()

    def watched(stack: Any, rows: Any, file: Path, progress: Any) -> Any:
        seen.append((file, file.is_file()))
        return stored(stack, rows, file, progress)

    monkeypatch.setattr(students, "stored_states", watched)
    again(alone_copy, finalists=3, short_distill_tokens=TOKENS)
    assert len({file for file, _ in seen}) == 1
    assert [known for _, known in seen] == [False] + [True] * (len(seen) - 1)
    assert len(seen) > 1
    assert not (alone_copy / "states").exists()


def test_whom_training_makes_worse_stays_untrained(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again(run_copy, learning_rate=0.3, distill_tokens=256)
    assert "untrained: training made it worse" in capsys.readouterr().err
    session = session_of(run_copy)
    _, fresh = selection_text(session)
    done = [row for row in rows_of(run_copy) if row["finalist"]]
    assert [row["distilled_tokens"] for row in done] == [0] * len(done)
    for row in done:
        candidate, _ = students.find_candidate(session, row["id"])
        served = untrained(session, candidate)
        assert students.latest(session, candidate) == served
        kl = mean_kl(stack_at(served), fresh)
        assert row["distilled_kl"] == pytest.approx(kl, rel=1e-4)
    # Nor does the whole distance replace it.
    stages.distill(session.run, session.recipe, done[0]["id"])
    assert f"training made {done[0]['id']} worse" in capsys.readouterr().err
    candidate, _ = students.find_candidate(session, done[0]["id"])
    assert students.latest(session, candidate) == untrained(session, candidate)


def test_a_student_of_which_nothing_says_whether_training_helped_is_refused(run_copy: Path) -> None:
    session = session_of(run_copy)
    trained = next(run_copy.glob("distill/*.short/result.json"))
    name = trained.parent.name.removesuffix(".short")
    candidate, _ = students.find_candidate(session, name)
    trained.unlink()
    with pytest.raises(InputError, match=r"no result\.json.*run compress search again"):
        students.latest(session, candidate)


def test_interrupted_beside_any_training_a_search_ends_as_if_it_had_not_been(
    alone: Path, alone_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(alone, tmp_path / "whole"))
    again(whole, finalists=3, short_distill_tokens=TOKENS)
    run = alone_copy
    train, names = students.train, set[str]()

    def interrupted(
        session: Session, candidate: Any, tokens: int, name: str, local_tokens: int
    ) -> Path:
        # Before the first training, and twice after one: the checkpoint is there, no signature.
        if names:
            train(session, candidate, tokens, name)
        names.add(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(students, "train", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            again(run, finalists=3, short_distill_tokens=TOKENS)
        assert not (run / "candidates.json").exists()
    monkeypatch.undo()
    again(run, finalists=3, short_distill_tokens=TOKENS)
    assert same(rows_of(run), rows_of(whole))
    tokens = [row["distilled_tokens"] for row in rows_of(run)]
    assert tokens == [row["distilled_tokens"] for row in rows_of(whole)]
