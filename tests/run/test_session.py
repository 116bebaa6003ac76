"""What a run stands on: its teacher stays the same, and is found from everywhere."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import EVERY, write_tiny

from compress.core.errors import InputError
from compress.core.files import digests, read_json, write_json
from compress.run.directory import Run
from compress.run.recipe import Recipe, check, near, read_recipe, write_recipe
from compress.run.session import Session
from compress.run.sources import checked_files
from compress.run.students import find_candidate

COMMIT, NEXT = "c" * 40, "d" * 40


@pytest.fixture
def session(run_copy: Path, tiny_hybrid: Path, tmp_path: Path) -> Session:
    """A searched run whose teacher is a copy, to be changed."""
    shutil.copytree(tiny_hybrid, tmp_path / "teacher")
    recipe = read_recipe(run_copy / "recipe.yaml")
    return Session(Run(run_copy), recipe.changed(model=str(tmp_path / "teacher")))


def other_values(model: Path) -> None:
    file = model / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)


def other_values_of_the_same_time(model: Path) -> None:
    file = model / "model.safetensors"
    before = file.stat()
    other_values(model)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_config(model: Path) -> None:
    config = read_json(model / "config.json")
    write_json(model / "config.json", config | {"layer_norm_epsilon": 1e-6})


def another_shard(model: Path) -> None:
    save_file({}, model / "model-00002-of-00002.safetensors")


def other_tokenizer(model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"A"'))


@pytest.mark.parametrize(
    "change",
    [other_values, other_values_of_the_same_time, other_config, another_shard, other_tokenizer],
)
def test_students_are_of_the_teacher_that_was_searched(
    change: Callable[[Path], None], session: Session
) -> None:
    find_candidate(session, None)
    change(session.path)
    with pytest.raises(InputError, match=r"is not the one .* searched for: .* changed"):
        find_candidate(Session(session.run, session.recipe), None)


def test_a_teacher_that_was_only_moved_or_touched_is_the_same(
    session: Session, tmp_path: Path
) -> None:
    for file in session.path.iterdir():
        file.touch()
    moved = session.path.rename(tmp_path / "moved")
    candidate, _ = find_candidate(
        Session(session.run, session.recipe.changed(model=str(moved))), None
    )
    assert candidate.architecture


def test_files_are_read_again_only_where_they_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, known = tmp_path / "a", tmp_path / "known.json"
    file.write_text("one")
    first = digests([file], known)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert digests([file], known) == first
    file.write_text("two")
    assert digests([file], known) != first
    with pytest.raises(InputError, match="does not exist"):
        digests([tmp_path / "b"], known)


def test_a_run_keeps_the_commit_of_a_hub_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "models--owner--name" / "snapshots"
    for commit in (COMMIT, NEXT):
        shutil.copytree(tiny_llama, hub / commit)
    newest = {None: COMMIT, "main": COMMIT}

    def snapshot(name: str, revision: str | None = None, **_: object) -> str:
        return str(hub / newest.get(revision, str(revision)))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for asked in (None, "main"):
        recipe = checked_files(check({"model": "owner/name", "revision": asked}, "x"))
        assert (recipe.model, recipe.revision) == ("owner/name", COMMIT)
    newest |= {None: NEXT, "main": NEXT}
    assert Session(Run(tmp_path / "run"), recipe).path.name == COMMIT
    assert checked_files(recipe) == recipe


def test_a_recipe_means_the_same_in_every_directory(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    for place in (here, home):
        shutil.copytree(tiny_llama, place / "m")
        shutil.copy(text_file, place / "t.jsonl")
        (place / "s.yaml").write_text("remove: none")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    for start, base in (("", here), ("./", here), ("../here/", here), ("~/", home)):
        paths = {"model": "m", "data": "t.jsonl", "eval_data": "t.jsonl", "space": "s.yaml"}
        write_recipe(check({key: start + path for key, path in paths.items()}, "x"), here / "r")
        monkeypatch.chdir(tmp_path)
        recipe = read_recipe(here / "r")
        assert {key: getattr(recipe, key) for key in paths} == {
            key: str(base / path) for key, path in paths.items()
        }
        monkeypatch.chdir(here)
    assert near(str(here / "m")) == "m"
    assert near(str(home / "m")) == str(home / "m")
    named = check({"model": "embedded", "space": "joint"}, "x")
    assert (named.model, named.space, near(named.model)) == ("embedded", "joint", "embedded")
    # A directory of one of our names is not that model.
    (here / "embedded").mkdir()
    assert near(check({"model": "./embedded"}, "x").model) == str(here / "embedded")
    assert Recipe(data="~nobody-of-this-name/x").data == str(here / "~nobody-of-this-name/x")


def test_a_teacher_is_called_by_its_name_not_its_path(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    run = Run(tmp_path / "run")
    assert Session(run, check({"model": str(tmp_path / "m")}, "x")).name == "m"
    assert Session(run, check({"model": "owner/name"}, "x")).name == "owner/name"


def test_layers_that_predict_further_tokens_are_for_targets_that_use_them(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "teacher", EVERY["nemotron_h_latent"])

    def kept(**settings: str) -> bool:
        session = Session(Run(tmp_path / "run"), check({"model": str(path)} | settings, "test"))
        return bool(session.whole.mtp)

    assert kept(target="vllm")
    assert kept(mtp="keep")
    assert kept()
    assert not kept(target="compress")
    assert not kept(target="transformers")
    assert not kept(target="vllm", mtp="drop")
    path = write_tiny(tmp_path / "teacher", EVERY["hybrid"])
    assert not kept(target="vllm")
    with pytest.raises(InputError, match="has no layers that predict further tokens"):
        kept(mtp="keep")
